"""Residual networks with pre-activation: the wide ones of the teachers, and PreActResNet.

Submodules carry the names of the public implementations, so that their checkpoints fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public

Shortcut = Literal["activation", "input"]


class WideResNet(nn.Module):
    """Wide residual network (Zagoruyko and Komodakis 2016), named as TRADES and RobustBench name it.

    Made by `wide_resnet`.

    Attributes:
        feature_layers: names that `bottleneck.split_at` can cut. The last, "bn1", is FERD's tap: after
            the last block and the final BatchNorm, before the ReLU.
    """

    feature_layers = ("block1", "block2", "block3", "bn1")

    def __init__(self, depth: int, width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = _WideStage(blocks, 16, 16 * width, stride=1)
        self.block2 = _WideStage(blocks, 16 * width, 32 * width, stride=2)
        self.block3 = _WideStage(blocks, 32 * width, 64 * width, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(64 * width, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        z = self.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(z, 1).flatten(1))
        return logits


class PreActResNet(nn.Module):
    """PreActResNet (He et al. 2016b) with a final BatchNorm, named as in the releases of FERD and CFA.

    Made by `preact_resnet18` and `preact_resnet34`. Two public networks have these names and shapes; they
    differ in what the convolution of a shortcut takes.

    Attributes:
        feature_layers: names that `bottleneck.split_at` can cut. The last, "bn", is the counterpart of
            FERD's tap: after the last block and the final BatchNorm, before the ReLU.
    """

    feature_layers = ("layer1", "layer2", "layer3", "layer4", "bn")

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        num_classes: int,
        in_channels: int,
        shortcut: Shortcut = "activation",
    ) -> None:
        super().__init__()
        block = _PreActBlock if shortcut == "activation" else _InputShortcutBlock
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.layer1 = _stage(block, blocks[0], 64, 64, stride=1)
        self.layer2 = _stage(block, blocks[1], 64, 128, stride=2)
        self.layer3 = _stage(block, blocks[2], 128, 256, stride=2)
        self.layer4 = _stage(block, blocks[3], 256, 512, stride=2)
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(F.relu(self.bn(z)), 1).flatten(1))
        return logits


@public
def wide_resnet(
    depth: int = 34, width: int = 10, num_classes: int = 10, *, in_channels: int = 3
) -> WideResNet:
    """Build WideResNet-depth-width for 32x32 images.

    34-10 is the papers' teacher: 46.2 M parameters, 6.66 GMAC.

    Args:
        depth: 6n + 4 with n >= 1: 10, 16, 22, 28, 34, ...
        width: widening factor, >= 1.
        num_classes: K >= 2.
        in_channels: colour channels of the images, >= 1.

    Returns:
        A freshly initialised `WideResNet` in train mode, from images `(N, C, H, W)` to logits `(N, K)`.

    Raises:
        TypeError, ValueError: arguments that are not integers in range, or a depth that is not 6n + 4.

    Example:
        >>> sum(p.numel() for p in wide_resnet(16, 4).parameters())
        2748890
    """
    _checks.integer(10, depth=depth)
    _checks.integer(2, num_classes=num_classes)
    _checks.integer(1, width=width, in_channels=in_channels)
    if (depth - 4) % 6:
        raise InvalidValue(f"expected `depth` of the form 6n + 4, got {depth}")
    return WideResNet(depth, width, num_classes, in_channels)


@public
def preact_resnet18(
    num_classes: int = 10, *, in_channels: int = 3, shortcut: Shortcut = "activation"
) -> PreActResNet:
    """Build PreActResNet-18 for 32x32 and 64x64 images: 11.17 M parameters, 2.22 GMAC at 64x64.

    Other arguments, result and errors are those of `resnet18`.

    Args:
        num_classes: K >= 2.
        in_channels: colour channels of the images, >= 1.
        shortcut: "activation" if the convolution of a shortcut takes relu(bn(x)), as in the releases of FERD,
            CFA and AWP; "input" if it takes x, as in the release of Fast Adversarial Training. No
            checkpoint says which: their names and shapes are the same.

    Example:
        >>> sum(p.numel() for p in preact_resnet18(10).parameters())
        11172170
    """
    return _preact_resnet((2, 2, 2, 2), num_classes, in_channels, shortcut)


@public
def preact_resnet34(
    num_classes: int = 10, *, in_channels: int = 3, shortcut: Shortcut = "activation"
) -> PreActResNet:
    """Build PreActResNet-34, FERD's Tiny-ImageNet teacher: 21.28 M parameters, 4.64 GMAC at 64x64.

    Arguments, result and errors are those of `preact_resnet18`.

    Example:
        >>> preact_resnet34(200).linear.out_features
        200
    """
    return _preact_resnet((3, 4, 6, 3), num_classes, in_channels, shortcut)


def _preact_resnet(
    blocks: tuple[int, int, int, int], num_classes: int, in_channels: int, shortcut: Shortcut
) -> PreActResNet:
    _checks.integer(2, num_classes=num_classes)
    _checks.integer(1, in_channels=in_channels)
    _checks.choice(["activation", "input"], shortcut=shortcut)
    return PreActResNet(blocks, num_classes, in_channels, shortcut)


def shortcut_of(weights: Mapping[str, Tensor]) -> Shortcut | None:
    """Judge by its BatchNorm statistics what a trained PreActResNet's shortcuts take; None if they do not tell.

    The first BatchNorm of a stage's second block has recorded the mean of s + W2 relu(bn2(...)) over images and
    pixels. Both means that s can have follow from the first block's own numbers, if a BatchNorm's output
    is taken for normal: E relu(N(b, w^2)) = b Phi(b/w) + w phi(b/w).
    """
    misfits: list[tuple[float, float]] = []
    for stage in ("layer2", "layer3", "layer4"):
        # Double, because files of half precision overflow in sums of squares.
        block = {k: v.double() for k, v in weights.items() if k.startswith(f"{stage}.")}
        active, inner = (
            _mean_of_relu(block[f"{stage}.0.{bn}.weight"], block[f"{stage}.0.{bn}.bias"])
            for bn in ("bn1", "bn2")
        )
        recorded = block[f"{stage}.1.bn1.running_mean"]
        s = recorded - block[f"{stage}.0.conv2.weight"].sum((2, 3)) @ inner
        projection = block[f"{stage}.0.shortcut.0.weight"].flatten(1)
        errors = [s - projection @ mean for mean in (active, block[f"{stage}.0.bn1.running_mean"])]
        of_active, of_input = (float(e.square().sum() / recorded.square().sum()) for e in errors)
        misfits.append((of_active, of_input))
    # Trained networks: at most 0.3 for the true one on 32x32 images, at least 0.8 for the other.
    if all(a < 0.6 and a < b / 2 for a, b in misfits):
        return "activation"
    return "input" if all(b < 0.6 and b < a / 2 for a, b in misfits) else None


def _mean_of_relu(weight: Tensor, bias: Tensor) -> Tensor:
    width = weight.abs().clamp(min=1e-12)
    z = bias / width
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    mean: Tensor = bias * torch.special.ndtr(z) + width * density
    return mean


class _WideStage(nn.Module):
    """A sequence under the name `layer`, as the published checkpoints have it."""

    def __init__(self, blocks: int, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.layer = _stage(_WideBlock, blocks, in_channels, out_channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.layer(x)
        return z


class _Block(nn.Module):
    """Two 3x3 convolutions, with BatchNorm and ReLU before each."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)

    def residual(self, active: Tensor) -> Tensor:
        z: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return z


# The shortcuts differ in their name and in one condition. All take the input itself where they are None,
# and else, but for the last kind, what comes after the block's first BatchNorm and ReLU.
class _WideBlock(_Block):
    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride=stride)
        self.convShortcut = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        return self.residual(active) + (
            x if self.convShortcut is None else self.convShortcut(active)
        )


class _PreActBlock(_Block):
    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride=stride)
        self.shortcut = None
        if stride > 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        return self.residual(active) + (x if self.shortcut is None else self.shortcut(active))


class _InputShortcutBlock(_PreActBlock):
    def forward(self, x: Tensor) -> Tensor:
        residual = self.residual(F.relu(self.bn1(x)))
        return residual + (x if self.shortcut is None else self.shortcut(x))


def _stage(
    block: type[_Block], blocks: int, in_channels: int, out_channels: int, *, stride: int
) -> nn.Sequential:
    # Only the first block changes resolution and channels.
    first = block(in_channels, out_channels, stride=stride)
    rest = (block(out_channels, out_channels, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
