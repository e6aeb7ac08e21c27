"""`ferdlib evaluate`: how robust is a classifier, class by class? Any model, any data, a published protocol."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import ferdlib
from ferdlib import plots
from ferdlib.checkpoints import digest, write_file
from ferdlib.distributed import Ranks, check_same, gather, join, share
from ferdlib.evaluation import (
    PROTOCOLS,
    AttackResult,
    Protocol,
    RobustnessReport,
    compare,
    evaluate,
    merge,
)
from ferdlib.recipes.data import Images, Streamed, chosen, load_any
from ferdlib.recipes.models import Model, check_model, made_by, normalized, read_model
from ferdlib.recipes.options import Evaluate
from ferdlib.recipes.running import check_ball, command, device, written

# By radius; the clean images at 0.
Sweep = dict[float, AttackResult]

WORST_CASE = "worst case"
# Lines are easier to read than bars where there are more classes.
MANY_CLASSES = 12


@dataclass(frozen=True)
class Work:
    """Everything that the options ask for, checked."""

    model: Model
    data: Dataset[Any]
    class_names: tuple[str, ...]
    protocol: Protocol
    sweep: dict[float, Protocol]
    figure_attack: str
    against: RobustnessReport | None


def run(args: Evaluate) -> None:
    """Check the options, attack, print and write."""
    args = replace(args, device=join(device(args.device)))
    work = prepare(args)
    model = digest(work.model) if isinstance(work.model, nn.Module) else None
    count = len(work.data)  # type: ignore[arg-type]
    check_same(version=ferdlib.__version__, model=model, protocol=work.protocol, images=count)
    report, sweep = measured(work, args)
    if not Ranks.here().first:
        return
    show(report, sweep, work.against)
    texts = {"md": report.to_markdown(), "tex": report.to_latex(), "csv": report.to_csv()}
    for suffix, text in texts.items():
        write_file(args.out / f"report.{suffix}", text)
    drawn = save_figures(args.out, draw(report, sweep, work.figure_attack))
    print(written(args.out, "report.json", *(f"report.{suffix}" for suffix in texts), *drawn))
    shown = {"checkpoint": "FILE", "data": args.images.data, "against": args.out / "report.json"}
    print(f"compare another model: {command('evaluate', **shown)}")


def prepare(args: Evaluate) -> Work:
    """Find everything that can be wrong with the input, before anything is written."""
    wanted = args.attacks
    if wanted.trust and Ranks.here().size > 1:
        raise ValueError("expected no --trust with several processes, each of which has a share")
    check_ball(eps=wanted.eps)
    protocol = PROTOCOLS[chosen_of("protocol", wanted.protocol, [*PROTOCOLS])].with_seed(args.seed)
    protocol = protocol if wanted.eps is None else protocol.at(eps=wanted.eps)
    protocol = protocol.without(*wanted.without)
    protocol = protocol.on_survivors() if wanted.survivors else protocol
    pgd = PROTOCOLS["fair-ard"].without("FGSM", "CW-inf", "AutoAttack").with_seed(args.seed)
    sweep = {eps: pgd.at(eps=eps) for eps in sorted(set(wanted.sweep))}
    columns = ["clean", *(attack.name for attack in protocol.attacks), WORST_CASE]
    drawn = chosen_of("figure-attack", args.figure_attack or columns[-2], columns)
    check_folder(args.out)

    images = load_any(**vars(args.images), seed=args.seed)
    names = images.class_names
    against = None if args.against is None else RobustnessReport.load(args.against)
    # `compare` refuses other classes, and other settings of the same attacks.
    if against is not None:
        ours = replace(against, class_names=names, groups=None, protocol=protocol)
        compare({"this": ours, "against": against})
    data = chosen(images, args.test_images, args.seed)
    return Work(load_model(args, images), data, names, protocol, sweep, drawn, against)


def chosen_of(option: str, value: str, known: list[str]) -> str:
    """Return the value of an option, which must be a known one."""
    if value not in known:
        raise ValueError(f"expected --{option} to be one of {', '.join(known)}, got {value!r}")
    return value


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be written."""
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OSError(f"expected --out to be a folder that can be written, got {str(out)!r}")


