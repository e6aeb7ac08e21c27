"""Rules that reweigh classes."""

import torch

from bad_input import table as t
from bad_input.table import WEIGHT, K, Y, Z, any_of, bad, each, good, spoilt
from ferdlib import reweight

ONES, HALVES = torch.ones(K), torch.full((K,), 0.5)
MARGINS, KAPPA = t.class_vector(Z[0]), t.class_vector(ONES, 0)
good(reweight.margin_softmax, class_margins=Z[0])
floor = [*WEIGHT, (1 / K, ValueError, "< 1/K")]
each(reweight.margin_softmax, class_margins=MARGINS, temperature=t.ABOVE_ZERO, floor=floor)
high = [*t.number(), (0.05, ValueError, "`low`")]
good(reweight.margin_minmax, class_margins=Z[0])
each(reweight.margin_minmax, class_margins=MARGINS, low=WEIGHT, high=high)
good(reweight.lps_power, kappa=ONES)
each(reweight.lps_power, kappa=KAPPA)
bad(reweight.lps_power, ValueError, "> 0", kappa=0 * ONES, guard=0.0)
for function in (reweight.lps_linear, reweight.lps_sigmoid, reweight.lps_tanh):
    good(function, kappa=ONES, steps=2)
    each(function, kappa=[*KAPPA, (spoilt(ONES, 2.01), ValueError, "from 0 to 2")])
counts = any_of(TypeError, "a torch.Tensor", "text", None, [1.0])
counts += any_of(TypeError, "int64", Y.int())
counts += any_of(ValueError, "in [0, 2]", Y - 1, Y + 1)
counts += any_of(ValueError, "", Y[None], Y[:0], torch.tensor([t.NAN, 1.0]))
good(reweight.gairat, steps_withstood=Y, steps=2)
each(reweight.gairat, steps_withstood=counts)
for function in (reweight.lps_sigmoid, reweight.lps_tanh, reweight.gairat):
    each(function, shift=t.number())
good(reweight.cfa_margins, robust_accuracy=HALVES)
good(reweight.cfa_mixing, robust_accuracy=HALVES, beta=6.0)
each(reweight.cfa_margins, robust_accuracy=t.FRACTIONS)
each(reweight.cfa_mixing, robust_accuracy=t.FRACTIONS)
good(reweight.kl_ball, scores=Z[0])
each(reweight.kl_ball, scores=MARGINS)
P = torch.full((K, K), 0.1) + 0.6 * torch.eye(K)
confusion = t.tensor(P, torch.int64) + any_of(ValueError, "(K, K)", P[0], P[:, :-1], P[:0, :0])
confusion += any_of(ValueError, "", 2 * P, P - 0.2 * torch.eye(K).roll(1, 1), spoilt(P, t.NAN))
good(reweight.confusion_weights, confusion_probabilities=P)
each(reweight.confusion_weights, confusion_probabilities=confusion)
uneven = {"confusion_probabilities": P.where(torch.arange(K)[:, None] > 0, 1 / K)}
bad(reweight.confusion_weights, ValueError, "`strength` below", **uneven, strength=1e9)
w = [*t.tensor(ONES, torch.int64), (0 * ONES, ValueError, "not all 0")]
w += any_of(ValueError, "finite", *(spoilt(ONES, v) for v in (t.NAN, t.INF, -0.01)))
good(reweight.normalize, w=ONES)
each(reweight.normalize, w=w, clip=[*t.or_none(t.BOUNDS), ((-1.0, 1.0), ValueError, " in ")])


def weights():
    return reweight.ClassWeights(K, reweight.lps_power)


values = any_of(TypeError, "a torch.Tensor", "text", None, [1.0])
values += [(torch.ones(3, dtype=torch.complex64), TypeError, "real")]
values += [(torch.ones(1, 3), ValueError, "of shape (N,)")]
targets = t.LABELS + t.SHORT + t.IN_RANGE
good(reweight.ClassMean, num_classes=K)
good(reweight.ClassWeights, num_classes=K, rule=reweight.lps_power)
good(reweight.FRLWeights, num_classes=K)
good(reweight.HedgeWeights, num_classes=K)
for method in (reweight.ClassMean.update, reweight.ClassWeights.__call__):
    good(method, self=weights, values=torch.ones(3), targets=Y)
    each(method, values=values, targets=targets)
other = any_of(TypeError, "", "text", None) + any_of(ValueError, "", reweight.ClassMean(K + 1))
good(reweight.ClassMean.merge, self=lambda: reweight.ClassMean(K), other=reweight.ClassMean(K))
each(reweight.ClassMean.merge, other=other)
FRL, HEDGE = (lambda: reweight.FRLWeights(K)), (lambda: reweight.HedgeWeights(K))
good(reweight.FRLWeights.update, self=FRL, clean_accuracy=HALVES, robust_accuracy=HALVES)
rows = [*t.FRACTIONS, (HALVES[:-1], ValueError, "shape")]
each(reweight.FRLWeights.update, clean_accuracy=rows, robust_accuracy=rows)
good(reweight.HedgeWeights.update, self=HEDGE, class_losses=ONES, average_loss=1.0)
rows = [*MARGINS, (Z[0, :-1], ValueError, "shape")]
each(reweight.HedgeWeights.update, class_losses=rows, average_loss=t.number())
for make in (weights, FRL, HEDGE):
    method, own = type(make()).load_state_dict, make().state_dict()
    good(method, self=make, state=own)
    each(method, state=t.state(own))
