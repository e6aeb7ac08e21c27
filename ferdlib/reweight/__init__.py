"""Rules that turn class statistics into class weights and sampling probabilities.

A rule maps one finite statistic per class, float `(K,)`, to one number per class, `(K,)`.
`margin_*` and `kl_ball` return probabilities, which sum to 1; `lps_*` and `confusion_weights` return
weights of mean 1, `gairat` the same for the samples of a batch; `cfa_*` scale an attack's radius
and mix two losses. `nan` stands for a class without samples: as a probability it gets what the mean
statistic of the present classes would, as a weight or factor 1. Rules compute in float64 and return
the dtype and device of the statistic. They raise TypeError for a statistic that is not float,
ValueError for a wrong shape or a value out of range.

`ClassMean` makes statistics of values that come batch by batch; `ClassWeights`, `FRLWeights` and
`HedgeWeights` keep weights from epoch to epoch.
"""

from ferdlib.reweight.fairness import cfa_margins, cfa_mixing, confusion_weights, gairat, kl_ball
from ferdlib.reweight.rules import (
    lps_linear,
    lps_power,
    lps_sigmoid,
    lps_tanh,
    margin_minmax,
    margin_softmax,
    normalize,
)
from ferdlib.reweight.stateful import FRLWeights, HedgeWeights
from ferdlib.reweight.statistics import ClassMean, ClassWeights

__all__ = [
    "ClassMean",
    "ClassWeights",
    "FRLWeights",
    "HedgeWeights",
    "cfa_margins",
    "cfa_mixing",
    "confusion_weights",
    "gairat",
    "kl_ball",
    "lps_linear",
    "lps_power",
    "lps_sigmoid",
    "lps_tanh",
    "margin_minmax",
    "margin_softmax",
    "normalize",
]
