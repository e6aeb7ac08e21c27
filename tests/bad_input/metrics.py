"""Metrics."""

import torch

from bad_input import table as t
from bad_input.table import FIGURES, FRACTIONS, K, Y, any_of, each, good
from ferdlib import metrics

COUNTS = torch.eye(K, dtype=torch.int64) + 1
CONFUSION = [*t.tensor(COUNTS, torch.int32), (COUNTS.double(), TypeError, "int64")]
CONFUSION += any_of(ValueError, "K, K)", COUNTS[:, :-1], COUNTS[:0, :0])
CONFUSION += any_of(ValueError, "", COUNTS - 2)

good(metrics.confusion_matrix, predictions=Y, targets=Y, num_classes=K)
shapes = any_of(ValueError, "of shape", Y[:-1])
labels = t.LABELS + t.IN_RANGE + shapes
each(metrics.confusion_matrix, predictions=labels, targets=t.LABELS + t.IN_RANGE)
# More axes before the last ones are many matrices, and many accuracies.
matrices = [row for row in CONFUSION if row[2] != "of shape"]
batched = [row for row in FRACTIONS if row[2] != "of shape"]
batched += any_of(ValueError, "K >= 2", FIGURES[0])
for function in (metrics.class_accuracy, metrics.target_entropy):
    good(function, confusion=COUNTS)
    each(function, confusion=matrices + any_of(ValueError, "K, K)", COUNTS[0]))
for function in (metrics.average, metrics.worst_class, metrics.worst_fraction, metrics.nsd):
    good(function, acc=FIGURES)
    each(function, acc=batched)
each(metrics.worst_fraction, fraction=t.number(0, 1, above=True))
good(metrics.inheritance_ratio, student=FIGURES, teacher=FIGURES)
others = [*batched, (FIGURES[:-1], ValueError, "equal shape")]
each(metrics.inheritance_ratio, student=others, teacher=others)
