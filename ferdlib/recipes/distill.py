"""`ferdlib distill`: FERD, a student from a robust teacher without data. The test images only measure it."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ferdlib.checkpoints import digest
from ferdlib.distributed import Ranks, join
from ferdlib.evaluation import PROTOCOLS, Protocol, RobustnessReport, compare
from ferdlib.models import build_model
from ferdlib.models.checkpoint import PUBLISHED
from ferdlib.plots import plot_classes, plot_images
from ferdlib.recipes import train
from ferdlib.recipes.data import Images, chosen, load
from ferdlib.recipes.evaluate import check_folder, measure, save_figures
from ferdlib.recipes.models import normalized, read_model, robustbench_file, write_model
from ferdlib.recipes.options import (
    SHAPES,
    Distill,
    ModelOptions,
    ObjectiveOptions,
    SelectionOptions,
    SGDOptions,
    Train,
)
from ferdlib.recipes.running import Session, check_ball, command, device, flag, settings_of, written
from ferdlib.trainer import EpochStats, FERDConfig, FERDTrainer

# Images in the figure of synthetic ones come from so many of the pool.
SHOWN = 2000


def run(args: Distill) -> None:
    """Check the options, distil, attack teacher and student."""
    args = replace(args, run=replace(args.run, device=join(device(args.run.device))))
    with Session(args.run) as session:
        source = args.images
        images = load(source.data, source.root, download=source.download, seed=args.run.seed)
        tested = chosen(images, args.test.test_images, args.run.seed)
        check_ball(eps=args.ferd.eps, step_size=args.ferd.step_size)
        config = config_for(args.ferd, args.images.data, images)
        published = protocol(config.eps, args)
        check_folder(args.run.out)
        build_model(args.student, **images.sizes)
        teacher = load_teacher(args, images, session)
        trainer = distil(
            teacher, config, args, session, name="student", title="FERD", root=images.digest()
        )
    report(trainer, tested, images, published, args, session)
    session.clear()


def config_for(config: FERDConfig, data: str, images: Images) -> FERDConfig:
    """Take classes and shape from the images, unless the options say others."""
    found = {"num_classes": len(images.class_names), "image_shape": tuple(images.pixels.shape[1:])}
    usual = dict(zip(found, SHAPES[data], strict=True))
    for name, value in found.items():
        given = getattr(config, name)
        if given not in (value, usual[name]):
            raise ValueError(f"expected {flag(name)} to be the data's, {value}, got {given}")
    return replace(config, **found)  # type: ignore[arg-type]


def load_teacher(args: Distill, images: Images, session: Session) -> nn.Module:
    """Read the teacher; a trial and the digits can do without a file."""
    if args.teacher is None:
        if not args.smoke and args.images.data != "digits":
            raise ValueError(
                "expected --teacher, a checkpoint of a robust model, got none; ferdlib train --method trades "
                f"--rule none --data {args.images.data} makes one"
            )
        training, _, _ = train.prepare(teacher_options(args))
        model = train.fit(training, session, "teacher")
        if Ranks.here().first:
            architecture = str(training.args.models.student)
            path = args.run.out / "teacher.pt"
            with session.results():
                write_model(model, path, architecture=architecture, **images.sizes)
    else:
        file = args.teacher
        if str(file) in PUBLISHED:
            download = args.images.download
            file = robustbench_file(str(file), args.images.data, download=download)
        model = read_model(file, architecture=args.teacher_architecture, **images.sizes)
    teacher: nn.Module = normalized(model, args.teacher_mean, args.teacher_std, prefix="teacher-")
    return teacher


def teacher_options(args: Distill) -> Train:
    """Options of a teacher that is trained in place."""
    found = train.resolved(
        Train(
            objective=ObjectiveOptions(method="sat", rule="none", eps=args.ferd.eps),
            models=ModelOptions(teacher_architecture=args.teacher_architecture),
            images=args.images,
            sgd=SGDOptions(batch_size=20 if args.smoke else None),
            selection=SelectionOptions(val_images=20 if args.smoke else None),
            run=args.run,
            smoke=args.smoke,
        )
    )
    return train.teacher_args(found, "teacher")


def distil(
    teacher: nn.Module,
    config: FERDConfig,
    args: Distill,
    session: Session,
    *,
    name: str,
    title: str,
    root: str | None = None,
) -> FERDTrainer:
    """Continue a student or start it, and train it to the last epoch; `root` is a digest of the test images."""
    torch.manual_seed(args.run.seed)
    channels = config.image_shape[0]
    student = build_model(args.student, config.num_classes, in_channels=channels)
    if args.channels_last:
        teacher.to(memory_format=torch.channels_last)
        student.to(memory_format=torch.channels_last)
    if not config.layer:
        layers: Any = teacher.feature_layers
        config = replace(config, layer=layers[-1])
    trainer = FERDTrainer(
        teacher,
        student,
        config=config,
        seed=args.run.seed,
        device=args.run.device,
        diagnostics=args.run.out if Ranks.here().first else None,
    )
    settings = settings_of(replace(args, ferd=config)) | {"teacher": digest(teacher), "root": root}
    session.resume(trainer, name, settings)
    session.finish(
        trainer,
        name,
        settings,
        title=title,
        epochs=trainer.epochs(),
        total=config.epochs,
        figures=figures,
    )
    student.eval()
    return trainer


def figures(stats: EpochStats) -> dict[str, float]:
    """Numbers of an epoch."""
    p = stats.class_probabilities
    shown = {} if stats.warmup else {"loss": stats.student_loss}
    shown |= {"labels agree": stats.label_agreement, "largest p": max(p)}
    values = {"train/learning_rate": stats.learning_rate, "train/seconds": stats.seconds}
    values |= {"images/diversity": stats.diversity}
    values |= {f"synthesis/{name}": value for name, value in stats.synthesis.items()}
    return shown | values | {f"p/{c}": value for c, value in enumerate(p)}


def protocol(eps: float, args: Any) -> Protocol:
    """Fair-ARD's, with steps of a quarter of the radius, whatever `--step-size` the training takes."""
    published = PROTOCOLS["fair-ard"].at(eps=eps).with_seed(args.run.seed)
    return published if args.test.autoattack else published.without("AutoAttack")


