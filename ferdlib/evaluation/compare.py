"""Reports side by side, tested on the same samples, and put together from shards."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib.evaluation.figures import AttackResult
from ferdlib.evaluation.paired import holm, mcnemar, paired_permutation
from ferdlib.evaluation.report import WORST_CASE, RobustnessReport
from ferdlib.evaluation.tables import aligned, number, piped

MANY_CLASSES = 100  # from here on the papers give the worst 10 % in place of the worst class


@dataclass(frozen=True, eq=False)
class PairedTest:
    """Whether two models differ on the same samples; differences are first minus second.

    Attributes:
        first, second: names of the models.
        column: the attack.
        average, worst_class, nsd: difference and p-value of a permutation test.
        class_differences: float64 `(R,)`.
        class_p: float64 `(R,)`, exact McNemar tests, Holm's correction over the rows made.
        row_names: of the R rows.
    """

    first: str
    second: str
    column: str
    average: tuple[float, float]
    worst_class: tuple[float, float]
    nsd: tuple[float, float]
    class_differences: Tensor
    class_p: Tensor
    row_names: tuple[str, ...]

    def __str__(self) -> str:
        rows = [["", "difference", "p"]]
        for name in ("average", "worst_class", "nsd"):
            difference, p = getattr(self, name)
            shown = f"{difference:+.3f}" if name == "nsd" else f"{100 * difference:+.1f}"
            undefined = math.isnan(difference)
            rows.append(
                [
                    "NSD" if name == "nsd" else name.replace("_", " "),
                    "-" if undefined else shown,
                    "-" if undefined else f"{p:.2g}",
                ]
            )
        rows += [
            [name, f"{100 * difference:+.1f}", f"{p:.2g}"]
            for name, difference, p in zip(
                self.row_names, self.class_differences.tolist(), self.class_p.tolist(), strict=True
            )
            if p < 0.05
        ]
        return f"{self.first} minus {self.second}, {self.column}, in % (NSD a fraction):\n{aligned(rows)}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Models side by side, in the papers' layout: average, worst and NSD under each attack.

    Attributes:
        reports: by the models' names.
        columns: what all of them have.
        worst: "class", or "10%" for the mean of the worst tenth of the classes.
    """

    reports: dict[str, RobustnessReport]
    columns: tuple[str, ...]
    worst: Literal["class", "10%"]

    def __str__(self) -> str:
        figures = f"{'avg':>6} {self.worst_title.lower():>6} {'NSD':>6}"
        rows = [["", *self.columns], ["in %", *(figures for _ in self.columns)]]
        for name, *cells in self._rows():
            groups = [cells[k : k + 3] for k in range(0, len(cells), 3)]
            shown = (
                f"{average:>6} {worst:>{max(6, len(self.worst_title))}} {nsd:>6}"
                for average, worst, nsd in groups
            )
            rows.append([name, *shown])
        return aligned(rows)

    @property
    def worst_title(self) -> str:
        return "Worst" if self.worst == "class" else "Worst-10%"

    def _heading(self) -> list[str]:
        return ["Method", *(h for _ in self.columns for h in ("Avg.", "Worst", "NSD"))]

    def _values(self) -> list[list[float]]:
        return [
            [v for column in self.columns for v in self._figures(report[column])]
            for report in self.reports.values()
        ]

    def _figures(self, found: AttackResult) -> tuple[float, float, float]:
        worst = found.worst_class if self.worst == "class" else found.worst_10
        return 100 * found.average, 100 * worst, found.nsd

    def _rows(self) -> list[list[str]]:
        return [
            [name, *(number(v, 3 if i % 3 == 2 else 2) for i, v in enumerate(row))]
            for name, row in zip(self.reports, self._values(), strict=True)
        ]

    def to_markdown(self) -> str:
        """One row per model."""
        heading = ["", *(f"{c} {h}" for c in self.columns for h in ("avg.", "worst", "NSD"))]
        return piped([heading, *self._rows()]) + "\n"

    def to_csv(self) -> str:
        """A line for each model and attack."""
        text = io.StringIO()
        out = csv.writer(text, lineterminator="\n")
        out.writerow(["model", "attack", "average", f"worst {self.worst}", "nsd"])
        for name, report in self.reports.items():
            for column in self.columns:
                average, worst, nsd = self._figures(report[column])
                shown = "" if math.isnan(nsd) else repr(nsd)
                out.writerow([name, column, repr(average / 100), repr(worst / 100), shown])
        return text.getvalue()

    def to_latex(self) -> str:
        """A tabular for the booktabs package; best in bold, second best underlined.

        The papers have no column for the worst case over attacks, nor has this.
        """
        columns = tuple(c for c in self.columns if c != WORST_CASE)
        return replace(self, columns=columns)._latex()

    def _latex(self) -> str:
        marks = self._marks()
        count = len(self.columns)
        top = " & ".join(rf"\multicolumn{{3}}{{c}}{{{_tex(c)}}}" for c in self.columns)
        rules = "".join(rf"\cmidrule(lr){{{3 * k + 2}-{3 * k + 4}}}" for k in range(count))
        heading = " & ".join(_tex(self.worst_title if h == "Worst" else h) for h in self._heading())
        lines = [
            rf"\begin{{tabular}}{{l{'rrr' * count}}}",
            r"\toprule",
            rf" & {top} \\",
            rules,
            rf"{heading} \\",
            r"\midrule",
        ]
        for (name, *cells), mark in zip(self._rows(), marks, strict=True):
            shown = [m.format(c.replace("-", "--")) for c, m in zip(cells, mark, strict=True)]
            lines.append(rf"{_tex(name)} & {' & '.join(shown)} \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def _marks(self) -> list[list[str]]:
        """For each cell the format that says how it ranks in its column; ties rank alike."""
        rows = [[float(cell) if cell != "-" else math.nan for cell in r[1:]] for r in self._rows()]
        marks = [["{}"] * len(row) for row in rows]
        for i in range(len(rows[0]) if len(rows) > 1 else 0):
            ranked = sorted({row[i] for row in rows if not math.isnan(row[i])}, reverse=i % 3 != 2)
            for row, mark in zip(rows, marks, strict=True):
                if ranked and row[i] == ranked[0]:
                    mark[i] = r"\textbf{{{}}}"
                elif len(ranked) > 1 and row[i] == ranked[1]:
                    mark[i] = r"\underline{{{}}}"
        return marks

    def test(
        self, first: str, second: str, column: str = WORST_CASE, *, seed: int = 0
    ) -> PairedTest:
        """Do two of the models differ under an attack, on the same samples?

        Average, worst class and NSD by a permutation test that exchanges the models' outcomes sample by
        sample; the rows by exact McNemar tests with Holm's correction. Samples, not training runs: a
        difference between two methods needs seeds, too.

        Raises:
            ValueError: unknown names, or reports on other samples.
        """
        function = "Comparison.test"
        for name in (first, second):
            _checks.choice(function, "first, second", name, tuple(self.reports))
        _checks.choice(function, "column", column, self.columns)
        a, b = self.reports[first], self.reports[second]
        same = all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("index", "targets", "rows"))
        # Images in another size or precision are other pixels of the same samples.
        mine, theirs = a.manifest.get("data", {}), b.manifest.get("data", {})
        alike = all(mine.get(k) == theirs.get(k) for k in ("shape", "dtype"))
        if not same or (alike and mine.get("fingerprint") != theirs.get("fingerprint")):
            raise ValueError(
                f"{function}: expected reports on the same samples, got {len(a)} and {len(b)} that differ"
            )
        one, two = a[column], b[column]
        rows = len(a.row_names)

        def exchanged(figure: Literal["average", "worst_class", "nsd"]) -> tuple[float, float]:
            return paired_permutation(
                one.robust, two.robust, a.rows, rows, figure=figure, seed=seed
            )

        only = [
            torch.bincount(a.rows[mine & ~other], minlength=rows)
            for mine, other in ((one.robust, two.robust), (two.robust, one.robust))
        ]
        p = mcnemar(*only)
        p[one.totals == 0] = math.nan
        return PairedTest(
            first,
            second,
            column,
            exchanged("average"),
            exchanged("worst_class"),
            exchanged("nsd"),
            one.class_accuracy - two.class_accuracy,
            holm(p),
            a.row_names,
        )


