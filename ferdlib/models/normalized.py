"""Normalisation inside the model, so that attacks work in pixel units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ferdlib import _checks
from ferdlib._checks import InvalidType, InvalidValue, public


class Normalized(nn.Module):
    r"""A model that takes images in [0, 1] and normalises them itself, $f((x - \mu) / s)$.

    So `eps` keeps its meaning in pixels. Mean and standard deviation are buffers: they follow the
    device, and are not in the state dict.

    Args:
        model: takes normalised images.
        mean: one number per channel.
        std: one positive number per channel.

    Attributes:
        feature_layers: the inner model's, with the prefix "model.".

    Raises:
        TypeError: a `model` that is not a module, or a mean or std that are not numbers.
        ValueError: mean and std of different lengths or not finite, a std that is not positive, or
            images with another number of channels.

    Example:
        >>> model = Normalized(nn.Flatten(), mean=[0.5], std=[0.25])
        >>> model(torch.full((1, 1, 1, 2), 1.0))
        tensor([[2., 2.]])
    """

    # TorchScript reads neither text that stands for a class nor a property that asks for attributes.
    if TYPE_CHECKING:
        mean: Tensor
        std: Tensor
    __jit_unused_properties__ = ("feature_layers",)

    @public
    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        _checks.module(model=model)
        means, stds = _per_channel("mean", mean), _per_channel("std", std)
        if means.ndim != 1 or means.shape != stds.shape or not len(means):
            raise InvalidValue(
                "expected `mean` and `std` with one number per channel, got shapes "
                f"{tuple(means.shape)} and {tuple(stds.shape)}"
            )
        if not bool((stds > 0).all()):
            raise InvalidValue(f"expected positive `std`, got {stds.tolist()}")
        self.model = model
        # Not persistent, so that the checkpoint of the inner model needs no other names than "model.".
        self.register_buffer("mean", means.reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", stds.reshape(-1, 1, 1), persistent=False)

    @property
    def feature_layers(self) -> tuple[str, ...]:
        layers: Any = getattr(self.model, "feature_layers", ())
        return tuple(f"model.{name}" for name in layers)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(_standardised(x, self.mean, self.std))
        return logits


def _per_channel(name: str, value: Any) -> Tensor:
    try:
        numbers = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidType(f"expected `{name}` to be numbers, got {_checks.got(value)}") from error
    if numbers.is_complex():
        raise InvalidType(f"expected `{name}` to be real, got {_checks.got(numbers)}")
    if not bool(numbers.isfinite().all()):
        raise InvalidValue(f"expected finite `{name}`, got {numbers.tolist()}")
    return numbers.to(torch.get_default_dtype())


# Wrapped, so that torch.fx keeps it whole: the check branches. A traced copy calls it without the class, so
# it says the name itself.
@fx.wrap
def _standardised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    # Without the check one channel would become three.
    if x.shape[1] != len(mean):
        raise ValueError(
            f"Normalized: expected `x` with {len(mean)} channels, as many as `mean`, got {list(x.shape)}"
        )
    return (x - mean) / std
