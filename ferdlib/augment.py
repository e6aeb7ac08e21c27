"""Random crop and flip of image batches, each image with its own parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidType, InvalidValue, public

__all__ = ["Crops", "crop_flip"]


@dataclass(frozen=True)
class Crops:
    """The place where each image of a batch is cut out of its padded self, and whether it is mirrored.

    `crops[rows]` are the crops of these images, so a batch may be drawn whole and applied in parts.

    Attributes:
        top, left: int64 `(N,)` in 0..2 * padding.
        mirrored: bool `(N,)`.
        padding: zeros on each side, in pixels.

    Raises:
        TypeError, ValueError: other dtypes, lengths or ranges; another number of images.

    Example:
        >>> crops, x = Crops.draw(4, padding=1), torch.rand(4, 1, 8, 8)
        >>> torch.equal(crops[1::2](x[1::2]), crops(x)[1::2])
        True
    """

    top: Tensor
    left: Tensor
    mirrored: Tensor
    padding: int

    @public
    def __post_init__(self) -> None:
        _checks.integer(0, padding=self.padding)
        _checks.tensor(mirrored=self.mirrored)
        _checks.labels(num_classes=2 * self.padding + 1, top=self.top, left=self.left)
        if self.mirrored.dtype != torch.bool:
            raise InvalidType(f"expected `mirrored` in bool, got {_checks.got(self.mirrored)}")
        _checks.alike(top=self.top, left=self.left, mirrored=self.mirrored)

    @staticmethod
    @public
    def draw(
        n: int,
        *,
        padding: int = 4,
        flip: bool = True,
        rng: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Crops:
        """Draw for n images, uniformly, on `rng.device`, and move to `device`."""
        _checks.integer(0, n=n, padding=padding)
        _checks.generator(rng)
        device = _checks.device(device)
        source = device if rng is None else rng.device

        def integers(high: int) -> Tensor:
            return torch.randint(high, (n,), generator=rng, device=source).to(device)

        # The order of the draws is part of what a seed means.
        top = integers(2 * padding + 1)
        mirrored = integers(2) == 1 if flip else torch.zeros_like(top, dtype=torch.bool)
        return Crops(top, integers(2 * padding + 1), mirrored, padding)

    def __getitem__(self, rows: Tensor | slice) -> Crops:
        """Take the crops of these images."""
        return Crops(self.top[rows], self.left[rows], self.mirrored[rows], self.padding)

    @public
    def __call__(self, x: Tensor) -> Tensor:
        """Cut the images `(N, C, H, W)` out; gradients flow into x."""
        _checks.images(x=x)
        _checks.one_device(top=self.top, x=x)
        if len(x) != len(self.top):
            raise InvalidValue(f"expected `x` of {len(self.top)} images, got {len(x)}")
        n, _, height, width = x.shape
        # A mirrored image takes the columns of its crop from right to left.
        across = torch.arange(width, device=x.device)
        columns = torch.where(self.mirrored[:, None], across.flip(0), across) + self.left[:, None]
        rows = self.top[:, None] + torch.arange(height, device=x.device)
        padded = F.pad(x, [self.padding] * 4)
        images = torch.arange(n, device=x.device)[:, None, None]
        # Advanced indices around a slice put their dimensions first: (N, H, W, C).
        cut = padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        # As x lies in memory: a model may take a view of it.
        dense = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
        return cut.contiguous() if dense else cut


@public
def crop_flip(
    x: Tensor, *, padding: int = 4, flip: bool = True, rng: torch.Generator | None = None
) -> Tensor:
    """Random crop after zero padding, and horizontal flip, drawn for each image by itself.

    The augmentation of the CIFAR recipes on a whole batch at once: pad by zeros, cut out H x W at a
    uniformly drawn offset, mirror left-right with probability 1/2. A gather, so gradients flow into x.
    `Crops` is the same in two steps: draw, and apply.

    Args:
        x: float images `(N, C, H, W)`.
        padding: pixels >= 0 on each side.
        flip: mirror, too. Leave it off where mirrored images are of another class, as digits are.
        rng: source of the draws; None takes torch's default generator.

    Returns:
        Images like `x`.

    Raises:
        TypeError, ValueError: `x` is no float batch, or a negative padding.

    Example:
        >>> x = torch.rand(8, 3, 32, 32)
        >>> torch.equal(crop_flip(x, padding=0, flip=False), x)
        True
    """
    _checks.images(x=x)
    _checks.integer(0, padding=padding)
    _checks.generator(rng)
    return Crops.draw(len(x), padding=padding, flip=flip, rng=rng, device=x.device)(x)
