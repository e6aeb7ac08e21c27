"""Class probabilities from adversarial margins on the teacher (FERD Eq. 1 and 2)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ferdlib import losses, reweight
from ferdlib.attacks import least_pgd_steps, pgd
from ferdlib.distributed import Ranks
from ferdlib.methods.protocol import teacher_logits
from ferdlib.synthesis.health import NonFiniteError
from ferdlib.trainer.config import FERDConfig

LOG = logging.getLogger("ferdlib")

Rule = Callable[[Tensor], Tensor]


class ClassProbabilities:
    """Probabilities p that follow a statistic of the classes.

    Args:
        config: the statistic and its average over epochs.
        rule: statistic `(K,)` to probabilities, up to normalisation; None leaves p uniform.
        teacher: the model that is attacked.
        rng: source of the attack's start, in the same state on all processes.
        ranks: the processes whose images count together.

    Attributes:
        statistic: mean margin or least PGD steps of each class, `(K,)`; nan for one never seen.
    """

    def __init__(
        self,
        config: FERDConfig,
        rule: Rule | None,
        teacher: nn.Module,
        rng: torch.Generator,
        ranks: Ranks,
    ) -> None:
        self.config, self.rule, self.teacher = config, rule, teacher
        self.rng, self.ranks = rng, ranks
        self.statistic = torch.full(
            (config.num_classes,), torch.nan, dtype=torch.float64, device="cpu"
        )

    def update(self, p: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the next p, from images x made for labels y; the last one if there is no rule.

        Raises:
            NonFiniteError: the teacher's logits.
        """
        if self.rule is None:
            return p
        self.statistic = self._averaged(self._class_means(x, y))
        p = reweight.normalize(self.rule(self.statistic), to="sum").float()
        # A class that takes over starves the others of images, and its margin feeds itself.
        largest = float(p.max())
        if largest > max(0.5, 2 / self.config.num_classes):
            LOG.warning(
                "FERDTrainer: class %d has probability %.2f; raise `class_floor` or `reweight_temperature`",
                int(p.argmax()),
                largest,
            )
        return p

    def _averaged(self, means: Tensor) -> Tensor:
        """Fill in classes without samples, and keep a share of the last statistic."""
        config, last = self.config, self.statistic
        if config.absent_classes == "zero":
            means = means.nan_to_num(nan=0.0)
        elif config.absent_classes == "previous":
            means = torch.where(means.isnan(), last, means)
        if config.margin_ema == 0:
            return means
        # A class that was never seen before starts from its first mean.
        kept = torch.where(last.isnan(), means, last)
        return config.margin_ema * kept + (1 - config.margin_ema) * means

    def _class_means(self, x: Tensor, y: Tensor) -> Tensor:
        """Class means of the adversarial margin (Eq. 2 without its sign) or of the least PGD steps."""
        config = self.config
        if config.margin_labels == "teacher":
            y = self._finite(teacher_logits(self.teacher, x)).argmax(dim=1)
        # Sums and counts of each class, which add up over processes where means would not.
        means = reweight.ClassMean(config.num_classes)
        try:
            means.update(self._values(x, y), y)
        except RuntimeError as error:
            # An attack refuses a teacher that is not finite, on this process only and in words of its own.
            if bool(teacher_logits(self.teacher, x).isfinite().all()):
                raise
            raise _not_finite() from error
        self.ranks.add_to(means)
        return means.compute().cpu()

    def _values(self, x: Tensor, y: Tensor) -> Tensor:
        """Margin (Eq. 1) or least PGD steps of each image."""
        config = self.config
        settings: dict[str, Any] = {"eps": config.eps, "step_size": config.step_size}
        settings |= {"steps": config.margin_attack_steps, "random_start": self._start(x)}
        if config.reweighting.startswith("lps"):
            return least_pgd_steps(self.teacher, x, y, **settings)[1]
        x_adv = pgd(self.teacher, x, y, **settings)
        logits = self._finite(teacher_logits(self.teacher, x_adv))
        confidence = logits if config.margin_on == "logits" else logits.softmax(dim=1)
        return losses.margin(confidence, y)

    def _start(self, x: Tensor) -> Tensor:
        """Draw the attack's start for the global batch, uniformly in the ball, and take this process's."""
        # Drawn where the generator is, then moved: the same numbers on every device.
        shape = (len(x) * self.ranks.size, *x.shape[1:])
        noise = torch.empty(shape, dtype=x.dtype, device=self.rng.device)
        noise.uniform_(-self.config.eps, self.config.eps, generator=self.rng)
        return self.ranks.part(noise).to(x.device)

    def _finite(self, logits: Tensor) -> Tensor:
        """Refuse logits that are not finite; the host reads the class means anyway, so it costs no wait."""
        if not bool(self.ranks.everywhere(logits.isfinite().all())):
            raise _not_finite()
        return logits


def _not_finite() -> NonFiniteError:
    return NonFiniteError(
        "FERDTrainer.update_class_probabilities: expected finite logits of `teacher`, got NaN or infinity",
        part="margins",
        step=1,
        losses={},
    )
