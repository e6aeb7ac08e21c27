"""Records of an epoch, signs that the images collapse, and the end of a run at NaN or infinity."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ferdlib._modes import ask, borrowed
from ferdlib.checkpoints import write_file
from ferdlib.distributed import Ranks
from ferdlib.synthesis import ImagePool
from ferdlib.synthesis.health import NonFiniteError, first_bad, is_finite

LOG = logging.getLogger("ferdlib")

# Warn below this share of the largest diversity so far, and below this label agreement.
DIVERSITY_KEPT = 0.5
LABELS_AGREE = 0.2

REMEDIES = {
    "generator": "lower `generator_lr` or the loss weights",
    "margins": "check the teacher on images in [0, 1]",
    "student": "lower `student_lr`",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochStats:
    """Record of one epoch of `FERDTrainer`.

    Attributes:
        epoch: number of epochs done, this one included.
        warmup: True if the student was left alone.
        student_loss: mean of the distillation loss over the epoch's steps; nan in warm-up.
        learning_rate: the student's, during the epoch.
        class_probabilities: p for the next epoch's labels.
        label_agreement: share of the stored batch that the teacher assigns to the label it was made for.
        diversity: standard deviation of a pixel over the stored batch, mean over pixels; 0 is collapse.
        class_counts: number of images of each class in the pool.
        pool_size: images stored so far.
        synthesis: the source's metrics: generator losses and the non-robust fraction for FERD's.
        seconds: wall-clock time of the epoch.
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


def image_stats(
    pool: ImagePool, x: Tensor, y: Tensor, teacher_logits: Tensor, num_classes: int, ranks: Ranks
) -> dict[str, Any]:
    """Compute the fields of `EpochStats` that describe the stored images, over all processes."""
    # Processes have equally many images, so the mean of their means is that of all.
    agree = (teacher_logits.argmax(dim=1) == y).float().mean()
    diversity = x.std(dim=0).mean() if len(x) > 1 else x.new_zeros(())
    counts = torch.bincount(pool.labels, minlength=num_classes)
    return {
        "label_agreement": float(ranks.mean(agree)),
        "diversity": float(ranks.mean(diversity)),
        "class_counts": tuple(ranks.total(counts).tolist()),
        "pool_size": len(pool) * ranks.size,
    }


class CollapseMonitor:
    """Log of the first signs of collapse in the images of epochs that train the student.

    Attributes:
        largest_diversity: so far.
    """

    def __init__(self) -> None:
        self.largest_diversity = 0.0
        # Signs that the last epoch had; what is known is not said again.
        self._known: set[str] = set()

    def watch(self, stats: EpochStats) -> None:
        """Look at an epoch; a sign that the last one had is not repeated."""
        self.largest_diversity = max(self.largest_diversity, stats.diversity)
        signs = {} if stats.warmup else self._signs(stats)
        for name, sentence in signs.items():
            if name not in self._known:
                LOG.warning("FERDTrainer: %s", sentence)
        self._known = set(signs)

    def _signs(self, stats: EpochStats) -> dict[str, str]:
        signs, epoch = {}, stats.epoch
        if stats.diversity < DIVERSITY_KEPT * self.largest_diversity:
            signs["diversity"] = (
                f"the images of epoch {epoch} have a diversity of {stats.diversity:.3g}, below half of the "
                f"largest so far, {self.largest_diversity:.3g}; set `reset_generator` or `optimise_latents`, or "
                f"raise `adv_loss_weight`"
            )
        if stats.label_agreement < LABELS_AGREE:
            signs["agreement"] = (
                f"the teacher sees the label of {stats.label_agreement:.0%} of the images of epoch {epoch}, "
                f"less than {LABELS_AGREE:.0%}; raise `generator_steps`, `generator_lr` or "
                f"`onehot_loss_weight`, or lower `bn_loss_weight`"
            )
        missing = [c for c, count in enumerate(stats.class_counts) if not count]
        if missing:
            signs["classes"] = (
                f"after epoch {epoch} the pool has no image of {len(missing)} of {len(stats.class_counts)} "
                f"classes, the first of which is {missing[0]}; raise `class_floor` or `batch_size`, or set "
                f"`label_sampling` to 'stratified'"
            )
        return signs


