"""FERD at CIFAR scale: a student from a robust teacher, without data. The test images only measure it.

    python examples/cifar10_ferd.py --teacher Chen2024Data_WRN_34_10 --download
    python examples/cifar10_ferd.py --teacher runs/teacher/teacher.pt --student mobilenet_v2 --preset released
    torchrun --nproc-per-node 4 examples/cifar10_ferd.py ...    # the same over four processes
    python examples/cifar10_ferd.py --smoke        # two tiny epochs on generated images, on any machine

`--preset` sets every option of FERD at once (default: ferdlib's recommended ones; paper: the text to the
letter; released: what the authors' code computes), each option given beside it changes one. A run that was
stopped or killed goes on with the same options and `--resume auto`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

import train_teacher
from ferdlib.distributed import gather, share
from ferdlib.evaluation import PROTOCOLS, Protocol, compare, evaluate, merge
from ferdlib.models import build_model
from ferdlib.models.checkpoint import PUBLISHED
from ferdlib.plots import plot_images
from ferdlib.trainer import Checkpoints, EpochStats, FERDConfig, FERDTrainer
from files import write_model
from image_data import SHAPES, Images, Source, chosen, load
from long_run import Options, Stop, check, check_options, clear, found, interruptible, saved
from model_sources import normalized, read_model
from processes import first, first_ahead, join

PRESETS = {"default": FERDConfig, "paper": FERDConfig.paper, "released": FERDConfig.released}
# Sizes of `--smoke`, whatever the preset says of them.
SMOKE: dict[str, Any] = {
    "epochs": 2,
    "warmup_epochs": 1,
    "batch_size": 16,
    "generator_steps": 3,
    "generator_width": 8,
    "bottleneck_steps": 3,
    "student_steps": 3,
    "attack_steps": 3,
    "margin_attack_steps": 3,
}


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    """Distil a robust student without data (FERD), and attack it class by class."""

    ferd: Annotated[FERDConfig, tyro.conf.arg(name="")]
    """FERD's settings."""
    teacher: Path | None = None
    """Checkpoint of the robust teacher, or a name of RobustBench: Chen2024Data_WRN_34_10 is the paper's
    f^T. A name is looked for under models/, where RobustBench puts it; --download lets it."""
    teacher_architecture: str | None = None
    """What the checkpoint is, such as wide_resnet_34_10; not needed if the file or its name says it."""
    teacher_mean: tuple[float, float, float] | None = None
    """Mean of the channels that the teacher's inputs are normalised with, in units of [0, 1] pixels."""
    teacher_std: tuple[float, float, float] | None = None
    """Standard deviation of the same, same units."""
    student: str = "resnet18"
    """Architecture of the student: resnet18, mobilenet_v2 or another name of ferdlib.models.build_model.
    Paper: f^S."""
    preset: Literal["default", "paper", "released"] = "default"
    """Where FERD's options come from that are not given: section 5.1 of the paper, its release, or ours."""
    data: Source = "cifar10"
    """Test images: a torchvision data set, or "folder" for root/test (or val) with a folder a class."""
    root: Path = Path("data")
    """Folder of the data."""
    download: bool = False
    """Fetch the data if they are not there."""
    test_images: int | None = None
    """How many test images, with equal shares of the classes; None takes all."""
    autoattack: bool = False
    """Add AutoAttack to the table: nearly a second per robust image and core on a CPU."""
    channels_last: bool = False
    """Memory format of the models; faster on recent GPUs."""
    tensorboard: bool = False
    """Write the progress of each epoch for TensorBoard, under OUT/tensorboard."""
    resume: Literal["auto"] | Path | None = None
    """auto: continue from the newest checkpoint in --out, made with the same options, or start if there is
    none; a path: continue from that one."""
    checkpoint_every: int = 10
    """Epochs between checkpoints; there is also one after the last epoch, and where the run is stopped."""
    seed: int = 0
    """Of the student's weights and all noise. Paper: five runs; release: 0."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""
    out: Path = Path("runs/cifar10_ferd")
    """Folder for checkpoints, student.pt, the reports of teacher and student, and synthetic.png."""
    smoke: bool = False
    """Two epochs of tiny sizes on generated images, with a tiny teacher unless one is given."""


def parse(argv: list[str]) -> Args:
    """Preset, data and --smoke first, because they set the defaults of everything else."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", choices=PRESETS, default="default")
    early.add_argument("--data", choices=SHAPES, default="cifar10")
    early.add_argument("--smoke", action="store_true")
    known, _ = early.parse_known_args(argv)
    data = "folder" if known.smoke else known.data
    classes, shape = SHAPES[data]
    sizes = SMOKE if known.smoke else {}
    config = PRESETS[known.preset](num_classes=classes, layer="", image_shape=shape, **sizes)
    student = "small_cnn_8" if known.smoke else "resnet18"
    default = Args(ferd=config, preset=known.preset, data=data, student=student, smoke=known.smoke)
    return tyro.cli(Args, args=argv, default=default)


