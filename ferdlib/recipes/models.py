"""Models from files with weights, from RobustBench, or from a function of the user."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ferdlib.checkpoints import write_file
from ferdlib.distributed import first_ahead
from ferdlib.models import Normalized, load_checkpoint, load_robustbench
from ferdlib.models.checkpoint import PUBLISHED

Model = Callable[[Tensor], Tensor]


def write_model(
    model: nn.Module, path: Path, *, architecture: str, num_classes: int, in_channels: int
) -> None:
    """Write the weights and what they belong to, as `ferdlib.models.load_checkpoint` reads them."""
    content = {
        "architecture": architecture,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "state_dict": model.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda file: torch.save(content, file))


def read_model(
    path: Path, *, architecture: str | None, num_classes: int, in_channels: int
) -> nn.Module:
    """Load a model; its architecture is given, said by the file, or known by the file's name."""
    if architecture is not None:
        return load_checkpoint(
            path, architecture=architecture, num_classes=num_classes, in_channels=in_channels
        )
    if path.stem in PUBLISHED:
        return load_robustbench(path, num_classes=num_classes)
    # A file that says its architecture says the numbers, too.
    return load_checkpoint(path)


def robustbench_file(name: str, data: str, *, download: bool) -> Path:
    """Find the file of one of RobustBench's models, after RobustBench has fetched it if that was asked for."""
    path = Path("models", data, "Linf", f"{name}.pt")
    with first_ahead(download):
        if not download or path.is_file():
            return path
        import pyautoattack

        # The name under which RobustBench asks for it.
        sys.modules.setdefault("autoattack", pyautoattack)
        try:
            from robustbench.utils import load_model
        except ImportError as error:
            raise ValueError(
                f'expected RobustBench to fetch {name}, got {error}; pip install "ferdlib[robustbench]"'
            ) from error
        load_model(name, dataset=data, threat_model="Linf")
    return path


def made_by(factory: str) -> Any:
    """Call "package.module:function", imported from the current directory or the path, for a model."""
    module, _, function = factory.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)()
    # Somebody else's code raises whatever it likes.
    except Exception as error:
        raise ValueError(
            f"expected --factory package.module:function to return a model, got {factory!r} with "
            f"{type(error).__name__}: {error}"
        ) from error


def normalized(
    model: Any, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, *, prefix: str = ""
) -> Any:
    """Wrap the model for images in [0, 1], if the options `--mean` and `--std` are given."""
    if (mean is None) != (std is None):
        raise ValueError(f"expected --{prefix}mean and --{prefix}std together, got one of them")
    # A checkpoint with a mean and a standard deviation of its own comes with them.
    if mean is not None and isinstance(model, Normalized):
        raise ValueError(
            f"expected no --{prefix}mean and --{prefix}std, because the model normalises its images itself, "
            f"got {mean} and {std}"
        )
    return model if mean is None or std is None else Normalized(model, mean, std)


def check_model(model: Any, x: Tensor, num_classes: int) -> None:
    """Try the model on images."""
    try:
        with torch.no_grad():
            shape = tuple(model(x).shape)
    # Somebody else's code raises whatever it likes.
    except Exception as error:
        raise ValueError(
            f"expected a model for images {tuple(x.shape)}, got {type(error).__name__}: {error}"
        ) from error
    if shape != (len(x), num_classes):
        raise ValueError(
            f"expected a model for {num_classes} classes, from images {tuple(x.shape)} to logits "
            f"{(len(x), num_classes)}, got logits {shape}"
        )
