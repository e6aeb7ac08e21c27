"""Rows of strings as tables of a terminal, of Markdown, LaTeX and CSV; and class-wise results as such rows."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from torch import Tensor

from ferdlib.evaluation.result import AttackResult

Rows = Sequence[Sequence[str]]
Worst = Literal["class", "10%"]

FIELDS = ("attack", "class", "samples", "correct", "accuracy", "low", "high")
# The worst 10 % of so many rows is the worst row.
FEW_ROWS = 10
# Of more rows, only the ten worst are shown.
ROWS_SHOWN, ROWS_OF_MANY = 20, 10


def one_line(text: str) -> str:
    """Text without line breaks and control characters, which would end a row."""
    return "".join(mark if mark.isprintable() else " " for mark in text)


def markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    marked = html.escape(one_line(text), quote=False)
    return re.sub(r"([\\|`*_~$]|\](?=\())", r"\\\1", marked)


def listed(names: Sequence[str]) -> str:
    """The first names of many, and how many more there are."""
    more = len(names) - ROWS_OF_MANY
    shown = names if len(names) <= ROWS_SHOWN else names[:ROWS_OF_MANY]
    return ", ".join(map(one_line, shown)) + f" and {more} more" * (len(shown) < len(names))


def aligned(rows: Rows) -> str:
    """Table of a terminal: the first column to the left, the others to the right."""
    rows = [list(map(one_line, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def piped(rows: Rows) -> str:
    """Table of Markdown; a first cell that is indented stays so."""

    def line(cells: Sequence[str]) -> str:
        first, *others = map(markdown, cells)
        if first.startswith("  "):
            first = first.replace("  ", "&nbsp;&nbsp;", 1)
        return "| " + " | ".join([first, *others]) + " |"

    heading, *others = map(line, rows)
    return "\n".join([heading, "|---|" + "---:|" * (len(rows[0]) - 1), *others])


def comma_separated(rows: Iterable[Iterable[object]]) -> str:
    """Lines of CSV; numbers in full, a NaN as nothing, a name that a spreadsheet would compute behind a `'`."""

    def cell(value: object) -> object:
        if isinstance(value, float) and math.isnan(value):
            return ""
        # A word behind the sign, or a formula; a number alone is harmless.
        formula = isinstance(value, str) and re.match(r"\s*([=@]|[+-](?![\d.]+$))", value)
        return f"'{value}" if formula else value

    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    for row in rows:
        out.writerow(map(cell, row))
    return text.getvalue()


def _marked(column: Sequence[str], *, less: bool) -> list[str]:
    """Mark the best and the second best of a column; ties rank alike."""
    # By what is shown: figures that are equal to the reader rank alike.
    values = [math.nan if cell == "-" else float(cell) for cell in column]
    ranked = sorted({v for v in values if not math.isnan(v)}, reverse=not less)
    marks = dict(zip(ranked, (r"\textbf{%s}", r"\underline{%s}"), strict=False))
    shown = [cell.replace("-", "--") for cell in column]
    if len(column) == 1:
        return shown
    return [marks.get(v, "%s") % cell for v, cell in zip(values, shown, strict=True)]


def _tex(text: str) -> str:
    escaped = {mark: rf"\{mark}" for mark in "&%$#_{}"}
    escaped |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    escaped |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    # At the start of a row they would be arguments of the \\ before it.
    escaped |= {mark: f"{{{mark}}}" for mark in "[*"}
    # Two hyphens would be a dash.
    return re.sub("-(?=-)", "-{}", "".join(escaped.get(mark, mark) for mark in one_line(text)))


def number(value: float, digits: int) -> str:
    """Decimals of a number, "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _with_interval(value: float, interval: Tensor, digits: int) -> str:
    low, high = interval.tolist()
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def _with_ties(found: AttackResult) -> str:
    """Name of the worst row, and how many others are as bad."""
    others = int((found.class_accuracy == found.worst_class).sum()) - 1
    return found.worst_name + f" and {others} more" * (others > 0)


