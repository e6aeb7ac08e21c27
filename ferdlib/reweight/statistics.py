"""Class means over true counts, and weights that follow them one epoch behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib.reweight._common import checked_state

__all__ = ["ClassMean", "ClassWeights"]


class ClassMean:
    """Running mean of a value in each class, over true counts (Fair-ARD Eq. 6, FERD Eq. 2 and 24).

    Attributes:
        sums, counts: float64 and int64 `(K,)`, on the device of the last values. Add both up over
            processes, or `merge`, for the mean over all of them.

    Raises:
        TypeError, ValueError: a `num_classes` that is no int >= 2; values that are not real `(N,)`;
            labels that are not int64 `(N,)` in range; a state of another kind.

    Example:
        >>> mean = ClassMean(3)
        >>> mean.update(torch.tensor([1, 4, 10]), torch.tensor([0, 0, 2]))
        >>> mean.compute()
        tensor([ 2.5000,     nan, 10.0000], dtype=torch.float64)
    """

    _name = "ClassMean"

    def __init__(self, num_classes: int) -> None:
        self.num_classes = _checks.integer(self._name, "num_classes", num_classes, low=2)
        self.reset()

    def reset(self) -> None:
        """Forget all values."""
        self.sums = torch.zeros(self.num_classes, dtype=torch.float64)
        self.counts = torch.zeros(self.num_classes, dtype=torch.int64)

    def update(self, values: Tensor, targets: Tensor) -> None:
        """Add values `(N,)`, without their gradient, to the classes of their targets `(N,)`."""
        if _checks.tensor(self._name, "values", values).is_complex():
            raise TypeError(f"{self._name}: expected real `values`, got {_checks.got(values)}")
        if values.ndim != 1:
            shape = tuple(values.shape)
            raise ValueError(f"{self._name}: expected `values` of shape (N,), got {shape}")
        k = self.num_classes
        _checks.labels(self._name, targets, length=len(values), num_classes=k)
        member = F.one_hot(targets.to(values.device), k).bool()
        # Selected, not multiplied: a NaN stays in its own class.
        added = torch.where(member, values.detach().double()[:, None], 0.0)
        self.sums = self.sums.to(values.device) + added.sum(dim=0)
        self.counts = self.counts.to(values.device) + member.sum(dim=0)

    def compute(self) -> Tensor:
        """Means, float64 `(K,)`, `nan` for an absent class; ValueError if a sum is not finite."""
        if not bool(self.sums.isfinite().all()):
            raise ValueError(f"{self._name}: expected finite `values`, got class sums {self.sums}")
        return self.sums / self.counts

    def merge(self, other: ClassMean) -> None:
        """Add what another one has accumulated, as if its updates had been made here."""
        if not isinstance(other, ClassMean):
            raise TypeError(f"{self._name}: expected `other` to be one, got {_checks.got(other)}")
        _checks.same_shape(self._name, counts=self.counts, other=other.counts)
        self.sums = self.sums + other.sums.to(self.sums.device)
        self.counts = self.counts + other.counts.to(self.counts.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that continuing needs, also in the middle of an epoch."""
        return {"sums": self.sums.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned."""
        for key, value in checked_state(self._name, state, self.state_dict()).items():
            setattr(self, key, value)


class ClassWeights(ClassMean):
    """Last epoch's class weights, while this epoch's class means accumulate.

    Called as `w(values, targets)` it takes in the values, as `ClassMean.update`, and returns the
    weights of the targets, `(N,)`, on their device, in the dtype of float values, else float32.
    `step()` ends the epoch.

    Args:
        num_classes: K >= 2.
        rule: from class means `(K,)`, `nan` for an absent class, to weights `(K,)`: one of the
            above, a `functools.partial` of it, or one's own.

    Attributes:
        weights: float64 `(K,)`, ones before the first `step()`.

    Raises: as `ClassMean`, and TypeError for a rule that is not callable.

    Example:
        >>> from ferdlib.reweight import lps_power
        >>> w, y = ClassWeights(2, lps_power), torch.tensor([0, 1])
        >>> w(torch.tensor([1, 2]), y)  # least PGD steps of the first epoch
        tensor([1., 1.])
        >>> w.step()
        >>> w(torch.tensor([1, 2]), y)  # (1, 1/4) over their mean
        tensor([1.6000, 0.4000])
    """

    _name = "ClassWeights"

    def __init__(self, num_classes: int, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__(num_classes)
        _checks.callable_(self._name, "rule", rule)
        self.rule = rule
        self.weights = torch.ones(num_classes, dtype=torch.float64)

    def __call__(self, values: Tensor, targets: Tensor) -> Tensor:
        self.update(values, targets)
        self.weights = self.weights.to(targets.device)
        dtype = values.dtype if values.is_floating_point() else torch.float32
        return self.weights.to(dtype)[targets]

    def step(self) -> None:
        """Set the weights to the rule of this epoch's class means, and start the next epoch.

        Raises:
            RuntimeError: no values since the last step.
            TypeError, ValueError: a rule that returns anything but a finite, non-negative float
                tensor `(K,)`. Weights and means are then as before.
        """
        if not bool(self.counts.any()):
            raise RuntimeError("ClassWeights: expected `values` since the last step, got none")
        w = self.rule(self.compute())
        if not isinstance(w, Tensor) or not w.is_floating_point():
            raise TypeError(
                f"ClassWeights: expected `rule` to return a float tensor, got {_checks.got(w)}"
            )
        k = self.num_classes
        if w.shape != (k,) or not bool((w.isfinite() & (w >= 0)).all()):
            raise ValueError(
                f"ClassWeights: expected `rule` to return shape ({k},), finite and >= 0, got {w}"
            )
        self.weights = w.detach().double().clone()
        self.reset()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the weights and of the epoch so far; the rule is not part of it."""
        return {**super().state_dict(), "weights": self.weights.clone()}
