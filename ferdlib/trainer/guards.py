"""How a run stops at numbers that are not finite: one sentence, and a file with the figures."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ferdlib.synthesis.health import NonFiniteError, first_bad, is_finite

LOG = logging.getLogger("ferdlib")

REMEDIES = {
    "generator": "lower `generator_lr` or the loss weights",
    "margins": "check the teacher on images in [0, 1]",
    "student": "lower `student_lr`",
}


class StepLosses:
    """The losses of an epoch's student steps, and whether they and their gradients were finite.

    Args:
        known: losses of the epoch's steps before it was stopped, which were finite.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        self.values = list(known)
        self._healthy: list[Tensor] = []

    def add(self, loss: Tensor, student: nn.Module) -> None:
        """A step's loss, while the student has its gradients."""
        self.values.append(loss)
        self._healthy.append(is_finite(loss, [p.grad for p in student.parameters()]))

    def mean(self) -> float:
        """nan without steps.

        Raises:
            NonFiniteError: there was one that was not finite.
        """
        bad = first_bad(self._healthy)
        if bad is not None:
            raise self._error(len(self.values) - len(self._healthy) + bad)
        return float(torch.stack(self.values).mean()) if self.values else math.nan

    def blame(self, student: nn.Module) -> None:
        """Say so if the step that has just failed got numbers that were not finite.

        Raises:
            NonFiniteError: from a step before, or in the student's weights.
        """
        self.mean()
        if _non_finite(student):
            raise self._error(len(self.values) + 1)

    def _error(self, step: int) -> NonFiniteError:
        losses: dict[str, float | list[float]] = {"student": [float(v) for v in self.values]}
        return NonFiniteError(
            "the student's loss, gradients or weights", part="student", step=step, losses=losses
        )


def stop(
    error: NonFiniteError,
    folder: Path | None,
    *,
    epoch: int,
    class_probabilities: Tensor,
    learning_rates: list[float],
    models: dict[str, nn.Module | None],
) -> NoReturn:
    """Write the figures, numbers that JSON has no word for as strings, and end the run.

    Raises:
        RuntimeError: always.
    """
    content = {
        "part": error.part,
        "epoch": epoch,
        "step": error.step,
        "losses": error.losses,
        "class_probabilities": class_probabilities.tolist(),
        "learning_rates": learning_rates,
        "non_finite": {name: _non_finite(model) for name, model in models.items()},
    }
    where = ""
    if folder is not None:
        path = folder / f"not-finite-epoch-{epoch}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_writable(content), indent=1), "utf-8")
            where = f"; {str(path)!r} has the figures"
        except OSError as failure:  # the run ends for a better reason
            LOG.warning("FERDTrainer: expected to write %r, got %s", str(path), failure)
    raise RuntimeError(
        f"FERDTrainer: expected finite losses, gradients and logits, got NaN or infinity in epoch {epoch}, "
        f"step {error.step} of the {error.part}; {REMEDIES[error.part]}{where}"
    ) from error


def _non_finite(model: nn.Module | None) -> list[str]:
    """Parameters, their gradients and buffers with NaN or infinity, by name."""
    if model is None:
        return []
    values = dict(model.state_dict())
    values |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [name for name, value in values.items() if not bool(value.isfinite().all())]


def _writable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _writable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_writable(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
