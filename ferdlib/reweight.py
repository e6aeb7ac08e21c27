"""Class statistics to class weights and sampling probabilities.

A rule maps one finite statistic per class, float `(K,)`, to one number per class, `(K,)`.
`margin_*` return probabilities, which sum to 1, `lps_*` loss weights, of mean 1. `nan` stands for
a class without samples: as a probability it gets what the mean margin of the present classes would,
as a weight 1. Rules compute in float64 and return the dtype and device of the statistic. They raise
TypeError for one that is not float, ValueError for a wrong shape or anything out of range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ferdlib import _checks

__all__ = [
    "ClassMean",
    "ClassWeights",
    "lps_linear",
    "lps_power",
    "lps_sigmoid",
    "lps_tanh",
    "margin_minmax",
    "margin_softmax",
    "normalize",
]


def margin_softmax(
    class_margins: Tensor, *, temperature: float = 1.0, floor: float = 0.0
) -> Tensor:
    r"""FERD's class probabilities, $p = \mathrm{softmax}(D / T)$, $D_c = -\bar m_c$ (Eq. 1-2).

    A floor $\phi$ in [0, 1/K) makes them $(1 - K \phi) p + \phi$: none below $\phi$. Uniform if all
    margins are equal, or all classes absent. Raises as the module says.

    Args:
        class_margins: class means of `losses.margin`, `(K,)`.
        temperature: T > 0; the larger, the more even.

    Example:
        >>> margin_softmax(torch.tensor([0.0, math.log(3.0)]))  # the smaller margin, the more
        tensor([0.7500, 0.2500])
    """
    d = _vulnerability("margin_softmax", class_margins)
    t = _checks.number("margin_softmax", "temperature", temperature, low=0.0, open_low=True)
    phi, k = _checks.number("margin_softmax", "floor", floor, low=0.0), len(d)
    if phi >= 1 / k:
        raise ValueError(f"margin_softmax: expected `floor` < 1/K = {1 / k:g}, got {phi:g}")
    return ((1 - k * phi) * F.softmax(d / t, dim=0) + phi).to(class_margins.dtype)


def margin_minmax(class_margins: Tensor, *, low: float = 0.05, high: float = 0.2) -> Tensor:
    r"""FERD's released rule: $D = -\bar m$ mapped linearly onto [low, high], over its sum.

    No class is drawn more than high/low times as often as another; at K = 10 none exceeds 0.3077.
    Uniform if all margins are equal, or all classes absent. Raises as the module says.

    Args:
        class_margins: class means of `losses.margin`, `(K,)`.
        low, high: 0 <= low < high.

    Example:
        >>> margin_minmax(torch.tensor([0.0, 1.0, 3.0]), low=0.1, high=0.4)  # (.4, .3, .1) / .8
        tensor([0.5000, 0.3750, 0.1250])
    """
    d = _vulnerability("margin_minmax", class_margins)
    low = _checks.number("margin_minmax", "low", low, low=0.0)
    high = _checks.number("margin_minmax", "high", high, low=low, open_low=True)
    span = d.max() - d.min()
    p = low + (high - low) * (d - d.min()) / span if span > 0 else torch.ones_like(d)
    return (p / p.sum()).to(class_margins.dtype)


def lps_power(kappa: Tensor, *, beta: float = 2.0, guard: float = 1e-5) -> Tensor:
    r"""$\omega_c \propto (\kappa_c + \text{guard})^{-\beta}$, mean 1 (Fair-ARD Eq. 7, FERD Eq. 25).

    Fair-ARD's release clips it: `normalize(w, clip=(5 / 6, 5 / 2))`. Raises as the module says.

    Args:
        kappa: class means of the least PGD steps (Fair-ARD Eq. 5-6, FERD Eq. 24), `(K,)`, >= 0.
        beta: >= 0; at 0 all weights are 1.
        guard: >= 0, and > 0 where a kappa is 0.

    Example:
        >>> lps_power(torch.tensor([1.0, 2.0]), guard=0.0)  # (1, 1/4) over their mean 5/8
        tensor([1.6000, 0.4000])
    """
    b = _checks.number("lps_power", "beta", beta, low=0.0)
    k = _kappa("lps_power", kappa) + _checks.number("lps_power", "guard", guard, low=0.0)
    if bool((k == 0).any()):
        raise ValueError("lps_power: expected `guard` > 0 where a `kappa` is 0, got 0")
    return _mean_one(-b * k.log()).to(kappa.dtype)


def lps_linear(kappa: Tensor, steps: int) -> Tensor:
    r"""$\omega_c \propto 1 - \kappa_c / (\text{steps} + 1)$, mean 1 (FERD Eq. 26).

    Args:
        kappa: as for `lps_power`, and <= steps. Raises as the module says.
        steps: >= 1, those of the attack that was counted.

    Example:
        >>> lps_linear(torch.tensor([0.0, 2.0]), steps=3)  # (1, 1/2) over their mean 3/4
        tensor([1.3333, 0.6667])
    """
    k = _kappa("lps_linear", kappa, steps)
    return _mean_one((1 - k / (steps + 1)).log()).to(kappa.dtype)


def lps_sigmoid(kappa: Tensor, steps: int, *, shift: float = 0.0) -> Tensor:
    r"""$\omega_c \propto \sigma(\lambda + 5 (1 - 2 \kappa_c / K))$, mean 1 (FERD Eq. 27).

    Args, Raises: as for `lps_linear`; K is `steps`, and `shift` $\lambda$, any finite number.

    Example:
        >>> lps_sigmoid(torch.tensor([5.0, 10.0]), steps=10)  # (1/2, 0.0067) over their mean
        tensor([1.9736, 0.0264])
    """
    return _mean_one(F.logsigmoid(_ramp("lps_sigmoid", kappa, steps, shift))).to(kappa.dtype)


def lps_tanh(kappa: Tensor, steps: int, *, shift: float = 0.0) -> Tensor:
    r"""$\omega_c \propto (1 + \tanh(\lambda + 5 (1 - 2 \kappa_c / K))) / 2$, mean 1 (FERD Eq. 28).

    Args, Raises: as for `lps_sigmoid`.

    Example:
        >>> lps_tanh(torch.tensor([5.0, 6.0]), steps=10)  # (1/2, 0.1192) over their mean
        tensor([1.6150, 0.3850])
    """
    u = _ramp("lps_tanh", kappa, steps, shift)
    return _mean_one(F.logsigmoid(2 * u)).to(kappa.dtype)  # (1 + tanh u) / 2 = sigmoid(2u)


def normalize(
    w: Tensor, *, to: Literal["mean", "sum"] = "mean", clip: tuple[float, float] | None = None
) -> Tensor:
    """Scale weights `(K,)` to mean 1 (loss weights) or to sum 1 (probabilities), then clip them.

    Args:
        w: float `(K,)`, finite, >= 0, not all 0.
        clip: (low, high), 0 <= low <= high, applied last and *not* renormalised: the mean is then
            no longer 1. Fair-ARD's release has (5/6, 5/2).

    Raises:
        TypeError: weights that are not float, a clip that is no pair of numbers.
        ValueError: a wrong shape, weights or bounds out of range, another `to`.

    Example:
        >>> normalize(torch.tensor([1.0, 3.0, 0.0, 4.0]), clip=(5 / 6, 5 / 2))
        tensor([0.8333, 1.5000, 0.8333, 2.0000])
    """
    _checks.choice("normalize", "to", to, ("mean", "sum"))
    _checks.floating("normalize", "w", w)
    if w.ndim != 1:
        raise ValueError(f"normalize: expected `w` of shape (K,), got {tuple(w.shape)}")
    if not bool((w.isfinite() & (w >= 0)).all() & (w > 0).any()):
        raise ValueError(f"normalize: expected `w` finite, >= 0 and not all 0, got {w.tolist()}")
    scaled = w.double() / (w.double().mean() if to == "mean" else w.double().sum())
    if clip is not None:
        if not isinstance(clip, (tuple, list)) or len(clip) != 2:
            raise TypeError(f"normalize: expected `clip` as (low, high), got {_checks.got(clip)}")
        low = _checks.number("normalize", "clip", clip[0], low=0.0)
        scaled = scaled.clamp(low, _checks.number("normalize", "clip", clip[1], low=low))
    return scaled.to(w.dtype)


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
        if not isinstance(state, Mapping):
            raise TypeError(f"{self._name}: expected `state` as a dict, got {_checks.got(state)}")
        wanted = {key: _checks.got(value) for key, value in self.state_dict().items()}
        found = {key: _checks.got(value) for key, value in state.items()}
        if found != wanted:
            raise ValueError(f"{self._name}: expected `state` with {wanted}, got {found}")
        for key in wanted:
            setattr(self, key, state[key].clone())


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
        if not callable(rule):
            raise TypeError(
                f"{self._name}: expected `rule` to be callable, got {_checks.got(rule)}"
            )
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


def _vulnerability(function: str, class_margins: Tensor) -> Tensor:
    """D, absent classes filled in."""
    d = -_checks.class_vector(function, class_margins, argument="class_margins").double()
    present = d[~d.isnan()]
    if not len(present):
        return torch.zeros_like(d)
    # The mean of equal values may round away from them, which the min-max map would magnify.
    return torch.where(d.isnan(), present.mean().clamp(present.min(), present.max()), d)


def _kappa(function: str, kappa: Tensor, steps: int | None = None) -> Tensor:
    k = _checks.class_vector(function, kappa, argument="kappa").double()
    high = math.inf if steps is None else float(_checks.integer(function, "steps", steps, low=1))
    # A moving average of values at the limit may round to just above it.
    outside = k[(k < 0) | (k > high * (1 + 1e-6))]
    if len(outside):
        raise ValueError(f"{function}: expected `kappa` in [0, {high:g}], got {outside[0]:g}")
    return k


def _ramp(function: str, kappa: Tensor, steps: int, shift: float) -> Tensor:
    k = _kappa(function, kappa, steps)
    return _checks.number(function, "shift", shift) + 5 * (1 - 2 * k / steps)


def _mean_one(log_weights: Tensor) -> Tensor:
    """Weights of mean 1 over present classes, from logarithms: powers over- and underflow."""
    w = (log_weights - log_weights.nan_to_num(nan=-math.inf).max()).exp()
    return torch.where(w.isnan(), 1.0, w / w.nanmean())
