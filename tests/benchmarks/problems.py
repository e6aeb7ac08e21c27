"""Digits, and models trained on them in a minute: competitors whose time depends on the data need real ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

Data = tuple[Tensor, Tensor]

BATCH_SIZE = 32


def digits(seed: int, device: str) -> tuple[Data, Data]:
    """1,257 digits to train on and 540 held out, `(N, 1, 8, 8)` in [0, 1]."""
    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32, device=device)[:, None] / 16
    y = torch.tensor(bunch.target, device=device)
    train, test = train_test_split(
        range(len(y)), test_size=540, random_state=seed, stratify=bunch.target
    )
    return (x[train], y[train]), (x[test], y[test])


def train(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    rng: torch.Generator,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
) -> nn.Module:
    """The model after SGD on the images, or on what `attack(model, x, y)` makes of them; in eval mode."""
    x, y = data
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    updates = epochs * len(x.split(BATCH_SIZE))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=updates)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=rng, device=rng.device)
        for index in order.split(BATCH_SIZE):
            images, labels = x[index], y[index]
            if attack is not None:
                images = attack(model, images, labels)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
