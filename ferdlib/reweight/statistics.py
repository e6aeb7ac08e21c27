"""Class means over true counts, and weights that follow them one epoch behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidState, InvalidType, InvalidValue, public


class ClassMean:
    """Running mean of a value in each class, over true counts (Fair-ARD Eq. 6, FERD Eq. 2 and 24).

    Attributes:
        sums, counts: float64 and int64 `(K,)`, on the device of the last values. Add both up over
            processes, or `merge`, for the mean over all of them.

    Raises as the package says, for values that are not real `(N,)` and labels out of range too.

    Example:
        >>> mean = ClassMean(3)
        >>> mean.update(torch.tensor([1, 4, 10]), torch.tensor([0, 0, 2]))
        >>> mean.compute()
        tensor([ 2.5000,     nan, 10.0000], dtype=torch.float64)
    """

    @public
    def __init__(self, num_classes: int) -> None:
        _checks.integer(2, num_classes=num_classes)
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        """Forget all values."""
        self.sums = torch.zeros(self.num_classes, dtype=torch.float64, device="cpu")
        self.counts = torch.zeros(self.num_classes, dtype=torch.int64, device="cpu")

    @public
    def update(self, values: Tensor, targets: Tensor) -> None:
        """Add values `(N,)`, without their gradient, to the classes of their targets `(N,)`."""
        self._add(values, targets)

    def _add(self, values: Tensor, targets: Tensor) -> None:
        _checks.tensor(values=values, targets=targets)
        if values.is_complex():
            raise InvalidType(f"expected real `values`, got {_checks.got(values)}")
        if values.ndim != 1:
            raise InvalidValue(f"expected `values` of shape (N,), got {tuple(values.shape)}")
        k, targets = self.num_classes, targets.to(values.device)
        _checks.labels(targets=targets, like=values, num_classes=k)
        member = F.one_hot(targets, k).bool()
        # Selected, not multiplied: a NaN stays in its own class.
        added = torch.where(member, _checks.double(values.detach())[:, None], 0.0)
        self.sums = _checks.double(self.sums, values.device) + added.sum(dim=0)
        self.counts = self.counts.to(values.device) + member.sum(dim=0)

    @public
    def compute(self) -> Tensor:
        """Means, float64 `(K,)`, `nan` for an absent class; ValueError if a sum is not finite."""
        if not bool(self.sums.isfinite().all()):
            raise InvalidValue(f"expected finite `values`, got class sums {self.sums.tolist()}")
        return self.sums / self.counts

    @public
    def merge(self, other: ClassMean) -> None:
        """Add all that another one has accumulated, as if its updates had been made here."""
        _checks.instance(ClassMean, other=other)
        counts = other.counts.to(self.counts.device)
        _checks.alike(counts=self.counts, other=counts)
        self.sums = self.sums + _checks.double(other.sums, self.sums.device)
        self.counts = self.counts + counts

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that continuing needs, also in the middle of an epoch."""
        return {"sums": self.sums.clone(), "counts": self.counts.clone()}

    @public
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state that `state_dict` returned."""
        _checks.state(state, self.state_dict())
        for name, value in state.items():
            setattr(self, name, value.clone())


class ClassWeights(ClassMean):
    """Last epoch's class weights, while this epoch's class means accumulate.

    Called as `w(values, targets)` it takes in the values, as `ClassMean.update`, and returns the
    weights of the targets, `(N,)`, on their device, in the dtype of float values, else float32.
    `step()` ends the epoch.

    Args:
        num_classes: K >= 2.
        rule: maps class means `(K,)`, `nan` for an absent class, to weights `(K,)`: one of this
            package, a `functools.partial` of it, or one's own.

    Attributes:
        weights: float64 `(K,)`, ones before the first `step()`.

    Example:
        >>> from ferdlib.reweight import lps_power
        >>> w, y = ClassWeights(2, lps_power), torch.tensor([0, 1])
        >>> w(torch.tensor([1, 2]), y)  # least PGD steps of the first epoch
        tensor([1., 1.])
        >>> w.step()
        >>> w(torch.tensor([1, 2]), y)  # (1, 1/4) over their mean
        tensor([1.6000, 0.4000])
    """

    @public
    def __init__(self, num_classes: int, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__(num_classes)
        _checks.callable_(rule=rule)
        self.rule = rule
        self.weights = torch.ones(num_classes, dtype=torch.float64, device="cpu")

    @public
    def __call__(self, values: Tensor, targets: Tensor) -> Tensor:
        self._add(values, targets)
        self.weights = _checks.double(self.weights, targets.device)
        dtype = values.dtype if values.is_floating_point() else torch.float32
        return self.weights.to(dtype)[targets]

    @public
    def step(self) -> None:
        """Set the weights to the rule of this epoch's class means, and start the next epoch.

        RuntimeError without values since the last step; TypeError or ValueError for a rule that returns
        anything but finite floats `(K,)` >= 0. Weights and means are then as before.
        """
        if not bool(self.counts.any()):
            raise InvalidState("expected `values` since the last step, got none")
        w, k = self.rule(self.compute()), self.num_classes
        if not isinstance(w, Tensor) or not w.is_floating_point():
            raise InvalidType(f"expected `rule` to return a float tensor, got {_checks.got(w)}")
        if w.shape != (k,) or not bool((w.isfinite() & (w >= 0)).all()):
            wanted = f"{k} finite values >= 0"
            raise InvalidValue(f"expected `rule` to return {wanted}, got {w.tolist()}")
        self.weights = _checks.double(w.detach()).clone()
        self.reset()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the weights and of the epoch so far; the rule is not part of it."""
        return {**super().state_dict(), "weights": self.weights.clone()}