def figure_rows(results: Iterable[tuple[str, AttackResult]]) -> Rows:
    """Average, worst class, worst 10 %, NSD and target entropy of each result, under its heading."""
    rows: list[list[str]] = []
    for heading, found in results:
        many = len(found.row_names) > FEW_ROWS
        row = [
            heading,
            _with_interval(100 * found.average, 100 * found.average_interval, 1),
            _with_interval(100 * found.worst_class, 100 * found.worst_class_interval, 1),
            _with_ties(found),
        ]
        if many:
            row.append(_with_interval(100 * found.worst_10, 100 * found.worst_10_interval, 1))
        row.append(_with_interval(found.nsd, found.nsd_interval, 3))
        row.append(number(float(found.target_entropy.nanmean()), 2))
        rows.append(row)
    title = ["", "average", "worst class", "", *["worst 10 %"] * many, "NSD", "target entropy"]
    return [title, *rows]


def class_rows(results: Mapping[str, AttackResult], title: str) -> Rows:
    """Accuracy of each row under each attack; of many rows the worst under the last."""
    last = list(results.values())[-1]
    # A table of hundreds of rows hides the few that matter.
    order: Sequence[int] = range(len(last.row_names))
    if len(order) > ROWS_SHOWN:
        worst_first = last.class_accuracy.nan_to_num(nan=2.0).argsort(stable=True)
        order = worst_first[:ROWS_OF_MANY].tolist()
        title = f"{len(order)} worst of {len(last.row_names)}"
    rows = [[title, "samples", *results]]
    for k in order:
        accuracies = [number(100 * float(f.class_accuracy[k]), 1) for f in results.values()]
        rows.append([last.row_names[k], str(int(last.totals[k])), *accuracies])
    return rows


def class_lines(results: Mapping[str, AttackResult]) -> list[tuple[object, ...]]:
    """Counts, accuracy and Wilson bounds of each row under each attack, as in `FIELDS`."""
    lines: list[tuple[object, ...]] = []
    for column, found in results.items():
        figures = (found.totals, found.correct, found.class_accuracy, *found.class_interval.T)
        rows = zip(found.row_names, *(values.tolist() for values in figures), strict=True)
        lines += [(column, *row) for row in rows]
    return lines


def paper_figures(found: AttackResult, worst: Worst) -> tuple[float, float, float]:
    """Average, worst and NSD of a result, as fractions."""
    return found.average, found.worst_class if worst == "class" else found.worst_10, found.nsd


def paper_rows(models: Mapping[str, Mapping[str, AttackResult]], worst: Worst) -> Rows:
    """Rows of the papers' tables: average and worst in %, and NSD, of each model under each attack."""
    rows = []
    for name, results in models.items():
        row = [name]
        for found in results.values():
            average, least, nsd = paper_figures(found, worst)
            row += [number(100 * average, 2), number(100 * least, 2), number(nsd, 3)]
        rows.append(row)
    return rows


def paper_latex(models: Mapping[str, Mapping[str, AttackResult]], worst: Worst) -> str:
    """The papers' table for the booktabs package; of several models the best is bold, the second underlined."""
    columns = list(next(iter(models.values())))
    groups = " & ".join(rf"\multicolumn{{3}}{{c}}{{{_tex(column)}}}" for column in columns)
    rules = "".join(rf"\cmidrule(lr){{{3 * k + 2}-{3 * k + 4}}}" for k in range(len(columns)))
    heading = " & ".join(["Avg.", "Worst" if worst == "class" else r"Worst-10\%", "NSD"])
    figures = list(zip(*paper_rows(models, worst), strict=True))[1:]
    # Of NSD, every third figure, less is better.
    marked = [_marked(column, less=i % 3 == 2) for i, column in enumerate(figures)]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'rrr' * len(columns)}}}",
            r"\toprule",
            rf" & {groups} \\",
            rules,
            rf"Method & {' & '.join([heading] * len(columns))} \\",
            r"\midrule",
            *(rf"{' & '.join(row)} \\" for row in zip(map(_tex, models), *marked, strict=True)),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )
