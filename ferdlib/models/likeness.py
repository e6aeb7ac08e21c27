"""Comparison of a copy with its model: the numbers that both return, what they draw, what the model is made of."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy import random as numpy_random
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.utils import _pytree as pytree

from ferdlib._modes import borrowed

# Images that a copy is compared on: both ways, through both networks, they cost less than a batch once.
PROBE = 2
# Functions that read and set the state of a random generator.
_State = tuple[Callable[[], Any], Callable[[Any], Any]]


def difference(
    model: nn.Module,
    network: Callable[[Tensor], Any],
    x: Tensor,
    memory_format: torch.memory_format,
) -> str | None:
    """Say what a copy has that its model has not, on a few real images, or None if there is nothing.

    Both run once, forward and backward, in eval mode and from the same random numbers; the host reads once.
    """
    if x.is_meta or not len(x):
        return None
    draws = Draws(model)
    try:
        with borrowed(model), torch.inference_mode(False), torch.enable_grad():
            images = _untied(x.detach()[:PROBE])
            theirs, expected = _answers(model, images)
            drawn = draws.marks()
            draws.rewind()
            try:
                ours, found = _answers(network, images.to(memory_format=memory_format))
            except Exception as error:  # what runs for the model must run for its copy
                return f"a {type(error).__name__}: {one_line(error)}"
            if draws.marks() != drawn:
                return "other random numbers"
    finally:
        draws.rewind()
    shapes = [each.shape for each in expected], [each.shape for each in found]
    if theirs != ours or shapes[0] != shapes[1]:
        return "another kind of output"
    # One read for all, because an accelerator waits for it.
    apart = torch.stack([_apart(*pair) for pair in zip(found, expected, strict=True)]).tolist()
    logits, gradient = max(apart[:-1], default=0.0), apart[-1]
    if not logits <= _tolerance(expected[0]):
        return f"logits off by {logits:.2g} of their size"
    # Fewer digits: one activation that rounding turns on or off moves a gradient, and no logit.
    if not gradient <= 0.1:
        return f"gradients off by {gradient:.2g} of their size"
    return None


def one_line(error: object, limit: int = 160) -> str:
    """Shorten another library's message."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _untied(x: Tensor) -> Tensor:
    """Images without equal neighbours, between which a maximum would choose by rounding."""
    ramp = torch.arange(x[0].numel(), device=x.device).mul(0.618034).frac().reshape(x.shape[1:])
    return x + 1e-3 * ramp.to(x)


def _answers(network: Callable[[Tensor], Any], images: Tensor) -> tuple[Any, list[Tensor]]:
    """Structure of an output, and its tensors followed by the gradient of the images."""
    images = images.clone().requires_grad_()
    kind = images.device.type
    with torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext():
        # A copy, because a forward may write to its input.
        leaves, structure = pytree.tree_flatten(network(images.clone()))
    tensors = [each for each in leaves if isinstance(each, Tensor)]
    others = [each for each in leaves if not isinstance(each, Tensor)]
    weighted = []
    for each in tensors:
        if each.requires_grad and each.ndim:
            # Logits weigh unequally: a softmax always sums to 1.
            ramp = torch.linspace(1, 2, each[0].numel(), device=each.device).to(each)
            weighted.append((each * ramp.reshape(each.shape[1:])).sum().to(images.dtype))
    gradient = images.new_zeros(images.shape)
    if weighted:
        total = torch.stack(weighted).sum()
        (gradient,) = torch.autograd.grad(total, images, allow_unused=True, materialize_grads=True)
    kinds = [(each.dtype, each.requires_grad) for each in tensors]
    return (structure, others, kinds), [*(each.detach() for each in tensors), gradient]


def _apart(found: Tensor, expected: Tensor) -> Tensor:
    """Size of a difference relative to what was expected; NaN and infinity are equal to themselves."""
    same = (found == expected) | (found.isnan() & expected.isnan())
    wide = torch.promote_types(expected.dtype, torch.float32)
    found, expected = found.to(wide), expected.to(wide)
    distance = torch.where(same, 0, found - expected).norm()
    size = torch.where(expected.isfinite(), expected, 0).norm()
    return torch.where(distance == 0, 0, distance / size)


