"""What the figures share: colours, the Axes, checks of names, and texts that do not overlap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib.metrics import _accuracies

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
# Inches at matplotlib's default font sizes: of a character, and of a line with the space around it.
CHARACTER, LINE = 0.085, 0.18


def axes(
    function: str,
    ax: object,
    width: float,
    height: float,
    *,
    layout: Literal["constrained", "compressed"] = "constrained",
) -> Axes:
    """The caller's Axes, or those of a new figure of so many inches."""
    try:
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'{function}: expected matplotlib, got "{error}"; pip install "ferdlib[plot]"'
        ) from error
    if ax is None:
        return Figure(figsize=(width, height), layout=layout).add_subplot()
    if not isinstance(ax, Axes):
        raise TypeError(f"{function}: expected `ax` as matplotlib Axes, got {_checks.got(ax)}")
    return ax


def class_width(k: int) -> float:
    """Inches for K classes side by side."""
    return min(max(5.0, 2.5 + k / 2), 14.0)


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of the Axes as it is, before a layout has moved its edges."""
    ax.apply_aspect()
    box, dpi = ax.get_window_extent(), ax.figure.dpi
    return box.width / dpi, box.height / dpi


def named(function: str, argument: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{function}: expected `{argument}` as tensors by name, got {_checks.got(value)}; "
            f'pass {{"name": tensor}}'
        )
    if not value:
        raise ValueError(f"{function}: expected at least one tensor in `{argument}`, got none")
    return value


def class_names(function: str, value: Any, k: int) -> list[str] | None:
    return None if value is None else _checks.strings(function, "class_names", value, count=k)


def percent(function: str, argument: str, value: Tensor) -> Tensor:
    """Class accuracies in %, float64 `(K,)` on the host."""
    return 100 * _accuracies(function, value, argument=argument).detach().cpu()


def tick_classes(
    ax: Axes, names: list[str] | None, k: int, *, which: str = "x", first: float = 0, pitch: int = 1
) -> None:
    """Class names at the ticks, slanted, or only every so many, where they would overlap."""
    width, height = inches(ax)
    labels = names or [str(c) for c in range(k)]
    length = CHARACTER * max(map(len, labels)) + 0.1
    slanted = names is not None and k * length > width
    needed = {"x": k * (1.4 * LINE if slanted else length) / width, "y": k * LINE / height}
    fewest = max(needed[axis] for axis in which)
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500) if s >= fewest), k)
    ticks = [first + pitch * c for c in range(0, k, step)]
    if "y" in which:
        ax.set_yticks(ticks, labels[::step])
    if "x" in which:
        style: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        ax.set_xticks(ticks, labels[::step], **style)
