"""The papers' figures, from plain tensors to a matplotlib Axes.

Each function draws on `ax`, or on a new figure of a fitting size, and returns the Axes. Nothing is
shown, saved or set globally. A new figure is none of pyplot's, so it needs no display and goes with its
last reference; `ax.figure.savefig("figure.pdf")` writes it. For `plt.show()`, pass an `ax` from
`plt.subplots(layout="constrained")`: that layout also makes room for legends and colour bars, which
stand right of the Axes, where they hide nothing.

Accuracies are fractions in [0, 1], drawn in %; `nan`, a class without samples, leaves a gap. The K
`class_names` default to the numbers; where they would overlap, every second, fifth, ... is written.
matplotlib is imported by the first drawing, and without it that is an ImportError.
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
