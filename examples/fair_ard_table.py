"""Fair-ARD's comparison in small: ten methods on digits, each with and without its reweighting, over seeds.

    python examples/fair_ard_table.py                              # the whole table, on two cores
    python examples/fair_ard_table.py --methods ard fair-ard --seeds 0 --epochs 10
    python examples/fair_ard_table.py --on val --out runs/choice   # to choose settings, without the test digits

All methods of a seed share its 1,000 training digits, its 257 held-out ones, its 540 test digits and its two
teachers. A command that is given again goes on with what is missing. The table has the mean over seeds and the
standard deviation; each fair method is also tested against its plain one, on the same samples of each seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import ard
from ard_setup import Data, begin, probe, resolved, teacher_args
from ferdlib.evaluation import PROTOCOLS, RobustnessReport, compare, evaluate
from ferdlib.methods import METHODS, MTARD, Distilled, Fair
from ferdlib.plots import plot_classes
from files import write_model
from image_data import Images
from model_sources import read_model
from processes import alone
from quickstart import digits

COLUMNS = ("clean", "FGSM", "PGD-20", "CW-inf")
FIGURES = {"avg.": "average", "worst": "worst_class", "NSD": "nsd"}
TEACHERS = {"teacher": Distilled, "natural_teacher": MTARD}
LEVEL = 0.05
SIZES = {"num_classes": 10, "in_channels": 1}

Task = tuple[str, int]  # a method, or "teacher" or "natural_teacher", and a seed
Reports = dict[Task, RobustnessReport]


@dataclass(frozen=True)
class Args:
    """Train students with many methods from the same teachers, and compare them class by class."""

    methods: tuple[ard.Name, ...] = (
        *("sat", "trades", "ard", "rslad", "iad", "mtard"),
        *("fair-ard", "fair-iad", "fair-rslad", "fair-mtard"),
    )
    """Rows of the table."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the split, the weights and all noise; each trains its own teachers."""
    preset: Literal["paper", "released"] = "paper"
    """Settings and schedules of the papers, or of their authors' codes."""
    eps: float = 0.2
    """Radius of the L-infinity ball, in units of [0, 1] pixels; steps are a quarter of it. Papers: epsilon.
    At 0.2 the plain students lose a class, as in the papers; at 0.1 they hardly do (chosen on held-out digits)."""
    teacher_eps: float | None = None
    """Radius that the robust teachers are trained at, same units; None: 1.4 times --eps."""
    student_width: int = 16
    """Channels of the students' first layer, others have twice as many."""
    teacher_width: int = 40
    """The same of the teachers."""
    epochs: int = 80
    """Of the students; all dates of the papers' schedules move in proportion."""
    teacher_epochs: int = 40
    """Of the teachers."""
    lr: float | None = None
    """Rate of the students' SGD at the start, no unit; None: the preset's, 0.1. Papers: eta."""
    beta: float | None = None
    """Exponent of the fair methods' weights, no unit; None: the preset's, 2."""
    clip: tuple[float, float] | None = (5 / 6, 5 / 2)
    """Limits of these weights, whose mean is 1; None: none, as in the paper. See ard.py."""
    select: Literal["best", "last"] = "best"
    """Which epoch is kept: the best under PGD-10 on the 257 held-out digits, or the last."""
    on: Literal["test", "val"] = "test"
    """What the table is measured on: the test digits, or the held-out ones, to choose settings."""
    jobs: int = 2
    """Processes at work, each on one thread."""
    out: Path = Path("runs/fair_ard_table")
    """Folder for reports, students and teachers of each seed, table.md, table.tex and classwise.png."""


def training_args(args: Args, method: str, seed: int) -> ard.Args:
    """One training in the options of `ard.py`."""
    fair = issubclass(METHODS[method], Fair)
    return resolved(
        ard.Args(
            method=method,
            preset=args.preset,
            eps=args.eps,
            teacher_eps=args.teacher_eps,
            student=f"small_cnn_{args.student_width}",
            teacher_architecture=f"small_cnn_{args.teacher_width}",
            epochs=args.epochs,
            teacher_epochs=args.teacher_epochs,
            lr=args.lr,
            beta=args.beta if fair else None,
            clip=args.clip,
            select=args.select,
            seed=seed,
            device="cpu",
        )
    )


def finish(args: Args, task: Task) -> str:
    """Train and measure a teacher or a student, and keep both; what came out, in words."""
    name, seed = task
    split = digits(seed)
    names = tuple(map(str, range(10)))
    data = Data(Images(*split["train"], names), Images(*split["val"], names))
    if name in TEACHERS:
        settings = teacher_args(training_args(args, "ard", seed), name)
        run = begin(settings, data, {})
    else:
        settings = training_args(args, name, seed)
        run = begin(settings, data, teachers(args, name, seed))
    seconds = [epoch.seconds for epoch in ard.train(run, data)]
    student = ard.selected(run)
    protocol = ard.protocol("fair-ard", training_args(args, "ard", seed)).without("AutoAttack")
    report = evaluate(student, split[args.on], protocol, num_classes=10)
    training = {"epoch": run.best["epoch"], "seconds_per_epoch": sum(seconds) / len(seconds)}
    report = replace(report, timing=report.timing | {"training": training})
    write_model(student, args.out / f"{name}-{seed}.pt", architecture=settings.student, **SIZES)
    report.save(report_file(args, task))
    found = report["PGD-20"]
    return (
        f"{name}, seed {seed}: epoch {run.best['epoch']}, PGD-20 {100 * found.average:.1f}, worst class "
        f"{100 * found.worst_class:.1f}; {training['seconds_per_epoch']:.2f} s per epoch"
    )


