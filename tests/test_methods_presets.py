"""`build_method`, `recipe` and the presets: the settings of the papers and of the releases, by name."""

import re
from dataclasses import MISSING, asdict, fields

import pytest
from tiny_methods import K, make, model

from ferdlib import methods
from ferdlib.methods import METHODS, PRESETS, RECIPES, RULES, build_method, create, recipe, rules

FAIR = ("fair-ard", "fair-iad", "fair-rslad", "fair-mtard")
BALL = {"eps": 0.031, "step_size": 0.007}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("trades", {"teacher": model()}, "expected no `teacher` for 'trades', got a Sequential"),
        ("mtard", {"teacher": model()}, "expected a `natural_teacher` for 'mtard', got none"),
        ("sat", {"epoch": 3}, "expected `settings` among eps, "),
        ("sat", {"beta": 6.0}, "expected `settings` among eps, "),
        ("cfa-trades", {"beta": 6.0}, "expected `settings` .* which method and rule both have; "),
    ],
)
def test_teachers_and_settings_are_those_of_the_name(name, given, message):
    with pytest.raises(ValueError, match=f"^build_method: {message}"):
        build_method(name, K, **given)


def test_ferd_has_no_recipe_and_a_pair_no_release():
    with pytest.raises(ValueError, match="^recipe: expected `name` .*'adaad', alone or behind"):
        recipe("ferd")
    with pytest.raises(ValueError, match="^recipe: expected `preset` 'paper' for 'wat-ard'"):
        recipe("wat-ard", "released")


def test_every_pair_has_a_name_and_only_fair_ards_four_a_release():
    pairs = {f"{rule}-{name}" for rule in RULES for name in METHODS}
    assert set(PRESETS) == {*METHODS, *pairs}
    assert set(RECIPES) == {name for name in PRESETS if not name.endswith("ferd")}
    assert {name for name in pairs if "released" in PRESETS[name]} == set(FAIR)
    for name, presets in PRESETS.items():
        for preset in presets:
            method = make(name, preset, steps=3)
            prefix, _, base = name.rpartition("-")
            assert type(method) is METHODS[base]
            assert type(method.rule) is (RULES[prefix] if prefix else rules.Uniform)
            assert (method.steps, method.epoch, method.rule.num_classes) == (3, 0, K)


def differences(name, preset):
    """Settings that a preset changes from the defaults of the classes, the rule's included."""
    method, found = make(name, preset), {}
    for part in (method, method.rule):
        for field in fields(part):
            value = getattr(part, field.name)
            given = field.init and field.default is not MISSING and field.name != "num_classes"
            if given and value != field.default:
                found[field.name] = value
    return found


def test_presets_are_those_of_papers_and_codes():
    code, mean = {"train_mode": True}, {"kl_mean": True}
    clip = {"count": "correct", "clip": (5 / 6, 5 / 2)}
    expected = {
        "sat": ({"steps": 7}, code),
        "trades": (BALL, BALL),
        "bat": (BALL, BALL),
        "ard": ({}, code | mean),
        "iad": ({}, code | {"weigh_teacher": False}),
        "ferd": ({"attack_model": "teacher", "random_start": None}, {"gamma": 0.0}),
        "fair-ard": ({}, code | mean | clip),
        "fair-iad": ({}, code | {"weigh_teacher": False} | clip),
        "fair-mtard": ({}, mean | clip | {"clean_target": "robust"}),
        "fair-rslad": ({}, mean | clip),
        **dict.fromkeys(("rslad", "mtard", "adaad", "absld"), ({}, mean)),
    }
    for name, both in expected.items():
        for preset, settings in zip(("paper", "released"), both, strict=True):
            assert differences(name, preset) == settings, (name, preset)
    assert differences("wat-trades", "paper") == BALL


def test_recipes():
    schedules = {
        # Madry's code: drops after 40,000 and 60,000 of 80,000 steps with 128 of 50,000 images.
        "sat": (205, tuple(round(steps * 128 / 50_000) for steps in (40_000, 60_000))),
        "trades": (76, (74,)),
        # BAT's code has 75, 90 and 100 of 200 epochs, which it counts from 1.
        "bat": (200, (74, 89, 99)),
        **dict.fromkeys(("ard", "iad", "adaad"), (200, (100, 150))),
        **dict.fromkeys(("rslad", "mtard", "absld"), (300, (215, 260, 285))),
    }
    for name, both in RECIPES.items():
        base = name.rpartition("-")[2]
        epochs, milestones = schedules[base]
        paper = {"epochs": epochs, "milestones": milestones, "batch_size": 128, "lr": 0.1}
        paper |= {"momentum": 0.9, "weight_decay": 5e-4 if base == "adaad" else 2e-4}
        assert asdict(recipe(name)) == paper | {"nesterov": False}
        if "released" in both:
            # The releases of ARD and IAD compute their second drop from the first rate again.
            once = {"milestones": (100,)} if base in ("ard", "iad") else {}
            released = paper | once | {"nesterov": name in FAIR}
            assert asdict(recipe(name, "released")) == released


def test_old_names_say_what_became_of_them():
    with pytest.warns(DeprecationWarning, match="create is now called .*build_method"):
        method = create("fair-ard", K, teacher=model(), beta=1.0)
    assert method.rule.beta == 1.0
    for name, now in {
        "FairIAD": "IAD(..., rule=rules.LPS(",
        "FRLARD": "ARD(..., rule=rules.FRL(",
    }.items():
        with pytest.raises(AttributeError, match=re.escape(f"methods.{name} is now {now}")):
            getattr(methods, name)
    with pytest.raises(AttributeError, match="has no attribute 'Fairness'"):
        methods.Fairness  # noqa: B018


def test_a_share_that_must_be_another_librarys_step_is_warned_of_once(caplog):
    for _ in range(2):
        build_method("ard", K, teacher=model(), alpha=2 / 255)
    build_method("ard", K, teacher=model(), alpha=0.1)
    assert caplog.messages == [
        "alpha 0.00784314 is the share of a loss here; did you mean step_size=0.00784314?"
    ]
