"""The one error format: ``function: expected `argument` ..., got ...; remedy``.

Wrong types and dtypes are ``TypeError``; wrong shapes, ranges, names, lengths and devices
``ValueError``.
"""

from __future__ import annotations

import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def got(value: Any) -> str:
    """What came, in a few words: a tensor by dtype and shape, anything else by type and value."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def tensor(function: str, argument: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: expected `{argument}` to be a torch.Tensor, got {got(value)}")
    return value


def floating(function: str, argument: str, value: object) -> Tensor:
    checked = tensor(function, argument, value)
    if not checked.is_floating_point():
        raise TypeError(
            f"{function}: expected `{argument}` in a floating-point dtype, got {got(value)}"
        )
    return checked


def images(
    function: str, value: object, *, argument: str = "x", bounds: tuple[float, float] | None = None
) -> Tensor:
    """A float batch `(N, C, H, W)`; with `bounds`, finite and inside them."""
    value = floating(function, argument, value)
    if value.ndim != 4:
        hint = f"; add a batch dimension with {argument}[None]" if value.ndim == 3 else ""
        raise ValueError(
            f"{function}: expected `{argument}` of shape (N, C, H, W), got {tuple(value.shape)}{hint}"
        )
    if bounds is not None and value.numel():
        low, high = bounds
        # One comparison answers both questions, because a NaN is inside no interval.
        if not bool(((value >= low) & (value <= high)).all()):
            if not bool(value.isfinite().all()):
                raise ValueError(f"{function}: expected finite `{argument}`, got NaN or infinity")
            raise ValueError(
                f"{function}: expected `{argument}` inside bounds [{low:g}, {high:g}], got values in "
                f"[{value.min():g}, {value.max():g}]; put normalisation inside the model "
                f"(ferdlib.models.Normalized)"
            )
    return value


def logits(function: str, value: object, *, argument: str = "logits") -> Tensor:
    """Float logits `(N, K)` with K >= 2, in float32 or wider."""
    value = floating(function, argument, value)
    if value.ndim != 2 or value.shape[1] < 2:
        raise ValueError(
            f"{function}: expected `{argument}` of shape (N, K) with K >= 2, got {tuple(value.shape)}"
        )
    return value.to(torch.promote_types(value.dtype, torch.float32))


def same_shape(function: str, **named: Tensor) -> None:
    (first, a), *others = named.items()
    for second, b in others:
        if a.shape != b.shape:
            raise ValueError(
                f"{function}: expected `{first}` and `{second}` of equal shape, got "
                f"{tuple(a.shape)} and {tuple(b.shape)}"
            )


def same_device(function: str, **named: Tensor) -> None:
    (first, a), *others = named.items()
    for second, b in others:
        if a.device != b.device:
            raise ValueError(
                f"{function}: expected `{first}` and `{second}` on one device, got {a.device} and "
                f"{b.device}"
            )


def alike(function: str, **named: Tensor) -> None:
    """Tensors of equal shape, on one device."""
    same_shape(function, **named)
    same_device(function, **named)


def labels(
    function: str,
    value: object,
    *,
    length: int | None = None,
    num_classes: int | None = None,
    device: torch.device | None = None,
    argument: str = "targets",
) -> Tensor:
    """Labels, int64 `(N,)`, in `0..num_classes-1`, on `device`.

    The range is read on the CPU only: on an accelerator that would stall the loop at every call,
    and the kernels that index by labels assert it themselves.
    """
    value = tensor(function, argument, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{function}: expected `{argument}` in int64, got {got(value)}")
    if value.ndim != 1 or (length is not None and value.shape[0] != length):
        wanted = "(N,)" if length is None else f"({length},)"
        raise ValueError(
            f"{function}: expected `{argument}` of shape {wanted}, got {tuple(value.shape)}"
        )
    if device is not None and value.device != device:
        raise ValueError(f"{function}: expected `{argument}` on {device}, got {value.device}")
    if num_classes is not None and value.numel() and value.device.type == "cpu":
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{function}: expected `{argument}` in 0..{num_classes - 1}, got values in {low}..{high}"
            )
    return value


def class_vector(function: str, value: object, *, argument: str) -> Tensor:
    """One finite float per class, `(K,)`; `nan` stands for a class without samples."""
    value = floating(function, argument, value)
    if value.ndim != 1 or value.shape[0] < 2:
        raise ValueError(
            f"{function}: expected `{argument}` of shape (K,) with K >= 2, got {tuple(value.shape)}"
        )
    if bool(value.isinf().any()):
        raise ValueError(
            f"{function}: expected finite `{argument}` (nan for an absent class), got inf"
        )
    return value


def number(
    function: str,
    argument: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> float:
    """A finite real number in `[low, high]`, or `(low, high]` with `open_low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{function}: expected `{argument}` to be a number, got {got(value)}")
    if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
        bracket = "(" if open_low or low == -math.inf else "["
        end = ")" if high == math.inf else "]"
        raise ValueError(
            f"{function}: expected `{argument}` in {bracket}{low:g}, {high:g}{end}, got {value!r}"
        )
    return float(value)


def integer(function: str, argument: str, value: Any, *, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{function}: expected `{argument}` to be an int, got {got(value)}")
    if value < low:
        raise ValueError(f"{function}: expected `{argument}` >= {low}, got {value}")
    return value


def pair(
    function: str, argument: str, value: Any, *, low: float = -math.inf
) -> tuple[float, float]:
    """Two numbers from `low` on, the second no smaller than the first."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(
            f"{function}: expected `{argument}` to be a pair (low, high), got {got(value)}"
        )
    if len(value) != 2:
        raise ValueError(
            f"{function}: expected `{argument}` to be a pair (low, high), got {got(value)}"
        )
    first, second = (
        number(function, f"{argument}[{i}]", each, low=low) for i, each in enumerate(value)
    )
    if first > second:
        raise ValueError(
            f"{function}: expected `{argument}` with low <= high, got ({first:g}, {second:g})"
        )
    return first, second


def choice(function: str, argument: str, value: Any, options: Sequence[Any]) -> None:
    listed = ", ".join(repr(option) for option in options)
    # The type first: a tensor in a list of options is no question with one answer.
    if not isinstance(value, tuple({type(option) for option in options})):
        raise TypeError(
            f"{function}: expected `{argument}` to be one of {listed}, got {got(value)}"
        )
    if value not in options:
        raise ValueError(f"{function}: expected `{argument}` to be one of {listed}, got {value!r}")


def callable_(function: str, argument: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{function}: expected `{argument}` to be callable, got {got(value)}")


def module(function: str, argument: str, value: Any) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"{function}: expected `{argument}` to be a torch.nn.Module, got {got(value)}"
        )
    return value


def strings(function: str, argument: str, value: Any, *, count: int | None = None) -> list[str]:
    sequence = isinstance(value, Sequence) and not isinstance(value, str)
    if not sequence or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{function}: expected `{argument}` as a list of strings, got {got(value)}")
    if count is not None and len(value) != count:
        raise ValueError(f"{function}: expected {count} `{argument}`, got {len(value)}")
    return list(value)


def path(function: str, argument: str, value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(
            f"{function}: expected `{argument}` to be a str or a Path, got {got(value)}"
        )
    return Path(value)


def device(function: str, value: Any) -> torch.device:
    try:
        return torch.device(value)
    except (TypeError, RuntimeError) as error:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(
            f"{function}: expected `device` to be a torch.device or its name, got {got(value)}"
        ) from error


def mapping(function: str, argument: str, value: Any, names: Iterable[str]) -> Mapping[str, Any]:
    """A mapping with these names and no others."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{function}: expected `{argument}` as a dict, got {got(value)}")
    missing, more = sorted(set(names) - set(value)), sorted(map(str, set(value) - set(names)))
    if missing or more:
        came = [f"none of {missing}"] * bool(missing) + [f"also {more}"] * bool(more)
        raise ValueError(
            f"{function}: expected `{argument}` with its own names, got {' and '.join(came)}"
        )
    return value


def state(function: str, value: Any, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved state with the names of one's own, whose tensors have their dtypes and shapes."""
    found = mapping(function, "state", value, own)
    differing = [
        key
        for key, mine in own.items()
        if isinstance(mine, Tensor) and got(found[key]) != got(mine)
    ]
    if differing:
        raise ValueError(
            f"{function}: expected `state` with the dtypes and shapes of one's own, got others for "
            f"{', '.join(differing)}"
        )
    return found


def settings(function: str, owner: Any, **limits: dict[str, Any]) -> None:
    """The fields of a dataclass as they are annotated: numbers, options, switches, words, modules, callables.

    Numbers are at least 0 unless their `limits`, keywords of `number` or `integer`, say otherwise.
    """
    hints = _hints(type(owner))
    for name in (field.name for field in fields(owner) if field.init):
        _setting(function, name, getattr(owner, name), hints[name], limits.get(name, {}))


def _hints(owner: type) -> dict[str, Any]:
    """The annotations of a class and its bases; those from outside the library are not ours to judge."""
    hints: dict[str, Any] = {}
    for kind in reversed(owner.__mro__):
        ours = kind.__module__.startswith("ferdlib.")
        own = inspect.get_annotations(kind, eval_str=ours)
        hints |= own if ours else dict.fromkeys(own)
    return hints


def _setting(function: str, name: str, value: Any, hint: Any, limits: dict[str, Any]) -> None:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kind, *others = typing.get_args(hint) if union else (hint,)
    if value is None and types.NoneType in others:
        return
    if typing.get_origin(kind) is typing.Literal:
        none = (None,) if types.NoneType in others else ()
        choice(function, name, value, (*typing.get_args(kind), *none))
    elif kind in (bool, str):
        if not isinstance(value, kind):
            expected = "a bool" if kind is bool else "a string"
            raise TypeError(f"{function}: expected `{name}` to be {expected}, got {got(value)}")
    elif kind is int:
        integer(function, name, value, **({"low": 0} | limits))
    elif kind is float:
        number(function, name, value, **({"low": 0.0} | limits))
    elif kind == tuple[float, float]:
        pair(function, name, value, low=0.0)
    elif kind == tuple[int, ...]:
        if not isinstance(value, (tuple, list)):
            raise TypeError(
                f"{function}: expected `{name}` to be a tuple of ints, got {got(value)}"
            )
        for i, each in enumerate(value):
            integer(function, f"{name}[{i}]", each, low=0)
    elif kind is nn.Module:
        module(function, name, value)
    elif name == "rng":
        generator(function, value)
    elif typing.get_origin(kind) is Callable:
        callable_(function, name, value)


def per_sample(
    function: str, argument: str, value: Any, x: Tensor, *, low: float = 0.0, open_low: bool = False
) -> float | Tensor:
    """A number, or one per sample `(N,)` returned as `(N, 1, ..., 1)` to broadcast against `x`."""
    if not isinstance(value, Tensor):
        return number(function, argument, value, low=low, open_low=open_low)
    floating(function, argument, value)
    if value.shape != x.shape[:1]:
        raise ValueError(
            f"{function}: expected `{argument}` to be a number or a tensor of shape "
            f"({x.shape[0]},), got shape {tuple(value.shape)}"
        )
    fine = value.isfinite() & ((value > low) if open_low else (value >= low))
    if not bool(fine.all()):
        relation = ">" if open_low else ">="
        raise ValueError(
            f"{function}: expected finite `{argument}` {relation} {low:g} for every sample, "
            f"got a minimum of {value.min():g}"
        )
    return value.detach().to(x).reshape(-1, *[1] * (x.ndim - 1))


def generator(function: str, value: Any) -> torch.Generator | None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            f"{function}: expected `rng` to be a torch.Generator or None, got {got(value)}"
        )
    return value
