"""Errors that name the public function once, and checks of plain values; needs no torch.

An error reads ``function: expected `argument` ..., got ...; remedy``. A check knows the argument, and
`public` puts the function before it. Checks take arguments by name: ``real(0, 1, alpha=alpha)``.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Float32 holds the square of a larger number no more, nor the product of two.
LARGEST = 1e15


class InvalidType(TypeError):
    """An argument of the wrong type or dtype."""


class InvalidValue(ValueError):
    """An argument of the wrong shape, range, name, length or device."""


class InvalidState(RuntimeError):
    """A call at the wrong moment, or a model whose numbers are not finite."""


class MissingFile(FileNotFoundError):
    """A path that leads to no file."""


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function or method: errors about its arguments start with its name.

    A method's errors start with the class of its instance, those of a constructor or a call with the class
    alone. A generator function runs after the call that is watched here: check before it, not in it.
    """

    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (InvalidType, InvalidValue, InvalidState, MissingFile) as error:
            # The plain error that it derives from, which the caller's `except` and tests name.
            plain: Any = type(error).__base__
            raise plain(f"{_name(function, args)}: {error}") from error.__cause__

    # A code object of its own: torch.compile keeps at most eight programs of one, whatever it calls.
    checked.__code__ = checked.__code__.replace(co_name=function.__name__)
    return functools.wraps(function)(checked)


