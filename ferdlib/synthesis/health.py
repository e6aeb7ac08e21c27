"""Finite or not: asked of every training step, answered once, so that an accelerator never waits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A loss, a gradient or logits became NaN or infinite.

    Attributes:
        part: "generator", "margins" or "student".
        step: the first such step of its epoch, counted from 1.
        losses: values of every step, or the parts of the last one.
    """

    def __init__(
        self, message: str, *, part: str, step: int, losses: dict[str, float | list[float]]
    ) -> None:
        super().__init__(message)
        self.part, self.step, self.losses = part, step, losses


def is_finite(loss: Tensor, gradients: Iterable[Tensor | None]) -> Tensor:
    """Boolean scalar on the loss's device; nothing waits for it until it is read.

    Logits that are not finite make their loss so. A gradient that is finite, but whose norm is too large
    for float32, counts as infinite.
    """
    norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    return loss.detach().isfinite() & norm.to(loss.device).isfinite()


def first_bad(healthy: Sequence[Tensor]) -> int | None:
    """Number, from 1, of the first step that was not finite; the one place that waits."""
    bad = (~torch.stack(list(healthy))).nonzero() if healthy else torch.empty(0, device="cpu")
    return int(bad[0]) + 1 if len(bad) else None
