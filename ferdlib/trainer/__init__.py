"""The thin reference trainer: composition of the primitives, no mathematics of its own."""

from ferdlib.trainer.config import FERDConfig
from ferdlib.trainer.loop import EpochStats, FERDTrainer

__all__ = ["EpochStats", "FERDConfig", "FERDTrainer"]
