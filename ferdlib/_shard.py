"""One stream of random numbers for several processes, each of which takes its part of every draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """What rank `rank` of `size` sees of a generator that is in the same state on all of them.

    Together the ranks draw what a single process would for all their samples. Goes wherever a
    `torch.Generator` goes in this library.
    """

    generator: torch.Generator
    rank: int
    size: int

    @property
    def device(self) -> torch.device:
        return self.generator.device


Rng = torch.Generator | Shard | None


def drawn(
    draw: Callable[[Shape, torch.Generator | None], Tensor], shape: Shape, rng: Rng
) -> Tensor:
    """`draw(shape, generator)` of independent samples, or a shard's part of it."""
    if not isinstance(rng, Shard):
        return draw(shape, rng)
    whole = draw((shape[0] * rng.size, *shape[1:]), rng.generator)
    return whole[rng.rank * shape[0] : (rng.rank + 1) * shape[0]]


def source(rng: Rng) -> torch.Generator | None:
    """The generator itself, for draws that are the same on all ranks."""
    return rng.generator if isinstance(rng, Shard) else rng
