"""The processes of `torch.distributed`: one stream of random numbers, and what they add up."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

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


class _Sum(torch.autograd.Function):
    """Each process adds to the sum, so each one's gradient is the sum of what all ask for."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        distributed.all_reduce(gradient)
        return gradient


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over processes, with gradients."""
    total: Tensor = _Sum.apply(value)
    return total


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; a single one, without `torch.distributed`, has nothing to add up."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def here() -> Ranks:
        """As `torch.distributed` was initialised, if it was."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return Ranks()
        return Ranks(distributed.get_rank(), distributed.get_world_size())

    def share(self, function: str, argument: str, count: int) -> int:
        """This process's part of a number that must divide evenly."""
        if count % self.size:
            raise ValueError(
                f"{function}: expected `{argument}` to be a multiple of the {self.size} processes, got {count}"
            )
        return count // self.size

    def part(self, rows: Tensor) -> Tensor:
        """This process's part of what all of them have: every `size`-th row."""
        return rows[self.rank :: self.size]

    def noise(self, generator: torch.Generator) -> Any:
        """The generator, or this process's shard of it, which goes wherever a generator goes."""
        return generator if self.size == 1 else Shard(generator, self.rank, self.size)

    def total(self, value: Tensor) -> Tensor:
        """The sum over processes, a new tensor without a gradient."""
        if self.size == 1:
            return value.detach().clone()
        device = "cuda" if distributed.get_backend() == "nccl" else value.device
        sent = value.detach().to(device, copy=True)
        distributed.all_reduce(sent)
        return sent.to(value.device)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes, likewise."""
        return self.total(value) / self.size

    def add_to(self, mean: Any) -> None:
        """Make sums and counts of a `reweight.ClassMean` those of all processes."""
        if self.size > 1:
            mean.sums, mean.counts = self.total(mean.sums), self.total(mean.counts)

    def everywhere(self, flags: Tensor) -> Tensor:
        """Which flags are set on every process."""
        return self.total((~flags).int()) == 0

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes, as many from each, of which every one finds its own as its `part`.

        The first rows of all come first: what is in order of age stays so, whatever the number of processes.
        """
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        distributed.all_gather(parts, rows.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, or a DistributedDataParallel around it whose gradients are means over processes."""
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        devices = None
        if device.type == "cuda":
            devices, model = [device], nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Buffers are averaged once per epoch: a broadcast at each forward would write to what a backward reads.
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        settings: dict[str, Any] = {"device_ids": devices, option: False}
        return nn.parallel.DistributedDataParallel(model, **settings)

    def average_buffers(self, model: nn.Module) -> None:
        """What each process's BatchNorm has seen becomes the mean of all of them."""
        if self.size > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.mean(buffer))
