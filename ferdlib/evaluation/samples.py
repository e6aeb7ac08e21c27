"""Samples with their index, in blocks, and noise that belongs to a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from ferdlib import _checks
from ferdlib._checks import InvalidType, InvalidValue, got
from ferdlib._modes import modules_behind

RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
# Their order is the same each time that they are asked.
REPEATABLE = (SequentialSampler, DistributedSampler, Sequence)

# SplitMix64 (Steele, Lea and Flood 2014), its unsigned constants as int64, whose products wrap around.
GAMMA = 0x9E3779B97F4A7C15 - 2**64
FIRST = 0xBF58476D1CE4E5B9 - 2**64
SECOND = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class Block:
    """Consecutive samples: index `(N,)` on the CPU, images `(N, C, H, W)`, labels `(N,)`."""

    index: Tensor
    x: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, part: slice | Tensor) -> Block:
        """Take some of the samples: a slice, or their positions on the CPU."""
        return Block(self.index[part], self.x[part], self.targets[part])

    def to(self, device: torch.device) -> Block:
        """Move images and labels."""
        return Block(self.index, self.x.to(device), self.targets.to(device))

    def digest(self) -> int:
        """Digest of indices, labels and pixels; those of disjoint blocks add up modulo 2**128."""
        pixels = self.x.detach().cpu().contiguous()
        dtype = str(pixels.dtype).encode()
        total = 0
        for index, label, image in zip(
            self.index.tolist(), self.targets.tolist(), pixels, strict=True
        ):
            digest = hashlib.blake2b(f"{index} {label} ".encode() + dtype, digest_size=16)
            digest.update(image.view(torch.uint8).numpy())
            total += int.from_bytes(digest.digest(), "big")
        return total % 2**128

    @staticmethod
    def joined(blocks: Sequence[Block]) -> Block:
        """Put blocks together."""
        if len(blocks) == 1:
            return blocks[0]
        parts = zip(*((b.index, b.x, b.targets) for b in blocks), strict=True)
        return Block(*map(torch.cat, parts))


class Samples:
    """The samples of a pair of tensors, a data set or a loader, in their order.

    A loader that shuffles is refused: it would number the samples differently each time.

    Attributes:
        order: index of each row that `data` yields, -1 for a copy that pads a shard; None if it is not known.
        batch_size: the loader's, or the given one.
    """

    def __init__(self, data: Any, batch_size: int, num_classes: int) -> None:
        self.num_classes, self.batch_size = num_classes, batch_size
        if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor):
            # One batch, of which `blocks` cuts what it needs.
            self.batches: Iterable[Any] = [data]
            self.order: Tensor | None = torch.arange(len(data[0]), device="cpu")
            return
        if isinstance(data, Dataset):
            self.batches, self.order = _batches(data, batch_size), None
            if not isinstance(data, IterableDataset):
                self.order = _index(data, range(len(data)))  # type: ignore[arg-type]
            return
        if not isinstance(data, Iterable):
            wanted = "a DataLoader, a Dataset or a pair of tensors"
            raise InvalidType(f"expected `data` to be {wanted}, got {got(data)}")
        self.batches, self.batch_size = data, getattr(data, "batch_size", None) or batch_size
        self.order = None
        if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
            self.order = _known_order(data)

    @property
    def index(self) -> Tensor | None:
        """Index of all samples, None if only the running number is known."""
        return None if self.order is None else self.order[self.order >= 0]

    def blocks(self, size: int) -> Iterator[Block]:
        """Yield blocks of `size` samples, the last one smaller."""
        # Batches are cut anew, because AutoAttack's size need not be the loader's.
        held: list[Block] = []
        for block in self._checked():
            held.append(block)
            while sum(map(len, held)) >= size:
                joined = Block.joined(held)
                yield joined[:size]
                held = [joined[size:]] if len(joined) > size else []
        if held:
            yield Block.joined(held)

    def _checked(self) -> Iterator[Block]:
        done = 0
        for batch in self.batches:
            x, targets = _checks.batch(data=batch)
            _checks.images(data=x)
            # On the host, where their range can be read.
            labels = targets.cpu()
            _checks.labels(num_classes=self.num_classes, **{"labels of data": labels})
            if len(labels) != len(x):
                raise InvalidValue(f"expected {len(x)} `labels of data`, got {len(labels)}")
            index = torch.arange(done, done + len(x), device="cpu")
            # A tensor of `torch.inference_mode` cannot take part in autograd; its copy can.
            x, labels = (v.clone() if v.is_inference() else v for v in (x, labels))
            done += len(x)
            block = Block(index if self.order is None else self.order[index], x, labels)
            if bool((block.index < 0).any()):
                block = block[(block.index >= 0).nonzero().squeeze(1)]
            if len(block):
                yield block


def _known_order(loader: DataLoader[Any]) -> Tensor | None:
    """Index of each sample of a loader, None where its batches are not those of a known sampler."""
    # A batch sampler of the user hides the order; the loader's own shows its sampler.
    if type(loader.batch_sampler) is not BatchSampler:
        return None
    sampler = loader.batch_sampler.sampler
    if isinstance(sampler, RANDOM):
        remedy = "give its data set, or a loader with shuffle=False"
        came = f"a DataLoader with a {type(sampler).__name__}"
        raise InvalidValue(f"expected `data` in a fixed order, got {came}; {remedy}")
    if not isinstance(sampler, REPEATABLE):
        return None
    cut = loader.batch_sampler.drop_last and len(sampler) % loader.batch_sampler.batch_size
    index, missing = _index(loader.dataset, sampler), cut
    if type(sampler) is DistributedSampler:
        count, ranks = len(sampler.dataset), sampler.num_replicas  # type: ignore[arg-type]
        missing = missing or (sampler.drop_last and count % ranks)
        # Places in the common order; what lies behind its end are copies, for shards of one length.
        padding = sampler.rank + ranks * torch.arange(len(index), device="cpu") >= count
        # A shard of copies alone is evaluated, since a report cannot be empty; `merge` counts them once.
        index = index if bool(padding.all()) else index.masked_fill(padding, -1)
    if missing:
        came = f"a {type(loader).__name__} that leaves out {missing} with drop_last=True"
        raise InvalidValue(f"expected `data` to yield all samples, got {came}; give False")
    return index


def _index(dataset: Dataset[Any], rows: Iterable[int]) -> Tensor:
    """Index in the original data set of these rows of a data set."""
    index = torch.tensor([_original(dataset, row) for row in rows], dtype=torch.int64, device="cpu")
    if len(index.unique()) < len(index):
        raise InvalidValue("expected `data` to hold each sample once, got an index twice")
    return index


def _original(dataset: Dataset[Any], row: int) -> int:
    """Index in the data set that the subsets were taken of."""
    if row < 0:
        row += len(dataset)  # type: ignore[arg-type]
    if isinstance(dataset, Subset):
        return _original(dataset.dataset, int(dataset.indices[row]))
    return row


def _batches(data: Dataset[Any], size: int) -> Iterator[Any]:
    """Batches of a data set; a DataLoader would draw a seed from torch's generator of the default device."""
    streamed = isinstance(data, IterableDataset)
    samples = iter(data if streamed else map(data.__getitem__, range(len(data))))  # type: ignore[arg-type]
    while batch := list(islice(samples, size)):
        yield default_collate(batch)


def device_of(model: object) -> torch.device:
    """Device of the first parameter behind a model; the CPU if none is to be seen."""
    parameters = (p for module in modules_behind(model) for p in module.parameters())
    return next((p.device for p in parameters), torch.device("cpu"))


def uniform_noise(seed: int, restart: int, index: Tensor, shape: torch.Size) -> Tensor:
    """Float64 in (0, 1), a stream of its own for each index, `(N, *shape)`, on the index's device.

    A pure function of seed, restart, index and pixel, in whole numbers all the way, so that every device and
    every batch gives the same.
    """
    pixels = torch.arange(1, shape.numel() + 1, device=index.device)
    key = torch.zeros_like(index)
    # Mixed one after another, so that no two of (seed, restart, index) share a stream.
    for word in (seed % 2**63, restart, index):
        key = splitmix(key + word + GAMMA)
    bits = splitmix(key[:, None] + pixels * GAMMA)
    return ((_shifted(bits, 11).double() + 0.5) * 2.0**-53).reshape(-1, *shape)


def splitmix(z: Tensor) -> Tensor:
    """SplitMix64's output function of int64 states."""
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shift to the right, with zeros from the left, where torch would copy the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)
