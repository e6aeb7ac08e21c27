r"""Adversarial robustness distillation and its relatives: one objective of a paper, one function.

S is the student, T the teacher, x the images, $\tilde x$ their adversarial examples, y the labels,
$KL(a \| b)$ the divergence of $\mathrm{softmax}(a)$ and $\mathrm{softmax}(b)$, and $KL_\tau$ that of
$a / \tau$ and $b / \tau$. All logits are float `(N, K)` of one shape, targets int64 labels `(N,)`.
Gradients flow into every argument of the student's; the teachers' are constants, except in
`distillation` itself. A loss returns `(N,)`, in nats; take the mean. Errors as the package says.

`temperature` $\tau$ > 0 is a number or one per sample `(N,)`, without a factor $\tau^2$ that is not in the
equation; `alpha` $\alpha$ and `adv_weight` w are in [0, 1], all other weights and exponents >= 0.
`kl_weight` >= 0 multiplies every divergence and nothing else. A divergence is summed over classes
here; the releases of ARD, RSLAD, MTARD, ABSLD and AdaAD (on CIFAR-10) take `KLDivLoss()`'s default
mean, over samples *and* classes, which is `kl_weight=1 / K`. Those of IAD and TRADES sum: 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import public
from ferdlib.losses._kernels import confidence_penalty, cross_entropy, kl, rescaled_kl


@public
def distillation(
    logits: Tensor, reference_logits: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    r"""$KL(\text{reference} \| \text{model})$ in the argument order of attacks and training losses.

    The same value as `kl_divergence(reference_logits, logits)`: the second argument is the target,
    as labels are the second argument of `cross_entropy`. At least 0 up to rounding.

    Args:
        logits: those of the model that is trained or attacked.
        reference_logits: the teacher's. Gradients flow into both; detach a constant one.

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        >>> distillation(student, teacher)
        tensor([0.1308])
    """
    z, reference = _checks.logits(logits=logits, reference_logits=reference_logits)
    t = _checks.per_sample("temperature", temperature, z, above_zero=True)
    return kl(reference / t, z / t)


@public
def trades(
    student_clean: Tensor,
    student_adv: Tensor,
    targets: Tensor,
    *,
    beta: float = 6.0,
    kl_weight: float = 1.0,
) -> Tensor:
    r"""TRADES, $CE(S(x), y) + \beta \, KL(S(x) \| S(\tilde x))$.

    The gradient flows through both arguments of the divergence, as in the release.

    Example:
        >>> clean, adv = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        >>> trades(clean, adv, torch.tensor([0]))  # log 2 + 6 * 0.1438
        tensor([1.5562])
    """
    clean, adv = _logits(student_clean=student_clean, student_adv=student_adv)
    _checks.labels(targets=targets, like=adv, num_classes=adv.shape[1])
    _checks.real(0, beta=beta, kl_weight=kl_weight)
    return cross_entropy(clean, targets) + beta * kl_weight * kl(clean, adv)


@public
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
    The release has `kl_weight=1 / K`.

    Args:
        student_clean: may be None at alpha = 1, where the clean images are not needed.

    Example:
        >>> flat, teacher = torch.zeros(1, 2), torch.tensor([[9.0, 1.0]]).log()
        >>> ard(flat, flat, teacher, torch.tensor([0]), temperature=2.0, alpha=0.5)  # (4 * .1308 + log 2) / 2
        tensor([0.6082])
    """
    if student_clean is None and alpha == 1:
        # A stand-in, weighed by 0.
        student_clean = student_adv
    clean, adv, teacher = _logits(
        student_clean=student_clean, student_adv=student_adv, teacher_clean=teacher_clean
    )
    _checks.labels(targets=targets, like=adv, num_classes=adv.shape[1])
    _checks.real(0, 1, alpha=alpha)
    _checks.real(0, kl_weight=kl_weight)
    t = _checks.per_sample("temperature", temperature, adv, above_zero=True)
    divergence = alpha * kl_weight * rescaled_kl(teacher, adv, t)
    return divergence + (1 - alpha) * cross_entropy(clean, targets)


