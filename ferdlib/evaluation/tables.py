"""A report as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ferdlib.evaluation.figures import AttackResult
    from ferdlib.evaluation.report import RobustnessReport

FEW_ROWS = 10  # the worst 10 % of so many is the worst class
ROWS_SHOWN = 20  # of more, the text shows the ten worst
ROWS_OF_MANY = 10
FIELDS = ("attack", "class", "samples", "correct", "accuracy", "low", "high")


def report_text(report: RobustnessReport) -> str:
    """Both tables for a terminal."""
    parts = [
        _title(report),
        "in %, with 95 % intervals; NSD and target entropy as fractions. The interval of NSD is for the true\n"
        "accuracies: sampling noise only adds to the measured one, which may lie above it.\n",
        aligned(figure_rows(report)),
        "",
        aligned(class_rows(report)),
        "",
        _winners(report),
        *_on_survivors(report),
        *_absent(report),
        *(str(finding) for finding in report.findings),
    ]
    return "\n".join(parts)


def report_markdown(report: RobustnessReport) -> str:
    """Both tables, and under them all that a reader needs to judge and repeat them."""
    manifest = report.manifest
    parts = [
        f"**{_title(report)}**",
        "In %, with 95 % intervals (NSD and target entropy as fractions): average and NSD by the bootstrap, "
        "worst class and worst 10 % from bounds that hold for all rows together, each row by Wilson. The "
        "target entropy is a mean over classes. Indented: AutoAttack up to that member.",
        piped(figure_rows(report)),
        piped(class_rows(report)),
        _winners(report) + ".",
        *_on_survivors(report),
        *_absent(report),
        "Protocol " + "\n".join(_listed(str(report.protocol).splitlines())),
    ]
    if report.findings:
        parts.append("Trust checks:\n\n" + "\n".join(f"- {f}" for f in report.findings))
    if manifest:
        versions = ", ".join(f"{name} {v}" for name, v in manifest["versions"].items())
        model, data = manifest["model"], manifest["data"]
        where = manifest["device"] + "".join(
            f", {name} {value}" for name, value in manifest["precision"].items() if value
        )
        parts.append(
            f"Made {report.timing.get('created', '')} on {where} with {versions}. Model "
            f"`{model['fingerprint'] or 'callable'}`, data `{data['fingerprint']}`."
        )
    return "\n\n".join(parts) + "\n"


def report_lines(report: RobustnessReport) -> list[tuple[str, str, int, int, float, float, float]]:
    """For each column and row of the report: counts, accuracy, Wilson bounds."""
    lines = []
    for column in report.columns:
        found = report[column]
        rows = zip(
            report.row_names,
            found.totals.tolist(),
            found.correct.tolist(),
            found.class_accuracy.tolist(),
            found.class_interval.tolist(),
            strict=True,
        )
        lines += [(column, name, n, k, accuracy, *bounds) for name, n, k, accuracy, bounds in rows]
    return lines


def report_csv(report: RobustnessReport) -> str:
    """A line for each column and row of the report."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(FIELDS)
    for *counts, accuracy, low, high in report_lines(report):
        numbers = ["" if math.isnan(v) else repr(v) for v in (accuracy, low, high)]
        out.writerow([*counts, *numbers])
    return text.getvalue()


def figure_rows(report: RobustnessReport) -> list[list[str]]:
    """Average, worst class, worst 10 %, NSD and target entropy under each attack."""
    worst_10 = ["worst 10 %"] if len(report.row_names) > FEW_ROWS else []
    rows = [["", "average", "worst class", "", *worst_10, "NSD", "target entropy"]]
    for column in report.columns:
        rows.append([column, *_figures(report[column])])
        rows += [
            [f"  {m.rpartition('/')[2]}", *_figures(report[m])] for m in report.members(column)
        ]
    return rows


def _figures(found: AttackResult) -> list[str]:
    entropy = found.target_entropy.nanmean()
    worst_10 = []
    if len(found.row_names) > FEW_ROWS:
        worst_10 = [_with_interval(100 * found.worst_10, 100 * found.worst_10_interval, 1)]
    return [
        _with_interval(100 * found.average, 100 * found.average_interval, 1),
        _with_interval(100 * found.worst_class, 100 * found.worst_class_interval, 1),
        found.worst_name,
        *worst_10,
        _with_interval(found.nsd, found.nsd_interval, 3),
        number(float(entropy), 2),
    ]


def class_rows(report: RobustnessReport) -> list[list[str]]:
    """Accuracy of each class under each attack; of many classes the worst."""
    worst_case = report[report.columns[-1]].class_accuracy.nan_to_num(nan=2.0)
    order = range(len(report.row_names))
    title = "class" if report.groups is None else "group"
    if len(order) > ROWS_SHOWN:
        order = worst_case.argsort(stable=True)[:ROWS_OF_MANY].tolist()  # type: ignore[assignment]
        title = f"{len(order)} worst of {len(report.row_names)}"
    found = {column: report[column] for column in report.columns}
    rows = [[title, "samples", *found]]
    for k in order:
        accuracies = [number(100 * float(f.class_accuracy[k]), 1) for f in found.values()]
        rows.append([report.row_names[k], str(int(found["clean"].totals[k])), *accuracies])
    return rows


def number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _with_interval(value: float, interval: Tensor, digits: int) -> str:
    low, high = interval.tolist()
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of a terminal, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def piped(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    first, *others = [[_indented(row[0]), *row[1:]] for row in rows]
    rule = "|---|" + "---:|" * (len(first) - 1)
    return "\n".join([line(first), rule, *map(line, others)])


def _indented(cell: str) -> str:
    return cell.replace("  ", "&nbsp;&nbsp;", 1) if cell.startswith("  ") else cell


def _listed(lines: Sequence[str]) -> list[str]:
    return [lines[0] + ":", "", *(f"- {line.strip()}" for line in lines[1:])]


def _title(report: RobustnessReport) -> str:
    model = report.manifest.get("model", {})
    size = f" ({model['parameters']:,} parameters)" if model.get("parameters") else ""
    rows = f"{len(report.row_names)} {'classes' if report.groups is None else 'groups'}"
    return (
        f"{model.get('class', 'model')}{size}, {len(report):,} samples of {rows}, protocol "
        f"{report.protocol.name} (seed {report.protocol.seed})"
    )


def _winners(report: RobustnessReport) -> str:
    """How many samples fell first to what."""
    winner = report.winner
    counts = [(name, int((winner == k).sum())) for k, name in enumerate(report.predictions)]
    fallen = ", ".join(f"{name} {count:,}" for name, count in counts)
    return f"first fooled by: {fallen}; by none {int((winner < 0).sum()):,}"


def _on_survivors(report: RobustnessReport) -> list[str]:
    return [
        f"{attack.name} was run on what withstood all before it: its rows are the worst case up to there"
        for attack in report.protocol.attacks
        if attack.survivors
    ]


def _absent(report: RobustnessReport) -> list[str]:
    totals = report["clean"].totals.tolist()
    absent = [name for name, n in zip(report.row_names, totals, strict=True) if n == 0]
    return [f"no samples, left out of every figure: {', '.join(absent)}"] if absent else []
