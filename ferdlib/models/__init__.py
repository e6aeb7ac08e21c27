"""Small image classifiers for 8x8 to 64x64 inputs, with the names of the layers that can be cut."""

from ferdlib.models.cnn import SmallCNN, small_cnn
from ferdlib.models.normalized import Normalized
from ferdlib.models.resnet import resnet18

__all__ = ["Normalized", "SmallCNN", "resnet18", "small_cnn"]
