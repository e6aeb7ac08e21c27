"""Robust training without a teacher: SAT, TRADES, BAT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ferdlib import losses
from ferdlib._modes import borrowed
from ferdlib.attacks import pgd
from ferdlib.methods.base import Adversarial


@dataclass(kw_only=True)
class SAT(Adversarial):
    """Standard adversarial training (Madry et al. 2018): cross-entropy on PGD examples.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> method, student = SAT(num_classes=3, eps=0.1, step_size=0.025), small_cnn(1, 3, width=2)
        >>> x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> method.loss(student, x, method.attack(student, x, y), y).shape
        torch.Size([4])
    """

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return losses.cross_entropy(student(x_adv), y)


@dataclass(kw_only=True)
class TRADES(Adversarial):
    """TRADES (Zhang et al. 2019): cross-entropy on images, and a KL to their adversarial examples.

    Attributes:
        beta: weight of the KL term, 1/lambda in the paper.

    Example:
        >>> TRADES(num_classes=10).random_start
        'normal'
    """

    beta: float = 6.0
    random_start: Literal["uniform", "normal"] | None = "normal"

    def objective(self, student: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Away from the student's own prediction in eval mode."""
        with torch.no_grad(), borrowed(student):
            return {"targets": student(x), "loss": losses.distillation}

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return losses.trades(student(x), student(x_adv), y, beta=self.beta)


@dataclass(kw_only=True)
class BAT(TRADES):
    """Balance adversarial training: the last image before the boundary, and the first behind it.

    Both lie on the path of TRADES' attack: the last iterate that is still correct and the first that is
    wrong (for a sample that is wrong from the start x itself, for one that is never fooled the last
    iterate). The loss is `losses.bat`. The attack returns the two behind one another, `(2N, C, H, W)`.

    Attributes:
        uniform_weight: of the two terms that pull the predictions there to uniform.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> BAT(num_classes=3).attack(small_cnn(1, 3, width=2), x, y).shape
        torch.Size([8, 1, 8, 8])
    """

    uniform_weight: float = 1.0

    def attack(self, student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        arguments = self.ascent(student, x, y)
        inside, outside = x.detach().clone(), x.detach().clone()
        alive = torch.ones_like(y, dtype=torch.bool)

        def watch(step: int, iterate: Tensor, logits: Tensor) -> None:
            nonlocal alive, inside, outside
            correct, shape = logits.argmax(dim=1) == y, (-1, 1, 1, 1)
            outside = torch.where((alive & ~correct).view(shape), iterate.to(x.dtype), outside)
            alive = alive & correct
            inside = torch.where(alive.view(shape), iterate.to(x.dtype), inside)

        last = pgd(student, x, **arguments, on_step=watch)
        with torch.no_grad(), borrowed(student):
            watch(self.steps, last, student(last))
        outside = torch.where(alive.view(-1, 1, 1, 1), last, outside)
        return torch.cat([inside, outside])

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        inside, outside = x_adv.chunk(2)
        return losses.bat(
            student(x),
            student(inside),
            student(outside),
            y,
            beta=self.beta,
            uniform_weight=self.uniform_weight,
        )
