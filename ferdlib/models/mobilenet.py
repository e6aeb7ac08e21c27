"""MobileNetV2 for CIFAR, in the public variant that the papers take for a student.

torchvision's network differs in three places: no expansion convolution in the first block, no projected
shortcuts, and ReLU6 for ReLU. Checkpoints of the public variant fit the names here.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ferdlib import _checks
from ferdlib._checks import public

# Expansion, channels, blocks and stride of each stage (Sandler et al. 2018, Table 2). The second stage has
# stride 1 here, because an image of 32x32 has no resolution to give away so early.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018) with a stem and a second stage of stride 1.

    Made by `mobilenet_v2`.

    Attributes:
        feature_layers: names that `bottleneck.split_at` can cut. The last, "bn2", is the counterpart of
            FERD's tap: after the last convolution and its BatchNorm, before the ReLU.
    """

    feature_layers = ("layers", "bn2")

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        blocks, channels = [], 32
        # Only the first block of a stage changes the resolution.
        for expansion, out_channels, repeats, first_stride in STAGES:
            for k in range(repeats):
                stride = first_stride if k == 0 else 1
                blocks.append(_InvertedResidual(channels, out_channels, expansion, stride))
                channels = out_channels
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(channels, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn2(self.conv2(self.layers(F.relu(self.bn1(self.conv1(x)))))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(z, 1).flatten(1))
        return logits


@public
def mobilenet_v2(num_classes: int = 10, *, in_channels: int = 3) -> MobileNetV2:
    """Build MobileNetV2 for 32x32 images, the papers' small student: 2.30 M parameters, 0.091 GMAC.

    Arguments, result and errors are those of `resnet18`.

    Example:
        >>> sum(p.numel() for p in mobilenet_v2(10).parameters())
        2296922
    """
    _checks.integer(2, num_classes=num_classes)
    _checks.integer(1, in_channels=in_channels)
    return MobileNetV2(num_classes, in_channels)


class _InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel by itself, project by another 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        # A block that halves the resolution has no shortcut.
        self.shortcut: nn.Module | None = None
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif stride == 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = F.relu(self.bn1(self.conv1(x)))
        z = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(z)))))
        return z if self.shortcut is None else z + self.shortcut(x)
