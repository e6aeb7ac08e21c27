"""The two halves of robust training: a method has an attack and a loss, a rule reweighs the classes.

A step, with the student in train mode, is

    reference = method.reference(x)
    x_adv = method.attack(student, x, y, reference)
    loss = method.loss(student, x, x_adv, y, reference).mean()

After an epoch come `validate(student, batches)` where `needs_validation` says so, `sync()` where processes of
`torch.distributed` train together, and `end_epoch()`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ferdlib import _checks
from ferdlib._checks import InvalidState, public
from ferdlib._modes import ask, borrowed
from ferdlib.attacks import pgd
from ferdlib.distributed import Ranks
from ferdlib.reweight import ClassMean

Batches = Iterable[tuple[Tensor, Tensor]]
Ball = tuple[float | Tensor, float | Tensor]
OnStep = Callable[[int, Tensor, Any], None]
# Clean logits (N, K) that a method aims at, if it has any.
Reference = Tensor | None
# Losses (N,), and the student's logits (N, K) on the adversarial images.
Terms = tuple[Tensor, Tensor]


@runtime_checkable
class Method(Protocol):
    """Everything that a trainer asks of a method; any object with these is one.

    What `reference(x)` returns travels as a value to `attack` and `loss` of the same images. With None they
    compute their own.
    """

    def reference(self, x: Tensor) -> Reference: ...
    def attack(
        self, student: nn.Module, x: Tensor, y: Tensor, reference: Reference = None
    ) -> Tensor: ...
    def loss(
        self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, reference: Reference = None
    ) -> Tensor: ...
    def end_epoch(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Batch(NamedTuple):
    """Images, their labels, the method's reference, and in the loss the adversarial images."""

    x: Tensor
    y: Tensor
    # Tensors where a method needs them, which knows it does: None would be noise in every signature.
    reference: Any
    x_adv: Any = None


def teacher_logits(teacher: nn.Module, x: Tensor) -> Tensor:
    """A teacher's logits in eval mode and without gradients; the teacher is given back as it was.

    Example:
        >>> teacher_logits(nn.Linear(2, 3), torch.rand(4, 2)).requires_grad
        False
    """
    with torch.no_grad(), borrowed(teacher):
        logits: Tensor = ask(teacher, x)
    return logits


class Stateful:
    """State of the attributes that `stateful` names: tensors, integers, objects with a state of their own."""

    stateful: ClassVar[tuple[str, ...]] = ("epoch",)

    def sync(self) -> None:
        """Make what each process has learnt that of all: class sums are added, other floats averaged.

        A collective call before `end_epoch`; in a single process it does nothing.
        """
        ranks = Ranks.here()
        # Tensors are not touched: they are results of `end_epoch`, the same everywhere.
        for part in _checks.named(self, *self.stateful).values():
            if isinstance(part, Stateful):
                part.sync()
            elif isinstance(part, ClassMean):
                ranks.add_to(part)
            elif hasattr(part, "state_dict") and ranks.size > 1:
                state = part.state_dict()
                for key, value in state.items():
                    if torch.is_tensor(value) and value.is_floating_point():
                        state[key] = ranks.mean(value)
                part.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that continuing needs, also in the middle of an epoch."""
        return {
            name: part.state_dict() if hasattr(part, "state_dict") else copy.deepcopy(part)
            for name, part in _checks.named(self, *self.stateful).items()
        }

    @public
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; a state that does not fit changes nothing."""
        own = self.state_dict()
        _checks.state(state, own)
        try:
            self._load(state)
        except Exception:
            # Some part may have been loaded before another one refused.
            self._load(own)
            raise

    def _load(self, state: dict[str, Any]) -> None:
        for name in self.stateful:
            part, value = getattr(self, name), state[name]
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(value)
                continue
            if not isinstance(part, Tensor):
                _checks.integer(0, **{name: value})
            setattr(self, name, copy.deepcopy(value))


@dataclass(kw_only=True)
class Rule(Stateful):
    """Base of the rules, which weigh the classes in a method; a subclass overrides what it changes.

    A rule belongs to one method, which gives it `num_classes` and calls everything else here.

    Attributes:
        num_classes: K, or 0 as long as the rule has no method.
        epoch: number of epochs that have ended.
        needs_validation: whether the method does not end an epoch without `validate`.
    """

    num_classes: int = field(default=0, init=False)
    epoch: int = field(default=0, init=False)
    validated: bool = field(default=False, init=False, repr=False)
    needs_validation: ClassVar[bool] = False

    @public
    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Refuse settings of another type, name or range."""

    @public
    def bind(self, num_classes: int) -> None:
        """Learn the number of classes; a subclass makes its statistics here."""
        if self.num_classes:
            raise InvalidState(
                "expected a rule of its own for each method, got one that another has; make a second"
            )
        self.num_classes = num_classes

    def ball(self, eps: float, step_size: float, targets: Tensor) -> Ball:
        """Radius and step of the attack, numbers or one per sample `(N,)`."""
        return eps, step_size

    def watch(self, targets: Tensor, steps: int) -> OnStep | None:
        """Return a hook for the attack's steps (`on_step` of `attacks.pgd`), or None.

        AdaAD's attack runs two models: it hands over the pair of their logits, the student's first.
        """
        return None

    def combine(self, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Reweigh a method's losses `(N,)`; `logits` are the student's on the adversarial images."""
        return losses

    def validate(self, method: Adversarial, student: nn.Module, batches: Batches) -> None:
        """Learn from images that are not trained on, without a trace in student and method."""

    @public
    def end_epoch(self) -> None:
        """Turn what the epoch has shown into what the next one uses."""
        if self.needs_validation and not self.validated:
            raise InvalidState(
                f"expected validate(student, batches) on held-out images before, got none in epoch {self.epoch}"
            )
        self.validated = False
        self.epoch += 1


