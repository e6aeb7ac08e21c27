"""The rules of FERD and Fair-ARD, from class means of the margin or of the least PGD steps."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public
from ferdlib.reweight._common import ROUNDING, filled, mean_one, ramp


@public
def margin_softmax(
    class_margins: Tensor, *, temperature: float = 1.0, floor: float = 0.0
) -> Tensor:
    r"""FERD's class probabilities, $p = \mathrm{softmax}(D / T)$, $D_c = -\bar m_c$ (Eq. 1-2).

    A floor $\phi$ in [0, 1/K) makes them $(1 - K \phi) p + \phi$: none below $\phi$. Uniform if all
    margins are equal, or all classes absent.

    Args:
        class_margins: class means of `losses.margin`, `(K,)`.
        temperature: T > 0; the larger, the more even.

    Example:
        >>> margin_softmax(torch.tensor([1.0, 3.0]).log())  # the smaller margin, the more
        tensor([0.7500, 0.2500])
    """
    _checks.class_vector(class_margins=class_margins)
    _checks.divisor(temperature=temperature)
    _checks.real(0, floor=floor)
    k = len(class_margins)
    if floor >= 1 / k:
        raise InvalidValue(f"expected `floor` < 1/K = {1 / k!r}, got {floor!r}")
    p = F.softmax(filled(-_checks.double(class_margins)) / temperature, dim=0)
    return ((1 - k * floor) * p + floor).to(class_margins.dtype)


@public
def margin_minmax(class_margins: Tensor, *, low: float = 0.05, high: float = 0.2) -> Tensor:
    r"""FERD's released rule: $D = -\bar m$ mapped linearly onto [low, high], over its sum.

    No class is drawn more than high/low times as often as another; at K = 10 none exceeds 0.3077.
    Uniform if all margins are equal, or all classes absent.

    Args:
        class_margins: class means of `losses.margin`, `(K,)`.
        low, high: 0 <= low < high.

    Example:
        >>> margin_minmax(torch.tensor([0.0, 1.0, 3.0]), low=0.1, high=0.4)  # (.4, .3, .1) / .8
        tensor([0.5000, 0.3750, 0.1250])
    """
    _checks.class_vector(class_margins=class_margins)
    _checks.real(0, low=low, high=high)
    if low >= high:
        raise InvalidValue(f"expected `high` above `low` {low!r}, got {high!r}")
    d = filled(-_checks.double(class_margins))
    span = d.max() - d.min()
    p = low + (high - low) * (d - d.min()) / span if span > 0 else torch.ones_like(d)
    return (p / p.sum()).to(class_margins.dtype)


@public
def lps_power(kappa: Tensor, *, beta: float = 2.0, guard: float = 1e-5) -> Tensor:
    r"""Fair-ARD's weights, $\omega_c \propto (\kappa_c + \text{guard})^{-\beta}$ of mean 1 (Eq. 7, FERD Eq. 25).

    Fair-ARD's release clips it: `normalize(w, clip=(5 / 6, 5 / 2))`.

    Args:
        kappa: class means of the least PGD steps (Fair-ARD Eq. 5-6, FERD Eq. 24), `(K,)`, >= 0.
        beta: >= 0; at 0 all weights are 1.
        guard: >= 0, and > 0 where a kappa is 0.

    Example:
        >>> lps_power(torch.tensor([1.0, 2.0]), guard=0.0)  # (1, 1/4) over their mean 5/8
        tensor([1.6000, 0.4000])
    """
    _checks.class_vector(0, kappa=kappa)
    _checks.real(0, beta=beta, guard=guard)
    k = _checks.double(kappa) + guard
    if bool((k == 0).any()):
        raise InvalidValue("expected `guard` > 0 where a `kappa` is 0, got 0")
    return mean_one(-beta * k.log()).to(kappa.dtype)


@public
def lps_linear(kappa: Tensor, steps: int) -> Tensor:
    r"""Linear weights, $\omega_c \propto 1 - \kappa_c / (\text{steps} + 1)$ of mean 1 (FERD Eq. 26).

    Args:
        kappa: as for `lps_power`, and <= steps.
        steps: >= 1, those of the attack that was counted.

    Example:
        >>> lps_linear(torch.tensor([0.0, 2.0]), steps=3)  # (1, 1/2) over their mean 3/4
        tensor([1.3333, 0.6667])
    """
    k = _counts(kappa, steps)
    return mean_one((1 - k / (steps + 1)).log()).to(kappa.dtype)


@public
def lps_sigmoid(kappa: Tensor, steps: int, *, shift: float = 0.0) -> Tensor:
    r"""Sigmoid weights, $\omega_c \propto \sigma(\lambda + 5 (1 - 2 \kappa_c / K))$ of mean 1 (FERD Eq. 27).

    Args as for `lps_linear`; K is `steps`, and `shift` $\lambda$, any finite number.

    Example:
        >>> lps_sigmoid(torch.tensor([5.0, 10.0]), steps=10)  # (1/2, 0.0067) over their mean
        tensor([1.9736, 0.0264])
    """
    u = ramp(_counts(kappa, steps, shift), steps, shift)
    return mean_one(F.logsigmoid(u)).to(kappa.dtype)


@public
def lps_tanh(kappa: Tensor, steps: int, *, shift: float = 0.0) -> Tensor:
    r"""Tanh weights, $\omega_c \propto (1 + \tanh(\lambda + 5 (1 - 2 \kappa_c / K))) / 2$ of mean 1 (FERD Eq. 28).

    Args as for `lps_sigmoid`.

    Example:
        >>> lps_tanh(torch.tensor([5.0, 6.0]), steps=10)  # (1/2, 0.1192) over their mean
        tensor([1.6150, 0.3850])
    """
    u = ramp(_counts(kappa, steps, shift), steps, shift)
    # (1 + tanh u) / 2 = sigmoid(2u)
    return mean_one(F.logsigmoid(2 * u)).to(kappa.dtype)


@public
def normalize(
    w: Tensor, *, to: Literal["mean", "sum"] = "mean", clip: tuple[float, float] | None = None
) -> Tensor:
    """Scale weights `(K,)` to mean 1 (loss weights) or to sum 1 (probabilities), then clip them.

    Args:
        w: float `(K,)`, finite, >= 0, not all 0.
        clip: (low, high), 0 <= low <= high, applied last and *not* renormalised: the mean is then
            no longer 1. Fair-ARD's release has (5/6, 5/2).

    Example:
        >>> normalize(torch.tensor([1.0, 3.0, 0.0, 4.0]), clip=(5 / 6, 5 / 2))
        tensor([0.8333, 1.5000, 0.8333, 2.0000])
    """
    _checks.choice(("mean", "sum"), to=to)
    _checks.floating(w=w)
    if w.ndim != 1:
        raise InvalidValue(f"expected `w` of shape (K,), got {tuple(w.shape)}")
    if not bool((w.isfinite() & (w >= 0)).all() & (w > 0).any()):
        raise InvalidValue(f"expected `w` finite, >= 0 and not all 0, got {w.tolist()}")
    # Over a power of two first, which changes no digit: a sum of large weights would overflow.
    values = _checks.double(w) / 2.0 ** math.floor(math.log2(float(w.max())))
    scaled = values / (values.mean() if to == "mean" else values.sum())
    if clip is not None:
        _checks.pair(0, clip=clip)
        scaled = scaled.clamp(*clip)
    return scaled.to(w.dtype)


def _counts(kappa: Tensor, steps: int, shift: float = 0.0) -> Tensor:
    """Check the arguments of a rule that knows the number of steps; return kappa in float64."""
    _checks.integer(1, steps=steps)
    _checks.real(shift=shift)
    _checks.class_vector(0, steps * ROUNDING, kappa=kappa)
    return _checks.double(kappa)
