"""How robust is a classifier, class by class? Any model, any data, a published protocol.

    python examples/evaluate.py --checkpoint runs/quickstart/student.pt --data digits --eps 0.1
    python examples/evaluate.py --factory mine:net --data GTSRB --num-classes 43 --image-size 32 32 --resume
    python examples/evaluate.py --checkpoint b.pt --against runs/a/report.json --sweep 0.01 0.02 --out runs/b

The tables are printed and written, with the report that `ferdlib.evaluation.RobustnessReport.load` reads, and
figures. AutoAttack takes nearly a second per robust image and core on a CPU: `--without AutoAttack` for a
look, `--fast` for a faster copy of the model, `--resume` for a run that may be interrupted.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ferdlib import plots
from ferdlib.distributed import gather, share
from ferdlib.evaluation import (
    PROTOCOLS,
    AttackResult,
    Protocol,
    RobustnessReport,
    compare,
    evaluate,
    merge,
)
from image_data import Images, Streamed, chosen, load_any
from model_sources import Model, check_model, made_by, normalized, read_model
from processes import first, join

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Sweep = dict[float, AttackResult]  # by radius; the clean images at 0

WORST_CASE = "worst case"
MANY_CLASSES = 12  # of more, lines are easier to read than bars


@dataclass(frozen=True)
class Args:
    """Class-wise robustness of a model: tables, figures, and a report to compare with."""

    checkpoint: Path | None = None
    """File with the weights of an architecture of ferdlib.models, or of RobustBench under its name there."""
    architecture: str | None = None
    """A name that ferdlib.models.build_model knows, such as resnet18; None: the file or its name says it."""
    factory: str | None = None
    """Instead of --checkpoint: package.module:function, imported from the current directory or the path and
    called without arguments for the model, from images in [0, 1] to logits."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel that the model's inputs are normalised with, in units of [0, 1] pixels."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the same, same units."""
    data: str = "cifar10"
    """Test images: cifar10, cifar100, svhn, tiny-imagenet, digits, folder (ROOT/test or val with a folder a
    class), or a data set of torchvision.datasets by its name, such as MNIST, GTSRB or ImageFolder."""
    root: Path = Path("data")
    """Folder of the data."""
    split: str = "test"
    """Which part of a data set of torchvision that has a choice; ImageNet's is val."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels, to which images of torchvision's data sets are resized; None leaves them."""
    download: bool = False
    """Fetch the data if they are not there."""
    num_classes: int | None = None
    """How many classes there are, for data that do not say it, such as GTSRB."""
    test_images: int | None = None
    """How many test images, with equal shares of the classes; None takes all."""
    protocol: str = "fair-ard"
    """The attacks and their settings: fair-ard, ferd, trades, robustbench or quick."""
    eps: float | None = None
    """Radius of the L-infinity ball, in units of [0, 1] pixels, steps in proportion; None takes the protocol's.
    Papers: epsilon."""
    without: tuple[str, ...] = ()
    """Attacks of the protocol to leave out, such as AutoAttack."""
    survivors: bool = False
    """Run AutoAttack only on what withstood the attacks before it: its column is then the worst case."""
    seed: int = 0
    """Of the noise, and of the choice of --test-images."""
    sweep: tuple[float, ...] = ()
    """Radii, same units as --eps, for a table and a figure of PGD-20 over the radius."""
    trust: bool = False
    """Look for signs of masked gradients, too, on a few hundred of the images."""
    against: Path | None = None
    """A report.json of the same classes to compare with, and to test the difference if it has the same images."""
    figure_attack: str | None = None
    """Whose confusion matrix is drawn: an attack, clean, or "worst case"; None takes the last attack."""
    batch_size: int = 128
    """Images at a time; AutoAttack's are the protocol's."""
    fast: bool = False
    """Attack a copy of the model that is faster and the same but for rounding."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    resume: bool = False
    """Keep finished parts under OUT/parts, and continue from those that are there."""
    out: Path = Path("runs/evaluate")
    """Folder for report.json, .md, .tex and .csv, classwise.png, confusion.png, survival.png and sweep.png."""