def load_model(args: Evaluate, images: Images | Streamed) -> Any:
    """Load the model on its device, after it has answered two of the images."""
    source, classes = args.source, len(images.class_names)
    if (source.checkpoint is None) == (source.factory is None):
        raise ValueError("expected one of --checkpoint and --factory, got none or both")
    x = torch.stack([images[k][0] for k in (0, len(images) - 1)])
    if source.checkpoint is None:
        model: Any = made_by(str(source.factory))
    else:
        sizes = {"num_classes": classes, "in_channels": x.shape[1]}
        model = read_model(source.checkpoint, architecture=source.architecture, **sizes)
    model = normalized(model, source.mean, source.std)
    if isinstance(model, nn.Module):
        model.to(args.device).eval()
    check_model(model, x.to(args.device), classes)
    return model


def measure(
    model: Model, data: Any, protocol: Protocol, class_names: tuple[str, ...], **options: Any
) -> RobustnessReport:
    """Evaluate over all processes, each on its share; every one gets the report of all samples."""
    options |= {"num_classes": len(class_names), "class_names": class_names}
    found = evaluate(model, share(data), protocol, **options)
    return merge(gather(found)) if Ranks.here().size > 1 else found


def measured(work: Work, args: Evaluate) -> tuple[RobustnessReport, Sweep]:
    """Measure the report, saved as soon as it is there, and PGD-20 at each radius of the sweep."""
    ranks = Ranks.here()

    def at(protocol: Protocol, part: str, trust: bool = False) -> RobustnessReport:
        # Each process keeps the parts of its own share.
        share = args.out / "parts" / part / (str(ranks.rank) if ranks.size > 1 else "")
        return measure(
            work.model,
            work.data,
            protocol,
            work.class_names,
            batch_size=args.attacks.batch_size,
            fast=args.attacks.fast,
            device=args.device,
            resume=share if args.resume else None,
            trust=trust,
            progress=ranks.first,
        )

    report = at(work.protocol, "report", args.attacks.trust)
    if ranks.first:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            report.save(args.out / "report.json")
        except OSError:
            # The work of hours is not lost with the file.
            print(f"\n{report}\n")
            raise
    sweep = {0.0: report["clean"]} if work.sweep else {}
    for eps, protocol in work.sweep.items():
        if ranks.first:
            tqdm.write(f"PGD-20 at eps {eps:g}", file=sys.stderr)
        sweep[eps] = at(protocol, f"sweep-{eps!r}")["PGD-20"]
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
    # The reports are of different images.
    except ValueError as error:
        print(f"no paired test, {error}\n")


def classwise(report: RobustnessReport) -> Any:
    """Draw the accuracy of every class under every attack."""
    found = {column: report[column] for column in report.predictions}
    return plots.plot_classes(
        {column: result.class_accuracy for column, result in found.items()},
        intervals={column: result.class_interval for column, result in found.items()},
        kind="bars" if report.num_classes <= MANY_CLASSES else "points",
        class_names=report.class_names,
    )


def draw(report: RobustnessReport, sweep: Sweep, figure_attack: str) -> dict[str, Any]:
    """Draw the figures, by the names of their files."""
    names = report.class_names
    confusion = plots.plot_confusion(report[figure_attack].confusion, class_names=names)
    confusion.set_title(figure_attack)
    figures: dict[str, Any] = {"classwise": classwise(report), "confusion": confusion}
    steps = {a.name: a.steps for a in report.protocol.attacks if a.kind == "pgd" and a.steps != 1}
    for attack in list(steps)[:1]:
        sizes: Any = {"num_classes": len(names), "steps": steps[attack], "class_names": names}
        axes = plots.plot_survival(report.fooled_at[attack], report.targets, **sizes)
        axes.set_title(attack)
        figures["survival"] = axes
    if sweep:
        rows = {"average": "average", "worst class": "worst_class"}
        figures["sweep"] = plots.plot_sweep(
            list(sweep),
            {
                label: torch.tensor([100 * getattr(result, name) for result in sweep.values()])
                for label, name in rows.items()
            },
            intervals={
                label: torch.stack(
                    [100 * getattr(result, f"{name}_interval") for result in sweep.values()]
                )
                for label, name in rows.items()
            },
            xlabel="eps (L-inf, pixels in [0, 1])",
            ylabel="PGD-20 accuracy (%)",
        )
    return figures


def save_figures(folder: Path, figures: Mapping[str, Any]) -> list[str]:
    """Write figures as PNG files, and return the files' names."""
    for name, axes in figures.items():
        figure = getattr(axes, "figure", axes)
        write_file(folder / f"{name}.png", partial(figure.savefig, dpi=150))
    return [f"{name}.png" for name in figures]
