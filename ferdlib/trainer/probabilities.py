"""Class probabilities from adversarial margins on the teacher (FERD Eq. 1 and 2)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ferdlib import losses, reweight
from ferdlib._ranks import Ranks
from ferdlib.attacks import least_pgd_steps, pgd
from ferdlib.methods import FrozenTeacher
from ferdlib.synthesis.health import NonFiniteError
from ferdlib.trainer.config import FERDConfig

LOG = logging.getLogger("ferdlib")


class ClassProbabilities:
    """p and the class statistic that it follows.

    Args:
        config: which statistic, and how it is kept.
        rule: the statistic `(K,)` to probabilities, up to normalisation; None leaves p uniform.
        teacher: what is attacked.
        logits: the teacher's.
        rng: source of the attack's start.
        ranks: the processes whose images count together.
    """

    def __init__(
        self,
        config: FERDConfig,
        rule: Callable[[Tensor], Tensor] | None,
        teacher: nn.Module,
        logits: FrozenTeacher,
        rng: torch.Generator,
        ranks: Ranks,
    ) -> None:
        self.config, self.rule, self.rng, self.ranks = config, rule, rng, ranks
        self.teacher, self.logits = teacher, logits
        self.statistic = torch.full((config.num_classes,), torch.nan, dtype=torch.float64)

    def update(self, p: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The next p, from images x made for labels y; the last one if there is no rule.

        Raises:
            NonFiniteError: the teacher's logits.
        """
        if self.rule is None:
            return p
        config = self.config
        means = self._class_means(x, y)
        if config.absent_classes == "zero":
            means = means.nan_to_num(nan=0.0)
        elif config.absent_classes == "previous":
            means = torch.where(means.isnan(), self.statistic, means)
        if config.margin_ema > 0:
            kept = torch.where(self.statistic.isnan(), means, self.statistic)
            means = config.margin_ema * kept + (1 - config.margin_ema) * means
        self.statistic = means
        p = reweight.normalize(self.rule(means), to="sum").float()
        largest = float(p.max())
        if largest > max(0.5, 2 / config.num_classes):
            LOG.warning(
                "FERDTrainer: class %d has probability %.2f; raise `class_floor` or `reweight_temperature`",
                int(p.argmax()),
                largest,
            )
        return p

    def _class_means(self, x: Tensor, y: Tensor) -> Tensor:
        """Class means of the adversarial margin (Eq. 2 without its sign) or of the least PGD steps."""
        config = self.config
        labels = y if config.margin_labels == "sampled" else self._finite(x).argmax(dim=1)
        means = reweight.ClassMean(config.num_classes)
        try:
            means.update(self._values(x, labels), labels)
        except RuntimeError as error:  # an attack refuses a teacher that is not finite
            if not bool(self.logits(x).isfinite().all()):
                raise self._not_finite() from error
            raise
        self.ranks.add_to(means)
        return means.compute().cpu()

    def _values(self, x: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        settings: dict[str, Any] = {
            "eps": config.eps,
            "step_size": config.step_size,
            "steps": config.margin_attack_steps,
            "rng": self.rng,
        }
        if config.reweighting.startswith("lps"):
            return least_pgd_steps(self.teacher, x, labels, **settings)[1]
        logits = self._finite(pgd(self.teacher, x, labels, **settings))
        confidence = logits if config.margin_on == "logits" else logits.softmax(dim=1)
        return losses.margin(confidence, labels)

    def _finite(self, x: Tensor) -> Tensor:
        """The teacher's logits; the class means are read by the host anyway, so this costs no wait."""
        logits = self.logits(x)
        if not bool(self.ranks.everywhere(logits.isfinite().all())):
            raise self._not_finite()
        return logits

    @staticmethod
    def _not_finite() -> NonFiniteError:
        return NonFiniteError(
            "FERDTrainer.update_class_probabilities: expected finite logits of `teacher`, got NaN or infinity",
            part="margins",
            step=1,
            losses={},
        )