@dataclass(frozen=True)
class Work:
    """What the options ask for, checked."""

    model: Model
    data: Dataset[Any]
    class_names: tuple[str, ...]
    protocol: Protocol
    sweep: dict[float, Protocol]
    figure_attack: str
    against: RobustnessReport | None


def prepare(args: Args) -> Work:
    """Everything that can be wrong with the input is found here, before anything is written."""
    if args.trust and "RANK" in os.environ:
        raise ValueError(
            "expected no --trust with several processes, each of which has a share, got it"
        )
    if args.protocol not in PROTOCOLS:
        known = ", ".join(PROTOCOLS)
        raise ValueError(f"expected --protocol to be one of {known}, got {args.protocol!r}")
    protocol = PROTOCOLS[args.protocol].with_seed(args.seed)
    protocol = protocol if args.eps is None else protocol.at(eps=args.eps)
    protocol = protocol.without(*args.without)
    protocol = protocol.on_survivors() if args.survivors else protocol
    pgd = PROTOCOLS["fair-ard"].without("FGSM", "CW-inf", "AutoAttack").with_seed(args.seed)
    sweep = {eps: pgd.at(eps=eps) for eps in sorted(set(args.sweep))}
    columns = ["clean", *(attack.name for attack in protocol.attacks), WORST_CASE]
    drawn = args.figure_attack or columns[-2]
    if drawn not in columns:
        known = ", ".join(columns)
        raise ValueError(f"expected --figure-attack to be one of {known}, got {drawn!r}")
    existing = next(p for p in (args.out, *args.out.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OSError(f"expected --out to be a folder that can be written, got {str(args.out)!r}")

    images = load_any(
        args.data,
        args.root,
        download=args.download,
        split=args.split,
        image_size=args.image_size,
        num_classes=args.num_classes,
    )
    names = images.class_names
    against = None if args.against is None else RobustnessReport.load(args.against)
    if against is not None:  # refused with other classes, or other settings of the same attacks
        ours = replace(against, class_names=names, groups=None, protocol=protocol)
        compare({"this": ours, "against": against})
    data = chosen(images, args.test_images, args.seed)
    return Work(load_model(args, images), data, names, protocol, sweep, drawn, against)


def load_model(args: Args, images: Images | Streamed) -> Model:
    """The model on its device, after it has answered two of the images."""
    if (args.checkpoint is None) == (args.factory is None):
        raise ValueError("expected one of --checkpoint and --factory, got none or both")
    x = torch.stack([images[k][0] for k in (0, len(images) - 1)])
    classes = len(images.class_names)
    if args.checkpoint is None:
        model = made_by(str(args.factory))
    else:
        sizes = {"num_classes": classes, "in_channels": x.shape[1]}
        model = read_model(args.checkpoint, architecture=args.architecture, **sizes)
    model = normalized(model, args.mean, args.std)
    if isinstance(model, nn.Module):
        model.to(args.device).eval()
    check_model(model, x.to(args.device), classes)
    return model


def measure(work: Work, args: Args) -> tuple[RobustnessReport, Sweep]:
    """The report, saved as soon as it is there, and PGD-20 at each radius of the sweep."""

    process = os.environ.get("RANK", "")  # of those that torchrun starts, each has its own share

    def run(protocol: Protocol, part: str, trust: bool) -> RobustnessReport:
        folder = args.out / "parts" / part / process if process else args.out / "parts" / part
        found = evaluate(
            work.model,
            share(work.data),
            protocol,
            num_classes=len(work.class_names),
            class_names=work.class_names,
            batch_size=args.batch_size,
            fast=args.fast,
            device=args.device,
            resume=folder if args.resume else None,
            trust=trust,
            progress=first(),
        )
        return merge(gather(found))

    report = run(work.protocol, "report", args.trust)
    if first():
        args.out.mkdir(parents=True, exist_ok=True)
        report.save(args.out / "report.json")
    sweep = {0.0: report["clean"]} if work.sweep else {}
    for eps, protocol in work.sweep.items():
        if first():
            tqdm.write(f"PGD-20 at eps {eps:g}", file=sys.stderr)
        sweep[eps] = run(protocol, f"sweep-{eps!r}", False)["PGD-20"]
    return report, sweep


def show(report: RobustnessReport, sweep: Sweep, against: RobustnessReport | None) -> None:
    """Print everything."""

    def shown(value: float, interval: Tensor) -> str:
        low, high = (100 * interval).tolist()
        return f"{100 * value:.1f} [{low:.1f}, {high:.1f}]"

    print(f"\n{report}\n")
    if sweep:
        print("eps       PGD-20, average       worst class  (in %, with 95 % intervals)")
    for eps, found in sweep.items():
        average = shown(found.average, found.average_interval)
        worst = shown(found.worst_class, found.worst_class_interval)
        print(f"{eps:<7.4g}{average:>18}{worst:>18}  {found.worst_name}")
    if against is None:
        return
    comparison = compare({"this": report, "against": against})
    column = WORST_CASE if WORST_CASE in comparison.columns else comparison.columns[-1]
    print(f"\n{comparison}\n")
    try:
        print(f"{comparison.test('this', 'against', column)}\n")
    except ValueError as error:  # other images
        print(f"no paired test, {error}\n")


def draw(work: Work, report: RobustnessReport, sweep: Sweep) -> dict[str, Axes]:
    """The figures by the names of their files."""
    k, names = len(work.class_names), work.class_names
    found = {column: report[column] for column in report.predictions}
    figures = {
        "classwise": plots.plot_classes(
            {column: result.class_accuracy for column, result in found.items()},
            intervals={column: result.class_interval for column, result in found.items()},
            kind="bars" if k <= MANY_CLASSES else "lines",
            class_names=names,
        ),
        "confusion": plots.plot_confusion(report[work.figure_attack].confusion, class_names=names),
    }
    figures["confusion"].set_title(work.figure_attack)
    steps = {a.name: a.steps for a in report.protocol.attacks if a.kind == "pgd" and a.steps != 1}
    for attack in list(steps)[:1]:
        samples = report.fooled_at[attack], report.targets
        figures["survival"] = plots.plot_survival(
            *samples, num_classes=k, steps=steps[attack], class_names=names
        )
        figures["survival"].set_title(attack)
    if sweep:
        rows = {
            "average": torch.tensor([100 * result.average for result in sweep.values()]),
            "worst class": torch.tensor([100 * result.worst_class for result in sweep.values()]),
        }
        labels = {"xlabel": "eps (L-inf, pixels in [0, 1])", "ylabel": "PGD-20 accuracy (%)"}
        figures["sweep"] = plots.plot_sweep(list(sweep), rows, **labels)
    return figures


def main(args: Args) -> None:
    try:
        args = replace(args, device=join(args.device))
        work = prepare(args)
        report, sweep = measure(work, args)
        if not first():
            return
        show(report, sweep, work.against)
        texts = {"md": report.to_markdown(), "tex": report.to_latex(), "csv": report.to_csv()}
        for suffix, text in texts.items():
            (args.out / f"report.{suffix}").write_text(text, "utf-8")
        figures = draw(work, report, sweep)
        for name, axes in figures.items():
            axes.figure.savefig(args.out / f"{name}.png", dpi=150)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, AssertionError) as error:
        sentence = " ".join(str(error).split()).removeprefix("evaluate: ")
        sys.exit(f"evaluate: {sentence}")
    drawn = ", ".join(f"{name}.png" for name in figures)
    print(f"written to {args.out}/: report.json, report.md, report.tex, report.csv, {drawn}")


if __name__ == "__main__":
    main(tyro.cli(Args))
