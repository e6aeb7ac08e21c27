"""The rules of robust-fairness methods: GAIRAT, CFA, FAAL and DAFA. They raise as the package says."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidType, InvalidValue, public
from ferdlib.reweight._common import ROUNDING, filled, mean_one, ramp


@public
def gairat(steps_withstood: Tensor, steps: int, *, shift: float = -1.0) -> Tensor:
    r"""GAIRAT's sample weights $\omega_i \propto (1 + \tanh(\lambda + 5 (1 - 2 \kappa_i / K))) / 2$.

    `lps_tanh` for the samples of a batch: `(N,)` of mean 1, float32 for int64 counts. The release takes
    `int(K / 2)` for K/2, which for an odd K is another number (Zhang et al., Geometry-aware
    instance-reweighted adversarial training, 2021).

    Args:
        steps_withstood: the count of `attacks.least_pgd_steps` for each sample (the release's with
            `count="correct"`), `(N,)`, N >= 1, int64 or float, in [0, steps].
        steps: K >= 1, those of the attack that was counted.
        shift: $\lambda$, any finite number.

    Example:
        >>> gairat(torch.tensor([4, 5]), steps=10)  # (1/2, 0.1192) over their mean
        tensor([1.6150, 0.3850])
    """
    k = steps_withstood
    _checks.tensor(steps_withstood=k)
    _checks.integer(1, steps=steps)
    _checks.real(shift=shift)
    if k.dtype != torch.int64 and not k.is_floating_point():
        raise InvalidType(f"expected `steps_withstood` in int64 or float, got {_checks.got(k)}")
    if k.ndim != 1 or not len(k):
        shape = tuple(k.shape)
        raise InvalidValue(f"expected `steps_withstood` of shape (N,) with N >= 1, got {shape}")
    counts = _checks.double(k)
    # A NaN is inside no interval.
    fine = (counts >= 0) & (counts <= steps * ROUNDING)
    if _checks.readable(k) and not bool(fine.all()):
        raise InvalidValue(f"expected `steps_withstood` in [0, {steps}], got {k.tolist()}")
    counts = _checks.marked(counts, fine)
    # (1 + tanh u) / 2 = sigmoid(2u)
    w = mean_one(F.logsigmoid(2 * ramp(counts, steps, shift)))
    return w.to(k.dtype if k.is_floating_point() else torch.float32)


@public
def cfa_margins(robust_accuracy: Tensor, *, base: float = 0.5) -> Tensor:
    r"""CFA's factors of the attack's radius, $\epsilon_c = (\lambda_1 + r_c) \epsilon$.

    A class that is robust gets the larger radius. Used as `eps=(factors * 8 / 255)[y]`; factors are
    not scaled to any mean (Wei et al., CFA: Class-wise calibrated fair adversarial training, 2023).

    Args:
        robust_accuracy: r, `(K,)` in [0, 1], of the last epoch's training examples, each class
            under its own radius; an absent class gets the factor 1, as all have while CFA waits
            (10 epochs in the release).
        base: $\lambda_1 \ge 0$; 0.5 is the release's.

    Example:
        >>> cfa_margins(torch.tensor([0.2, 0.8, torch.nan]))
        tensor([0.7000, 1.3000, 1.0000])
    """
    return _cfa_factors(robust_accuracy, base).to(robust_accuracy.dtype)


@public
def cfa_mixing(robust_accuracy: Tensor, *, beta: float, base: float = 0.5) -> Tensor:
    r"""CFA's share of the robust loss, $\beta'_c = v_c / (1 + v_c)$, $v_c = (\lambda_2 + r_c) \beta$.

    Used as $(1 - \beta'_y)\,\mathrm{CE} + \beta'_y\,\mathrm{KL}$, TRADES over 1 + beta with a beta
    of each class's own.

    Args:
        robust_accuracy: as for `cfa_margins`; an absent class gets TRADES' own beta / (1 + beta).
        beta: TRADES' weight of the KL divergence, >= 0.
        base: $\lambda_2 \ge 0$; 0.5 is the release's.

    Example:
        >>> cfa_mixing(torch.tensor([0.0, 0.5, torch.nan]), beta=6.0)  # 3/4, 6/7, 6/7
        tensor([0.7500, 0.8571, 0.8571])
    """
    _checks.real(0, beta=beta)
    v = beta * _cfa_factors(robust_accuracy, base)
    return (v / (1 + v)).to(robust_accuracy.dtype)


@public
def kl_ball(scores: Tensor, *, radius: float = 0.5) -> Tensor:
    r"""FAAL's class probabilities, the worst case in a ball around the uniform distribution U.

    $$\arg\max_p \sum_c p_c a_c \quad \text{subject to} \quad \mathrm{KL}(U \| p) \le \rho$$

    The solution is $p_c \propto 1 / (\mu - a_c)$, with the $\mu > \max_c a_c$ that puts p on the
    sphere, found by bisection. Shifting or scaling all scores changes nothing: the radius alone
    says how far p goes. At 0.5 and K = 10 no class gets more than 0.575. Uniform if the radius is
    0, all scores are equal, or all classes absent. No gradient flows to the scores (Zhang et al., Towards
    fairness-aware adversarial learning, 2024).

    An absent class counts as one of mean score, as in `margin_softmax`. FAAL's release counts it too,
    with 0: it sets the score to -1, the least that a probability margin can be, but its objective sums
    over samples, of which the class has none. 0 is above the score of every robust class. Its -1 is
    `kl_ball(scores.nan_to_num(nan=-1.0))`, which leaves more for the others.

    Args:
        scores: a, `(K,)`, the larger the worse. FAAL's are class means of $\max_{j \ne y} p_j - p_y$
            over the adversarial examples of a batch, and its loss $\frac{K}{N} \sum_i p_{y_i} l_i$.
        radius: $\rho \ge 0$.

    Example:
        >>> kl_ball(torch.tensor([1.0, 0.0]), radius=math.log(5 / 4))  # KL = -log(2 sqrt(.8 * .2))
        tensor([0.8000, 0.2000])
    """
    _checks.class_vector(scores=scores)
    _checks.real(0, radius=radius)
    return worst_case(scores, radius)


def worst_case(scores: Tensor, radius: float) -> Tensor:
    """`kl_ball` without a look at the scores, on their device."""
    a = filled(_checks.double(scores.detach()))
    k, gap = len(a), a.max() - a
    if radius == 0:
        return torch.full_like(scores, 1 / k)
    log_gap = (gap / gap.max()).log()

    # Notation: p_c ~ 1 / (1 + t g_c), g the gaps over the largest one, t = 1 / (mu - max a) in that
    # unit, and x_c = log t + log g_c: no t is too large for it, whatever the radius.
    # KL = mean log(1 + t g) + log mean 1 / (1 + t g) lies between (log t) / K - log K and t.
    width = k * (radius + math.log(k)) - math.log(radius)
    low = torch.full_like(gap[0], math.log(radius))
    # Sixteen parts at a time, chosen on the device: 16 rounds are 64 bisections in a quarter of the calls.
    parts = torch.arange(1, 16, device=a.device, dtype=a.dtype) / 16
    for _ in range(16):
        x = (low + width * parts)[:, None] + log_gap
        divergence = torch.log1p(-torch.sigmoid(x).mean(dim=1)) - F.logsigmoid(-x).mean(dim=1)
        low, width = low + (divergence < radius).sum() / 16 * width, width / 16
    p = torch.sigmoid(-(low + log_gap))
    return torch.where(gap.any(), p / p.sum(), 1 / k).to(scores)


@public
def confusion_weights(confusion_probabilities: Tensor, *, strength: float = 1.0) -> Tensor:
    r"""DAFA's class weights: of two classes, the safer one gives to the other what they share.

    $$W_i = 1 + \lambda \sum_{j \ne i} \begin{cases} P_{ij} P_{jj} & P_{ii} < P_{jj} \\
      -P_{ji} P_{ii} & P_{ii} > P_{jj} \end{cases}$$

    One class gives exactly what another one gets, so the mean is 1. Equal classes exchange nothing;
    the release takes from both. DAFA weighs the clean cross-entropy with it and scales the attack's
    radius and step, once, after a warm-up (Lee et al., DAFA: Distance-aware fair adversarial training,
    2024).

    Args:
        confusion_probabilities: P, `(K, K)`: row i is the mean softmax over the adversarial
            examples of class i, and sums to 1. A row of `nan` is an absent class: it gets the
            weight 1 and exchanges nothing.
        strength: $\lambda \ge 0$; 1, and 1.5 for CIFAR-100 and STL-10.

    Raises: as the package says, and ValueError for a strength that gives a class a weight of 0 or less: it
        would unlearn its examples, and cutting the weight off would hide that, and move the mean.

    Example:
        >>> confusion_weights(torch.tensor([[0.5, 0.5], [0.2, 0.8]]))  # 0.5 * 0.8 goes to class 0
        tensor([1.4000, 0.6000])
    """
    p = _distributions(confusion_probabilities)
    _checks.real(0, strength=strength)
    safety = p.diagonal()
    # Row i, column j: the gift of class j to class i. A comparison with nan is false.
    given = torch.where(safety[:, None] < safety, p * safety, 0.0)
    change = given.sum(dim=1) - given.sum(dim=0)
    w = 1 + strength * change
    if bool((w <= 0).any()):
        c = int(w.argmin())
        limit = -1 / float(change[c])
        came = (
            f"{_checks.shown(strength, limit)}, which gives class {c} the weight {float(w[c]):.4g}"
        )
        most = f"{_checks.shown(limit, strength)} for these probabilities"
        raise InvalidValue(f"expected `strength` below {most}, got {came}; lower it")
    return w.to(confusion_probabilities.dtype)


def _cfa_factors(robust_accuracy: Tensor, base: float) -> Tensor:
    _checks.class_vector(0, 1, robust_accuracy=robust_accuracy)
    _checks.real(0, base=base)
    r = _checks.double(robust_accuracy)
    return torch.where(r.isnan(), 1.0, base + r)


def _distributions(confusion_probabilities: Tensor) -> Tensor:
    """Return rows that are distributions, or `nan` altogether, in float64."""
    _checks.floating(confusion_probabilities=confusion_probabilities)
    p, name = _checks.double(confusion_probabilities), "confusion_probabilities"
    if p.ndim != 2 or p.shape[0] != p.shape[1] or len(p) < 2:
        raise InvalidValue(f"expected `{name}` of shape (K, K) with K >= 2, got {tuple(p.shape)}")
    # Rows in half precision sum to 1 within 1e-3.
    fine = (p >= 0).all(dim=1) & ((p.sum(dim=1) - 1).abs() <= 2e-3) | p.isnan().all(dim=1)
    if not bool(fine.all()):
        row = int((~fine).nonzero()[0])
        came = f"{p[row].tolist()} in row {row}; divide sums by the class's count"
        raise InvalidValue(f"expected rows of `{name}` >= 0 that sum to 1 (or nan), got {came}")
    return p
