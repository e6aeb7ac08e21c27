"""Reports side by side, tested on the same samples, and put together from shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidType, InvalidValue, got, public
from ferdlib.evaluation import table
from ferdlib.evaluation.report import MANY_CLASSES, WORST_CASE, RobustnessReport
from ferdlib.evaluation.result import AttackResult
from ferdlib.stats import holm, mcnemar, paired_permutation


@dataclass(frozen=True, eq=False)
class PairedTest:
    """Outcome of a test whether two models differ on the same samples; differences are first minus second.

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
        for name, (difference, p), figure in (
            ("average", self.average, f"{100 * self.average[0]:+.1f}"),
            ("worst class", self.worst_class, f"{100 * self.worst_class[0]:+.1f}"),
            ("NSD", self.nsd, f"{self.nsd[0]:+.3f}"),
        ):
            rows.append([name, *(("-", "-") if math.isnan(difference) else (figure, f"{p:.2g}"))])
        figures = self.row_names, self.class_differences.tolist(), self.class_p.tolist()
        for name, difference, p in zip(*figures, strict=True):
            if p < 0.05:
                rows.append([name, f"{100 * difference:+.1f}", f"{p:.2g}"])
        title = f"{self.first} minus {self.second}, {self.column}, in % (NSD a fraction):"
        return f"{title}\n{table.aligned(rows)}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Models side by side, in the papers' layout: average, worst and NSD under each attack.

    Attributes:
        reports: by the models' names.
        columns: the attacks that all of them have.
        worst: "class", or "10%" for the mean of the worst tenth of the classes.
    """

    reports: dict[str, RobustnessReport]
    columns: tuple[str, ...]
    worst: Literal["class", "10%"]

    def __str__(self) -> str:
        worst = "worst" if self.worst == "class" else "worst-10%"
        # The three figures of an attack are one cell, so that its name stands above them.
        widths = 6, max(6, len(worst)), 6

        def triple(cells: Sequence[str]) -> str:
            return " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))

        rows = [["", *self.columns], ["in %", *[triple(("avg", worst, "NSD"))] * len(self.columns)]]
        for name, *cells in table.paper_rows(self._results(), self.worst):
            rows.append([name, *(triple(cells[k : k + 3]) for k in range(0, len(cells), 3))])
        return table.aligned(rows)

    def to_markdown(self) -> str:
        """One row per model."""
        heading = ["", *(f"{c} {h}" for c in self.columns for h in ("avg.", "worst", "NSD"))]
        return table.piped([heading, *table.paper_rows(self._results(), self.worst)]) + "\n"

    def to_csv(self) -> str:
        """A line for each model and attack."""
        lines = [
            (name, column, *table.paper_figures(found, self.worst))
            for name, results in self._results().items()
            for column, found in results.items()
        ]
        heading = ("model", "attack", "average", f"worst {self.worst}", "nsd")
        return table.comma_separated([heading, *lines])

    def to_latex(self) -> str:
        """A tabular for the booktabs package; best in bold, second best underlined.

        The papers have no column for the worst case over attacks, nor has this.
        """
        columns = tuple(c for c in self.columns if c != WORST_CASE)
        return table.paper_latex(changed(self, columns=columns)._results(), self.worst)

    def _results(self) -> dict[str, dict[str, AttackResult]]:
        return {
            name: {column: report[column] for column in self.columns}
            for name, report in self.reports.items()
        }

    @public
    def test(
        self, first: str, second: str, column: str = WORST_CASE, *, seed: int = 0
    ) -> PairedTest:
        """Test whether two of the models differ under an attack, on the same samples.

        Average, worst class and NSD by a permutation test that exchanges the models' outcomes sample by sample;
        the rows by exact McNemar tests with Holm's correction. Samples, not training runs: a difference between
        two methods needs seeds, too. ValueError for unknown names, or reports on other samples.
        """
        _checks.choice(tuple(self.reports), first=first, second=second)
        _checks.choice(self.columns, column=column)
        a, b = self.reports[first], self.reports[second]
        # A pair is one sample under two models: index, label and row must agree.
        same = all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("index", "targets", "rows"))
        # Images in another size or precision are other pixels of the same samples.
        mine, theirs = a.manifest.get("data", {}), b.manifest.get("data", {})
        alike = all(mine.get(k) == theirs.get(k) for k in ("shape", "dtype"))
        # Shards that overlap have none together.
        marks = {data.get("fingerprint") for data in (mine, theirs)} - {None}
        if not same or (alike and len(marks) > 1):
            came = f"{len(a)} and {len(b)} that differ"
            raise InvalidValue(f"expected reports on the same samples, got {came}")
        one, two = a[column], b[column]
        rows = len(a.row_names)
        exchanged = partial(paired_permutation, one.robust, two.robust, a.rows, rows, seed=seed)
        only_one = torch.bincount(a.rows[one.robust & ~two.robust], minlength=rows)
        only_two = torch.bincount(a.rows[two.robust & ~one.robust], minlength=rows)
        p = mcnemar(only_one, only_two)
        # A row without samples is no test, and does not count in Holm's correction.
        p[one.totals == 0] = math.nan
        return PairedTest(
            first,
            second,
            column,
            average=exchanged(figure="average"),
            worst_class=exchanged(figure="worst_class"),
            nsd=exchanged(figure="nsd"),
            class_differences=one.class_accuracy - two.class_accuracy,
            class_p=holm(p),
            row_names=a.row_names,
        )


@public
def compare(
    reports: Mapping[str, RobustnessReport], *, worst: Literal["class", "10%"] | None = None
) -> Comparison:
    """Put reports side by side.

    Args:
        reports: by name, of the same classes under the same attacks. Columns that not all have are left out, and
            so is a worst case, also that of an AutoAttack on survivors, over different attacks.
        worst: "class" or "10%"; None takes "10%" from 100 classes on, as the papers do.

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
    if not isinstance(reports, Mapping):
        raise InvalidType(f"expected `reports` by name, as a dict, got {got(reports)}")
    first, *others = _comparable(tuple(reports.values()))
    # A worst case over other attacks is another figure under the same name.
    shared = [c for c in first.columns if all(_over(r, c) == _over(first, c) for r in others)]
    if worst is None:
        worst = "10%" if len(first.row_names) >= MANY_CLASSES else "class"
    _checks.choice(("class", "10%"), worst=worst)
    return Comparison(dict(reports), tuple(shared), worst)


