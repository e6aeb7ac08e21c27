"""A robust student with any method of `ferdlib.methods`, in one plain loop: `train`.

    python examples/ard.py --method fair-ard                 # digits, with a teacher trained in place
    python examples/ard.py --method rslad --preset released --data cifar10 --download --teacher teacher.pt
    python examples/ard.py --method mtard --smoke            # two tiny epochs, on any machine
    torchrun --nproc-per-node 4 examples/ard.py --data cifar10 --teacher teacher.pt    # over four processes

Settings and schedule are those of the method's paper, or with `--preset released` of its authors' code (`--clip`
is always theirs); another number of epochs moves all dates in proportion. The epoch that is kept has the largest
sum of average and worst class under PGD-10 on images held out of the training set. The test images measure the
student that was kept. A run that was stopped or killed goes on with the same options and `--resume auto`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn
from tqdm import tqdm

from ard_setup import (
    Data,
    Run,
    Work,
    begin,
    checkpoints,
    digests,
    prepare,
    resolved,
    resume,
    state_of,
)
from ferdlib.augment import crop_flip
from ferdlib.distributed import gather, share
from ferdlib.evaluation import PROTOCOLS, AttackResult, Protocol, evaluate, merge
from ferdlib.methods import METHODS
from files import write_model
from image_data import AUGMENTATIONS, Images, Source
from long_run import Options, Stop, clear, interruptible, saved
from processes import average_buffers, count, first, join, mean, parallel, part, rank
from train_teacher import precision

Name = Literal[tuple(METHODS)]  # type: ignore[valid-type]
Value = None | bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    """Train or distil a robust student, and attack it class by class."""

    method: Name = "fair-ard"
    """A name that ferdlib.methods.create knows."""
    preset: Literal["paper", "released"] = "paper"
    """Settings and schedule of the method's paper, or of its authors' code."""
    eps: float | None = None
    """Radius of the L-infinity ball, in units of [0, 1] pixels; None: 0.1 for digits, else the preset's in
    training and 8/255 in the test. Papers: epsilon."""
    step_size: float | None = None
    """Step of the training attack, same units; None: a quarter of --eps, else the preset's. Papers: alpha."""
    attack_steps: int | None = None
    """Steps of the training attack; None: the preset's, 10. Papers: K."""
    beta: float | None = None
    """Exponent of the fair methods' weights, weight of TRADES' KL term, or of CFA's mixture; no unit."""
    clip: tuple[float, float] | None = (5 / 6, 5 / 2)
    """Limits of the fair methods' weights, whose mean is 1; the default is that of Fair-ARD's authors' code, with
    --preset paper, too. None is the paper's letter: a class that is always fooled takes all of the weight."""
    settings: dict[str, Value] = field(default_factory=dict)
    """Other fields of the method's class, by name and value, such as: temperature 5 alpha 0.9"""
    data: Source = "digits"
    """Images: a torchvision data set, "folder" for root/train and root/test, or scikit-learn's digits."""
    root: Path = Path("data")
    """Folder of the data."""
    download: bool = False
    """Fetch the data if they are not there."""
    augment: Literal["auto", "crop_flip", "crop", "none"] = "auto"
    """auto: crop and flip; crop alone where mirrored images differ (svhn); nothing for digits."""
    student: str | None = None
    """A name that ferdlib.models.build_model knows; None: small_cnn_16 for digits, else resnet18."""
    teacher: Path | None = None
    """Checkpoint of the robust teacher; None trains one in place (train_teacher.py has more options)."""
    natural_teacher: Path | None = None
    """Checkpoint of the MTARDs' natural teacher; None trains one in place."""
    teacher_architecture: str | None = None
    """Of the teachers: what their files hold, if those do not say it, and what is trained in place. None:
    small_cnn_40 for digits, else the student's."""
    teacher_eps: float | None = None
    """Radius at which a robust teacher is trained in place, in units of pixels; None: --eps, and 1.4 times
    that for digits."""
    teacher_epochs: int | None = None
    """Epochs of a teacher that is trained in place; None: 40 for digits, else 100."""
    epochs: int | None = None
    """Passes over the training images; None: 40 for digits, else the preset's."""
    batch_size: int | None = None
    """Images per step; None: 100 for digits, else the preset's, 128."""
    lr: float | None = None
    """Rate of SGD at the start, no unit; None: the preset's, 0.1. Papers: eta."""
    weight_decay: float | None = None
    """L2 coefficient, no unit; None: the preset's."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the models under autocast; losses stay in float32."""
    val_images: int | None = None
    """Training images held out, with equal shares of the classes; None: 257 for digits, else 1000."""
    select: Literal["best", "last"] = "best"
    """Which epoch is kept: the best on the images held out, or the last."""
    fair_average: bool | None = None
    """Train on, but keep CFA's average of the weights, over the epochs with at least 20 % in the worst class
    of the images held out; None: for cfa-ard."""
    test_images: int | None = None
    """Test images for the final table, with equal shares of the classes; None takes all."""
    autoattack: bool = False
    """Add AutoAttack to the final table: nearly a second per robust image and core on a CPU."""
    tensorboard: bool = False
    """Write the progress of each epoch for TensorBoard, under OUT/tensorboard."""
    seed: int = 0
    """Of the split, the weights and all noise."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""
    out: Path = Path("runs/ard")
    """Folder for checkpoints, student.pt, report.json, and the teachers that are trained in place."""
    smoke: bool = False
    """Two epochs of tiny models and short attacks, wherever nothing else is given."""


@dataclass(frozen=True)
class Epoch:
    """Its mean loss and its rate; PGD-10 on the images held out, of the student or of its average."""

    loss: float
    lr: float
    held_out: AttackResult
    seconds: float


def train(run: Run, data: Data, stop: Callable[[], bool] = lambda: False) -> Iterator[Epoch]:
    """Train to the last epoch, or until `stop` says so between steps, or between epochs of several processes."""
    args, method, student, several = run.args, run.method, run.student, count() > 1
    trained = parallel(student)
    augment = AUGMENTATIONS[args.data] if args.augment == "auto" else args.augment
    size, steps = args.batch_size, len(data.train) // args.batch_size
    while run.epoch < args.epochs:
        start, lr = time.perf_counter(), run.optimizer.param_groups[0]["lr"]
        if not len(run.left):
            run.left = torch.randperm(len(data.train), generator=run.rng)[: steps * size]
            run.total.zero_()
        if several:
            if stop():
                return
            run.noise.manual_seed(int(torch.randint(2**48, (), generator=run.rng)) + rank())
        trained.train()
        while len(run.left):
            if not several and stop():
                return
            index, run.left = run.left[:size], run.left[size:]
            x, y = data.train.batch(part(index), args.device)
            if augment != "none":
                x = crop_flip(x, flip=augment == "crop_flip", rng=run.noise)
            with precision(args):
                x_adv = method.attack(student, x, y)
                loss = method.loss(trained, x, x_adv, y).mean()
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            run.total += loss.detach()
        run.schedule.step()
        average_buffers(student)
        if hasattr(method, "validate"):
            batches = torch.arange(len(data.val)).split(args.batch_size)
            method.validate(student, (data.val.batch(rows, args.device) for rows in batches))
        method.sync()
        method.end_epoch()
        run.epoch += 1
        loss = float(mean(run.total)) / steps
        if not loss < float("inf"):
            raise RuntimeError(f"the loss became {loss} in epoch {run.epoch}; lower --lr")
        yield Epoch(loss, lr, keep_best(run, data.val), time.perf_counter() - start)


def keep_best(run: Run, held_out: Images) -> AttackResult:
    """What the images held out say after an epoch; the weights, if they are the best so far."""
    model, found = run.student, robustness(run.student, held_out, run.args)
    if run.average is not None:
        run.average.update(model, found.class_accuracy)
        if run.average.updates:
            model = run.average.module
            found = robustness(model, held_out, run.args)
    figure = found.average + found.worst_class
    if run.args.select == "last" or figure > run.best["figure"]:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        run.best = {"figure": figure, "epoch": run.epoch, "weights": weights}
    return found


def robustness(model: nn.Module, images: Images, args: Args) -> AttackResult:
    """Under PGD-10; plain accuracy for a natural teacher, which is trained at radius 0."""
    quick = protocol("quick", args).without("FGSM")
    found = evaluate(model, share(images), quick, num_classes=len(images.class_names))
    report = merge(gather(found))
    return report["clean" if args.eps == 0 else "PGD-10"]


def protocol(name: str, args: Args) -> Protocol:
    """One of the library's, at --eps or else at its own radius."""
    found = PROTOCOLS[name].with_seed(args.seed)
    return found.at(eps=args.eps) if args.eps else found


