"""Robust training and distillation: nine methods, FERD's own, and eight rules that go with each of them.

A *method* is an attack and a per-sample loss, a *rule* reweighs the classes. `build_method` makes both by name,
with the settings of their papers or of their authors' releases; `recipe` is the schedule to train with. They
serve a plain loop and `FERDTrainer(method=...)`.
"""

from typing import TYPE_CHECKING

from ferdlib.methods import rules
from ferdlib.methods.averaging import FairAverage
from ferdlib.methods.distillation import ABSLD, ARD, IAD, MTARD, RSLAD, AdaAD
from ferdlib.methods.ferd import FERDDistillation
from ferdlib.methods.presets import (
    METHODS,
    PRESETS,
    RECIPES,
    RULES,
    Recipe,
    build_method,
    create,
    recipe,
)
from ferdlib.methods.protocol import Adversarial, Distilled, Method, teacher_logits
from ferdlib.methods.training import BAT, SAT, TRADES

__all__ = ["ABSLD", "ARD", "BAT", "IAD", "MTARD", "RSLAD", "SAT", "TRADES", "AdaAD"]
__all__ += ["Adversarial", "Distilled", "FERDDistillation", "FairAverage", "Method"]
__all__ += ["METHODS", "PRESETS", "RECIPES", "RULES", "Recipe", "build_method", "create", "recipe"]
__all__ += ["rules", "teacher_logits"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Say what became of a class of release 0.1."""
        old = {f"{rule}ARD": ("ARD", rule) for rule in ("FRL", "FAT", "CFA", "FAAL", "DAFA", "WAT")}
        old |= {f"Fair{method}": (method, "LPS") for method in ("ARD", "IAD", "RSLAD", "MTARD")}
        old["GAIRARD"] = ("ARD", "GAIRAT")
        if name not in old:
            raise AttributeError(f"module 'ferdlib.methods' has no attribute {name!r}")
        method, rule = old[name]
        raise AttributeError(f"ferdlib.methods.{name} is now {method}(..., rule=rules.{rule}(...))")
