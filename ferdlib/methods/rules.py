"""Rules that reweigh the classes of any method: `RSLAD(num_classes=10, teacher=teacher, rule=rules.DAFA())`.

    LPS, GAIRAT    from the steps of the method's own attack      FRL, WAT     from held-out images
    CFA, DAFA      from the predictions of the epoch before       FAT, FAAL    from the batch alone

Fair-ARD puts LPS, its own, onto four methods and the others onto ARD (its Table 4); here each goes with every
method. Where a rule's paper leaves open which terms of a method it acts on, its docstring says what is done.

Example:
    >>> from ferdlib.methods import SAT, rules
    >>> SAT(num_classes=3, rule=rules.DAFA(strength=1.5)).rule.weights  # until its 70th epoch
    tensor([1., 1., 1.], dtype=torch.float64)
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ferdlib import _checks, metrics, reweight
from ferdlib._checks import InvalidState, public
from ferdlib._modes import ask, borrowed
from ferdlib.attacks import StepCounter, pgd
from ferdlib.distributed import Ranks
from ferdlib.losses import class_variance, cross_entropy
from ferdlib.methods.protocol import Adversarial, Ball, Batches, OnStep, Rule, Uniform
from ferdlib.reweight import ClassMean, ClassWeights, FRLWeights, HedgeWeights
from ferdlib.reweight.fairness import worst_case

__all__ = ["CFA", "DAFA", "FAAL", "FAT", "FRL", "GAIRAT", "LPS", "WAT", "Rule", "Uniform"]


@dataclass(kw_only=True)
class LPS(Rule):
    r"""Fair-ARD's weights from the least PGD steps that fool a sample (Yue et al. 2023, Eq. 5-7).

    Last epoch's class means $\kappa_c$ of the steps give this epoch's weights $\omega_c$, of mean 1, of the
    whole loss. Steps are counted against the label, also where the attack aims at logits.

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
    count: Literal["first", "correct"] = "first"
    clip: tuple[float, float] | None = None
    steps: int = field(default=0, init=False, repr=False)
    class_weights: ClassWeights = field(init=False, repr=False)
    stateful = ("epoch", "steps", "class_weights")

    def check(self) -> None:
        _checks.choice(("power", "linear", "sigmoid", "tanh"), function=self.function)
        _checks.choice(("first", "correct"), count=self.count)
        _checks.real(0, beta=self.beta)
        _checks.real(shift=self.shift)
        _checks.pair(0, clip=(0, 1) if self.clip is None else self.clip)

    def bind(self, num_classes: int) -> None:
        super().bind(num_classes)
        self.class_weights = ClassWeights(num_classes, self.weigh)

    def weigh(self, kappa: Tensor) -> Tensor:
        """Class weights from the class means of the steps."""
        if self.function == "power":
            weights = reweight.lps_power(kappa, beta=self.beta)
        elif self.function == "linear":
            weights = reweight.lps_linear(kappa, self.steps)
        else:
            ramp = reweight.lps_tanh if self.function == "tanh" else reweight.lps_sigmoid
            weights = ramp(kappa, self.steps, shift=self.shift)
        return reweight.normalize(weights, clip=self.clip)

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
            raise InvalidState(f"expected the method's own attack, got none in epoch {self.epoch}")
        self.class_weights.step()
        super().end_epoch()


