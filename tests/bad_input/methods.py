"""Methods and rules."""

import inspect

import torch

from bad_input import table as t
from bad_input.table import FIGURES, SHARE, STUDENT, WEIGHT, K, X, Y, Z, any_of, bad, each, good
from ferdlib import methods
from ferdlib.methods import rules

FLAG = any_of(TypeError, "a bool", "yes", 1)
SETTINGS = {
    "steps": t.integer(0),
    "random_start": t.or_none(t.CHOICE),
    "rule": any_of(TypeError, "a Rule", "fat", None, rules.FAT),
    "begin": t.integer(0),
    "clip": t.or_none(t.BOUNDS),
    "shift": t.number(),
    "rate_drops": [*any_of(TypeError, "", 3, "3", ("3",)), ((-1,), ValueError, ">= 0")],
    **dict.fromkeys(("train_mode", "kl_mean", "remargin", "weigh_teacher"), FLAG),
    "fold_batchnorm": FLAG,
    **dict.fromkeys(("clean_target", "function", "attack_model"), t.CHOICE),
    **dict.fromkeys(("eps", "step_size", "slack", "variance_weight", "margin_base"), WEIGHT),
    "mixing_base": WEIGHT,
    "temperature": t.ABOVE_ZERO,
}
OWN = {methods.RSLAD: {"adv_weight": SHARE}, methods.MTARD: {"rate": SHARE}}
OWN |= {methods.FERDDistillation: {"num_classes": [*t.integer(0), (1, ValueError, ">= 2")]}}
OWN |= {methods.ABSLD: {"adv_weight": SHARE}, rules.DAFA: {"begin": t.integer(1)}}
PARTS = {"num_classes": K, "teacher": t.MODEL, "natural_teacher": t.TEACHER}
every = (*methods.METHODS.values(), *methods.RULES.values(), methods.Adversarial, methods.Distilled)
for kind in every:
    wanted = inspect.signature(kind).parameters
    says = rf"{kind.__name__}|Uniform\.bind"
    good(kind, says, **{name: part for name, part in PARTS.items() if name in wanted})
    rows = SETTINGS | OWN.get(kind, {})
    each(kind, **{name: rows[name] for name in wanted if name in rows})


def method(rule=rules.Uniform):
    return methods.RSLAD(num_classes=K, teacher=t.MODEL, steps=1, rule=rule())


def counted():
    made = method(rules.LPS)
    made.attack(STUDENT, X, Y)
    return made.rule


def validated():
    made = method(rules.FRL)
    made.validate(STUDENT, [(X, Y)])
    return made.rule


taken = method().rule
bad(methods.RSLAD, RuntimeError, "a rule of its own for each method", rule=taken)
images = {"student": STUDENT, "x": X, "y": Y}
y = t.LABELS + t.SHORT + t.IN_RANGE
good(methods.Adversarial.attack, r"RSLAD\.attack|pgd", self=method, **images)
each(methods.Adversarial.attack, student=t.FUNCTION, y=y)
good(methods.Adversarial.loss, r"RSLAD\.loss|rslad|distillation", self=method, x_adv=X, **images)
each(methods.Adversarial.loss, student=t.FUNCTION, x=t.BATCH, x_adv=t.BATCH, y=y)
for function in (methods.Adversarial.attack, methods.Adversarial.loss):
    each(function, reference=[(Z[:-1], ValueError, "`")])
good(methods.Adversarial.validate, self=method, student=STUDENT, batches=[(X, Y)])
batches = any_of(TypeError, "an Iterable", 7, None)
each(methods.Adversarial.validate, student=t.FUNCTION, batches=batches)
own = method().state_dict()
good(methods.Adversarial.load_state_dict, self=method, state=own)
broken = [(own | {"epoch": "1"}, TypeError, "`epoch`")]
each(methods.Adversarial.load_state_dict, state=t.state(own) + broken)
# Each rule has its moment.
gairat = rules.GAIRAT(begin=0)
good(rules.GAIRAT.combine, self=rules.GAIRAT, losses=Z[:, 0], logits=Z, targets=Y)
each(rules.GAIRAT.combine, logits=[], targets=[])
bad(rules.GAIRAT.combine, RuntimeError, "own attack", self=lambda: gairat)
good(rules.LPS.end_epoch, self=counted)
bad(rules.LPS.end_epoch, RuntimeError, "", self=lambda: method(rules.LPS).rule)
good(rules.FRL.end_epoch, self=validated)
bad(rules.FRL.end_epoch, RuntimeError, "", self=lambda: method(rules.FRL).rule)

good(methods.build_method, "build_method|RSLAD|LPS", name="rslad", num_classes=K, teacher=t.MODEL)
names = t.STRING + any_of(ValueError, "alone or behind", "rslad-fair", "fair-fair-rslad")
both = any_of(ValueError, "`natural_teacher` for 'rslad'", t.TEACHER)
each(methods.build_method, name=names, preset=t.CHOICE, natural_teacher=both)
each(methods.build_method, teacher=any_of(ValueError, "a `teacher` for 'rslad'", None))
each(methods.build_method, rule=any_of(TypeError, "a Rule", "fat"))
bad(methods.build_method, ValueError, "no `rule`", name="fair-rslad", rule=rules.FAT())
bad(
    methods.build_method,
    ValueError,
    "a pair without a release",
    name="fat-rslad",
    preset="released",
)
bad(methods.build_method, ValueError, "`settings` among", epsilon=0.1)
good(methods.recipe, name="ard")
each(methods.recipe, name=names, preset=t.CHOICE)
good(methods.FairAverage, model=t.MODEL)
each(methods.FairAverage, decay=SHARE, threshold=SHARE)
average = methods.FairAverage(t.MODEL)
good(methods.FairAverage.update, self=lambda: average, model=t.MODEL, class_accuracy=FIGURES)
models = [*t.MODULE, (torch.nn.Linear(2, 2), ValueError, "of the first one")]
accuracies = [*t.FRACTIONS, (FIGURES * t.NAN, ValueError, "only nan")]
each(methods.FairAverage.update, model=models, class_accuracy=accuracies)
own = average.state_dict()
good(methods.FairAverage.load_state_dict, self=lambda: average, state=own)
each(methods.FairAverage.load_state_dict, state=t.state(own))
