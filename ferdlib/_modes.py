"""Borrow a model and give it back as it was; ask it for logits without a trace in the images.

The one place that knows what a model may be: a module, a callable around some, one that returns its logits
inside a larger output, one that writes to its input.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# The thread that has borrowed a module, by the module's id, for as long as it has it.
_BORROWERS: dict[int, int] = {}
_RETURNED = threading.Condition()


@contextmanager
def borrowed(*models: object, training: bool | None = False, freeze: bool = True) -> Iterator[None]:
    """Run the block with every module behind `models` in eval mode and without weight gradients.

    On leaving, by an exception too, each module's own `training` flag and each parameter's own
    `requires_grad` are what they were; a root `.train()` would flip deliberately frozen layers. Another
    thread that wants one of the modules waits until then: it would take these flags for the model's own.

    Args:
        *models: modules, and callables around them; what is neither is left alone.
        training: False for eval mode, True for train mode (a module that trains already keeps the flags
            of its parts, so that layers frozen by its owner stay frozen), None to leave the flags as they are.
        freeze: stop parameters from requiring gradients inside the block.
    """
    roots = modules_behind(*models)
    # One by one: `model.train()` reaches into children, and a subclass may have made it do something else.
    modules = list({id(m): m for root in roots for m in root.modules()}.values())
    with _alone(modules):
        # A frozen ScriptModule has no such flag.
        flags = [(m, m.training) for m in modules if hasattr(m, "training")]
        parameters = [p for m in modules for p in m.parameters(recurse=False)]
        wanted = [(p, p.requires_grad) for p in parameters]
        trains = [r for r in roots if training and getattr(r, "training", True)]
        keeps = {id(m) for root in trains for m in root.modules()}
        try:
            if training is not None:
                for module, _ in flags:
                    module.training = module.training if id(module) in keeps else training
            for parameter in parameters if freeze else ():
                parameter.requires_grad_(False)
            yield
        finally:
            for module, flag in flags:
                module.training = flag
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)


@contextmanager
def lent(*models: object) -> Iterator[None]:
    """Lend models to code of others: modes, `requires_grad`, gradients and buffers come back as they were.

    Inside the block they are as they came, but for weight gradients, which are put aside. Autograd is on.
    """
    roots = modules_behind(*models)
    with borrowed(*roots, training=None, freeze=False), torch.enable_grad():
        gradients = [(p, p.grad) for root in roots for p in root.parameters()]
        # BatchNorm writes to its statistics without a new version: only a stand-in keeps them safe.
        buffers = [
            (module, name, buffer)
            for root in roots
            for module in root.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if not is_lazy(buffer)
        ]
        for parameter, _ in gradients:
            parameter.grad = None
        for module, name, buffer in buffers:
            setattr(module, name, buffer.clone())
        try:
            yield
        finally:
            for module, name, buffer in buffers:
                setattr(module, name, buffer)
            for parameter, gradient in gradients:
                parameter.grad = gradient


def modules_behind(*models: object) -> list[nn.Module]:
    """Modules that run when `models` are called, outermost first, as far as Python shows them.

    A module; the object of a bound method; the parts of a `functools.partial`; what an object with
    `__call__` holds; the variables that a function reads, and their attributes that it names.
    """
    found: dict[int, nn.Module] = {}
    left, seen = list(models), dict[int, object]()
    while left:
        each = left.pop(0)
        if id(each) in seen or isinstance(each, type):
            continue
        seen[id(each)] = each
        if isinstance(each, nn.Module):
            found[id(each)] = each
        elif isinstance(each, functools.partial):
            left += [each.func, *each.args, *each.keywords.values()]
        elif isinstance(each, MethodType):
            left += [each.__self__, each.__func__, *_attributes(each.__self__)]
        elif isinstance(each, FunctionType):
            left += _read_by(each)
        elif isinstance(each, (list, tuple)) and each and isinstance(each[0], nn.Module):
            left += each
        elif callable(each):
            left += _attributes(each)
    return list(found.values())


def logits_of(output: Any) -> Any:
    """Logits in a model's output: its `logits`, where it has some as in transformers, else the output itself."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict) and "logits" in output:
        return output["logits"]
    return getattr(output, "logits", output)


def ask(model: Any, x: Tensor) -> Any:
    """Logits of a model for a copy of the images: it may write to its input."""
    return logits_of(model(x.clone()))


@contextmanager
def _alone(modules: list[nn.Module]) -> Iterator[None]:
    """Wait until no other thread has borrowed one of these modules, and keep them for this one."""
    me, keys = threading.get_ident(), [id(m) for m in modules]
    with _RETURNED:
        # All at once: threads that each held what the other one wants would wait for ever.
        _RETURNED.wait_for(lambda: all(_BORROWERS.get(key, me) == me for key in keys))
        taken = [key for key in keys if key not in _BORROWERS]
        _BORROWERS.update(dict.fromkeys(taken, me))
    try:
        yield
    finally:
        with _RETURNED:
            for key in taken:
                del _BORROWERS[key]
            _RETURNED.notify_all()


def _attributes(owner: object) -> list[object]:
    return list(getattr(owner, "__dict__", {}).values())


def _read_by(function: FunctionType) -> list[object]:
    """Variables that a function reads, and modules among their attributes that it names."""
    names, known = function.__code__.co_names, function.__globals__
    # A cell is empty until its variable is set.
    read = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    read += function.__defaults__ or ()
    for value in (known[name] for name in names if name in known):
        # Functions of other files lead away from the model, into whole libraries.
        if not isinstance(value, FunctionType) or value.__globals__ is known:
            read.append(value)
    attributes = [getattr(each, "__dict__", {}).get(name) for each in read for name in names]
    return read + [value for value in attributes if isinstance(value, nn.Module)]
