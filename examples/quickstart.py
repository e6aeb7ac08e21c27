"""FERD from end to end on a CPU, in minutes and without a download.

A robust teacher is trained on scikit-learn's 1,797 digits (8x8 pixels), the data are put away, and a
student a sixth of its size is distilled from the teacher alone. Both are then attacked on the 540 test
digits. The models are chosen by nothing: the last epoch counts, and the test digits only measure it.

    python examples/quickstart.py                # the tables and three pictures, under runs/
    python examples/quickstart.py --ablate       # the rows with and without each of FERD's parts
    python examples/quickstart.py --autoattack   # one more column, and many more minutes
    python examples/quickstart.py --resume auto  # go on with a run that was stopped or killed
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ferdlib.attacks import pgd
from ferdlib.evaluation import PROTOCOLS, RobustnessReport, compare, evaluate
from ferdlib.models import small_cnn
from ferdlib.plots import plot_classes, plot_images, plot_weights
from ferdlib.trainer import Checkpoints, FERDConfig, FERDTrainer
from files import write_model
from long_run import Options, Stop, check, check_options, clear, found, interruptible, saved
from processes import alone

# Threat model: L-infinity, a tenth of the grey scale; steps of a quarter of that.
EPS, STEP_SIZE = 0.1, 0.025
# A teacher of 1,000 images overfits; trained at a larger radius it is more robust at the smaller one.
TEACHER_EPS, TEACHER_STEP_SIZE = 0.14, 0.035
TEACHER_WIDTH, STUDENT_WIDTH = 40, 16
# The paper's Table 3 in small, around all three parts. The default is its row without FAEs, because
# fairness-aware examples helped at no weight that was tried here beyond the spread (docs/results.md).
FAES: dict[str, object] = {"uniformity_loss_weight": 0.1}
ABLATIONS: dict[str, dict[str, object]] = {
    "all three parts": FAES,
    "w/o reweighting": FAES | {"reweighting": "none"},
    "w/o FAEs (= FERD)": {},
    "w/o UTAEs": FAES | {"gamma": 0.0},
    "w/o all three": {"reweighting": "none", "gamma": 0.0},
}

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    """Train a robust teacher on digits, distil a student from it without data, attack both."""

    seed: int = 0
    """Of the split, the models and all noise."""
    autoattack: bool = False
    """Add AutoAttack: nearly a second per robust image and core."""
    ablate: bool = False
    """Distil four more students: all three parts of FERD, and without one or all of them."""
    teacher_epochs: int = 30
    """Epochs of the teacher's adversarial training."""
    epochs: int = 30
    """Epochs of the distillation, three of them warm-up."""
    out: Path = Path("runs/quickstart")
    """Folder for checkpoints, the pictures, the reports and the student's weights."""


def digits(seed: int) -> dict[str, Data]:
    """1,000 digits to train the teacher, 257 to choose on, 540 to report; grey values in [0, 1]."""
    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(bunch.target)
    rest, test = train_test_split(range(len(y)), test_size=540, random_state=seed, stratify=y)
    train, val = train_test_split(rest, test_size=257, random_state=seed, stratify=y[rest])
    return {"train": (x[train], y[train]), "val": (x[val], y[val]), "test": (x[test], y[test])}