def generated_images(root: Path, config: FERDConfig) -> None:
    """Noise in a colour of its own for every class, as files that `--data folder` reads."""
    from torchvision.utils import save_image

    rng = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("test", 4)):
        for c in range(config.num_classes):
            folder = root / split / f"class{c:03d}"
            folder.mkdir(parents=True)
            colour = torch.rand(
                config.image_shape[0], 1, 1, generator=torch.Generator().manual_seed(c)
            )
            for k in range(count):
                noise = torch.rand(config.image_shape, generator=rng)
                save_image((0.7 * colour + 0.3 * noise), folder / f"{k}.png")


def tiny_teacher(args: Args) -> Path:
    """A small network after a few steps of adversarial training on the generated images."""
    path = args.root / "teacher.pt"
    settings = train_teacher.Args(
        data="folder",
        root=args.root,
        architecture="wide_resnet_10_1",
        method="sat",
        epochs=2,
        batch_size=20,
        val_images=10,
        attack_steps=3,
        device=args.device,
        out=args.root,
    )
    training, _, _ = train_teacher.prepare(settings)
    for _ in training.epochs():
        pass
    training.save_model(path)
    return path


def robustbench_file(name: str, args: Args) -> Path:
    """Where RobustBench keeps a model of that name, after it has fetched it if that was asked for."""
    path = Path("models", args.data, "Linf", f"{name}.pt")
    with first_ahead(args.download):
        if args.download and not path.is_file():
            fetch_robustbench(name, args.data)
    return path


def fetch_robustbench(name: str, data: Source) -> None:
    import pyautoattack

    sys.modules.setdefault("autoattack", pyautoattack)  # the name under which it asks for it
    try:
        from robustbench.utils import load_model
    except ImportError as error:
        raise ValueError(
            f'expected RobustBench to fetch {name}, got {error}; pip install "ferdlib[robustbench]"'
        ) from error
    load_model(name, dataset=data, threat_model="Linf")


def load_teacher(args: Args, images: Images) -> nn.Module:
    if args.teacher is None:
        raise ValueError("expected --teacher, a checkpoint of a robust model, got none")
    teacher = read_model(
        args.teacher,
        architecture=args.teacher_architecture,
        num_classes=len(images.class_names),
        in_channels=images.pixels.shape[1],
    )
    return normalized(teacher, args.teacher_mean, args.teacher_std, prefix="teacher-")


def prepare(args: Args) -> tuple[FERDTrainer, Dataset[Any], tuple[str, ...]]:
    """Everything that can be wrong with the input is found here, before anything is written."""
    images = load(args.data, args.root, "test", download=args.download)
    found = {"num_classes": len(images.class_names), "image_shape": tuple(images.pixels.shape[1:])}
    for name, value in found.items():
        if value != getattr(args.ferd, name):
            raise ValueError(
                f"expected --{name.replace('_', '-')} to be the data's, {value}, got "
                f"{getattr(args.ferd, name)}"
            )
    check(args)
    protocol(args)  # refuses a radius of 0
    tested = chosen(images, args.test_images, args.seed)
    teacher = load_teacher(args, images)
    torch.manual_seed(args.seed)
    student = build_model(args.student, args.ferd.num_classes, in_channels=args.ferd.image_shape[0])
    if args.channels_last:
        teacher.to(memory_format=torch.channels_last)
        student.to(memory_format=torch.channels_last)
    config = args.ferd
    if not config.layer:
        config = replace(config, layer=teacher.feature_layers[-1])
    diagnostics = args.out if first() else None
    trainer = FERDTrainer(
        teacher, student, config=config, seed=args.seed, device=args.device, diagnostics=diagnostics
    )
    resume(trainer, args)
    return trainer, tested, images.class_names


def checkpoints(args: Args) -> Checkpoints:
    return Checkpoints(args.out / "checkpoints", keep=args.keep_checkpoints)


def state_of(trainer: FERDTrainer, args: Args) -> dict[str, Any]:
    options = {"seed": args.seed, "student": args.student, "channels_last": args.channels_last}
    return {
        "options": options | {"teacher": digest(args.teacher)},
        "trainer": trainer.state_dict(),
    }


def resume(trainer: FERDTrainer, args: Args) -> None:
    ours = state_of(trainer, args)
    state = found(checkpoints(args), args.resume, set(ours))
    if state is not None:
        check_options(state["options"], ours["options"])
        trainer.load_state_dict(state["trainer"])


