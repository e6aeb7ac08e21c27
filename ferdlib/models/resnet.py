"""torchvision's ResNet with the stem that CIFAR-sized images need."""

from __future__ import annotations

from typing import Any

from torch import nn

from ferdlib import _checks


def resnet18(num_classes: int = 10, *, in_channels: int = 3) -> nn.Module:
    """ResNet-18 for 32x32 images (He et al. 2016, the papers' student): 11.17 M parameters.

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
    _checks.integer("resnet18", "num_classes", num_classes, low=2)
    _checks.integer("resnet18", "in_channels", in_channels, low=1)
    from torchvision.models import resnet18 as imagenet_resnet18

    model: Any = imagenet_resnet18(weights=None, num_classes=num_classes)
    stem = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = stem, nn.Identity()
    model.feature_layers = ("layer1", "layer2", "layer3", "layer4")
    network: nn.Module = model
    return network
