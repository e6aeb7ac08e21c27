"""What the rules share: the range of a statistic, the scale of weights, and saved states."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ferdlib import _oldchecks as _checks


def within_steps(function: str, argument: str, counts: Tensor, steps: float) -> Tensor:
    """Counts in [0, steps]; `nan` passes."""
    # A moving average of values at the limit may round to just above it.
    outside = counts[(counts < 0) | (counts > steps * (1 + 1e-6))]
    if len(outside):
        raise ValueError(f"{function}: expected `{argument}` in [0, {steps:g}], got {outside[0]:g}")
    return counts


def ramp(function: str, counts: Tensor, steps: int, shift: float) -> Tensor:
    """From shift + 5 at no step withstood down to shift - 5 at all of them."""
    return _checks.number(function, "shift", shift) + 5 * (1 - 2 * counts / steps)


def mean_one(log_weights: Tensor) -> Tensor:
    """Weights of mean 1 over present classes, from logarithms: powers over- and underflow."""
    w = (log_weights - log_weights.nan_to_num(nan=-math.inf).max()).exp()
    return torch.where(w.isnan(), 1.0, w / w.nanmean())


def filled(statistic: Tensor) -> Tensor:
    """A statistic with absent classes at the mean of the present ones, zeros if there are none."""
    present = statistic[~statistic.isnan()]
    if not len(present):
        return torch.zeros_like(statistic)
    # The mean of equal values may round away from them, which a rule that looks at the range of the
    # values would magnify.
    mean = present.mean().clamp(present.min(), present.max())
    return torch.where(statistic.isnan(), mean, statistic)


def class_values(
    function: str, argument: str, value: Tensor, num_classes: int, *, accuracy: bool = False
) -> Tensor:
    """One float64 for each of the declared classes, at least one of them present, detached."""
    v = _checks.class_vector(function, value, argument=argument).detach().double()
    if len(v) != num_classes:
        raise ValueError(
            f"{function}: expected `{argument}` of shape ({num_classes},), got {tuple(v.shape)}"
        )
    if bool(v.isnan().all()):
        raise ValueError(f"{function}: expected `{argument}` of at least one class, got only nan")
    return in_unit_interval(function, argument, v) if accuracy else v


def in_unit_interval(function: str, argument: str, accuracy: Tensor) -> Tensor:
    outside = accuracy[(accuracy < 0) | (accuracy > 1)]
    if len(outside):
        raise ValueError(
            f"{function}: expected `{argument}` in [0, 1] (or nan), got {outside[0]:g}; "
            f"divide percentages by 100"
        )
    return accuracy


def checked_state(
    function: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of a saved state, if it has the names, dtypes and shapes of one's own."""
    return {key: value.clone() for key, value in _checks.state(function, state, own).items()}