@dataclass(kw_only=True)
class GAIRAT(Rule):
    """GAIRAT's weights: each sample by its own least steps, within its batch (`reweight.gairat`).

    They multiply the whole loss of the sample, in GAIRAT's paper the adversarial cross-entropy, after `begin`
    epochs without weights.
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
        # Examples from elsewhere come with other labels than those of the last attack.
        counter = self.counter
        same = None
        if counter is not None and counter.labels.shape == targets.shape:
            same = (counter.labels == targets).all()
        if counter is None or same is None or (_checks.readable(same) and not bool(same)):
            raise InvalidState("expected images of the method's own attack, with steps, got others")
        weights = reweight.gairat(counter.counts, counter.steps, shift=self.shift)
        return _checks.marked(weights.to(losses) * losses, same)


@dataclass(kw_only=True)
class FAT(Rule):
    """FAT's regulariser: plus the variance over classes of the adversarial cross-entropy.

    `losses.class_variance` over the classes of the batch, times a weight >= 0, whatever the method's loss.
    """

    variance_weight: float = 0.1

    def check(self) -> None:
        _checks.real(0, variance_weight=self.variance_weight)

    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        risk = cross_entropy(logits, targets)
        variance = class_variance(risk, targets, num_classes=self.num_classes)
        return losses + self.variance_weight * variance


@dataclass(kw_only=True)
class FAAL(Rule):
    """FAAL's weights: the worst case within a KL ball around equal ones (`reweight.kl_ball`).

    The weights multiply the whole loss; the scores are class means of the margin by which images are lost.
    """

    radius: float = 0.5

    def check(self) -> None:
        _checks.real(0, radius=self.radius)

    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        p, label = logits.detach().float().softmax(dim=1), targets[:, None]
        # A probability of -1 is never the largest of the others.
        others = p.scatter(1, label, -1.0).amax(dim=1)
        lead = ClassMean(self.num_classes)
        lead.update(others - p.gather(1, label).squeeze(1), targets)
        weights = self.num_classes * worst_case(lead.sums / lead.counts, self.radius)
        return weights.to(losses)[targets] * losses


@dataclass(kw_only=True)
class CFA(Rule):
    """CFA's calibration: a radius and a mixture of losses for each class, from its robust accuracy.

    A class that is robust gets the larger radius (`reweight.cfa_margins`) and more of the robust loss
    (`reweight.cfa_mixing`): the whole loss of the method stands for that, and the cross-entropy beside it is
    taken on the adversarial images. CFA's weight averaging is `FairAverage`.

    Attributes:
        beta, margin_base, mixing_base: >= 0; the bases are CFA's lambda_1 and lambda_2.
        begin: epochs with equal radii and the method's loss alone.
        accuracy: robust training accuracy of the last epoch, float64 `(K,)`, `nan` for an absent class.
    """

    beta: float = 6.0
    margin_base: float = 0.5
    mixing_base: float = 0.5
    begin: int = 10
    accuracy: Tensor = field(init=False, repr=False)
    correct: ClassMean = field(init=False, repr=False)
    stateful = ("epoch", "accuracy", "correct")

    def check(self) -> None:
        _checks.real(0, **_checks.named(self, "beta", "margin_base", "mixing_base"))
        _checks.integer(0, begin=self.begin)

    def bind(self, num_classes: int) -> None:
        super().bind(num_classes)
        self.accuracy = torch.full((num_classes,), torch.nan, dtype=torch.float64, device="cpu")
        self.correct = ClassMean(num_classes)

    def ball(self, eps: float, step_size: float, targets: Tensor) -> Ball:
        if self.epoch < self.begin:
            return eps, step_size
        factors = reweight.cfa_margins(self.accuracy, base=self.margin_base)
        factors = _checks.double(factors, targets.device)
        return eps * factors[targets], step_size * factors[targets]

    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        # Counted from the first epoch on, so that the radii are ready when they begin.
        self.correct.update((logits.argmax(dim=1) == targets).float(), targets)
        if self.epoch < self.begin:
            return losses
        mixing = reweight.cfa_mixing(self.accuracy, beta=self.beta, base=self.mixing_base)
        share = mixing.to(losses)[targets]
        return (1 - share) * cross_entropy(logits, targets) + share * losses

    def end_epoch(self) -> None:
        super().end_epoch()
        self.accuracy = self.correct.compute().cpu().double()
        self.correct.reset()


@dataclass(kw_only=True)
class DAFA(Rule):
    """DAFA's weights and radii, from how likely classes are taken for one another.

    After `begin` epochs the mean predictions on the adversarial images of the last one give the weights
    (`reweight.confusion_weights`), once. They multiply the whole loss (in the paper the clean cross-entropy), the
    radius and the step. A class with a weight of 0 or less would unlearn its images, and cutting off would move
    the mean: the strength is lowered until the smallest weight is 0.05, and the log `ferdlib` warns.

    Attributes:
        strength: lambda >= 0; 1.5 for CIFAR-100 in the paper.
        begin: epochs before, at least 1.
        weights: float64 `(K,)` of mean 1, ones until then.
    """

    strength: float = 1.0
    begin: int = 70
    weights: Tensor = field(init=False, repr=False)
    sums: Tensor = field(init=False, repr=False)
    stateful = ("epoch", "weights", "sums")

    def check(self) -> None:
        _checks.real(0, strength=self.strength)
        _checks.integer(1, begin=self.begin)

    def bind(self, num_classes: int) -> None:
        super().bind(num_classes)
        self.weights = torch.ones(num_classes, dtype=torch.float64, device="cpu")
        self.sums = torch.zeros(num_classes, num_classes, dtype=torch.float64, device="cpu")

    def ball(self, eps: float, step_size: float, targets: Tensor) -> Ball:
        factors = _checks.double(self.weights, targets.device)[targets]
        return eps * factors, step_size * factors

    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        if self.epoch == self.begin - 1:
            p = _checks.double(logits.detach()).softmax(dim=1)
            self.sums = _checks.double(self.sums, p.device).index_add(0, targets, p)
        return self.weights.to(losses)[targets] * losses

    def sync(self) -> None:
        self.sums = Ranks.here().total(self.sums)

    def end_epoch(self) -> None:
        if self.epoch == self.begin - 1:
            # The row of an absent class is 0 / 0, which `confusion_weights` takes for one.
            self.weights = self.weigh((self.sums / self.sums.sum(dim=1, keepdim=True)).cpu())
            self.sums = torch.zeros_like(self.sums)
        super().end_epoch()

    def weigh(self, p: Tensor) -> Tensor:
        """Class weights from the mean predictions `(K, K)`, all above 0."""
        # No class gives more than K - 1, so that at the strength 1 / K all weights are positive.
        change = len(p) * (reweight.confusion_weights(p, strength=1 / len(p)) - 1)
        most, strength = -float(change.min()), self.strength
        if strength * most >= 1:
            # The class that loses most keeps 0.05.
            strength, worst = 0.95 / most, int(change.argmin())
            message = "DAFA: strength %g would leave class %d no weight; lowered to %.4g"
            logging.getLogger("ferdlib").warning(message, self.strength, worst, strength)
        return reweight.confusion_weights(p, strength=strength)


@dataclass(kw_only=True)
class FRL(Rule):
    """FRL's Lagrange multipliers for each class's natural and boundary error (`reweight.FRLWeights`).

    FRL weighs the clean cross-entropy by the former and TRADES' KL by the latter; a method's loss stands for
    their sum, and is weighed by their mean. The errors are those of PGD-20 at the method's radius.

    Attributes:
        slack: both errors may exceed their mean by so much, >= 0; FRL's code has 0.07 with `remargin`.
        remargin: also let the radius of a class grow with its boundary error.
    """

    slack: float = 0.1
    remargin: bool = False
    multipliers: FRLWeights = field(init=False, repr=False)
    stateful = ("epoch", "multipliers")
    needs_validation = True

    def check(self) -> None:
        _checks.real(0, slack=self.slack)
        _checks.instance(bool, remargin=self.remargin)

    def bind(self, num_classes: int) -> None:
        super().bind(num_classes)
        slacks = dict.fromkeys(("clean_slack", "boundary_slack"), self.slack)
        self.multipliers = FRLWeights(num_classes, **slacks, remargin=self.remargin)

    def ball(self, eps: float, step_size: float, targets: Tensor) -> Ball:
        if not self.remargin:
            return eps, step_size
        factors = self.multipliers.eps_factors
        # The release's step is a quarter of its largest radius, for all classes. Read where the factors lie.
        largest = float(factors.max())
        return eps * _checks.double(factors, targets.device)[targets], eps * largest / 4

    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        weights = (self.multipliers.clean_weights + self.multipliers.boundary_weights) / 2
        return weights.to(losses)[targets] * losses

    def validate(self, method: Adversarial, student: nn.Module, batches: Batches) -> None:
        settings = _checks.named(method, "eps", "step_size", "rng")
        k = self.num_classes
        counts = torch.zeros(2, k, k, dtype=torch.int64, device="cpu")
        with torch.no_grad(), borrowed(student):
            for x, y in batches:
                x_adv = pgd(student, x, y, steps=20, **settings)
                for k, images in enumerate((x, x_adv)):
                    predicted = ask(student, images).argmax(dim=1)
                    counts[k] += metrics.confusion_matrix(predicted, y, self.num_classes).cpu()
        self.multipliers.update(*(metrics.class_accuracy(matrix) for matrix in counts))


@dataclass(kw_only=True)
class WAT(Rule):
    """WAT's hedge over the classes and the mean over samples (`reweight.HedgeWeights`).

    The experts' losses are the method's own on held-out images, summed over epochs; the weights, with the rate
    eta >= 0, multiply the whole loss.
    """

    rate: float = 0.1
    hedge: HedgeWeights = field(init=False, repr=False)
    stateful = ("epoch", "hedge")
    needs_validation = True

    def check(self) -> None:
        _checks.real(0, rate=self.rate)

    def bind(self, num_classes: int) -> None:
        super().bind(num_classes)
        self.hedge = HedgeWeights(num_classes, rate=self.rate)

    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        weights = self.hedge.class_weights.to(losses)[targets]
        return (weights + self.hedge.average_weight) * losses

    def validate(self, method: Adversarial, student: nn.Module, batches: Batches) -> None:
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
        # Over samples: the mean of the class means would weigh a rare class like a common one.
        average = float(means.sums.sum() / means.counts.sum())
        self.hedge.update(means.compute().cpu().double(), average)
