"""The growing set of synthetic images, in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ferdlib import _checks


class ImagePool:
    """Labelled images, appended and never rewritten (FERD Algorithm 1, line 11).

    Images stay on the device they come from. With a capacity, the oldest give way to the newest.

    Args:
        capacity: most images to keep, >= 1; None keeps all.
        dtype: torch.float32 keeps them as they are; torch.uint8 rounds them to 1/255, for a quarter of
            the memory.

    Raises:
        TypeError, ValueError: a capacity that is no positive integer, or another dtype.

    Example:
        >>> pool = ImagePool()
        >>> pool.add(torch.rand(6, 1, 8, 8), torch.arange(6))
        >>> x, y = pool.sample(4)
        >>> len(pool), x.shape
        (6, torch.Size([4, 1, 8, 8]))
    """

    def __init__(self, capacity: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        if capacity is not None:
            _checks.integer("ImagePool", "capacity", capacity, low=1)
        _checks.choice("ImagePool", "dtype", dtype, (torch.float32, torch.uint8))
        self.capacity = capacity
        self.dtype = dtype
        self._images: Tensor | None = None
        self._labels = torch.empty(0, dtype=torch.int64)
        self._added = 0

    def __len__(self) -> int:
        return self._added if self.capacity is None else min(self._added, self.capacity)

    @property
    def labels(self) -> Tensor:
        """int64 labels of what is stored, `(len,)`."""
        return self._labels[: len(self)]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Append images `(N, C, H, W)` in [0, 1] and their int64 labels `(N,)`.

        Raises:
            TypeError, ValueError: wrong types, shapes or ranges, or images of another shape than the
                stored ones; nothing is stored then.
        """
        _checks.images("ImagePool.add", x, bounds=(0.0, 1.0))
        _checks.labels("ImagePool.add", y, length=x.shape[0], argument="y")
        if self._images is not None and x.shape[1:] != self._images.shape[1:]:
            raise ValueError(
                f"ImagePool.add: expected `x` of shape (N, {', '.join(map(str, self._images.shape[1:]))}) "
                f"like the stored images, got {tuple(x.shape)}"
            )
        if self.capacity is not None and len(x) > self.capacity:
            x, y = x[-self.capacity :], y[-self.capacity :]
        images = self._reserve(x, self._added + len(x))
        slots = torch.arange(self._added, self._added + len(x), device=x.device)
        if self.capacity is not None:
            slots = slots % self.capacity
        stored = x.detach() if self.dtype == torch.float32 else (x.detach() * 255).round()
        images[slots] = stored.to(self.dtype)
        self._labels[slots] = y.to(x.device)
        self._added += len(x)

    def sample(self, count: int, *, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`count` images drawn uniformly, without repetition while there are enough.

        Returns:
            float32 images `(count, C, H, W)` and int64 labels `(count,)`.

        Raises:
            RuntimeError: the pool is empty.
        """
        _checks.integer("ImagePool.sample", "count", count, low=1)
        _checks.generator("ImagePool.sample", rng)
        if self._images is None:
            raise RuntimeError("ImagePool.sample: expected images in the pool, got an empty one")
        device = self._images.device if rng is None else rng.device
        if count <= len(self):
            index = torch.randperm(len(self), generator=rng, device=device)[:count]
        else:
            index = torch.randint(len(self), (count,), generator=rng, device=device)
        index = index.to(self._images.device)
        x = self._images[index]
        return (x.float() / 255 if x.dtype == torch.uint8 else x), self._labels[index]

    def state_dict(self) -> dict[str, Any]:
        """Images, labels and how many were ever added."""
        images = None if self._images is None else self._images[: len(self)].clone()
        return {"images": images, "labels": self.labels.clone(), "added": self._added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._images, self._labels, self._added = None, torch.empty(0, dtype=torch.int64), 0
        if state["images"] is None:
            return
        self._images, self._labels = state["images"].clone(), state["labels"].clone()
        self._added = state["added"]

    def _reserve(self, like: Tensor, wanted: int) -> Tensor:
        """Storage for `wanted` images; doubling keeps the copies linear in what is added."""
        if self.capacity is not None:
            wanted = min(wanted, self.capacity)
        held = 0 if self._images is None else len(self._images)
        if self._images is None or held < wanted:
            size = max(wanted, 2 * held)
            size = size if self.capacity is None else min(size, self.capacity)
            images = torch.empty((size, *like.shape[1:]), dtype=self.dtype, device=like.device)
            labels = torch.empty(size, dtype=torch.int64, device=like.device)
            if self._images is not None:
                images[:held], labels[:held] = self._images, self._labels
            self._images, self._labels = images, labels
        return self._images
