"""FERD's distillation stage: uniform-target adversarial examples and Eq. 11."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ferdlib import _checks, losses
from ferdlib._modes import ask
from ferdlib.attacks import utae_pgd
from ferdlib.methods.protocol import Adversarial, Batch, Reference, Terms, Uniform, teacher_logits
from ferdlib.models.stand_in import StandIn


@dataclass(kw_only=True)
class FERDDistillation(Adversarial):
    """Train a student on images and their UTAEs (FERD section 4.4, Algorithm 1, lines 15-17).

    A rule that counts steps counts those of the attacked model; `train_mode` is the student's.

    Attributes:
        teacher: gives the targets; only ever run in eval mode and without gradients.
        num_classes: K; may stay 0 where no rule needs it.
        attack_model: whose UTAEs are made: the "student"'s, away from the teacher's clean prediction
            (as RSLAD and the release do), or the "teacher"'s own (Eq. 10 to the letter).
        gamma: see `attacks.utae_pgd`.
        clean_weight, adv_weight: see `losses.ferd_distillation_loss`.
        fold_batchnorm: attack a fast copy of the student that follows it (`models.freeze_for_attack`), where
            that computes the same; its logits differ by about 1e-6. Compared on the first images of an epoch.

    Example:
        >>> import torch
        >>> from ferdlib.models import small_cnn
        >>> method = FERDDistillation(teacher=small_cnn(1, 3, width=4))
        >>> student, x, y = small_cnn(1, 3, width=2), torch.rand(2, 1, 8, 8), torch.tensor([0, 2])
        >>> method.loss(student, x, method.attack(student, x, y), y).shape
        torch.Size([2])
    """

    teacher: nn.Module
    num_classes: int = 0
    attack_model: Literal["student", "teacher"] = "student"
    gamma: float = 0.5
    random_start: Literal["uniform", "normal"] | None = "normal"
    clean_weight: float = 5 / 6
    adv_weight: float = 1 / 6
    fold_batchnorm: bool = True
    aims_at_reference = True

    def check(self) -> None:
        super().check()
        _checks.module(teacher=self.teacher)
        _checks.integer(0, num_classes=self.num_classes)
        _checks.choice(("student", "teacher"), attack_model=self.attack_model)
        _checks.real(0, **_checks.named(self, "gamma", "clean_weight", "adv_weight"))
        _checks.instance(bool, fold_batchnorm=self.fold_batchnorm)

    def bind(self) -> None:
        if self.num_classes or not isinstance(self.rule, Uniform):
            super().bind()
        self._student: StandIn | None = None

    def reference(self, x: Tensor) -> Reference:
        return teacher_logits(self.teacher, x)

    def ascend(self, student: nn.Module, batch: Batch, **settings: Any) -> Tensor:
        """UTAEs of x (Eq. 10); the labels play no part."""
        _checks.module(student=student)
        attacked = student
        if self.attack_model == "teacher":
            attacked, settings["train_mode"] = self.teacher, False
        elif self.fold_batchnorm and not self.train_mode:
            # Tracing costs more than an attack: the copy is made once, and then takes over the weights only.
            if self._student is None or self._student.model is not student:
                self._student = StandIn(student)
            self._student.follow()
            attacked = self._student.at(batch.x)
        return utae_pgd(attacked, batch.x, batch.reference, gamma=self.gamma, **settings)

    def end_epoch(self) -> None:
        super().end_epoch()
        if self._student is not None:
            self._student.due = True

    def terms(self, student: nn.Module, batch: Batch) -> Terms:
        """Eq. 11 of each sample; images and examples are two forwards of the student."""
        clean, adv = ask(student, batch.x), ask(student, batch.x_adv)
        weights = {"clean_weight": self.clean_weight, "adv_weight": self.adv_weight}
        return losses.ferd_distillation_loss(clean, adv, batch.reference, **weights), adv
