"""The loop of a source that trains its images: steps down an objective, of which the best are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib.distributed import Ranks
from ferdlib.synthesis.health import first_bad, is_finite

Selection = Literal["batch", "sample", "last"]


class Objective(NamedTuple):
    """One evaluation of a source's objective.

    Attributes:
        images: `(N, C, H, W)` as they would be stored, detached.
        total: scalar to be minimised, with its graph.
        per_sample: `(N,)`, detached; the score of an image that is kept at its own best.
        parts: scalars to be reported.
    """

    images: Tensor
    total: Tensor
    per_sample: Tensor
    parts: dict[str, Tensor]


class Optimised(NamedTuple):
    """Result of `optimise`.

    Attributes:
        images: the selected ones.
        metrics: the last step's parts and its `total`, means over processes.
        totals: this process's total at every step.
        bad: first step, from 1, whose loss or gradients were not finite on some process; None if all were.
    """

    images: Tensor
    metrics: dict[str, float]
    totals: list[float]
    bad: int | None


def optimise(
    objective: Callable[[], Objective],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    selection: Selection,
    ranks: Ranks,
) -> Optimised:
    """Take steps of the optimizer down the objective, and keep the best images on the way.

    Args:
        objective: evaluated anew at each step.
        optimizer: of all tensors that are trained; their gradients are None afterwards.
        steps: >= 1.
        selection: keep the "batch" of the lowest total, each "sample" at its lowest score, or the "last" batch.
        ranks: the processes whose totals count together.
    """
    trained = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    kept: tuple[Tensor, Tensor] | None = None
    totals, healthy = [], []
    for _ in range(steps):
        found = objective()
        score = found.per_sample if selection == "sample" else ranks.mean(found.total)
        kept = _better(kept, found.images, score, always=selection == "last")
        _forget(trained)
        # Not autograd.grad: DistributedDataParallel would not see it.
        found.total.backward(inputs=trained)
        totals.append(found.total.detach())
        healthy.append(is_finite(found.total, [tensor.grad for tensor in trained]))
        optimizer.step()
    _forget(trained)
    assert kept is not None
    images, score = kept
    # An image whose score never was finite is not worth keeping either.
    healthy[-1] = healthy[-1] & score.isfinite().all()
    parts = found.parts | {"total": found.total}
    # One collective call and one wait for all of them.
    means = ranks.mean(torch.stack([_checks.double(part.detach()) for part in parts.values()]))
    return Optimised(
        images=images,
        metrics=dict(zip(parts, means.tolist(), strict=True)),
        totals=torch.stack(totals).tolist(),
        bad=first_bad(list(ranks.everywhere(torch.stack(healthy)))),
    )


def _better(
    kept: tuple[Tensor, Tensor] | None, images: Tensor, score: Tensor, *, always: bool
) -> tuple[Tensor, Tensor]:
    """Images and scores after another step, of the batch or of each image alone."""
    if kept is None or always:
        return images, score
    best, lowest = kept
    # Chosen on the device: reading the score here would stall an accelerator at every step.
    better = score < lowest
    return (
        torch.where(better.reshape(-1, 1, 1, 1), images, best),
        torch.where(better, score, lowest),
    )


def _forget(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None
