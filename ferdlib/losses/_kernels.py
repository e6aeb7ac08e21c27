r"""The losses without their checks: logits `(N, K)` in float32 or wider, labels int64 `(N,)`, to `(N,)`."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    r"""$-\log p_y$."""
    return F.cross_entropy(z, y, reduction="none")


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    r"""$KL(p \| q)$; gradients flow into both."""
    log_p, log_q = F.log_softmax(p_logits, dim=1), F.log_softmax(q_logits, dim=1)
    # Logarithms throughout: that of a softmax which has rounded to 0 would be -inf.
    return expected(log_p.exp(), log_p - log_q)


def rescaled_kl(p_logits: Tensor, q_logits: Tensor, t: float | Tensor) -> Tensor:
    r"""$\tau^2 KL_\tau(p \| q)$, for a number or a column `(N, 1)` of temperatures."""
    # As a column, because t may be one.
    return (t**2 * kl(p_logits / t, q_logits / t)[:, None]).squeeze(1)


def margin(z: Tensor, y: Tensor) -> Tensor:
    r"""$z_y - \max_{j \ne y} z_j$."""
    label = y[:, None]
    # A label masked with 0 would beat all others where logits are negative.
    others = z.scatter(1, label, -math.inf)
    return z.gather(1, label).squeeze(1) - others.amax(dim=1)


def uniformity(z: Tensor) -> Tensor:
    r"""$KL(U \| p)$."""
    return -F.log_softmax(z, dim=1).mean(dim=1) - math.log(z.shape[1])


def confidence_penalty(z: Tensor) -> Tensor:
    r"""$KL(p \| U)$."""
    log_p = F.log_softmax(z, dim=1)
    return expected(log_p.exp(), log_p) + math.log(z.shape[1])


def expected(p: Tensor, values: Tensor) -> Tensor:
    """Mean of the values under p; a class of probability 0, masked by a logit of -inf, adds nothing."""
    return (p * values.masked_fill(p == 0, 0.0)).sum(dim=1)
