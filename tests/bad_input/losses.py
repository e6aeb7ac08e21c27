"""Losses."""

import torch

from bad_input import table as t
from bad_input.table import K, N, X, Y, Z, any_of, bad, each, good
from ferdlib import losses

for function in (losses.cross_entropy, losses.margin, losses.cw_margin):
    good(function, logits=Z, targets=Y)
good(losses.uniformity, logits=Z)
good(losses.confidence_penalty, logits=Z)
for function in (losses.distillation, losses.masked_distillation):
    good(function, logits=Z, reference_logits=Z)
    each(function, logits=t.PAIRED, reference_logits=t.PAIRED)
good(losses.kl_divergence, p_logits=Z, q_logits=Z)
each(losses.kl_divergence, p_logits=t.PAIRED, q_logits=t.PAIRED)
good(losses.decoupled_kl, student_logits=Z, teacher_logits=Z)
each(losses.decoupled_kl, student_logits=t.PAIRED, teacher_logits=t.PAIRED)

student = dict.fromkeys(("student_clean", "student_adv"), Z)
robust = student | {"teacher_clean": Z}
good(losses.trades, **student, targets=Y)
good(losses.ard, **robust, targets=Y, alpha=0.5)
good(losses.rslad, **robust)
good(losses.iad, **robust, teacher_adv=Z, targets=Y)
good(losses.adaad, **robust, teacher_adv=Z, alpha=0.5)
good(losses.absld, **robust, adv_temperature=2.0, clean_temperature=2.0)
good(losses.mtard, **student, natural_clean=Z, robust_adv=Z)
good(losses.ferd_distillation_loss, **robust)
for function in (losses.rslad, losses.absld):
    each(function, adv_weight=t.SHARE)
share = [*t.SHARE, (torch.tensor(1), TypeError, "float"), (torch.ones(N), ValueError, "")]
each(losses.mtard, natural_clean=t.PAIRED, robust_adv=t.PAIRED, adv_weight=share)
good(losses.bat, student_clean=Z, student_last_correct=Z, student_first_wrong=Z, targets=Y)
each(losses.bat, student_last_correct=t.PAIRED, student_first_wrong=t.PAIRED)

SCALAR = any_of(TypeError, "", "text", None, 0.5, torch.tensor(1))
SCALAR += any_of(ValueError, "", torch.ones(1))
generated = dict.fromkeys(("teacher_logits", "student_logits", "nonrobust_logits"), Z)
good(losses.ferd_generator_loss, **generated, targets=Y, batchnorm_loss=torch.tensor(0.5))
each(losses.ferd_generator_loss, **dict.fromkeys(generated, t.PAIRED), batchnorm_loss=SCALAR)
each(losses.ferd_generator_loss, nonrobust_logits=t.or_none(t.PAIRED))

ONES = torch.ones(K)
good(losses.class_temperatures, temperatures=ONES, class_losses=Z[0])
temperatures = [*t.class_vector(ONES, 0), (t.spoilt(ONES, t.NAN), ValueError, "")]
class_losses = [*t.class_vector(Z[0]), (Z[0, :-1], ValueError, "`temperatures` of shape (3,)")]
each(losses.class_temperatures, temperatures=temperatures, class_losses=class_losses)
each(losses.class_temperatures, low=t.ABOVE_ZERO, high=t.number(0.5))
good(losses.class_variance, values=Z[:, 0], targets=Y, num_classes=K)
each(losses.class_variance, values=t.tensor(Z[:, 0], torch.int64))


def statistics(*batches):
    with losses.BatchNormStatistics(t.MODEL) as found:
        for x in batches:
            t.MODEL(x)
    return found


untracked = torch.nn.BatchNorm2d(2, track_running_stats=False)
norms = any_of(ValueError, "", torch.nn.Linear(2, 2), untracked)
good(losses.BatchNormStatistics, model=t.MODEL)
each(losses.BatchNormStatistics, model=t.MODULE + norms, reduce=t.or_none(t.FUNCTION))
good(losses.BatchNormStatistics.loss, self=lambda: statistics(X))
bad(losses.BatchNormStatistics.loss, RuntimeError, "", self=statistics)
good(losses.MTARDBalance)
each(losses.MTARDBalance, rate=t.SHARE)
half, first = torch.tensor(0.5), any_of(ValueError, "", torch.tensor(t.NAN), torch.tensor(t.INF))
good(losses.MTARDBalance.update, self=losses.MTARDBalance, adv_loss=half, clean_loss=half)
each(losses.MTARDBalance.update, adv_loss=SCALAR + first, clean_loss=SCALAR + first)
own = losses.MTARDBalance().state_dict()
good(losses.MTARDBalance.load_state_dict, self=losses.MTARDBalance, state=own)
spoilt = [(own | {"initial_losses": torch.ones(3)}, ValueError, "`initial_losses`")]
spoilt += [(own | {"clean_weight": torch.ones(1)}, ValueError, "`clean_weight`")]
each(losses.MTARDBalance.load_state_dict, state=t.state(own)[:4] + spoilt)
