"""The growing set of synthetic images, in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ferdlib import _oldchecks as _checks


class ImagePool:
    """Labelled images, appended and never rewritten (FERD Algorithm 1, line 11).

    Images stay on the device they come from. With a capacity, the oldest give way to the newest. What was
    computed of an image, such as a teacher's logits, can be kept beside it, as further columns.

    Args:
        capacity: most images to keep, >= 1; None keeps all.
        dtype: torch.float32 keeps them as they are; torch.uint8 rounds them to 1/255, for a quarter of
            the memory.

    Raises:
        TypeError, ValueError: a capacity that is no positive integer, or another dtype.

    Example:
        >>> pool = ImagePool()
        >>> pool.add(torch.rand(6, 1, 8, 8), torch.arange(6), brightness=torch.rand(6))
        >>> x, y = pool.sample(4)
        >>> len(pool), x.shape
        (6, torch.Size([4, 1, 8, 8]))
        >>> index = pool.draw(4)
        >>> pool.column("brightness")[index].shape
        torch.Size([4])
    """

    def __init__(self, capacity: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        if capacity is not None:
            _checks.integer("ImagePool", "capacity", capacity, low=1)
        _checks.choice("ImagePool", "dtype", dtype, (torch.float32, torch.uint8))
        self.capacity = capacity
        self.dtype = dtype
        self._columns: dict[str, Tensor] = {}
        self._added = 0

    def __len__(self) -> int:
        return self._added if self.capacity is None else min(self._added, self.capacity)

    @property
    def labels(self) -> Tensor:
        """int64 labels of what is stored, `(len,)`."""
        return self.column("labels") if self._columns else torch.empty(0, dtype=torch.int64)

    def column(self, name: str) -> Tensor:
        """What is kept under a name, `(len, ...)`: a view, which may be written to."""
        if not self._columns:
            self._filled("ImagePool.column")
        _checks.choice("ImagePool.column", "name", name, tuple(self._columns))
        return self._columns[name][: len(self)]

    def add(self, x: Tensor, y: Tensor, **columns: Tensor) -> None:
        """Append images `(N, C, H, W)` in [0, 1] and their int64 labels `(N,)`.

        Args:
            x, y: images and labels.
            **columns: what else is kept of each image, `(N, ...)`; the same names every time.

        Raises:
            TypeError, ValueError: wrong types, shapes or ranges, or images or columns of another shape
                than the stored ones; nothing is stored then.
        """
        name = "ImagePool.add"
        _checks.images(name, x, bounds=(0.0, 1.0))
        _checks.labels(name, y, length=x.shape[0], argument="y")
        if columns.keys() & {"images", "labels"}:
            raise ValueError(
                f"{name}: expected `columns` beside images and labels, got {sorted(columns)}"
            )
        for key, values in columns.items():
            if len(_checks.tensor(name, key, values)) != len(x):
                raise ValueError(
                    f"{name}: expected `{key}` for each of {len(x)} images, got {_checks.got(values)}"
                )
        pixels = x.detach() if self.dtype == torch.float32 else (x.detach() * 255).round()
        rows = {"images": pixels.to(self.dtype), "labels": y.to(x.device)} | columns
        if self._columns:
            self._check_like_the_stored(name, x, rows)
        if self.capacity is not None:
            rows = {key: values[-self.capacity :] for key, values in rows.items()}
        count = len(rows["labels"])
        self._reserve(rows, self._added + count)
        slots = torch.arange(self._added, self._added + count, device=x.device)
        if self.capacity is not None:
            slots = slots % self.capacity
        for key, values in rows.items():
            self._columns[key][slots] = values
        self._added += count

    def stored(self, x: Tensor) -> Tensor:
        """Images as they would come back: rounded, if they are kept in uint8."""
        _checks.images("ImagePool.stored", x)
        return x if self.dtype == torch.float32 else (x * 255).round() / 255

    def draw(self, count: int, *, rng: torch.Generator | None = None) -> Tensor:
        """int64 numbers of `count` stored images, uniformly, without repetition while there are enough.

        Raises:
            RuntimeError: the pool is empty.
        """
        return self._drawn("ImagePool.draw", count, rng)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The images of these numbers in float32, and their labels.

        Raises:
            TypeError, ValueError: numbers that are not int64 `(N,)`, or of no stored image.
            RuntimeError: the pool is empty.
        """
        self._filled("ImagePool")
        _checks.labels("ImagePool", index, num_classes=len(self), argument="index")
        x = self._columns["images"][index]
        return (x.float() / 255 if x.dtype == torch.uint8 else x), self._columns["labels"][index]

    def sample(self, count: int, *, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The images and labels that `draw` draws.

        Returns:
            float32 images `(count, C, H, W)` and int64 labels `(count,)`.

        Raises:
            RuntimeError: the pool is empty.
        """
        return self[self._drawn("ImagePool.sample", count, rng)]

    def state_dict(self) -> dict[str, Any]:
        """All columns, and how many images were ever added."""
        columns = {name: self.column(name).clone() for name in self._columns}
        return {"columns": columns, "added": self._added}

    def load_state_dict(
        self, state: dict[str, Any], *, device: torch.device | str | None = None
    ) -> None:
        """What `state_dict` gave, on a device; None leaves it where it is."""
        name = "ImagePool.load_state_dict"
        _checks.mapping(name, "state", state, ("columns", "added"))
        if device is not None:
            device = _checks.device(name, device)
        columns = state["columns"].items()
        self._columns = {name: values.to(device, copy=True) for name, values in columns}
        self._added = state["added"]

    def _drawn(self, name: str, count: int, rng: torch.Generator | None) -> Tensor:
        _checks.integer(name, "count", count, low=1)
        _checks.generator(name, rng)
        self._filled(name)
        home = self._columns["images"].device
        device = home if rng is None else rng.device
        if count <= len(self):
            index = torch.randperm(len(self), generator=rng, device=device)[:count]
        else:
            index = torch.randint(len(self), (count,), generator=rng, device=device)
        return index.to(home)

    def _filled(self, name: str) -> None:
        if not len(self):
            raise RuntimeError(f"{name}: expected images in the pool, got an empty one")

    def _check_like_the_stored(self, name: str, x: Tensor, rows: dict[str, Tensor]) -> None:
        stored = {key: tuple(values.shape[1:]) for key, values in self._columns.items()}
        if x.shape[1:] != stored["images"]:
            raise ValueError(
                f"{name}: expected `x` of shape (N, {', '.join(map(str, stored['images']))}) like the stored "
                f"images, got {tuple(x.shape)}"
            )
        came = {key: tuple(values.shape[1:]) for key, values in rows.items()}
        if came != stored:
            raise ValueError(
                f"{name}: expected the columns {stored} like the stored images, got {came}"
            )

    def _reserve(self, like: dict[str, Tensor], wanted: int) -> None:
        """Storage for `wanted` images; doubling keeps the copies linear in what is added."""
        held = len(self._columns["labels"]) if self._columns else 0
        limit = wanted if self.capacity is None else self.capacity
        if held and held >= min(wanted, limit):
            return
        size = max(wanted, 2 * held)
        size = size if self.capacity is None else min(size, self.capacity)
        for key, values in like.items():
            column = torch.empty(
                (size, *values.shape[1:]), dtype=values.dtype, device=values.device
            )
            if held:
                column[:held] = self._columns[key]
            self._columns[key] = column
