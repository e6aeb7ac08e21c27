"""Interleaved timing: each round runs every competitor of a group once, in an order that rotates."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

Competitor = Callable[[], object]
Times = dict[str, list[float]]  # seconds by competitor, a number per round
Placed = TypeVar("Placed", Tensor, nn.Module)

OPERATIONS = {"/": operator.truediv, "-": operator.sub}
COMPARISONS = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Settings:
    """Under which circumstances the competitors run."""

    rounds: int = 9
    """Times that each competitor is timed; a run before them is not."""
    threads: int = 2
    """Of torch's operators on the CPU."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the models and the images are."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and images in the groups attacks and early-stop."""
    channels_last: bool = False
    """Lay weights and images of those groups out with the channels last."""
    batch_size: int = 64
    """Images in those groups."""
    seed: int = 0
    """Of weights, images and noise."""

    def place(self, value: Placed) -> Placed:
        """A model or its images as these settings want them; labels only change their device."""
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        dtype = getattr(torch, self.dtype)
        return value.to(device=self.device, dtype=dtype, memory_format=layout)

    def noise(self) -> torch.Generator:
        """A fresh generator, so that competitors start from the same noise."""
        return torch.Generator(self.device).manual_seed(self.seed)


class Spread(NamedTuple):
    """The median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = torch.tensor(values, dtype=torch.float64).quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        )
        return cls(median.item(), low.item(), high.item())


@dataclass(frozen=True)
class Goal:
    """A limit on the ratio of two competitors' times, or on their difference in seconds.

    Written as it reads: `Goal("torchattacks PGD", "/", "ferdlib pgd", ">=", 1.5)`.
    """

    left: str
    operation: Literal["/", "-"]
    right: str
    comparison: Literal["<=", ">="]
    limit: float

    @property
    def unit(self) -> str:
        return "" if self.operation == "/" else " s"

    def __str__(self) -> str:
        formula = f"{self.left} {self.operation} {self.right}"
        return f"{formula} {self.comparison} {self.limit:g}{self.unit}"

    def measured(self, times: Times) -> Spread | None:
        """Of the medians, with the quartiles over the rounds; None where a competitor did not run."""
        if self.left not in times or self.right not in times:
            return None
        apply = OPERATIONS[self.operation]
        left, right = times[self.left], times[self.right]
        rounds = Spread.of([apply(a, b) for a, b in zip(left, right, strict=True)])
        return rounds._replace(median=apply(Spread.of(left).median, Spread.of(right).median))

    def verdict(self, times: Times) -> Literal["met", "missed", "not measured"]:
        found = self.measured(times)
        if found is None:
            return "not measured"
        return "met" if COMPARISONS[self.comparison](found.median, self.limit) else "missed"


@dataclass(frozen=True)
class Prepared:
    """A group's competitors, ready to run.

    Attributes:
        competitors: by name, called without arguments.
        skipped: why others cannot run here, by name.
        note: what was found in the preparation and belongs to the numbers.
        check: called with what each competitor returned before the timing. It raises where results that
            must be the same are not, and says what they are.
    """

    competitors: dict[str, Competitor]
    skipped: dict[str, str] = field(default_factory=dict)
    note: str = ""
    check: Callable[[dict[str, Any]], str] | None = None


@dataclass(frozen=True)
class Group:
    """Competitors that do the same work, and what their times shall be."""

    about: str
    goals: tuple[Goal, ...]
    prepare: Callable[[Settings], Prepared]


@dataclass(frozen=True)
class Result:
    """A group's times."""

    group: str
    about: str
    note: str
    times: Times
    skipped: dict[str, str]
    goals: tuple[Goal, ...]


def available(
    builders: dict[str, Callable[[], Competitor]],
) -> tuple[dict[str, Competitor], dict[str, str]]:
    """The competitors that can be built here, and why the others cannot: a package that is not there."""
    competitors, skipped = {}, {}
    for name, build in builders.items():
        try:
            competitors[name] = build()
        except ImportError as error:
            skipped[name] = str(error)
    return competitors, skipped


def measure(
    competitors: dict[str, Competitor], rounds: int, *, clock: Callable[[], float] = timer
) -> Times:
    """Seconds of each competitor in each round.

    The clock is that of `torch.utils.benchmark.Timer`, which waits for the accelerator. The class itself
    warms up with two more runs before each measurement: too many for competitors that take minutes.
    """
    order = deque(competitors)
    times: Times = {name: [] for name in order}
    for _ in range(rounds):
        for name in order:
            start = clock()
            competitors[name]()
            times[name].append(clock() - start)
        order.rotate(-1)
    return times


def run(
    name: str, group: Group, settings: Settings, *, clock: Callable[[], float] = timer
) -> Result:
    """The group's times, after one run of each competitor that is checked and not timed."""
    prepared = group.prepare(settings)
    outcomes = {key: competitor() for key, competitor in prepared.competitors.items()}
    notes = [prepared.note, prepared.check(outcomes) if prepared.check else ""]
    del outcomes  # or they would take memory from what is timed
    times = measure(prepared.competitors, settings.rounds, clock=clock)
    note = " ".join(filter(None, notes))
    return Result(name, group.about, note, times, prepared.skipped, group.goals)
