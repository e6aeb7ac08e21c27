"""Curves: metrics over a parameter, and classes over the steps of an attack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public
from ferdlib.plots import _common
from ferdlib.plots._common import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@public
def plot_sweep(
    values: Sequence[float],
    figures: Mapping[str, Tensor],
    *,
    intervals: Mapping[str, Tensor] | None = None,
    xlabel: str,
    ylabel: str,
    ax: Axes | None = None,
) -> Axes:
    """Draw metrics over a parameter that was varied (FERD Fig. 5 and 8).

    Repetitions are small dots, with a line through their means and a band of one standard deviation
    (`ddof=1`) to either side.

    Args:
        values: S finite numbers; the line goes through them in ascending order.
        figures: by name, a metric `(S,)`, or `(S, R)` of R runs each; `nan` leaves a gap.
        intervals: `(S, 2)` for some or all of these names, the ends of error bars; `nan` draws none.
        xlabel: name of the parameter.
        ylabel: name of the metric, with its unit.
        ax: Axes to draw on.

    Returns:
        The Axes.

    Raises:
        TypeError: values that are not numbers, no mapping, or tensors that are not float.
        ValueError: no tensor, a shape that does not begin with S, infinite values or figures.

    Example:
        >>> import torch
        >>> runs = torch.tensor([[0.25, 0.5], [0.5, 0.5]])
        >>> ax = plot_sweep([0.1, 0.5], {"worst": runs}, xlabel="gamma", ylabel="accuracy")
        >>> ax.lines[0].get_ydata().tolist(), len(ax.lines[1].get_ydata())
        ([0.375, 0.5], 4)
    """
    _checks.instance(Sequence, values=values)
    for i, each in enumerate(values):
        _checks.real(**{f"values[{i}]": each})
    x, order = torch.tensor(values, device="cpu").double().sort()
    named = _common.by_name(figures=figures)
    _checks.floating(**named)
    for name, value in named.items():
        if value.ndim not in (1, 2) or len(value) != len(x) or not value.numel():
            raise InvalidValue(
                f"expected `{name}` of shape ({len(x)},) or ({len(x)}, R), a row for each of `values`, "
                f"got {tuple(value.shape)}"
            )
        if bool(value.isinf().any()):
            raise InvalidValue(f"expected finite `{name}` (or nan), got inf")
    given = {} if intervals is None else intervals
    if intervals is not None:
        _checks.floating(**_common.by_name(intervals=intervals))
    for name, value in given.items():
        _checks.choice(list(figures), intervals=name)
        if value.shape != (len(x), 2):
            came = f"({len(x)}, 2), got {tuple(value.shape)}"
            raise InvalidValue(f"expected `intervals[{name!r}]` of shape {came}")
    rows = {key: _common.on_host(y).reshape(len(x), -1)[order] for key, y in figures.items()}
    handles = []
    ax = _common.axes(ax, 5.6, 3.4)
    for i, (label, y) in enumerate(rows.items()):
        mean, runs, colour = y.mean(dim=1), y.shape[1], COLOURS[i % len(COLOURS)]
        style: Any = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        handles += ax.plot(x.tolist(), mean.tolist(), **style)
        if label in given:
            ends = _common.on_host(given[label])[order]
            # Drawn by itself, because the mean need not lie inside.
            ax.vlines(x.tolist(), *ends.T.tolist(), color=colour, linewidth=0.8)
        if runs > 1:
            every = x.repeat_interleave(runs).tolist(), y.flatten().tolist()
            ax.plot(*every, linestyle="none", marker=".", markersize=4, color=colour)
            lower, upper = (mean - y.std(dim=1)).tolist(), (mean + y.std(dim=1)).tolist()
            ax.fill_between(x.tolist(), lower, upper, color=colour, alpha=0.2, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    _common.legend(ax, handles, list(rows))
    return ax


@public
def plot_survival(
    fooled_at: Tensor,
    targets: Tensor,
    *,
    num_classes: int,
    steps: int,
    class_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw each class's share of samples that no iterate of an attack has fooled so far.

    The mean over classes is black, the class that ends worst (or each of several) thicker; beyond K = 12 only
    those have a colour. Counts of `ferdlib.attacks.least_pgd_steps` (Fair-ARD Eq. 5) can be drawn as they are: its
    `steps=T` judges the iterates 0..T-1 and says T for never, which is `steps=T - 1` here.

    Args:
        fooled_at: int64 `(N,)`, the first misclassified iterate in `0..steps`, `steps + 1` for none.
        targets: int64 labels `(N,)` in `0..num_classes-1`.
        num_classes: K >= 2; a class without samples has no curve.
        steps: the last iterate, at least 1.
        class_names: K strings.
        ax: Axes to draw on.

    Returns:
        The Axes. Its first line is the mean, then come the classes that have samples.

    Raises:
        TypeError: tensors that are not int64, or class names that are not strings.
        ValueError: lengths that differ, labels or iterates out of range.

    Example:
        >>> import torch
        >>> fooled_at, targets = torch.tensor([0, 3, 2, 2]), torch.tensor([0, 0, 1, 1])
        >>> ax = plot_survival(fooled_at, targets, num_classes=2, steps=2)
        >>> [line.get_ydata().tolist() for line in ax.lines]
        [[75.0, 75.0, 25.0], [50.0, 50.0, 50.0], [100.0, 100.0, 0.0]]
    """
    _checks.integer(2, num_classes=num_classes)
    _checks.integer(1, steps=steps)
    _checks.tensor(targets=targets, fooled_at=fooled_at)
    k, y, first = num_classes, targets.cpu(), fooled_at.cpu()
    _checks.labels(num_classes=k, targets=y)
    _checks.labels(num_classes=steps + 2, like=y, fooled_at=first)
    _common.check_names(class_names, k)
    names = class_names or [f"class {c}" for c in range(k)]
    ax = _common.axes(ax, 6.0, 3.8)
    from matplotlib.ticker import MaxNLocator

    t = range(steps + 1)
    alive = 100 * (first[:, None] > torch.tensor(t, device="cpu")).double()
    share = torch.stack([alive[y == c].mean(dim=0) for c in range(k)])
    # An absent class has no curve, and is not the worst.
    mean, end = share.nanmean(dim=0).tolist(), share[:, -1].nan_to_num(nan=math.inf)
    tied = (end == end.min()) & end.isfinite()
    handles = ax.step(t, mean, where="mid", color="black", linewidth=3)
    written = ["mean over classes"]
    for c in end.isfinite().nonzero().flatten().tolist():
        worst = bool(tied[c])
        style: Any = {"color": COLOURS[c % len(COLOURS)], "linestyle": "-" if c < 7 else "--"}
        style |= {"linewidth": 1.2}
        if k > 12:
            style = {"color": COLOURS[1] if worst else "0.75", "linewidth": 0.6, "zorder": 1}
        if worst:
            style |= {"linewidth": 2.5, "zorder": 3}
        line = ax.step(t, share[c].tolist(), where="mid", **style)
        # Of many classes the legend has the first of the worst alone.
        if k <= 12 or (worst and not bool(tied[:c].any())):
            more = int(tied.sum()) - 1 if k > 12 else 0
            ends = f" and {more} more, which end at" if more else ", ends at"
            handles += line
            written.append(names[c] + f"{ends} {end[c]:.1f}" * worst)
    ax.set(xlabel="iterate of the attack", ylabel="still correct (%)", ylim=(0, 102))
    ax.set_xlim(-0.5, t[-1] + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _common.legend(ax, handles, written)
    return ax
