"""Normalisation inside the model, so that attacks work in pixel units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ferdlib import _checks


class Normalized(nn.Module):
    r"""A model that takes images in [0, 1] and normalises them itself, $f((x - \mu) / s)$.

    So `eps` keeps its meaning in pixels. Mean and standard deviation are buffers: they follow the
    device, and are no part of the state dict.

    Args:
        model: takes normalised images.
        mean: one number per channel.
        std: one positive number per channel.

    Attributes:
        feature_layers: the inner model's, with the prefix "model.".

    Raises:
        TypeError: `model` is not a module.
        ValueError: mean and std of different lengths, a std that is not positive, or images of
            another number of channels.

    Example:
        >>> model = Normalized(nn.Flatten(), mean=[0.5], std=[0.25])
        >>> model(torch.full((1, 1, 1, 2), 1.0))
        tensor([[2., 2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"Normalized: expected `model` to be a torch.nn.Module, got {_checks.got(model)}"
            )
        means, stds = torch.as_tensor(mean), torch.as_tensor(std)
        if means.ndim != 1 or means.shape != stds.shape:
            raise ValueError(
                "Normalized: expected `mean` and `std` with one number per channel, got shapes "
                f"{tuple(means.shape)} and {tuple(stds.shape)}"
            )
        if not bool((stds > 0).all()):
            raise ValueError(f"Normalized: expected positive `std`, got {stds.tolist()}")
        self.model = model
        dtype = torch.get_default_dtype()
        self.register_buffer("mean", means.to(dtype).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", stds.to(dtype).reshape(-1, 1, 1), persistent=False)

    @property
    def feature_layers(self) -> tuple[str, ...]:
        layers: Any = getattr(self.model, "feature_layers", ())
        return tuple(f"model.{name}" for name in layers)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(_standardised(x, self.mean, self.std))
        return logits


@fx.wrap
def _standardised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Kept whole by torch.fx, because the check branches; without it one channel would become three."""
    if x.shape[1] != len(mean):
        raise ValueError(
            f"Normalized: expected `x` with {len(mean)} channels, as many as `mean`, got {tuple(x.shape)}"
        )
    return (x - mean) / std