@public
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
    here needs.

    Example:
        >>> teacher = torch.tensor([[3.0, 1.0]]).log()
        >>> rslad(teacher, torch.zeros(1, 2), teacher)  # 5/6 * 0.1308
        tensor([0.1090])
    """
    clean, adv, teacher = _logits(
        student_clean=student_clean, student_adv=student_adv, teacher_clean=teacher_clean
    )
    _checks.real(0, 1, adv_weight=adv_weight)
    _checks.real(0, kl_weight=kl_weight)
    return kl_weight * (adv_weight * kl(teacher, adv) + (1 - adv_weight) * kl(teacher, clean))


@public
def iad(
    student_clean: Tensor | None,
    student_adv: Tensor,
    teacher_clean: Tensor,
    teacher_adv: Tensor | None,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    alpha: float = 1.0,
    exponent: float = 0.1,
    introspection: bool = True,
    detach_student: bool = False,
    weigh_teacher: bool = False,
    kl_weight: float = 1.0,
) -> Tensor:
    r"""IAD-I as released: the less the teacher can be trusted, the more the student trusts itself.

    $$\alpha \tau^2 KL_\tau(T(x) \| S(\tilde x)) + \alpha (1 - A) KL(S(x) \| S(\tilde x))
      + (1 - \alpha) CE(S(x), y), \qquad A = p_T(y | \tilde x)^b$$

    The temperature is in the first divergence only: the second one, and A, are at 1. The paper multiplies
    the first one by A, which is `weigh_teacher`. The student's own reference S(x) is trained too.

    Args:
        student_clean: may be None without introspection at alpha = 1, where it is not needed.
        teacher_adv: may be None without introspection.
        exponent: b.
        introspection: False leaves the middle term out, as the release does in its first 60 epochs.
        detach_student: True makes S(x) a constant in the middle term.
        weigh_teacher: True multiplies the first divergence by A, where there is introspection.

    Example:
        >>> flat, z = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        >>> iad(z, flat, z, flat, torch.tensor([0]), exponent=1.0)  # 0.1308 + (1 - 1/2) * 0.1308
        tensor([0.1962])
    """
    if not introspection:
        # Stand-ins: one is weighed by 0, the other is not used.
        student_clean = student_adv if student_clean is None and alpha == 1 else student_clean
        teacher_adv = teacher_clean if teacher_adv is None else teacher_adv
    clean, adv, teacher, teacher_on_adv = _logits(
        student_clean=student_clean,
        student_adv=student_adv,
        teacher_clean=teacher_clean,
        teacher_adv=teacher_adv,
    )
    _checks.labels(targets=targets, like=adv, num_classes=adv.shape[1])
    _checks.real(0, 1, alpha=alpha)
    _checks.real(0, exponent=exponent, kl_weight=kl_weight)
    t = _checks.per_sample("temperature", temperature, adv, above_zero=True)
    divergence = alpha * kl_weight * rescaled_kl(teacher, adv, t)
    loss = divergence + (1 - alpha) * cross_entropy(clean, targets)
    if not introspection:
        return loss
    # 1 - A is -expm1(log A), which keeps its digits where the teacher is nearly certain.
    log_trust = exponent * -cross_entropy(teacher_on_adv, targets)
    if weigh_teacher:
        loss = loss + divergence * torch.expm1(log_trust)
    own = clean.detach() if detach_student else clean
    return loss - alpha * kl_weight * torch.expm1(log_trust) * kl(own, adv)


@public
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

    The release has $\tau = 1$, and `kl_weight=1 / K` on CIFAR-10, 1 on CIFAR-100.

    Args:
        student_clean, teacher_clean: may both be None at alpha = 1, where the clean images are not needed.

    Example:
        >>> flat, z = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        >>> adaad(z, flat, flat, z, alpha=0.75)  # 3/4 * 0.1308 + 1/4 * 0.1438
        tensor([0.1341])
    """
    if student_clean is None and teacher_clean is None and alpha == 1:
        # Stand-ins, weighed by 0.
        student_clean, teacher_clean = student_adv, teacher_adv
    clean, adv, teacher, teacher_on_adv = _logits(
        student_clean=student_clean,
        student_adv=student_adv,
        teacher_clean=teacher_clean,
        teacher_adv=teacher_adv,
    )
    _checks.real(0, 1, alpha=alpha)
    _checks.real(0, kl_weight=kl_weight)
    t = _checks.per_sample("temperature", temperature, adv, above_zero=True)
    adversarial = kl(teacher_on_adv / t, adv / t)
    return kl_weight * (alpha * adversarial + (1 - alpha) * kl(teacher / t, clean / t))


