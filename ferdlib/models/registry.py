"""Models by name, as a command line or a checkpoint names them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from torch import nn
from typing_extensions import deprecated

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public
from ferdlib.models.cnn import small_cnn
from ferdlib.models.mobilenet import mobilenet_v2
from ferdlib.models.preact import preact_resnet18, preact_resnet34, wide_resnet
from ferdlib.models.resnet import resnet18, resnet34, resnet56

NAMED: dict[str, Callable[..., nn.Module]] = {
    f.__name__: f
    for f in (resnet18, resnet34, resnet56, preact_resnet18, preact_resnet34, mobilenet_v2)
}
NAMED |= {
    "resnet56_padding_shortcut": partial(resnet56, shortcut="padding"),
    "preact_resnet18_input_shortcut": partial(preact_resnet18, shortcut="input"),
    "preact_resnet34_input_shortcut": partial(preact_resnet34, shortcut="input"),
}


@public
def build_model(architecture: str, num_classes: int = 10, *, in_channels: int = 3) -> nn.Module:
    """Build a freshly initialised model by its name.

    Args:
        architecture: "resnet18", "resnet34", "resnet56", "preact_resnet18", "preact_resnet34",
            "mobilenet_v2", "wide_resnet_DEPTH_WIDTH" such as "wide_resnet_34_10", or "small_cnn_WIDTH";
            "resnet56_padding_shortcut", "preact_resnet18_input_shortcut" and
            "preact_resnet34_input_shortcut" are the variants with another shortcut.
        num_classes: K >= 2.
        in_channels: colour channels of the images, >= 1.

    Returns:
        The module in train mode, from images `(N, C, H, W)` to logits `(N, K)`.

    Raises:
        TypeError, ValueError: an unknown name, or what the model's own function refuses.

    Example:
        >>> build_model("wide_resnet_28_4", num_classes=100).feature_layers
        ('block1', 'block2', 'block3', 'bn1')
    """
    _checks.instance(str, architecture=architecture)
    if architecture in NAMED:
        return NAMED[architecture](num_classes, in_channels=in_channels)
    if match := re.fullmatch(r"wide_resnet_(\d+)_(\d+)", architecture):
        depth, width = map(int, match.groups())
        return wide_resnet(depth, width, num_classes, in_channels=in_channels)
    if match := re.fullmatch(r"small_cnn_(\d+)", architecture):
        return small_cnn(in_channels, num_classes, width=int(match.group(1)))
    raise InvalidValue(
        f"expected `architecture` to be one of {', '.join(NAMED)}, wide_resnet_DEPTH_WIDTH, "
        f"small_cnn_WIDTH, got {architecture!r}"
    )


@deprecated("ferdlib.models.create is now called ferdlib.models.build_model")
def create(architecture: str, num_classes: int = 10, *, in_channels: int = 3) -> nn.Module:
    """Old name of `build_model`."""
    return build_model(architecture, num_classes, in_channels=in_channels)