def compare(
    reports: Mapping[str, RobustnessReport], *, worst: Literal["class", "10%"] | None = None
) -> Comparison:
    """Put reports side by side.

    Args:
        reports: by name, of the same classes under the same attacks. Columns that not all have are left out,
            and so is a worst case, also that of an AutoAttack on survivors, over different attacks.
        worst: "class" or "10%"; None takes "10%" from 100 classes on, as the papers do.

    Returns:
        A `Comparison`: `print` it, export it, test two of its models.

    Raises:
        TypeError, ValueError: no reports, other classes, or attacks of one name with other settings.

    Example:
        >>> from ferdlib.evaluation import evaluate
        >>> x, y = torch.rand(20, 1, 2, 2), torch.tensor([0, 1] * 10)
        >>> def dark(x):
        ...     return torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], dim=1)
        >>> reports = {"dark": evaluate(dark, (x, y), "quick", num_classes=2)}
        >>> compare(reports).columns
        ('clean', 'FGSM', 'PGD-10', 'worst case')
    """
    function = "compare"
    if not isinstance(reports, Mapping):
        raise TypeError(
            f"{function}: expected `reports` by name, as a dict, got {_checks.got(reports)}"
        )
    _same(function, reports)
    first, *others = reports.values()
    shared = [
        c for c in first.columns if all(_over(other, c) == _over(first, c) for other in others)
    ]
    if worst is None:
        worst = "10%" if len(first.row_names) >= MANY_CLASSES else "class"
    _checks.choice(function, "worst", worst, ("class", "10%"))
    return Comparison(dict(reports), tuple(shared), worst)