def measure_all(
    models: dict[str, nn.Module], data: Any, published: Protocol, class_names: tuple[str, ...]
) -> dict[str, RobustnessReport]:
    """Evaluate each model."""
    reports, first = {}, Ranks.here().first
    for name, model in models.items():
        if first:
            tqdm.write(f"{name} on {len(data)} test images", file=sys.stderr)
        reports[name] = measure(model, data, published, class_names=class_names, progress=first)
    return reports


def report(
    trainer: FERDTrainer,
    tested: Dataset[Any],
    images: Images,
    published: Protocol,
    args: Distill,
    session: Session,
) -> None:
    """Attack teacher and student class by class; print and write all results."""
    models = {"teacher": trainer.teacher, "student": trainer.student}
    reports = measure_all(models, tested, published, images.class_names)
    if not Ranks.here().first:
        return
    out = args.run.out
    comparison = compare(reports)
    print(f"\n{comparison}\n\n{comparison.test('student', 'teacher', 'PGD-20')}\n")
    print(f"The student, {args.preset}:\n{reports['student']}\n")
    figures = {
        "classwise": side_by_side(reports, published),
        "synthetic": synthetic(trainer, images.class_names[:10]),
    }
    with session.results():
        write_model(trainer.student, out / "student.pt", architecture=args.student, **images.sizes)
        for name, found in reports.items():
            found.save(out / f"report-{name}.json")
        drawn = save_figures(out, figures)
    names = ["student.pt", *(f"report-{name}.json" for name in reports), *drawn]
    print(f"{args.preset}, seed {args.run.seed}; {written(out, *names)}")
    shown = {"checkpoint": out / "student.pt", "data": args.images.data, "root": args.images.root}
    print(
        f"evaluate it: {command('evaluate', **shown, eps=trainer.config.eps, seed=args.run.seed)}"
    )


def side_by_side(reports: dict[str, RobustnessReport], published: Protocol) -> Any:
    """Draw the models' classes under PGD-20."""
    found = {name: report["PGD-20"] for name, report in reports.items()}
    axes = plot_classes(
        {name: result.class_accuracy for name, result in found.items()},
        intervals={name: result.class_interval for name, result in found.items()},
        class_names=next(iter(reports.values())).class_names,
        ylabel="PGD-20 accuracy (%)",
    )
    eps = next(attack.eps for attack in published.attacks if attack.name == "PGD-20")
    axes.set_title(f"Class-wise robust accuracy, L-inf eps {eps:.3g}, 95 % intervals")
    return axes


def synthetic(trainer: FERDTrainer, class_names: tuple[str, ...]) -> Any:
    """Draw stored images of the first classes."""
    count = min(len(trainer.pool), SHOWN)
    x, y = trainer.pool.sample(count, rng=torch.Generator().manual_seed(0))
    shown = y < len(class_names)
    axes = plot_images(x[shown], y[shown], num_classes=len(class_names), class_names=class_names)
    axes.set_title("Synthetic images by the label they were made for")
    return axes
