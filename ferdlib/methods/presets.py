"""Methods and their rules by name, with the settings of their papers and of their authors' releases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import nn
from typing_extensions import deprecated

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public
from ferdlib.methods import rules
from ferdlib.methods.distillation import ABSLD, ARD, IAD, MTARD, RSLAD, AdaAD
from ferdlib.methods.ferd import FERDDistillation
from ferdlib.methods.protocol import Adversarial, Rule
from ferdlib.methods.training import BAT, SAT, TRADES

Preset = Literal["paper", "released"]

_METHODS = (SAT, TRADES, BAT, ARD, IAD, RSLAD, MTARD, AdaAD, ABSLD)
METHODS: dict[str, type[Adversarial]] = {kind.__name__.lower(): kind for kind in _METHODS}
METHODS |= {"ferd": FERDDistillation}
_RULES = (rules.FRL, rules.FAT, rules.CFA, rules.FAAL, rules.DAFA, rules.WAT)
# The prefix of a name: "fair-rslad" is RSLAD with LPS.
RULES: dict[str, type[Rule]] = {"fair": rules.LPS, "gair": rules.GAIRAT}
RULES |= {rule.__name__.lower(): rule for rule in _RULES}

_BALL = {"eps": 0.031, "step_size": 0.007}
_CODE: dict[str, Any] = {"train_mode": True}
_MEAN: dict[str, Any] = {"kl_mean": True}
# Settings of paper and release that are not the defaults of the class.
_SETTINGS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    # Madry et al. attack with 7 steps; their code with 10, in train mode.
    "sat": ({"steps": 7}, _CODE),
    "trades": (_BALL, _BALL),
    # The release's ball, which is that of TRADES.
    "bat": (_BALL, _BALL),
    "ard": ({}, _CODE | _MEAN),
    "iad": ({}, _CODE | {"weigh_teacher": False}),
    **dict.fromkeys(("rslad", "mtard", "adaad", "absld"), ({}, _MEAN)),
    "ferd": ({"attack_model": "teacher", "random_start": None}, {"gamma": 0.0}),
}
# By name; of the pairs only Fair-ARD's four have a release, the other rules' papers train without a teacher.
PRESETS: dict[str, dict[Preset, Mapping[str, Any]]] = {
    **{name: {"paper": paper, "released": code} for name, (paper, code) in _SETTINGS.items()},
    **{f"{rule}-{name}": {"paper": _SETTINGS[name][0]} for rule in RULES for name in METHODS},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """SGD with momentum, whose rate falls to a tenth after each of the epochs `milestones`.

    Example:
        >>> recipe("rslad").milestones
        (215, 260, 285)
    """

    epochs: int
    milestones: tuple[int, ...]
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 2e-4
    nesterov: bool = False


_ARD = Recipe(epochs=200, milestones=(100, 150))
# The releases of ARD and IAD compute the second drop from the first rate again: none falls to a hundredth.
_ARD_CODE = replace(_ARD, milestones=(100,))
_RSLAD = Recipe(epochs=300, milestones=(215, 260, 285))
# One recipe where the paper gives none of its own, or the same.
_RECIPES: dict[str, tuple[Recipe, ...]] = {
    # The code's 80,000 steps of 128 images, with drops at 40,000 and 60,000.
    "sat": (Recipe(epochs=205, milestones=(102, 154)),),
    "trades": (Recipe(epochs=76, milestones=(74,)),),
    # The code's; its epochs are counted from 1.
    "bat": (Recipe(epochs=200, milestones=(74, 89, 99)),),
    "ard": (_ARD, _ARD_CODE),
    "iad": (_ARD, _ARD_CODE),
    **dict.fromkeys(("rslad", "mtard", "absld"), (_RSLAD,)),
    "adaad": (replace(_ARD, weight_decay=5e-4),),
}
# A rule changes nothing of it, but that Fair-ARD's releases have Nesterov momentum.
RECIPES: dict[str, dict[Preset, Recipe]] = {
    **{name: {"paper": both[0], "released": both[-1]} for name, both in _RECIPES.items()},
    **{f"{rule}-{name}": {"paper": _RECIPES[name][0]} for rule in RULES for name in _RECIPES},
}

_FAIR_CODE = {"count": "correct", "clip": (5 / 6, 5 / 2)}
for _name in ("ard", "iad", "rslad", "mtard"):
    PRESETS[f"fair-{_name}"]["released"] = {**_SETTINGS[_name][1], **_FAIR_CODE}
    RECIPES[f"fair-{_name}"]["released"] = replace(_RECIPES[_name][-1], nesterov=True)
PRESETS["fair-mtard"]["released"] = {**_MEAN, **_FAIR_CODE, "clean_target": "robust"}


@public
def build_method(
    name: str,
    num_classes: int,
    *,
    teacher: nn.Module | None = None,
    natural_teacher: nn.Module | None = None,
    preset: Preset = "paper",
    rule: Rule | None = None,
    **settings: Any,
) -> Adversarial:
    """Build a method, with its rule, by name.

    Args:
        name: one of `METHODS`, alone ("rslad") or behind one of `RULES` ("fair-rslad").
        num_classes: K >= 2.
        teacher, natural_teacher: the robust one, for all but "sat", "trades" and "bat"; the other for "mtard".
        preset: "paper" is the text, "released" what the authors' code computes, bugs included
            (docs/paper-map.md); of the names with a rule only Fair-ARD's four have a release.
        rule: a rule of other settings, for a name without one.
        **settings: fields of the method's or the rule's class that shall differ from the preset.

    Example:
        >>> build_method("trades", 10).eps, build_method("trades", 10, eps=8 / 255, beta=1.0).beta
        (0.031, 1.0)
        >>> build_method("cfa-sat", 10, begin=5).rule.begin
        5
    """
    given = {**_preset(PRESETS, name, preset), **settings}
    prefix, _, base = name.rpartition("-")
    parts: dict[str, Any] = {"teacher": teacher, "natural_teacher": natural_teacher}
    of_method, of_rule = _fields(METHODS[base]), _fields(RULES[prefix]) if prefix else set()
    for argument, model in parts.items():
        if (argument in of_method) != (model is not None):
            expected = "a" if argument in of_method else "no"
            came = "none" if model is None else f"a {type(model).__name__}"
            raise InvalidValue(f"expected {expected} `{argument}` for {name!r}, got {came}")
    if prefix and rule is not None:
        raise InvalidValue(
            f"expected no `rule` for {name!r}, which has one, got a {type(rule).__name__}; give it to {base!r}"
        )
    of_method -= {*parts, "num_classes", "rule"}
    for setting in given:
        if setting not in of_method ^ of_rule:
            both = ", which method and rule both have; use `rule`" * (setting in of_method)
            known = ", ".join(sorted(of_method ^ of_rule))
            raise InvalidValue(f"expected `settings` among {known}, got {setting!r}{both}")
    if prefix:
        rule = RULES[prefix](**{key: given[key] for key in given.keys() & of_rule})
    own = {key: given[key] for key in given.keys() & of_method}
    own |= {key: part for key, part in {**parts, "rule": rule}.items() if part is not None}
    return METHODS[base](num_classes=num_classes, **own)


@public
def recipe(name: str, preset: Preset = "paper") -> Recipe:
    """Schedule to train with a method on CIFAR-10, from its paper or its release.

    Where a paper says nothing, it is that of its release. "ferd" has none: `FERDConfig` is its schedule.

    Example:
        >>> recipe("fair-ard", "released").milestones  # (100, 150) in the paper
        (100,)
    """
    found: Recipe = _preset(RECIPES, name, preset)
    return found


@deprecated("ferdlib.methods.create is now called ferdlib.methods.build_method")
def create(name: str, num_classes: int, **settings: Any) -> Adversarial:
    """`build_method` under its old name."""
    return build_method(name, num_classes, **settings)


def _fields(kind: Any) -> set[str]:
    return {field.name for field in fields(kind) if field.init}


def _preset(data: Mapping[str, Mapping[Preset, Any]], name: str, preset: Preset) -> Any:
    _checks.instance(str, name=name)
    _checks.choice(("paper", "released"), preset=preset)
    if name not in data:
        methods = ", ".join(repr(name) for name in data if "-" not in name)
        prefixes = ", ".join(map(repr, RULES))
        raise InvalidValue(
            f"expected `name` to be one of {methods}, alone or behind one of {prefixes} and a hyphen, "
            f"got {name!r}"
        )
    if preset not in data[name]:
        raise InvalidValue(
            f"expected `preset` 'paper' for {name!r}, a pair without a release, got {preset!r}"
        )
    return data[name][preset]
