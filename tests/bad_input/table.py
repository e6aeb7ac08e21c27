"""The table of bad input: a valid call of each public function, and rows that spoil one argument of it.

A row is a value, the error that it is, and a fragment of the message. Most arguments mean one thing in the
whole library, and `BY_NAME` has their rows; a module's table has the valid calls, and the rows of the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from conftest import make_tiny_model
from torch import Tensor

N, K, C, H, W = 3, 4, 2, 6, 5
NAN, INF = float("nan"), float("inf")

Row = tuple[Any, type[Exception], str]


@dataclass
class Call:
    """A valid call, and the changes that make it wrong; `self` is a function that makes the method's object."""

    function: Callable[..., Any]
    valid: dict[str, Any]
    says: str | None  # pattern of the name that errors start with, where that is not the function's
    rows: dict[str, list[Row]] = field(default_factory=dict)
    others: list[tuple[dict[str, Any], type[Exception], str]] = field(default_factory=list)

    def __iter__(self):
        """Yield changes, error and fragment."""
        for name, rows in self.rows.items():
            yield from (({name: value}, error, fragment) for value, error, fragment in rows)
        yield from self.others


CALLS: dict[Callable[..., Any], Call] = {}


def good(function: Callable[..., Any], /, says: str | None = None, **valid: Any) -> None:
    """Enter a valid call, with the usual rows of its arguments."""
    names = inspect.signature(function).parameters
    CALLS[function] = Call(function, valid, says, {n: BY_NAME[n] for n in names if n in BY_NAME})


def each(function: Callable[..., Any], /, **rows: list[Row]) -> None:
    """Enter other rows of some arguments."""
    CALLS[function].rows.update(rows)


def bad(function: Callable[..., Any], error: type[Exception], says: str, /, **changes: Any) -> None:
    """Enter one row that changes several arguments, or the object."""
    CALLS[function].others.append((changes, error, says))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def spoilt(value: Tensor, by: float) -> Tensor:
    """Return a copy with another first number."""
    value = value.clone()
    value.view(-1)[0] = by
    return value


def quiet(*_: Any) -> None:
    """Do nothing when called on the way."""


X = 0.2 + 0.6 * torch.rand(N, C, H, W, generator=seeded())
Y = torch.arange(N)
Z = torch.randn(N, K, generator=seeded())
MODEL, STUDENT, TEACHER = (make_tiny_model(K, seed=seed) for seed in (0, 1, 2))


def any_of(error: type[Exception], fragment: str, *values: Any) -> list[Row]:
    return [(value, error, fragment) for value in values]


def tensor(valid: Tensor, other: torch.dtype, shape: str = "of shape") -> list[Row]:
    """Return no tensors, another dtype and another rank."""
    kinds = {torch.int64: "int64", torch.bool: "bool"}
    return [
        *any_of(TypeError, "a torch.Tensor", "text", None, valid.tolist()),
        (valid.to(other), TypeError, kinds.get(valid.dtype, "float")),
        (valid[None], ValueError, shape),
    ]


def number(low: float = -INF, high: float = INF, *, above: bool = False) -> list[Row]:
    """Return no finite numbers in [low, high], or in (low, high] with `above`."""
    outside = [low if above else low - 1e-3] * (low > -INF) + [high + 1e-3] * (high < INF)
    # Float32 holds neither the largest nor their products.
    rows = any_of(ValueError, " in ", NAN, INF, -INF, 1e308, *outside)
    return any_of(TypeError, "a number", "1", None, True, 1j, [1.0]) + rows


def integer(low: int) -> list[Row]:
    return [
        *any_of(TypeError, "an int", "1", None, True, 2.0, NAN),
        (low - 1, ValueError, f">= {low}"),
    ]


def class_vector(valid: Tensor, low: float = -INF, high: float = INF) -> list[Row]:
    """Return no `(K,)` in [low, high]; a NaN there is an absent class."""
    outside = [low - 0.01] * (low > -INF) + [high + 0.01] * (high < INF)
    rows = tensor(valid, torch.int64) + any_of(ValueError, "K >= 2", valid[:1], valid[:0])
    rows += [(spoilt(valid, INF), ValueError, "finite"), (spoilt(valid, 1e30), ValueError, "from ")]
    return rows + any_of(ValueError, "", *(spoilt(valid, end) for end in outside))


def per_sample(*, above: bool = False) -> list[Row]:
    """Return neither a number nor one for each of N samples."""
    each = torch.full((N,), 0.1)
    return [
        *number(0, above=above),
        *any_of(ValueError, " in ", 1e-300, spoilt(each, 1e-30)) * above,
        *any_of(ValueError, " in ", spoilt(each, 1e30)),
        (each.long(), TypeError, "floating-point"),
        *any_of(ValueError, f"({N},)", each[:, None], each[:-1]),
        *any_of(ValueError, "", spoilt(each, NAN), spoilt(each, 0 if above else -1e-3)),
    ]