def report_file(args: Args, task: Task) -> Path:
    name, seed = task
    return args.out / f"{name}-{seed}.json"


def teachers(args: Args, method: str, seed: int) -> dict[str, nn.Module]:
    """Those that a method wants, from their files."""
    wanted = [name for name, kind in TEACHERS.items() if issubclass(METHODS[method], kind)]
    return {
        name: read_model(args.out / f"{name}-{seed}.pt", architecture=None, **SIZES)
        for name in wanted
    }


@contextmanager
def workers(jobs: int) -> Iterator[Callable[..., Iterable[str]]]:
    """A `map` over processes. They have one thread each: how many there are changes no result."""
    if jobs == 1:
        torch.set_num_threads(1)
        yield map
        return
    with get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool:
        yield pool.imap_unordered


def prepare(args: Args) -> list[list[Task]]:
    """What is to be done, the teachers first; wrong options are found here, before anything is written."""
    for option in ("methods", "seeds"):
        given = getattr(args, option)
        if not given or len(set(given)) < len(given):
            raise ValueError(f"expected different --{option}, at least one, got {given}")
    if args.jobs < 1:
        raise ValueError(f"expected --jobs of at least 1, got {args.jobs}")
    if min(args.epochs, args.teacher_epochs) < 1:
        raise ValueError("expected --epochs and --teacher-epochs of at least 1, got less")
    PROTOCOLS["fair-ard"].with_seed(min(args.seeds)).at(eps=args.eps)  # refuses a radius of 0
    images = Images(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), tuple(map(str, range(10))))
    for method in args.methods:
        settings = training_args(args, method, min(args.seeds))
        models = {
            name: begin(teacher_args(settings, name), Data(images, images), {}).student
            for name, kind in TEACHERS.items()
            if issubclass(METHODS[method], kind)
        }
        probe(begin(settings, Data(images, images), models), Data(images, images))
    kinds = [METHODS[method] for method in args.methods]
    needed = [name for name, kind in TEACHERS.items() if any(issubclass(k, kind) for k in kinds)]
    return [
        [(name, seed) for name in names for seed in args.seeds] for names in (needed, args.methods)
    ]


