"""An epoch of FERD does the arithmetic that its passes need, and what saves some of it changes what is written."""

import pytest
from benchmarks import errors
from benchmarks.cost import SIZES, counted

from ferdlib.trainer import FERDConfig

SMALL = {"image_shape": (3, 16, 16), "batch_size": 4, "bottleneck_steps": 2}


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_no_pass_too_many(preset):
    """The bottleneck's head and first layers' gradients, which nobody asks for, are what may differ."""
    measured, predicted = counted(getattr(FERDConfig, preset)(**(SIZES | SMALL)))
    for part, value in predicted.items():
        assert measured[part] == pytest.approx(value, rel=0.02)


def test_what_the_options_change():
    args = errors.Args(architecture="small_cnn_8", size=8, padding=1, eps=0.1, epochs=2)
    found = errors.figures(args)
    for option in ("crops", "fold_batchnorm"):
        assert found[f"{option}: largest difference of a logit"] < 1e-5 * found["largest logit"]
    none, joint, exact = (
        found[f"what the attack climbs, {name}"] for name in ("none", "joint", "exact")
    )
    assert none < joint < exact
