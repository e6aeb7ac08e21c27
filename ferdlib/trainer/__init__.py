"""The thin reference trainer: composition of the primitives, no mathematics of its own.

Names are loaded when they are first used, so that `FERDConfig` can be had without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferdlib.checkpoints import Checkpoints
    from ferdlib.trainer.config import FERDConfig
    from ferdlib.trainer.monitor import EpochStats
    from ferdlib.trainer.trainer import FERDTrainer

__all__ = ["Checkpoints", "EpochStats", "FERDConfig", "FERDTrainer"]

_HOMES = {
    "Checkpoints": "ferdlib.checkpoints",
    "EpochStats": "ferdlib.trainer.monitor",
    "FERDConfig": "ferdlib.trainer.config",
    "FERDTrainer": "ferdlib.trainer.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
