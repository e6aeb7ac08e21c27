"""Weights that the examples write: each file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn


def write_model(
    model: nn.Module, path: Path, *, architecture: str, num_classes: int, in_channels: int
) -> None:
    """The weights and what they are of, as `ferdlib.models.load_checkpoint` reads them."""
    content = {
        "architecture": architecture,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "state_dict": model.state_dict(),
    }
    partial_file = path.with_name(f"{path.name}.partial")
    try:
        torch.save(content, partial_file)
        os.replace(partial_file, path)
    finally:
        partial_file.unlink(missing_ok=True)
