"""Per-sample losses on logits `(N, K)`: float32 or wider, no reduction, no hidden 1/K or T²."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from ferdlib import _oldchecks as _checks


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Cross-entropy, $-\log \mathrm{softmax}(z)_y$.

    Args:
        logits: `(N, K)`.
        targets: int64 labels `(N,)` in `0..K-1`.

    Returns:
        `(N,)`, in nats, at least 0.

    Raises:
        TypeError: logits that are not float, labels that are not int64.
        ValueError: wrong shapes, or labels out of range (checked on the CPU).

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))  # log 4
        tensor([1.3863])
    """
    z = _checks.logits("cross_entropy", logits)
    labels_of("cross_entropy", targets, z)
    return F.cross_entropy(z, targets, reduction="none")


def kl_divergence(
    p_logits: Tensor, q_logits: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    r"""Kullback-Leibler divergence, $KL(p \| q) = \sum_c p_c (\log p_c - \log q_c)$.

    With $p = \mathrm{softmax}(z_p / T)$ and $q = \mathrm{softmax}(z_q / T)$. The sum runs over
    classes, and there is no factor T²: multiply by it where a method asks for it.

    Args:
        p_logits: `(N, K)`, the reference.
        q_logits: `(N, K)`, the approximation. Gradients flow into both; detach what is a target.
        temperature: T > 0, a number or one per sample `(N,)`.

    Returns:
        `(N,)`, in nats, at least 0 up to rounding.

    Raises:
        TypeError: logits that are not float.
        ValueError: shapes that differ, or a temperature that is not positive.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
        >>> kl_divergence(p, q)  # 3/4 log(3/2) + 1/4 log(1/2)
        tensor([0.1308])
    """
    p, q = _pair("kl_divergence", temperature, p_logits=p_logits, q_logits=q_logits)
    return _kl(p, q)


def distillation(
    logits: Tensor, reference_logits: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    r"""$KL(\text{reference} \| \text{model})$ in the argument order of attacks and training losses.

    The same value as `kl_divergence(reference_logits, logits)`: the second argument is the target,
    as labels are the second argument of `cross_entropy`.

    Args:
        logits: `(N, K)`, the model that is trained or attacked.
        reference_logits: `(N, K)`, the teacher. Gradients flow into both; detach what is a target.
        temperature: T > 0, a number or one per sample `(N,)`; no factor T² is applied.

    Returns:
        `(N,)`, in nats, at least 0 up to rounding.

    Raises:
        TypeError: logits that are not float.
        ValueError: shapes that differ, or a temperature that is not positive.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
        >>> distillation(student, teacher)
        tensor([0.1308])
    """
    z, reference = _pair(
        "distillation", temperature, logits=logits, reference_logits=reference_logits
    )
    return _kl(reference, z)


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Adversarial margin, $m = z_y - \max_{j \ne y} z_j$ (FERD Eq. 1).

    Negative where the sample is misclassified. The label is masked with $-\infty$, so the largest
    other logit is right for negative logits too.

    Args:
        logits: `(N, K)`.
        targets: int64 labels `(N,)` in `0..K-1`.

    Returns:
        `(N,)`, in units of the logits.

    Raises:
        TypeError: logits that are not float, labels that are not int64.
        ValueError: wrong shapes, or labels out of range (checked on the CPU).

    Example:
        >>> import torch
        >>> margin(torch.tensor([[-3.0, -1.0, -2.0]]), torch.tensor([1]))
        tensor([1.])
    """
    return _margin("margin", logits, targets)


def cw_margin(logits: Tensor, targets: Tensor, *, confidence: float = 50.0) -> Tensor:
    r"""Carlini-Wagner objective to be *ascended*, $-\max(m + \kappa, 0)$ with `margin` m.

    An attack gains until the best other logit leads by $\kappa$. At the default 50 the clamp
    practically never bites, and the objective is the plain margin, as in the ARD evaluation codes.

    Args:
        logits: `(N, K)`.
        targets: int64 labels `(N,)` in `0..K-1`.
        confidence: $\kappa \ge 0$, in units of the logits.

    Returns:
        `(N,)`, at most 0.

    Raises:
        TypeError: logits that are not float, labels that are not int64.
        ValueError: wrong shapes, labels out of range, or a negative confidence.

    Example:
        >>> import torch
        >>> cw_margin(torch.tensor([[2.0, 5.0]]), torch.tensor([0]), confidence=1.0)  # fooled by 3
        tensor([-0.])
    """
    kappa = _checks.number("cw_margin", "confidence", confidence, low=0.0)
    return -(_margin("cw_margin", logits, targets) + kappa).clamp(min=0)


def uniformity(logits: Tensor) -> Tensor:
    r"""Distance from the uniform distribution, $KL(U \| p) = -\log K - \frac1K \sum_c \log p_c$ (FERD Eq. 7).

    Its gradient with respect to the logits is $p - U$.

    Args:
        logits: `(N, K)`.

    Returns:
        `(N,)`, in nats, 0 for equal logits, unbounded above.

    Raises:
        TypeError: logits that are not float.
        ValueError: a shape that is not `(N, K)` with K >= 2.

    Example:
        >>> import torch
        >>> uniformity(torch.tensor([[math.log(3.0), 0.0]]))  # -log 2 - (log 3/4 + log 1/4) / 2
        tensor([0.1438])
    """
    z = _checks.logits("uniformity", logits)
    return -F.log_softmax(z, dim=1).mean(dim=1) - math.log(z.shape[1])


def confidence_penalty(logits: Tensor) -> Tensor:
    r"""Confidence penalty, $KL(p \| U) = \log K - H(p)$ (the regulariser of BAT).

    Args:
        logits: `(N, K)`.

    Returns:
        `(N,)`, in nats, between 0 (uniform) and log K (certain).

    Raises:
        TypeError: logits that are not float.
        ValueError: a shape that is not `(N, K)` with K >= 2.

    Example:
        >>> import torch
        >>> confidence_penalty(torch.tensor([[math.log(3.0), 0.0]]))  # log 2 - H(3/4, 1/4)
        tensor([0.1308])
    """
    z = _checks.logits("confidence_penalty", logits)
    log_p = F.log_softmax(z, dim=1)
    return (log_p.exp() * log_p).sum(dim=1) + math.log(z.shape[1])


def decoupled_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mse_weight: float = 0.25,
    cross_entropy_weight: float = 1.0,
    pair_temperature: float = 100.0,
) -> Tensor:
    r"""Decoupled KL of FERD's released generator loss: logit-gap error plus soft cross-entropy.

    $$a \sum_{j,k} w_j w_k (\Delta^T_{jk} - \Delta^S_{jk})^2
      - b \sum_c \bar p^T_c \log p^S_c, \qquad \Delta_{jk} = z_j - z_k$$

    with $w = \mathrm{softmax}(z^T / T_w)$ and $\bar p^T$ the teacher's probabilities without
    gradient. The double sum is evaluated as $2 \sum_j w_j (d_j - \bar d)^2$, where $d = z^T - z^S$ and
    $\bar d = \sum_j w_j d_j$: K terms, not K². As a distance to *grow* it is unbounded.

    Args:
        student_logits: `(N, K)`.
        teacher_logits: `(N, K)`; gradients flow through the first term only.
        mse_weight: a >= 0.
        cross_entropy_weight: b >= 0.
        pair_temperature: $T_w > 0$; at the release's 100 the pair weights are nearly uniform.

    Returns:
        `(N,)`, at least 0.

    Raises:
        TypeError: logits that are not float.
        ValueError: shapes that differ, a negative weight or a temperature that is not positive.

    Example:
        >>> import torch
        >>> decoupled_kl(torch.zeros(1, 2), torch.zeros(1, 2))  # no gap; cross-entropy log 2
        tensor([0.6931])
    """
    name = "decoupled_kl"
    a = _checks.number(name, "mse_weight", mse_weight, low=0.0)
    b = _checks.number(name, "cross_entropy_weight", cross_entropy_weight, low=0.0)
    t_w = _checks.number(name, "pair_temperature", pair_temperature, low=0.0, open_low=True)
    student, teacher = _pair(
        name, 1.0, student_logits=student_logits, teacher_logits=teacher_logits
    )
    w = F.softmax(teacher / t_w, dim=1)
    d = teacher - student
    gap = 2 * (w * (d - (w * d).sum(dim=1, keepdim=True)).square()).sum(dim=1)
    soft = -(F.softmax(teacher.detach(), dim=1) * F.log_softmax(student, dim=1)).sum(dim=1)
    return a * gap + b * soft


def labels_of(function: str, targets: Tensor, logits: Tensor) -> None:
    """Labels of the samples that the logits are of."""
    n, k = logits.shape
    _checks.labels(function, targets, length=n, num_classes=k, device=logits.device)


def _pair(function: str, temperature: float | Tensor, **logits: Tensor) -> tuple[Tensor, Tensor]:
    """Two checked logits of equal shape, divided by the temperature."""
    (a_name, a), (b_name, b) = logits.items()
    a = _checks.logits(function, a, argument=a_name)
    b = _checks.logits(function, b, argument=b_name)
    _checks.alike(function, **{a_name: a, b_name: b})
    t = _checks.per_sample(function, "temperature", temperature, a, open_low=True)
    return a / t, b / t


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(p_logits, dim=1), F.log_softmax(q_logits, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def _margin(function: str, logits: Tensor, targets: Tensor) -> Tensor:
    z = _checks.logits(function, logits)
    labels_of(function, targets, z)
    label = targets[:, None]
    others = z.scatter(1, label, -math.inf)
    return z.gather(1, label).squeeze(1) - others.amax(dim=1)
