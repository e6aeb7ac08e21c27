"""torchvision's residual networks with the stem that CIFAR-sized images need."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from ferdlib import _oldchecks as _checks


def resnet18(num_classes: int = 10, *, in_channels: int = 3) -> nn.Module:
    """ResNet-18 for 32x32 images (He et al. 2016, the papers' student): 11.17 M parameters, 0.555 GMAC.

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


def resnet34(num_classes: int = 10, *, in_channels: int = 3) -> nn.Module:
    """ResNet-34 for 32x32 images: 21.28 M parameters, 1.159 GMAC. Otherwise as `resnet18`.

    Args:
        num_classes: K >= 2.
        in_channels: colour channels of the images, >= 1.

    Returns:
        A freshly initialised module in train mode, see `resnet18`.

    Raises:
        TypeError, ValueError: arguments that are not integers in range.

    Example:
        >>> sum(p.numel() for p in resnet34(10).parameters())
        21282122
    """
    return _with_small_stem("resnet34", num_classes, in_channels)


def resnet56(num_classes: int = 10, *, in_channels: int = 3) -> nn.Module:
    """ResNet-56, made for CIFAR (He et al. 2016, section 4.2): MTARD's natural teacher, 0.86 M parameters.

    Three stages of nine torchvision `BasicBlock`s with 16, 32 and 64 channels; shortcuts that change the
    shape are 1x1 convolutions with BatchNorm. Public checkpoints of it expect normalised images: wrap
    it in `Normalized`.

    Args:
        num_classes: K >= 2.
        in_channels: colour channels of the images, >= 1.

    Returns:
        A freshly initialised module in train mode, from images `(N, C, H, W)` to logits `(N, K)`.

    Raises:
        TypeError, ValueError: arguments that are not integers in range.

    Example:
        >>> sum(p.numel() for p in resnet56(10).parameters())
        855770
    """
    _checks.integer("resnet56", "num_classes", num_classes, low=2)
    _checks.integer("resnet56", "in_channels", in_channels, low=1)
    model: Any = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(16),
            relu=nn.ReLU(inplace=True),
            layer1=_stage(16, 16, stride=1),
            layer2=_stage(16, 32, stride=2),
            layer3=_stage(32, 64, stride=2),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(64, num_classes),
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model.feature_layers = ("layer1", "layer2", "layer3")
    network: nn.Module = model
    return network


def _with_small_stem(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """torchvision's network of that name, for images of 32x32 pixels."""
    _checks.integer(name, "num_classes", num_classes, low=2)
    _checks.integer(name, "in_channels", in_channels, low=1)
    from torchvision import models

    model: Any = getattr(models, name)(weights=None, num_classes=num_classes)
    stem = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = stem, nn.Identity()
    model.feature_layers = ("layer1", "layer2", "layer3", "layer4")
    network: nn.Module = model
    return network


def _stage(in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock

    shortcut = None
    if in_channels != out_channels:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(8)))
