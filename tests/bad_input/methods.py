"""Methods and their rules."""

from dataclasses import fields

import torch
from torch import nn

from bad_input import table as t
from bad_input.table import (
    FIGURES,
    MODEL,
    SHARE,
    STUDENT,
    TEACHER,
    WEIGHT,
    K,
    X,
    Y,
    any_of,
    bad,
    each,
    good,
    or_none,
)
from ferdlib import methods
from ferdlib.methods import METHODS, RULES, rules

FLAG = any_of(TypeError, "a bool", "yes", 1, None)
DROPS = [(3, TypeError, "a tuple"), (("3",), TypeError, "an int"), ((-1,), ValueError, ">= 0")]
OWN = {
    **dict.fromkeys(("eps", "step_size"), WEIGHT),
    **dict.fromkeys(("steps", "begin"), t.integer(0)),
    **dict.fromkeys(("slack", "variance_weight", "margin_base", "mixing_base"), WEIGHT),
    **dict.fromkeys(("train_mode", "kl_mean", "weigh_teacher", "fold_batchnorm"), FLAG),
    **dict.fromkeys(("clean_target", "attack_model", "function"), t.CHOICE),
    "random_start": or_none(t.CHOICE),
    "temperature": t.ABOVE_ZERO,
    "remargin": FLAG,
    "rate_drops": DROPS,
    "rule": any_of(TypeError, "a Rule", "text", None, rules.LPS),
    "shift": t.number(),
    "clip": or_none(t.BOUNDS) + any_of(ValueError, " in ", (-1.0, 1.0)),
}
EACH = {
    methods.RSLAD: {"adv_weight": SHARE},
    methods.ABSLD: {"adv_weight": SHARE},
    methods.MTARD: {"rate": SHARE},
    methods.FERDDistillation: {"num_classes": [*t.integer(0), (1, ValueError, ">= 2")]},
    rules.DAFA: {"begin": t.integer(1)},
}


def enter(kind, **valid):
    good(kind, **valid)
    names = [f.name for f in fields(kind) if f.init]
    rows = {name: rows for name, rows in OWN.items() if name in names}
    each(kind, **(rows | EACH.get(kind, {})))


MODELS = {"teacher": TEACHER, "natural_teacher": MODEL}
for kind in (methods.Adversarial, methods.Distilled, *METHODS.values()):
    wanted = {k: v for k, v in MODELS.items() if k in kind.__dataclass_fields__}
    enter(kind, num_classes=K, **wanted)
for kind in RULES.values():
    enter(kind)


def sat():
    return methods.SAT(num_classes=K, steps=1)


rows = {"student": t.FUNCTION, "x": t.BATCH, "y": [*t.LABELS, *t.SHORT, *t.IN_RANGE]}
good(methods.SAT.attack, self=sat, student=STUDENT, x=X, y=Y)
good(methods.SAT.loss, self=sat, student=STUDENT, x=X, x_adv=X, y=Y)
each(methods.SAT.attack, **rows)
each(methods.SAT.loss, **rows, x_adv=t.BATCH)
good(methods.SAT.validate, self=sat, student=STUDENT, batches=[(X, Y)])
each(methods.SAT.validate, student=t.FUNCTION, batches=any_of(TypeError, "an Iterable", 7, None))


def absld():
    return methods.ABSLD(num_classes=K, teacher=MODEL, rule=rules.LPS())


own = absld().state_dict()
broken = [own | {"epoch": "1"}, own | {"rule": 3}]
good(
    methods.ABSLD.load_state_dict,
    r"ABSLD\.load_state_dict|LPS\.load_state_dict",
    self=absld,
    state=own,
)
each(methods.ABSLD.load_state_dict, state=t.state(own | {"epoch": 0}))
bad(methods.ABSLD.load_state_dict, TypeError, "`epoch`", state=broken[0])
bad(methods.ABSLD.load_state_dict, TypeError, "as a dict", state=broken[1])

good(methods.build_method, "build_method|SAT", name="sat", num_classes=K)
each(
    methods.build_method,
    name=[(7, TypeError, "a str"), ("cat-sat", ValueError, "one of 'sat'")],
    preset=t.CHOICE,
    teacher=any_of(ValueError, "no `teacher`", MODEL),
    natural_teacher=any_of(ValueError, "no `natural_teacher`", MODEL),
    rule=any_of(TypeError, "a Rule", "text", 7),
)
good(methods.recipe, name="ard")
each(
    methods.recipe, name=[(7, TypeError, "a str"), ("ferd", ValueError, "one of")], preset=t.CHOICE
)


def average():
    return methods.FairAverage(MODEL)


good(methods.FairAverage, model=MODEL)
each(methods.FairAverage, decay=SHARE, threshold=SHARE)
good(methods.FairAverage.update, self=average, model=MODEL, class_accuracy=FIGURES)
absent = any_of(ValueError, "only nan", torch.full((K,), t.NAN))
other = any_of(ValueError, "got other shapes", nn.Linear(2, 2))
each(methods.FairAverage.update, model=t.MODULE + other, class_accuracy=t.FRACTIONS + absent)
state = average().state_dict()
good(methods.FairAverage.load_state_dict, self=average, state=state)
each(methods.FairAverage.load_state_dict, state=t.state(state))
