"""Confidence intervals from the number of samples of each class, and of those that were classified right."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ferdlib import _checks, metrics
from ferdlib._checks import InvalidValue, public
from ferdlib.stats.draws import counts_of, resampled, true_squares


@public
def wilson_interval(correct: Tensor, totals: Tensor, *, confidence: float = 0.95) -> Tensor:
    r"""Wilson's score interval for each class on its own (Wilson 1927).

    $$\frac{2x + z^2 \mp z \sqrt{z^2 + 4x(n - x)/n}}{2(n + z^2)}, \qquad
      z = \Phi^{-1}\!\left(\tfrac{1 + \text{confidence}}{2}\right)$$

    for x right of n. The coverage at 95 % is 95.0 to 95.2 % on average over true accuracies, and 92.6 to 98.0 %
    at single ones (docs/coverage.md). `simultaneous_interval` is for all classes at once.

    Args:
        correct: int64 counts `(K,)`, the samples of each class that were classified right.
        totals: int64 counts `(K,)`, the samples of each class.
        confidence: in (0, 1).

    Returns:
        float64 `(K, 2)`, lower and upper limit; `nan` for a class without samples.

    Raises:
        TypeError, ValueError: counts of another dtype or shape, negative, or more right than there are; a
            confidence that is not in (0, 1).

    Example:
        >>> wilson_interval(torch.tensor([27, 0]), torch.tensor([54, 0]))
        tensor([[0.3711, 0.6289],
                [   nan,    nan]], dtype=torch.float64)
    """
    # scipy has it for one class per call.
    x, n = (counts.double() for counts in _counts(correct, totals, confidence))
    z = _normal_quantile((1 + confidence) / 2)
    centre, half = 2 * x + z**2, z * (z**2 + 4 * x * (n - x) / n).sqrt()
    limits = torch.stack([centre - half, centre + half], dim=1) / (2 * (n + z**2))[:, None]
    # They are inside [0, 1], but for rounding.
    return limits.clamp(0, 1)


@public
def simultaneous_interval(correct: Tensor, totals: Tensor, *, confidence: float = 0.95) -> Tensor:
    r"""Exact intervals that hold for all classes at once (Clopper and Pearson 1934, Šidák 1967).

    The limits $[L, U]$ for x right of n, with m present classes, are those of

    $$P_L(X \ge x) = P_U(X \le x) = \frac{1 - \text{confidence}^{1/m}}{2}$$

    with L = 0 if x = 0, and U = 1 if x = n. The classes are independent, so all m intervals hold with the
    product of at least $\text{confidence}^{1/m}$ each.

    Args, Returns, Raises: as for `wilson_interval`.

    Example:
        >>> simultaneous_interval(torch.tensor([27, 0, 0]), torch.tensor([54, 20, 0]))
        tensor([[0.3433, 0.6567],
                [0.0000, 0.1962],
                [   nan,    nan]], dtype=torch.float64)
    """
    return _simultaneous(*_counts(correct, totals, confidence), confidence)


@public
def worst_class_interval(correct: Tensor, totals: Tensor, *, confidence: float = 0.95) -> Tensor:
    r"""Interval for the accuracy of the class that is truly the worst, $[\min_k L_k, \min_k U_k]$.

    The limits are those of `simultaneous_interval`: where they hold for every class, they hold for the minimum,
    whichever class has it. A bootstrap does not: the smallest of K noisy accuracies is below the smallest true
    one on average, and that of a resample is lower still. The price is width, about 1.5 times (10 classes) or
    1.8 to 1.9 times (100) that of the Wilson interval of the class that came out worst. Coverage at 95 %,
    simulated for 54 to 1000 samples: 97 to 100 %.

    Args, Raises: as for `wilson_interval`, with K >= 2; a class without samples is left out.

    Returns:
        float64 `(2,)`, lower and upper limit; `nan` if no class has samples.

    Example:
        >>> worst_class_interval(torch.tensor([27, 36, 48]), torch.tensor([54, 54, 54]))
        tensor([0.3339, 0.6661], dtype=torch.float64)
    """
    limits = _simultaneous(*_counts(correct, totals, confidence, least=2), confidence)
    return metrics.worst_class(limits.T)


@public
def worst_fraction_interval(
    correct: Tensor, totals: Tensor, *, fraction: float = 0.1, confidence: float = 0.95
) -> Tensor:
    """Interval for the mean of the truly worst classes: `metrics.worst_fraction` of the limits.

    The limits are those of `simultaneous_interval`, and the mean of the worst grows with every accuracy: where
    they hold for every class, they hold for it. With 10 classes it is the interval of the worst class. With 100
    the errors average out and the limits do not: at 95 %, it covered in every one of 20 000 simulated cases.

    Args, Returns, Raises: as for `worst_class_interval`; the fraction is in (0, 1].

    Example:
        >>> counts = torch.tensor([27, 36, 48]), torch.tensor([54, 54, 54])
        >>> worst_fraction_interval(*counts, fraction=0.5)
        tensor([0.4149, 0.7385], dtype=torch.float64)
    """
    _checks.positive(fraction=fraction)
    _checks.real(0, 1, fraction=fraction)
    limits = _simultaneous(*_counts(correct, totals, confidence, least=2), confidence)
    return metrics.worst_fraction(limits.T, fraction)


@public
def average_interval(
    correct: Tensor,
    totals: Tensor,
    *,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Tensor:
    r"""Interval for the macro average: bootstrap percentiles, stratified by class.

    A resample of the $n_k$ samples of class k is a draw of $\mathrm{Bin}(n_k, x_k / n_k)$. Simulated coverage at
    95 %, for 10 and 100 classes: 93 to 96 % for 54 samples a class or more. It falls where hardly a sample is
    classified wrong, or right, as what was not seen is not resampled: 65 % for ten classes at 0.998 with 54
    samples. If all are right, it has no width. The sum over more than 200 classes is drawn from its normal limit.

    Args, Returns, Raises: as for `worst_class_interval`, and
        draws: number of resamples, >= 1.
        seed: of the draws, >= 0; torch's global generator is not touched.

    Example:
        >>> counts = torch.tensor([27, 36, 48]), torch.tensor([54, 54, 54])
        >>> average_interval(*counts).round(decimals=2)
        tensor([0.6200, 0.7500], dtype=torch.float64)
    """
    x, n = _present(*_counts(correct, totals, confidence, least=2))
    means, _ = resampled(x / n, n, draws, seed)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    return means.quantile(torch.tensor(tails, dtype=torch.float64))


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
    limit where the classes hardly differ.

    Simulated coverage at 95 %, for 10 and 100 classes of 54 to 1000 samples: 93 to 97 % where classes differ by
    more than the noise, else up to 99.6 %; plain percentiles of the NSD cover anything from 0 to 95 %.

    Args, Returns, Raises: as for `average_interval`; `ddof` is an int >= 0, as for `metrics.nsd`. The result is
    `nan` also if no sample was classified right, or if no more than `ddof` classes are present.

    Example:
        >>> counts = torch.tensor([27, 36, 48]), torch.tensor([54, 54, 54])
        >>> nsd_interval(*counts).round(decimals=2)
        tensor([0.1200, 0.3400], dtype=torch.float64)
    """
    x, n = _present(*_counts(correct, totals, confidence, least=2))
    _checks.integer(0, ddof=ddof)
    if ddof >= len(n) or not bool(x.any()):
        return torch.full((2,), math.nan, dtype=torch.float64)
    acc = x / n
    mean, measured = acc.mean(), (acc - acc.mean()).square().sum()
    # The spread of the measured accuracies is that of the truth and of noise: take the noise out.
    pull = torch.where(measured > 0, (true_squares(acc, n) / measured).sqrt(), 0)
    means, squares = resampled((mean + pull * (acc - mean)).clamp(0, 1), n, draws, seed)
    t = (squares / (len(n) - ddof)).sqrt() / means
    # A resample without a single success has no NSD.
    t = t[~t.isnan()]
    estimate = (true_squares(acc, n) / (len(n) - ddof)).sqrt() / mean
    # With ties, up to rounding: where classes hardly differ, T is 0 in the data and most resamples.
    bias = torch.special.ndtri((t <= estimate + 1e-12).double().mean())
    spread = _normal_quantile((1 + confidence) / 2) * torch.tensor([-1.0, 1.0]).double()
    low, high = t.quantile(torch.special.ndtr(2 * bias + spread))
    # A share of ties near 1 would move even the lower limit beyond them.
    return torch.stack([low.minimum(estimate), high.maximum(estimate)])


