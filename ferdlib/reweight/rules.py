"""FERD's and Fair-ARD's rules: class means of the margin, or of the least PGD steps, to one number each."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib.reweight._common import filled, mean_one, ramp, within_steps

__all__ = [
    "lps_linear",
    "lps_power",
    "lps_sigmoid",
    "lps_tanh",
    "margin_minmax",
    "margin_softmax",
    "normalize",
]


def margin_softmax(
    class_margins: Tensor, *, temperature: float = 1.0, floor: float = 0.0
) -> Tensor:
    r"""FERD's class probabilities, $p = \mathrm{softmax}(D / T)$, $D_c = -\bar m_c$ (Eq. 1-2).

    A floor $\phi$ in [0, 1/K) makes them $(1 - K \phi) p + \phi$: none below $\phi$. Uniform if all
    margins are equal, or all classes absent. Raises as the package says.

    Args:
        class_margins: class means of `losses.margin`, `(K,)`.
        temperature: T > 0; the larger, the more even.

    Example:
        >>> margin_softmax(torch.tensor([1.0, 3.0]).log())  # the smaller margin, the more
        tensor([0.7500, 0.2500])
    """
    d = _vulnerability("margin_softmax", class_margins)
    t = _checks.number("margin_softmax", "temperature", temperature, low=0.0, open_low=True)
    phi, k = _checks.number("margin_softmax", "floor", floor, low=0.0), len(d)
    if phi >= 1 / k:
        raise ValueError(f"margin_softmax: expected `floor` < 1/K = {1 / k:g}, got {phi:g}")
    return ((1 - k * phi) * F.softmax(d / t, dim=0) + phi).to(class_margins.dtype)


def margin_minmax(class_margins: Tensor, *, low: float = 0.05, high: float = 0.2) -> Tensor:
    r"""FERD's released rule: $D = -\bar m$ mapped linearly onto [low, high], over its sum.

    No class is drawn more than high/low times as often as another; at K = 10 none exceeds 0.3077.
    Uniform if all margins are equal, or all classes absent. Raises as the package says.

    Args:
        class_margins: class means of `losses.margin`, `(K,)`.
        low, high: 0 <= low < high.

    Example:
        >>> margin_minmax(torch.tensor([0.0, 1.0, 3.0]), low=0.1, high=0.4)  # (.4, .3, .1) / .8
        tensor([0.5000, 0.3750, 0.1250])
    """
    d = _vulnerability("margin_minmax", class_margins)
    low = _checks.number("margin_minmax", "low", low, low=0.0)
    high = _checks.number("margin_minmax", "high", high, low=low, open_low=True)
    span = d.max() - d.min()
    p = low + (high - low) * (d - d.min()) / span if span > 0 else torch.ones_like(d)
    return (p / p.sum()).to(class_margins.dtype)


def lps_power(kappa: Tensor, *, beta: float = 2.0, guard: float = 1e-5) -> Tensor:
    r"""$\omega_c \propto (\kappa_c + \text{guard})^{-\beta}$, mean 1 (Fair-ARD Eq. 7, FERD Eq. 25).

    Fair-ARD's release clips it: `normalize(w, clip=(5 / 6, 5 / 2))`. Raises as the package says.

    Args:
        kappa: class means of the least PGD steps (Fair-ARD Eq. 5-6, FERD Eq. 24), `(K,)`, >= 0.
        beta: >= 0; at 0 all weights are 1.
        guard: >= 0, and > 0 where a kappa is 0.

    Example:
        >>> lps_power(torch.tensor([1.0, 2.0]), guard=0.0)  # (1, 1/4) over their mean 5/8
        tensor([1.6000, 0.4000])
    """
    b = _checks.number("lps_power", "beta", beta, low=0.0)
    k = _kappa("lps_power", kappa) + _checks.number("lps_power", "guard", guard, low=0.0)
    if bool((k == 0).any()):
        raise ValueError("lps_power: expected `guard` > 0 where a `kappa` is 0, got 0")
    return mean_one(-b * k.log()).to(kappa.dtype)


def lps_linear(kappa: Tensor, steps: int) -> Tensor:
    r"""$\omega_c \propto 1 - \kappa_c / (\text{steps} + 1)$, mean 1 (FERD Eq. 26).

    Args:
        kappa: as for `lps_power`, and <= steps. Raises as the package says.
        steps: >= 1, those of the attack that was counted.

    Example:
        >>> lps_linear(torch.tensor([0.0, 2.0]), steps=3)  # (1, 1/2) over their mean 3/4
        tensor([1.3333, 0.6667])
    """
    k = _kappa("lps_linear", kappa, _checks.integer("lps_linear", "steps", steps, low=1))
    return mean_one((1 - k / (steps + 1)).log()).to(kappa.dtype)


def lps_sigmoid(kappa: Tensor, steps: int, *, shift: float = 0.0) -> Tensor:
    r"""$\omega_c \propto \sigma(\lambda + 5 (1 - 2 \kappa_c / K))$, mean 1 (FERD Eq. 27).

    Args, Raises: as for `lps_linear`; K is `steps`, and `shift` $\lambda$, any finite number.

    Example:
        >>> lps_sigmoid(torch.tensor([5.0, 10.0]), steps=10)  # (1/2, 0.0067) over their mean
        tensor([1.9736, 0.0264])
    """
    return mean_one(F.logsigmoid(_ramp("lps_sigmoid", kappa, steps, shift))).to(kappa.dtype)


def lps_tanh(kappa: Tensor, steps: int, *, shift: float = 0.0) -> Tensor:
    r"""$\omega_c \propto (1 + \tanh(\lambda + 5 (1 - 2 \kappa_c / K))) / 2$, mean 1 (FERD Eq. 28).

    Args, Raises: as for `lps_sigmoid`.

    Example:
        >>> lps_tanh(torch.tensor([5.0, 6.0]), steps=10)  # (1/2, 0.1192) over their mean
        tensor([1.6150, 0.3850])
    """
    u = _ramp("lps_tanh", kappa, steps, shift)
    return mean_one(F.logsigmoid(2 * u)).to(kappa.dtype)  # (1 + tanh u) / 2 = sigmoid(2u)


def normalize(
    w: Tensor, *, to: Literal["mean", "sum"] = "mean", clip: tuple[float, float] | None = None
) -> Tensor:
    """Scale weights `(K,)` to mean 1 (loss weights) or to sum 1 (probabilities), then clip them.

    Args:
        w: float `(K,)`, finite, >= 0, not all 0.
        clip: (low, high), 0 <= low <= high, applied last and *not* renormalised: the mean is then
            no longer 1. Fair-ARD's release has (5/6, 5/2).

    Raises:
        TypeError: weights that are not float, a clip that is no pair of numbers.
        ValueError: a wrong shape, weights or bounds out of range, another `to`.

    Example:
        >>> normalize(torch.tensor([1.0, 3.0, 0.0, 4.0]), clip=(5 / 6, 5 / 2))
        tensor([0.8333, 1.5000, 0.8333, 2.0000])
    """
    _checks.choice("normalize", "to", to, ("mean", "sum"))
    _checks.floating("normalize", "w", w)
    if w.ndim != 1:
        raise ValueError(f"normalize: expected `w` of shape (K,), got {tuple(w.shape)}")
    if not bool((w.isfinite() & (w >= 0)).all() & (w > 0).any()):
        raise ValueError(f"normalize: expected `w` finite, >= 0 and not all 0, got {w.tolist()}")
    scaled = w.double() / (w.double().mean() if to == "mean" else w.double().sum())
    if clip is not None:
        scaled = scaled.clamp(*_checks.pair("normalize", "clip", clip, low=0.0))
    return scaled.to(w.dtype)


def _vulnerability(function: str, class_margins: Tensor) -> Tensor:
    """D, absent classes filled in."""
    return filled(-_checks.class_vector(function, class_margins, argument="class_margins").double())


def _kappa(function: str, kappa: Tensor, steps: float = math.inf) -> Tensor:
    k = _checks.class_vector(function, kappa, argument="kappa").double()
    return within_steps(function, "kappa", k, steps)


def _ramp(function: str, kappa: Tensor, steps: int, shift: float) -> Tensor:
    k = _kappa(function, kappa, _checks.integer(function, "steps", steps, low=1))
    return ramp(function, k, steps, shift)
