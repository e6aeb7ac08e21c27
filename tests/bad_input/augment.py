"""Augmentation."""

import torch

from bad_input import table as t
from bad_input.table import N, X, Y, any_of, each, good
from ferdlib.augment import Crops, crop_flip

good(crop_flip, x=X, rng=t.seeded())
each(crop_flip, x=t.BATCH)
FLIPS = Y == 0
good(Crops, top=Y, left=Y, mirrored=FLIPS, padding=1)
offsets = t.LABELS + any_of(ValueError, "in 0..2", Y - 1, Y + 1)
offsets += [(Y[:-1], ValueError, "shape"), (Y.to("meta"), ValueError, "on one device")]
mirrored = [*t.tensor(FLIPS, torch.int64, "shape"), (FLIPS[:-1], ValueError, "shape")]
each(Crops, top=offsets, left=offsets, mirrored=mirrored)
good(Crops.draw, n=N, padding=1, rng=t.seeded(), device="cpu")
each(Crops.draw, n=t.integer(0))
good(Crops.__call__, self=lambda: Crops.draw(N, padding=1, rng=t.seeded()), x=X)
each(Crops.__call__, x=[*t.BATCH, *any_of(ValueError, "", X[:-1], X.to("meta"))])
