"""Random crop and flip of image batches, each image with its own parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ferdlib import _checks

__all__ = ["crop_flip"]


def crop_flip(
    x: Tensor, *, padding: int = 4, flip: bool = True, rng: torch.Generator | None = None
) -> Tensor:
    """Random crop after zero padding, and horizontal flip, drawn for each image by itself.

    The augmentation of the CIFAR training recipes on a whole batch at once: pad by `padding` zeros on
    every side, cut out H x W at a uniformly drawn offset, mirror left-right with probability 1/2. It is
    a gather, so gradients flow into x.

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
    n, _, height, width = x.shape
    device = x.device if rng is None else rng.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=rng, device=device).to(x.device)

    rows = draw(2 * padding + 1) + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(n, width)
    if flip:
        columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    columns = columns + draw(2 * padding + 1)
    padded = F.pad(x, [padding] * 4)
    images = torch.arange(n, device=x.device)[:, None, None]
    # Advanced indices around a slice put their dimensions first: (N, H, W, C).
    return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
