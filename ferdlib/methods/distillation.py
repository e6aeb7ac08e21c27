"""Adversarial robustness distillation: ARD, IAD, RSLAD, MTARD, AdaAD, ABSLD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ferdlib import losses
from ferdlib._modes import borrowed
from ferdlib.attacks import pgd
from ferdlib.losses import MTARDBalance
from ferdlib.methods.base import Distilled
from ferdlib.methods.protocol import FrozenTeacher
from ferdlib.reweight import ClassMean


@dataclass(kw_only=True)
class ARD(Distilled):
    """Adversarially robust distillation (Goldblum et al. 2020): `losses.ard`, PGD on the label.

    Attributes:
        temperature: T of teacher and student.
        alpha: share of the divergence; what remains is the cross-entropy on the images.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> method = ARD(num_classes=3, teacher=small_cnn(1, 3, width=4), eps=0.1, step_size=0.025)
        >>> student, x, y = small_cnn(1, 3, width=2), torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> method.loss(student, x, method.attack(student, x, y), y).shape
        torch.Size([4])
    """

    temperature: float = 30.0
    alpha: float = 1.0

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return self.distil(student, x, student(x_adv), y)

    def distil(self, student: nn.Module, x: Tensor, student_adv: Tensor, y: Tensor) -> Tensor:
        """The loss from the student's logits on the adversarial examples."""
        return losses.ard(
            student(x) if self.alpha < 1 else None,
            student_adv,
            self.logits(x),
            y,
            temperature=self.temperature,
            alpha=self.alpha,
            kl_weight=self.kl_weight,
        )


@dataclass(kw_only=True)
class IAD(Distilled):
    """Introspective adversarial distillation (Zhu et al. 2022): trust the teacher as far as it is right.

    Attributes:
        temperature, alpha: as in `ARD`.
        exponent: of the teacher's confidence on the adversarial example.
        begin: epochs without the student's introspection.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> IAD(num_classes=3, teacher=small_cnn(1, 3, width=4)).begin
        60
    """

    temperature: float = 1.0
    alpha: float = 1.0
    exponent: float = 0.1
    begin: int = 60

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return losses.iad(
            student(x),
            student(x_adv),
            self.logits(x),
            without_gradient(self.teacher, x_adv),
            y,
            temperature=self.temperature,
            alpha=self.alpha,
            exponent=self.exponent,
            introspection=self.epoch >= self.begin,
            kl_weight=self.kl_weight,
        )


@dataclass(kw_only=True)
class RSLAD(Distilled):
    """Robust soft-label distillation (Zi et al. 2021): the teacher's clean logits everywhere.

    Attributes:
        adv_weight: of the adversarial term; the clean one has the rest.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> round(RSLAD(num_classes=3, teacher=small_cnn(1, 3, width=4)).adv_weight, 3)
        0.833
    """

    adv_weight: float = 5 / 6
    random_start: Literal["uniform", "normal"] | None = "normal"

    def objective(self, student: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"targets": self.logits(x), "loss": losses.distillation}

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return losses.rslad(
            student(x),
            student(x_adv),
            self.logits(x),
            adv_weight=self.adv_weight,
            kl_weight=self.kl_weight,
        )


