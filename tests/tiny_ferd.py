"""FERD so small that an epoch takes a moment, for all tests that train with it."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from ferdlib.models import small_cnn
from ferdlib.models.cnn import SmallCNN
from ferdlib.synthesis import Generator
from ferdlib.trainer import FERDConfig, FERDTrainer

SIZES = {
    "num_classes": 3,
    "layer": "layer4",
    "image_shape": (1, 8, 8),
    "batch_size": 12,
    "generator_width": 4,
    "latent_dim": 5,
    "attack_steps": 2,
    "margin_attack_steps": 2,
    "crop_padding": 1,
}


def fed(teacher: SmallCNN) -> SmallCNN:
    """With BatchNorm statistics of digits, and logits that differ."""
    dtype = teacher.fc.weight.dtype
    digits = torch.tensor(load_digits().images[:64], dtype=dtype)[:, None] / 16
    with torch.no_grad():
        teacher.fc.weight.mul_(10)
        for _ in range(30):
            teacher(digits)
    return teacher


def make_models() -> tuple[nn.Module, nn.Module]:
    """A teacher and a student."""
    torch.manual_seed(5)
    teacher, student = small_cnn(1, 3, width=4), small_cnn(1, 3, width=2)
    return fed(teacher), student


def make_trainer(settings, preset=FERDConfig, seed=0, **changes) -> FERDTrainer:
    """Train the models above; a change that is no field of the config is an argument of the trainer."""
    parts = {k: changes.pop(k) for k in list(changes) if k not in FERDConfig.__slots__}
    return FERDTrainer(*make_models(), config=preset(**(settings | changes)), seed=seed, **parts)


class DoubleCNN(SmallCNN):
    """In float64 on float32 images, so that rounding neither hides an error nor turns a sign."""

    def forward(self, x):
        return super().forward(x.double())


class DoubleGenerator(Generator):
    """The same, from float32 codes to float32 images, unless these shall be of another dtype."""

    image_dtype = torch.float32

    def forward(self, latents, labels=None):
        return super().forward(latents.double(), labels).to(self.image_dtype)


def make_double_models(conditional: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A teacher, a student and a generator in float64."""
    torch.manual_seed(5)
    teacher, student = DoubleCNN(1, 3, width=4).double(), DoubleCNN(1, 3, width=2).double()
    fed(teacher)
    num_classes = 3 if conditional else None
    generator = DoubleGenerator((1, 8, 8), latent_dim=5, width=4, num_classes=num_classes)
    return teacher, student, generator.double()


class Recorder:
    """A source of given images, and a count of its epochs."""

    def __init__(self, batches: int) -> None:
        self.batches, self.metrics, self.done = batches, {"note": 1.0}, 0

    def epoch(self, student, class_probabilities):
        for _ in range(self.batches):
            yield torch.rand(6, 1, 8, 8), torch.arange(6) % 3
        self.done += 1

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


def same(one, other) -> bool:
    """Bit for bit, wherever tensors are in dicts and lists."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(9), other.nan_to_num(9))
    return one == other or (one != one and other != other)
