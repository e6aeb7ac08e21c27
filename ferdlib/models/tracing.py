"""Graph of all that `model(x)` does, from which fast copies and cuts are made."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ferdlib import _checks
from ferdlib._checks import InvalidValue
from ferdlib._modes import borrowed
from ferdlib.models.likeness import Draws, one_line


class NotCopyable(Exception):
    """A model of which no copy computes the same; the text goes on from "got a Model with"."""


class NotTraceable(NotCopyable):
    """A model whose graph would compute something else."""


def trace(model: nn.Module, *, whole: str = "") -> tuple[fx.Graph, dict[str, Any]]:
    """Trace a model in eval mode, and return the graph and the attributes that it names.

    Hooks of the model, a `forward` of the instance alone and wrappers are in it, because the model is called as
    its owner calls it. The model is left as it was.

    Args:
        model: traced itself: what its forward closes over belongs to it, and not to a copy.
        whole: name of a layer that stays one node, even if it is a container.

    Raises:
        NotCopyable: the graph would be incomplete, or torch.fx can make none.
    """
    check_copyable(model)
    for name, module in model.named_modules():
        # Legacy ones look for a tensor in a proxy for ever.
        if module._backward_hooks or module._backward_pre_hooks:
            raise NotTraceable(f"backward hooks{_where(name)}, which a trace leaves out")
    draws = Draws(model)
    tracer = _Tracer(model, whole)
    try:
        # In eval mode, because what a functional dropout reads from `training` is traced as a constant.
        with (
            _restored(model) as changed,
            borrowed(model, freeze=False),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            graph = tracer.trace(_Called(model))
    except NotTraceable:
        raise
    except Exception as error:  # whatever the model's own code makes of a proxy
        raise NotTraceable(f"{type(error).__name__} in torch.fx: {one_line(error)}") from error
    finally:
        drawn = draws.moved()
        draws.rewind()
    if drawn:
        raise NotTraceable("random numbers in its forward that a trace would make constants")
    attributes = {}
    for node in graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        found: Any = tracer.root
        for name in node.target.split("."):
            found = getattr(found, name)
        inner = node.target.removeprefix("model.")
        # A tensor that the forward makes, which is no attribute of the model and may not be taken for one.
        node.target = inner if inner != node.target else f"_traced{inner}"
        if isinstance(found, Tensor) and found.grad_fn is not None:
            raise NotTraceable("numbers made of weights that a trace would make constants")
        attributes[node.target] = found
        methods = [u for u in node.users if u.op == "call_method" and u.args[0] is node]
        written = any(str(user.target).endswith("_") for user in methods)
        if isinstance(found, Tensor) and (written or node.target in changed):
            raise NotTraceable(f"a forward that changes {node.target!r}, which it reads")
    return graph, attributes


class _Called(nn.Module):
    """The model from outside: torch.fx takes the class's forward of its root, and none of the root's hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    """Tracer through the modules of a user."""

    # Otherwise a number that a forward computes from a buffer becomes a constant.
    proxy_buffer_attributes = True

    # With defaults, because torch makes one anew where a graph is read from a file.
    def __init__(self, model: nn.Module | None = None, whole: str = "") -> None:
        super().__init__()
        self._model, self._whole = model, f"model.{whole}" if whole else None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name == self._whole:
            return True
        # What belongs to another module, a copy of the layer would share with it or copy along.
        hooks = (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        borrows = any(isinstance(getattr(hook, "__self__", None), nn.Module) for hook in hooks)
        inside = m is self._model or borrows or "forward" in vars(m)
        return not inside and super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        # Nodes hold no context: the graph would let gradients through, or compute in another dtype.
        if not torch.is_grad_enabled():
            raise NotTraceable("`torch.no_grad()` in its forward, which a trace leaves out")
        return super().create_node(*args, **kwargs)


def check_copyable(model: nn.Module) -> None:
    """Refuse modules that are no Python, or not complete yet."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise NotCopyable(f"TorchScript{_where(name)}, which cannot be looked into")
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(nn.parameter.is_lazy(each) for each in tensors):
            raise NotCopyable(f"lazy weights{_where(name)}, which a first batch gives their shape")


def check_layer(model: nn.Module, layer_name: Any) -> None:
    """Refuse a name that no layer of the model has."""
    _checks.instance(str, layer_name=layer_name)
    names = [name for name, _ in model.named_modules() if name]
    if layer_name not in names:
        came = f"{layer_name!r}; there are {', '.join(names[:20])}" + ", ..." * (len(names) > 20)
        raise InvalidValue(f"expected `layer_name` of the model, got {came}")


def _where(name: str) -> str:
    return f" in {name!r}" if name else ""


@contextmanager
def _restored(model: nn.Module) -> Iterator[set[str]]:
    """Give modules their attributes back: a forward that keeps its activations would keep a proxy.

    The names of tensors that came to be others are in the set on leaving.
    """
    kept, before, changed = [], _tensors(model), set[str]()
    for module in model.modules():
        attributes = dict(vars(module))
        filled = {k: copy.copy(v) for k, v in attributes.items() if type(v) in (dict, list)}
        kept.append((module, attributes, filled))
        # `module.compile()` puts a compiled call before the forward, which torch.fx cannot follow.
        vars(module).pop("_compiled_call_impl", None)
    try:
        yield changed
    finally:
        after = _tensors(model)
        changed |= {name for name, value in before.items() if after.get(name) is not value}
        for module, attributes, filled in kept:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in filled.items():
                now = attributes[name]
                now.clear()
                now.update(content) if isinstance(now, dict) else now.extend(content)


def _tensors(model: nn.Module) -> dict[str, Any]:
    """Weights, buffers and other attributes by name, those that are tensors."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, module in model.named_modules()
        for values in (vars(module), module._parameters, module._buffers)
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