@public
def merge(reports: Sequence[RobustnessReport]) -> RobustnessReport:
    """Make one report from shards of the data, such as each process's `Subset`.

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
    if not isinstance(reports, Sequence):
        raise InvalidType(f"expected `reports` as a list, got {got(reports)}")
    first, *others = _comparable(reports)
    mine = _circumstances(first)
    for theirs in map(_circumstances, others):
        differing = ", ".join(name for name in mine if mine[name] != theirs.get(name))
        if differing:
            raise InvalidValue(f"expected `reports` of one evaluation, got others in {differing}")
    index = torch.cat([report.index for report in reports])
    # Sorted, the copies of a sample are neighbours, and the first of them is kept.
    order = index.argsort(stable=True)
    kept = torch.ones_like(index, dtype=torch.bool)
    kept[1:] = index[order][1:] != index[order][:-1]
    again = (~kept).nonzero().squeeze(1)

    def joined(parts: Iterable[Tensor | None]) -> Tensor:
        values = torch.cat([part for part in parts if part is not None])[order]
        if not torch.equal(values[again], values[again - 1]):
            raise InvalidValue("expected one outcome for each sample, got two for the same index")
        return values[kept]

    # The digests of disjoint shards add up; where shards overlap, there is none for the whole.
    digests = [report.manifest["data"]["fingerprint"] for report in reports]
    fingerprint = None
    if len(again) == 0 and None not in digests:
        fingerprint = f"{sum(int(digest, 16) for digest in digests) % 2**128:032x}"
    samples = int(kept.sum())
    data = {**first.manifest["data"], "samples": samples, "fingerprint": fingerprint}
    seconds = [report.timing["seconds"] for report in reports]
    return changed(
        first,
        index=index[order][kept],
        targets=joined(r.targets for r in reports),
        predictions={k: joined(r.predictions[k] for r in reports) for k in first.predictions},
        fooled_at={k: joined(r.fooled_at[k] for r in reports) for k in first.fooled_at},
        groups=None if first.groups is None else joined(r.groups for r in reports),
        manifest={**first.manifest, "data": data},
        findings=tuple(finding for report in reports for finding in report.findings),
        timing={
            "created": max(report.timing["created"] for report in reports),
            "seconds": {name: sum(each[name] for each in seconds) for name in seconds[0]},
        },
    )


def _comparable(reports: Sequence[RobustnessReport]) -> Sequence[RobustnessReport]:
    """Check for reports of the same classes, where an attack of one name has one setting."""
    if not reports:
        raise InvalidValue("expected `reports` to be at least one RobustnessReport, got none")
    for report in reports:
        if not isinstance(report, RobustnessReport):
            wanted = "each of `reports` to be a RobustnessReport"
            raise InvalidType(f"expected {wanted}, got {got(report)}")
    first, *others = reports
    settings = {spec.name: spec for spec in first.protocol.attacks}
    for other in others:
        if (other.class_names, other.row_names) != (first.class_names, first.row_names):
            raise InvalidValue("expected `reports` of the same classes, got others")
        for spec in other.protocol.attacks:
            if (known := settings.get(spec.name, spec)) != spec:
                wanted = "one setting for each attack of `reports`"
                raise InvalidValue(f"expected {wanted}, got {spec} and {known}")
    return reports


def _over(report: RobustnessReport, column: str) -> tuple[str, ...]:
    """Columns that one is the worst case of; itself where it is none, nothing where it is not there."""
    if column not in report.columns:
        return ()
    on_survivors = {spec.name for spec in report.protocol.attacks if spec.survivors}
    if column == WORST_CASE or column in on_survivors:
        return report.columns[: report.columns.index(column) + 1]
    return (column,)


def _circumstances(report: RobustnessReport) -> dict[str, Any]:
    """Protocol and manifest, without the digest and the number of samples."""
    data = {k: report.manifest["data"][k] for k in ("shape", "dtype")}
    return {"protocol": report.protocol, **report.manifest, "data": data}