def selected(run: Run) -> nn.Module:
    """The student of the epoch that is kept."""
    run.student.load_state_dict(run.best["weights"])
    return run.student.eval()


def distil(work: Work, args: Args, stop: Stop) -> Run:
    """The teachers that are missing, then the student; the run that was stopped, or the student's."""
    teachers, sizes = dict(work.teachers), work.data.sizes
    for name, run in work.untrained.items():
        go(run, work.data, name, {}, stop)
        if run.epoch < run.args.epochs or stop():
            return run
        teachers[name] = selected(run)
        architecture = run.args.student
        if first():
            args.out.mkdir(parents=True, exist_ok=True)
            write_model(teachers[name], args.out / f"{name}.pt", architecture=architecture, **sizes)
    run, known = begin(args, work.data, teachers), digests(teachers)
    resume(run, "student", known)
    go(run, work.data, "student", known, stop)
    return run


def go(run: Run, data: Data, name: str, teachers: Mapping[str, str], stop: Stop) -> None:
    """Train a student or a teacher to the last epoch, or until it is stopped, with a checkpoint then."""
    args, student = run.args, name == "student"
    log = scalars(args.out / "tensorboard") if args.tensorboard and student and first() else None
    epochs = saved(
        run,
        partial(train, run, data),
        lambda: state_of(run, teachers),
        checkpoints=checkpoints(args, name),
        every=args.checkpoint_every,
        stop=stop,
    )
    title = args.method if student else name.replace("_", " ")
    shown = {"unit": "epoch", "desc": title, "disable": not first()}
    with tqdm(total=args.epochs, initial=run.epoch, **shown) as bar:
        for epoch in epochs:
            found = epoch.held_out
            bar.update()
            bar.set_postfix_str(
                f"loss {epoch.loss:.3f}, held out: {found.name} {100 * found.average:.1f}, "
                f"worst class {100 * found.worst_class:.1f}"
            )
            if log is not None:
                log(run.epoch, epoch)