def names(count: int = K) -> list[Row]:
    texts = [str(c) for c in range(count)]
    wrong = any_of(TypeError, "a list of strings", "abcd", 3, [*range(count)])
    return wrong + any_of(ValueError, f"{count} ", texts[1:], [])


def state(own: dict[str, Any]) -> list[Row]:
    """Return no saved state: no dict, too few names, one too many, a tensor of another shape."""
    rows = [*any_of(TypeError, "as a dict", "text", None), (own | {"more": 1}, ValueError, "also")]
    rows += any_of(ValueError, "none of", {}) * bool(own)
    tensors = [k for k, v in own.items() if isinstance(v, Tensor)][:1]
    return rows + [(own | {k: own[k][None]}, ValueError, "shapes of one's own") for k in tensors]


def or_none(rows: list[Row]) -> list[Row]:
    """Return the same where None is allowed."""
    return [row for row in rows if row[0] is not None]


LOGITS = tensor(Z, torch.int64) + any_of(ValueError, "of shape (N, K)", Z[0], Z[:, :1])
SHAPED = any_of(ValueError, "equal shape", Z[:-1], Z[:, :-1])
PAIRED = [*LOGITS, *SHAPED, (Z.to("meta"), ValueError, "on one device")]
IN_RANGE = any_of(ValueError, f"in 0..{K - 1}", Y - 1, spoilt(Y, K))
LABELS = [*tensor(Y, torch.int32), (Y.float(), TypeError, "int64"), (Y[0], ValueError, "shape")]
SHORT = [(Y[:-1], ValueError, f"of shape ({N},)")]
BATCH = [*tensor(X, torch.uint8, "(N, C, H, W)"), (X[0], ValueError, "[None]")]
OUTSIDE = any_of(ValueError, "inside bounds", spoilt(X, 1.01), spoilt(X, -0.01))
IMAGES = BATCH + OUTSIDE + any_of(ValueError, "finite", spoilt(X, NAN), spoilt(X, INF))
FIGURES = torch.tensor([0.5, 0.9, 0.3, 0.7])
FRACTIONS = class_vector(FIGURES, 0, 1)
FUNCTION = any_of(TypeError, "callable", "text", 7, None)
MODULE = any_of(TypeError, "a torch.nn.Module", "text", 7, None, len)
STRING = any_of(TypeError, "str", 7, None)
CHOICE = [*any_of(TypeError, "one of", 7, None, ["text"]), ("unheard of", ValueError, "one of")]
PATH = any_of(TypeError, "a str or a Path", 7, None)
BOUNDS = [
    *any_of(TypeError, "a pair", 1.0, None),
    *any_of(ValueError, "a pair", (0.0, 0.5, 1.0), ()),
    (("0", 1.0), TypeError, "a number"),
    ((1.0, 0.0), ValueError, "low <"),
    ((NAN, 1.0), ValueError, " in "),
]
WEIGHT, SHARE, ABOVE_ZERO = number(0), number(0, 1), number(0, above=True)

# What an argument of this name is, if its module's table does not say otherwise.
BY_NAME: dict[str, list[Row]] = {
    "targets": [*LABELS, *SHORT, *IN_RANGE, (Y.to("meta"), ValueError, "on cpu")],
    "logits": LOGITS,
    "x": IMAGES,
    "bounds": BOUNDS,
    "num_classes": integer(2),
    "seed": integer(0),
    "rng": any_of(TypeError, "a torch.Generator or None", 0, "cpu"),
    "device": [("gnu", ValueError, "its name"), (0.5, TypeError, "its name")],
    "class_names": names(),
    "on_step": or_none(FUNCTION),
    **dict.fromkeys(("eps", "step_size"), per_sample()),
    **dict.fromkeys(
        ("temperature", "adv_temperature", "clean_temperature"), per_sample(above=True)
    ),
    **dict.fromkeys(("alpha", "limit"), SHARE),
    **dict.fromkeys(("lr", "pair_temperature"), ABOVE_ZERO),
    **dict.fromkeys(("steps", "in_channels", "width", "batch_size", "draws"), integer(1)),
    **dict.fromkeys(("padding", "ddof"), integer(0)),
    **dict.fromkeys(("model", "teacher", "student", "natural_teacher"), MODULE),
    **dict.fromkeys(("loss", "head", "rule", "divergence"), FUNCTION),
    **dict.fromkeys(("version", "count", "noise", "reduction", "threshold", "to"), CHOICE),
    **dict.fromkeys(("student_clean", "student_adv", "teacher_clean", "teacher_adv"), PAIRED),
    **dict.fromkeys(("kl_weight", "beta", "exponent", "clean_weight", "adv_weight"), WEIGHT),
    **dict.fromkeys(("mse_weight", "cross_entropy_weight", "uniform_weight", "bn_weight"), WEIGHT),
    **dict.fromkeys(("onehot_weight", "uniformity_weight", "confidence", "gamma"), WEIGHT),
    **dict.fromkeys(("base", "radius", "strength", "rate", "clean_slack", "guard"), WEIGHT),
    **dict.fromkeys(("boundary_slack", "margin_rate"), WEIGHT),
}