def merge(reports: Sequence[RobustnessReport]) -> RobustnessReport:
    """One report from shards of the data, such as each process's `Subset` or `DistributedSampler`.

    A sample that several shards hold, because a sampler padded them, counts once.

    Args:
        reports: of one model under one protocol, on samples of one data set.

    Returns:
        The report of all samples, equal to that of one evaluation of them (AutoAttack's batches excepted).

    Raises:
        TypeError, ValueError: no reports, another model, protocol or machine, or two outcomes for one sample.

    Example:
        >>> from torch.utils.data import Subset, TensorDataset
        >>> from ferdlib.evaluation import evaluate
        >>> data = TensorDataset(torch.rand(12, 1, 2, 2), torch.tensor([0, 0, 1, 1] * 3))
        >>> def dark(x):
        ...     return torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], dim=1)
        >>> shards = [Subset(data, range(k, 12, 2)) for k in range(2)]
        >>> parts = [evaluate(dark, shard, "quick", num_classes=2) for shard in shards]
        >>> merge(parts) == evaluate(dark, data, "quick", num_classes=2)
        True
    """
    function = "merge"
    if not isinstance(reports, Sequence):
        raise TypeError(f"{function}: expected `reports` as a list, got {_checks.got(reports)}")
    named = {str(k): report for k, report in enumerate(reports)}
    _same(function, named)
    first, *others = reports
    for other in others:
        mine, theirs = _comparable(first), _comparable(other)
        differing = [name for name in mine if mine[name] != theirs[name]]
        if differing:
            raise ValueError(
                f"{function}: expected `reports` of one evaluation, got others in {', '.join(differing)}"
            )
    index = torch.cat([report.index for report in reports])
    order = index.argsort(stable=True)
    kept = torch.ones_like(index, dtype=torch.bool)
    kept[1:] = index[order][1:] != index[order][:-1]

    def joined(parts: Iterable[Tensor]) -> Tensor:
        values = torch.cat(list(parts))[order]
        again = (~kept).nonzero().squeeze(1)
        if not torch.equal(values[again], values[again - 1]):
            raise ValueError(
                f"{function}: expected one outcome for each sample, got two for the same index"
            )
        return values[kept]

    groups = [report.groups for report in reports]
    return replace(
        first,
        index=joined(r.index for r in reports),
        targets=joined(r.targets for r in reports),
        predictions={k: joined(r.predictions[k] for r in reports) for k in first.predictions},
        fooled_at={k: joined(r.fooled_at[k] for r in reports) for k in first.fooled_at},
        groups=None if first.groups is None else joined(g for g in groups if g is not None),
        manifest=_joint_manifest(reports, int(kept.sum())),
        findings=tuple(finding for report in reports for finding in report.findings),
        timing={
            "created": max(report.timing["created"] for report in reports),
            "seconds": {
                k: sum(report.timing["seconds"][k] for report in reports)
                for k in first.timing["seconds"]
            },
        },
    )


def _same(function: str, reports: Mapping[str, RobustnessReport]) -> None:
    if not reports:
        raise ValueError(
            f"{function}: expected `reports` to be at least one RobustnessReport, got none"
        )
    for report in reports.values():
        if not isinstance(report, RobustnessReport):
            raise TypeError(
                f"{function}: expected each of `reports` to be a RobustnessReport, got "
                f"{_checks.got(report)}"
            )
    first, *others = reports.values()
    settings = {attack.name: attack for attack in first.protocol.attacks}
    for other in others:
        if (other.class_names, other.row_names) != (first.class_names, first.row_names):
            raise ValueError(f"{function}: expected `reports` of the same classes, got others")
        for attack in other.protocol.attacks:
            if settings.get(attack.name, attack) != attack:
                raise ValueError(
                    f"{function}: expected one setting for each attack of `reports`, got {attack} and "
                    f"{settings[attack.name]}"
                )


def _over(report: RobustnessReport, column: str) -> tuple[str, ...]:
    """The columns that one is the worst case of; itself where it is none, nothing where it is not there."""
    if column not in report.columns:
        return ()
    on_survivors = {attack.name for attack in report.protocol.attacks if attack.survivors}
    if column == WORST_CASE or column in on_survivors:
        return report.columns[: report.columns.index(column) + 1]
    return (column,)


def _comparable(report: RobustnessReport) -> dict[str, Any]:
    manifest = {k: v for k, v in report.manifest.items() if k != "data"}
    data = {k: report.manifest["data"][k] for k in ("shape", "dtype")}
    return {"protocol": report.protocol, "data": data, **manifest}


def _joint_manifest(reports: Sequence[RobustnessReport], samples: int) -> dict[str, Any]:
    """Digests of disjoint shards add up; where they overlap, there is none for the whole."""
    manifest = reports[0].manifest
    data = {**manifest["data"], "samples": samples}
    if sum(map(len, reports)) == samples:
        total = sum(int(report.manifest["data"]["fingerprint"], 16) for report in reports)
        data["fingerprint"] = f"{total % 2**128:032x}"
    else:
        data["fingerprint"] = None
    return {**manifest, "data": data}


def _tex(text: str) -> str:
    escaped = {mark: rf"\{mark}" for mark in "&%$#_{}"}
    escaped |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(escaped.get(mark, mark) for mark in text)
