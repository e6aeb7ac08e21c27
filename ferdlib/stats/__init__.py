r"""Confidence intervals and paired tests of class-wise accuracies, and of the figures made of them, from counts.

The samples of a class count as independent draws, $X_k \sim \mathrm{Bin}(n_k, p_k)$. Intervals are for the figures
of the true accuracies $p_k$; tests compare two models on the same samples. Both speak of these models: another
training run, or another attack, is another matter. docs/coverage.md has the coverage of every interval.

Counts are int64 `(K,)`, with K >= 2 for a figure over classes, which leaves out a class without samples. An
interval is float64 `(2,)` on the CPU, lower and upper limit, `nan` if no class has samples. The bootstraps and the
permutation test take the number of `draws` >= 1 and a `seed` >= 0, and touch no global generator. All raise
TypeError for another dtype, ValueError for another shape, negative counts, more right than there are, or a value
out of range.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ferdlib import _checks, metrics
from ferdlib._checks import InvalidType, InvalidValue, got, public
from ferdlib.stats.draws import binomials, resampled, true_squares
from ferdlib.stats.limits import normal_quantile, nsd, nsd_of_box, simultaneous

__all__ = [
    "average_interval",
    "holm",
    "mcnemar",
    "nsd_interval",
    "paired_permutation",
    "simultaneous_interval",
    "wilson_interval",
    "worst_class_interval",
    "worst_fraction_interval",
]

Figure = Literal["average", "worst_class", "worst_fraction", "nsd"]


@public
def wilson_interval(correct: Tensor, totals: Tensor, *, confidence: float = 0.95) -> Tensor:
    r"""Wilson's score interval for each class on its own (Wilson 1927).

    $$\frac{2x + z^2 \mp z \sqrt{z^2 + 4x(n - x)/n}}{2(n + z^2)}, \qquad
      z = \Phi^{-1}\!\left(\tfrac{1 + \text{confidence}}{2}\right)$$

    for x right of n. `simultaneous_interval` is for all classes at once.

    Args:
        correct, totals: the samples of each class that were classified right, and all of them.
        confidence: in (0, 1).

    Returns:
        float64 `(K, 2)`, lower and upper limit; `nan` for a class without samples.

    Example:
        >>> wilson_interval(torch.tensor([27, 0]), torch.tensor([54, 0]))
        tensor([[0.3711, 0.6289],
                [   nan,    nan]], dtype=torch.float64)
    """
    # scipy has it for one class per call.
    x, n = (counts.double() for counts in _counts(correct, totals, confidence))
    z = normal_quantile(confidence)
    centre, half = 2 * x + z**2, z * (z**2 + 4 * x * (n - x) / n).sqrt()
    limits = torch.stack([centre - half, centre + half], dim=1) / (2 * (n + z**2))[:, None]
    # They are inside [0, 1] and around the accuracy, but for rounding.
    low, high = limits.clamp(0, 1).T
    return torch.stack([low.minimum(x / n), high.maximum(x / n)], dim=1)


@public
def simultaneous_interval(correct: Tensor, totals: Tensor, *, confidence: float = 0.95) -> Tensor:
    r"""Exact intervals that hold for all classes at once (Clopper and Pearson 1934, Šidák 1967).

    The limits $[L, U]$ for x right of n, with m present classes, are those of

    $$P_L(X \ge x) = P_U(X \le x) = \frac{1 - \text{confidence}^{1/m}}{2}$$

    with L = 0 if x = 0, and U = 1 if x = n. The classes are independent, so all m intervals hold with the
    product of at least $\text{confidence}^{1/m}$ each. Arguments and result are those of `wilson_interval`.

    Example:
        >>> simultaneous_interval(torch.tensor([27, 0, 0]), torch.tensor([54, 20, 0]))
        tensor([[0.3433, 0.6567],
                [0.0000, 0.1962],
                [   nan,    nan]], dtype=torch.float64)
    """
    return simultaneous(*_counts(correct, totals, confidence), confidence)


@public
def worst_class_interval(correct: Tensor, totals: Tensor, *, confidence: float = 0.95) -> Tensor:
    r"""Interval for the accuracy of the class that is truly the worst, $[\min_k L_k, \min_k U_k]$.

    The limits are those of `simultaneous_interval`: where they hold for every class, they hold for the minimum,
    whichever class has it. A bootstrap does not: the smallest of K noisy accuracies is below the smallest true
    one on average, and that of a resample is lower still. The price is width, about 1.5 times (10
    classes) or 1.9 times (100) that of the Wilson interval of the class that came out worst.

    Example:
        >>> worst_class_interval(torch.tensor([27, 36, 48]), torch.tensor([54, 54, 54]))
        tensor([0.3339, 0.6661], dtype=torch.float64)
    """
    limits = simultaneous(*_counts(correct, totals, confidence, least=2), confidence)
    return metrics.worst_class(limits.T)


@public
def worst_fraction_interval(
    correct: Tensor, totals: Tensor, *, fraction: float = 0.1, confidence: float = 0.95
) -> Tensor:
    """Interval for the mean of the truly worst classes: `metrics.worst_fraction` of the limits.

    The limits are those of `simultaneous_interval`, and the mean of the worst grows with every accuracy: where
    they hold for every class, they hold for it. With many classes it is too wide, as the errors average out and
    the limits do not. The fraction is in (0, 1].

    Example:
        >>> counts = torch.tensor([27, 36, 48]), torch.tensor([54, 54, 54])
        >>> worst_fraction_interval(*counts, fraction=0.5)
        tensor([0.4149, 0.7385], dtype=torch.float64)
    """
    _checks.positive(fraction=fraction)
    _checks.real(0, 1, fraction=fraction)
    limits = simultaneous(*_counts(correct, totals, confidence, least=2), confidence)
    return metrics.worst_fraction(limits.T, fraction)


@public
def average_interval(
    correct: Tensor, totals: Tensor, *, confidence: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Tensor:
    r"""Interval for the macro average: bootstrap percentiles, stratified by class.

    A resample of the $n_k$ samples of class k is a draw of $\mathrm{Bin}(n_k, x_k / n_k)$, which never leaves 0
    or 1. So the classes that are all wrong add Wilson's upper limit of 0 right in their samples together, and
    those that are all right its mirror image, in quadrature: their error is independent of the others'. The sum
    over more than 200 classes is drawn from its normal limit.

    Example:
        >>> counts = torch.tensor([27, 36, 48]), torch.tensor([54, 54, 54])
        >>> average_interval(*counts).round(decimals=2)
        tensor([0.6200, 0.7500], dtype=torch.float64)
    """
    x, n = _present(correct, totals, confidence)
    acc, square = x / n, normal_quantile(confidence) ** 2
    means, _ = resampled(acc, n, draws, seed)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    quantiles = means.quantile(torch.tensor(tails, dtype=torch.float64, device="cpu"))
    ends = []
    for sign, end, limit in zip((-1, 1), (1, 0), quantiles, strict=True):
        # As many samples as give the mean of these classes its variance, if their sizes differ.
        samples = n[acc == end]
        worth = len(samples) ** 2 / (1 / samples).sum().clamp(min=1e-300)
        unseen = len(samples) / max(len(n), 1) * square / (worth + square)
        far = ((limit - acc.mean()).square() + unseen.square()).sqrt()
        limit = torch.where(unseen > 0, acc.mean() + sign * far, limit)
        ends.append((sign * limit).maximum(sign * acc.mean()) * sign)
    return torch.stack(ends).clamp(0, 1)


@public
def nsd_interval(
    correct: Tensor,
    totals: Tensor,
    *,
    ddof: int = 0,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Tensor:
    r"""Interval for the NSD of the true accuracies: a bootstrap corrected for sampling noise.

    The measured NSD is too large: the variance of the measured accuracies $a_k$ holds, besides that of the true
    ones, the mean sampling variance. The estimate without it is

    $$T = \frac{\sqrt{\max(0, V)}}{\bar a}, \qquad
      V = \frac{1}{K - \text{ddof}} \left[ \sum_k (a_k - \bar a)^2
          - \frac{K - 1}{K} \sum_k \frac{a_k (1 - a_k)}{n_k - 1} \right]$$

    The resamples are drawn from accuracies pulled towards their mean until their NSD is T, and the limits are
    bias-corrected percentiles (Efron 1981) of the resamples' T. So the measured NSD may lie above the upper
    limit where the classes hardly differ. If every class is all right or all wrong, all resamples are alike: the
    limits are then the least and the largest NSD of accuracies inside those of `simultaneous_interval`.

    `ddof` >= 0 is that of `metrics.nsd`. The result is `nan` also if no sample was classified right, or if no more
    than `ddof` classes are present.

    Example:
        >>> counts = torch.tensor([27, 36, 48]), torch.tensor([54, 54, 54])
        >>> nsd_interval(*counts).round(decimals=2)
        tensor([0.1200, 0.3400], dtype=torch.float64)
    """
    x, n = _present(correct, totals, confidence)
    _checks.integer(0, ddof=ddof)
    if ddof >= len(n) or not bool(x.any()):
        return torch.full((2,), math.nan, dtype=torch.float64, device="cpu")
    acc = x / n
    measured = nsd(acc, ddof)
    if bool(((x == 0) | (x == n)).all()):
        low, high = nsd_of_box(simultaneous(x, n, confidence), ddof)
        return torch.stack([low.minimum(measured), high.maximum(measured)])
    mean, squares = acc.mean(), (acc - acc.mean()).square().sum()
    # The spread of the measured accuracies is that of the truth and of noise: take the noise out.
    pull = torch.where(squares > 0, (true_squares(acc, n) / squares).sqrt(), 0)
    means, squares = resampled((mean + pull * (acc - mean)).clamp(0, 1), n, draws, seed)
    t = (squares / (len(n) - ddof)).sqrt() / means
    estimate = (true_squares(acc, n) / (len(n) - ddof)).sqrt() / mean
    # A resample without a single success has no NSD.
    t = t[~t.isnan()] if not bool(t.isnan().all()) else estimate[None]
    # With ties, up to rounding: where classes hardly differ, T is 0 in the data and most resamples.
    bias = torch.special.ndtri((t <= estimate + 1e-12).double().mean())
    spread = normal_quantile(confidence) * torch.tensor([-1.0, 1.0], device="cpu").double()
    low, high = t.quantile(torch.special.ndtr(2 * bias + spread))
    # A share of ties near 1 would move even the lower limit beyond them.
    return torch.stack([low.minimum(estimate), high.maximum(estimate)])


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

    Example:
        >>> mcnemar(torch.tensor([8, 3, 0]), torch.tensor([1, 3, 0]))  # 2 * (9 + 1) / 2**9
        tensor([0.0391, 1.0000, 1.0000], dtype=torch.float64)
    """
    from scipy.special import betainc

    b, c = _vectors(torch.int64, 1, only_a=only_a, only_b=only_b)
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
    left = (~p.isnan()).sum() - torch.arange(len(p), device="cpu")
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
        correct_a, correct_b: bool `(N,)`, True where model A, or B, classifies the sample right.
        rows: int64 `(N,)` in `0..num_rows-1`, the class of each sample.
        num_rows: K >= 2; a class without samples is left out.
        figure: the function of `ferdlib.metrics`, by name, at its defaults.

    Returns:
        `(difference, p)`: f(A) - f(B), and the two-sided p-value, at least 1 / (draws + 1). Both are `nan` where
        the figure of A or of B is.

    Example:
        >>> a = torch.tensor([1, 1, 1, 1, 1, 1, 0, 1, 1, 1]).bool()
        >>> b = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 1, 0]).bool()
        >>> rows = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
        >>> difference, p = paired_permutation(a, b, rows, 2, figure="average")
        >>> round(difference, 2), round(p, 2)  # 2 / 2**6 = 0.031 over all exchanges
        (0.6, 0.03)
    """
    a, b = _vectors(torch.bool, 0, correct_a=correct_a, correct_b=correct_b)
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


def _counts(
    correct: Tensor, totals: Tensor, confidence: float, *, least: int = 1
) -> tuple[Tensor, Tensor]:
    """Check what every interval takes, and return the counts on the CPU."""
    _checks.real(confidence=confidence)
    if not 0 < confidence < 1:
        raise InvalidValue(f"expected `confidence` in (0, 1), got {confidence!r}; 95 % is 0.95")
    x, n = _vectors(torch.int64, least, correct=correct, totals=totals)
    if bool((x > n).any()):
        k = int((x > n).nonzero()[0])
        came = f"{x[k]} of {n[k]} in class {k}"
        raise InvalidValue(f"expected `correct` no larger than `totals`, got {came}")
    return x, n


def _present(correct: Tensor, totals: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """Counts of the classes that have samples, checked."""
    x, n = _counts(correct, totals, confidence, least=2)
    return x[n > 0].double(), n[n > 0].double()


def _vectors(dtype: torch.dtype, least: int, /, **named: Tensor) -> list[Tensor]:
    """Vectors of one dtype and equal length, at least `least`, without negative values; on the CPU."""
    _checks.tensor(**named)
    for name, value in named.items():
        wanted = f"{str(dtype)[6:]} of shape (K,) with K >= {least} and no negative value"
        wrong = f"expected `{name}` in {wanted}, got {got(value)}"
        if value.dtype != dtype:
            raise InvalidType(wrong)
        if value.ndim != 1 or len(value) < least or bool((value < 0).any()):
            raise InvalidValue(wrong)
    _checks.alike(**named)
    return [value.cpu() for value in named.values()]
