"""Figures."""

import torch

from bad_input import table as t
from bad_input.metrics import CONFUSION, COUNTS
from bad_input.table import FIGURES, FRACTIONS, K, X, Y, Z, any_of, each, good
from ferdlib import plots


def by_name(rows):
    """Return no mapping of names to tensors, and mappings with these rows in them."""
    wrong = [*any_of(TypeError, "a Mapping", Z, None), ({}, ValueError, "at least one")]
    return wrong + [({"a": value}, error, said) for value, error, said in rows]


ENDS = torch.stack([torch.zeros(K), torch.ones(K)], dim=1)
shaped = ({"a": v} for v in (ENDS[0], ENDS[:-1], ENDS.T, ENDS[None]))
intervals = any_of(ValueError, f"({K}, 2)", *shaped) + any_of(TypeError, "a Mapping", ENDS)
intervals += any_of(ValueError, "around each accuracy", {"a": ENDS / 10}, {"a": ENDS - 0.1})
intervals += any_of(TypeError, "`intervals['a']`", {"a": 1}, {"a": ENDS.long()})
intervals += any_of(ValueError, "one of 'a'", {"b": ENDS})
pair = {"a": FIGURES, "b": FIGURES[:-1]}
accuracies = [*by_name(FRACTIONS), (pair, ValueError, "equal shape")]
short = any_of(ValueError, "equal shape", FIGURES[:-1])
good(plots.plot_classes, accuracies={"a": FIGURES}, intervals={"a": ENDS})
each(plots.plot_classes, accuracies=accuracies, intervals=intervals, kind=t.CHOICE)
good(plots.plot_weights, weights=FIGURES, accuracy=FIGURES)
each(plots.plot_weights, weights=t.class_vector(FIGURES, 0) + short, accuracy=FRACTIONS + short)
good(plots.plot_confusion, confusion=COUNTS)
switches = any_of(TypeError, "one of True, False", "row", 1, None)
each(plots.plot_confusion, confusion=CONFUSION, normalize=switches)
values = any_of(TypeError, "", 0.1, "0.1", None)
values += [(["0.1", 0.2, 0.3], TypeError, "a number"), ([t.NAN, 0.2, 0.3], ValueError, " in ")]
values += any_of(ValueError, "`figures['a']`", [0.1, 0.2], [])
runs = t.tensor(Z[:, 0], torch.int64, "a row for each")
runs += any_of(ValueError, "a row for each", Z[:-1], Z[:, :0])
runs += any_of(ValueError, "finite", t.spoilt(Z, t.INF))
good(plots.plot_sweep, values=[0.1, 0.2, 0.3], figures={"a": Z}, xlabel="x", ylabel="y")
bars = any_of(TypeError, "a Mapping", ENDS) + any_of(TypeError, "`intervals['a']`", {"a": 1})
bars += any_of(ValueError, "of shape (3, 2)", {"a": ENDS})
bars += any_of(ValueError, "one of 'a'", {"b": ENDS})
each(plots.plot_sweep, values=values, figures=by_name(runs), intervals=bars)
good(plots.plot_survival, fooled_at=Y, targets=Y, num_classes=K, steps=2)
fooled_at = t.LABELS + t.SHORT + any_of(ValueError, "in 0..3", Y - 1, Y + 2)
each(plots.plot_survival, fooled_at=fooled_at, targets=t.LABELS + t.IN_RANGE)
good(plots.plot_images, x=X[:, :1], labels=Y, num_classes=K)
channels = any_of(ValueError, "C = 1 or 3", X, X[:, :1, :0])
labels = t.LABELS + t.SHORT + t.IN_RANGE
each(plots.plot_images, x=t.IMAGES + channels, labels=labels, per_class=t.integer(1))
for name in plots.__all__:
    each(getattr(plots, name), ax=any_of(TypeError, "Axes", "ax", 7))