def train_teacher(args: Args, data: Data, stop: Stop) -> nn.Module:
    """PGD adversarial training (Madry et al. 2018), written with ferdlib's `pgd`; averaged weights."""
    x, y = data
    rng = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    model = small_cnn(1, 10, width=TEACHER_WIDTH).to(memory_format=torch.channels_last)  # faster
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    batches = args.teacher_epochs * len(x.split(100))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=batches)
    attack = partial(pgd, eps=TEACHER_EPS, step_size=TEACHER_STEP_SIZE, steps=7, rng=rng)

    options = {"seed": args.seed, "teacher_epochs": args.teacher_epochs}
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
    kept = checkpoints(args, "teacher")
    state = found(kept, args.resume, {"options", "epoch", "rng", *parts})
    if state is not None:
        check_options(state["options"], options)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        rng.set_state(state["rng"])

    first, last = 0 if state is None else state["epoch"], args.teacher_epochs
    title = "teacher, adversarial training"
    for epoch in tqdm(range(first, last), title, last, initial=first, unit="epoch"):
        for index in torch.randperm(len(x), generator=rng).split(100):
            loss = F.cross_entropy(model(attack(model, x[index], y[index])), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
        done, leaving = epoch + 1, stop() or stop.late
        if leaving or done == last or done % args.checkpoint_every == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            kept.save(state | {"options": options, "epoch": done, "rng": rng.get_state()}, done)
        if leaving:
            stop.leave(f"after epoch {done} of {last} of the teacher")
            sys.exit()
    return averaged.module.eval()


def config(epochs: int, **changes: object) -> FERDConfig:
    """FERD's defaults with the sizes of this small problem, which were chosen on the 257 digits.

    Few generator steps ask for larger rates and a lighter BatchNorm term than 200 of them, and an 8x8
    digit neither bears a crop nor a flip.
    """
    settings: dict[str, object] = {
        "num_classes": 10,
        "layer": "layer4",
        "image_shape": (1, 8, 8),
        "epochs": epochs,
        "warmup_epochs": min(3, epochs - 1),
        "batch_size": 128,
        "generator_steps": 30,
        "generator_width": 32,
        "generator_lr": 5e-3,
        "latent_lr": 0.05,
        "bn_loss_weight": 1.0,
        "student_steps": 80,
        "eps": EPS,
        "step_size": STEP_SIZE,
        "augment": "none",
    }
    return FERDConfig(**(settings | changes))  # type: ignore[arg-type]


def checkpoints(args: Args, name: str) -> Checkpoints:
    """Of the teacher, or of a student by its number."""
    return Checkpoints(args.out / "checkpoints" / name, keep=args.keep_checkpoints)


def distil(
    teacher: nn.Module, settings: FERDConfig, args: Args, stop: Stop, *, number: int, name: str
) -> FERDTrainer:
    """A student from the teacher alone."""
    torch.manual_seed(args.seed)
    student = small_cnn(1, 10, width=STUDENT_WIDTH).to(memory_format=torch.channels_last)
    trainer = FERDTrainer(teacher, student, config=settings, seed=args.seed, diagnostics=args.out)
    kept = checkpoints(args, f"student-{number}")
    state = found(kept, args.resume, {"trainer"})
    if state is not None:
        trainer.load_state_dict(state["trainer"])
    epochs = saved(
        trainer,
        lambda stop: trainer.epochs(stop=stop),
        lambda: {"trainer": trainer.state_dict()},
        checkpoints=kept,
        every=args.checkpoint_every,
        stop=stop,
    )
    title = f"student, {name}"
    with tqdm(total=settings.epochs, initial=trainer.epoch, desc=title, unit="epoch") as bar:
        for stats in epochs:
            bar.update()
            shown = ["warm-up" if stats.warmup else f"loss {stats.student_loss:.3f}"]
            if settings.uniformity_loss_weight:
                shown.append(f"non-robust {stats.synthesis['nonrobust_fraction']:.0%}")
            shown.append(f"labels agree {stats.label_agreement:.0%}")
            shown.append(f"largest p {max(stats.class_probabilities):.2f}")
            bar.set_postfix_str(", ".join(shown))
    if trainer.epoch < settings.epochs or stop():
        stop.leave(f"after epoch {trainer.epoch} of {settings.epochs} of the {title}")
        sys.exit()
    student.eval()
    return trainer


def attack(models: dict[str, nn.Module], data: Data, args: Args) -> dict[str, RobustnessReport]:
    """Fair-ARD's evaluation of each model at this threat model, class by class."""
    protocol = PROTOCOLS["fair-ard"].at(eps=EPS).with_seed(args.seed)
    if not args.autoattack:
        protocol = protocol.without("AutoAttack")
    reports = {}
    for name, model in models.items():
        tqdm.write(f"{name} on {len(data[1])} test digits", file=sys.stderr)
        reports[name] = evaluate(model, data, protocol, num_classes=10, progress=True)
    return reports


def draw(reports: dict[str, RobustnessReport], trainer: FERDTrainer, out: Path) -> None:
    """Teacher and student class by class, the weights beside the student's classes, synthetic images."""
    found = {name: reports[name]["PGD-20"] for name in ("teacher", "FERD")}
    classes = plot_classes(
        {name: result.class_accuracy for name, result in found.items()},
        intervals={name: result.class_interval for name, result in found.items()},
        ylabel="PGD-20 accuracy (%)",
    )
    classes.set(
        title=f"Class-wise robust accuracy, L-inf eps {EPS}, 95 % intervals", xlabel="digit"
    )
    weights = plot_weights(
        trainer.class_probabilities,
        found["FERD"].class_accuracy,
        weights_label="class probability",
        accuracy_label="PGD-20 accuracy (%)",
    )
    weights.set(
        title="Class probabilities after the last epoch, and the student they led to",
        xlabel="digit",
    )
    x, y = trainer.pool.sample(len(trainer.pool), rng=torch.Generator().manual_seed(0))
    images = plot_images(x, y, num_classes=10)
    images.set(title="Synthetic images by the label they were made for")
    for name, axes in (("classwise", classes), ("weights", weights), ("synthetic", images)):
        axes.figure.savefig(out / f"{name}.png", dpi=150)


def train(args: Args, data: Data) -> tuple[FERDTrainer, dict[str, nn.Module]]:
    """FERD's run, and all models by the names of their rows."""
    with Stop(args.max_minutes) as stop:
        teacher = train_teacher(args, data, stop)
        trainer = distil(teacher, config(args.epochs), args, stop, number=0, name="FERD")
        models = {"teacher": teacher, "FERD": trainer.student}
        for number, name in enumerate(ABLATIONS if args.ablate else (), start=1):
            settings, other = config(args.epochs, **ABLATIONS[name]), trainer
            if settings != trainer.config:
                other = distil(teacher, settings, args, stop, number=number, name=name)
            models[name] = other.student
    return trainer, models


def main(args: Args) -> None:
    alone("quickstart")
    start = time.perf_counter()
    data = digits(args.seed)
    try:
        check(args)
        trainer, models = train(args, data.pop("train"))
    except (ValueError, RuntimeError, OSError) as error:  # wrong input, a NaN, a full disk
        sys.exit(f"quickstart: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    reports = attack(models, data["test"], args)
    comparison = compare(reports)
    print(f"\n{comparison}\n\n{comparison.test('FERD', 'teacher', 'PGD-20')}\n")
    print(f"The FERD student:\n{reports['FERD']}\n")
    for name in ("teacher", "FERD"):
        reports[name].save(args.out / f"report-{name}.json")
    draw(reports, trainer, args.out)
    write_model(
        trainer.student,
        args.out / "student.pt",
        architecture=f"small_cnn_{STUDENT_WIDTH}",
        num_classes=10,
        in_channels=1,
    )
    sizes = [
        sum(p.numel() for p in model.parameters()) for model in (models["teacher"], trainer.student)
    ]
    print(f"teacher {sizes[0]:,} parameters, student {sizes[1]:,}; seed {args.seed}")
    written = "report-teacher.json, report-FERD.json, classwise.png, weights.png, synthetic.png"
    print(f"written to {args.out}/: {written}, student.pt")
    clear(args.out / "checkpoints")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    with interruptible():
        main(tyro.cli(Args))
