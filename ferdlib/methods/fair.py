"""Fair-ARD and its relatives: `Fair` put before each method of adversarial robustness distillation."""

from __future__ import annotations

from dataclasses import dataclass

from ferdlib.methods.base import Fair
from ferdlib.methods.distillation import ARD, IAD, MTARD, RSLAD


@dataclass(kw_only=True)
class FairARD(Fair, ARD):
    """Fair-ARD (Yue et al. 2023): `ARD` with its loss reweighted by the least PGD steps.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> FairARD(num_classes=3, teacher=small_cnn(1, 3, width=4), clip=(5 / 6, 5 / 2)).beta
        2.0
    """


@dataclass(kw_only=True)
class FairIAD(Fair, IAD):
    """Fair-IAD: `IAD` reweighted.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> FairIAD(num_classes=3, teacher=small_cnn(1, 3, width=4)).begin
        60
    """


@dataclass(kw_only=True)
class FairRSLAD(Fair, RSLAD):
    """Fair-RSLAD: `RSLAD` reweighted; its attack aims at the teacher's logits, the steps count labels.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> FairRSLAD(num_classes=3, teacher=small_cnn(1, 3, width=4)).random_start
        'normal'
    """


@dataclass(kw_only=True)
class FairMTARD(Fair, MTARD):
    """Fair-MTARD: `MTARD` reweighted; the balance of the teachers sees the losses before the weights.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> robust, natural = small_cnn(1, 3, width=4), small_cnn(1, 3, width=4)
        >>> FairMTARD(num_classes=3, teacher=robust, natural_teacher=natural).clean_target
        'natural'
    """
