"""From what an argument is follows what can be wrong with it: kinds of arguments, and cases made of them.

A `Kind` is a valid value and, by name, cells: another value and what comes of it. That is an error type; a
check of the result, where the value is legitimately accepted; or a sentence, the reason why the cell is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from conftest import make_tiny_model

N, K, C, H, W = 3, 4, 2, 6, 5
NAN, INF = float("nan"), float("inf")

Outcome = type[Exception] | Callable[[Any], bool] | str


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


X = 0.2 + 0.6 * torch.rand(N, C, H, W, generator=seeded())
Y = torch.arange(N)
Z = torch.randn(N, K, generator=seeded())
FEATURES = torch.randn(N, C, H, W, generator=seeded())
COUNTS = torch.arange(1, K + 1)
MODEL = make_tiny_model(K)
STUDENT = make_tiny_model(K, seed=1)
TEACHER = make_tiny_model(K, seed=2)


def head(z: torch.Tensor) -> torch.Tensor:
    """Features to logits."""
    return torch.cat([z.mean((2, 3)), z.amax((2, 3))], dim=1)


@dataclass(frozen=True)
class Kind:
    """What an argument is.

    Attributes:
        valid: what passes.
        cells: by name, another value and what comes of it.
        shares: cells that only make sense beside another argument with the same axis: a wrong length beside
            another tensor of as many samples, another device beside the first tensor.
        cut: the argument of an empty batch, where it has samples.
    """

    valid: Any
    cells: dict[str, tuple[Any, Outcome]] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    cut: Any = None

    def but(self, **outcomes: Outcome) -> Kind:
        """The same with other outcomes of some cells, which then hold beside any argument."""
        cells = {name: (self.cells[name][0], outcome) for name, outcome in outcomes.items()}
        shares = {name: axis for name, axis in self.shares.items() if name not in outcomes}
        return replace(self, cells=self.cells | cells, shares=shares)

    def also(self, **cells: tuple[Any, Outcome]) -> Kind:
        """The same with more cells."""
        return replace(self, cells=self.cells | cells)

    def without(self, *names: str) -> Kind:
        """The same without cells that are no cells of this argument."""
        return replace(self, cells={k: v for k, v in self.cells.items() if k not in names})

    def of(self, wrap: Callable[[Any], Any], prefix: str = "inner ") -> dict[str, Any]:
        """The cells of a value that is inside another one, such as the entry of a mapping."""
        return {
            prefix + name: (wrap(value), outcome) for name, (value, outcome) in self.cells.items()
        }


def anything(result: Any) -> bool:
    """No error is all that is asked."""
    return True


def nothing(result: Any) -> bool:
    """A result for none of no samples."""
    return len(result[0] if isinstance(result, tuple) else result) == 0


def first_is_nan(result: Any) -> bool:
    """NaN stays in its own row."""
    return bool(result[0].isnan()) and bool(result[1:].isfinite().all())


def finite(result: Any) -> bool:
    return bool(torch.as_tensor(result).isfinite().all())


def spoilt(value: torch.Tensor, by: float) -> torch.Tensor:
    """The first number replaced."""
    value = value.clone()
    value.view(-1)[0] = by
    return value


@dataclass
class Case:
    """One valid call, and what its arguments are.

    Attributes:
        where: the name in ferdlib, such as "reweight.ClassMean.update".
        arguments: their kinds.
        on: makes the object whose method it is.
        call: what to call instead, by the names of the arguments.
        says: pattern of the name that an error starts with.
        names: patterns of what an error calls an argument, where that is not its name.
        empty: what comes of an empty batch, where some arguments have samples.
        check: of the result of the valid call.
    """

    where: str
    arguments: dict[str, Kind]
    on: Callable[[], Any] | None = None
    call: Callable[..., Any] | None = None
    says: str = ""
    names: dict[str, str] = field(default_factory=dict)
    empty: Outcome = nothing
    check: Callable[[Any], bool] = anything

    def __post_init__(self) -> None:
        owner, _, method = self.where.partition(".")[2].partition(".")
        self.says = owner if not method else rf"{owner}(\.{method})?"

    def that(self, **options: Any) -> Case:
        """The same with other attributes."""
        for name, value in options.items():
            setattr(self, name, value)
        return self

    def target(self) -> Callable[..., Any]:
        """What is called."""
        if self.call is not None:
            return self.call
        module, *path = self.where.split(".")
        found = import_module(f"ferdlib.{module}")
        if self.on is not None:
            found, path = self.on(), path[1:]
        for name in path:
            found = getattr(found, name)
        return found

    def cells(self) -> Iterator[tuple[str, dict[str, Any], Outcome, str]]:
        """Name of the cell, arguments of the call, what comes of it, and a pattern of the arguments at fault."""
        valid = {name: kind.valid for name, kind in self.arguments.items()}
        yield "valid", valid, self.check, ""
        cut = {name: kind.cut for name, kind in self.arguments.items() if kind.cut is not None}
        if cut:
            yield "empty batch", valid | cut, self.empty, self._called(*cut)
        for name, kind in self.arguments.items():
            for cell, (value, outcome) in kind.cells.items():
                beside = self._beside(name, cell)
                if beside or cell not in kind.shares:
                    fault = self._called(name, *beside)
                    yield f"{name}: {cell}", valid | {name: value}, outcome, fault

    def _beside(self, name: str, cell: str) -> list[str]:
        """The other arguments that share what the cell is about; of a device only those before."""
        axis = self.arguments[name].shares.get(cell)
        others = [o for o, kind in self.arguments.items() if axis and axis in kind.shares.values()]
        if axis == "device":
            return others[: others.index(name)]
        return [other for other in others if other != name]

    def _called(self, *arguments: str) -> str:
        return "|".join(self.names.get(name, name) for name in arguments)


CASES: dict[str, Case] = {}


def case(where: str, /, **arguments: Kind) -> Case:
    """A line of the matrix."""
    CASES[where] = Case(where, arguments)
    return CASES[where]


NO_TENSOR = {"text": ("text", TypeError), "none": (None, TypeError)}
MOVED = "brought to the device of the first tensor"


def _tensor(valid: torch.Tensor, axis: str | None, **cells: tuple[Any, Outcome]) -> Kind:
    """What any tensor shares: no tensor, another rank, another length, another device."""
    common = NO_TENSOR | {"list": (valid.tolist(), TypeError), "rank": (valid[None], ValueError)}
    common["device"] = (valid.to("meta"), ValueError)
    shares = {"device": "device"}
    if axis is not None:
        common["length"], shares["length"] = (valid[:-1], ValueError), axis
    return Kind(valid, common | cells, shares, valid[:0] if axis == "samples" else None)


def images(valid: torch.Tensor = X) -> Kind:
    """A batch in [0, 1]."""
    return features(valid).also(
        nan=(spoilt(valid, NAN), ValueError),
        inf=(spoilt(valid, INF), ValueError),
        above=(spoilt(valid, 1.01), ValueError),
        below=(spoilt(valid, -0.01), ValueError),
    )


def features(valid: torch.Tensor = FEATURES) -> Kind:
    """Any float batch `(N, C, H, W)`."""
    low_rank = (valid[0], ValueError)
    return _tensor(valid, "samples", dtype=(valid.to(torch.uint8), TypeError), low_rank=low_rank)


def logits(valid: torch.Tensor = Z) -> Kind:
    """Float `(N, K)`; nobody reads their values."""
    kind = _tensor(
        valid,
        "samples",
        dtype=(valid.long(), TypeError),
        low_rank=(valid[0], ValueError),
        one_class=(valid[:, :1], ValueError),
        width=(valid[:, :-1], ValueError),
        nan=(spoilt(valid, NAN), first_is_nan),
    )
    return replace(kind, shares=kind.shares | {"width": "logits"})


def labels(k: int = K, valid: torch.Tensor = Y) -> Kind:
    """Int64 `(N,)` in 0..k-1."""
    return _tensor(
        valid,
        "samples",
        dtype=(valid.int(), TypeError),
        floats=(valid.float(), TypeError),
        below=(valid - 1, ValueError),
        above=(spoilt(valid, k), ValueError),
    )


def values(valid: torch.Tensor = Z[:, 0]) -> Kind:
    """Float `(N,)`, one of each sample."""
    return _tensor(
        valid, "samples", dtype=(valid.long(), TypeError), nan=(spoilt(valid, NAN), ValueError)
    )


def flags(valid: torch.Tensor = Y == 0) -> Kind:
    """Bool `(N,)`."""
    return _tensor(valid, "samples", dtype=(valid.long(), TypeError))


def class_vector(valid: torch.Tensor, low: float = -INF, high: float = INF) -> Kind:
    """Float `(K,)` in [low, high]; NaN is an absent class."""
    kind = _tensor(
        valid,
        "classes",
        dtype=(valid.long(), TypeError),
        one_class=(valid[:1], ValueError),
        empty=(valid[:0], ValueError),
        inf=(spoilt(valid, INF), ValueError),
        nan=(spoilt(valid, NAN), anything),
    )
    ends = {"below": (low, low - 0.01), "above": (high, high + 0.01)}
    wrong = {
        name: (spoilt(valid, bad), ValueError)
        for name, (end, bad) in ends.items()
        if abs(end) < INF
    }
    return kind.also(**wrong)


def fractions(valid: torch.Tensor | None = None) -> Kind:
    """Class accuracies."""
    return class_vector(torch.tensor([0.5, 0.9, 0.3, 0.7]) if valid is None else valid, 0.0, 1.0)


def counts(valid: torch.Tensor = COUNTS) -> Kind:
    """Int64 `(K,)`, at least 0."""
    return _tensor(
        valid,
        "classes",
        dtype=(valid.int(), TypeError),
        floats=(valid.double(), TypeError),
        empty=(valid[:0], ValueError),
        below=(-valid, ValueError),
    ).but(device="counts are brought to the host")


def confusion(valid: torch.Tensor | None = None) -> Kind:
    """Int64 `(K, K)`."""
    valid = torch.eye(K, dtype=torch.int64) + 1 if valid is None else valid
    return _tensor(
        valid,
        None,
        dtype=(valid.int(), TypeError),
        floats=(valid.double(), TypeError),
        square=(valid[:, :-1], ValueError),
        empty=(valid[:0, :0], ValueError),
        below=(valid - 2, ValueError),
    )


def scalar(valid: float = 0.5) -> Kind:
    """A float tensor without dimensions."""
    tensor = torch.tensor(valid)
    cells = NO_TENSOR | {
        "number": (valid, TypeError),
        "dtype": (tensor.long(), TypeError),
        "rank": (tensor[None], ValueError),
    }
    return Kind(tensor, cells)


def number(
    valid: float,
    low: float = -INF,
    high: float = INF,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> Kind:
    """A finite number in an interval."""
    cells: dict[str, tuple[Any, Outcome]] = {
        "text": (str(valid), TypeError),
        "none": (None, TypeError),
        "flag": (True, TypeError),
        "complex": (complex(valid), TypeError),
        "list": ([valid], TypeError),
        "nan": (NAN, ValueError),
        "inf": (INF, ValueError),
        "minus inf": (-INF, ValueError),
    }
    if low > -INF:
        cells["below"] = (low if open_low else low - 1e-3, ValueError)
    if high < INF:
        cells["above"] = (high if open_high else high + 1e-3, ValueError)
    return Kind(valid, cells)


def integer(valid: int, low: int | None = None) -> Kind:
    """An int from low on."""
    cells: dict[str, tuple[Any, Outcome]] = {
        "text": (str(valid), TypeError),
        "none": (None, TypeError),
        "flag": (True, TypeError),
        "float": (float(valid), TypeError),
        "nan": (NAN, TypeError),
    }
    if low is not None:
        cells["below"] = (low - 1, ValueError)
    return Kind(valid, cells)


def per_sample(valid: float, low: float = 0.0, *, open_low: bool = False) -> Kind:
    """A number, or a float `(N,)`."""
    each = torch.full((N,), valid)
    kind = number(valid, low, open_low=open_low).also(
        tensor=(each, anything),
        dtype=(each.long(), TypeError),
        rank=(each[:, None], ValueError),
        length=(each[:-1], ValueError),
        tensor_nan=(spoilt(each, NAN), ValueError),
        tensor_below=(spoilt(each, low if open_low else low - 1e-3), ValueError),
    )
    return kind.but(inf=ValueError)


def choice(valid: Any) -> Kind:
    """One of some strings."""
    cells = {"unknown": ("unheard of", ValueError), "number": (7, TypeError)}
    return Kind(valid, cells | {"none": (None, TypeError), "list": ([valid], TypeError)})


def word(valid: str) -> Kind:
    """Any string."""
    return Kind(valid, {"number": (7, TypeError), "none": (None, TypeError)})


def start() -> Kind:
    """Of an attack: a name, None, or a tensor."""
    zero = torch.zeros_like(X)
    return optional(choice("uniform")).also(
        tensor=(zero, anything),
        dtype=(zero.long(), TypeError),
        length=(zero[:-1], ValueError),
        rank=(zero[0], ValueError),
        nan=(spoilt(zero, NAN), ValueError),
    )


def bounds() -> Kind:
    """Smallest and largest pixel value."""
    return Kind(
        (0.0, 1.0),
        {
            "number": (1.0, TypeError),
            "none": (None, TypeError),
            "text": (("0", 1.0), TypeError),
            "length": ((0.0, 0.5, 1.0), ValueError),
            "empty": ((), ValueError),
            "range": ((1.0, 0.0), ValueError),
            "nan": ((NAN, 1.0), ValueError),
        },
    )


def names(count: int = K) -> Kind:
    """So many strings."""
    valid = [f"class {c}" for c in range(count)]
    cells = {
        "text": ("abcd"[:count], TypeError),
        "number": (3, TypeError),
        "numbers": (list(range(count)), TypeError),
        "length": (valid[:-1], ValueError),
        "empty": ([], ValueError),
    }
    return Kind(valid, cells)


def rng() -> Kind:
    """A generator or None."""
    cells = {"seed": (0, TypeError), "text": ("cpu", TypeError), "left to torch": (None, anything)}
    return Kind(seeded(), cells)


def function(valid: Callable[..., Any]) -> Kind:
    """Anything that can be called, a model for one."""
    cells = {"text": ("text", TypeError), "number": (7, TypeError), "none": (None, TypeError)}
    return Kind(valid, cells)


def module(valid: torch.nn.Module = MODEL) -> Kind:
    """A module and no other callable."""
    return function(valid).also(callable=(len, TypeError))


def device() -> Kind:
    """A device or its name; None for that of what is there."""
    return Kind("cpu", {"unknown": ("gnu", ValueError), "float": (0.5, TypeError)})


def path(valid: Any) -> Kind:
    """Where a file is."""
    return Kind(valid, {"number": (7, TypeError), "none": (None, TypeError)})


def state(own: dict[str, Any]) -> Kind:
    """A saved state: a mapping with the names of one's own, and tensors like them."""
    first = next((name for name, value in own.items() if isinstance(value, torch.Tensor)), None)
    cells = {
        "text": ("state", TypeError),
        "none": (None, TypeError),
        "empty": ({}, ValueError),
        "one more": (own | {"unheard of": 1}, ValueError),
    }
    if first is not None:
        cells["shape"] = (own | {first: own[first][None]}, ValueError)
    return Kind(own, cells)


def by_name(kind: Kind) -> Kind:
    """A mapping of names to what the kind is."""
    cells = {
        "no mapping": (kind.valid, TypeError),
        "none": (None, TypeError),
        "empty": ({}, ValueError),
    }
    inner = kind.of(lambda value: {"a": value})
    shared = {f"inner {cell}" for cell in kind.shares}
    return Kind({"a": kind.valid}, cells | {k: v for k, v in inner.items() if k not in shared})


def optional(kind: Kind) -> Kind:
    """The same, and None passes."""
    return replace(kind, cells=kind.cells | {"none": (None, anything)})


def unchecked(kind: Kind, *cells: str) -> Kind:
    """The same without cells that the library does not live up to yet."""
    return kind.but(**dict.fromkeys(cells, "not checked, or in other words"))


def quiet(*_: Any) -> None:
    """What is called on the way."""


WEIGHT = number(1.0, 0.0)
SHARE = number(0.5, 0.0, 1.0)
CLASSES = integer(K, 2)
