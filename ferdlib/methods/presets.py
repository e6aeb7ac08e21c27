"""The methods by name, with the settings of their papers and of their authors' released codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import nn

from ferdlib import _oldchecks as _checks
from ferdlib.methods.base import Adversarial, Distilled
from ferdlib.methods.distillation import ABSLD, ARD, IAD, MTARD, RSLAD, AdaAD
from ferdlib.methods.fair import FairARD, FairIAD, FairMTARD, FairRSLAD
from ferdlib.methods.fairness import CFAARD, DAFAARD, FAALARD, FATARD, FRLARD, GAIRARD, WATARD
from ferdlib.methods.plain import BAT, SAT, TRADES

Preset = Literal["paper", "released"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a method is trained: SGD with momentum, whose rate falls to a tenth after the given epochs.

    Attributes:
        epochs: passes over the data.
        milestones: after how many epochs the rate falls.
        batch_size, lr, momentum, weight_decay, nesterov: of SGD.

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


METHODS: Mapping[str, type[Adversarial]] = {
    "sat": SAT,
    "trades": TRADES,
    "bat": BAT,
    "ard": ARD,
    "iad": IAD,
    "rslad": RSLAD,
    "mtard": MTARD,
    "adaad": AdaAD,
    "absld": ABSLD,
    "fair-ard": FairARD,
    "fair-iad": FairIAD,
    "fair-rslad": FairRSLAD,
    "fair-mtard": FairMTARD,
    "gair-ard": GAIRARD,
    "frl-ard": FRLARD,
    "fat-ard": FATARD,
    "cfa-ard": CFAARD,
    "faal-ard": FAALARD,
    "dafa-ard": DAFAARD,
    "wat-ard": WATARD,
}

_ON_ARD = ("gair", "frl", "fat", "cfa", "faal", "dafa", "wat")
_TRADES_BALL = {"eps": 0.031, "step_size": 0.007}
_ARD_CODE = {"train_mode": True, "kl_mean": True}
_FAIR_CODE = {"count": "correct", "clip": (5 / 6, 5 / 2)}

# What a preset sets that is not the class's default. The papers of the robust-fairness rules put them onto
# adversarial training; on ARD, as in Fair-ARD's Table 4, they have no release.
PRESETS: Mapping[str, Mapping[Preset, Mapping[str, Any]]] = {
    "sat": {"paper": {}, "released": {}},
    "trades": {"paper": _TRADES_BALL, "released": _TRADES_BALL},
    "bat": {"paper": _TRADES_BALL, "released": _TRADES_BALL},
    "ard": {"paper": {}, "released": _ARD_CODE},
    "iad": {"paper": {}, "released": {"train_mode": True}},
    "rslad": {"paper": {}, "released": {"kl_mean": True}},
    "mtard": {"paper": {}, "released": {"kl_mean": True}},
    "adaad": {"paper": {}, "released": {"kl_mean": True}},
    "absld": {"paper": {}, "released": {"kl_mean": True}},
    "fair-ard": {"paper": {}, "released": _ARD_CODE | _FAIR_CODE},
    "fair-iad": {"paper": {}, "released": {"train_mode": True} | _FAIR_CODE},
    "fair-rslad": {"paper": {}, "released": {"kl_mean": True} | _FAIR_CODE},
    "fair-mtard": {
        "paper": {},
        "released": {"kl_mean": True, "clean_target": "robust"} | _FAIR_CODE,
    },
    **{f"{name}-ard": {"paper": {}} for name in _ON_ARD},
}

# The released codes of ARD and IAD (and so of Fair-ARD and Fair-IAD) compute the second drop from the first
# rate again: it never falls to a hundredth.
_ARD_PAPER = Recipe(epochs=200, milestones=(100, 150))
_ARD_CODE_RECIPE = Recipe(epochs=200, milestones=(100,))
_RSLAD = Recipe(epochs=300, milestones=(215, 260, 285))

RECIPES: Mapping[str, Mapping[Preset, Recipe]] = {
    "sat": dict.fromkeys(
        ("paper", "released"), Recipe(epochs=110, milestones=(100, 105), weight_decay=5e-4)
    ),
    "trades": dict.fromkeys(("paper", "released"), Recipe(epochs=76, milestones=(74,))),
    "bat": dict.fromkeys(("paper", "released"), Recipe(epochs=76, milestones=(74,))),
    "adaad": dict.fromkeys(
        ("paper", "released"), Recipe(epochs=200, milestones=(100, 150), weight_decay=5e-4)
    ),
    **{
        name: {"paper": _ARD_PAPER, "released": replace(_ARD_CODE_RECIPE, nesterov=nesterov)}
        for name, nesterov in (
            ("ard", False),
            ("iad", False),
            ("fair-ard", True),
            ("fair-iad", True),
        )
    },
    **{
        name: {"paper": _RSLAD, "released": replace(_RSLAD, nesterov=name.startswith("fair"))}
        for name in ("rslad", "mtard", "absld", "fair-rslad", "fair-mtard")
    },
    **{f"{name}-ard": {"paper": _ARD_PAPER} for name in _ON_ARD},
}


def create(
    name: str,
    num_classes: int,
    *,
    teacher: nn.Module | None = None,
    natural_teacher: nn.Module | None = None,
    preset: Preset = "paper",
    **settings: Any,
) -> Adversarial:
    """A method by its name.

    Args:
        name: "sat", "trades", "bat", "ard", "iad", "rslad", "mtard", "adaad", "absld", "fair-ard", "fair-iad",
            "fair-rslad", "fair-mtard", "gair-ard", "frl-ard", "fat-ard", "cfa-ard", "faal-ard", "dafa-ard" or
            "wat-ard".
        num_classes: K >= 2.
        teacher: the robust teacher, for all but the first three.
        natural_teacher: for the two MTARDs.
        preset: "paper" is the text, "released" what the authors' code computes, bugs included
            (docs/paper-map.md); the robust-fairness rules on ARD have no release.
        **settings: what shall differ from the preset, as fields of the method's class.

    Returns:
        The method, to be used in one's own loop or given to `FERDTrainer(method=...)`.

    Raises:
        TypeError, ValueError: an unknown name, preset or setting, or a teacher that is missing or not wanted.

    Example:
        >>> create("trades", 10).eps, create("trades", 10, eps=8 / 255, beta=1.0).beta
        (0.031, 1.0)
    """
    function = "create"
    _checks.choice(function, "name", name, tuple(METHODS))
    _checks.choice(function, "preset", preset, tuple(PRESETS[name]))
    kind: Any = METHODS[name]
    given = {"teacher": teacher, "natural_teacher": natural_teacher}
    wanted = {"teacher": issubclass(kind, Distilled), "natural_teacher": issubclass(kind, MTARD)}
    for argument, model in given.items():
        if model is not None:
            _checks.module(function, argument, model)
        if wanted[argument] != (model is not None):
            expected = "a module" if wanted[argument] else "none"
            came = "none" if model is None else type(model).__name__
            raise ValueError(
                f"{function}: expected `{argument}` to be {expected} for {name!r}, got {came}"
            )
    known = {field.name for field in fields(kind) if field.init}
    for setting in settings:
        _checks.choice(function, "settings", setting, sorted(known - set(given)))
    models = {argument: model for argument, model in given.items() if wanted[argument]}
    method: Adversarial = kind(
        num_classes=num_classes, **models, **{**PRESETS[name][preset], **settings}
    )
    return method


def recipe(name: str, preset: Preset = "paper") -> Recipe:
    """How the papers, or their codes, train with a method on CIFAR-10.

    Raises:
        ValueError: an unknown name or preset.

    Example:
        >>> recipe("fair-ard", "released").milestones  # (100, 150) in the paper
        (100,)
    """
    _checks.choice("recipe", "name", name, tuple(RECIPES))
    _checks.choice("recipe", "preset", preset, tuple(RECIPES[name]))
    return RECIPES[name][preset]