def _name(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    owner, _, name = function.__qualname__.rpartition("<locals>.")[2].rpartition(".")
    if not owner:
        return name
    if args and any(kind.__name__ == owner for kind in type(args[0]).__mro__):
        owner = type(args[0]).__name__
    unnamed = name in ("__init__", "__post_init__", "__call__", "__getitem__", "forward")
    return owner if unnamed else f"{owner}.{name}"


def got(value: Any) -> str:
    """Describe a value in a few words: a tensor by dtype and shape, anything else by type and value."""
    if hasattr(value, "dtype") and hasattr(value, "shape") and hasattr(value, "requires_grad"):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def named(owner: object, *names: str) -> dict[str, Any]:
    """Attributes by name, as the checks take them: ``positive(**named(self, "lr", "eps"))``."""
    return {name: getattr(owner, name) for name in names}


def plain(value: Any) -> Any:
    """Python's own number for a NumPy scalar, or an array or tensor without dimensions; else the value itself."""
    # Their own first: torch.compile cannot look for attributes of a number that varies.
    if type(value) in (int, float):
        return value
    return value.item() if getattr(value, "ndim", None) == 0 else value


def settle(owner: Any) -> None:
    """Make the numbers in a dataclass, and in its tuples, Python's own: files hold no others."""
    for each in fields(owner):
        value = getattr(owner, each.name)
        own = tuple(map(plain, value)) if type(value) is tuple else plain(value)
        # The dataclass may be frozen.
        object.__setattr__(owner, each.name, own)


def real(low: float = -LARGEST, high: float = LARGEST, /, **named: Any) -> None:
    """Numbers in `[low, high]`."""
    for name, value in named.items():
        value = _number(name, value)
        # Comparisons, which torch.compile can follow where a number varies; it cannot `math.isfinite`.
        if not low <= value <= high:
            raise InvalidValue(f"expected `{name}` in {interval(low, high)}, got {value!r}")


def interval(low: float, high: float) -> str:
    """Write an interval, open where it is infinite."""
    left = f"({low:g}" if low == -math.inf else f"[{low:g}"
    right = f"{high:g})" if high == math.inf else f"{high:g}]"
    return f"{left}, {right}"


def shown(value: float, *limits: float) -> str:
    """Write a number with as many digits as tell it from these limits."""
    texts = (f"{value:.{digits}g}" for digits in range(6, 18))
    apart = (t for t in texts if all((float(t) == limit) == (value == limit) for limit in limits))
    return next(apart, repr(value))


def positive(**named: Any) -> None:
    """Numbers above 0."""
    for name, value in named.items():
        value = _number(name, value)
        if not 0 < value <= LARGEST:
            raise InvalidValue(f"expected `{name}` in (0, {LARGEST:g}], got {value!r}")


def divisor(**named: Any) -> None:
    """Numbers that float32 can divide by."""
    real(1 / LARGEST, **named)


def _number(name: str, value: Any) -> Any:
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise InvalidType(f"expected `{name}` to be a number, got {got(value)}")
    return number


def integer(low: int, /, **named: Any) -> None:
    """Integers from `low` on."""
    for name, value in named.items():
        number = plain(value)
        if isinstance(number, bool) or not isinstance(number, int):
            raise InvalidType(f"expected `{name}` to be an int, got {got(value)}")
        if number < low:
            raise InvalidValue(f"expected `{name}` >= {low}, got {value}")


def choice(options: Sequence[Any], /, **named: Any) -> None:
    """Values that are among the options."""
    listed = ", ".join(repr(option) for option in options)
    for name, value in named.items():
        # The type first: `tensor in options` would compare elementwise.
        if not isinstance(value, tuple({type(option) for option in options})):
            raise InvalidType(f"expected `{name}` to be one of {listed}, got {got(value)}")
        if value not in options:
            raise InvalidValue(f"expected `{name}` to be one of {listed}, got {value!r}")


def instance(kind: type, /, **named: Any) -> None:
    """Instances of a class; the error names it with its article."""
    article = "an" if kind.__name__[0] in "aeiouAEIOU" else "a"
    for name, value in named.items():
        if not isinstance(value, kind):
            wanted = f"{article} {kind.__name__}"
            raise InvalidType(f"expected `{name}` to be {wanted}, got {got(value)}")


def callable_(**named: Any) -> None:
    """Callables."""
    for name, value in named.items():
        if not callable(value):
            raise InvalidType(f"expected `{name}` to be callable, got {got(value)}")


def callable_or_none(**named: Any) -> None:
    """Callables, or None."""
    callable_(**{name: value for name, value in named.items() if value is not None})


def pair(low: float = -LARGEST, /, **named: Any) -> None:
    """Pairs of numbers from `low` on, the second no smaller than the first."""
    for name, value in named.items():
        sequence = isinstance(value, (tuple, list))
        if not sequence or len(value) != 2:
            kind = InvalidValue if sequence else InvalidType
            raise kind(f"expected `{name}` to be a pair (low, high), got {got(value)}")
        real(low, **{f"{name}[0]": value[0], f"{name}[1]": value[1]})
        if value[0] > value[1]:
            raise InvalidValue(f"expected `{name}` with low <= high, got {got(value)}")


def strings(count: int | None = None, /, **named: Any) -> None:
    """Lists of strings, of `count` if it is given."""
    for name, value in named.items():
        # An array of strings is no Sequence.
        sequence = isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1
        sequence = sequence and not isinstance(value, str)
        if not sequence or not all(isinstance(each, str) for each in value):
            raise InvalidType(f"expected `{name}` as a list of strings, got {got(value)}")
        if count is not None and len(value) != count:
            raise InvalidValue(f"expected {count} `{name}`, got {len(value)}")


def path(name: str, value: Any) -> Path:
    """Return a path made of a str or a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise InvalidType(f"expected `{name}` to be a str or a Path, got {got(value)}")
    return Path(value)


def file(name: str, value: Any) -> Path:
    """Return the path of a file that is there."""
    found = path(name, value)
    if not found.is_file():
        raise MissingFile(f"expected `{name}` to be a file, got {str(found)!r}")
    return found


def keys(names: Iterable[str], /, **named: Any) -> None:
    """Mappings with exactly these keys."""
    wanted = set(names)
    for name, value in named.items():
        if not isinstance(value, Mapping):
            raise InvalidType(f"expected `{name}` as a dict, got {got(value)}")
        missing, more = sorted(wanted - set(value)), sorted(map(str, set(value) - wanted))
        if missing or more:
            came = [f"none of {missing}"] * bool(missing) + [f"also {more}"] * bool(more)
            raise InvalidValue(f"expected `{name}` with its own names, got {' and '.join(came)}")
