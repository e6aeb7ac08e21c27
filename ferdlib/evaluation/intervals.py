r"""How sure class-wise accuracies, and the figures made of them, are: confidence intervals from counts.

Every function takes how many samples of each class were classified right, and how many there were.
The samples of a class are taken as drawn independently of each other, $X_k \sim \mathrm{Bin}(n_k,
p_k)$, and the intervals are for the figures of the true accuracies $p_k$. They say nothing about
another training run or another attack. The results are float64, on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib import metrics

__all__ = [
    "average_interval",
    "nsd_interval",
    "simultaneous_interval",
    "wilson_interval",
    "worst_class_interval",
    "worst_fraction_interval",
]


def wilson_interval(correct: Tensor, totals: Tensor, *, confidence: float = 0.95) -> Tensor:
    r"""Wilson's score interval for each class on its own.

    $$\frac{2x + z^2 \mp z \sqrt{z^2 + 4x(n - x)/n}}{2(n + z^2)}, \qquad
      z = \Phi^{-1}\!\left(\tfrac{1 + \text{confidence}}{2}\right)$$

    for x right of n. The coverage oscillates with the true accuracy: at 95 % and true accuracies
    from 0.02 to 0.98, it is 92.7 to 98.0 % for n = 54, 92.6 to 97.9 % for 100, 93.9 to 96.1 % for
    1000, on average 95.2, 95.1 and 95.0 %. That is each class by itself; for all of them at once
    there is `simultaneous_interval`.

    Args:
        correct: int64 counts `(K,)`, the samples of each class that were classified right.
        totals: int64 counts `(K,)`, the samples of each class.
        confidence: in (0, 1).

    Returns:
        float64 `(K, 2)`, lower and upper limit; `nan` for a class without samples.

    Raises:
        TypeError: counts that are not int64, or a confidence that is no number.
        ValueError: shapes that are not `(K,)`, or differ; negative counts, more right than there
            are, or a confidence outside (0, 1).

    Example:
        >>> import torch
        >>> wilson_interval(torch.tensor([27, 0]), torch.tensor([54, 0]))
        tensor([[0.3711, 0.6289],
                [   nan,    nan]], dtype=torch.float64)

    Reference:
        Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    x, n = (counts.double() for counts in _counts("wilson_interval", correct, totals))
    z = _normal_quantile((1 + _confidence("wilson_interval", confidence)) / 2)
    centre, half = 2 * x + z**2, z * (z**2 + 4 * x * (n - x) / n).sqrt()
    limits = torch.stack([centre - half, centre + half], dim=1) / (2 * (n + z**2))[:, None]
    return limits.clamp(0, 1)  # they are inside, but for rounding


def simultaneous_interval(correct: Tensor, totals: Tensor, *, confidence: float = 0.95) -> Tensor:
    r"""Exact intervals that hold for all classes at once.

    Clopper and Pearson's limits $[L, U]$ for x right of n, at Šidák's level for m present classes:

    $$P_L(X \ge x) = P_U(X \le x) = \frac{1 - \text{confidence}^{1/m}}{2}$$

    with L = 0 if x = 0, and U = 1 if x = n. The classes are independent, so that the probability
    of all m intervals holding is the product of at least $\text{confidence}^{1/m}$ each.

    Args, Returns, Raises: as for `wilson_interval`.

    Example:
        >>> import torch
        >>> simultaneous_interval(torch.tensor([27, 0, 0]), torch.tensor([54, 20, 0]))
        tensor([[0.3433, 0.6567],
                [0.0000, 0.1962],
                [   nan,    nan]], dtype=torch.float64)

    References:
        Clopper and Pearson (1934), The use of confidence or fiducial limits illustrated in the case
        of the binomial. Šidák (1967), Rectangular confidence regions for the means of multivariate
        normal distributions.
    """
    return _simultaneous("simultaneous_interval", correct, totals, confidence)


