"""What importing the library takes beyond importing torch, in fresh interpreters."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from functools import partial

import ferdlib

from .harness import Competitor, Goal, Group, Prepared, Settings

TORCH, FERDLIB, MODULES = "import torch", "import ferdlib", "import of ferdlib's modules"


def imported(statement: str) -> Competitor:
    return partial(subprocess.run, [sys.executable, "-c", statement], check=True)


def prepare(settings: Settings) -> Prepared:
    public = [m.name for m in pkgutil.iter_modules(ferdlib.__path__) if not m.name.startswith("_")]
    modules = ", ".join(f"ferdlib.{name}" for name in public)
    return Prepared(
        competitors={
            TORCH: imported("import torch"),
            FERDLIB: imported("import ferdlib"),
            MODULES: imported(f"import {modules}"),
        },
        note=f"The modules are {modules}.",
    )


GROUP = Group(
    about="A Python that starts, imports and stops. `import ferdlib` alone loads nothing, its modules load torch.",
    goals=(
        Goal(FERDLIB, "-", TORCH, "<=", 0.15),
        Goal(MODULES, "-", TORCH, "<=", 0.15),
    ),
    prepare=prepare,
)
