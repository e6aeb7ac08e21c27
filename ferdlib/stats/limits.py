"""Limits of class accuracies that hold together, and the NSD within them; on checked counts in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def nsd(acc: Tensor, ddof: int) -> Tensor:
    """`metrics.nsd` of present classes, of which there may be a single one."""
    mean = acc.mean(dim=-1, keepdim=True)
    squares = (acc - mean).square().sum(dim=-1)
    return (squares / (acc.shape[-1] - ddof)).sqrt() / mean.squeeze(-1)


def nsd_of_box(limits: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Least and largest NSD of accuracies within limits `(K, 2)`."""
    low, high = limits.T
    # The most even ones are as near to one number as they can be.
    numbers = torch.cat(
        [torch.linspace(0, 1, 201, device="cpu").double(), low.max()[None], high.min()[None]]
    )
    least = nsd(numbers[:, None].clamp(low, high), ddof).nan_to_num(nan=math.inf).min()
    # The least even ones are at their limits, the first at the lower and the others at the upper ones.
    low, high = limits[limits.sum(dim=1).argsort()].T
    sums, squares = (
        F.pad((low**power - high**power).cumsum(0), (1, 0)) + (high**power).sum()
        for power in (1, 2)
    )
    k = len(low)
    variance = ((squares - sums**2 / k) / (k - ddof)).clamp(min=0)
    return least, (variance.sqrt() / (sums / k)).nan_to_num(nan=0.0).max()


def simultaneous(x: Tensor, n: Tensor, confidence: float) -> Tensor:
    """Clopper-Pearson limits `(K, 2)`: quantiles of Beta(x, n - x + 1) and Beta(x + 1, n - x)."""
    from scipy.special import betaincinv

    x, n = x.double(), n.double()
    present = max(int((n > 0).sum()), 1)
    tail = -math.expm1(math.log(confidence) / present) / 2

    def lower(x: Tensor) -> Tensor:
        limit = torch.from_numpy(betaincinv(x.clamp(min=1).numpy(), (n - x + 1).numpy(), tail))
        # Of very many samples scipy's are wrong or NaN, and the normal limit is the same.
        normal = x / n - normal_quantile(1 - 2 * tail) * (x / n * (1 - x / n) / n).sqrt()
        limit = torch.where(x.minimum(n - x) > 1e9, normal, limit)
        return torch.where(x > 0, limit, 0).where(n > 0, math.nan)

    # The upper limit for x is 1 - the lower limit for the n - x others.
    return torch.stack([lower(x), 1 - lower(n - x)], dim=1)


def normal_quantile(confidence: float) -> Tensor:
    z: Tensor = torch.special.ndtri(
        torch.tensor((1 + confidence) / 2, dtype=torch.float64, device="cpu")
    )
    return z
