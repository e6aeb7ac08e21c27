"""Checks of tensors and modules; those of plain values, and `public`, come from `_arguments`.

Errors name the argument here; `public` puts the function's name before them. Values are read on the host
only where it says so, and never inside a graph that `torch.compile` captures.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# The rooms know one module of checks, so this one passes on those of plain values.
from ferdlib._arguments import *  # noqa: F403
from ferdlib._arguments import (
    LARGEST,
    InvalidType,
    InvalidValue,
    divisor,
    got,
    interval,
    keys,
    plain,
    real,
    shown,
)
from ferdlib._modes import logits_of

WIDE = (torch.float32, torch.float64)
# Keys of a batch that is a mapping: transformers' and torchvision's, then what people write.
IMAGES = ("pixel_values", "images", "image", "img", "x")
LABELS = ("labels", "label", "targets", "target", "y")


def has_float64(device: torch.device) -> bool:
    """True of devices that are known to have float64; Apple's GPUs have none."""
    return device.type in ("cpu", "cuda", "xpu", "xla")


def readable(value: Tensor) -> bool:
    """True where a look at the values costs nothing: on an accelerator it would stall every step."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def marked(value: Tensor, fine: Tensor) -> Tensor:
    """The values, NaN where they are not fine: what nobody looked at must not pass in silence."""
    return torch.where(fine, value, torch.nan)


def double(value: Tensor, device: torch.device | None = None) -> Tensor:
    """The values in float64, or in float32 on a device that has no wider dtype; moved to `device`."""
    device = value.device if device is None else device
    # Converted where both dtypes are: Apple's GPUs cannot even be sent float64.
    return value.to(device).double() if has_float64(device) else value.float().to(device)


def tensor(**named: Any) -> None:
    """Tensors of any kind."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise InvalidType(f"expected `{name}` to be a torch.Tensor, got {got(value)}")


def floating(**named: Any) -> None:
    """Tensors of a floating-point dtype."""
    tensor(**named)
    for name, value in named.items():
        if not value.is_floating_point():
            raise InvalidType(f"expected `{name}` in a floating-point dtype, got {got(value)}")


def images(bounds: tuple[float, float] | None = None, /, **named: Any) -> None:
    """Float batches `(N, C, H, W)`; with `bounds`, finite and inside them, which the host reads."""
    floating(**named)
    for name, value in named.items():
        if value.ndim != 4:
            hint = f"; add a batch dimension with {name}[None]" if value.ndim == 3 else ""
            came = f"{tuple(value.shape)}{hint}"
            raise InvalidValue(f"expected `{name}` of shape (N, C, H, W), got {came}")
        if bounds is None or torch.compiler.is_compiling():
            continue
        low, high = bounds
        # One comparison answers both questions, because a NaN is inside no interval.
        if not bool(((value >= low) & (value <= high)).all()):
            if not bool(value.isfinite().all()):
                raise InvalidValue(f"expected finite `{name}`, got NaN or infinity")
            raise InvalidValue(f"expected `{name}` {outside(value, low, high)}")


def outside(value: Tensor, low: float, high: float) -> str:
    """Say that images leave the bounds, by how much, and what to do."""
    least, most = float(value.min()), float(value.max())
    came = f"values from {shown(least, low)} to {shown(most, high)}"
    # Rounding alone, as of a resized image, is not a missing normalisation.
    slight = min(least - low, high - most) > -1e-3 * (high - low)
    remedy = "put normalisation inside the model (ferdlib.models.Normalized)"
    remedy = f"clamp them to ({low:g}, {high:g})" if slight else remedy
    return f"inside bounds {low:g} to {high:g}, got {came}; {remedy}"