def digest(path: Path | None) -> str:
    with open(path or os.devnull, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def train(trainer: FERDTrainer, args: Args, stop: Stop) -> None:
    """To the last epoch, or until it is stopped, with a checkpoint then."""
    log = scalars(args.out / "tensorboard") if args.tensorboard and first() else None
    epochs = saved(
        trainer,
        lambda stop: trainer.epochs(stop=stop),
        lambda: state_of(trainer, args),
        checkpoints=checkpoints(args),
        every=args.checkpoint_every,
        stop=stop,
    )
    count = trainer.config.epochs
    shown = {"unit": "epoch", "desc": "FERD", "disable": not first()}
    with tqdm(total=count, initial=trainer.epoch, **shown) as bar:
        for stats in epochs:
            bar.update()
            bar.set_postfix_str(
                ("warm-up" if stats.warmup else f"loss {stats.student_loss:.3f}")
                + f", labels agree {stats.label_agreement:.0%}"
                + f", largest p {max(stats.class_probabilities):.2f}"
                + f", {stats.seconds:.0f} s"
            )
            if log is not None:
                log(stats)


def scalars(folder: Path) -> Callable[[EpochStats], None]:
    """Writes an epoch's numbers for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(stats: EpochStats) -> None:
        values = {
            "student/loss": stats.student_loss,
            "student/learning_rate": stats.learning_rate,
            "images/label_agreement": stats.label_agreement,
            "images/diversity": stats.diversity,
            "seconds": stats.seconds,
        }
        values |= {f"synthesis/{name}": value for name, value in stats.synthesis.items()}
        values |= {f"p/{c}": value for c, value in enumerate(stats.class_probabilities)}
        for name, value in values.items():
            writer.add_scalar(name, value, stats.epoch)
        writer.flush()

    return log


def protocol(args: Args) -> Protocol:
    """Fair-ARD's, with steps of a quarter of the radius, whatever `--step-size` the training takes."""
    published = PROTOCOLS["fair-ard"].at(eps=args.ferd.eps).with_seed(args.seed)
    return published if args.autoattack else published.without("AutoAttack")


def report(
    trainer: FERDTrainer, tested: Dataset[Any], class_names: tuple[str, ...], args: Args
) -> None:
    """Teacher and student class by class, and synthetic images of the first ten classes."""
    reports = {}
    for name, model in {"teacher": trainer.teacher, "student": trainer.student}.items():
        if first():
            tqdm.write(f"{name} on the test images", file=sys.stderr)
        found = evaluate(
            model,
            share(tested),
            protocol(args),
            num_classes=len(class_names),
            class_names=class_names,
            progress=first(),
        )
        reports[name] = merge(gather(found))
    if not first():
        return
    args.out.mkdir(parents=True, exist_ok=True)
    write_model(
        trainer.student,
        args.out / "student.pt",
        architecture=args.student,
        num_classes=args.ferd.num_classes,
        in_channels=args.ferd.image_shape[0],
    )
    for name, found in reports.items():
        found.save(args.out / f"report-{name}.json")
    comparison = compare(reports)
    print(f"\n{comparison}\n\n{comparison.test('student', 'teacher', 'PGD-20')}\n")
    print(f"The student, {args.preset}:\n{reports['student']}\n")

    x, y = trainer.pool.sample(
        min(len(trainer.pool), 2000), rng=torch.Generator().manual_seed(args.seed)
    )
    names = class_names[:10]
    shown = y < len(names)
    axes = plot_images(x[shown], y[shown], num_classes=len(names), class_names=names)
    axes.figure.savefig(args.out / "synthetic.png", dpi=150)
    written = "student.pt, report-teacher.json, report-student.json, synthetic.png"
    print(f"{args.preset}, seed {args.seed}; written to {args.out}/: {written}")


def main(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            args = parse(argv)
            args = replace(args, device=join(args.device))
            if args.smoke:
                args = replace(args, root=Path(folder))
                generated_images(args.root, args.ferd)
                args = replace(args, teacher=args.teacher or tiny_teacher(args))
            if args.teacher is not None and str(args.teacher) in PUBLISHED:
                args = replace(args, teacher=robustbench_file(str(args.teacher), args))
            trainer, tested, class_names = prepare(args)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            sys.exit(f"cifar10_ferd: {error}")
        with Stop(args.max_minutes) as stop:
            try:
                train(trainer, args, stop)
            except (RuntimeError, OSError) as error:  # numbers that became NaN, a full disk
                sys.exit(f"cifar10_ferd: {error}")
        if trainer.epoch < trainer.config.epochs or stop():
            stop.leave(f"after epoch {trainer.epoch} of {trainer.config.epochs}")
            return
        report(trainer, tested, class_names, args)
        if first():
            clear(args.out / "checkpoints")


if __name__ == "__main__":
    with interruptible():
        main(sys.argv[1:])
