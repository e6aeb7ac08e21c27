"""Samples with their index, streamed in the order of the data set whatever the loader's order is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ferdlib import _oldchecks as _checks


@dataclass(frozen=True)
class Block:
    """Consecutive samples: index `(N,)`, images `(N, C, H, W)`, labels `(N,)`, all on the CPU or as given."""

    index: Tensor
    x: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, part: slice | Tensor) -> Block:
        """Some of the samples: a slice, or their positions on the CPU."""
        return Block(self.index[part], self.x[part], self.targets[part])

    def to(self, device: torch.device) -> Block:
        return Block(self.index, self.x.to(device), self.targets.to(device))

    def digest(self) -> int:
        """Of indices, labels and pixels; those of disjoint blocks add up modulo 2**128."""
        pixels = self.x.detach().cpu().contiguous()
        dtype = str(pixels.dtype).encode()
        rows = zip(self.index.tolist(), self.targets.tolist(), pixels, strict=True)
        total = 0
        for index, label, image in rows:
            digest = hashlib.blake2b(f"{index} {label} ".encode() + dtype, digest_size=16)
            digest.update(image.view(torch.uint8).numpy())
            total += int.from_bytes(digest.digest(), "big")
        return total % 2**128


class Stream:
    """The blocks of a loader, a data set or a pair of tensors.

    A loader's own sampler says which samples, and they are read in the order of their index in the data
    set (a `Subset`'s index is that in the whole), so that shuffling changes nothing. Where there is no
    index, for an iterable data set or any other iterable of batches, it is the running number.
    """

    def __init__(self, function: str, data: object, batch_size: int) -> None:
        self.function = function
        self.samples: int | None = None
        self.last_index: int | None = None
        self.indexed = False
        if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor):
            self.batch_size = batch_size
            self.loader: Iterable[Any] = self._slices(*data)
            return
        if isinstance(data, Dataset):
            data = DataLoader(data, batch_size=batch_size)
        if not isinstance(data, Iterable):
            raise TypeError(
                f"{function}: expected `data` to be a DataLoader, a Dataset or a pair of tensors, got "
                f"{_checks.got(data)}"
            )
        self.batch_size = getattr(data, "batch_size", None) or batch_size
        self.loader = data
        mapped = isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset)
        if isinstance(data, DataLoader) and mapped and data.batch_sampler is not None:
            self.indexed = True
            self.loader = self._in_order(data)

    def _slices(self, x: Tensor, targets: Tensor) -> list[tuple[Any, Tensor]]:
        """Batches of tensors, without a data set that would take them apart first."""
        _checks.images(self.function, x, argument="data[0]")
        _checks.labels(self.function, targets, length=len(x), argument="data[1]")
        self.samples, self.last_index, self.indexed = len(x), len(x) - 1, True
        parts = zip(
            x.split(self.batch_size),
            targets.split(self.batch_size),
            torch.arange(len(x)).split(self.batch_size),
            strict=True,
        )
        return [((images, labels), index) for images, labels, index in parts if len(index)]

    def _in_order(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """The loader's samples by index, in its own way of reading and collating."""
        batches = loader.batch_sampler or ()
        positions = [(_original(loader.dataset, i), i) for batch in batches for i in batch]
        positions.sort()
        for (first, _), (second, _) in pairwise(positions):
            if first == second:
                raise ValueError(
                    f"{self.function}: expected `data` to hold each sample once, got index {first} twice; "
                    f"does the sampler draw with replacement?"
                )
        self.samples = len(positions)
        self.last_index = positions[-1][0] if positions else None
        size = self.batch_size
        return DataLoader(
            _Indexed(loader.dataset),
            batch_sampler=[positions[k : k + size] for k in range(0, len(positions), size)],
            collate_fn=_Collate(loader.collate_fn),
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator(),  # else the workers' seed is drawn from the global one
        )

    def blocks(self, size: int) -> Iterator[Block]:
        """Blocks of `size` samples, the last one smaller."""
        held: list[Block] = []
        for block in self._batches():
            held += [block] if len(block) else []
            while sum(map(len, held)) >= size:
                joined = _join(held)
                yield joined[:size]
                rest = joined[size:]
                held = [rest] if len(rest) else []
        if held:
            yield _join(held)

    def _batches(self) -> Iterator[Block]:
        number = 0
        for batch in self.loader:
            content, index = batch if self.indexed else (batch, None)
            if not isinstance(content, Sequence) or len(content) != 2:
                raise TypeError(
                    f"{self.function}: expected batches of `data` to be pairs of images and labels, got "
                    f"{_checks.got(content)}"
                )
            x = _checks.images(self.function, content[0], argument="data")
            targets = _checks.labels(
                self.function, content[1], length=len(x), argument="labels of data"
            )
            if index is None:
                index = torch.arange(number, number + len(x))
            number += len(x)
            yield Block(index, _plain(x), _plain(targets))


class _Indexed(Dataset[Any]):
    """A data set asked for by `(index to report, index to read)`."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, position: tuple[int, int]) -> tuple[Any, int]:
        return self.dataset[position[1]], position[0]


class _Collate:
    """The loader's own collation, and the indices beside it; a class, so that workers can be sent it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[Any, int]]) -> tuple[Any, Tensor]:
        content = self.collate([item for item, _ in items])
        return content, torch.tensor([index for _, index in items])


def device_of(model: object) -> torch.device:
    """Of a module's first parameter; the CPU for another callable."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def _plain(value: Tensor) -> Tensor:
    """What autograd can use, also if it was made under `torch.inference_mode`."""
    return value.clone() if value.is_inference() else value


def _original(dataset: Dataset[Any], index: int) -> int:
    """The index in the data set that the subsets were taken of."""
    if isinstance(dataset, Subset):
        return _original(dataset.dataset, int(dataset.indices[index]))
    return index


def _join(blocks: list[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    return Block(
        torch.cat([b.index for b in blocks]),
        torch.cat([b.x for b in blocks]),
        torch.cat([b.targets for b in blocks]),
    )
