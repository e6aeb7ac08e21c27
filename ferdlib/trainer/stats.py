"""What an epoch did, and the signs in it that the synthetic images have collapsed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ferdlib._ranks import Ranks
from ferdlib.methods import FrozenTeacher
from ferdlib.synthesis import ImagePool

LOG = logging.getLogger("ferdlib")

# A warning below this share of the largest diversity so far, and below this label agreement.
DIVERSITY_KEPT = 0.5
LABELS_AGREE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochStats:
    """What one epoch of `FERDTrainer` did.

    Attributes:
        epoch: number of epochs done, this one included.
        warmup: whether the student was left alone.
        student_loss: mean of the distillation loss over the epoch's steps; nan in warm-up.
        learning_rate: the student's, during the epoch.
        class_probabilities: p for the next epoch's labels.
        label_agreement: share of the stored batch that the teacher assigns to the label it was made for.
        diversity: standard deviation of a pixel over the stored batch, mean over pixels; 0 is collapse.
        class_counts: how many images the pool holds of each class.
        pool_size: images stored so far.
        synthesis: the source's metrics: generator losses and the non-robust fraction for FERD's.
        seconds: wall-clock time since the epoch began, or was continued.
    """

    epoch: int
    warmup: bool
    student_loss: float
    learning_rate: float
    class_probabilities: tuple[float, ...]
    label_agreement: float
    diversity: float
    class_counts: tuple[int, ...]
    pool_size: int
    synthesis: dict[str, float]
    seconds: float


class CollapseMonitor:
    """Logs when the images of an epoch that trained the student begin to show a sign of collapse.

    Attributes:
        largest_diversity: so far.
    """

    def __init__(self) -> None:
        self.largest_diversity = 0.0
        self._known: set[str] = set()

    def watch(self, stats: EpochStats) -> None:
        """Compare an epoch with the largest diversity so far; a sign that the last one had is not repeated."""
        self.largest_diversity = max(self.largest_diversity, stats.diversity)
        signs = {} if stats.warmup else self._signs(stats)
        for name, sentence in signs.items():
            if name not in self._known:
                LOG.warning("FERDTrainer: %s", sentence)
        self._known = set(signs)

    def _signs(self, stats: EpochStats) -> dict[str, str]:
        found, epoch = {}, stats.epoch
        if stats.diversity < DIVERSITY_KEPT * self.largest_diversity:
            found["diversity"] = (
                f"the images of epoch {epoch} have a diversity of {stats.diversity:.3g}, below half of the "
                f"largest so far, {self.largest_diversity:.3g}; set `reset_generator` or `optimise_latents`, or "
                f"raise `adv_loss_weight`"
            )
        if stats.label_agreement < LABELS_AGREE:
            found["agreement"] = (
                f"the teacher sees the label of {stats.label_agreement:.0%} of the images of epoch {epoch}, "
                f"less than {LABELS_AGREE:.0%}; raise `generator_steps`, `generator_lr` or "
                f"`onehot_loss_weight`, or lower `bn_loss_weight`"
            )
        missing = [c for c, count in enumerate(stats.class_counts) if not count]
        if missing:
            found["classes"] = (
                f"after epoch {epoch} the pool has no image of {len(missing)} of {len(stats.class_counts)} "
                f"classes, the first of which is {missing[0]}; raise `class_floor` or `batch_size`, or set "
                f"`label_sampling` to 'stratified'"
            )
        return found


def of_images(
    pool: ImagePool,
    batch: tuple[Tensor, Tensor],
    teacher_logits: FrozenTeacher,
    num_classes: int,
    ranks: Ranks,
) -> dict[str, Any]:
    """The figures of `EpochStats` that are of the stored images, over all processes."""
    x, y = batch
    agree = (teacher_logits(x).argmax(dim=1) == y).float().mean()
    diversity = x.std(dim=0).mean() if len(x) > 1 else x.new_zeros(())
    counts = torch.bincount(pool.labels, minlength=num_classes)
    return {
        "label_agreement": float(ranks.mean(agree)),
        "diversity": float(ranks.mean(diversity)),
        "class_counts": tuple(ranks.total(counts).tolist()),
        "pool_size": len(pool) * ranks.size,
    }
