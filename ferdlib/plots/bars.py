"""One figure per class: accuracies, and weights beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib.plots import _common
from ferdlib.plots._common import COLOURS, LEGEND, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches of a small "23.8": its length, and its height with some space, and upright with less.
LENGTH, HEIGHT, TIGHT = 0.3, 0.15, 0.105


def plot_classes(
    accuracies: Mapping[str, Tensor],
    *,
    intervals: Mapping[str, Tensor] | None = None,
    kind: Literal["bars", "lines"] = "bars",
    class_names: Sequence[str] | None = None,
    ylabel: str = "accuracy (%)",
    ax: Axes | None = None,
) -> Axes:
    """Class-wise accuracy of several models or attacks (FERD Fig. 1, which draws lines).

    The worst class of each is hatched, or ringed on a line, and its value is written, in %.

    Args:
        accuracies: by name, class accuracies `(K,)` in [0, 1], `nan` for an absent class.
        intervals: for any of these names, `(K, 2)`, the lower and the upper end of an error bar
            around each accuracy; `nan` draws none.
        kind: "bars" side by side, or "lines" with markers.
        class_names: K strings.
        ylabel: what was measured.
        ax: where to draw.

    Returns:
        The Axes. Its containers are, for each name, K bars, the hatched one, and the error bars.

    Raises:
        TypeError: no mapping, tensors that are not float, or class names that are not strings.
        ValueError: no tensor, shapes that differ, values outside [0, 1], an interval that its
            accuracy is not in, or of a name without accuracies.

    Example:
        >>> import torch
        >>> ax = plot_classes({"teacher": torch.tensor([0.5, torch.nan, 0.75])})
        >>> [float(bar.get_height()) for bar in ax.containers[0]], ax.texts[0].get_text()
        ([50.0, nan, 75.0], '50.0')
    """
    name = "plot_classes"
    _checks.choice(name, "kind", kind, ("bars", "lines"))
    rows = {
        model: _common.percent(name, f"accuracies[{model!r}]", a)
        for model, a in _common.named(name, "accuracies", accuracies).items()
    }
    _checks.same_shape(name, **{f"accuracies[{model!r}]": row for model, row in rows.items()})
    ends = {model: torch.stack([row, row]) for model, row in rows.items()}
    given = {} if intervals is None else _common.named(name, "intervals", intervals)
    for model, value in given.items():
        _checks.choice(name, "intervals", model, list(rows))
        ends[model] = _interval(name, f"intervals[{model!r}]", value, rows[model])
    low, high = torch.stack(list(ends.values()), dim=1)
    names = _common.class_names(name, class_names, k := low.shape[1])
    ax = _common.axes(name, ax, _common.class_width(k), 3.4)

    # To the next ten; a float32 of 0.8 is 80.000001 %, and 80 all the same.
    top = 10 * math.ceil(high.nan_to_num(nan=0.0).max() / 10 - 1e-6) or 100
    ax.set(ylabel=ylabel, xlim=(-0.6, k - 0.4), ylim=(0, 1.03 * top))
    ax.set_yticks(range(0, top + 1, 20 if top > 50 else 10))
    bars, step = kind == "bars", 0.8 / len(rows)
    upright = bars and step * _common.inches(ax)[0] < LENGTH * (k + 0.2)
    ring: Any = {"markersize": 9, "markerfacecolor": "none", "markeredgecolor": "black"}
    thin: Any = {"fmt": "none", "ecolor": "0.2", "elinewidth": 0.8, "capsize": 1.5}
    drawn, values = [], []
    for i, (model, row) in enumerate(rows.items()):
        worst, colour = int(row.nan_to_num(nan=math.inf).argmin()), COLOURS[i % len(COLOURS)]
        x = torch.arange(k) + (step * (i - (len(rows) - 1) / 2) if bars else 0)
        at, value = float(x[worst]), float(row[worst])
        handle: Any
        if bars:
            handle = ax.bar(x.tolist(), row.tolist(), step, color=colour, label=model)
            mark: Any = ax.bar(at, value, step, facecolor="none", edgecolor="black", hatch="////")
        else:
            style: Any = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            [handle] = ax.plot(x.tolist(), row.tolist(), label=model, **style)
            [mark] = ax.plot(at, value, "o", linestyle="none", **ring)
        drawn.append(handle)
        if model in given:
            lengths = [(row - low[i]).tolist(), (high[i] - row).tolist()]
            ax.errorbar(x.tolist(), row.tolist(), yerr=lengths, **thin)
        if not math.isnan(value):
            if bars:
                # Upright texts are wider than their bars: all stand above the highest of the class.
                y = float(high[:, worst].nan_to_num(nan=0.0).max() if upright else high[i, worst])
            else:
                y = _free_below(low[:, worst], i, space=0.2 * top)
            values.append((at, y, f"{value:.1f}", colour))
    _write_values(ax, values, sign=1 if bars else -1, upright=upright)
    _common.tick_classes(ax, names, k)
    ax.legend([*drawn, mark], [*rows, "worst class"], **LEGEND)
    return ax


def plot_weights(
    weights: Tensor,
    accuracy: Tensor,
    *,
    class_names: Sequence[str] | None = None,
    weights_label: str = "class weight",
    accuracy_label: str = "robust accuracy (%)",
    ax: Axes | None = None,
) -> Axes:
    """Class robustness as bars, class weights as a line on an axis of their own (FERD Fig. 4).

    Args:
        weights: class weights or sampling probabilities `(K,)`, non-negative; `nan` leaves a gap.
        accuracy: class accuracies `(K,)` in [0, 1], `nan` for an absent class.
        class_names: K strings.
        weights_label: of the right axis.
        accuracy_label: of the left axis.
        ax: where to draw.

    Returns:
        The Axes with the bars. That with the line is the last one of its figure.

    Raises:
        TypeError: tensors that are not float, or class names that are not strings.
        ValueError: shapes that differ, negative weights, or accuracies outside [0, 1].

    Example:
        >>> import torch
        >>> ax = plot_weights(torch.tensor([0.75, 0.25]), torch.tensor([0.2, 0.6]))
        >>> ax.figure.axes[-1].lines[0].get_ydata().tolist()
        [0.75, 0.25]
    """
    name = "plot_weights"
    w = _checks.class_vector(name, weights, argument="weights").detach().cpu().double()
    a = _common.percent(name, "accuracy", accuracy)
    _checks.same_shape(name, weights=w, accuracy=a)
    if bool((w < 0).any()):
        raise ValueError(f"{name}: expected non-negative `weights`, got {w[w < 0][0]:g}")
    names = _common.class_names(name, class_names, k := len(w))
    ax = _common.axes(name, ax, _common.class_width(k), 3.2)
    current = ax.figure.gca()
    twin = ax.twinx()
    ax.figure.sca(current)  # twinx made its Axes the one that pyplot draws on next
    ax.bar(range(k), a.tolist(), 0.7, color=COLOURS[0], alpha=0.65)
    twin.plot(range(k), w.tolist(), "o-", color=COLOURS[1], markeredgecolor="white")
    sides = (ax, a, accuracy_label, COLOURS[0]), (twin, w, weights_label, COLOURS[1])
    for side, row, label, colour in sides:
        side.set_ylabel(label, color=colour)
        side.tick_params(axis="y", labelcolor=colour)
        side.set_ylim(0, 1.1 * float(row.nan_to_num(nan=0.0).max()) or 1.0)
    ax.set_xlim(-0.6, k - 0.4)
    _common.tick_classes(ax, names, k)
    return ax


def _interval(function: str, argument: str, value: Any, row: Tensor) -> Tensor:
    """Lower and upper ends in %, `(2, K)`; the accuracy itself where there are none."""
    if _checks.floating(function, argument, value).shape != (len(row), 2):
        raise ValueError(
            f"{function}: expected `{argument}` of shape ({len(row)}, 2), got {tuple(value.shape)}"
        )
    ends = 100 * value.detach().cpu().double().T
    # An end may miss 0, 1 or its accuracy by the rounding of float32.
    limits = torch.stack([row.new_zeros(row.shape), row, row.new_full(row.shape, 100.0)])
    wrong = ((ends < limits[:2] - 1e-3) | (ends > limits[1:] + 1e-3)).any(dim=0)
    if bool(wrong.any()):
        c = int(wrong.nonzero()[0])
        raise ValueError(
            f"{function}: expected `{argument}` in [0, 1] and around each accuracy, got "
            f"({ends[0, c] / 100:g}, {ends[1, c] / 100:g}) around {row[c] / 100:g} in class {c}"
        )
    ends = torch.where(ends.isnan(), row, ends)
    return torch.stack([ends[0].minimum(row), ends[1].maximum(row)])


def _free_below(column: Tensor, i: int, *, space: float) -> float:
    """Where the value of line i has room: under its own point, or else under those of all lines."""
    lower = column[column < column[i]]
    crowded = len(lower) and column[i] - lower.max() < space
    return float(lower.min() if crowded else column[i])


def _write_values(
    ax: Axes, values: list[tuple[float, float, str, str]], *, sign: int, upright: bool
) -> None:
    """Texts above (sign 1) or below (-1) their points, farther off where two would overlap."""
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke

    (left, right), (wide, high) = ax.get_xlim(), _common.inches(ax)
    width = (TIGHT if upright else LENGTH) * (right - left) / wide
    placed: list[tuple[float, float]] = []
    # The room that they need below or above makes them larger in units of the axis: a few rounds.
    for _ in range(4):
        bottom, top = ax.get_ylim()
        inch = (top - bottom) / high
        height = (LENGTH if upright else HEIGHT) * inch
        placed.clear()
        for x, y, *_ in values:
            while near := [v for u, v in placed if abs(u - x) < width and abs(v - y) < height]:
                y = sign * (max(sign * v for v in near) + 1.01 * height)
            placed.append((x, y))
        ends = [y + sign * (height + 0.1 * inch) for _, y in placed]
        ax.set_ylim(min(bottom, *ends, top), max(bottom, *ends, top))
    style: Any = {"ha": "center", "va": "bottom" if sign > 0 else "top"}
    style |= {"fontsize": 7 if upright else "small", "rotation": 90 if upright else 0}
    style |= {"path_effects": [withStroke(linewidth=2, foreground="white")]}
    style |= {"xytext": (0, 3 if sign > 0 else -6), "textcoords": "offset points"}
    for at, (_, _, text, colour) in zip(placed, values, strict=True):
        darker = tuple(0.75 * part for part in to_rgb(colour))  # thin strokes look paler
        ax.annotate(text, at, color=darker, **style)