def _simultaneous(x: Tensor, n: Tensor, confidence: float) -> Tensor:
    """Clopper-Pearson limits `(K, 2)`: quantiles of Beta(x, n - x + 1) and Beta(x + 1, n - x)."""
    from scipy.special import betaincinv

    present = max(int((n > 0).sum()), 1)
    tail = -math.expm1(math.log(confidence) / present) / 2

    def lower(x: Tensor) -> Tensor:
        limit = betaincinv(x.clamp(min=1).double().numpy(), (n - x + 1).double().numpy(), tail)
        return torch.where(x > 0, torch.from_numpy(limit), 0).where(n > 0, math.nan)

    # The upper limit for x is 1 - the lower limit for the n - x others.
    return torch.stack([lower(x), 1 - lower(n - x)], dim=1)


def _counts(
    correct: Tensor, totals: Tensor, confidence: float, *, least: int = 1
) -> tuple[Tensor, Tensor]:
    """Check what every interval takes, and return the counts on the CPU."""
    _checks.real(confidence=confidence)
    if not 0 < confidence < 1:
        raise InvalidValue(f"expected `confidence` in (0, 1), got {confidence!r}; 95 % is 0.95")
    x, n = counts_of(torch.int64, least, correct=correct, totals=totals)
    if bool((x > n).any()):
        k = int((x > n).nonzero()[0])
        raise InvalidValue(
            f"expected `correct` no larger than `totals`, got {x[k]} of {n[k]} in class {k}"
        )
    return x, n


def _present(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    return x[n > 0].double(), n[n > 0].double()


def _normal_quantile(probability: float) -> Tensor:
    z: Tensor = torch.special.ndtri(torch.tensor(probability, dtype=torch.float64))
    return z
