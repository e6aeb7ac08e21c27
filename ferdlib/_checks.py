"""The one error format: ``function: expected `argument` ..., got ...; remedy``.

Wrong types and dtypes are ``TypeError``; wrong shapes, ranges, names and lengths ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ferdlib._shard import Rng, Shard


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


def labels(
    function: str,
    value: object,
    *,
    length: int | None = None,
    num_classes: int | None = None,
    argument: str = "targets",
) -> Tensor:
    """Labels, int64 `(N,)`, in `0..num_classes-1`.

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


def choice(function: str, argument: str, value: Any, options: Sequence[Any]) -> None:
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{function}: expected `{argument}` to be one of {listed}, got {value!r}")


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


def generator(function: str, value: Any) -> Rng:
    if value is not None and not isinstance(value, (torch.Generator, Shard)):
        raise TypeError(
            f"{function}: expected `rng` to be a torch.Generator or None, got {got(value)}"
        )
    return value
