"""Noise that belongs to a sample: a pure function of seed, restart, index and pixel."""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood 2014), its unsigned constants as int64, whose products wrap around.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def splitmix(z: Tensor) -> Tensor:
    """The generator's output function of int64 states."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def uniform(seed: int, restart: int, index: Tensor, shape: torch.Size) -> Tensor:
    """Float64 in (0, 1), a stream of its own for each index, `(N, *shape)`, on the index's device.

    Whole numbers all the way, so that every device and every batch gives the same.
    """
    pixels = torch.arange(1, shape.numel() + 1, device=index.device)
    key = torch.zeros_like(index)
    for word in (seed % 2**63, restart, index):
        key = splitmix(key + word + _GAMMA)
    bits = splitmix(key[:, None] + pixels * _GAMMA)
    return ((_shifted(bits, 11).double() + 0.5) * 2.0**-53).reshape(-1, *shape)


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, zeros from the left, where torch would copy the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)