def worst_class_interval(correct: Tensor, totals: Tensor, *, confidence: float = 0.95) -> Tensor:
    r"""Interval for the accuracy of the class that is truly the worst, $[\min_k L_k, \min_k U_k]$.

    The limits are those of `simultaneous_interval`: where they hold for every class, they hold for
    the minimum, whichever class has it. A bootstrap does not: the smallest of K noisy accuracies is
    below the smallest true one on average, and that of a resample is lower still. The price is
    width, about 1.5 times (10 classes) or 1.8 to 1.9 times (100) that of the Wilson interval of the
    class that came out worst. Coverage at 95 %, simulated for 54 to 1000 samples: 97 to 100 %.

    Args:
        correct: int64 counts `(K,)`, K >= 2, the samples of each class that were classified right.
        totals: int64 counts `(K,)`, the samples of each class; a class without any is left out.
        confidence: in (0, 1).

    Returns:
        float64 `(2,)`, lower and upper limit; `nan` if no class has samples.

    Raises: as for `wilson_interval`, and ValueError for K < 2.

    Example:
        >>> import torch
        >>> worst_class_interval(torch.tensor([27, 36, 48]), torch.tensor([54, 54, 54]))
        tensor([0.3339, 0.6661], dtype=torch.float64)
    """
    limits = _simultaneous("worst_class_interval", correct, totals, confidence, least=2)
    return torch.stack([metrics.worst_class(limit) for limit in limits.T])


def worst_fraction_interval(
    correct: Tensor, totals: Tensor, *, fraction: float = 0.1, confidence: float = 0.95
) -> Tensor:
    """Interval for the mean of the truly worst classes: `metrics.worst_fraction` of the limits.

    The limits are those of `simultaneous_interval`, and the mean of the worst grows with every
    accuracy: where they hold for every class, they hold for it. With 10 classes it is the interval
    of the worst class. With 100 the errors average out and the limits do not: at 95 %, it covered
    in every one of 20 000 simulated cases.

    Args, Returns, Raises: as for `worst_class_interval`; the fraction is in (0, 1].

    Example:
        >>> import torch
        >>> counts = torch.tensor([27, 36, 48]), torch.tensor([54, 54, 54])
        >>> worst_fraction_interval(*counts, fraction=0.5)
        tensor([0.4149, 0.7385], dtype=torch.float64)
    """
    name = "worst_fraction_interval"
    _checks.number(name, "fraction", fraction, low=0, high=1, open_low=True)
    limits = _simultaneous(name, correct, totals, confidence, least=2)
    return torch.stack([metrics.worst_fraction(limit, fraction) for limit in limits.T])


