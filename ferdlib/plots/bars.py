"""Class-wise accuracies as bars or lines, and class weights over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public
from ferdlib.plots import _common
from ferdlib.plots._common import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The end of an axis of accuracies in %, and some room for a marker at 100.
ROOF = 103
# Inches of a small "23.8": its length, its height with some space, and with less if it stands upright.
LENGTH, HEIGHT, TIGHT = 0.3, 0.15, 0.105


@public
def plot_classes(
    accuracies: Mapping[str, Tensor],
    *,
    intervals: Mapping[str, Tensor] | None = None,
    kind: Literal["bars", "points", "lines"] = "bars",
    class_names: Sequence[str] | None = None,
    ylabel: str = "accuracy (%)",
    ax: Axes | None = None,
) -> Axes:
    """Draw the class-wise accuracy of several models or attacks (FERD Fig. 1, which draws lines).

    The worst class of each model, or every one of several that are, is hatched or ringed, with the value in %.

    Args:
        accuracies: by name, class accuracies `(K,)` in [0, 1], `nan` for an absent class.
        intervals: `(K, 2)` for some or all of these names, the lower and upper end of an error bar
            around each accuracy; `nan` draws none.
        kind: "bars" side by side; "points" for many classes; "lines" through them, although classes have no order.
        class_names: K strings.
        ylabel: name of the measured quantity.
        ax: Axes to draw on.

    Returns:
        The Axes. Its containers are, for each name, K bars, the hatched ones, and the error bars.

    Raises:
        TypeError: no mapping, tensors that are not float, or class names that are not strings.
        ValueError: no tensor, shapes that differ, values outside [0, 1], an interval without its
            accuracy inside, or for a name without accuracies.

    Example:
        >>> import torch
        >>> ax = plot_classes({"teacher": torch.tensor([0.5, torch.nan, 0.75])})
        >>> [float(bar.get_height()) for bar in ax.containers[0]], ax.texts[0].get_text()
        ([50.0, nan, 75.0], '50.0')
    """
    _checks.choice(("bars", "points", "lines"), kind=kind)
    named = _common.by_name(accuracies=accuracies)
    _checks.class_vector(0, 1, **named)
    _checks.alike(**named)
    rows = {model: 100 * _common.on_host(value) for model, value in accuracies.items()}
    # A model without intervals has error bars of no length.
    ends = {model: torch.stack([row, row]) for model, row in rows.items()}
    given = {} if intervals is None else intervals
    if intervals is not None:
        _checks.floating(**_common.by_name(intervals=intervals))
    for model, value in given.items():
        _checks.choice(list(rows), intervals=model)
        ends[model] = _interval(f"intervals[{model!r}]", value, rows[model])
    low, high = torch.stack(list(ends.values()), dim=1)
    k = low.shape[1]
    _common.check_names(class_names, k)
    ax = _common.axes(ax, _common.class_width(k), 3.4)

    # Up to the next ten; a float32 of 0.8 is 80.000001 %, and 80 all the same.
    top = 10 * math.ceil(high.nan_to_num(nan=0.0).max() / 10 - 1e-6) or 100
    ax.set(ylabel=ylabel, xlim=(-0.6, k - 0.4), ylim=(0, 1.03 * top))
    ax.set_yticks(range(0, top + 1, 20 if top > 50 else 10))
    bars, step = kind == "bars", 0.8 / len(rows)
    upright = bars and step * _common.inches(ax)[0] < LENGTH * (k + 0.2)
    ring: Any = {"markersize": 9, "markerfacecolor": "none", "markeredgecolor": "black"}
    thin: Any = {"fmt": "none", "ecolor": "0.2", "elinewidth": 0.8, "capsize": 1.5}
    drawn, values = [], []
    for i, (model, row) in enumerate(rows.items()):
        least, colour = row.nan_to_num(nan=math.inf).min(), COLOURS[i % len(COLOURS)]
        x = torch.arange(k, device="cpu") + (step * (i - (len(rows) - 1) / 2) if bars else 0)
        tied = (row == least).nonzero().flatten()
        at = x[tied].tolist(), row[tied].tolist()
        handle: Any
        if bars:
            handle = ax.bar(x.tolist(), row.tolist(), step, color=colour)
            mark: Any = ax.bar(*at, step, facecolor="none", edgecolor="black", hatch="////")
        else:
            style: Any = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            style["linestyle"] = "-" if kind == "lines" else "none"
            [handle] = ax.plot(x.tolist(), row.tolist(), **style)
            [mark] = ax.plot(*at, "o", linestyle="none", **ring)
        drawn.append(handle)
        if model in given:
            lengths = [(row - low[i]).tolist(), (high[i] - row).tolist()]
            ax.errorbar(x.tolist(), row.tolist(), yerr=lengths, **thin)
        if len(tied):
            worst = int(tied[0])
            highest = float(high[:, worst].nan_to_num(nan=0.0).max())
            if bars:
                # Upright texts are wider than their bars: all stand above the highest of the class.
                y = highest if upright else float(high[i, worst])
            else:
                y = _free_below(low[:, worst], i, space=0.2 * top)
            values.append((float(x[worst]), y, highest, f"{float(least):.1f}", colour))
    _write_values(ax, values, sign=1 if bars else -1, upright=upright)
    _common.tick_classes(ax, class_names, k)
    _common.legend(ax, [*drawn, mark], [*rows, "worst class"])
    return ax


@public
def plot_weights(
    weights: Tensor,
    accuracy: Tensor,
    *,
    class_names: Sequence[str] | None = None,
    weights_label: str = "class weight",
    accuracy_label: str = "robust accuracy (%)",
    ax: Axes | None = None,
) -> Axes:
    """Draw class robustness as bars, and class weights as points on a second axis (FERD Fig. 4).

    Args:
        weights: class weights or sampling probabilities `(K,)`, non-negative; `nan` leaves a gap.
        accuracy: class accuracies `(K,)` in [0, 1], `nan` for an absent class.
        class_names: K strings.
        weights_label: text of the right axis.
        accuracy_label: text of the left axis.
        ax: Axes to draw on.

    Returns:
        The Axes with the bars. The Axes with the points is the last one of its figure.

    Raises:
        TypeError: tensors that are not float, or class names that are not strings.
        ValueError: shapes that differ, negative weights, or accuracies outside [0, 1].

    Example:
        >>> import torch
        >>> ax = plot_weights(torch.tensor([0.75, 0.25]), torch.tensor([0.2, 0.6]))
        >>> ax.figure.axes[-1].lines[0].get_ydata().tolist()
        [0.75, 0.25]
    """
    _checks.class_vector(0, weights=weights)
    _checks.class_vector(0, 1, accuracy=accuracy)
    w, a = _common.on_host(weights), 100 * _common.on_host(accuracy)
    _checks.alike(weights=w, accuracy=a)
    k = len(w)
    _common.check_names(class_names, k)
    ax = _common.axes(ax, _common.class_width(k), 3.2)
    # twinx makes its Axes the one that pyplot draws on next; the caller's choice is put back.
    current = ax.figure.gca()
    twin = ax.twinx()
    ax.figure.sca(current)
    ax.bar(range(k), a.tolist(), 0.7, color=COLOURS[0], alpha=0.65)
    # Classes have no order that a line could follow.
    twin.plot(range(k), w.tolist(), "o", color=COLOURS[1], markeredgecolor="white")
    sides = (ax, a, accuracy_label, COLOURS[0]), (twin, w, weights_label, COLOURS[1])
    for side, row, label, colour in sides:
        side.set_ylabel(label, color=colour)
        side.tick_params(axis="y", labelcolor=colour)
        side.set_ylim(0, 1.1 * float(row.nan_to_num(nan=0.0).max()) or 1.0)
    ax.set_ylim(top=min(ax.get_ylim()[1], ROOF))
    ax.set_xlim(-0.6, k - 0.4)
    _common.tick_classes(ax, class_names, k)
    return ax


def _interval(name: str, value: Tensor, row: Tensor) -> Tensor:
    """Return lower and upper ends in %, `(2, K)`; the accuracy itself where there are none."""
    if value.shape != (len(row), 2):
        raise InvalidValue(f"expected `{name}` of shape ({len(row)}, 2), got {tuple(value.shape)}")
    ends = 100 * _common.on_host(value).T
    # An end may miss 0, 1 or its accuracy by the rounding of float32.
    limits = torch.stack([row.new_zeros(row.shape), row, row.new_full(row.shape, 100.0)])
    wrong = ((ends < limits[:2] - 1e-3) | (ends > limits[1:] + 1e-3)).any(dim=0)
    if bool(wrong.any()):
        c = int(wrong.nonzero()[0])
        raise InvalidValue(
            f"expected `{name}` in [0, 1] and around each accuracy, got "
            f"({ends[0, c] / 100:g}, {ends[1, c] / 100:g}) around {row[c] / 100:g} in class {c}"
        )
    ends = torch.where(ends.isnan(), row, ends)
    return torch.stack([ends[0].minimum(row), ends[1].maximum(row)])


def _free_below(column: Tensor, i: int, *, space: float) -> float:
    """Return the height at which the value of line i has room: under its point, or under all lines."""
    lower = column[column < column[i]]
    crowded = len(lower) and column[i] - lower.max() < space
    return float(lower.min() if crowded else column[i])


def _write_values(
    ax: Axes, values: list[tuple[float, float, float, str, str]], *, sign: int, upright: bool
) -> None:
    """Write texts above (sign 1) or below (-1) their points, farther off where two would overlap.

    The values are x, y, the y above which all texts find room, text and colour.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke

    (left, right), (wide, high) = ax.get_xlim(), _common.inches(ax)
    width = (TIGHT if upright else LENGTH) * (right - left) / wide
    placed: list[tuple[float, float]] = []
    # Room for the texts makes the axis longer, and so each text larger in its units: a few rounds settle it.
    for _ in range(4):
        inch = ax.get_ylim()[1] / high
        height = (LENGTH if upright else HEIGHT) * inch
        placed.clear()
        for x, y, *_ in values:
            while near := [v for u, v in placed if abs(u - x) < width and abs(v - y) < height]:
                y = sign * (max(sign * v for v in near) + 1.01 * height)
            placed.append((x, y))
        ends = [y + sign * (height + 0.1 * inch) for _, y in placed]
        if min(ends, default=0) < 0:
            # No accuracy is below 0, and no axis: they stand above all points of their class.
            higher = [(x, top, top, text, colour) for x, _, top, text, colour in values]
            return _write_values(ax, higher, sign=1, upright=upright)
        # Nor is one above 100 %: what finds no room below it stands above the frame.
        ax.set_ylim(0, min(max(ax.get_ylim()[1], *ends, 0), ROOF))
    ax.spines["top"].set_visible(max(ends, default=0) <= ROOF)
    style: Any = {"ha": "center", "va": "bottom" if sign > 0 else "top"}
    style |= {"fontsize": 7 if upright else "small", "rotation": 90 if upright else 0}
    style |= {"path_effects": [withStroke(linewidth=2, foreground="white")]}
    style |= {"xytext": (0, 3 if sign > 0 else -6), "textcoords": "offset points"}
    for at, (*_, text, colour) in zip(placed, values, strict=True):
        # Thin strokes look paler than bars.
        darker = tuple(0.75 * part for part in to_rgb(colour))
        ax.annotate(text, at, color=darker, annotation_clip=False, **style)
