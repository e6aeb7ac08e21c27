"""Image classifiers for inputs of 8x8 to 64x64, their checkpoints, and fast copies for attacks."""

from ferdlib.models.checkpoint import load_checkpoint, load_robustbench
from ferdlib.models.cnn import SmallCNN, small_cnn
from ferdlib.models.freeze import FrozenModel, freeze_for_attack
from ferdlib.models.mobilenet import MobileNetV2, mobilenet_v2
from ferdlib.models.normalized import Normalized
from ferdlib.models.preact import (
    PreActResNet,
    WideResNet,
    preact_resnet18,
    preact_resnet34,
    wide_resnet,
)
from ferdlib.models.registry import build_model, create
from ferdlib.models.resnet import resnet18, resnet34, resnet56

__all__ = [
    "FrozenModel",
    "MobileNetV2",
    "Normalized",
    "PreActResNet",
    "SmallCNN",
    "WideResNet",
    "build_model",
    "create",
    "freeze_for_attack",
    "load_checkpoint",
    "load_robustbench",
    "mobilenet_v2",
    "preact_resnet18",
    "preact_resnet34",
    "resnet18",
    "resnet34",
    "resnet56",
    "small_cnn",
    "wide_resnet",
]
