"""Cross-entropy, divergences and margins; shapes and errors as the package says."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import public
from ferdlib.losses import _kernels


@public
def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Cross-entropy, $-\log \mathrm{softmax}(z)_y$.

    In nats, at least 0.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))  # log 4
        tensor([1.3863])
    """
    return _kernels.cross_entropy(_labelled(logits, targets), targets)


@public
def kl_divergence(
    p_logits: Tensor, q_logits: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    r"""Kullback-Leibler divergence, $KL(p \| q) = \sum_c p_c (\log p_c - \log q_c)$.

    With $p = \mathrm{softmax}(z_p / T)$ and $q = \mathrm{softmax}(z_q / T)$. In nats, at least 0 up to
    rounding. There is no factor T²: multiply by it where a method asks for it.

    Args:
        p_logits: the reference.
        q_logits: the approximation. Gradients flow into both; detach a constant one.
        temperature: T > 0, a number or one per sample `(N,)`.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
        >>> kl_divergence(p, q)  # 3/4 log(3/2) + 1/4 log(1/2)
        tensor([0.1308])
    """
    p, q = _checks.logits(p_logits=p_logits, q_logits=q_logits)
    t = _checks.per_sample("temperature", temperature, p, above_zero=True)
    return _kernels.kl(p / t, q / t)


@public
def margin(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Adversarial margin, $m = z_y - \max_{j \ne y} z_j$ (FERD Eq. 1).

    In units of the logits; negative where the sample is misclassified. The label is masked with $-\infty$,
    so the largest other logit is right for negative logits too.

    Example:
        >>> import torch
        >>> margin(torch.tensor([[-3.0, -1.0, -2.0]]), torch.tensor([1]))
        tensor([1.])
    """
    return _kernels.margin(_labelled(logits, targets), targets)


@public
def cw_margin(logits: Tensor, targets: Tensor, *, confidence: float = 50.0) -> Tensor:
    r"""Carlini-Wagner objective to be *ascended*, $-\max(m + \kappa, 0)$ with `margin` m.

    At most 0: an attack gains until the best other logit leads by $\kappa$. At the default 50 the clamp
    practically never bites, and the objective is the plain margin, as in the ARD evaluation codes.

    Args:
        confidence: $\kappa \ge 0$, in units of the logits.

    Example:
        >>> import torch
        >>> cw_margin(torch.tensor([[2.0, 5.0]]), torch.tensor([0]), confidence=1.0)  # fooled by 3
        tensor([-0.])
    """
    _checks.real(0, confidence=confidence)
    # Where the clamp bites the gradient is 0, and an attack stops.
    return -(_kernels.margin(_labelled(logits, targets), targets) + confidence).clamp(min=0)


@public
def uniformity(logits: Tensor) -> Tensor:
    r"""Distance from the uniform distribution, $KL(U \| p) = -\log K - \frac1K \sum_c \log p_c$ (FERD Eq. 7).

    In nats, 0 for equal logits, unbounded above. Its gradient with respect to the logits is $p - U$.

    Example:
        >>> import torch
        >>> uniformity(torch.tensor([[3.0, 1.0]]).log())  # -log 2 - (log 3/4 + log 1/4) / 2
        tensor([0.1438])
    """
    (z,) = _checks.logits(logits=logits)
    return _kernels.uniformity(z)


@public
def confidence_penalty(logits: Tensor) -> Tensor:
    r"""Confidence penalty, $KL(p \| U) = \log K - H(p)$ (the regulariser of BAT).

    In nats, between 0 (uniform) and log K (certain).

    Example:
        >>> import torch
        >>> confidence_penalty(torch.tensor([[3.0, 1.0]]).log())  # log 2 - H(3/4, 1/4)
        tensor([0.1308])
    """
    (z,) = _checks.logits(logits=logits)
    return _kernels.confidence_penalty(z)


@public
def decoupled_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mse_weight: float = 0.25,
    cross_entropy_weight: float = 1.0,
    pair_temperature: float = 100.0,
) -> Tensor:
    r"""Decoupled KL of FERD's release: weighted squared gaps of all pairs of classes, plus soft cross-entropy.

    $$a \sum_{j,k} w_j w_k (\Delta^T_{jk} - \Delta^S_{jk})^2
      - b \sum_c \bar p^T_c \log p^S_c, \qquad \Delta_{jk} = z_j - z_k$$

    with $w = \mathrm{softmax}(z^T / T_w)$ and $\bar p^T$ the teacher's probabilities without
    gradient. At least 0; as a distance to *grow* it is unbounded.

    Args:
        teacher_logits: gradients flow through the first term only.
        mse_weight, cross_entropy_weight: a, b >= 0.
        pair_temperature: $T_w > 0$; at the release's 100 the pair weights are nearly uniform.

    Example:
        >>> import torch
        >>> decoupled_kl(torch.zeros(1, 2), torch.zeros(1, 2))  # no gap; cross-entropy log 2
        tensor([0.6931])
    """
    student, teacher = _checks.logits(student_logits=student_logits, teacher_logits=teacher_logits)
    _checks.real(0, mse_weight=mse_weight, cross_entropy_weight=cross_entropy_weight)
    _checks.divisor(pair_temperature=pair_temperature)
    w = F.softmax(teacher / pair_temperature, dim=1)
    # A class that the teacher masks with -inf weighs nothing; one that the student masks has an infinite entropy.
    d = (teacher - student).masked_fill((w == 0) | student.isneginf(), 0.0)
    # The double sum is twice the variance of d around its weighted mean: K terms and not K².
    gap = 2 * (w * (d - (w * d).sum(dim=1, keepdim=True)).square()).sum(dim=1)
    p = F.softmax(teacher.detach(), dim=1)
    soft = -_kernels.expected(p, F.log_softmax(student, dim=1))
    return mse_weight * gap + cross_entropy_weight * soft


def _labelled(logits: Tensor, targets: Tensor) -> Tensor:
    """Return logits in float32 or wider that have these labels."""
    (z,) = _checks.logits(logits=logits)
    _checks.labels(targets=targets, like=z, num_classes=z.shape[1])
    return z
