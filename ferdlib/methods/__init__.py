"""Robust training and distillation methods: an attack, a per-sample loss, and what happens after an epoch.

`create("fair-ard", num_classes, teacher=...)` makes one by its name, with the settings of its paper or of its
authors' release; `recipe` says how it is trained. They serve a plain loop and `FERDTrainer(method=...)`.
"""

from ferdlib.methods.averaging import FairAverage
from ferdlib.methods.base import Adversarial, Distilled, Fair
from ferdlib.methods.distillation import ABSLD, ARD, IAD, MTARD, RSLAD, AdaAD
from ferdlib.methods.fair import FairARD, FairIAD, FairMTARD, FairRSLAD
from ferdlib.methods.fairness import CFAARD, DAFAARD, FAALARD, FATARD, FRLARD, GAIRARD, WATARD
from ferdlib.methods.ferd import FERDDistillation
from ferdlib.methods.plain import BAT, SAT, TRADES
from ferdlib.methods.presets import METHODS, PRESETS, Recipe, create, recipe
from ferdlib.methods.protocol import FrozenTeacher, Method

__all__ = [
    "ABSLD",
    "ARD",
    "BAT",
    "CFAARD",
    "DAFAARD",
    "FAALARD",
    "FATARD",
    "FRLARD",
    "GAIRARD",
    "IAD",
    "METHODS",
    "MTARD",
    "PRESETS",
    "RSLAD",
    "SAT",
    "TRADES",
    "WATARD",
    "AdaAD",
    "Adversarial",
    "Distilled",
    "FERDDistillation",
    "Fair",
    "FairARD",
    "FairAverage",
    "FairIAD",
    "FairMTARD",
    "FairRSLAD",
    "FrozenTeacher",
    "Method",
    "Recipe",
    "create",
    "recipe",
]
