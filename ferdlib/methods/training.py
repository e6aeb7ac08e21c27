"""Robust training without a teacher: SAT, TRADES, BAT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ferdlib import _checks, losses
from ferdlib._modes import ask, logits_of
from ferdlib.attacks import pgd
from ferdlib.methods.protocol import Adversarial, Batch, Terms, teacher_logits


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

    def terms(self, student: nn.Module, batch: Batch) -> Terms:
        adv = ask(student, batch.x_adv)
        return losses.cross_entropy(adv, batch.y), adv


@dataclass(kw_only=True)
class TRADES(Adversarial):
    """TRADES (Zhang et al. 2019): cross-entropy on images, and a KL to their adversarial examples.

    The attack moves away from the student's own clean logits, taken in eval mode.

    Attributes:
        beta: weight >= 0 of the KL term, 1/lambda in the paper.
    """

    beta: float = 6.0
    random_start: Literal["uniform", "normal"] | None = "normal"

    def check(self) -> None:
        super().check()
        _checks.real(0, beta=self.beta)

    def ascend(self, student: nn.Module, batch: Batch, **settings: Any) -> Tensor:
        # The student is its own teacher here.
        own = teacher_logits(student, batch.x)
        return pgd(student, batch.x, own, loss=losses.distillation, **settings)

    def terms(self, student: nn.Module, batch: Batch) -> Terms:
        clean, adv = ask(student, batch.x), ask(student, batch.x_adv)
        return losses.trades(clean, adv, batch.y, beta=self.beta), adv


@dataclass(kw_only=True)
class BAT(TRADES):
    """Balance adversarial training (Sun et al. 2022): images on both sides of the decision boundary.

    Both lie on the path of TRADES' attack: the last iterate that is still correct and the first that is wrong
    (for a sample that is wrong from the start x itself, for one that is never fooled the last iterate). The
    attack returns them one after the other, `(2N, C, H, W)`; a rule is given the logits of the second half.

    Attributes:
        uniform_weight: weight >= 0 of the two terms that pull the predictions there to uniform.
    """

    uniform_weight: float = 1.0

    def check(self) -> None:
        super().check()
        _checks.real(0, uniform_weight=self.uniform_weight)

    def ascend(self, student: nn.Module, batch: Batch, **settings: Any) -> Tensor:
        inside, outside = batch.x.detach().clone(), batch.x.detach().clone()
        alive = torch.ones_like(batch.y, dtype=torch.bool)
        of_rule = settings.pop("on_step")

        def on_step(step: int, iterate: Tensor, output: Any) -> None:
            nonlocal alive, inside, outside
            correct, shape = logits_of(output).argmax(dim=1) == batch.y, (-1, 1, 1, 1)
            outside = torch.where((alive & ~correct).view(shape), iterate.to(outside), outside)
            alive = alive & correct
            inside = torch.where(alive.view(shape), iterate.to(inside), inside)
            if of_rule is not None and step < self.steps:
                of_rule(step, iterate, output)

        last = super().ascend(student, batch, on_step=on_step, **settings)
        # `pgd` does not evaluate its last iterate, which may be the first wrong one.
        on_step(self.steps, last, teacher_logits(student, last))
        return torch.cat([inside, torch.where(alive.view(-1, 1, 1, 1), last, outside)])

    def terms(self, student: nn.Module, batch: Batch) -> Terms:
        clean, correct, wrong = (ask(student, x) for x in (batch.x, *batch.x_adv.chunk(2)))
        weights = {"beta": self.beta, "uniform_weight": self.uniform_weight}
        return losses.bat(clean, correct, wrong, batch.y, **weights), wrong