def _tolerance(logits: Tensor) -> float:
    """Relative difference that rounding can make: more digits are lost in TF32, and in half precision."""
    exact = logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64)
    return 1e-3 if exact else 5e-2


class Draws:
    """The random generators that a forward can draw from, as they were."""

    def __init__(self, model: nn.Module) -> None:
        states: list[_State] = [
            (torch.get_rng_state, torch.set_rng_state),
            (random.getstate, random.setstate),
            (numpy_random.get_state, numpy_random.set_state),
        ]
        for device in {p.device for p in model.parameters() if p.device.type == "cuda"}:
            read = partial(torch.cuda.get_rng_state, device)
            states.append((read, partial(torch.cuda.set_rng_state, device=device)))
        for module in model.modules():
            for value in vars(module).values():
                if isinstance(value, torch.Generator):
                    states.append((value.get_state, value.set_state))
                elif isinstance(value, random.Random):
                    states.append((value.getstate, value.setstate))
                elif isinstance(value, numpy_random.Generator):
                    bits: Any = value.bit_generator
                    states.append(
                        (partial(getattr, bits, "state"), partial(setattr, bits, "state"))
                    )
        self._states = states
        self._first = [read() for read, _ in states]
        self._marks = self.marks()

    def marks(self) -> list[bytes]:
        """The states now, to be compared."""
        return [_mark(read()) for read, _ in self._states]

    def moved(self) -> bool:
        """True if something has been drawn."""
        return self.marks() != self._marks

    def rewind(self) -> None:
        """Give the generators their states back."""
        for (_, write), state in zip(self._states, self._first, strict=True):
            write(state)


def _mark(state: Any) -> bytes:
    return state.cpu().numpy().tobytes() if isinstance(state, Tensor) else pickle.dumps(state)


class PlainState:
    """Everything but weights and buffers that a model's forward may read: numbers, hooks, kinds of layers.

    Compared without a look at a tensor's values, so that no accelerator waits. A copy of it is equal to none.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        modules = [] if model is None else list(model.named_modules(remove_duplicate=False))
        self._values = [(name, type(m), _attributes(m)) for name, m in modules]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PlainState) and bool(self._values) and self._values == other._values
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[PlainState], tuple[()]]:
        return PlainState, ()


class _Same:
    """A value that is equal to itself alone; it is kept, so that no other one takes its place in memory."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


_HOOKS = frozenset(
    {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
)
_NO_STATE = frozenset(vars(nn.Module())) - _HOOKS


# Values that are what they seem, and nearly all there are: looked through at every step of a training.
_NUMBERS = frozenset({type(None), bool, int, float, str})


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    found = []
    for name, value in vars(module).items():
        if name in _NO_STATE:
            continue
        if type(value) not in _NUMBERS:
            if name in _HOOKS:
                if not value:
                    continue
                # Their keys count all hooks of the process.
                value = list(value.values())
            # Hook-based weight_norm, spectral_norm and pruning make a weight anew at every forward.
            elif isinstance(value, Tensor) and module._forward_pre_hooks:
                continue
            value = _plain(value, 3)
        found.append((name, value))
    return found


def _plain(value: Any, depth: int) -> Any:
    """Turn an attribute into something that can be compared, `depth` objects deep."""
    if isinstance(value, tuple) and all(type(each) in _NUMBERS for each in value):
        return value
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    if isinstance(value, Tensor):
        return _Same(value), 0 if value.is_inference() else value._version
    if isinstance(value, (np.ndarray, np.generic)):
        return str(value.dtype), value.shape, value.tobytes()
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        return type(value), [_plain(each, depth - 1) for each in value]
    if depth and isinstance(value, dict):
        return type(value), [(_plain(k, 0), _plain(v, depth - 1)) for k, v in value.items()]
    # An object that is no function, such as a config, is what its attributes are.
    inner = getattr(value, "__dict__", None)
    if not depth or not isinstance(inner, dict) or isinstance(value, nn.Module):
        return _Same(value)
    identity = _Same(value) if callable(value) else type(value)
    return identity, [(k, _plain(v, depth - 1)) for k, v in inner.items()]
