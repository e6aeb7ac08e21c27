"""A small convolutional network for images as small as 8x8."""

from __future__ import annotations

from torch import Tensor, nn

from ferdlib import _checks
from ferdlib._checks import public


class SmallCNN(nn.Module):
    """Four 3x3 convolutions with BatchNorm and ReLU, average pooling and a linear layer.

    Made by `small_cnn`. `layer1` and `layer2` keep the resolution, `layer2` doubles the width, `layer3`
    halves the resolution, `layer4` keeps both, so an 8x8 image leaves 4x4 positions for the bottleneck.

    Attributes:
        feature_layers: names that `bottleneck.split_at` can cut, the recommended one last.
    """

    feature_layers = ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, in_channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.layer1 = _block(in_channels, width, stride=1)
        self.layer2 = _block(width, 2 * width, stride=1)
        self.layer3 = _block(2 * width, 2 * width, stride=2)
        self.layer4 = _block(2 * width, 2 * width, stride=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.pool(z).flatten(1))
        return logits


@public
def small_cnn(in_channels: int = 1, num_classes: int = 10, width: int = 32) -> SmallCNN:
    """Build a small CNN for images of 8x8 pixels and up, such as the digits.

    Half the width is a quarter of the parameters.

    Args:
        in_channels: colour channels of the images, >= 1.
        num_classes: K >= 2.
        width: channels of the first layer, >= 1; the others have twice as many.

    Returns:
        A freshly initialised `SmallCNN` in train mode, from images `(N, C, H, W)` to logits `(N, K)`.

    Raises:
        TypeError, ValueError: arguments that are not integers in range.

    Example:
        >>> import torch
        >>> small_cnn(1, 10, width=16)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    _checks.integer(1, in_channels=in_channels, width=width)
    _checks.integer(2, num_classes=num_classes)
    return SmallCNN(in_channels, num_classes, width)


def _block(in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    # BatchNorm's shift stands in for the convolution's bias.
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())
