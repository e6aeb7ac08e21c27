r"""Adversarial robustness distillation and its relatives: one objective of a paper, one function.

S is the student, T the teacher, x the images, $\tilde x$ their adversarial examples, y the labels,
$KL(a \| b)$ the divergence of $\mathrm{softmax}(a)$ and $\mathrm{softmax}(b)$, and $KL_\tau$ that of
$a / \tau$ and $b / \tau$. All logits are float `(N, K)` of one shape, targets int64 `(N,)`.
Gradients flow into whatever is the student's, references included; teachers are constants.
A loss returns `(N,)`, in nats; take the mean.

`kl_weight` >= 0 multiplies every divergence and nothing else. A divergence is summed over classes
here; the releases of ARD, RSLAD, MTARD, ABSLD and AdaAD (on CIFAR-10) take `KLDivLoss()`'s default
mean, over samples *and* classes, which is `kl_weight=1 / K`. Those of IAD and TRADES sum: 1.

Everything raises TypeError for logits or losses that are not float, labels that are not int64 and
numbers that are none, ValueError for shapes that differ and for labels or numbers out of range.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib.losses.balance import _scalar
from ferdlib.losses.basic import (
    confidence_penalty,
    cross_entropy,
    distillation,
    kl_divergence,
    labels_of,
)


def trades(
    student_clean: Tensor,
    student_adv: Tensor,
    targets: Tensor,
    *,
    beta: float = 6.0,
    kl_weight: float = 1.0,
) -> Tensor:
    r"""TRADES, $CE(S(x), y) + \beta \, KL(S(x) \| S(\tilde x))$.

    The gradient flows through both arguments of the divergence, as in the release. Shapes and
    errors as the module says.

    Args:
        beta: >= 0; `kl_weight` is one more factor beside it.

    Example:
        >>> import math, torch
        >>> clean, adv = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
        >>> trades(clean, adv, torch.tensor([0]))  # log 2 + 6 * 0.1438
        tensor([1.5562])
    """
    clean, adv = _checked("trades", student_clean=student_clean, student_adv=student_adv)
    b = _checks.number("trades", "beta", beta, low=0.0)
    w = _checks.number("trades", "kl_weight", kl_weight, low=0.0)
    return _cross_entropy("trades", clean, targets) + b * w * kl_divergence(clean, adv)


def ard(
    student_clean: Tensor | None,
    student_adv: Tensor,
    teacher_clean: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 30.0,
    alpha: float = 1.0,
    kl_weight: float = 1.0,
) -> Tensor:
    r"""ARD, $\alpha \tau^2 KL_\tau(T(x) \| S(\tilde x)) + (1 - \alpha) CE(S(x), y)$ (Fair-ARD Eq. 2).

    At the release's $\tau = 30$, $\alpha = 1$ it matches logits: for logits of a few units the batch
    mean of $\tau^2 KL_\tau$ is within 1 % of that of $\sum_c (d_c - \bar d)^2 / 2K$, $d = T(x) - S(\tilde x)$.
    Shapes, `kl_weight` and errors as the module says; the release has `kl_weight=1 / K`.

    Args:
        student_clean: None will do at alpha = 1, where the clean images are not needed.
        temperature: $\tau > 0$, a number or one per sample `(N,)`.
        alpha: in [0, 1].

    Example:
        >>> import math, torch
        >>> flat, teacher = torch.zeros(1, 2), torch.tensor([[2 * math.log(3.0), 0.0]])
        >>> ard(flat, flat, teacher, torch.tensor([0]), temperature=2.0, alpha=0.5)  # (4 * .1308 + log 2) / 2
        tensor([0.6082])
    """
    if student_clean is None and alpha == 1:
        student_clean = student_adv  # a stand-in, weighed by 0
    clean, adv, teacher = _checked(
        "ard", student_clean=student_clean, student_adv=student_adv, teacher_clean=teacher_clean
    )
    a = _checks.number("ard", "alpha", alpha, low=0.0, high=1.0)
    w = _checks.number("ard", "kl_weight", kl_weight, low=0.0)
    kl = _rescaled_distillation("ard", adv, teacher, temperature)
    return a * w * kl + (1 - a) * _cross_entropy("ard", clean, targets)


def rslad(
    student_clean: Tensor,
    student_adv: Tensor,
    teacher_clean: Tensor,
    *,
    adv_weight: float = 5 / 6,
    kl_weight: float = 1.0,
) -> Tensor:
    r"""RSLAD, $w \, KL(T(x) \| S(\tilde x)) + (1 - w) KL(T(x) \| S(x))$.

    FERD's Eq. 11 turns the two weights around. The release has `kl_weight=1 / K`, ten times that on
    CIFAR-100, and 1e-5 added to the teacher's probabilities inside the logarithm, which nothing
    here needs. Shapes, `kl_weight` and errors as the module says.

    Args:
        adv_weight: w in [0, 1].

    Example:
        >>> import math, torch
        >>> teacher = torch.tensor([[math.log(3.0), 0.0]])
        >>> rslad(teacher, torch.zeros(1, 2), teacher)  # 5/6 * 0.1308
        tensor([0.1090])
    """
    clean, adv, teacher = _checked(
        "rslad", student_clean=student_clean, student_adv=student_adv, teacher_clean=teacher_clean
    )
    a = _checks.number("rslad", "adv_weight", adv_weight, low=0.0, high=1.0)
    w = _checks.number("rslad", "kl_weight", kl_weight, low=0.0)
    return w * (a * distillation(adv, teacher) + (1 - a) * distillation(clean, teacher))


def iad(
    student_clean: Tensor,
    student_adv: Tensor,
    teacher_clean: Tensor,
    teacher_adv: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    alpha: float = 1.0,
    exponent: float = 0.1,
    introspection: bool = True,
    detach_student: bool = False,
    kl_weight: float = 1.0,
) -> Tensor:
    r"""IAD-I as released: the less the teacher can be trusted, the more the student trusts itself.

    $$\alpha \tau^2 KL_\tau(T(x) \| S(\tilde x)) + \alpha (1 - A) KL(S(x) \| S(\tilde x))
      + (1 - \alpha) CE(S(x), y), \qquad A = p_T(y | \tilde x)^b$$

    The temperature is in the first divergence only: the second one, and A, are at 1. The teacher's
    term is not multiplied by A, and the student's own reference S(x) is trained too. Shapes,
    `kl_weight` and errors as the module says.

    Args:
        temperature: $\tau > 0$, a number or one per sample `(N,)`.
        alpha: in [0, 1].
        exponent: b >= 0.
        introspection: False leaves the middle term out, as the release does in its first 60 epochs.
        detach_student: True makes S(x) a constant in the middle term.

    Example:
        >>> import math, torch
        >>> flat, z = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
        >>> iad(z, flat, z, flat, torch.tensor([0]), exponent=1.0)  # 0.1308 + (1 - 1/2) * 0.1308
        tensor([0.1962])
    """
    clean, adv, teacher, teacher_on_adv = _checked(
        "iad",
        student_clean=student_clean,
        student_adv=student_adv,
        teacher_clean=teacher_clean,
        teacher_adv=teacher_adv,
    )
    a = _checks.number("iad", "alpha", alpha, low=0.0, high=1.0)
    b = _checks.number("iad", "exponent", exponent, low=0.0)
    w = _checks.number("iad", "kl_weight", kl_weight, low=0.0)
    kl = _rescaled_distillation("iad", adv, teacher, temperature)
    loss = a * w * kl + (1 - a) * _cross_entropy("iad", clean, targets)
    if not introspection:
        return loss
    log_trust = b * F.log_softmax(teacher_on_adv, dim=1).gather(1, targets[:, None]).squeeze(1)
    own = clean.detach() if detach_student else clean
    return loss - a * w * torch.expm1(log_trust) * kl_divergence(own, adv)


def adaad(
    student_clean: Tensor | None,
    student_adv: Tensor,
    teacher_clean: Tensor | None,
    teacher_adv: Tensor,
    *,
    alpha: float = 1.0,
    temperature: float | Tensor = 1.0,
    kl_weight: float = 1.0,
) -> Tensor:
    r"""AdaAD, $\alpha KL_\tau(T(\tilde x) \| S(\tilde x)) + (1 - \alpha) KL_\tau(T(x) \| S(x))$.

    There is no factor $\tau^2$; the release has $\tau = 1$, and `kl_weight=1 / K` on CIFAR-10, 1 on
    CIFAR-100. Shapes, `kl_weight` and errors as the module says.

    Args:
        student_clean, teacher_clean: None will do at alpha = 1, where the clean images are not needed.
        alpha: in [0, 1].
        temperature: $\tau > 0$, a number or one per sample `(N,)`.

    Example:
        >>> import math, torch
        >>> flat, z = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
        >>> adaad(z, flat, flat, z, alpha=0.75)  # 3/4 * 0.1308 + 1/4 * 0.1438
        tensor([0.1341])
    """
    if student_clean is None and teacher_clean is None and alpha == 1:
        student_clean, teacher_clean = student_adv, teacher_adv  # stand-ins, weighed by 0
    clean, adv, teacher, teacher_on_adv = _checked(
        "adaad",
        student_clean=student_clean,
        student_adv=student_adv,
        teacher_clean=teacher_clean,
        teacher_adv=teacher_adv,
    )
    a = _checks.number("adaad", "alpha", alpha, low=0.0, high=1.0)
    w = _checks.number("adaad", "kl_weight", kl_weight, low=0.0)
    t = _checks.per_sample("adaad", "temperature", temperature, adv, open_low=True)
    adversarial = distillation(adv / t, teacher_on_adv / t)
    return w * (a * adversarial + (1 - a) * distillation(clean / t, teacher / t))


def absld(
    student_clean: Tensor,
    student_adv: Tensor,
    teacher_clean: Tensor,
    *,
    adv_temperature: float | Tensor,
    clean_temperature: float | Tensor,
    adv_weight: float = 5 / 6,
    kl_weight: float = 1.0,
) -> Tensor:
    r"""ABSLD, $w \, KL(T(x) / \tau_{adv} \| S(\tilde x)) + (1 - w) KL(T(x) / \tau_{nat} \| S(x))$.

    Only the teacher is tempered, and there is no factor $\tau^2$. The release divides one storage in
    place by both temperatures, so that each of its terms has $\tau_{adv} \tau_{nat}$; here each has
    its own, and the logits stay as they are. It has `kl_weight=1 / K`. Shapes, `kl_weight` and
    errors as the module says.

    Args:
        adv_temperature, clean_temperature: > 0, a number or one per sample `(N,)`: the class
            temperatures of `class_temperatures`, taken as `tau[targets]`.
        adv_weight: w in [0, 1].

    Example:
        >>> import math, torch
        >>> teacher = torch.tensor([[2 * math.log(3.0), 0.0]])
        >>> absld(teacher, torch.zeros(1, 2), teacher, adv_temperature=2.0, clean_temperature=1.0)
        tensor([0.1090])
    """
    clean, adv, teacher = _checked(
        "absld", student_clean=student_clean, student_adv=student_adv, teacher_clean=teacher_clean
    )
    a = _checks.number("absld", "adv_weight", adv_weight, low=0.0, high=1.0)
    w = _checks.number("absld", "kl_weight", kl_weight, low=0.0)
    t_adv = _checks.per_sample("absld", "adv_temperature", adv_temperature, adv, open_low=True)
    t_nat = _checks.per_sample("absld", "clean_temperature", clean_temperature, adv, open_low=True)
    return w * (
        a * distillation(adv, teacher / t_adv) + (1 - a) * distillation(clean, teacher / t_nat)
    )


def mtard(
    student_clean: Tensor,
    student_adv: Tensor,
    natural_clean: Tensor,
    robust_adv: Tensor,
    *,
    adv_weight: float | Tensor = 0.5,
    kl_weight: float = 1.0,
) -> Tensor:
    r"""MTARD's two teachers, $w \, KL(T_{adv}(\tilde x) \| S(\tilde x)) + (1 - w) KL(T_{nat}(x) \| S(x))$.

    Fair-MTARD's release has $T_{adv}(\tilde x)$ in both terms and never uses the natural teacher.
    Shapes, `kl_weight` and errors as the module says; the release has `kl_weight=1 / K`.

    Args:
        natural_clean: the natural teacher on the images.
        robust_adv: the robust teacher on the adversarial examples.
        adv_weight: w, a number in [0, 1], or the scalar tensor that `MTARDBalance` returns, which is
            not read, because that would stall an accelerator at every step.

    Example:
        >>> import math, torch
        >>> flat, z = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
        >>> mtard(z, flat, flat, z)  # (0.1308 + 0.1438) / 2
        tensor([0.1373])
    """
    clean, adv, natural, robust = _checked(
        "mtard",
        student_clean=student_clean,
        student_adv=student_adv,
        natural_clean=natural_clean,
        robust_adv=robust_adv,
    )
    w = _checks.number("mtard", "kl_weight", kl_weight, low=0.0)
    a = (
        _scalar("mtard", "adv_weight", adv_weight)
        if isinstance(adv_weight, Tensor)
        else _checks.number("mtard", "adv_weight", adv_weight, low=0.0, high=1.0)
    )
    return w * (a * distillation(adv, robust) + (1 - a) * distillation(clean, natural))


def bat(
    student_clean: Tensor,
    student_last_correct: Tensor,
    student_first_wrong: Tensor,
    targets: Tensor,
    *,
    beta: float = 6.0,
    uniform_weight: float = 1.0,
) -> Tensor:
    r"""BAT, on both sides of the decision boundary that an attack crosses.

    $$CE(S(x_{lc}), y) + \beta \, KL(S(x) \| S(x_{fa})) + u \, [KL(S(x_{lc}) \| U) + KL(S(x_{fa}) \| U)]$$

    The gradient flows through both arguments of the first divergence. U is uniform; its divergences
    are `confidence_penalty`. Shapes and errors as the module says.

    Args:
        student_last_correct: the student on $x_{lc}$, the attack's last iterate with the right label.
        student_first_wrong: the student on $x_{fa}$, its first iterate with a wrong one, or its last
            where there is none; the release takes one more step after it.
        beta, uniform_weight: $\beta$ and u, >= 0.

    Example:
        >>> import math, torch
        >>> flat, z = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
        >>> bat(z, flat, flat, torch.tensor([0]))  # log 2 + 6 * 0.1308 + 0
        tensor([1.4780])
    """
    clean, inside, outside = _checked(
        "bat",
        student_clean=student_clean,
        student_last_correct=student_last_correct,
        student_first_wrong=student_first_wrong,
    )
    b = _checks.number("bat", "beta", beta, low=0.0)
    u = _checks.number("bat", "uniform_weight", uniform_weight, low=0.0)
    uniform = confidence_penalty(inside) + confidence_penalty(outside)
    boundary = _cross_entropy("bat", inside, targets) + b * kl_divergence(clean, outside)
    return boundary + u * uniform


def _checked(function: str, **named: Tensor | None) -> list[Tensor]:
    """Logits of one shape, in float32 or wider; all but the student's are constants."""
    logits = {name: _checks.logits(function, z, argument=name) for name, z in named.items()}
    _checks.alike(function, **logits)
    return [z if name.startswith("student") else z.detach() for name, z in logits.items()]


def _cross_entropy(function: str, logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy, with errors in the name of the function that takes the labels."""
    labels_of(function, targets, logits)
    return cross_entropy(logits, targets)


def _rescaled_distillation(
    function: str, logits: Tensor, reference: Tensor, temperature: float | Tensor
) -> Tensor:
    """τ² KL_τ(reference ‖ model)."""
    t = _checks.per_sample(function, "temperature", temperature, logits, open_low=True)
    return (t**2 * distillation(logits / t, reference / t)[:, None]).squeeze(1)
