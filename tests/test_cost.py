"""An epoch of FERD does the arithmetic that its passes need."""

import pytest
from benchmarks.cost import SIZES, counted

from ferdlib.trainer import FERDConfig

SMALL = {"image_shape": (3, 16, 16), "batch_size": 4, "bottleneck_steps": 2}


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_no_pass_too_many(preset):
    """The bottleneck's head and first layers' gradients, which nobody asks for, are what may differ."""
    measured, predicted = counted(getattr(FERDConfig, preset)(**(SIZES | SMALL)))
    for part, value in predicted.items():
        assert measured[part] == pytest.approx(value, rel=0.02)