def batch(**named: Any) -> tuple[Tensor, Tensor]:
    """Return images and labels of a batch: a pair, or a mapping with their usual names."""
    ((name, value),) = named.items()
    came: Any = value
    if isinstance(value, Mapping):
        came = f"a mapping with {', '.join(map(str, value))}"
        known = [[key for key in usual if key in value] for usual in (IMAGES, LABELS)]
        value = [value[found[0]] for found in known if found]
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        # Only now: writing tensors out makes an accelerator wait.
        came = came if isinstance(came, str) else got(came)
        wanted = f"pairs of images and labels, or mappings with {IMAGES[0]} and {LABELS[0]}"
        raise InvalidType(f"expected batches of `{name}` to be {wanted}, got {came}")
    tensor(**{name: value[0], f"labels of {name}": value[1]})
    return value[0], value[1]


def logits(**named: Any) -> tuple[Tensor, ...]:
    """Float logits `(N, K)` with K >= 2, of one shape and device; returned in float32 or wider.

    A model's output with `logits` inside stands for them.
    """
    named = {name: logits_of(value) for name, value in named.items()}
    floating(**named)
    for name, value in named.items():
        if value.ndim != 2 or value.shape[1] < 2:
            shape = tuple(value.shape)
            raise InvalidValue(f"expected `{name}` of shape (N, K) with K >= 2, got {shape}")
    alike(**named)
    return tuple([z if z.dtype in WIDE else z.float() for z in named.values()])


def alike(**named: Tensor) -> None:
    """Tensors of one shape, on one device."""
    (first, a), *others = named.items()
    for second, b in others:
        if a.shape != b.shape:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise InvalidValue(f"expected `{first}` and `{second}` of equal shape, got {shapes}")
    one_device(**named)


def one_device(**named: Tensor) -> None:
    """Tensors on one device."""
    (first, a), *others = named.items()
    for second, b in others:
        if a.device != b.device:
            devices = f"{a.device} and {b.device}"
            raise InvalidValue(f"expected `{first}` and `{second}` on one device, got {devices}")


def labels(*, num_classes: int | None = None, like: Tensor | None = None, **named: Any) -> None:
    """Labels, int64 `(N,)`, in `0..num_classes-1`, as many as rows of `like` and on its device.

    The range is read on the CPU only: on an accelerator that would stall the loop at every call, and the
    kernels that index by labels assert it themselves.
    """
    tensor(**named)
    for name, value in named.items():
        if value.dtype != torch.int64:
            raise InvalidType(f"expected `{name}` in int64, got {got(value)}")
        if value.ndim != 1 or (like is not None and value.shape[0] != like.shape[0]):
            wanted = "(N,)" if like is None or not like.ndim else f"({like.shape[0]},)"
            raise InvalidValue(f"expected `{name}` of shape {wanted}, got {tuple(value.shape)}")
        if like is not None and value.device != like.device:
            raise InvalidValue(f"expected `{name}` on {like.device}, got {value.device}")
        if num_classes is not None and value.numel() and readable(value):
            (low, high), last = map(int, value.aminmax()), num_classes - 1
            if low < 0 or high > last:
                raise InvalidValue(f"expected `{name}` in 0..{last}, got values in {low}..{high}")


def scalar(**named: Any) -> None:
    """Floats without dimensions."""
    floating(**named)
    for name, value in named.items():
        if value.ndim != 0:
            raise InvalidValue(f"expected scalar `{name}`, got shape {tuple(value.shape)}")


def class_vector(
    low: float = -LARGEST,
    high: float = LARGEST,
    /,
    *,
    num_classes: int | None = None,
    batched: bool = False,
    **named: Any,
) -> None:
    """Floats `(K,)`, K >= 2, one per class, finite and in `[low, high]`; `nan` for a class without samples.

    With `num_classes`, of that length; with `batched`, `(..., K)`.
    """
    floating(**named)
    for name, value in named.items():
        shape, wanted = tuple(value.shape), "(..., K)" if batched else "(K,)"
        if not shape or shape[-1] < 2 or (len(shape) > 1 and not batched):
            raise InvalidValue(f"expected `{name}` of shape {wanted} with K >= 2, got {shape}")
        if num_classes is not None and shape[-1] != num_classes:
            raise InvalidValue(f"expected `{name}` of shape ({num_classes},), got {shape}")
        # The host reads one flag; only an error looks for more.
        if bool((value.isnan() | value.isfinite() & (value >= low) & (value <= high)).all()):
            continue
        if bool(value.isinf().any()):
            raise InvalidValue(f"expected finite `{name}` (nan for an absent class), got inf")
        first = float(value[(value < low) | (value > high)][0])
        hint = "; divide percentages by 100" if high == 1 and first > 1.01 else ""
        wanted = f"from {low:g} to {high:g} (or nan)"
        raise InvalidValue(f"expected `{name}` {wanted}, got {shown(first, low, high)}{hint}")