def keep_settings(args: Args) -> None:
    """Refuse a folder with results of other settings."""
    free = {"methods", "seeds", "jobs", "out"}
    text = json.dumps({name: value for name, value in asdict(args).items() if name not in free})
    path = args.out / "settings.json"
    ours = json.loads(text)
    theirs = json.loads(path.read_text("utf-8")) if path.is_file() else ours
    differing = [name for name in ours if theirs.get(name) != ours[name]]
    if differing:
        raise ValueError(
            f"expected the options that {str(args.out)!r} was made with, got others for "
            f"{', '.join('--' + name.replace('_', '-') for name in differing)}; take another --out"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def mean_and_deviation(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Over seeds; one seed has no deviation."""
    found = torch.tensor(values, dtype=torch.float64)
    text = f"{float(found.mean()):{sign}.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {float(found.std()):.{digits}f}"


def main_rows(reports: Reports, args: Args) -> list[list[str]]:
    """Average, worst class and NSD under each attack."""
    names = [name for name in (*TEACHERS, *args.methods) if (name, args.seeds[0]) in reports]
    rows = [["method", *(f"{column} {figure}" for column in COLUMNS for figure in FIGURES)]]
    for name in names:
        row = [name.replace("_", " ")]
        for column in COLUMNS:
            for figure in FIGURES.values():
                values = [getattr(reports[name, seed][column], figure) for seed in args.seeds]
                percent = figure != "nsd"
                shown = [100 * value for value in values] if percent else values
                row.append(mean_and_deviation(shown, 1 if percent else 3))
        rows.append(row)
    return rows


def pairs_of(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Fair methods whose plain ones are there."""
    plain = {method: method.removeprefix("fair-") for method in methods}
    return [(fair, p) for fair, p in plain.items() if fair != p and p in methods]


def pair_rows(reports: Reports, args: Args) -> list[list[str]]:
    """Fair minus plain, in points, and in how many seeds a paired test calls it a difference."""
    rows = [["fair minus plain", "attack"]]
    for figure in ("average", "worst class"):
        rows[0] += [figure, f"p < {LEVEL:g}"]
    for fair, plain in pairs_of(args.methods):
        for column in COLUMNS:
            row = [f"{fair} − {plain}", column]
            tests = [
                compare({name: reports[name, seed] for name in (fair, plain)}).test(
                    fair, plain, column
                )
                for seed in args.seeds
            ]
            for figure in ("average", "worst_class"):
                found = [getattr(test, figure) for test in tests]
                row.append(
                    mean_and_deviation([100 * difference for difference, _ in found], 1, "+")
                )
                up = sum(difference > 0 and p < LEVEL for difference, p in found)
                down = sum(difference < 0 and p < LEVEL for difference, p in found)
                row.append(f"{up} up, {down} down of {len(found)}")
            rows.append(row)
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def latex(rows: Sequence[Sequence[str]]) -> str:
    """A tabular for the booktabs package."""
    count = len(FIGURES)
    top = " & ".join(rf"\multicolumn{{{count}}}{{c}}{{{column}}}" for column in COLUMNS)
    heading = " & ".join(("method", *(figure for _ in COLUMNS for figure in FIGURES)))
    lines = [rf"\begin{{tabular}}{{l{'r' * count * len(COLUMNS)}}}", r"\toprule"]
    lines += [rf" & {top} \\", rf"{heading} \\", r"\midrule"]
    lines += [" & ".join(row).replace("±", r"$\pm$") + r" \\" for row in rows[1:]]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def draw(reports: Reports, args: Args, path: Path) -> None:
    """Class accuracies under PGD-20, means over seeds, each fair method beside its plain one."""
    pairs = pairs_of(args.methods)
    figure = Figure(figsize=(8, 3 * len(pairs)), layout="constrained")
    for (fair, plain), ax in zip(
        pairs, figure.subplots(len(pairs), squeeze=False)[:, 0], strict=True
    ):
        accuracies, ends = {}, {}
        for name in (plain, fair):
            found = torch.stack([reports[name, s]["PGD-20"].class_accuracy for s in args.seeds])
            mean = accuracies[name] = found.mean(dim=0)
            if len(args.seeds) > 1:
                around = found.std(dim=0)
                ends[name] = torch.stack([mean - around, mean + around], dim=1).clamp(0, 1)
        plot_classes(accuracies, intervals=ends or None, ylabel="PGD-20 accuracy (%)", ax=ax)
    seeds = ", ".join(map(str, args.seeds))
    what = f"mean ± standard deviation, seeds {seeds}" if len(args.seeds) > 1 else f"seed {seeds}"
    figure.suptitle(f"L-inf eps {args.eps:g}, {what}")
    figure.savefig(path, dpi=150)


def text(reports: Reports, args: Args) -> str:
    """All that is printed and written to table.md."""
    report = next(iter(reports.values()))
    several = len(args.seeds) > 1
    seeds = f"seed{'s' * several} {', '.join(map(str, args.seeds))}"
    spent = {
        name: mean_and_deviation(
            [reports[name, seed].timing["training"]["seconds_per_epoch"] for seed in args.seeds], 2
        )
        for name in dict.fromkeys(name for name, _ in reports)
    }
    parts = [
        f"{len(report)} {args.on} digits, L-infinity of radius {args.eps:g}, {seeds}"
        f"{': mean ± standard deviation' * several}. Average and worst class in %, NSD as a fraction.",
        markdown(main_rows(reports, args)),
    ]
    if pairs_of(args.methods):
        parts += [
            "Differences in points, and how many seeds have a significant one (permutation test on the same "
            "digits, not corrected for the number of tests).",
            markdown(pair_rows(reports, args)),
        ]
    parts.append(f"Seconds per epoch: {', '.join(f'{k} {v}' for k, v in spent.items())}.")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def work_off(stages: list[list[Task]], args: Args) -> None:
    """What is missing, one stage after the other."""
    missing = [
        [task for task in tasks if not report_file(args, task).is_file()] for tasks in stages
    ]
    count, left = sum(map(len, stages)), sum(map(len, missing))
    with (
        workers(min(args.jobs, max(left, 1))) as over,
        tqdm(total=count, initial=count - left, unit="training") as bar,
    ):
        for tasks in missing:
            for line in over(partial(finish, args), tasks):
                bar.update()
                tqdm.write(line, file=sys.stderr)


def main(args: Args) -> None:
    alone("fair_ard_table")
    try:
        stages = prepare(args)
        keep_settings(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"fair_ard_table: {' '.join(str(error).split())}")
    try:
        work_off(stages, args)
        reports: Reports = {
            task: RobustnessReport.load(report_file(args, task))
            for tasks in stages
            for task in tasks
        }
    except (RuntimeError, ValueError, OSError) as error:  # a NaN, a damaged file, a full disk
        sys.exit(f"fair_ard_table: {' '.join(str(error).split())}")
    table = text(reports, args)
    print(f"\n{table}")
    (args.out / "table.md").write_text(table, "utf-8")
    (args.out / "table.tex").write_text(latex(main_rows(reports, args)), "utf-8")
    written = ["table.md", "table.tex"]
    if pairs_of(args.methods):
        draw(reports, args, args.out / "classwise.png")
        written.append("classwise.png")
    print(f"written to {args.out}/: {', '.join(written)}, and for each seed reports and weights")


if __name__ == "__main__":
    main(tyro.cli(Args))