class StepLosses:
    """Losses of an epoch's student steps on all processes, watched for NaN and infinity."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        # Tensors on the device, read once per epoch.
        self.values: list[Tensor] = []
        self._healthy: list[Tensor] = []

    def add(self, loss: Tensor, student: nn.Module) -> None:
        """Take a step's loss, while the student still has its gradients."""
        self.values.append(loss)
        self._healthy.append(is_finite(loss, [p.grad for p in student.parameters()]))

    def mean(self, student: nn.Module, x: Tensor) -> float:
        """Mean over the steps and processes; nan without any.

        Raises:
            NonFiniteError: a loss or a gradient was not finite, or the student at the end, on some images.
        """
        if not self.values:
            return math.nan
        # The last step may overflow with finite gradients; its student would spoil the next epoch's images.
        self._healthy[-1] &= sound(student, x)
        bad = first_bad(list(self._ranks.everywhere(torch.stack(self._healthy))))
        if bad is not None:
            raise self._error(bad)
        return float(self._ranks.mean(torch.stack(self.values).mean()))

    @contextmanager
    def watching(self, student: nn.Module, x: Tensor) -> Iterator[None]:
        """Trace a failure back to the first step whose numbers, or logits of x, were not finite, if any."""
        try:
            yield
        except NonFiniteError:
            raise
        except (RuntimeError, ValueError) as error:
            # An attack refuses a student that is not finite in words of its own, and on one process perhaps.
            bad = first_bad(self._healthy)
            if bad is not None or not bool(sound(student, x)):
                raise self._error(bad or len(self.values) + 1) from error
            raise

    def _error(self, step: int) -> NonFiniteError:
        losses: dict[str, float | list[float]] = {"student": [float(v) for v in self.values]}
        return NonFiniteError(
            "the student's loss, gradients or weights", part="student", step=step, losses=losses
        )


@torch.no_grad()
def sound(student: nn.Module, x: Tensor) -> Tensor:
    """True if weights and a few logits are finite and not too large to be squared; on the device."""
    with borrowed(student):
        return is_finite(ask(student, x[:8]).float().square().sum(), student.parameters())


def end_run(
    error: NonFiniteError,
    folder: Path | None,
    *,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    models: dict[str, nn.Module | None],
    owner: str = "FERDTrainer",
    remedy: str | None = None,
    **figures: Any,
) -> NoReturn:
    """Dump the diagnostics and `figures` as JSON, if there is a folder for it, and raise.

    Raises:
        RuntimeError: always.
    """
    where = ""
    if folder is not None:
        path = folder / f"not-finite-epoch-{epoch}.json"
        content = {
            "part": error.part,
            "epoch": epoch,
            "step": error.step,
            "losses": error.losses,
            **figures,
            "learning_rates": [group["lr"] for group in optimizer.param_groups],
            "non_finite": {name: non_finite(model) for name, model in models.items()},
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(_writable(content), indent=1))
            where = f"; {str(path)!r} has the figures"
        except OSError as failure:
            # The run ends for a better reason than this one.
            LOG.warning("%s: expected to write %r, got %s", owner, str(path), failure)
    raise RuntimeError(
        f"{owner}: expected finite losses, gradients and logits, got NaN or infinity in epoch {epoch}, step "
        f"{error.step} of the {error.part}; {remedy or REMEDIES[error.part]}{where}"
    ) from error


def non_finite(model: nn.Module | None) -> list[str]:
    """Names of parameters, gradients and buffers with NaN or infinity."""
    if model is None:
        return []
    values = dict(model.state_dict())
    values |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [name for name, value in values.items() if not bool(value.isfinite().all())]


def _writable(value: Any) -> Any:
    """Floats that are not finite as strings: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _writable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_writable(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
