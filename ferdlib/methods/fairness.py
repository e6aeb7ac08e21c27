"""The robust-fairness rules of other papers, put onto ARD as in Fair-ARD's Table 4.

Those papers train without a teacher, and Fair-ARD's authors did not release their combinations: where a
rule leaves open which of ARD's terms it acts on, the class says what is done here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ferdlib import _oldchecks as _checks
from ferdlib import losses, metrics
from ferdlib._modes import borrowed
from ferdlib._ranks import Ranks
from ferdlib.attacks import least_pgd_steps, pgd
from ferdlib.methods.base import Batches
from ferdlib.methods.distillation import ARD
from ferdlib.reweight import (
    ClassMean,
    FRLWeights,
    HedgeWeights,
    cfa_margins,
    cfa_mixing,
    confusion_weights,
    gairat,
    kl_ball,
)


class HeldOut(ARD):
    """ARD with a rule that looks once per epoch at images that are not trained on."""

    _validated = False

    def validate(self, student: nn.Module, batches: Batches) -> None:
        """Before `end_epoch`: measure the classes; the student is left as it was."""
        function = f"{type(self).__name__}.validate"
        _checks.callable_(function, "student", student)
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"{function}: expected `batches` of images and labels, got {_checks.got(batches)}"
            )
        self.measure(student, batches)
        self._validated = True

    def measure(self, student: nn.Module, batches: Batches) -> None:
        """What `validate` does with the images."""
        raise NotImplementedError(f"{type(self).__name__}: expected a subclass that measures")

    def end_epoch(self) -> None:
        if not self._validated:
            raise RuntimeError(
                f"{type(self).__name__}.end_epoch: expected validate(student, batches) on held-out images "
                f"before it, got none in epoch {self.epoch}"
            )
        self._validated = False
        super().end_epoch()


@dataclass(kw_only=True)
class GAIRARD(ARD):
    """GAIRAT on ARD: each sample weighted by its own least PGD steps, in its batch (`reweight.gairat`).

    Attributes:
        shift: of the tanh.
        begin: epochs without weights.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> GAIRARD(num_classes=3, teacher=small_cnn(1, 3, width=4)).shift
        -1.0
    """

    shift: float = -1.0
    begin: int = 60
    withstood: Tensor | None = field(default=None, init=False, repr=False)

    def attack(self, student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        arguments = self.ascent(student, x, y)
        x_adv, self.withstood = least_pgd_steps(student, x, labels=y, count="correct", **arguments)
        return x_adv

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        plain = super().loss(student, x, x_adv, y)
        if self.epoch < self.begin:
            return plain
        if self.withstood is None:
            raise RuntimeError("GAIRARD.loss: expected examples of its own attack, got others")
        return gairat(self.withstood, self.steps, shift=self.shift).to(plain) * plain


@dataclass(kw_only=True)
class FRLARD(HeldOut):
    """FRL on ARD: Lagrange multipliers for each class's natural and boundary error (`reweight.FRLWeights`).

    The robust error that ARD's loss stands for is the sum of the two, so its weight is their mean. With
    `remargin` the radius of a class grows with its boundary error. The errors are measured by `validate`,
    once per epoch, with PGD-20.

    Attributes:
        slack: both errors may exceed their mean by so much; FRL's code has 0.07 with `remargin`.
        remargin: also change the radii.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> FRLARD(num_classes=3, teacher=small_cnn(1, 3, width=4)).multipliers.clean_weights
        tensor([1., 1., 1.], dtype=torch.float64)
    """

    slack: float = 0.1
    remargin: bool = False
    multipliers: FRLWeights = field(init=False, repr=False)

    stateful: ClassVar[tuple[str, ...]] = ("multipliers",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.multipliers = FRLWeights(
            self.num_classes,
            clean_slack=self.slack,
            boundary_slack=self.slack,
            remargin=self.remargin,
        )

    def ball(self, y: Tensor) -> dict[str, Any]:
        if not self.remargin:
            return super().ball(y)
        factors = self.multipliers.eps_factors.to(y.device)
        return {"eps": self.eps * factors[y], "step_size": self.eps * float(factors.max()) / 4}

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        plain = super().loss(student, x, x_adv, y)
        weights = (self.multipliers.clean_weights + self.multipliers.boundary_weights) / 2
        return weights.to(plain)[y] * plain

    def measure(self, student: nn.Module, batches: Batches) -> None:
        """Both errors of each class."""
        attack = partial(pgd, eps=self.eps, step_size=self.step_size, steps=20, rng=self.rng)
        counts = torch.zeros(2, self.num_classes, self.num_classes, dtype=torch.int64)
        with torch.no_grad(), borrowed(student):
            for x, y in batches:
                for k, images in enumerate((x, attack(student, x, y))):
                    predicted = student(images).argmax(dim=1)
                    counts[k] += metrics.confusion_matrix(predicted, y, self.num_classes).cpu()
        self.multipliers.update(*(metrics.class_accuracy(matrix) for matrix in counts))


@dataclass(kw_only=True)
class FATARD(ARD):
    """FAT on ARD: plus the variance of the class means of the adversarial cross-entropy.

    `losses.class_variance` of a batch, over the classes that are in it.

    Attributes:
        variance_weight: of the variance.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> FATARD(num_classes=3, teacher=small_cnn(1, 3, width=4)).variance_weight
        0.1
    """

    variance_weight: float = 0.1

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        adv = student(x_adv)
        risk = losses.cross_entropy(adv, y)
        variance = losses.class_variance(risk, y, num_classes=self.num_classes)
        return self.distil(student, x, adv, y) + self.variance_weight * variance


@dataclass(kw_only=True)
class CFAARD(ARD):
    """CFA on ARD: a radius and a mixture of losses for each class, from its robust accuracy.

    A class that is robust gets the larger radius (`reweight.cfa_margins`) and more of the divergence beside
    the cross-entropy on the adversarial examples (`reweight.cfa_mixing`). The accuracy is that of the last
    epoch's training examples, under their own radii. CFA's weight averaging is `FairAverage`.

    Attributes:
        beta: of the mixture.
        margin_base, mixing_base: CFA's lambda_1 and lambda_2.
        begin: epochs with equal radii and the whole divergence.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> CFAARD(num_classes=3, teacher=small_cnn(1, 3, width=4)).begin
        10
    """

    beta: float = 6.0
    margin_base: float = 0.5
    mixing_base: float = 0.5
    begin: int = 10
    robust: ClassMean = field(init=False, repr=False)

    stateful: ClassVar[tuple[str, ...]] = ("robust",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.robust = ClassMean(self.num_classes)
        self.accuracy = torch.full((self.num_classes,), torch.nan, dtype=torch.float64)

    def ball(self, y: Tensor) -> dict[str, Any]:
        if self.epoch < self.begin:
            return super().ball(y)
        factors = cfa_margins(self.accuracy, base=self.margin_base).to(y.device)[y]
        return {"eps": self.eps * factors, "step_size": self.step_size * factors}

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        self._check_batch("loss", student, x, y)
        adv = student(x_adv)
        self.robust.update((adv.argmax(dim=1) == y).float(), y)
        divergence = self.distil(student, x, adv, y)
        if self.epoch < self.begin:
            return divergence
        mixing = cfa_mixing(self.accuracy, beta=self.beta, base=self.mixing_base).to(divergence)[y]
        return (1 - mixing) * losses.cross_entropy(adv, y) + mixing * divergence

    def end_epoch(self) -> None:
        super().end_epoch()
        self.accuracy = self.robust.compute().double().cpu()
        self.robust.reset()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "accuracy": self.accuracy.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.accuracy = state["accuracy"].clone()


@dataclass(kw_only=True)
class FAALARD(ARD):
    """FAAL on ARD: in each batch the worst class weights within a KL ball (`reweight.kl_ball`).

    Attributes:
        radius: of the ball around equal weights.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> FAALARD(num_classes=3, teacher=small_cnn(1, 3, width=4)).radius
        0.5
    """

    radius: float = 0.5

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        self._check_batch("loss", student, x, y)
        adv = student(x_adv)
        with torch.no_grad():
            p = adv.float().softmax(dim=1)
            own = p.gather(1, y[:, None]).squeeze(1)
            others = p.scatter(1, y[:, None], -1.0).amax(dim=1)
            lead = ClassMean(self.num_classes)
            lead.update(others - own, y)
            weights = self.num_classes * kl_ball(lead.compute(), radius=self.radius)
        plain = self.distil(student, x, adv, y)
        return weights.to(plain)[y] * plain


@dataclass(kw_only=True)
class DAFAARD(ARD):
    """DAFA on ARD: class weights and radii from how likely classes are taken for one another.

    After `begin` epochs the mean predictions on the adversarial examples of the last one give the weights
    (`reweight.confusion_weights`), once; they multiply loss, radius and step.

    Attributes:
        strength: lambda; 1.5 for CIFAR-100 in the paper.
        begin: epochs before, at least 1.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> DAFAARD(num_classes=3, teacher=small_cnn(1, 3, width=4)).weights
        tensor([1., 1., 1.], dtype=torch.float64)
    """

    strength: float = 1.0
    begin: int = 70

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.integer("DAFAARD", "begin", self.begin, low=1)
        k = self.num_classes
        self.weights = torch.ones(k, dtype=torch.float64)
        self.sums = torch.zeros(k, k, dtype=torch.float64)

    def ball(self, y: Tensor) -> dict[str, Any]:
        factors = self.weights.to(y.device)[y]
        return {"eps": self.eps * factors, "step_size": self.step_size * factors}

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        self._check_batch("loss", student, x, y)
        adv = student(x_adv)
        if self.epoch == self.begin - 1:
            p = adv.detach().double().softmax(dim=1)
            self.sums = self.sums.to(p.device).index_add(0, y, p)
        plain = self.distil(student, x, adv, y)
        return self.weights.to(plain)[y] * plain

    def sync(self) -> None:
        super().sync()
        if self.epoch == self.begin - 1:
            self.sums = Ranks.here().total(self.sums)

    def end_epoch(self) -> None:
        # The weights first: where `confusion_weights` refuses, the epoch can be ended with another strength.
        if self.epoch == self.begin - 1:
            p = (self.sums / self.sums.sum(dim=1, keepdim=True)).cpu()
            self.weights = confusion_weights(p, strength=self.strength)
        super().end_epoch()

    def state_dict(self) -> dict[str, Any]:
        own = {"weights": self.weights.clone(), "sums": self.sums.clone()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.weights, self.sums = state["weights"].clone(), state["sums"].clone()


@dataclass(kw_only=True)
class WATARD(HeldOut):
    """WAT on ARD: the hedge algorithm over the classes and their average (`reweight.HedgeWeights`).

    The experts' losses are ARD's own on images that are not trained on, measured by `validate` once per
    epoch and summed over epochs.

    Attributes:
        hedge_rate: eta.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> WATARD(num_classes=3, teacher=small_cnn(1, 3, width=4)).hedge.class_weights
        tensor([1., 1., 1.], dtype=torch.float64)
    """

    hedge_rate: float = 0.1
    hedge: HedgeWeights = field(init=False, repr=False)

    stateful: ClassVar[tuple[str, ...]] = ("hedge",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hedge = HedgeWeights(self.num_classes, rate=self.hedge_rate)

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        plain = super().loss(student, x, x_adv, y)
        return (self.hedge.class_weights.to(plain)[y] + self.hedge.average_weight) * plain

    def measure(self, student: nn.Module, batches: Batches) -> None:
        """Each class's loss."""
        means = ClassMean(self.num_classes)
        with borrowed(student):
            for x, y in batches:
                # In eval mode whatever the setting: nothing of these images may stay in the student.
                x_adv = pgd(student, x, **(self.ascent(student, x, y) | {"train_mode": False}))
                with torch.no_grad():
                    means.update(super().loss(student, x, x_adv, y), y)
        found = means.compute().double().cpu()
        self.hedge.update(found, float(found.nanmean()))
