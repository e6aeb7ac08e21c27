"""Robust distillation methods: an attack, a per-sample loss, and what happens after an epoch."""

from ferdlib.methods.ferd import FERDDistillation
from ferdlib.methods.protocol import FrozenTeacher, Method

__all__ = ["FERDDistillation", "FrozenTeacher", "Method"]
