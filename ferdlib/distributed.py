"""The processes of `torch.distributed`: who this one is, and what they compute together.

The only module that knows of processes. The trainer, synthesis, methods and recipes use it; a primitive that
needs a sum over processes takes a function for it. Without `torch.distributed` there is one process, and
everything here returns what it was given.
"""

from __future__ import annotations

import atexit
import datetime
import hashlib
import os
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import Dataset, Subset

from ferdlib._checks import InvalidType, InvalidValue, got, public
from ferdlib._meeting import TIMEOUT, meet, post, said_by, sign_of_life

__all__ = ["Ranks", "check_same", "first_ahead", "gather", "join", "share", "sum_over_ranks"]


@dataclass(frozen=True)
class Ranks:
    """This process among `size`.

    Attributes:
        rank: 0 to size - 1.
        size: number of processes, 1 without `torch.distributed`.

    Example:
        >>> Ranks.here().first, Ranks(rank=1, size=2).part(torch.arange(5))
        (True, tensor([1, 3]))
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def here() -> Ranks:
        """Read rank and size from `torch.distributed`, if it was initialised."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return Ranks()
        return Ranks(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """True on the process that writes and prints."""
        return self.rank == 0

    def share(self, name: str, count: int) -> int:
        """Divide a number that must divide evenly."""
        if count % self.size:
            raise InvalidValue(
                f"expected `{name}` to be a multiple of the {self.size} processes, got {count}"
            )
        return count // self.size

    def part(self, rows: Tensor) -> Tensor:
        """Take this rank's rows, strided."""
        return rows[self.rank :: self.size]

    def gathered(self, rows: Tensor) -> Tensor:
        """All-gather equally many rows per rank, interleaved; `part` is its inverse.

        The first rows of all come first: what is in order of age stays so, whatever the number of processes.
        """
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        distributed.all_gather(parts, rows.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def total(self, value: Tensor) -> Tensor:
        """Sum over processes; a new tensor without a gradient."""
        if self.size == 1:
            return value.detach().clone()
        # NCCL sums on the GPU only.
        device = "cuda" if distributed.get_backend() == "nccl" else value.device
        sent = value.detach().to(device, copy=True)
        distributed.all_reduce(sent)
        return sent.to(value.device)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over processes; a new tensor without a gradient."""
        return self.total(value) / self.size

    def everywhere(self, flags: Tensor) -> Tensor:
        """Flags that are set on every process."""
        return self.total((~flags).int()) == 0

    def anywhere(self, flag: bool) -> bool:
        """True if the flag is set on some process; all of them must ask."""
        return bool(self.total(torch.tensor(int(flag), device="cpu"))) if self.size > 1 else flag

    def add_to(self, mean: Any) -> None:
        """Add up sums and counts of a `reweight.ClassMean` over all processes."""
        if self.size > 1:
            mean.sums, mean.counts = self.total(mean.sums), self.total(mean.counts)

    def reseed(self, own: torch.Generator, shared: torch.Generator) -> None:
        """Seed this rank's own generator from one that is in the same state on all ranks.

        The shared one goes on as it would in a single process, which has one generator for both.
        """
        if self.size > 1:
            copy = shared.clone_state()
            seed = int(torch.randint(2**62, (), generator=copy, device=copy.device))
            own.manual_seed(seed + self.rank)

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap a model so that its gradients are means over processes.

        On CUDA its BatchNorm layers become SyncBatchNorm; on a CPU each process normalises by its own
        images, see `average_buffers`.
        """
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        devices = None
        if device.type == "cuda":
            devices, model = [device], nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Buffers are averaged once per epoch: a broadcast at each forward would write to what a backward reads.
        return nn.parallel.DistributedDataParallel(
            model, device_ids=devices, forward_sync_buffers=False
        )

    @torch.no_grad()
    def average_buffers(self, model: nn.Module) -> None:
        """Average floating-point buffers, BatchNorm's running statistics among them, over processes."""
        if self.size > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.mean(buffer))


class _Sum(torch.autograd.Function):
    """A sum whose gradient is the sum of the gradients that all processes ask for."""

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
    """Sum over processes, with gradients.

    Example:
        >>> sum_over_ranks(torch.ones(2))  # one process
        tensor([1., 1.])
    """
    if Ranks.here().size == 1:
        return value
    total: Tensor = _Sum.apply(value)
    return total


def join(device: str) -> str:
    """Meet the other processes, if torchrun has started this one, and return the device of this one.

    NCCL on CUDA, gloo elsewhere.
    """
    if "LOCAL_RANK" not in os.environ:
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=TIMEOUT))
    atexit.register(distributed.destroy_process_group)
    sign_of_life()
    return device


@public
def check_same(**values: object) -> None:
    """Refuse, on every process alike, values that are not the same on all; every process must call it.

    Raises:
        ValueError: names the values and a process that has others.

    Example:
        >>> check_same(seed=0, epochs=30)  # one process
    """
    ranks = Ranks.here()
    if ranks.size == 1:
        return
    found = [text.splitlines() for text in meet("\n".join(map(_mark, values.values())))]
    for rank, theirs in enumerate(found):
        differing = [name for name, a, b in zip(values, found[0], theirs, strict=True) if a != b]
        if differing:
            raise InvalidValue(
                f"expected the same {', '.join(differing)} on every process, got others on rank {rank} than on "
                f"rank 0"
            )


def _mark(value: object) -> str:
    """Digest of a value, on one line however long it is."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


@contextmanager
def first_ahead(fetching: bool = True) -> Iterator[None]:
    """Run the block on the first process before the others: what it downloads is there for them."""
    if not fetching or Ranks.here().size == 1:
        yield
        return
    number = post()
    if not Ranks.here().first:
        # However long the download takes; where it fails, all say why.
        if reason := said_by(0, number):
            raise RuntimeError(f"rank 0: {reason}")
        yield
        return
    try:
        yield
    except Exception as error:
        post(str(error) or type(error).__name__, number)
        raise
    post("", number)


@public
def share(data: Dataset[Any]) -> Dataset[Any]:
    """Take this process's share of a data set: every n-th sample from its rank on, of n processes.

    Raises:
        TypeError: `data` is not a data set of known length.
        ValueError: more processes than samples.

    Example:
        >>> len(share(torch.utils.data.TensorDataset(torch.rand(4, 1))))
        4
    """
    if not isinstance(data, Dataset) or not isinstance(data, Sized):
        raise InvalidType(f"expected `data` to be a Dataset with a length, got {got(data)}")
    ranks = Ranks.here()
    if ranks.size == 1:
        return data
    if len(data) < ranks.size:
        raise InvalidValue(
            f"expected `data` with a sample for each of the {ranks.size} processes, got {len(data)}"
        )
    # From here on the others may have to wait for this process.
    sign_of_life()
    return Subset(data, range(ranks.rank, len(data), ranks.size))


def gather(value: Any) -> list[Any]:
    """Collect a picklable object of each process, in order of rank; every process must call it.

    It waits for the slowest one, however long that takes while its process lives.

    Raises:
        RuntimeError: a process has ended; its reason is said, if it gave one.

    Example:
        >>> gather("a report")
        ['a report']
    """
    ranks = Ranks.here()
    parts: list[Any] = [value] * ranks.size
    if ranks.size > 1:
        # A collective call ends the job where a process comes later than the group's timeout.
        meet()
        distributed.all_gather_object(parts, value)
    return parts
