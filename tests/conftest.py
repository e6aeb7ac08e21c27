"""Fixtures of all tests: one thread for tiny tensors, and a small network with BatchNorm."""

import os

# Before torch is imported, and for the programs that tests start: workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import nn

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="card", help="for tests/test_card.py: a real one, such as cuda"
    )


def make_tiny_model(num_classes=4, in_channels=2, width=5, seed=0):
    """Conv, BatchNorm, ReLU, twice, and a linear layer, in eval mode; its running statistics matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(2),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(width, num_classes),
        )
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.05, 0.5)
                nn.init.normal_(module.bias, 0.3, 0.2)
        with torch.no_grad():  # centred and spread logits, so that images differ in their class
            z = model.eval()(torch.rand(64, in_channels, 6, 6))
            gain = 3 / z.std(dim=0)
            model[-1].bias.sub_(z.mean(dim=0)).mul_(gain)
            model[-1].weight.mul_(gain[:, None])
    return model


@pytest.fixture
def tiny_model():
    """The factory itself: `tiny_model(num_classes=3, in_channels=1)`."""
    return make_tiny_model
