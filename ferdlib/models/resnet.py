"""torchvision's residual networks with the stem that CIFAR-sized images need."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ferdlib import _checks
from ferdlib._checks import public


@public
def resnet18(num_classes: int = 10, *, in_channels: int = 3) -> nn.Module:
    """Build ResNet-18 for 32x32 images (He et al. 2016, the papers' student): 11.17 M parameters, 0.555 GMAC.

    torchvision's network with a 3x3 stem of stride 1 in place of the 7x7 one, and without max pooling.

    Args:
        num_classes: K >= 2.
        in_channels: colour channels of the images, >= 1.

    Returns:
        A freshly initialised module in train mode, from images `(N, C, H, W)` to logits `(N, K)`. Its
        `feature_layers` are the names that `bottleneck.split_at` can cut, the recommended one last.

    Raises:
        TypeError, ValueError: arguments that are not integers in range.

    Example:
        >>> import torch
        >>> model = resnet18(10).eval()
        >>> model(torch.rand(1, 3, 32, 32)).shape, model.feature_layers[-1]
        (torch.Size([1, 10]), 'layer4')
    """
    return _with_small_stem("resnet18", num_classes, in_channels)


@public
def resnet34(num_classes: int = 10, *, in_channels: int = 3) -> nn.Module:
    """Build ResNet-34 for 32x32 images: 21.28 M parameters, 1.159 GMAC.

    Arguments, result and errors are those of `resnet18`.

    Example:
        >>> sum(p.numel() for p in resnet34(10).parameters())
        21282122
    """
    return _with_small_stem("resnet34", num_classes, in_channels)


@public
def resnet56(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    shortcut: Literal["projection", "padding"] = "projection",
) -> nn.Module:
    """Build ResNet-56 for CIFAR (He et al. 2016, section 4.2), MTARD's natural teacher: 0.86 M parameters.

    Three stages of nine torchvision `BasicBlock`s with 16, 32 and 64 channels. Its public checkpoints
    expect normalised images: wrap the model in `Normalized`. Other arguments, result and errors are those
    of `resnet18`.

    Args:
        num_classes: K >= 2.
        in_channels: colour channels of the images, >= 1.
        shortcut: where a block changes the shape, "projection" is a 1x1 convolution with BatchNorm (the
            paper's option B); "padding" takes every second pixel and pads the channels with zeros (option
            A, as in Fair-ARD's release), without parameters.

    Example:
        >>> sum(p.numel() for p in resnet56(10).parameters())
        855770
    """
    _check_sizes(num_classes, in_channels)
    _checks.choice(["projection", "padding"], shortcut=shortcut)
    padding = shortcut == "padding"
    model: Any = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(16),
            relu=nn.ReLU(inplace=True),
            layer1=_stage(16, 16, stride=1, padding=padding),
            layer2=_stage(16, 32, stride=2, padding=padding),
            layer3=_stage(32, 64, stride=2, padding=padding),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(64, num_classes),
        )
    )
    # torchvision's networks start so too, and the stages are made of its blocks.
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model.feature_layers = ("layer1", "layer2", "layer3")
    return cast(nn.Module, model)


def _with_small_stem(name: str, num_classes: int, in_channels: int) -> nn.Module:
    _check_sizes(num_classes, in_channels)
    from torchvision import models

    model: Any = getattr(models, name)(weights=None, num_classes=num_classes)
    # A 7x7 stem of stride 2 and a pooling would leave 8x8 of the 32x32 pixels.
    stem = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = stem, nn.Identity()
    model.feature_layers = ("layer1", "layer2", "layer3", "layer4")
    return cast(nn.Module, model)


def _check_sizes(num_classes: int, in_channels: int) -> None:
    _checks.integer(2, num_classes=num_classes)
    _checks.integer(1, in_channels=in_channels)


class _PaddedShortcut(nn.Module):
    """Every second pixel, with a quarter of the new channels as zeros on either side."""

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.shape[1] // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, zeros, zeros))


def _stage(in_channels: int, out_channels: int, *, stride: int, padding: bool) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock

    shortcut: nn.Module | None = None
    if in_channels != out_channels and padding:
        shortcut = _PaddedShortcut()
    elif in_channels != out_channels:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(8)))
