"""Colours, Axes, checks and tick labels that all figures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidValue

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours for all kinds of colour vision; grey for their yellow, too light for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
MARKERS = "osD^vPX"
LEGEND: Any = {
    "loc": "upper left",
    "bbox_to_anchor": (1.01, 1),
    "borderaxespad": 0,
    "frameon": False,
}
# Inches of a character, and of a line with the space around it, at matplotlib's default font sizes.
CHARACTER, LINE = 0.085, 0.18


def axes(
    ax: Any,
    width: float,
    height: float,
    *,
    layout: Literal["constrained", "compressed"] = "constrained",
) -> Axes:
    """Return the caller's Axes, or those of a new figure of so many inches."""
    try:
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'ferdlib.plots: expected matplotlib, got "{error}"; pip install "ferdlib[plot]"'
        ) from error
    if ax is None:
        return Figure(figsize=(width, height), layout=layout).add_subplot()
    _checks.instance(Axes, ax=ax)
    return cast(Axes, ax)


def class_width(k: int) -> float:
    """Inches for K classes side by side."""
    return min(max(5.0, 2.5 + k / 2), 14.0)


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of the Axes as it is, before a layout has moved its edges."""
    ax.apply_aspect()
    box, dpi = ax.get_window_extent(), ax.figure.dpi
    return box.width / dpi, box.height / dpi


def by_name(**tensors: Any) -> dict[str, Any]:
    """Return the values of a mapping under the names that errors give them."""
    _checks.instance(Mapping, **tensors)
    ((name, found),) = tensors.items()
    if not found:
        raise InvalidValue(f"expected at least one tensor in `{name}`, got none")
    return {f"{name}[{key!r}]": value for key, value in found.items()}


def check_names(class_names: Any, k: int) -> None:
    if class_names is not None:
        _checks.strings(k, class_names=class_names)


def on_host(value: Tensor) -> Tensor:
    """Return numbers in float64, without a graph."""
    return value.detach().cpu().double()


def legend(ax: Axes, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Write names beside their handles as they are: neither formulas nor, with a leading "_", left out."""
    made = ax.legend(handles, ["name"] * len(names), **LEGEND)
    for text, name in zip(made.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)


def tick_classes(
    ax: Axes,
    names: Sequence[str] | None,
    k: int,
    *,
    which: str = "x",
    first: float = 0,
    pitch: int = 1,
) -> None:
    """Write class names at the ticks; slant them or skip some where they would overlap."""
    width, height = inches(ax)
    labels = list(names or map(str, range(k)))
    length = CHARACTER * max(map(len, labels)) + 0.1
    slanted = names is not None and k * length > width
    needed = {"x": k * (1.4 * LINE if slanted else length) / width, "y": k * LINE / height}
    fewest = max(needed[axis] for axis in which)
    # Round steps are easier to count than the smallest that fits.
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500) if s >= fewest), k)
    ticks = [first + pitch * c for c in range(0, k, step)]
    if "y" in which:
        ax.set_yticks(ticks, labels[::step], parse_math=False)
    if "x" in which:
        style: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        ax.set_xticks(ticks, labels[::step], parse_math=False, **style)
