"""Losses, one equation each. Every loss returns one value per sample, `(N,)`, unless it says so.

Logits are float `(N, K)` with K >= 2, of one shape if there are several, targets int64 labels `(N,)` in
`0..K-1`. All raise TypeError for other dtypes and types, ValueError for other shapes, labels out of range (read on
the CPU only) and numbers out of range. They compute in float32 or wider and reduce nothing: no hidden 1/K or T².
"""

from ferdlib.losses.balance import MTARDBalance, class_temperatures, class_variance
from ferdlib.losses.basic import (
    confidence_penalty,
    cross_entropy,
    cw_margin,
    decoupled_kl,
    kl_divergence,
    margin,
    uniformity,
)

# The module that is imported here has the name of one of its functions: the function is kept.
from ferdlib.losses.distillation import (
    absld,
    adaad,
    ard,
    bat,
    distillation,
    iad,
    mtard,
    rslad,
    trades,
)
from ferdlib.losses.ferd import (
    BatchNormStatistics,
    ferd_distillation_loss,
    ferd_generator_loss,
    masked_distillation,
)

__all__ = [
    "BatchNormStatistics",
    "MTARDBalance",
    "absld",
    "adaad",
    "ard",
    "bat",
    "class_temperatures",
    "class_variance",
    "confidence_penalty",
    "cross_entropy",
    "cw_margin",
    "decoupled_kl",
    "distillation",
    "ferd_distillation_loss",
    "ferd_generator_loss",
    "iad",
    "kl_divergence",
    "margin",
    "masked_distillation",
    "mtard",
    "rslad",
    "trades",
    "uniformity",
]
