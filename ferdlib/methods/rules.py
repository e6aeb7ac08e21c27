"""Rules that reweigh the classes of any method: `RSLAD(num_classes=10, teacher=teacher, rule=rules.DAFA())`.

Fair-ARD puts its own (`LPS`) onto four methods of distillation, and those of other papers onto ARD (its Table
4); here each goes with every method. The other papers train without a teacher: where a rule leaves open which
terms of a method it acts on, its docstring says what is done here.

    LPS, GAIRAT    from the steps of the method's own attack      WAT, FRL     from held-out images
    CFA, DAFA      from the predictions of the epoch before       FAT, FAAL    from the batch alone

Example:
    >>> from ferdlib.methods import SAT, rules
    >>> SAT(num_classes=3, rule=rules.DAFA(strength=1.5)).rule.weights  # until its 70th epoch
    tensor([1., 1., 1.], dtype=torch.float64)
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ferdlib import _checks, metrics, reweight
from ferdlib._checks import InvalidState, public
from ferdlib._modes import borrowed
from ferdlib.attacks import StepCounter, pgd
from ferdlib.distributed import Ranks
from ferdlib.losses import class_variance, cross_entropy
from ferdlib.methods.protocol import Adversarial, Ball, Batches, OnStep, Rule, Uniform
from ferdlib.reweight import ClassMean, ClassWeights, FRLWeights, HedgeWeights

__all__ = ["CFA", "DAFA", "FAAL", "FAT", "FRL", "GAIRAT", "LPS", "WAT", "Rule", "Uniform"]

Count = Literal["first", "correct"]

# A class that DAFA's strength would push to a weight of 0 or less gets this one, by a lower strength.
LEAST_WEIGHT = 0.05


@dataclass(kw_only=True)
class LPS(Rule):
    r"""Fair-ARD's reweighting by least PGD steps (Yue et al. 2023, Eq. 5-7).

    Last epoch's class means $\kappa_c$ of the steps give this epoch's weights $\omega_c$, of mean 1, which
    multiply the whole loss. Steps are counted against the label, also where the attack aims at a teacher's logits.

    Attributes:
        function: `reweight.lps_power` (Fair-ARD's), `lps_linear`, `lps_sigmoid` or `lps_tanh`.
        beta: exponent >= 0 of "power"; at 0 the method is the plain one.
        shift: of "sigmoid" and "tanh".
        count: "first" crossing (paper), or the number of iterates that are still "correct" (release).
        clip: limits of the weights after normalisation; the release's are (5/6, 5/2), the paper has none.
        class_weights: the weights, and the statistic of the epoch so far.
    """

    function: Literal["power", "linear", "sigmoid", "tanh"] = "power"
    beta: float = 2.0
    shift: float = 0.0
    count: Count = "first"
    clip: tuple[float, float] | None = None
    steps: int = field(default=0, init=False, repr=False)
    class_weights: ClassWeights = field(init=False, repr=False)

    stateful: ClassVar[tuple[str, ...]] = (*Rule.stateful, "steps", "class_weights")

    def check(self) -> None:
        _checks.choice(("power", "linear", "sigmoid", "tanh"), function=self.function)
        _checks.choice(("first", "correct"), count=self.count)
        _checks.real(0, beta=self.beta)
        _checks.real(shift=self.shift)
        if self.clip is not None:
            _checks.pair(0, clip=self.clip)

    def bind(self, num_classes: int) -> None:
        super().bind(num_classes)
        self.class_weights = ClassWeights(num_classes, self.weigh)

    def weigh(self, kappa: Tensor) -> Tensor:
        """Class weights from the class means of the steps."""
        steps, shift = self.steps, self.shift
        functions = {
            "power": partial(reweight.lps_power, beta=self.beta),
            "linear": partial(reweight.lps_linear, steps=steps),
            "sigmoid": partial(reweight.lps_sigmoid, steps=steps, shift=shift),
            "tanh": partial(reweight.lps_tanh, steps=steps, shift=shift),
        }
        return reweight.normalize(functions[self.function](kappa), clip=self.clip)

    def watch(self, targets: Tensor, steps: int) -> OnStep:
        counter, self.steps = StepCounter(targets, steps, count=self.count), steps

        def on_step(step: int, x_adv: Tensor, logits: Any) -> None:
            counter(step, x_adv, logits)
            # With the last forward of the attack the counts are complete.
            if step == steps - 1:
                self.class_weights.update(counter.counts, targets)

        return on_step

    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return self.class_weights.weights.to(losses)[targets] * losses

    @public
    def end_epoch(self) -> None:
        if not bool(self.class_weights.counts.any()):
            raise InvalidState(
                "expected examples of the method's own attack, whose steps are counted, got none in epoch "
                f"{self.epoch}"
            )
        self.class_weights.step()
        super().end_epoch()


@dataclass(kw_only=True)
class GAIRAT(Rule):
    """GAIRAT's weights: each sample by its own least steps, within its batch (`reweight.gairat`).

    They multiply the whole loss of the sample; in GAIRAT's paper that is the adversarial cross-entropy.

    Attributes:
        shift: of the tanh.
        begin: epochs without weights.
    """

    shift: float = -1.0
    begin: int = 60
    counter: StepCounter | None = field(default=None, init=False, repr=False)

    def check(self) -> None:
        _checks.real(shift=self.shift)
        _checks.integer(0, begin=self.begin)

    def watch(self, targets: Tensor, steps: int) -> OnStep:
        self.counter = StepCounter(targets, steps, count="correct")
        return self.counter

    @public
    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        if self.epoch < self.begin:
            return losses
        counter = self.counter
        # Examples from elsewhere come with other labels than the last attack's.
        if counter is None or not torch.equal(counter.labels, targets):
            raise InvalidState(
                "expected examples of the method's own attack, whose steps are counted, got others"
            )
        weights = reweight.gairat(counter.counts, counter.steps, shift=self.shift)
        return weights.to(losses) * losses


@dataclass(kw_only=True)
class FAT(Rule):
    """FAT's regulariser: plus the variance over classes of the adversarial cross-entropy.

    `losses.class_variance` of the student's cross-entropy on the adversarial images, whatever the method's loss,
    over the classes of the batch.

    Attributes:
        variance_weight: weight >= 0 of the variance.
    """

    variance_weight: float = 0.1

    def check(self) -> None:
        _checks.real(0, variance_weight=self.variance_weight)

    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        risk = cross_entropy(logits, targets)
        return losses + self.variance_weight * class_variance(
            risk, targets, num_classes=self.num_classes
        )


@dataclass(kw_only=True)
class FAAL(Rule):
    """FAAL's weights: the worst case within a KL ball around equal ones (`reweight.kl_ball`).

    The scores are class means of the margin by which the adversarial images are lost; the weights multiply the
    whole loss.

    Attributes:
        radius: radius >= 0 of the ball.
    """

    radius: float = 0.5

    def check(self) -> None:
        _checks.real(0, radius=self.radius)

    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        p = logits.detach().float().softmax(dim=1)
        own = p.gather(1, targets[:, None]).squeeze(1)
        others = p.scatter(1, targets[:, None], -1.0).amax(dim=1)
        lead = ClassMean(self.num_classes)
        lead.update(others - own, targets)
        weights = self.num_classes * reweight.kl_ball(lead.compute(), radius=self.radius)
        return weights.to(losses)[targets] * losses


@dataclass(kw_only=True)
class CFA(Rule):
    """CFA's calibration: a radius and a mixture of losses for each class, from its robust accuracy.

    A class that is robust gets the larger radius (`reweight.cfa_margins`) and more of the robust loss
    (`reweight.cfa_mixing`): the whole loss of the method stands for that, the cross-entropy beside it is taken on
    the adversarial images. The accuracy is that of the last epoch's training, under the classes' own radii.
    CFA's weight averaging is `FairAverage`.

    Attributes:
        beta: of the mixture, >= 0.
        margin_base, mixing_base: CFA's lambda_1 and lambda_2, >= 0.
        begin: epochs with equal radii and the method's loss alone.
        accuracy: robust accuracy of the last epoch, float64 `(K,)`, `nan` for an absent class.
    """

    beta: float = 6.0
    margin_base: float = 0.5
    mixing_base: float = 0.5
    begin: int = 10
    accuracy: Tensor = field(init=False, repr=False)
    correct: ClassMean = field(init=False, repr=False)

    stateful: ClassVar[tuple[str, ...]] = (*Rule.stateful, "accuracy", "correct")

    def check(self) -> None:
        _checks.real(0, beta=self.beta, margin_base=self.margin_base, mixing_base=self.mixing_base)
        _checks.integer(0, begin=self.begin)

    def bind(self, num_classes: int) -> None:
        super().bind(num_classes)
        self.accuracy = torch.full((num_classes,), torch.nan, dtype=torch.float64)
        self.correct = ClassMean(num_classes)

    def ball(self, eps: float, step_size: float, targets: Tensor) -> Ball:
        if self.epoch < self.begin:
            return eps, step_size
        factors = reweight.cfa_margins(self.accuracy, base=self.margin_base).to(targets.device)
        return eps * factors[targets], step_size * factors[targets]

    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        self.correct.update((logits.argmax(dim=1) == targets).float(), targets)
        if self.epoch < self.begin:
            return losses
        mixing = reweight.cfa_mixing(self.accuracy, beta=self.beta, base=self.mixing_base)
        share = mixing.to(losses)[targets]
        return (1 - share) * cross_entropy(logits, targets) + share * losses

    def end_epoch(self) -> None:
        super().end_epoch()
        self.accuracy = self.correct.compute().double().cpu()
        self.correct.reset()


@dataclass(kw_only=True)
class DAFA(Rule):
    """DAFA's weights and radii, from how likely classes are taken for one another.

    After `begin` epochs the mean predictions on the adversarial images of the last one give the weights
    (`reweight.confusion_weights`), once; they multiply the whole loss (in the paper the clean cross-entropy), the
    radius and the step.

    Where that would give a class a weight of 0 or less, it would unlearn its examples. Cutting off would move the
    mean: the strength is lowered until the smallest weight is 0.05, and the log `ferdlib` warns.

    Attributes:
        strength: lambda >= 0; 1.5 for CIFAR-100 in the paper.
        begin: epochs before, at least 1.
        weights: float64 `(K,)` of mean 1, ones until then.
    """

    strength: float = 1.0
    begin: int = 70
    weights: Tensor = field(init=False, repr=False)
    sums: Tensor = field(init=False, repr=False)

    stateful: ClassVar[tuple[str, ...]] = (*Rule.stateful, "weights", "sums")

    def check(self) -> None:
        _checks.real(0, strength=self.strength)
        _checks.integer(1, begin=self.begin)

    def bind(self, num_classes: int) -> None:
        super().bind(num_classes)
        self.weights = torch.ones(num_classes, dtype=torch.float64)
        self.sums = torch.zeros(num_classes, num_classes, dtype=torch.float64)

    def ball(self, eps: float, step_size: float, targets: Tensor) -> Ball:
        factors = self.weights.to(targets.device)[targets]
        return eps * factors, step_size * factors

    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        if self.epoch == self.begin - 1:
            p = logits.detach().double().softmax(dim=1)
            self.sums = self.sums.to(p.device).index_add(0, targets, p)
        return self.weights.to(losses)[targets] * losses

    def sync(self) -> None:
        self.sums = Ranks.here().total(self.sums)

    def end_epoch(self) -> None:
        if self.epoch == self.begin - 1:
            # The row of an absent class is 0 / 0, which `confusion_weights` takes for one.
            self.weights = self._weigh((self.sums / self.sums.sum(dim=1, keepdim=True)).cpu())
            self.sums = torch.zeros_like(self.sums)
        super().end_epoch()

    def _weigh(self, p: Tensor) -> Tensor:
        # No class gives more than K - 1, so that at the strength 1 / K all weights are positive.
        change = len(p) * (reweight.confusion_weights(p, strength=1 / len(p)) - 1)
        most, strength = -float(change.min()), self.strength
        if strength * most >= 1:
            strength = (1 - LEAST_WEIGHT) / most
            message = "DAFA: strength %g would give class %d the weight %.3g; lowered to %.4g"
            worst = (int(change.argmin()), 1 - self.strength * most)
            logging.getLogger("ferdlib").warning(message, self.strength, *worst, strength)
        return reweight.confusion_weights(p, strength=strength)


@dataclass(kw_only=True)
class HeldOut(Rule):
    """A rule that ends no epoch without `validate`: the method would be the plain one."""

    validated: bool = field(default=False, init=False, repr=False)

    needs_validation: ClassVar[bool] = True

    def validate(self, method: Adversarial, student: nn.Module, batches: Batches) -> None:
        self.measure(method, student, batches)
        self.validated = True

    def measure(self, method: Adversarial, student: nn.Module, batches: Batches) -> None:
        """Learn from the images, without a trace in student and method."""
        raise NotImplementedError(f"{type(self).__name__}: expected a subclass that measures")

    @public
    def end_epoch(self) -> None:
        if not self.validated:
            raise InvalidState(
                "expected validate(student, batches) on held-out images before it, got none in epoch "
                f"{self.epoch}"
            )
        self.validated = False
        super().end_epoch()


@dataclass(kw_only=True)
class FRL(HeldOut):
    """FRL's Lagrange multipliers for each class's natural and boundary error (`reweight.FRLWeights`).

    FRL weighs the clean cross-entropy by the former, TRADES' KL by the latter. The loss of a method stands for
    the robust error, which is their sum: its weight is their mean. With `remargin` the radius of a class grows
    with its boundary error. The errors are measured with PGD-20 at the method's radius.

    Attributes:
        slack: both errors may exceed their mean by so much, >= 0; FRL's code has 0.07 with `remargin`.
        remargin: also change the radii.
    """

    slack: float = 0.1
    remargin: bool = False
    multipliers: FRLWeights = field(init=False, repr=False)

    stateful: ClassVar[tuple[str, ...]] = (*Rule.stateful, "multipliers")

    def check(self) -> None:
        _checks.real(0, slack=self.slack)
        _checks.instance(bool, remargin=self.remargin)

    def bind(self, num_classes: int) -> None:
        super().bind(num_classes)
        slacks = {"clean_slack": self.slack, "boundary_slack": self.slack}
        self.multipliers = FRLWeights(num_classes, **slacks, remargin=self.remargin)

    def ball(self, eps: float, step_size: float, targets: Tensor) -> Ball:
        if not self.remargin:
            return eps, step_size
        factors = self.multipliers.eps_factors.to(targets.device)
        return eps * factors[targets], eps * float(factors.max()) / 4

    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        weights = (self.multipliers.clean_weights + self.multipliers.boundary_weights) / 2
        return weights.to(losses)[targets] * losses

    def measure(self, method: Adversarial, student: nn.Module, batches: Batches) -> None:
        ball: dict[str, Any] = {"eps": method.eps, "step_size": method.step_size}
        counts = torch.zeros(2, self.num_classes, self.num_classes, dtype=torch.int64)
        with torch.no_grad(), borrowed(student):
            for x, y in batches:
                x_adv = pgd(student, x, y, **ball, steps=20, rng=method.rng)
                for k, images in enumerate((x, x_adv)):
                    predicted = student(images).argmax(dim=1)
                    counts[k] += metrics.confusion_matrix(predicted, y, self.num_classes).cpu()
        self.multipliers.update(*(metrics.class_accuracy(matrix) for matrix in counts))


@dataclass(kw_only=True)
class WAT(HeldOut):
    """WAT's hedge over the classes and the mean over samples (`reweight.HedgeWeights`).

    The experts' losses are the method's own on held-out images, summed over epochs; the weights multiply the whole
    loss.

    Attributes:
        rate: eta >= 0.
    """

    rate: float = 0.1
    hedge: HedgeWeights = field(init=False, repr=False)

    stateful: ClassVar[tuple[str, ...]] = (*Rule.stateful, "hedge")

    def check(self) -> None:
        _checks.real(0, rate=self.rate)

    def bind(self, num_classes: int) -> None:
        super().bind(num_classes)
        self.hedge = HedgeWeights(num_classes, rate=self.rate)

    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        weights = self.hedge.class_weights.to(losses)[targets]
        return (weights + self.hedge.average_weight) * losses

    def measure(self, method: Adversarial, student: nn.Module, batches: Batches) -> None:
        # A copy of the method without this rule, in eval mode: what it learns is thrown away with it.
        plain = replace(method, rule=Uniform(), train_mode=False)
        plain.load_state_dict(method.state_dict() | {"rule": plain.rule.state_dict()})
        means = ClassMean(self.num_classes)
        with borrowed(student):
            for x, y in batches:
                reference = plain.reference(x)
                x_adv = plain.attack(student, x, y, reference)
                with torch.no_grad():
                    means.update(plain.loss(student, x, x_adv, y, reference), y)
        average = float(means.sums.sum() / means.counts.sum())
        self.hedge.update(means.compute().double().cpu(), average)
