"""The papers' figures, from plain tensors to a matplotlib Axes.

Each function draws on `ax`, or on a new figure of a fitting size, and returns the Axes. Nothing is
shown, saved or set globally. A new figure does not belong to pyplot, so it needs no display and is freed
with its last reference; `ax.figure.savefig("figure.pdf")` writes it. For `plt.show()`, pass an `ax` from
`plt.subplots(layout="constrained")`: that layout also makes room for legends and colour bars, which
stand to the right of the Axes.

Accuracies are fractions in [0, 1], drawn in %; `nan`, a class without samples, leaves a gap. The K
`class_names` default to the numbers; if they would overlap, only every second, fifth, ... is written.
matplotlib is imported by the first drawing; without it, that is an ImportError.
"""

from ferdlib.plots.bars import plot_classes, plot_weights
from ferdlib.plots.curves import plot_survival, plot_sweep
from ferdlib.plots.pictures import plot_confusion, plot_images

__all__ = [
    "plot_classes",
    "plot_confusion",
    "plot_images",
    "plot_survival",
    "plot_sweep",
    "plot_weights",
]
