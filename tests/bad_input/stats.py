"""Intervals and paired tests."""

import torch

from bad_input import table as t
from bad_input.table import FIGURES, K, Y, any_of, bad, each, good
from ferdlib import stats

COUNTS = torch.arange(1, K + 1)
counts = [*t.tensor(COUNTS, torch.int32), (COUNTS.double(), TypeError, "int64")]
counts += any_of(ValueError, "", COUNTS[:-1], COUNTS[:0], -COUNTS)
confidence = [*t.number(), (0.0, ValueError, "in (0, 1)"), (95, ValueError, "95 % is 0.95")]
INTERVALS = ("wilson", "simultaneous", "worst_class", "worst_fraction", "average", "nsd")
for name in INTERVALS:
    function = getattr(stats, f"{name}_interval")
    good(function, correct=COUNTS, totals=COUNTS + 5)
    each(function, correct=counts, totals=counts, confidence=confidence)
    bad(function, ValueError, "", correct=COUNTS + 9)
each(stats.worst_fraction_interval, fraction=t.number(0, 1, above=True))
good(stats.mcnemar, only_a=COUNTS, only_b=COUNTS)
each(stats.mcnemar, only_a=counts, only_b=counts)
good(stats.holm, p=FIGURES)
ps = any_of(ValueError, "in [0, 1]", FIGURES + 1, FIGURES - 1, FIGURES[None])
each(stats.holm, p=[*ps, *any_of(TypeError, "", "text", None, COUNTS)])
right = {"correct_a": Y == 0, "correct_b": Y == 1}
good(stats.paired_permutation, **right, rows=Y, num_rows=K, figure="average", draws=20)
flags = [*t.tensor(Y == 0, torch.int64, "shape"), ((Y == 0)[:-1], ValueError, "shape")]
each(stats.paired_permutation, **dict.fromkeys(right, flags), num_rows=t.integer(2))
each(stats.paired_permutation, rows=t.LABELS + t.SHORT + t.IN_RANGE, figure=t.CHOICE)
