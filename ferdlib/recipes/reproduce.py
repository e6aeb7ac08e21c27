"""`ferdlib reproduce`: many methods on digits in one table, each with and without its reweighting, over seeds.

All methods of a seed share its split and its teachers. A command that is given again goes on with what is missing,
and commands for other seeds may run beside it in the same folder: the last one finds all results there.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
from dataclasses import asdict, replace
from typing import Any

import torch
from matplotlib.figure import Figure

from ferdlib.checkpoints import write_file
from ferdlib.evaluation import RobustnessReport, compare
from ferdlib.plots import plot_classes
from ferdlib.recipes import train
from ferdlib.recipes.evaluate import save_figures
from ferdlib.recipes.options import Reproduce, Train
from ferdlib.recipes.running import device, flag, written

COLUMNS = ("clean", "FGSM", "PGD-20", "CW-inf")
FIGURES = {"avg.": "average", "worst": "worst_class", "NSD": "nsd"}
LEVEL = 0.05

# One report for each seed.
Reports = dict[str, list[RobustnessReport]]


def run(args: Reproduce) -> None:
    """Train what is missing, then print and write the table."""
    for option in ("methods", "seeds"):
        given = getattr(args, option)
        if not given or len(set(given)) < len(given):
            raise ValueError(f"expected different {flag(option)}, at least one, got {given}")
    plain = {name: name.rpartition("-")[2] for name in args.methods}
    for name in args.methods:
        train.prepare(train.resolved(options_of(args, name, args.seeds[0])))
    settings = {k: v for k, v in asdict(args).items() if k not in ("methods", "seeds", "out")}
    path, ours = args.out / "settings.json", json.dumps(settings)
    if path.is_file() and (theirs := path.read_text("utf-8")) != ours:
        raise ValueError(
            f"expected the options of {str(path)!r}, {theirs}, got {ours}; take another --out"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    write_file(path, ours)

    wanted = {teacher for method in plain.values() for teacher in train.wanted_teachers(method)}
    names = [*sorted(wanted, reverse=True), *args.methods]
    reports = {name: [report_of(args, name, seed) for seed in args.seeds] for name in names}
    pairs = [(name, other) for name, other in plain.items() if name != other and other in plain]
    text = (
        f"{len(reports[names[0]][0])} {args.measure} digits, L-infinity of radius {args.eps:g}, seeds "
        f"{', '.join(map(str, args.seeds))}: mean ± standard deviation. Average and worst class in %, NSD as a "
        f"fraction.\n\n{markdown(main_rows(reports))}"
    )
    if pairs:
        text += (
            "\nDifferences in points, and how many seeds have a significant one (permutation test on the same "
            f"digits, not corrected for the number of tests).\n\n{markdown(pair_rows(reports, pairs))}"
        )
    print(f"\n{text}")
    write_file(args.out / "table.md", text)
    drawn = save_figures(args.out, {"classwise": draw(reports, pairs)}) if pairs else []
    print(written(args.out, "table.md", *drawn, "a folder of each training"))


def options_of(args: Reproduce, name: str, seed: int) -> Train:
    """Options of a student, or of a teacher by its name."""
    rule, _, method = name.rpartition("-")
    teacher = name in train.TEACHERS
    ours: dict[str, Any] = {"method": "ard" if teacher else method, "rule": rule or "none"}
    new = Train()
    found = replace(
        new,
        objective=replace(new.objective, **ours, preset=args.preset, eps=args.eps, clip=args.clip),
        models=replace(new.models, student=args.student, teacher_architecture=args.teacher),
        sgd=replace(new.sgd, epochs=args.epochs),
        selection=replace(new.selection, select=args.select, measure=args.measure),
        run=replace(
            new.run,
            out=args.out / f"{name}-{seed}",
            seed=seed,
            resume="auto",
            device=device("auto"),
        ),
    )
    if not teacher:
        return found
    found = train.teacher_args(found, name)
    return replace(found, sgd=replace(found.sgd, epochs=args.teacher_epochs))


def report_of(args: Reproduce, name: str, seed: int) -> RobustnessReport:
    """Report of a training, which is run if it is not there."""
    options = options_of(args, name, seed)
    path = options.run.out / "report.json"
    if not path.is_file():
        wanted = train.wanted_teachers(options.objective.method)
        files: Any = {t: args.out / f"{t}-{seed}" / "student.pt" for t in wanted}
        with contextlib.redirect_stdout(io.StringIO()):
            train.run(replace(options, models=replace(options.models, **files)))
    return RobustnessReport.load(path)


def over_seeds(values: list[float], digits: int, sign: str = "") -> str:
    """Mean and standard deviation; one seed has no deviation."""
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def main_rows(reports: Reports) -> list[list[str]]:
    """Average, worst class and NSD under each attack."""
    rows = [["method", *(f"{column} {figure}" for column in COLUMNS for figure in FIGURES)]]
    for name, found in reports.items():
        row = [name.replace("_", " ")]
        for column in COLUMNS:
            for figure in FIGURES.values():
                scale, digits = (1, 3) if figure == "nsd" else (100, 1)
                row.append(over_seeds([scale * getattr(r[column], figure) for r in found], digits))
        rows.append(row)
    return rows


def pair_rows(reports: Reports, pairs: list[tuple[str, str]]) -> list[list[str]]:
    """Reweighted minus plain, in points, and in how many seeds a paired test calls it a difference."""
    test = f"p < {LEVEL:g}"
    rows = [["reweighted minus plain", "attack", "average", test, "worst class", test]]
    for name, plain in pairs:
        both = zip(reports[name], reports[plain], strict=True)
        comparisons = [compare({name: a, plain: b}) for a, b in both]
        for column in COLUMNS:
            row = [f"{name} - {plain}", column]
            tests = [comparison.test(name, plain, column) for comparison in comparisons]
            for figure in ("average", "worst_class"):
                found = [getattr(test, figure) for test in tests]
                up = sum(difference > 0 and p < LEVEL for difference, p in found)
                down = sum(difference < 0 and p < LEVEL for difference, p in found)
                row.append(over_seeds([100 * difference for difference, _ in found], 1, "+"))
                row.append(f"{up} up, {down} down of {len(found)}")
            rows.append(row)
    return rows


def markdown(rows: list[list[str]]) -> str:
    """Table in Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows]
    padded.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(row)} |\n" for row in padded)


def draw(reports: Reports, pairs: list[tuple[str, str]]) -> Figure:
    """Class accuracies under PGD-20, means over seeds, each reweighted method beside its plain one."""
    figure = Figure(figsize=(8, 3 * len(pairs)), layout="constrained")
    for pair, ax in zip(pairs, figure.subplots(len(pairs), squeeze=False)[:, 0], strict=True):
        found = {name: [r["PGD-20"].class_accuracy for r in reports[name]] for name in pair[::-1]}
        means = {name: torch.stack(values).mean(dim=0) for name, values in found.items()}
        plot_classes(means, ylabel="PGD-20 accuracy (%)", ax=ax)
    return figure
