r"""Confidence intervals and paired tests of class-wise accuracies, and of the figures made of them, from counts.

The samples of a class count as independent draws, $X_k \sim \mathrm{Bin}(n_k, p_k)$. Intervals are for the figures
of the true accuracies $p_k$; tests compare two models on the same samples. Both speak of these models: another
training run, or another attack, is another matter. Results are float64, on the CPU.
"""

from ferdlib.stats.intervals import (
    average_interval,
    nsd_interval,
    simultaneous_interval,
    wilson_interval,
    worst_class_interval,
    worst_fraction_interval,
)
from ferdlib.stats.paired import holm, mcnemar, paired_permutation

__all__ = [
    "average_interval",
    "holm",
    "mcnemar",
    "nsd_interval",
    "paired_permutation",
    "simultaneous_interval",
    "wilson_interval",
    "worst_class_interval",
    "worst_fraction_interval",
]