def average_interval(
    correct: Tensor,
    totals: Tensor,
    *,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Tensor:
    r"""Interval for the macro average: bootstrap percentiles, stratified by class.

    To resample the $n_k$ samples of class k is to draw $\mathrm{Bin}(n_k, x_k / n_k)$. Simulated
    coverage at 95 %, for 10 and 100 classes: 93 to 96 % for 54 samples a class or more. It falls
    where hardly a sample is classified wrong, or right, as what was not seen is not resampled: 65 %
    for ten classes at 0.998 with 54 samples, and 86 % with 100. If all are right, it has no width.

    Args:
        correct: int64 counts `(K,)`, K >= 2, the samples of each class that were classified right.
        totals: int64 counts `(K,)`, the samples of each class; a class without any is left out.
        confidence: in (0, 1).
        draws: how many resamples, >= 1.
        seed: of the draws, >= 0; torch's global generator is not touched.

    Returns:
        float64 `(2,)`, lower and upper limit; `nan` if no class has samples.

    Raises: as for `worst_class_interval`; TypeError and ValueError also for draws and seed.

    Example:
        >>> import torch
        >>> counts = torch.tensor([27, 36, 48]), torch.tensor([54, 54, 54])
        >>> average_interval(*counts).round(decimals=2)
        tensor([0.6200, 0.7500], dtype=torch.float64)
    """
    name = "average_interval"
    x, n = _present(*_counts(name, correct, totals, least=2))
    level = _confidence(name, confidence)
    means = _resample(name, x / n, n, draws, seed).mean(dim=1)
    return means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))


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

    The measured NSD is too large: the variance of the measured accuracies $a_k$ holds, besides that
    of the true ones, the mean sampling variance. The estimate without it is

    $$T = \frac{\sqrt{\max(0, V)}}{\bar a}, \qquad
      V = \frac{1}{K - \text{ddof}} \left[ \sum_k (a_k - \bar a)^2
          - \frac{K - 1}{K} \sum_k \frac{a_k (1 - a_k)}{n_k - 1} \right]$$

    The resamples are drawn from accuracies pulled towards their mean until their NSD is T, and the
    limits are bias-corrected percentiles (Efron 1981) of the resamples' T. So the measured NSD may
    lie above the upper limit where the classes hardly differ.

    Simulated coverage at 95 %, for 10 and 100 classes of 54 to 1000 samples: 93 to 97 % where the
    differences of the classes stand out from the noise, and up to 99.6 % where they do not. There
    the lower limit is 0, and the upper one says more of the noise than of the classes. Percentiles
    of the plain NSD, as they are or mirrored, cover anything from 0 to 95 %.

    Args, Returns, Raises: as for `average_interval`; `ddof` is an int >= 0, as for `metrics.nsd`.
    The result is `nan` also if no sample was classified right, or if no more than `ddof` classes
    are present.

    Example:
        >>> import torch
        >>> counts = torch.tensor([27, 36, 48]), torch.tensor([54, 54, 54])
        >>> nsd_interval(*counts).round(decimals=2)
        tensor([0.1200, 0.3400], dtype=torch.float64)
    """
    name = "nsd_interval"
    x, n = _present(*_counts(name, correct, totals, least=2))
    tail = (1 - _confidence(name, confidence)) / 2
    classes = len(n)
    if _checks.integer(name, "ddof", ddof, low=0) >= classes or not bool(x.any()):
        return torch.full((2,), math.nan, dtype=torch.float64)

    def variance_of_truth(a: Tensor) -> Tensor:
        # One sample says nothing of its noise: a (1 - a) is 0, and stays so.
        noise = (a * (1 - a) / (n - 1).clamp(min=1)).sum(dim=-1) * (classes - 1) / classes
        squares = (a - a.mean(dim=-1, keepdim=True)).square().sum(dim=-1)
        return (squares - noise).clamp(min=0) / (classes - ddof)

    acc = x / n
    mean, measured = acc.mean(), (acc - acc.mean()).square().sum() / (classes - ddof)
    pull = torch.where(measured > 0, (variance_of_truth(acc) / measured).sqrt(), 0)
    resampled = _resample(name, (mean + pull * (acc - mean)).clamp(0, 1), n, draws, seed)
    t = variance_of_truth(resampled).sqrt() / resampled.mean(dim=1)
    t = t[~t.isnan()]  # a resample without a single success has no NSD
    estimate = variance_of_truth(acc).sqrt() / mean
    # With ties, up to rounding: where classes hardly differ, T is 0 in the data and most resamples.
    bias = torch.special.ndtri((t <= estimate + 1e-12).double().mean())
    spread = _normal_quantile(1 - tail) * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    low, high = t.quantile(torch.special.ndtr(2 * bias + spread))
    # A share of ties near 1 would move even the lower limit beyond them.
    return torch.stack([low.minimum(estimate), high.maximum(estimate)])


def upper_tail(successes: Tensor, trials: Tensor) -> Callable[[Tensor], Tensor]:
    r"""The function p -> $P(X \ge x)$, $X \sim \mathrm{Bin}(n, p)$, of each row, for 0 < p <= x / n.

    A sum of the terms from x on. It stops after $5 \sqrt n$ of them: for p <= x / n, the rest is
    less than $2 e^{-50}$ of the whole (Hoeffding, and that the tail is log-concave).
    """
    x, n = successes.double()[:, None], trials.double()[:, None]
    j = x + torch.arange(math.ceil(5 * math.sqrt(int(trials.max()))) + 1)
    # Beyond j = n, the last term is infinite, as the factorials of negative integers are.
    log_choose = torch.lgamma(n + 1) - torch.lgamma(j + 1) - torch.lgamma(n - j + 1)

    def tail(p: Tensor) -> Tensor:
        p = p[:, None]
        return (log_choose + j * p.log() + (n - j) * torch.log1p(-p)).exp().sum(dim=1)

    return tail


def class_counts(function: str, *, least: int = 1, **named: Tensor) -> list[Tensor]:
    """Non-negative int64 counts of equal shape `(K,)` with K >= `least`, on the CPU."""
    checked = []
    for argument, value in named.items():
        if _checks.tensor(function, argument, value).dtype != torch.int64:
            raise TypeError(
                f"{function}: expected `{argument}` as int64 counts, got {_checks.got(value)}"
            )
        if value.ndim != 1 or len(value) < least:
            raise ValueError(
                f"{function}: expected `{argument}` of shape (K,) with K >= {least}, got "
                f"{tuple(value.shape)}"
            )
        if bool((value < 0).any()):
            raise ValueError(
                f"{function}: expected non-negative counts in `{argument}`, got {value.min()}"
            )
        checked.append(value.cpu())
    _checks.same_shape(function, **named)
    return checked


def _counts(
    function: str, correct: Tensor, totals: Tensor, *, least: int = 1
) -> tuple[Tensor, Tensor]:
    x, n = class_counts(function, least=least, correct=correct, totals=totals)
    if bool((x > n).any()):
        k = int((x > n).nonzero()[0])
        raise ValueError(
            f"{function}: expected `correct` no larger than `totals`, got {x[k]} of {n[k]} in class {k}"
        )
    return x, n


def _present(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    return x[n > 0].double(), n[n > 0].double()


def _confidence(function: str, value: float) -> float:
    level = _checks.number(function, "confidence", value)
    if not 0 < level < 1:
        raise ValueError(
            f"{function}: expected `confidence` in (0, 1), got {value!r}; 95 % is 0.95"
        )
    return level


def _normal_quantile(probability: float) -> Tensor:
    z: Tensor = torch.special.ndtri(torch.tensor(probability, dtype=torch.float64))
    return z


def _simultaneous(
    function: str, correct: Tensor, totals: Tensor, confidence: float, *, least: int = 1
) -> Tensor:
    x, n = _counts(function, correct, totals, least=least)
    present = max(int((n > 0).sum()), 1)
    outside = -math.expm1(math.log(_confidence(function, confidence)) / present) / 2
    # The upper limit for x is 1 - the lower limit for the n - x others.
    x, n = torch.cat([x, n - x]), torch.cat([n, n])
    tail, low, high = upper_tail(x, n), torch.zeros(len(n), dtype=torch.float64), x / n.double()
    # Bisections of [0, x / n], at whose end the tail is at least a half. For x = 0 it has no width.
    for _ in range(60):
        middle = (low + high) / 2
        above = tail(middle) > outside
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    lower, rest = high.chunk(2)
    return torch.stack([lower, 1 - rest], dim=1)


def _resample(function: str, acc: Tensor, n: Tensor, draws: int, seed: int) -> Tensor:
    """Accuracies `(draws, K)` of resampled classes."""
    draws = _checks.integer(function, "draws", draws, low=1)
    rng = torch.Generator().manual_seed(_checks.integer(function, "seed", seed, low=0))
    return torch.binomial(n.expand(draws, -1), acc.expand(draws, -1), generator=rng) / n