@dataclass(kw_only=True)
class Uniform(Rule):
    """All classes alike."""


@dataclass(kw_only=True)
class Adversarial(Stateful):
    """A `Method` with one attack, one loss and a rule; a subclass has its own `ascend` and `terms`.

    Every start of an attack is projected to the ball and the image range, as by SAT's authors; the releases of
    ARD and IAD leave a uniform start outside the range until the first step.

    Attributes:
        num_classes: K >= 2.
        eps, step_size, steps, random_start, train_mode, rng: see `attacks.pgd`.
        rule: reweighs the classes, see `methods.rules`.
        epoch: number of epochs that have ended.
    """

    num_classes: int
    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    random_start: Literal["uniform", "normal"] | None = "uniform"
    train_mode: bool = False
    rule: Rule = field(default_factory=Uniform)
    rng: torch.Generator | None = None
    epoch: int = field(default=0, init=False)
    stateful: ClassVar[tuple[str, ...]] = ("epoch", "rule")
    # Whether the attack aims at the reference, which is computed for it if none came.
    aims_at_reference: ClassVar[bool] = False

    @public
    def __post_init__(self) -> None:
        self.check()
        self.bind()

    def check(self) -> None:
        """Refuse settings of another type, name or range."""
        _checks.real(0, eps=self.eps, step_size=self.step_size)
        _checks.integer(0, steps=self.steps)
        _checks.choice(("uniform", "normal", None), random_start=self.random_start)
        _checks.instance(bool, train_mode=self.train_mode)
        _checks.instance(Rule, rule=self.rule)
        _checks.generator(self.rng)

    def bind(self) -> None:
        """Tell the rule the number of classes; a subclass makes its statistics here."""
        _checks.integer(2, num_classes=self.num_classes)
        self.rule.bind(self.num_classes)

    def reference(self, x: Tensor) -> Reference:
        """Return the clean logits that attack and loss aim at, if there are any."""
        return None

    @public
    def attack(
        self, student: nn.Module, x: Tensor, y: Tensor, reference: Reference = None
    ) -> Tensor:
        """Adversarial images like x."""
        self._check(student, y, x=x)
        if reference is None and self.aims_at_reference:
            reference = self.reference(x)
        settings = _checks.named(self, "steps", "random_start", "train_mode", "rng")
        # The labels decide the ball and the count, whatever the attack aims at.
        settings["eps"], settings["step_size"] = self.rule.ball(self.eps, self.step_size, y)
        settings["on_step"] = self.rule.watch(y, self.steps)
        return self.ascend(student, Batch(x, y, reference), **settings)

    def ascend(self, student: nn.Module, batch: Batch, **settings: Any) -> Tensor:
        """Climb the cross-entropy by `attacks.pgd`, of which `settings` are the other arguments."""
        return pgd(student, batch.x, batch.y, **settings)

    @public
    def loss(
        self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, reference: Reference = None
    ) -> Tensor:
        """One value per sample, `(N,)`, reweighted by the rule."""
        self._check(student, y, x=x, x_adv=x_adv)
        reference = self.reference(x) if reference is None else reference
        losses, logits = self.terms(student, Batch(x, y, reference, x_adv))
        return self.rule.combine(losses, logits, y)

    def terms(self, student: nn.Module, batch: Batch) -> Terms:
        """Losses `(N,)` before the rule, and the student's logits `(N, K)` on the adversarial images."""
        raise NotImplementedError(f"{type(self).__name__}: expected a subclass with a loss")

    @property
    def needs_validation(self) -> bool:
        """True where the rule learns from images that are not trained on."""
        return self.rule.needs_validation

    @public
    def validate(self, student: nn.Module, batches: Batches) -> None:
        """Let the rule measure held-out images, before `end_epoch`; the student is left as it was."""
        _checks.callable_(student=student)
        _checks.instance(Iterable, batches=batches)
        self.rule.validate(self, student, (_checks.batch(batches=each) for each in batches))
        # Only now: an error on the way leaves the epoch open.
        self.rule.validated = True

    def end_epoch(self) -> None:
        """Count the epoch, here and in the rule."""
        # The rule first: where it refuses, the epoch is still open.
        self.rule.end_epoch()
        self.epoch += 1

    def _check(self, student: object, y: Tensor, **images: Tensor) -> None:
        _checks.callable_(student=student)
        _checks.images(**images)
        _checks.labels(y=y, num_classes=self.num_classes or None, like=images["x"])


@dataclass(kw_only=True)
class Distilled(Adversarial):
    """A method with a robust teacher, from images to logits, run in eval mode and without gradients.

    Attributes:
        kl_mean: divide divergences by K, as the releases' `KLDivLoss()` does.
    """

    teacher: nn.Module
    kl_mean: bool = False

    def check(self) -> None:
        super().check()
        _checks.module(teacher=self.teacher)
        _checks.instance(bool, kl_mean=self.kl_mean)

    def reference(self, x: Tensor) -> Reference:
        return teacher_logits(self.teacher, x)

    @property
    def kl_weight(self) -> float:
        """Factor of every divergence."""
        return 1 / self.num_classes if self.kl_mean else 1.0