def confusion(*, batched: bool = False, **named: Any) -> None:
    """Counts, int64 `(K, K)` with K >= 2 and none below 0; with `batched`, `(..., K, K)`."""
    tensor(**named)
    for name, value in named.items():
        if value.dtype != torch.int64:
            raise InvalidType(f"expected `{name}` as int64 counts, got {got(value)}")
        shape, wanted = tuple(value.shape), "(..., K, K)" if batched else "(K, K)"
        square = len(shape) >= 2 and shape[-1] == shape[-2] >= 2
        if not square or (len(shape) > 2 and not batched):
            raise InvalidValue(f"expected `{name}` of shape {wanted} with K >= 2, got {shape}")
        if bool((value < 0).any()):
            raise InvalidValue(f"expected counts >= 0 in `{name}`, got {int(value.min())}")


def per_sample(name: str, value: Any, x: Tensor, *, above_zero: bool = False) -> float | Tensor:
    """Return a number >= 0 (or > 0), or one per sample `(N,)` as `(N, 1, ..., 1)` to broadcast against `x`.

    On an accelerator values out of range are not looked for, but become NaN.
    """
    value = plain(value)
    if not isinstance(value, Tensor):
        check = divisor if above_zero else partial(real, 0)
        check(**{name: value})
        return float(value)
    floating(**{name: value})
    if value.shape != x.shape[:1]:
        wanted = f"to be a number or a tensor of shape ({len(x)},)"
        raise InvalidValue(f"expected `{name}` {wanted}, got shape {tuple(value.shape)}")
    low = 1 / LARGEST if above_zero else 0.0
    fine = (value >= low) & (value <= LARGEST)
    if readable(value) and not bool(fine.all()):
        came, wanted = f"{value[~fine][0]:g}", interval(low, LARGEST)
        raise InvalidValue(f"expected `{name}` in {wanted} for every sample, got {came}")
    return marked(value.detach(), fine).to(x).reshape(-1, *[1] * (x.ndim - 1))


def module(**named: Any) -> None:
    """Modules of torch."""
    for name, value in named.items():
        if not isinstance(value, nn.Module):
            raise InvalidType(f"expected `{name}` to be a torch.nn.Module, got {got(value)}")


def generator(rng: Any) -> None:
    """A random generator, or None for torch's default one."""
    if rng is not None and not isinstance(rng, torch.Generator):
        raise InvalidType(f"expected `rng` to be a torch.Generator or None, got {got(rng)}")


def device(value: Any) -> torch.device:
    """Return a device or the one of that name."""
    try:
        return torch.device(value)
    except (TypeError, RuntimeError) as error:
        kind, came = InvalidValue if isinstance(value, str) else InvalidType, got(value)
        raise kind(f"expected `device` to be a torch.device or its name, got {came}") from error


def state(value: Any, own: Mapping[str, Any]) -> None:
    """A saved state with the keys of one's own, whose tensors have their dtypes and shapes."""
    keys(own, state=value)
    tensors = [name for name, mine in own.items() if isinstance(mine, Tensor)]
    others = ", ".join(name for name in tensors if got(value[name]) != got(own[name]))
    if others:
        wanted = "with the dtypes and shapes of one's own"
        raise InvalidValue(f"expected `state` {wanted}, got others for {others}")
