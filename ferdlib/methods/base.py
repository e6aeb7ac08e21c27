"""What the methods on labelled images share: the ball, the inner attack, the epoch, the state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ferdlib import _oldchecks as _checks
from ferdlib._ranks import Ranks
from ferdlib.attacks import least_pgd_steps, pgd
from ferdlib.losses import cross_entropy
from ferdlib.methods.protocol import FrozenTeacher
from ferdlib.reweight import ClassMean, ClassWeights, lps_power, normalize

Batches = Iterable[tuple[Tensor, Tensor]]

# What the methods' numbers are beside at least 0; a name means the same in all of them.
LIMITS: dict[str, dict[str, Any]] = {
    "num_classes": {"low": 2},
    "alpha": {"high": 1.0},
    "adv_weight": {"high": 1.0},
    "temperature": {"open_low": True},
    "shift": {"low": -math.inf},
}


@dataclass(kw_only=True)
class Adversarial:
    """A `Method` whose attack is one ascent; what the attack climbs and the loss are a subclass's.

    Attributes:
        num_classes: K >= 2.
        eps, step_size, steps, random_start, train_mode, rng: see `attacks.pgd`.
        epoch: how many epochs have ended.

    Raises:
        TypeError, ValueError: a setting of another type, name or range.
    """

    num_classes: int
    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    random_start: Literal["uniform", "normal"] | None = "uniform"
    train_mode: bool = False
    rng: Any = None
    epoch: int = field(default=0, init=False)

    # Attributes with a state of their own, beside those that the bases name.
    stateful: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        _checks.settings(type(self).__name__, self, **LIMITS)

    def objective(self, student: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        """What the attack climbs: `targets` and `loss` of `attacks.pgd`."""
        return {"targets": y, "loss": cross_entropy}

    def ball(self, y: Tensor) -> dict[str, Any]:
        """Radius and step, which may differ by class."""
        return {"eps": self.eps, "step_size": self.step_size}

    def ascent(self, student: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        """All arguments of the attack but model and images."""
        self._check_batch("attack", student, x, y)
        return {
            **self.objective(student, x, y),
            **self.ball(y),
            "steps": self.steps,
            "random_start": self.random_start,
            "train_mode": self.train_mode,
            "rng": self.rng,
        }

    def _check_batch(self, step: str, student: nn.Module, x: Tensor, y: Tensor) -> None:
        """Refuse what no attack or loss can use, in the name of the method's step."""
        function = f"{type(self).__name__}.{step}"
        _checks.callable_(function, "student", student)
        _checks.images(function, x)
        _checks.labels(
            function, y, length=len(x), num_classes=self.num_classes, device=x.device, argument="y"
        )

    def attack(self, student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images like x."""
        return pgd(student, x, **self.ascent(student, x, y))

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """One value per sample, `(N,)`."""
        raise NotImplementedError(f"{type(self).__name__}: expected a subclass with a loss")

    def sync(self) -> None:
        """Before `end_epoch`, where processes of `torch.distributed` train together, each on its images.

        What each has learnt of the classes becomes that of all: sums are added, weights averaged. A
        collective call, which does nothing in a single process.
        """
        ranks = Ranks.here()
        if ranks.size == 1:
            return
        for name in self._all_stateful():
            part = getattr(self, name)
            if isinstance(part, ClassMean):
                ranks.add_to(part)
            else:
                state = part.state_dict()
                floats = {
                    k: v for k, v in state.items() if torch.is_tensor(v) and v.is_floating_point()
                }
                part.load_state_dict(state | {k: ranks.mean(v) for k, v in floats.items()})

    def end_epoch(self) -> None:
        """Count the epoch."""
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and what the method has learnt of the classes."""
        states = {name: getattr(self, name).state_dict() for name in self._all_stateful()}
        return {"epoch": self.epoch, **states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        function = type(self).__name__
        _checks.state(function, state, self.state_dict())
        epoch = _checks.integer(function, "state['epoch']", state["epoch"], low=0)
        for name in self._all_stateful():
            getattr(self, name).load_state_dict(state[name])
        self.epoch = epoch

    @classmethod
    def _all_stateful(cls) -> dict[str, None]:
        """What the class and all its bases name: `Fair` shall not hide those of the method behind it."""
        return dict.fromkeys(name for c in cls.__mro__ for name in vars(c).get("stateful", ()))


@dataclass(kw_only=True)
class Distilled(Adversarial):
    """A method with a robust teacher, run in eval mode and without gradients.

    Attributes:
        teacher: from images to logits.
        kl_mean: divide divergences by K, as the releases' `KLDivLoss()` does.
    """

    teacher: nn.Module
    kl_mean: bool = False
    logits: FrozenTeacher = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.logits = FrozenTeacher(self.teacher)

    @property
    def kl_weight(self) -> float:
        return 1 / self.num_classes if self.kl_mean else 1.0


# A dataclass that inherited `Adversarial` would bring its defaults along, before those of the method.
if TYPE_CHECKING:
    _Mixin = Adversarial
else:
    _Mixin = object


@dataclass(kw_only=True)
class Fair(_Mixin):
    r"""Fair-ARD's reweighting, put before any method: `class FairX(Fair, X)` (Fair-ARD Eq. 5-7).

    The least steps that fool a sample are counted on the way of the method's own attack, against the
    label also where the attack aims at a teacher's logits. Last epoch's class means $\kappa_c$ give
    this epoch's weights $\omega_c \propto \kappa_c^{-\beta}$, of mean 1, which multiply the loss.

    Attributes:
        beta: $\beta \ge 0$; at 0 the method is the plain one.
        count: "first" crossing (paper) or how many iterates are still "correct" (release).
        clip: limits of the weights after normalisation; the release's are (5/6, 5/2), the paper has none.
    """

    beta: float = 2.0
    count: Literal["first", "correct"] = "first"
    clip: tuple[float, float] | None = None
    class_weights: ClassWeights = field(init=False, repr=False)

    stateful: ClassVar[tuple[str, ...]] = ("class_weights",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.class_weights = ClassWeights(self.num_classes, self.rule)

    def rule(self, kappa: Tensor) -> Tensor:
        """Class means of the steps to class weights."""
        return normalize(lps_power(kappa, beta=self.beta), clip=self.clip)

    def attack(self, student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        arguments = self.ascent(student, x, y)
        x_adv, steps = least_pgd_steps(student, x, labels=y, count=self.count, **arguments)
        self.class_weights.update(steps, y)
        return x_adv

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        self._check_batch("loss", student, x, y)
        plain = super().loss(student, x, x_adv, y)
        weights: Tensor = self.class_weights.weights.to(plain)[y]
        return weights * plain

    def end_epoch(self) -> None:
        self.class_weights.step()
        super().end_epoch()
