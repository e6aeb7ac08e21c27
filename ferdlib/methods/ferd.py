"""FERD's distillation stage: uniform-target adversarial examples and Eq. 11."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ferdlib import _oldchecks as _checks
from ferdlib import losses
from ferdlib.attacks import utae_pgd
from ferdlib.methods.protocol import FrozenTeacher
from ferdlib.models.freeze import FrozenModel, fast_copy


@dataclass(kw_only=True)
class FERDDistillation:
    """Train a student on images and their UTAEs (FERD section 4.4, Algorithm 1, lines 15-17).

    Attributes:
        teacher: gives the targets; only ever run in eval mode and without gradients.
        attack_model: whose UTAEs are made: the "student"'s, away from the teacher's clean prediction
            (as RSLAD and the release do), or the "teacher"'s own (Eq. 10 to the letter).
        gamma, eps, step_size, steps, random_start: see `attacks.utae_pgd`.
        clean_weight, adv_weight: see `losses.ferd_distillation_loss`.
        fold_batchnorm: attack a fast copy of the student that follows it (`models.freeze_for_attack`), where
            torch.fx can trace it; its logits differ by about 1e-6.
        logits: the teacher's, computed once per batch.
        rng: source of the attack's noise.

    Raises:
        TypeError, ValueError: a setting of another type, name or range.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> teacher, student = small_cnn(1, 3, width=4), small_cnn(1, 3, width=2)
        >>> method, x = FERDDistillation(teacher=teacher), torch.rand(2, 1, 8, 8)
        >>> y = torch.tensor([0, 2])
        >>> method.loss(student, x, method.attack(student, x, y), y).shape
        torch.Size([2])
    """

    teacher: nn.Module
    attack_model: Literal["student", "teacher"] = "student"
    gamma: float = 0.5
    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    random_start: Literal["uniform", "normal"] | None = "normal"
    clean_weight: float = 5 / 6
    adv_weight: float = 1 / 6
    fold_batchnorm: bool = True
    rng: torch.Generator | None = None
    logits: FrozenTeacher = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _checks.settings("FERDDistillation", self)
        self.logits = FrozenTeacher(self.teacher)
        self._copied: nn.Module | None = None
        self._copy: nn.Module = self.teacher

    def attack(self, student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """UTAEs of x (Eq. 10); the labels play no part."""
        _checks.module("FERDDistillation.attack", "student", student)
        _checks.images("FERDDistillation.attack", x)
        return utae_pgd(
            self.teacher if self.attack_model == "teacher" else self._fast(student),
            x,
            self.logits(x),
            gamma=self.gamma,
            eps=self.eps,
            step_size=self.step_size,
            steps=self.steps,
            random_start=self.random_start,
            rng=self.rng,
        )

    def _fast(self, student: nn.Module) -> nn.Module:
        """The student as it is now, in a copy that is made once."""
        if not self.fold_batchnorm:
            return student
        if self._copied is not student:
            self._copied, self._copy = student, fast_copy(student)
        elif isinstance(self._copy, FrozenModel):
            self._copy.follow(student)
        return self._copy

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """Eq. 11 of each sample, `(N,)`; images and examples are two forwards of the student."""
        return losses.ferd_distillation_loss(
            student(x),
            student(x_adv),
            self.logits(x),
            clean_weight=self.clean_weight,
            adv_weight=self.adv_weight,
        )

    def end_epoch(self) -> None:
        """Nothing changes between FERD's epochs."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
