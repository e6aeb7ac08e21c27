"""Class-wise figures of one attack, and their intervals, from the class that each sample was taken for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ferdlib import _checks, metrics, stats
from ferdlib._checks import public


@dataclass(frozen=True, eq=False)
class AttackResult:
    """Class-wise robustness under one attack; all figures are fractions, float64.

    A row is a class, or a group where the evaluation was given groups. A row without samples is `nan` and left
    out of every figure over rows. Time and memory are linear in samples and rows, but for `confusion`.

    Attributes:
        name: of the attack; "clean" and "worst case" are there too.
        predictions: int64 `(N,)`, the class that each sample was taken for.
        targets: int64 `(N,)`, the labels.
        num_classes: K.
        row_names: of the R rows.
        rows: int64 `(N,)`, the row that each sample is in.
        confidence: of all intervals.

    Example:
        >>> y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        >>> predicted = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0])
        >>> found = AttackResult.of("PGD-20", predicted, y, num_classes=2)
        >>> found.average, found.worst_class, found.worst_name
        (0.625, 0.5, '1')
        >>> found.worst_class_interval
        tensor([0.0474, 0.9526], dtype=torch.float64)
    """

    name: str
    predictions: Tensor
    targets: Tensor
    num_classes: int
    row_names: tuple[str, ...]
    rows: Tensor
    confidence: float = 0.95

    @staticmethod
    @public
    def of(
        name: str,
        predictions: Tensor,
        targets: Tensor,
        *,
        num_classes: int,
        row_names: Sequence[str] | None = None,
        rows: Tensor | None = None,
    ) -> AttackResult:
        """Make a result of int64 predictions and labels `(N,)`; `rows` are the classes unless given."""
        _checks.integer(2, num_classes=num_classes)
        _checks.tensor(predictions=predictions, targets=targets)
        # On the host, where the range can be read: a wrong pair of labels could count as a right one.
        predictions, targets = predictions.cpu(), targets.cpu()
        both = {"targets": targets, "predictions": predictions}
        _checks.labels(num_classes=num_classes, like=targets, **both)
        names = list(map(str, range(num_classes))) if row_names is None else row_names
        _checks.strings(num_classes if rows is None else None, row_names=names)
        rows = targets if rows is None else rows
        _checks.labels(num_classes=len(names), like=targets, rows=rows)
        return AttackResult(name, predictions, targets, num_classes, tuple(names), rows)

    @cached_property
    def robust(self) -> Tensor:
        """Bool `(N,)`, correct under the attack."""
        return self.predictions == self.targets

    @cached_property
    def confusion(self) -> Tensor:
        """Int64 `(K, K)` counts of classes, rows true, columns predicted."""
        return metrics.confusion_matrix(self.predictions, self.targets, self.num_classes)

    @cached_property
    def totals(self) -> Tensor:
        """Samples in each row, int64 `(R,)`."""
        return torch.bincount(self.rows, minlength=len(self.row_names))

    @cached_property
    def correct(self) -> Tensor:
        """Robust samples in each row, int64 `(R,)`."""
        return torch.bincount(self.rows[self.robust], minlength=len(self.row_names))

    @cached_property
    def class_accuracy(self) -> Tensor:
        """`(R,)`, `nan` for a row without samples."""
        return self.correct.double() / self.totals

    @property
    def average(self) -> float:
        """Macro mean over the rows."""
        return float(metrics.average(self.class_accuracy))

    @property
    def worst_class(self) -> float:
        """Accuracy of the worst row."""
        return float(metrics.worst_class(self.class_accuracy))

    @property
    def worst_index(self) -> int:
        """The worst row, the first of several."""
        return int(self.class_accuracy.nan_to_num(nan=2.0).argmin())

    @property
    def worst_name(self) -> str:
        """Its name."""
        return self.row_names[self.worst_index]

    @property
    def worst_10(self) -> float:
        """Mean of the worst tenth of the rows: the worst 10 % of FERD's Tables 2 and 5."""
        return float(metrics.worst_fraction(self.class_accuracy))

    @property
    def nsd(self) -> float:
        """Standard deviation over mean of the rows; `nan` where all are 0."""
        return float(metrics.nsd(self.class_accuracy))

    @cached_property
    def target_entropy(self) -> Tensor:
        """`metrics.target_entropy` of the classes, `(K,)`, from the pairs of classes that occur."""
        # A pair of classes as one number: K times K counts would be mostly zeros.
        k, wrong = self.num_classes, ~self.robust
        pairs = self.targets[wrong] * k + self.predictions[wrong]
        pairs, counts = pairs.unique(return_counts=True)
        errors = torch.zeros(k, dtype=torch.int64, device="cpu").index_add(0, pairs // k, counts)
        q = counts.double() / errors[pairs // k]
        entropy = torch.zeros(k, dtype=torch.float64, device="cpu").index_add(
            0, pairs // k, torch.xlogy(q, 1 / q)
        )
        # Two classes leave an error no choice.
        largest = math.log(k - 1) if k > 2 else math.nan
        return (entropy / largest).where(errors > 0, math.nan)

    @cached_property
    def class_interval(self) -> Tensor:
        """Wilson interval of each row, `(R, 2)`; each holds by itself."""
        return stats.wilson_interval(self.correct, self.totals, confidence=self.confidence)

    @cached_property
    def average_interval(self) -> Tensor:
        """`(2,)`, by the bootstrap."""
        return stats.average_interval(self.correct, self.totals, confidence=self.confidence)

    @cached_property
    def worst_class_interval(self) -> Tensor:
        """`(2,)`, from bounds of all rows that hold together."""
        return stats.worst_class_interval(self.correct, self.totals, confidence=self.confidence)

    @cached_property
    def worst_10_interval(self) -> Tensor:
        """`(2,)`, from the same bounds."""
        return stats.worst_fraction_interval(self.correct, self.totals, confidence=self.confidence)

    @cached_property
    def nsd_interval(self) -> Tensor:
        """`(2,)`, by the bootstrap."""
        return stats.nsd_interval(self.correct, self.totals, confidence=self.confidence)
