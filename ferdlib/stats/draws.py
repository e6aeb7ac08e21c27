"""Resamples of the counts of classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ferdlib import _checks

# The bootstrap of more classes draws sums over classes, by their normal limit, instead of every class.
MANY_CLASSES = 200
# Numbers that are drawn at once, to bound the memory.
CHUNK = 2**22


def binomials(n: Tensor, p: Tensor, draws: int, seed: int) -> Iterator[Tensor]:
    """Draw `Bin(n_k, p_k)` of all classes, `(draws, K)` in chunks of rows."""
    rng = torch.Generator().manual_seed(seed)
    rows = max(1, CHUNK // max(1, len(n)))
    for done in range(0, draws, rows):
        shape = min(rows, draws - done), len(n)
        yield torch.binomial(n.expand(shape), p.expand(shape), generator=rng)


def resampled(acc: Tensor, n: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mean accuracy and `true_squares` of each resample, `(draws,)` both."""
    _checks.integer(1, draws=draws)
    _checks.integer(0, seed=seed)
    if len(n) > MANY_CLASSES:
        return _normal_limit(acc, n, draws, seed)
    accuracies = (counts / n for counts in binomials(n, acc, draws, seed))
    found = [(a.mean(dim=1), true_squares(a, n)) for a in accuracies]
    means, squares = zip(*found, strict=True)
    return torch.cat(means), torch.cat(squares)


def true_squares(acc: Tensor, n: Tensor) -> Tensor:
    """Sum of squared deviations of `(..., K)` from their mean, less what sampling noise adds; at least 0."""
    squares = (acc - acc.mean(dim=-1, keepdim=True)).square().sum(dim=-1)
    return (squares - (_noise(n) * acc * (1 - acc)).sum(dim=-1)).clamp(min=0)


def _noise(n: Tensor) -> Tensor:
    """Factor of a (1 - a) in the noise of a class; of one sample a (1 - a) is 0, and stays so."""
    return (len(n) - 1) / max(len(n), 1) / (n - 1).clamp(min=1)


def _normal_limit(acc: Tensor, n: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    r"""`resampled` by the central limit theorem, at the cost of K + draws numbers.

    Both figures of a resample follow from two sums over independent classes, of a and of
    $v = a^2 - e a (1 - a)$ with e of `_noise`. The sums are drawn as normal with their exact moments.
    """
    # Moments E[a^j] of a = X / n, from the factorial moments n (n - 1) ... (n - j + 1) p^j of a binomial.
    f1 = n * acc
    f2 = f1 * (n - 1) * acc
    f3 = f2 * (n - 2) * acc
    f4 = f3 * (n - 3) * acc
    m1, m2 = acc, (f2 + f1) / n**2
    m3, m4 = (f3 + 3 * f2 + f1) / n**3, (f4 + 6 * f3 + 7 * f2 + f1) / n**4
    e = _noise(n)
    # Variances and covariance of a and a^2, then of a and v = (1 + e) a^2 - e a.
    aa, ab, bb = m2 - m1**2, m3 - m1 * m2, m4 - m2**2
    av, vv = (1 + e) * ab - e * aa, (1 + e) ** 2 * bb - 2 * e * (1 + e) * ab + e**2 * aa
    spread = aa.sum().clamp(min=0).sqrt()
    slope = torch.where(spread > 0, av.sum() / spread, 0)
    rest = (vv.sum() - slope**2).clamp(min=0).sqrt()
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(2, draws, dtype=torch.float64, device="cpu", generator=rng)
    means = ((m1.sum() + spread * z[0]) / len(n)).clamp(0, 1)
    v = ((1 + e) * m2 - e * m1).sum() + slope * z[0] + rest * z[1]
    return means, (v - len(n) * means**2).clamp(min=0)
