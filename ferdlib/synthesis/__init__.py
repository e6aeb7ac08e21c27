"""Sources of training images where there is no data."""

from ferdlib.synthesis.generator import Generator
from ferdlib.synthesis.inversion import Inversion
from ferdlib.synthesis.pool import ImagePool
from ferdlib.synthesis.source import Source, sample_labels

__all__ = ["Generator", "ImagePool", "Inversion", "Source", "sample_labels"]
