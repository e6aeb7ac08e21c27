"""Pictures: confusion matrices and images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public
from ferdlib.plots import _common

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Grey of the gaps between images, which may be white or black at their edges.
GAP_GREY = 0.85


@public
def plot_confusion(
    confusion: Tensor,
    *,
    class_names: Sequence[str] | None = None,
    normalize: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw a confusion matrix, true classes down and predicted classes across (FERD Fig. 2 and 9).

    Only the errors have colours, up to the largest error; the diagonal is grey on a scale of its own, so
    that it hides no confusion. Up to K = 12 the cells have their numbers.

    Args:
        confusion: int64 counts `(K, K)`, rows true; a row without samples stays blank.
        class_names: K strings.
        normalize: draw the share of the row in %, rather than the counts.
        ax: Axes to draw on.

    Returns:
        The Axes. Its first image has the errors, its second the diagonal.

    Raises:
        TypeError: counts that are not int64, or class names that are not strings.
        ValueError: a matrix that is not square with K >= 2, or negative counts.

    Example:
        >>> import torch
        >>> ax = plot_confusion(torch.tensor([[3, 1], [0, 2]]))
        >>> [text.get_text() for text in ax.texts]
        ['75.0', '25.0', '0', '100.0']
    """
    _checks.confusion(confusion=confusion)
    _checks.choice((True, False), normalize=normalize)
    counts = confusion.cpu()
    k = len(counts)
    _common.check_names(class_names, k)
    side = 1.2 + 0.42 * max(k, 6) if k <= 12 else 6.5
    ax = _common.axes(ax, side + 1, side, layout="compressed")
    from matplotlib.colors import LinearSegmentedColormap

    total = counts.double().sum(dim=1, keepdim=True)
    shown = torch.where(total > 0, 100 * counts / total if normalize else counts.double(), math.nan)
    unit, diagonal = (
        "% of row" if normalize else "samples",
        torch.eye(k, dtype=torch.bool, device="cpu"),
    )
    # Both scales end light enough for black numbers.
    reds, greys = ["#fff7ec", "#fdbb84", "#e34a33"], ["0.97", "0.65"]
    parts = [("errors", ~diagonal, reds, 0.53), ("correct", diagonal, greys, 0.0)]
    for what, cells, colours, bottom in parts:
        part = shown.where(cells, math.nan)
        scale: Any = {"vmin": 0, "vmax": float(part.nan_to_num(nan=0.0).max()) or 1.0}
        image = ax.imshow(
            part.numpy(), cmap=LinearSegmentedColormap.from_list(what, colours), **scale
        )
        bar = ax.inset_axes((1.03, bottom, 0.04, 0.47))
        ax.figure.colorbar(image, cax=bar, label=f"{what} ({unit})")
    if k <= 12:
        size = min(9.0, 72 * min(_common.inches(ax)) / k / 3.5)
        for i, j in shown.isfinite().nonzero().tolist():
            number = f"{shown[i, j]:.1f}" if normalize and counts[i, j] else f"{counts[i, j]}"
            ax.text(j, i, number, ha="center", va="center", fontsize=size)
    ax.set(xlabel="predicted class", ylabel="true class")
    _common.tick_classes(ax, class_names, k, which="xy")
    return ax


@public
def plot_images(
    x: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    per_class: int = 10,
    class_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the first images of each class as one picture, a row per class (FERD Fig. 6, 7 and 10).

    Args:
        x: images `(N, C, H, W)` in [0, 1], grey (C = 1) or red, green and blue (C = 3).
        labels: int64 `(N,)` in `0..num_classes-1`.
        num_classes: K >= 2; the row of a class with too few images ends blank.
        per_class: number of columns, at least 1.
        class_names: K strings.
        ax: Axes to draw on.

    Returns:
        The Axes. Its image has three channels, and light grey gaps of a sixteenth of an image.

    Raises:
        TypeError: images that are not float, labels that are not int64, or class names that are not
            strings.
        ValueError: another shape, images outside [0, 1], lengths that differ, or labels out of range.

    Example:
        >>> import torch
        >>> ax = plot_images(torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 1]), num_classes=2, per_class=2)
        >>> ax.images[0].get_array().shape
        (17, 17, 3)
    """
    _checks.integer(2, num_classes=num_classes)
    _checks.integer(1, per_class=per_class)
    _checks.images((0.0, 1.0), x=x)
    _checks.tensor(labels=labels)
    images, y, k = x.detach().cpu().float(), labels.cpu(), num_classes
    _checks.labels(num_classes=k, like=images, labels=y)
    if images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise InvalidValue(
            f"expected `x` of shape (N, C, H, W) with C = 1 or 3, got {tuple(images.shape)}"
        )
    _common.check_names(class_names, k)
    height, width = images.shape[2:]
    gap = math.ceil(min(height, width) / 16)
    down, across = height + gap, width + gap
    picture = torch.full((3, k * down - gap, per_class * across - gap), GAP_GREY, device="cpu")
    for c in range(k):
        for j, image in enumerate(images[y == c][:per_class]):
            picture[:, c * down :, j * across :][:, :height, :width] = image
    inch = min(0.6, max(0.25, 12 / k))
    margin = 0.3 + _common.CHARACTER * max(map(len, class_names or [str(k)]))
    size = per_class * inch * across / down + margin, k * inch + 0.1
    ax = _common.axes(ax, *size, layout="compressed")
    ax.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.spines[:].set_visible(False)
    ax.set_xticks([])
    ax.tick_params(length=0)
    _common.tick_classes(ax, class_names, k, which="y", first=(height - 1) / 2, pitch=down)
    return ax
