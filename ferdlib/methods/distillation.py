"""Adversarial robustness distillation: ARD, IAD, RSLAD, MTARD, AdaAD, ABSLD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ferdlib import _checks, losses
from ferdlib._modes import ask, borrowed
from ferdlib.attacks import pgd
from ferdlib.attacks.ascent import warn_once
from ferdlib.losses import MTARDBalance
from ferdlib.methods.protocol import Batch, Distilled, Reference, Terms, teacher_logits
from ferdlib.reweight import ClassMean

# Epochs after which the rates of MTARD and ABSLD fall to a tenth.
DROPS = (215, 260, 285)


def check_share(alpha: float) -> None:
    """Check the share `alpha` of a loss; warn of one that must be a step, which torchattacks calls so."""
    _checks.real(0, 1, alpha=alpha)
    if 0 < alpha <= 16 / 255:
        warn_once("alpha %g is the share of a loss here; did you mean step_size=%g?", alpha, alpha)


@dataclass(kw_only=True)
class ARD(Distilled):
    """Adversarially robust distillation (Goldblum et al. 2020): `losses.ard`, PGD on the label.

    Attributes:
        temperature: T > 0 of teacher and student.
        alpha: share of the divergence, in [0, 1]; what remains is the cross-entropy on the images.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> method = ARD(num_classes=3, teacher=small_cnn(1, 3, width=4), eps=0.1, step_size=0.025)
        >>> student, x, y = small_cnn(1, 3, width=2), torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> method.loss(student, x, method.attack(student, x, y), y).shape
        torch.Size([4])
    """

    temperature: float = 30.0
    alpha: float = 1.0

    def check(self) -> None:
        super().check()
        _checks.divisor(temperature=self.temperature)
        check_share(self.alpha)

    def terms(self, student: nn.Module, batch: Batch) -> Terms:
        adv = ask(student, batch.x_adv)
        clean = ask(student, batch.x) if self.alpha < 1 else None
        loss = losses.ard(
            clean,
            adv,
            batch.reference,
            batch.y,
            temperature=self.temperature,
            alpha=self.alpha,
            kl_weight=self.kl_weight,
        )
        return loss, adv


@dataclass(kw_only=True)
class IAD(ARD):
    r"""Introspective adversarial distillation (Zhu et al. 2022): trust the teacher as far as it is right.

    `ARD` for `begin` epochs, then, with $A = p_T(y | \tilde x)^b$, as the paper has it

    $$A \, \tau^2 KL_\tau(T(x) \| S(\tilde x)) + (1 - A) KL(S(x) \| S(\tilde x)).$$

    Attributes:
        temperature, alpha: as in `ARD`; alpha multiplies both divergences.
        exponent: b >= 0.
        begin: epochs without the student's introspection.
        weigh_teacher: multiply the teacher's term by A; the release does not.
    """

    temperature: float = 1.0
    exponent: float = 0.1
    begin: int = 60
    weigh_teacher: bool = True

    def check(self) -> None:
        super().check()
        _checks.real(0, exponent=self.exponent)
        _checks.integer(0, begin=self.begin)
        _checks.instance(bool, weigh_teacher=self.weigh_teacher)

    def terms(self, student: nn.Module, batch: Batch) -> Terms:
        # Until then neither S(x) nor T(x~) is needed; S(x) in train mode would move BatchNorm, too.
        if self.epoch < self.begin:
            return super().terms(student, batch)
        clean, adv = ask(student, batch.x), ask(student, batch.x_adv)
        guide = teacher_logits(self.teacher, batch.x_adv)
        loss = losses.iad(
            clean,
            adv,
            batch.reference,
            guide,
            batch.y,
            temperature=self.temperature,
            alpha=self.alpha,
            exponent=self.exponent,
            weigh_teacher=self.weigh_teacher,
            kl_weight=self.kl_weight,
        )
        return loss, adv


@dataclass(kw_only=True)
class RSLAD(Distilled):
    """Robust soft-label distillation (Zi et al. 2021): the teacher's clean logits everywhere.

    Attributes:
        adv_weight: weight of the adversarial term, in [0, 1]; the clean one has the rest.
    """

    adv_weight: float = 5 / 6
    random_start: Literal["uniform", "normal"] | None = "normal"
    aims_at_reference = True

    def check(self) -> None:
        super().check()
        _checks.real(0, 1, adv_weight=self.adv_weight)

    def ascend(self, student: nn.Module, batch: Batch, **settings: Any) -> Tensor:
        return pgd(student, batch.x, batch.reference, loss=losses.distillation, **settings)

    def terms(self, student: nn.Module, batch: Batch) -> Terms:
        clean, adv = ask(student, batch.x), ask(student, batch.x_adv)
        weights = {"adv_weight": self.adv_weight, "kl_weight": self.kl_weight}
        return losses.rslad(clean, adv, batch.reference, **weights), adv


@dataclass(kw_only=True)
class MTARD(Distilled):
    """Two teachers (Zhao et al. 2022): a robust one for adversarial images, a natural one for clean ones.

    The reference is the natural teacher's. The balance of the two sees the losses before a rule's weights.

    Attributes:
        natural_teacher: from images to logits.
        rate: rate of the balance, in [0, 1], a tenth after each of the epochs `rate_drops`.
        clean_target: "robust" puts the robust teacher's adversarial logits into the clean term too, the bug of
            Fair-MTARD's release; "natural" is what both papers say.
    """

    natural_teacher: nn.Module
    rate: float = 0.025
    rate_drops: tuple[int, ...] = DROPS
    clean_target: Literal["natural", "robust"] = "natural"
    random_start: Literal["uniform", "normal"] | None = "normal"
    balance: MTARDBalance = field(init=False, repr=False)
    stateful = (*Distilled.stateful, "balance")

    def check(self) -> None:
        super().check()
        _checks.module(natural_teacher=self.natural_teacher)
        _checks.real(0, 1, rate=self.rate)
        _checks.choice(("natural", "robust"), clean_target=self.clean_target)
        _check_drops(self.rate_drops)

    def bind(self) -> None:
        super().bind()
        self.balance = MTARDBalance(rate=self.rate)

    def reference(self, x: Tensor) -> Reference:
        natural = self.clean_target == "natural"
        return teacher_logits(self.natural_teacher, x) if natural else None

    def terms(self, student: nn.Module, batch: Batch) -> Terms:
        robust = teacher_logits(self.teacher, batch.x_adv)
        natural = batch.reference if self.clean_target == "natural" else robust
        logits = ask(student, batch.x_adv)
        # Not `losses.mtard`: the balance needs both divergences apart.
        adv = losses.distillation(logits, robust) * self.kl_weight
        clean = losses.distillation(ask(student, batch.x), natural) * self.kl_weight
        adv_weight, clean_weight = self.balance.update(adv.detach().mean(), clean.detach().mean())
        return adv_weight * adv + clean_weight * clean, logits

    def end_epoch(self) -> None:
        super().end_epoch()
        if self.epoch in self.rate_drops:
            self.balance.rate *= 0.1


@dataclass(kw_only=True)
class AdaAD(Distilled):
    """Adaptive adversarial distillation (Huang et al. 2023): attack where student and teacher part.

    The teacher is run on each iterate, with gradients through it; this is a second model in the attack.
    `train_mode` is the student's: the teacher stays in eval mode.

    Attributes:
        alpha: weight of the adversarial term, in [0, 1]; the clean one has the rest, and needs the reference.
    """

    alpha: float = 1.0
    random_start: Literal["uniform", "normal"] | None = "normal"

    def check(self) -> None:
        super().check()
        check_share(self.alpha)

    def reference(self, x: Tensor) -> Reference:
        return super().reference(x) if self.alpha < 1 else None

    def ascend(self, student: nn.Module, batch: Batch, **settings: Any) -> Tensor:
        def both(image: Tensor) -> tuple[Tensor, Tensor]:
            return ask(student, image), ask(self.teacher, image)

        def apart(logits: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
            return losses.distillation(*logits)

        # In train mode, the attack leaves the modes of two models to its caller.
        with borrowed(student, training=self.train_mode), borrowed(self.teacher):
            return pgd(both, batch.x, batch.y, loss=apart, **settings)

    def terms(self, student: nn.Module, batch: Batch) -> Terms:
        clean, reference = (
            (ask(student, batch.x), batch.reference) if self.alpha < 1 else (None, None)
        )
        adv, teacher_adv = ask(student, batch.x_adv), teacher_logits(self.teacher, batch.x_adv)
        weights = {"alpha": self.alpha, "kl_weight": self.kl_weight}
        return losses.adaad(clean, adv, reference, teacher_adv, **weights), adv


@dataclass(kw_only=True)
class ABSLD(RSLAD):
    """Anti-bias soft labels (Zhao et al. 2024): RSLAD whose teacher has a temperature for each class.

    A class with more than the mean loss gets sharper labels in the next epoch (`losses.class_temperatures`).

    Attributes:
        rate: rate of the temperatures, >= 0, a tenth after each of the epochs `rate_drops`.
        adv_temperatures, clean_temperatures: float64 `(K,)`, ones at first.
    """

    rate: float = 0.1
    rate_drops: tuple[int, ...] = DROPS
    adv_temperatures: Tensor = field(init=False, repr=False)
    clean_temperatures: Tensor = field(init=False, repr=False)
    stateful = (*RSLAD.stateful, "adv_temperatures", "clean_temperatures")
    stateful += ("adv_losses", "clean_losses")

    def check(self) -> None:
        super().check()
        _checks.real(0, rate=self.rate)
        _check_drops(self.rate_drops)

    def bind(self) -> None:
        super().bind()
        ones = torch.ones(self.num_classes, dtype=torch.float64, device="cpu")
        self.adv_temperatures, self.clean_temperatures = ones, ones.clone()
        self.adv_losses, self.clean_losses = ClassMean(len(ones)), ClassMean(len(ones))

    def ascend(self, student: nn.Module, batch: Batch, **settings: Any) -> Tensor:
        # A new tensor: the release divides one storage in place, and so tempers both terms twice.
        temperature = self.adv_temperatures.to(batch.reference)[batch.y, None]
        batch = batch._replace(reference=batch.reference / temperature)
        return super().ascend(student, batch, **settings)

    def terms(self, student: nn.Module, batch: Batch) -> Terms:
        clean, adv = ask(student, batch.x), ask(student, batch.x_adv)
        with torch.no_grad():
            self.adv_losses.update(losses.cross_entropy(adv, batch.y), batch.y)
            self.clean_losses.update(losses.cross_entropy(clean, batch.y), batch.y)
        loss = losses.absld(
            clean,
            adv,
            batch.reference,
            adv_temperature=self.adv_temperatures.to(batch.reference)[batch.y],
            clean_temperature=self.clean_temperatures.to(batch.reference)[batch.y],
            adv_weight=self.adv_weight,
            kl_weight=self.kl_weight,
        )
        return loss, adv

    def end_epoch(self) -> None:
        super().end_epoch()
        # The epoch that is named still has the old rate.
        rate = self.rate * 0.1 ** sum(self.epoch > drop for drop in self.rate_drops)
        self.adv_temperatures = _moved(self.adv_temperatures, self.adv_losses, rate)
        self.clean_temperatures = _moved(self.clean_temperatures, self.clean_losses, rate)


def _moved(temperatures: Tensor, means: ClassMean, rate: float) -> Tensor:
    """Return the next epoch's temperatures, and forget the class means of this one."""
    moved = losses.class_temperatures(temperatures, _checks.double(means.compute()), rate=rate)
    means.reset()
    return moved


def _check_drops(drops: tuple[int, ...]) -> None:
    _checks.instance(tuple, rate_drops=drops)
    _checks.integer(0, **{f"rate_drops[{i}]": drop for i, drop in enumerate(drops)})