@dataclass(kw_only=True)
class MTARD(Distilled):
    """Two teachers (Zhao et al. 2022): a robust one for adversarial images, a natural one for clean ones.

    Attributes:
        natural_teacher: from images to logits.
        rate: of the balance between the two, a tenth after each of the epochs `rate_drops`.
        clean_target: "robust" puts the robust teacher's adversarial logits into the clean term too, the bug of
            Fair-MTARD's release; "natural" is what both papers say.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> robust, natural = small_cnn(1, 3, width=4), small_cnn(1, 3, width=4)
        >>> float(MTARD(num_classes=3, teacher=robust, natural_teacher=natural).balance.adv_weight)
        0.5
    """

    natural_teacher: nn.Module
    rate: float = 0.025
    rate_drops: tuple[int, ...] = (215, 260, 285)
    clean_target: Literal["natural", "robust"] = "natural"
    random_start: Literal["uniform", "normal"] | None = "normal"
    balance: MTARDBalance = field(init=False, repr=False)

    stateful: ClassVar[tuple[str, ...]] = ("balance",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.balance = MTARDBalance(rate=self.rate)
        self.natural_logits = FrozenTeacher(self.natural_teacher)

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        robust = without_gradient(self.teacher, x_adv)
        natural = self.natural_logits(x) if self.clean_target == "natural" else robust
        adv = losses.distillation(student(x_adv), robust) * self.kl_weight
        clean = losses.distillation(student(x), natural) * self.kl_weight
        adv_weight, clean_weight = self.balance.update(adv.detach().mean(), clean.detach().mean())
        return adv_weight * adv + clean_weight * clean

    def end_epoch(self) -> None:
        super().end_epoch()
        if self.epoch in self.rate_drops:
            self.balance.rate *= 0.1


@dataclass(kw_only=True)
class AdaAD(Distilled):
    """Adaptive adversarial distillation (Huang et al. 2023): attack where student and teacher part.

    The teacher is run on each iterate, with gradients through it; this is a second model in the attack.

    Attributes:
        alpha: of the adversarial term; the clean one has the rest.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> method = AdaAD(num_classes=3, teacher=small_cnn(1, 3, width=4), eps=0.1, step_size=0.025)
        >>> student, x, y = small_cnn(1, 3, width=2), torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> method.attack(student, x, y).shape
        torch.Size([4, 1, 8, 8])
    """

    alpha: float = 1.0
    random_start: Literal["uniform", "normal"] | None = "normal"

    def attack(self, student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        def both(image: Tensor) -> tuple[Tensor, Tensor]:
            return student(image), self.teacher(image)

        def apart(logits: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
            return losses.distillation(*logits)

        # A callable is not put into eval mode by the attack, and its weights are not frozen.
        with borrowed(student, self.teacher):
            return pgd(both, x, **(self.ascent(student, x, y) | {"loss": apart}))

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return losses.adaad(
            student(x) if self.alpha < 1 else None,
            student(x_adv),
            self.logits(x) if self.alpha < 1 else None,
            without_gradient(self.teacher, x_adv),
            alpha=self.alpha,
            kl_weight=self.kl_weight,
        )


@dataclass(kw_only=True)
class ABSLD(RSLAD):
    """Anti-bias soft labels (Zhao et al. 2024): RSLAD whose teacher has a temperature for each class.

    A class with more than the mean loss gets sharper labels in the next epoch (`losses.class_temperatures`).

    Attributes:
        rate: of the temperatures, a tenth after each of the epochs `rate_drops`.
        adv_temperatures, clean_temperatures: float64 `(K,)`, ones at first.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> ABSLD(num_classes=3, teacher=small_cnn(1, 3, width=4)).adv_temperatures
        tensor([1., 1., 1.], dtype=torch.float64)
    """

    rate: float = 0.1
    rate_drops: tuple[int, ...] = (215, 260, 285)
    adv_temperatures: Tensor = field(init=False, repr=False)
    clean_temperatures: Tensor = field(init=False, repr=False)

    stateful: ClassVar[tuple[str, ...]] = ("adv_losses", "clean_losses")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adv_temperatures = torch.ones(self.num_classes, dtype=torch.float64)
        self.clean_temperatures = torch.ones(self.num_classes, dtype=torch.float64)
        self.adv_losses = ClassMean(self.num_classes)
        self.clean_losses = ClassMean(self.num_classes)

    def objective(self, student: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        logits = self.logits(x)
        return {
            "targets": logits / self.adv_temperatures.to(logits)[y, None],
            "loss": losses.distillation,
        }

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        clean, adv, teacher = student(x), student(x_adv), self.logits(x)
        with torch.no_grad():
            self.adv_losses.update(losses.cross_entropy(adv, y), y)
            self.clean_losses.update(losses.cross_entropy(clean, y), y)
        return losses.absld(
            clean,
            adv,
            teacher,
            adv_temperature=self.adv_temperatures.to(teacher)[y],
            clean_temperature=self.clean_temperatures.to(teacher)[y],
            adv_weight=self.adv_weight,
            kl_weight=self.kl_weight,
        )

    def end_epoch(self) -> None:
        super().end_epoch()
        rate = self.rate * 0.1 ** sum(self.epoch > drop for drop in self.rate_drops)
        pairs = (("adv_temperatures", self.adv_losses), ("clean_temperatures", self.clean_losses))
        for name, means in pairs:
            new = losses.class_temperatures(
                getattr(self, name), means.compute().double(), rate=rate
            )
            setattr(self, name, new)
            means.reset()

    def state_dict(self) -> dict[str, Any]:
        temperatures = {
            "adv_temperatures": self.adv_temperatures.clone(),
            "clean_temperatures": self.clean_temperatures.clone(),
        }
        return {**super().state_dict(), **temperatures}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.adv_temperatures = state["adv_temperatures"].clone()
        self.clean_temperatures = state["clean_temperatures"].clone()


def without_gradient(teacher: nn.Module, x: Tensor) -> Tensor:
    """A teacher's logits in eval mode."""
    with torch.no_grad(), borrowed(teacher):
        logits: Tensor = teacher(x)
    return logits
