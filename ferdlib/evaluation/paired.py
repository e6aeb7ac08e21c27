"""Two models on the same samples: is the difference more than chance?

Only the samples that exactly one of the two classifies right, the discordant ones, bear on it. As for
the intervals, chance is that of drawing the samples; another training run may turn out otherwise.
The results are float64, on the CPU.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib import metrics
from ferdlib.evaluation.intervals import class_counts, upper_tail

__all__ = ["holm", "mcnemar", "paired_permutation"]

Figure = Literal["average", "worst_class", "worst_fraction", "nsd"]


def mcnemar(only_a: Tensor, only_b: Tensor) -> Tensor:
    r"""McNemar's exact two-sided test, class by class.

    $$p = \min\left(1, 2 P(X \ge \max(b, c))\right), \qquad
      X \sim \mathrm{Bin}\left(b + c, \tfrac12\right)$$

    with b samples that only model A classifies right, and c that only B does. The classes are tested
    one by one: adjust the p-values with `holm` before one is picked out.

    Args:
        only_a: int64 counts `(K,)`, the samples of each class that only A classifies right.
        only_b: int64 counts `(K,)`, those that only B does.

    Returns:
        float64 p-values `(K,)`; 1 for a class without such samples.

    Raises:
        TypeError: counts that are not int64.
        ValueError: shapes that are not `(K,)`, or differ, or negative counts.

    Example:
        >>> import torch
        >>> mcnemar(torch.tensor([8, 3, 0]), torch.tensor([1, 3, 0]))  # 2 * (9 + 1) / 2**9
        tensor([0.0391, 1.0000, 1.0000], dtype=torch.float64)

    Reference:
        McNemar (1947), Note on the sampling error of the difference between correlated proportions.
    """
    b, c = class_counts("mcnemar", only_a=only_a, only_b=only_b)
    half = torch.full((len(b),), 0.5, dtype=torch.float64)
    return (2 * upper_tail(torch.maximum(b, c), b + c)(half)).clamp(max=1)


def holm(p: Tensor) -> Tensor:
    r"""Holm's adjusted p-values: rejecting those up to α keeps any false rejection below α.

    $$\tilde p_{(i)} = \max_{j \le i} \min\left(1, (m - j + 1) \, p_{(j)}\right)$$

    for the m sorted p-values; they may depend on each other in any way.

    Args:
        p: float p-values `(K,)` in [0, 1]; `nan` for a test that was not made, not counted in m.

    Returns:
        float64 `(K,)`, in the order of `p`, `nan` where that is.

    Raises:
        TypeError: a dtype that is not float.
        ValueError: a shape that is not `(K,)`, or values outside [0, 1].

    Example:
        >>> import torch
        >>> holm(torch.tensor([0.04, 0.01, torch.nan, 0.03], dtype=torch.float64))
        tensor([0.0600, 0.0300,    nan, 0.0600], dtype=torch.float64)

    Reference:
        Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    p = _checks.floating("holm", "p", p).double().cpu()
    if p.ndim != 1:
        raise ValueError(f"holm: expected `p` of shape (K,), got {tuple(p.shape)}")
    outside = p[(p < 0) | (p > 1)]
    if len(outside):
        raise ValueError(f"holm: expected `p` in [0, 1] (or nan), got {outside[0]:g}")
    ordered, order = p.sort()  # nan last, where it reaches no other
    left = (~p.isnan()).sum() - torch.arange(len(p))
    adjusted = (left * ordered).cummax(dim=0).values.clamp(max=1)
    return torch.empty_like(p).scatter(0, order, adjusted)


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

    where each draw $T^*$ exchanges the outcomes of the two models on each sample with probability
    1/2. Of the $b_k + c_k$ discordant samples of class k, $\mathrm{Bin}(b_k + c_k, \frac12)$ go to
    A then. What is tested is that it makes no difference to any sample which model it is given to;
    two models with equal figures but other differences may be told apart as well.

    Args:
        correct_a: bool `(N,)`, whether model A classifies each sample right.
        correct_b: bool `(N,)`, whether B does.
        rows: int64 `(N,)` in `0..num_rows-1`, the class of each sample.
        num_rows: K >= 2; a class without samples is left out.
        figure: the function of `ferdlib.metrics`, by name, at its defaults.
        draws: how many permutations, >= 1.
        seed: of the draws, >= 0; torch's global generator is not touched.

    Returns:
        `(difference, p)`: f(A) - f(B), and the two-sided p-value, at least
        1 / (draws + 1). Both are `nan` where the figure of A or of B is.

    Raises:
        TypeError: outcomes that are not bool, rows that are not int64.
        ValueError: lengths that differ, rows out of range, an unknown figure.

    Example:
        >>> import torch
        >>> a = torch.tensor([1, 1, 1, 1, 1, 1, 0, 1, 1, 1]).bool()
        >>> b = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 1, 0]).bool()
        >>> rows = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
        >>> difference, p = paired_permutation(a, b, rows, 2, figure="average")
        >>> round(difference, 2), round(p, 2)  # 2 / 2**6 = 0.031 over all exchanges
        (0.6, 0.03)
    """
    name = "paired_permutation"
    k = _checks.integer(name, "num_rows", num_rows, low=2)
    draws = _checks.integer(name, "draws", draws, low=1)
    rng = torch.Generator().manual_seed(_checks.integer(name, "seed", seed, low=0))
    _checks.choice(name, "figure", figure, get_args(Figure))
    a, b = _outcomes(name, "correct_a", correct_a), _outcomes(name, "correct_b", correct_b)
    _checks.same_shape(name, correct_a=a, correct_b=b)
    rows = _checks.tensor(name, "rows", rows).cpu()
    _checks.labels(name, rows, length=len(a), num_classes=k, argument="rows")

    n, both, only_a, only_b = (
        torch.bincount(rows[which], minlength=k).double()
        for which in (torch.ones_like(a), a & b, a & ~b, b & ~a)
    )
    f = getattr(metrics, figure)
    difference = float(f((both + only_a) / n) - f((both + only_b) / n))
    if math.isnan(difference):
        return math.nan, math.nan
    n, both, discordant = (counts[n > 0] for counts in (n, both, only_a + only_b))
    counts = discordant.expand(draws, -1)
    to_a = torch.binomial(counts, torch.full_like(counts, 0.5), generator=rng)
    drawn = _figures(figure, (both + to_a) / n) - _figures(figure, (both + counts - to_a) / n)
    # Up to rounding. A draw that leaves one model without an NSD counts against the difference.
    smaller = drawn.abs() < abs(difference) - 1e-12
    return difference, (1 + draws - int(smaller.sum())) / (draws + 1)


def _figures(figure: Figure, acc: Tensor) -> Tensor:
    """The figure of each row of `(draws, K)`, without absent classes."""
    match figure:
        case "average":
            return acc.mean(dim=1)
        case "worst_class":
            return acc.amin(dim=1)
        case "worst_fraction":
            tenth = math.ceil(acc.shape[1] / 10)
            return acc.topk(tenth, dim=1, largest=False).values.mean(dim=1)
        case "nsd":
            return acc.std(dim=1, correction=0) / acc.mean(dim=1)


def _outcomes(function: str, argument: str, value: Tensor) -> Tensor:
    if _checks.tensor(function, argument, value).dtype != torch.bool:
        raise TypeError(f"{function}: expected `{argument}` in bool, got {_checks.got(value)}")
    if value.ndim != 1:
        raise ValueError(
            f"{function}: expected `{argument}` of shape (N,), got {tuple(value.shape)}"
        )
    return value.cpu()
