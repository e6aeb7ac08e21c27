"""L-infinity attacks: one ascent, and every attack a loss on it; plus the official AutoAttack.

Attacks ascend, and leave no trace: train/eval flags, `requires_grad`, `param.grad`, BatchNorm buffers
and autocast state are afterwards what they were, also when the model raises.
"""

from ferdlib.attacks.autoattack import AutoAttackResult, autoattack
from ferdlib.attacks.named import cw_linf, fgsm, pgd, utae_pgd
from ferdlib.attacks.steps import StepCounter, least_pgd_steps

__all__ = [
    "AutoAttackResult",
    "StepCounter",
    "autoattack",
    "cw_linf",
    "fgsm",
    "least_pgd_steps",
    "pgd",
    "utae_pgd",
]
