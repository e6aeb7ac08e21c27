"""Files that the examples write and read: each whole or not at all, and weights only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


def write(content: Any, path: Path) -> None:
    """Whatever happens on the way, `path` holds the old content or the new."""
    partial_file = path.with_name(f"{path.name}.partial")
    torch.save(content, partial_file)
    os.replace(partial_file, path)


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
    write(content, path)


def read(path: Path, keys: set[str]) -> dict[str, Any]:
    """A checkpoint of the script that asks, which it knows by its keys; nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint to resume, got no file {str(path)!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"expected a complete checkpoint, got {str(path)!r}") from error
    if not isinstance(content, dict) or content.keys() != keys:
        raise ValueError(f"expected a checkpoint of this script, got {str(path)!r}")
    return content
