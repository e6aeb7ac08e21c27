"""Losses, one equation each. Every loss returns one value per sample, `(N,)`, unless it says so."""

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
