"""Borrow a model and give it back as it was: per-module train/eval flags and `requires_grad`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def borrowed(*models: object, training: bool | None = False, freeze: bool = True) -> Iterator[None]:
    """Run the block with every `nn.Module` of `models` in eval mode and without weight gradients.

    On leaving, by an exception too, each module's own `training` flag and each parameter's own
    `requires_grad` are what they were; a root `.train()` would flip deliberately frozen layers.

    Args:
        *models: modules; other callables carry no state that could be set, and are left alone.
        training: False for eval mode, True for train mode, None to leave the flags as they are.
        freeze: stop parameters from requiring gradients inside the block.
    """
    # One by one: `model.train()` reaches into children, and a subclass may have made it do something else.
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    parameters = [p for m in modules for p in m.parameters(recurse=False)] if freeze else []
    flags = [(m, m.training) for m in modules]
    wanted = [(p, p.requires_grad) for p in parameters]
    try:
        if training is not None:
            for module in modules:
                module.training = training
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
