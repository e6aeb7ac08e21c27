"""Sources of synthetic images as a trainer knows them, and the labels that are drawn for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public


@runtime_checkable
class Source(Protocol):
    """Maker of labelled images for the student that is being trained.

    `epoch` yields batches `(x, y)`: float images `(N, C, H, W)` in [0, 1] and int64 labels `(N,)`. The
    trainer stores each batch and trains the student between two of them, so an implementation that
    follows the student (ZSKT, DFAD) sees it change. Implementations hold whatever persists, a generator
    or a memory bank, and give it out by `state_dict`. `metrics` are numbers of the last batch, to be logged.

    A trainer moves the modules among a source's attributes to its device, gives one whose `rng` is None a
    generator, and reads `last_images` where class margins shall be taken of them.
    """

    metrics: dict[str, float]

    def epoch(
        self, student: nn.Module, class_probabilities: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@public
def sample_labels(
    class_probabilities: Tensor,
    count: int,
    *,
    method: Literal["multinomial", "stratified"] = "multinomial",
    rng: torch.Generator | None = None,
) -> Tensor:
    r"""Draw labels $y \sim p$ for a synthetic batch (FERD Algorithm 1, line 6).

    Args:
        class_probabilities: p, float `(K,)`, non-negative with sum 1.
        count: number of labels, >= 1.
        method: "multinomial" draws them independently; "stratified" draws one offset and takes evenly
            spaced quantiles, so that every class gets its share rounded up or down.
        rng: source of the draws; None takes torch's default generator.

    Returns:
        int64 `(count,)` on the device of p.

    Raises:
        TypeError: probabilities that are not float.
        ValueError: probabilities that are negative or do not sum to 1, or an unknown method.

    Example:
        >>> sample_labels(torch.tensor([0.5, 0.25, 0.25]), 4, method="stratified").sort().values
        tensor([0, 0, 1, 2])
    """
    p = class_probabilities
    _checks.class_vector(class_probabilities=p)
    _checks.integer(1, count=count)
    _checks.choice(("multinomial", "stratified"), method=method)
    _checks.generator(rng)
    if not bool((p >= 0).all()) or abs(float(p.sum()) - 1) > 1e-4:
        raise InvalidValue(
            f"expected non-negative `class_probabilities` with sum 1, got {p.tolist()}"
        )
    device = p.device if rng is None else rng.device
    weights = p.to(device)
    if method == "multinomial":
        labels = torch.multinomial(weights, count, replacement=True, generator=rng)
        return labels.to(p.device)
    # Quantiles of the cumulated shares, in float64: a share is hit as often as it is large.
    edges = _checks.double(weights).cumsum(dim=0)
    offset = torch.rand((), generator=rng, device=device, dtype=torch.float32)
    points = (torch.arange(count, device=device) + offset) / count
    labels = torch.searchsorted(edges / edges[-1], points.to(edges), right=True)
    return labels.clamp(max=len(p) - 1).to(p.device)
