"""Attacks."""

import torch

from bad_input import table as t
from bad_input.table import K, N, X, Y, Z, any_of, bad, each, good
from ferdlib import attacks, losses


def nan_after(calls):
    """Return a model that breaks after so many calls."""
    seen = []

    def model(x):
        seen.append(len(x))
        return t.MODEL(x) * (t.NAN if len(seen) > calls else 1.0)

    return model


def not_logits(*shape):
    return lambda x: x.sum() * torch.ones(shape)


LEAST, FGSM, UTAE = attacks.least_pgd_steps, attacks.fgsm, attacks.utae_pgd
AIM = [row for row in t.LABELS if row[2] != "of shape"]
AIM += any_of(ValueError, "of 3 images", Y[:-1], Y[None])
AIM += [*t.IN_RANGE, (Y.to("meta"), ValueError, "on one device")]
STARTS = [
    *t.CHOICE[:1],
    ("gaussian", ValueError, "one of"),
    (X.long(), TypeError, "floating-point"),
    (X[:1], ValueError, "of shape"),
    (t.spoilt(X, t.NAN), ValueError, "finite"),
]
for function in (attacks.pgd, FGSM, attacks.cw_linf, UTAE, LEAST):
    aim = {"reference_logits": Z} if function is UTAE else {"targets": Y}
    start = {"random_start": "uniform", "rng": t.seeded()}
    good(function, model=t.MODEL, x=X, **aim, **start)
    broken = [(nan_after(0), RuntimeError, "NaN")]
    broken += [(nan_after(1), RuntimeError, "NaN")] * (function is not FGSM)
    broken += [(lambda x: t.MODEL(x).detach(), ValueError, "without a gradient")]
    apart = torch.zeros(N, K, requires_grad=True)
    broken += [(lambda x, apart=apart: apart * 1.0, ValueError, "without a gradient")]
    if function is not UTAE:
        broken += any_of(ValueError, "` of shape", not_logits(N, 1), not_logits(N, K, 1))
        each(function, targets=AIM)
    narrow = [((0.5, 0.5), ValueError, "low < high"), ((0.4, 0.5), ValueError, "`x` inside")]
    each(function, model=t.FUNCTION + broken, random_start=STARTS, bounds=t.BOUNDS + narrow)
    if function not in (FGSM, LEAST):
        each(function, steps=t.integer(0))
    if function not in (FGSM, UTAE):
        both = {"early_stop": True, "train_mode": True}
        bad(function, ValueError, "no `early_stop` with `train_mode`", **both)
# Whether a sample is done is read from labels, which other losses do not have.
aims = {"early_stop": True, "loss": losses.distillation, "targets": Z}
bad(attacks.pgd, TypeError, "int64", **aims)
# A NaN of the teacher reaches the loss at the first step.
wrong = [(Z[:-1], ValueError, ""), (Z.to("meta"), ValueError, "on one device")]
wrong += [(t.spoilt(Z, t.NAN), RuntimeError, "`model(x)`")]
each(UTAE, reference_logits=t.or_none(t.LOGITS) + wrong)
# Floats are logits of a teacher to it, beside which it needs labels.
aim = [row for row in AIM if row[2] != "int64"]
aim += [(Y.int(), TypeError, "int64"), (Y.float(), ValueError, "`labels` beside `targets`")]
each(LEAST, targets=aim, labels=t.or_none(t.BY_NAME["targets"]), on_step=t.or_none(t.FUNCTION))
good(attacks.StepCounter, labels=Y, steps=2)
each(attacks.StepCounter, labels=t.LABELS)
counting = {"self": lambda: attacks.StepCounter(Y, 2), "step": 0, "x_adv": X}
good(attacks.StepCounter.__call__, **counting, logits=Z)
counted = any_of(TypeError, "`model(x)`", "text", Z.long())
counted += any_of(ValueError, "`model(x)`", Z[0], Z[:-1]) + any_of(ValueError, "`labels`", Z[:, :2])
each(attacks.StepCounter.__call__, logits=counted)

good(attacks.autoattack, model=t.MODEL, x=X, targets=Y, num_classes=K, eps=0.9)
broken = any_of(RuntimeError, "NaN", nan_after(0), nan_after(1))
broken += any_of(ValueError, "` of shape", not_logits(N, 1), not_logits(N, K, 1))
classes = [*t.integer(2), (K + 1, ValueError, "number of logits")]
each(attacks.autoattack, model=t.FUNCTION + broken, num_classes=classes, eps=t.ABOVE_ZERO)
each(attacks.autoattack, on_batch=t.or_none(t.FUNCTION))
