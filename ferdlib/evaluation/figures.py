"""The class-wise figures of one attack, and their intervals, from what each sample was taken for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib import metrics
from ferdlib.evaluation import intervals


@dataclass(frozen=True, eq=False)
class AttackResult:
    """Class-wise robustness under one attack; all figures are fractions, float64.

    A row is a class, or a group where the evaluation was given groups. A row without samples is `nan`
    and left out of every figure over rows.

    Attributes:
        name: of the attack; "clean" and "worst case" are there too.
        row_names: of the R rows.
        rows: int64 `(N,)`, the row that each sample is in.
        robust: bool `(N,)`, correct under the attack.
        confusion: int64 `(K, K)` counts of classes, rows true, columns predicted.
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
    row_names: tuple[str, ...]
    rows: Tensor
    robust: Tensor
    confusion: Tensor
    confidence: float = 0.95

    @staticmethod
    def of(
        name: str,
        predictions: Tensor,
        targets: Tensor,
        *,
        num_classes: int,
        row_names: tuple[str, ...] | None = None,
        rows: Tensor | None = None,
    ) -> AttackResult:
        """From int64 predictions and labels `(N,)`; `rows` are the classes unless given.

        Raises:
            TypeError, ValueError: as `metrics.confusion_matrix`; names or rows of another kind or number.
        """
        function = "AttackResult.of"
        confusion = metrics.confusion_matrix(predictions, targets, num_classes)
        count = num_classes if rows is None else None
        names = list(map(str, range(num_classes)))
        if row_names is not None:
            names = _checks.strings(function, "row_names", row_names, count=count)
        if rows is not None:
            _checks.labels(
                function, rows, length=len(targets), num_classes=len(names), argument="rows"
            )
        return AttackResult(
            name,
            tuple(names),
            targets if rows is None else rows,
            predictions == targets,
            confusion,
        )

    @cached_property
    def totals(self) -> Tensor:
        """Samples in each row, int64 `(R,)`."""
        return torch.bincount(self.rows, minlength=len(self.row_names))

    @cached_property
    def correct(self) -> Tensor:
        """Those of them that are robust, int64 `(R,)`."""
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
        """Mean of the worst tenth of the rows, FERD's worst-10 %."""
        return float(metrics.worst_fraction(self.class_accuracy))

    @property
    def nsd(self) -> float:
        """Standard deviation over mean of the rows; `nan` where all are 0."""
        return float(metrics.nsd(self.class_accuracy))

    @cached_property
    def target_entropy(self) -> Tensor:
        """`(K,)`, how evenly each class's errors spread over the other classes."""
        return metrics.target_entropy(self.confusion)

    @cached_property
    def class_interval(self) -> Tensor:
        """Wilson interval of each row, `(R, 2)`; each holds by itself."""
        return intervals.wilson_interval(self.correct, self.totals, confidence=self.confidence)

    @cached_property
    def average_interval(self) -> Tensor:
        """`(2,)`, by the bootstrap."""
        return intervals.average_interval(self.correct, self.totals, confidence=self.confidence)

    @cached_property
    def worst_class_interval(self) -> Tensor:
        """`(2,)`, from bounds of all rows that hold together."""
        return intervals.worst_class_interval(self.correct, self.totals, confidence=self.confidence)

    @cached_property
    def worst_10_interval(self) -> Tensor:
        """`(2,)`, from the same bounds."""
        return intervals.worst_fraction_interval(
            self.correct, self.totals, confidence=self.confidence
        )

    @cached_property
    def nsd_interval(self) -> Tensor:
        """`(2,)`, by the bootstrap."""
        return intervals.nsd_interval(self.correct, self.totals, confidence=self.confidence)