def scalars(folder: Path) -> Callable[[int, Epoch], None]:
    """Writes an epoch's numbers for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(number: int, epoch: Epoch) -> None:
        found = epoch.held_out
        values = {"loss": epoch.loss, "learning_rate": epoch.lr, "seconds": epoch.seconds}
        values |= {"held_out/average": found.average, "held_out/worst_class": found.worst_class}
        for name, accuracy in zip(found.row_names, found.class_accuracy.tolist(), strict=True):
            values[f"held_out_class/{name}"] = accuracy
        for name, value in values.items():
            writer.add_scalar(name, value, number)
        writer.flush()

    return log


def test(run: Run, work: Work) -> None:
    """The student that was kept, on the test images."""
    args, student = run.args, selected(run)
    if first():
        write_model(student, args.out / "student.pt", architecture=args.student, **work.data.sizes)
    published = protocol("fair-ard", args)
    found = evaluate(
        student,
        share(work.tested),
        published if args.autoattack else published.without("AutoAttack"),
        num_classes=len(work.data.val.class_names),
        class_names=work.data.val.class_names,
        progress=first(),
    )
    report = merge(gather(found))
    if not first():
        return
    report.save(args.out / "report.json")
    kept = f"epoch {run.best['epoch']} of {args.epochs}"
    print(f"\n{args.method}, {args.preset}, {args.student}, {kept}:\n{report}\n")
    clear(args.out / "checkpoints")
    names = ["student.pt", *(f"{name}.pt" for name in work.untrained)]
    print(f"written to {args.out}/: {', '.join(names)}, report.json")


def main(args: Args) -> None:
    try:
        args = replace(resolved(args), device=join(args.device))
        work = prepare(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"ard: {' '.join(str(error).split())}")
    with Stop(args.max_minutes) as stop:
        try:
            run = distil(work, args, stop)
        except (RuntimeError, ValueError, OSError) as error:  # a NaN, other teachers, a full disk
            sys.exit(f"ard: {' '.join(str(error).split())}")
    if run.epoch < run.args.epochs or stop():
        stop.leave(f"after epoch {run.epoch} of {run.args.epochs}")
    else:
        test(run, work)


if __name__ == "__main__":
    with interruptible():
        main(tyro.cli(Args))
