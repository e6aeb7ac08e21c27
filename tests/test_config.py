"""FERDConfig: its presets against the paper and the release, and its checks."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest

from ferdlib.trainer import FERDConfig

SIZE = {"num_classes": 10, "layer": "layer4"}

# Section 5.1 of the paper at CIFAR-10, with which the release agrees, and the release's attack, of which the
# paper says nothing: A.8 gives 10 steps of 2/255 to the methods that FERD is compared with.
COMMON = {
    "epochs": 220,
    "batch_size": 256,
    "generator_steps": 200,
    "student_steps": 400,
    "generator_lr": 2e-3,
    "student_lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "adv_loss_weight": 1.0,
    "bn_loss_weight": 5.0,
    "onehot_loss_weight": 1.0,
    "uniformity_loss_weight": 5.0,
    "clean_weight": 5 / 6,
    "adv_weight": 1 / 6,
    "eps": 8 / 255,
    "step_size": 2 / 255,
    "attack_steps": 10,
    "margin_attack_steps": 20,
    "class_floor": 0.0,
    "margin_labels": "sampled",
    "margin_on": "logits",
}
PAPER = COMMON | {
    "warmup_epochs": 0,
    "gamma": 0.5,
    "attack_model": "teacher",
    "random_start": None,
    "augment": "none",
    "augment_synthesis": False,
    "reweighting": "margin_softmax",
    "adversarial_loss": "kl",
    "mask_threshold": "sample",
    "bottleneck_reduction": "sum",
    "bn_models": "both",
    "conditional_generator": True,
    "optimise_latents": False,
    "reset_generator": False,
    "margin_images": "stored",
}
RELEASED = COMMON | {
    "warmup_epochs": 20,
    "gamma": 0.0,
    "attack_model": "student",
    "random_start": "normal",
    "augment": "crop_flip",
    "augment_synthesis": True,
    "crop_padding": 4,
    "reweighting": "margin_minmax",
    "adversarial_loss": "decoupled_kl",
    "mask_threshold": "batch",
    "bottleneck_reduction": "mean",
    "bottleneck_beta": 0.3,
    "bottleneck_steps": 50,
    "bottleneck_lr": 0.1,
    "bn_models": "teacher",
    "conditional_generator": False,
    "latent_dim": 100,
    "latent_lr": 0.015,
    "optimise_latents": True,
    "reset_generator": True,
    "margin_images": "last",
    "absent_classes": "zero",
    "schedule": "cosine",
    "schedule_warmup": True,
    "pool_dtype": "float32",
    "selection": "batch",
}


@pytest.mark.parametrize(("preset", "facts"), [("paper", PAPER), ("released", RELEASED)])
def test_presets_number_by_number(preset, facts):
    config = getattr(FERDConfig, preset)(**SIZE)
    assert {name: getattr(config, name) for name in facts} == facts


def test_config_is_frozen_and_keyword_only():
    config = FERDConfig(**SIZE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3
    with pytest.raises(TypeError):
        FERDConfig(10, "layer4")
    assert FERDConfig.paper(**SIZE, epochs=7).epochs == 7


def test_every_field_has_its_own_docstring():
    import ast
    import inspect

    (tree,) = ast.parse(inspect.getsource(FERDConfig)).body
    body = tree.body
    documented = {
        a.target.id
        for a, b in itertools.pairwise(body)
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)
    }
    assert documented == {field.name for field in dataclasses.fields(FERDConfig)}


def test_the_config_comes_without_torch():
    """The command line answers `--help` with it, and must not wait for torch."""
    program = "import sys; from ferdlib.trainer.config import FERDConfig; FERDConfig(num_classes=3)"
    program += (
        "; import ferdlib.trainer; ferdlib.trainer.FERDConfig; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_package_knows_its_names():
    import ferdlib.trainer

    assert set(ferdlib.trainer.__all__) <= set(dir(ferdlib.trainer))
    with pytest.raises(AttributeError, match="'ferdlib.trainer' has no attribute 'Trainer'"):
        ferdlib.trainer.Trainer  # noqa: B018
