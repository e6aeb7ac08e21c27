"""`create`, `recipe` and the presets: the settings of the papers and of the releases."""

import re
from dataclasses import fields

import pytest
from conftest import make_tiny_model

from ferdlib.methods import METHODS, PRESETS, create, recipe

K = 4
EVERY = [(name, preset) for name in METHODS for preset in PRESETS[name]]
ON_ARD = ("gair-ard", "frl-ard", "fat-ard", "cfa-ard", "faal-ard", "dafa-ard", "wat-ard")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: create("fairard", K, teacher=t), "create: expected `name` to be one of 'sat'"),
        (lambda t: create("ard", K, teacher=t, preset="code"), "create: expected `preset` to be"),
        (lambda t: create("frl-ard", K, teacher=t, preset="released"), "create: expected `preset`"),
        (
            lambda t: create("ard", K),
            "create: expected `teacher` to be a module for 'ard', got none",
        ),
        (
            lambda t: create("trades", K, teacher=t),
            "create: expected `teacher` to be none for 'trades', got Sequential",
        ),
        (lambda t: create("mtard", K, teacher=t), "create: expected `natural_teacher` to be a"),
        (
            lambda t: create("rslad", K, teacher=t, natural_teacher=t),
            "create: expected `natural_teacher` to be none for 'rslad'",
        ),
        (lambda t: create("sat", K, epsilon=0.1), "create: expected `settings` to be one of 'eps'"),
        (lambda t: create("sat", K, epoch=3), "create: expected `settings` to be one of"),
        (lambda t: create("sat", K, beta=6.0), "create: expected `settings` to be one of"),
        (lambda t: create("sat", 1), "SAT: expected `num_classes` >= 2, got 1"),
        (
            lambda t: create("mtard", K, teacher=t, natural_teacher=t, clean_target="nat"),
            "MTARD: expected `clean_target` to be one of 'natural', 'robust', got 'nat'",
        ),
        (lambda t: recipe("ferd"), "recipe: expected `name` to be one of 'sat'"),
        (lambda t: recipe("wat-ard", "released"), "recipe: expected `preset` to be one of 'paper'"),
    ],
)
def test_errors_say_who_and_what(call, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        call(make_tiny_model(K))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_settings_override_presets(name, preset):
    changed = {"eps": 0.2, "step_size": 0.05, "steps": 3, "random_start": None, "train_mode": False}
    teacher = make_tiny_model(K)
    wanted = {} if name in ("sat", "trades", "bat") else {"teacher": teacher}
    wanted |= {"natural_teacher": teacher} if "mtard" in name else {}
    method = create(name, K, preset=preset, **wanted, **changed)
    assert {key: getattr(method, key) for key in changed} == changed
    assert method.epoch == 0
    assert recipe(name, preset).epochs > 0


def test_presets_hold_nothing_that_the_class_does_not_know():
    for name, presets in PRESETS.items():
        known = {f.name for f in fields(METHODS[name]) if f.init}
        assert set().union(*presets.values()) <= known, name


def rates(name, preset, *epochs):
    """The learning rate in epochs that are counted from 0."""
    r = recipe(name, preset)
    assert (r.batch_size, r.lr, r.momentum) == (128, 0.1, 0.9)
    return [round(r.lr * 0.1 ** sum(e >= m for m in r.milestones), 10) for e in epochs]


def test_recipes():
    for name in ("ard", "iad", "fair-ard", "fair-iad"):
        assert rates(name, "paper", 99, 100, 149, 150, 199) == [0.1, 0.01, 0.01, 0.001, 0.001]
        # The release computes its second drop from the first rate again.
        assert rates(name, "released", 99, 100, 149, 150, 199) == [0.1, 0.01, 0.01, 0.01, 0.01]
        assert recipe(name).epochs == recipe(name, "released").epochs == 200
    for name in ("rslad", "mtard", "absld", "fair-rslad", "fair-mtard"):
        for preset in ("paper", "released"):
            found = rates(name, preset, 214, 215, 259, 260, 284, 285)
            assert found == [0.1, 0.01, 0.01, 0.001, 0.001, 0.0001]
            assert recipe(name, preset).epochs == 300
    for preset in ("paper", "released"):
        assert rates("trades", preset, 73, 74, 75) == [0.1, 0.01, 0.01]
        assert recipe("trades", preset).epochs == 76
        assert rates("adaad", preset, 99, 100, 150) == [0.1, 0.01, 0.001]
        assert (recipe("adaad", preset).epochs, recipe("adaad", preset).weight_decay) == (200, 5e-4)
    strong = ("adaad", "sat")  # SAT as AdaAD's authors trained it
    assert recipe("sat").weight_decay == 5e-4
    decays = {recipe(*each).weight_decay for each in EVERY if each[0] not in strong}
    assert decays == {2e-4}
    nesterov = {name for name, preset in EVERY if recipe(name, preset).nesterov}
    assert nesterov == {"fair-ard", "fair-iad", "fair-rslad", "fair-mtard"}
    assert not any(recipe(name, "paper").nesterov for name in nesterov)
    for name in ON_ARD:
        assert recipe(name) == recipe("ard")
