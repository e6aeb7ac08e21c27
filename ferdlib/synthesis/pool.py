"""The growing set of synthetic images, in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidState, InvalidValue, got, public


class ImagePool:
    """Labelled images, appended and never rewritten (FERD Algorithm 1, line 11).

    Images stay on the device they come from. With a capacity, the oldest give way to the newest. Further
    columns keep what was computed of an image, such as a teacher's logits.

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

    @public
    def __init__(self, capacity: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        if capacity is not None:
            _checks.integer(1, capacity=capacity)
        _checks.choice((torch.float32, torch.uint8), dtype=dtype)
        self.capacity = capacity
        self.dtype = dtype
        # Slots, the first `len` of them filled; with a capacity they are a ring.
        self._columns: dict[str, Tensor] = {}
        self._added = 0

    def __len__(self) -> int:
        return self._added if self.capacity is None else min(self._added, self.capacity)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns: "images", "labels" and further ones; none before the first `add`."""
        return tuple(self._columns)

    @property
    def labels(self) -> Tensor:
        """int64 labels of the stored images, `(len,)`."""
        return (
            self.column("labels")
            if self._columns
            else torch.empty(0, dtype=torch.int64, device="cpu")
        )

    @public
    def column(self, name: str) -> Tensor:
        """Return a column, `(len, ...)`, as a view; writing to it writes to the pool."""
        self._check_filled()
        _checks.choice(self.columns, name=name)
        return self._columns[name][: len(self)]

    @public
    def add(self, x: Tensor, y: Tensor, **columns: Tensor) -> None:
        """Append images and their labels.

        Args:
            x: float images `(N, C, H, W)` in [0, 1].
            y: int64 labels `(N,)`.
            **columns: further values of each image, `(N, ...)`; the same names every time.

        Raises:
            TypeError, ValueError: wrong types, shapes or ranges, or images or columns of another shape
                than the stored ones; nothing is stored then.
        """
        _checks.images((0.0, 1.0), x=x)
        _checks.labels(y=y)
        _checks.tensor(**columns)
        if columns.keys() & {"images", "labels"}:
            raise InvalidValue(
                f"expected `columns` next to images and labels, got {sorted(columns)}"
            )
        for name, values in {"y": y, **columns}.items():
            if values.shape[:1] != x.shape[:1]:
                raise InvalidValue(
                    f"expected `{name}` for each of {len(x)} images, got {got(values)}"
                )
        # Rounded to the nearest value; a cast alone would truncate.
        pixels = x.detach() if self.dtype == torch.float32 else (x.detach() * 255).round()
        rows = {"images": pixels.to(self.dtype), "labels": y.to(x.device), **columns}
        self._check_like_the_stored(rows)
        # Of a batch larger than the pool only the last images would stay.
        if self.capacity is not None:
            rows = {name: values[-self.capacity :] for name, values in rows.items()}
        count = len(rows["labels"])
        self._reserve(rows, self._added + count)
        # Where the ring is full, the next slots are those of the oldest images.
        slots = torch.arange(self._added, self._added + count, device=x.device)
        if self.capacity is not None:
            slots = slots % self.capacity
        for name, values in rows.items():
            self._columns[name][slots] = values
        self._added += count

    @public
    def stored(self, x: Tensor) -> Tensor:
        """Return images as they would come back: rounded, if they are kept in uint8."""
        _checks.images(x=x)
        return x if self.dtype == torch.float32 else (x * 255).round() / 255

    @public
    def draw(self, count: int, *, rng: torch.Generator | None = None) -> Tensor:
        """Draw int64 numbers of `count` stored images, uniformly, without repetition while there are enough.

        Raises:
            RuntimeError: the pool is empty.
        """
        return self._drawn(count, rng)

    @public
    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images of these numbers in float32, and their labels.

        Raises:
            TypeError, ValueError: numbers that are not int64 `(N,)`, or of no stored image.
            RuntimeError: the pool is empty.
        """
        self._check_filled()
        _checks.labels(index=index, num_classes=len(self))
        return self._read(index)

    @public
    def sample(self, count: int, *, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw images and labels, as `draw` draws their numbers.

        Returns:
            float32 images `(count, C, H, W)` and int64 labels `(count,)`.

        Raises:
            RuntimeError: the pool is empty.
        """
        return self._read(self._drawn(count, rng))

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all columns, and the number of images ever added."""
        return {
            "columns": {name: self.column(name).clone() for name in self._columns},
            "added": self._added,
        }

    @public
    def load_state_dict(
        self, state: dict[str, Any], *, device: torch.device | str | None = None
    ) -> None:
        """Take over a `state_dict`, on a device; None leaves it where it is.

        Raises:
            ValueError: not the state of a pool of this capacity and dtype; nothing is loaded then.
        """
        place = None if device is None else _checks.device(device)
        columns = checked_state(state, dtype=self.dtype, capacity=self.capacity)["columns"].items()
        self._columns = {name: values.to(place, copy=True) for name, values in columns}
        self._added = state["added"]

    def _drawn(self, count: int, rng: torch.Generator | None) -> Tensor:
        _checks.integer(1, count=count)
        _checks.generator(rng)
        self._check_filled()
        # Drawn where the generator is, then moved.
        home = self._columns["images"].device
        device = home if rng is None else rng.device
        if count <= len(self):
            index = torch.randperm(len(self), generator=rng, device=device)[:count]
        else:
            index = torch.randint(len(self), (count,), generator=rng, device=device)
        return index.to(home)

    def _read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x = self._columns["images"][index]
        return (x.float() / 255 if x.dtype == torch.uint8 else x), self._columns["labels"][index]

    def _check_filled(self) -> None:
        if not len(self):
            raise InvalidState("expected images in the pool, got an empty one")

    def _check_like_the_stored(self, rows: dict[str, Tensor]) -> None:
        stored = {name: tuple(values.shape[1:]) for name, values in self._columns.items()}
        came = {name: tuple(values.shape[1:]) for name, values in rows.items()}
        if stored and came != stored:
            raise InvalidValue(
                f"expected `x` and columns of the stored shapes, {stored} for each image, got {came}"
            )

    def _reserve(self, like: dict[str, Tensor], wanted: int) -> None:
        """Make room for `wanted` images; doubling keeps the copies linear in what is added."""
        held = len(self._columns["labels"]) if self._columns else 0
        limit = wanted if self.capacity is None else self.capacity
        if held and held >= min(wanted, limit):
            return
        size = max(wanted, 2 * held)
        if self.capacity is not None:
            size = min(size, self.capacity)
        for name, values in like.items():
            column = values.new_empty((size, *values.shape[1:]))
            if held:
                column[:held] = self._columns[name]
            self._columns[name] = column


def checked_state(state: Any, *, dtype: torch.dtype, capacity: int | None) -> dict[str, Any]:
    """Return the state of a pool of this dtype and capacity, or refuse it."""
    _checks.keys(("columns", "added"), state=state)
    columns, added = state["columns"], state["added"]
    _checks.integer(0, added=added)
    kept = added if capacity is None else min(added, capacity)
    _checks.instance(dict, columns=columns)
    _checks.tensor(**{str(name): values for name, values in columns.items()})
    fits = not columns and not added
    if {"images", "labels"} <= columns.keys():
        fits = {len(values) if values.ndim else 0 for values in columns.values()} == {kept}
        fits = fits and columns["images"].ndim == 4 and columns["images"].dtype == dtype
        fits = fits and columns["labels"].ndim == 1 and columns["labels"].dtype == torch.int64
    if not fits:
        came = ", ".join(f"{name}: {got(values)}" for name, values in columns.items()) or "none"
        raise InvalidValue(
            f"expected `state` of {kept} images in {str(dtype)[6:]} with int64 labels, got columns {came}"
        )
    return dict(state)
