"""The bottleneck."""

import torch

from bad_input import table as t
from bad_input.table import C, N, X, Y, any_of, bad, each, good
from ferdlib import bottleneck


def head(z):
    return torch.cat([z.mean((2, 3)), z.amax((2, 3))], dim=1)


# Features are any numbers at several positions, of which the spatial variance is taken.
few = any_of(ValueError, "", X[:, :, :1, :1], X[:0])
few += [(X.flatten(2).transpose(1, 2), ValueError, "tokens (N, L, D) as")]
good(bottleneck.split_at, model=t.MODEL, layer_name="3")
each(bottleneck.split_at, layer_name=[*t.STRING, ("layer9", ValueError, "")])
good(bottleneck.noise_scale, features=X, head=head, targets=Y, rng=t.seeded())
each(bottleneck.noise_scale, features=t.BATCH + few, steps=t.integer(0))
bad(bottleneck.noise_scale, RuntimeError, "finite", features=t.spoilt(X, t.NAN))
SIGMA = torch.ones(N, C)
good(bottleneck.nonrobust_channels, features=X, sigma=SIGMA)
sigma = [*t.tensor(SIGMA, torch.int64), (SIGMA[:-1], ValueError, "of shape")]
each(bottleneck.nonrobust_channels, features=t.BATCH + few, sigma=sigma)
MASK = SIGMA.bool()
good(bottleneck.nonrobust_logits, features=X, head=head, mask=MASK)
mask = [*t.tensor(MASK, torch.int64), (MASK[:-1], ValueError, "of shape")]
mask += [(MASK.to("meta"), ValueError, "on one device")]
each(bottleneck.nonrobust_logits, features=t.BATCH, mask=mask)
