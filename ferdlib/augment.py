"""Random crop and flip of image batches, each image with its own parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib._ranks import drawn

__all__ = ["Crops", "crop_flip"]


@dataclass(frozen=True)
class Crops:
    """Where each image of a batch is cut out of its padded self, and whether it is mirrored.

    Attributes:
        top, left: int64 `(N,)` in 0..2 * padding.
        mirrored: bool `(N,)`.
        padding: zeros on each side, in pixels.

    Raises:
        TypeError, ValueError: of other dtypes, lengths or ranges; images of another number.

    Example:
        >>> crops, x = Crops.draw(2, padding=1), torch.rand(2, 1, 8, 8)
        >>> crops(x).shape, bool((crops.number < Crops.count(1)).all())
        (torch.Size([2, 1, 8, 8]), True)
    """

    top: Tensor
    left: Tensor
    mirrored: Tensor
    padding: int

    def __post_init__(self) -> None:
        side = 2 * _checks.integer("Crops", "padding", self.padding, low=0) + 1
        _checks.labels("Crops", self.top, num_classes=side, argument="top")
        _checks.labels("Crops", self.left, num_classes=side, argument="left")
        if _checks.tensor("Crops", "mirrored", self.mirrored).dtype != torch.bool:
            raise TypeError(f"Crops: expected `mirrored` in bool, got {_checks.got(self.mirrored)}")
        _checks.alike("Crops", top=self.top, left=self.left, mirrored=self.mirrored)

    @staticmethod
    def draw(
        n: int,
        *,
        padding: int = 4,
        flip: bool = True,
        rng: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Crops:
        """For n images, uniformly; drawn on `rng.device` and moved to `device`."""
        name = "Crops.draw"
        _checks.integer(name, "n", n, low=0)
        _checks.integer(name, "padding", padding, low=0)
        _checks.generator(name, rng)
        device = _checks.device(name, device)

        def integers(high: int) -> Tensor:
            source = device if rng is None else rng.device

            def draw(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
                return torch.randint(high, shape, generator=generator, device=source)

            return drawn(draw, (n,), rng).to(device)

        top = integers(2 * padding + 1)
        mirrored = integers(2) == 1 if flip else torch.zeros_like(top, dtype=torch.bool)
        return Crops(top, integers(2 * padding + 1), mirrored, padding)

    @staticmethod
    def count(padding: int) -> int:
        """How many different ones an image has."""
        _checks.integer("Crops.count", "padding", padding, low=0)
        return 2 * (2 * padding + 1) ** 2

    @property
    def number(self) -> Tensor:
        """Which of them each image has, int64 `(N,)`."""
        side = 2 * self.padding + 1
        return (self.top * side + self.left) * 2 + self.mirrored

    def __call__(self, x: Tensor) -> Tensor:
        """The images `(N, C, H, W)` cut out; gradients flow into x."""
        _checks.images("Crops", x)
        _checks.same_device("Crops", top=self.top, x=x)
        if len(x) != len(self.top):
            raise ValueError(f"Crops: expected `x` of {len(self.top)} images, got {len(x)}")
        n, _, height, width = x.shape
        rows = self.top[:, None] + torch.arange(height, device=x.device)
        columns = torch.arange(width, device=x.device).expand(n, width)
        columns = torch.where(self.mirrored[:, None], columns.flip(1), columns)
        columns = columns + self.left[:, None]
        padded = F.pad(x, [self.padding] * 4)
        images = torch.arange(n, device=x.device)[:, None, None]
        # Advanced indices around a slice put their dimensions first: (N, H, W, C).
        return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def crop_flip(
    x: Tensor, *, padding: int = 4, flip: bool = True, rng: torch.Generator | None = None
) -> Tensor:
    """Random crop after zero padding, and horizontal flip, drawn for each image by itself.

    The augmentation of the CIFAR training recipes on a whole batch at once: pad by `padding` zeros on
    every side, cut out H x W at a uniformly drawn offset, mirror left-right with probability 1/2. It is
    a gather, so gradients flow into x. `Crops` is the same in two steps: draw, and apply to any batch.

    Args:
        x: float images `(N, C, H, W)`.
        padding: pixels >= 0 on each side; 0 leaves the position alone.
        flip: whether to mirror. Leave it off where mirrored images are of another class, as digits are.
        rng: source of the draws; None takes torch's default generator.

    Returns:
        Images like `x`.

    Raises:
        TypeError: `x` is not a float tensor.
        ValueError: a wrong shape, or a negative padding.

    Example:
        >>> x = torch.rand(8, 3, 32, 32)
        >>> crop_flip(x).shape
        torch.Size([8, 3, 32, 32])
        >>> torch.equal(crop_flip(x, padding=0, flip=False), x)
        True
    """
    _checks.images("crop_flip", x)
    _checks.integer("crop_flip", "padding", padding, low=0)
    _checks.generator("crop_flip", rng)
    return Crops.draw(len(x), padding=padding, flip=flip, rng=rng, device=x.device)(x)
