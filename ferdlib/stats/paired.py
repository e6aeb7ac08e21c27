"""Two models on the same samples: tests whether the difference is more than chance.

Only the samples that exactly one of the two classifies right, the discordant ones, bear on it.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ferdlib import _checks, metrics
from ferdlib._checks import InvalidValue, public
from ferdlib.stats.draws import binomials, counts_of

Figure = Literal["average", "worst_class", "worst_fraction", "nsd"]


@public
def mcnemar(only_a: Tensor, only_b: Tensor) -> Tensor:
    r"""McNemar's exact two-sided test (1947), class by class.

    $$p = \min\left(1, 2 P(X \ge \max(b, c))\right), \qquad
      X \sim \mathrm{Bin}\left(b + c, \tfrac12\right)$$

    The classes are tested one by one: adjust the p-values with `holm` before one is picked out.

    Args:
        only_a: b, int64 counts `(K,)`, the samples of each class that only model A classifies right.
        only_b: c, those that only B does.

    Returns:
        float64 p-values `(K,)`; 1 for a class without such samples.

    Raises: as for `wilson_interval`.

    Example:
        >>> mcnemar(torch.tensor([8, 3, 0]), torch.tensor([1, 3, 0]))  # 2 * (9 + 1) / 2**9
        tensor([0.0391, 1.0000, 1.0000], dtype=torch.float64)
    """
    from scipy.special import betainc

    b, c = counts_of(torch.int64, 1, only_a=only_a, only_b=only_b)
    # P(X >= x) of a binomial is a regularised incomplete beta function of its p; P(X >= 0) is 1.
    most, least = torch.maximum(b, c).double(), torch.minimum(b, c).double()
    tail = torch.from_numpy(betainc(most.clamp(min=1).numpy(), (least + 1).numpy(), 0.5))
    return torch.where(most > 0, 2 * tail, 1.0).clamp(max=1)


@public
def holm(p: Tensor) -> Tensor:
    r"""Holm's adjusted p-values (1979): rejecting those up to α keeps any false rejection below α.

    $$\tilde p_{(i)} = \max_{j \le i} \min\left(1, (m - j + 1) \, p_{(j)}\right)$$

    for the m sorted p-values; they may depend on each other in any way.

    Args:
        p: float p-values `(K,)` in [0, 1]; `nan` for a test that was not made, not counted in m.

    Returns:
        float64 `(K,)`, in the order of `p`, `nan` where that is.

    Raises:
        TypeError, ValueError: another dtype or shape, or values outside [0, 1].

    Example:
        >>> holm(torch.tensor([0.04, 0.01, torch.nan, 0.03], dtype=torch.float64))
        tensor([0.0600, 0.0300,    nan, 0.0600], dtype=torch.float64)
    """
    _checks.floating(p=p)
    p = p.double().cpu()
    if p.ndim != 1 or bool(((p < 0) | (p > 1)).any()):
        raise InvalidValue(f"expected `p` of shape (K,) in [0, 1] (or nan), got {p.tolist()}")
    # nan is sorted to the end, where it reaches no other.
    ordered, order = p.sort()
    left = (~p.isnan()).sum() - torch.arange(len(p))
    adjusted = (left * ordered).cummax(dim=0).values.clamp(max=1)
    return torch.empty_like(p).scatter(0, order, adjusted)


@public
def paired_permutation(
    correct_a: Tensor,
    correct_b: Tensor,
    rows: Tensor,
    num_rows: int,
    *,
    figure: Figure,
    draws: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    r"""Permutation test for the difference of a figure between two models on the same samples.

    $$T = f(A) - f(B), \qquad p = \frac{1 + \#\{|T^*| \ge |T|\}}{\text{draws} + 1}$$

    where each draw $T^*$ exchanges the outcomes of the two models on each sample with probability 1/2. Of the
    $b_k + c_k$ discordant samples of class k, $\mathrm{Bin}(b_k + c_k, \frac12)$ go to A then. The hypothesis is
    that it makes no difference to any sample which model it is given to; two models with equal figures but other
    differences may be told apart as well.

    Args:
        correct_a: bool `(N,)`, whether model A classifies each sample right.
        correct_b: bool `(N,)`, whether B does.
        rows: int64 `(N,)` in `0..num_rows-1`, the class of each sample.
        num_rows: K >= 2; a class without samples is left out.
        figure: the function of `ferdlib.metrics`, by name, at its defaults.
        draws: number of permutations, >= 1.
        seed: of the draws, >= 0; torch's global generator is not touched.

    Returns:
        `(difference, p)`: f(A) - f(B), and the two-sided p-value, at least 1 / (draws + 1). Both are `nan` where
        the figure of A or of B is.

    Raises:
        TypeError, ValueError: another dtype, lengths that differ, rows out of range, an unknown figure.

    Example:
        >>> a = torch.tensor([1, 1, 1, 1, 1, 1, 0, 1, 1, 1]).bool()
        >>> b = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 1, 0]).bool()
        >>> rows = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
        >>> difference, p = paired_permutation(a, b, rows, 2, figure="average")
        >>> round(difference, 2), round(p, 2)  # 2 / 2**6 = 0.031 over all exchanges
        (0.6, 0.03)
    """
    a, b = counts_of(torch.bool, 0, correct_a=correct_a, correct_b=correct_b)
    _checks.integer(2, num_rows=num_rows)
    _checks.tensor(rows=rows)
    _checks.labels(num_classes=num_rows, like=a, rows=(rows := rows.cpu()))
    _checks.choice(get_args(Figure), figure=figure)
    _checks.integer(1, draws=draws)
    _checks.integer(0, seed=seed)

    n, both, only_a, only_b = (
        torch.bincount(rows[which], minlength=num_rows).double()
        for which in (torch.ones_like(a), a & b, a & ~b, b & ~a)
    )
    f = getattr(metrics, figure)
    difference = float(f((both + only_a) / n) - f((both + only_b) / n))
    if math.isnan(difference):
        return math.nan, math.nan
    n, both, discordant = (counts[n > 0] for counts in (n, both, only_a + only_b))
    smaller = 0
    for to_a in binomials(discordant, torch.full_like(discordant, 0.5), draws, seed):
        drawn = f((both + to_a) / n) - f((both + discordant - to_a) / n)
        # Up to rounding. A draw that leaves one model without an NSD counts against the difference.
        smaller += int((drawn.abs() < abs(difference) - 1e-12).sum())
    return difference, (1 + draws - smaller) / (draws + 1)