@public
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

    Only the teacher is tempered. The release divides one storage in
    place by both temperatures, so that each of its terms has $\tau_{adv} \tau_{nat}$; here each has
    its own, and the logits stay as they are. It has `kl_weight=1 / K`.

    Args:
        adv_temperature, clean_temperature: those of `class_temperatures`, taken as `tau[targets]`.

    Example:
        >>> teacher = torch.tensor([[9.0, 1.0]]).log()
        >>> absld(teacher, torch.zeros(1, 2), teacher, adv_temperature=2.0, clean_temperature=1.0)
        tensor([0.1090])
    """
    clean, adv, teacher = _logits(
        student_clean=student_clean, student_adv=student_adv, teacher_clean=teacher_clean
    )
    _checks.real(0, 1, adv_weight=adv_weight)
    _checks.real(0, kl_weight=kl_weight)
    t_adv = _checks.per_sample("adv_temperature", adv_temperature, adv, above_zero=True)
    t_nat = _checks.per_sample("clean_temperature", clean_temperature, adv, above_zero=True)
    # Not in place: both terms would get both temperatures.
    adversarial, natural = kl(teacher / t_adv, adv), kl(teacher / t_nat, clean)
    return kl_weight * (adv_weight * adversarial + (1 - adv_weight) * natural)


@public
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
    The release has `kl_weight=1 / K`.

    Args:
        natural_clean: the natural teacher on the images.
        robust_adv: the robust teacher on the adversarial examples.
        adv_weight: w, a number in [0, 1], or the scalar tensor that `MTARDBalance` returns, whose
            value is not read: that would stall an accelerator at every step.

    Example:
        >>> flat, z = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        >>> mtard(z, flat, flat, z)  # (0.1308 + 0.1438) / 2
        tensor([0.1373])
    """
    clean, adv, natural, robust = _logits(
        student_clean=student_clean,
        student_adv=student_adv,
        natural_clean=natural_clean,
        robust_adv=robust_adv,
    )
    _checks.real(0, kl_weight=kl_weight)
    if isinstance(adv_weight, Tensor):
        _checks.scalar(adv_weight=adv_weight)
        adv_weight = adv_weight.detach()
    else:
        _checks.real(0, 1, adv_weight=adv_weight)
    return kl_weight * (adv_weight * kl(robust, adv) + (1 - adv_weight) * kl(natural, clean))


@public
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
    are `confidence_penalty`.

    Args:
        student_last_correct: the student on $x_{lc}$, the attack's last iterate with the right label.
        student_first_wrong: the student on $x_{fa}$, its first iterate with a wrong one, or its last
            iterate if none is wrong; the release takes one more step after it.
        beta, uniform_weight: $\beta$ and u.

    Example:
        >>> flat, z = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        >>> bat(z, flat, flat, torch.tensor([0]))  # log 2 + 6 * 0.1308 + 0
        tensor([1.4780])
    """
    clean, inside, outside = _logits(
        student_clean=student_clean,
        student_last_correct=student_last_correct,
        student_first_wrong=student_first_wrong,
    )
    _checks.labels(targets=targets, like=inside, num_classes=inside.shape[1])
    _checks.real(0, beta=beta, uniform_weight=uniform_weight)
    uniform = confidence_penalty(inside) + confidence_penalty(outside)
    return cross_entropy(inside, targets) + beta * kl(clean, outside) + uniform_weight * uniform


def _logits(**named: Tensor | None) -> list[Tensor]:
    """Return logits of one shape in float32 or wider, the teachers' as constants."""
    # A parameter's name says whose logits it has.
    logits = zip(named, _checks.logits(**named), strict=True)
    return [z if name.startswith("student") else z.detach() for name, z in logits]
