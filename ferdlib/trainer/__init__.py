"""The thin reference trainer: composition of the primitives, no mathematics of its own."""

from ferdlib.checkpoints import Checkpoints
from ferdlib.trainer.config import FERDConfig
from ferdlib.trainer.loop import FERDTrainer
from ferdlib.trainer.stats import EpochStats

__all__ = ["Checkpoints", "EpochStats", "FERDConfig", "FERDTrainer"]
