"""Losses, one equation each. Every loss returns one value per sample, `(N,)`, unless it says so."""

from ferdlib.losses.basic import (
    confidence_penalty,
    cross_entropy,
    cw_margin,
    decoupled_kl,
    distillation,
    kl_divergence,
    margin,
    uniformity,
)
from ferdlib.losses.ferd import (
    BatchNormStatistics,
    ferd_distillation_loss,
    ferd_generator_loss,
    masked_distillation,
)

__all__ = [
    "BatchNormStatistics",
    "confidence_penalty",
    "cross_entropy",
    "cw_margin",
    "decoupled_kl",
    "distillation",
    "ferd_distillation_loss",
    "ferd_generator_loss",
    "kl_divergence",
    "margin",
    "masked_distillation",
    "uniformity",
]
