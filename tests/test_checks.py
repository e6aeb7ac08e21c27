"""The door that names the function, and checks whose refusals and passes are told apart by one value."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ferdlib import _checks
from ferdlib._arguments import MissingFile
from ferdlib._checks import InvalidState, InvalidType, InvalidValue, public
from ferdlib.evaluation import AttackSpec
from ferdlib.trainer import FERDConfig

Z, Y = torch.randn(3, 4), torch.arange(3)
X = torch.rand(3, 2, 4, 5)


@public
def halve(x, *, error=InvalidValue):
    if x < 0:
        raise error(f"expected `x` >= 0, got {x}") from KeyError("cause")
    return x / 2


class Base:
    @public
    def __init__(self, x=1.0):
        self.method(x)

    @public
    def method(self, x):
        if x < 0:
            raise InvalidValue(f"expected `x` >= 0, got {x}")

    @public
    def __call__(self, x):
        self.method.__wrapped__(self, x)

    @classmethod
    @public
    def of(cls, x):
        return cls(x)

    @staticmethod
    @public
    def read(x):
        halve.__wrapped__(x)


class Child(Base):
    pass


@dataclass
class Record:
    x: float

    @public
    def __post_init__(self):
        _checks.real(0, x=self.x)


class Module(nn.Module):
    @public
    def forward(self, x):
        (z,) = _checks.logits(x=x)
        return z


def inside_a_function():
    @public
    def local(x):
        raise InvalidValue("expected `x`, got x")

    local(1)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: halve(-1), "halve"),
        (lambda: Base(-1), "Base.method"),  # the first door on the way out
        (lambda: Base().method(-1), "Base.method"),
        (lambda: Child().method(-1), "Child.method"),
        (lambda: Base()(-1), "Base"),
        (lambda: Child()(-1), "Child"),
        (lambda: Child.read(-1), "Base.read"),
        (lambda: Record(-1), "Record"),
        (lambda: Module()(torch.ones(2)), "Module"),
        (inside_a_function, "local"),
    ],
)
def test_errors_start_with_the_public_name(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected `x`") as caught:
        call()
    assert type(caught.value) is ValueError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidType, TypeError),
        (InvalidValue, ValueError),
        (InvalidState, RuntimeError),
        (MissingFile, FileNotFoundError),
    ],
)
def test_each_error_becomes_the_plain_one_with_its_cause(error, kind):
    with pytest.raises(kind, match="^halve: expected") as caught:
        halve(-1, error=error)
    assert type(caught.value) is kind
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_door_lets_everything_else_through():
    assert halve(3) == 1.5
    assert halve.__name__ == "halve"
    with pytest.raises(OverflowError, match="^expected"):
        halve(-1, error=OverflowError)


def test_the_door_is_no_break_in_a_compiled_graph():
    @public
    def loss(z: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
        (z,) = _checks.logits(z=z)
        _checks.labels(y=y, like=z, num_classes=z.shape[1])
        _checks.real(0, weight=weight)
        return weight * torch.nn.functional.cross_entropy(z, y, reduction="none")

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(Z, Y), loss(Z, Y))


META = Z.to("meta")
NUMPY = [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), np.int64(1)]
STATE = {"a": torch.ones(2), "b": 1}
# The check, its arguments that pass, and each time arguments that do not, with the error.
TABLE = [
    (lambda v: _checks.real(v=v), [-1e9, 3, *NUMPY], [(math.nan, ValueError), (True, TypeError)]),
    (lambda v: _checks.real(2, v=v), [np.int64(2)], [(v, ValueError) for v in NUMPY]),
    (lambda v: _checks.positive(v=v), NUMPY, [(np.bool_(True), TypeError), (X[0], TypeError)]),
    (lambda v: _checks.real(0, 1, v=v), [0, 1, 0.5], [(-1e-9, ValueError), (1.1, ValueError)]),
    (lambda v: _checks.positive(v=v), [1e-9], [(0, ValueError), (math.inf, ValueError)]),
    (
        lambda v: _checks.integer(1, v=v),
        [1, np.int64(1), np.array(1), torch.tensor(1)],
        [(0, ValueError), (1.0, TypeError), (True, TypeError), (np.float32(1), TypeError)],
    ),
    (lambda v: _checks.choice(("a", None), v=v), ["a", None], [("b", ValueError), (Z, TypeError)]),
    (lambda v: _checks.instance(dict, v=v), [{}], [([], TypeError)]),
    (lambda v: _checks.callable_(v=v), [len], [("len", TypeError)]),
    (
        lambda v: _checks.pair(v=v),
        [(0, 0)],
        [((1, 0), ValueError), ((0,), ValueError), (0, TypeError)],
    ),
    (lambda v: _checks.pair(0, v=v), [(0, 1)], [((-1, 1), ValueError), (("0", 1), TypeError)]),
    (
        lambda v: _checks.strings(2, v=v),
        [["a", "b"], np.array(["a", "b"])],
        [("ab", TypeError), (["a"], ValueError)],
    ),
    (lambda v: _checks.path("v", v), ["a"], [(1, TypeError)]),
    (lambda v: _checks.file("v", v), [__file__], [("none", FileNotFoundError)]),
    (lambda v: _checks.keys("ab", v=v), [STATE], [({"a": 1}, ValueError), ([], TypeError)]),
    (lambda v: _checks.tensor(v=v), [Z], [(Z.tolist(), TypeError)]),
    (lambda v: _checks.floating(v=v), [Z.half()], [(Y, TypeError)]),
    (lambda v: _checks.images(v=v), [X, 9 * X], [(X[0], ValueError), (X.long(), TypeError)]),
    (lambda v: _checks.images((0, 1), v=v), [X], [(X + 1, ValueError), (X * math.nan, ValueError)]),
    (lambda v: _checks.logits(v=v), [Z], [(Z[0], ValueError), (Z[:, :1], ValueError)]),
    (lambda v: _checks.logits(z=Z, v=v), [Z], [(Z[:2], ValueError), (META, ValueError)]),
    (lambda v: _checks.labels(v=v), [Y], [(Y.int(), TypeError), (Y[None], ValueError)]),
    (lambda v: _checks.labels(like=Z, v=v), [Y], [(Y[:2], ValueError), (Y.to("meta"), ValueError)]),
    (lambda v: _checks.labels(num_classes=3, v=v), [Y], [(Y - 1, ValueError), (Y + 1, ValueError)]),
    (
        lambda v: _checks.class_vector(v=v),
        [Z[0] * math.nan],
        [(Z[0] / 0, ValueError), (Z, ValueError)],
    ),
    (lambda v: _checks.module(v=v), [nn.ReLU()], [(len, TypeError)]),
    (_checks.generator, [None, torch.Generator()], [(0, TypeError)]),
    (_checks.device, ["cpu", torch.device("meta")], [("gnu", ValueError), (0.5, TypeError)]),
    (
        lambda v: _checks.state(v, STATE),
        [STATE],
        [(STATE | {"a": Z}, ValueError), ({}, ValueError)],
    ),
    (
        lambda v: _checks.per_sample("v", v, X),
        [0, Z[:, 0].abs()],
        [(-1, ValueError), (Z, ValueError)],
    ),
]


@pytest.mark.parametrize(("check", "passes", "refused"), TABLE)
def test_checks_pass_what_is_right_and_refuse_the_rest(check, passes, refused):
    for value in passes:
        check(value)
    for value, error in refused:
        with pytest.raises(error, match="^expected .*, got ") as caught:
            check(value)
        assert "\n" not in str(caught.value)


def test_logits_come_back_in_float32_or_wider():
    half, double = _checks.logits(a=Z.half(), b=Z.double())
    assert (half.dtype, double.dtype) == (torch.float32, torch.float64)


def test_what_a_file_holds_of_a_dataclass_are_pythons_own_numbers():
    spec = AttackSpec(name="a", kind="pgd", eps=NUMPY[0], step_size=NUMPY[3], steps=np.int64(2))
    assert [type(v) for v in (spec.eps, spec.step_size, spec.steps)] == [float, float, int]
    shape = tuple(np.array([1, 8, 8]))
    config = FERDConfig(num_classes=np.int64(3), layer="layer4", image_shape=shape)
    assert {type(v) for v in (config.num_classes, *config.image_shape)} == {int}


def test_one_number_per_sample_broadcasts_against_the_images():
    assert _checks.per_sample("eps", 2, X) == 2.0
    assert _checks.per_sample("eps", Y.double(), X).shape == (3, 1, 1, 1)
    with pytest.raises(InvalidValue, match=r"`eps` in \[1e-15, 1e\+15\] for every sample"):
        _checks.per_sample("eps", Y.float(), X, above_zero=True)
