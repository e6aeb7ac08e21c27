"""Steps that several rules share, on checked statistics in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A moving average of counts at the limit may round to just above it.
ROUNDING = 1 + 1e-6


def ramp(counts: Tensor, steps: int, shift: float) -> Tensor:
    """Fall from shift + 5 at no step withstood to shift - 5 at all of them."""
    return shift + 5 * (1 - 2 * counts / steps)


def mean_one(log_weights: Tensor) -> Tensor:
    """Scale weights to mean 1 over present classes, from logarithms: powers over- and underflow."""
    w = (log_weights - log_weights.nan_to_num(nan=-math.inf).max()).exp()
    return torch.where(w.isnan(), 1.0, w / w.nanmean())


def filled(statistic: Tensor) -> Tensor:
    """Give absent classes the mean of the present ones, or zeros if there are none."""
    absent = statistic.isnan()
    low, high = statistic.nan_to_num(math.inf).amin(), statistic.nan_to_num(-math.inf).amax()
    # The mean of equal values may round away from them, which a rule that looks at the range of the
    # values would magnify.
    mean = torch.where(absent.all(), 0.0, statistic.nanmean().clamp(low, high))
    return torch.where(absent, mean, statistic)
