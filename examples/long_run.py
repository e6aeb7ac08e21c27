"""Training that survives being stopped or killed, for the examples: checkpoints, `--resume`, signals."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, TypeVar

from ferdlib.trainer import Checkpoints
from processes import any_of, first

Result = TypeVar("Result")
State = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all training examples have in common."""

    resume: Literal["auto"] | None = None
    """auto: continue from the newest checkpoint in --out, made with the same options, or start if there is
    none."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; there is also one after the last epoch, and where the run is stopped."""
    keep_checkpoints: int = 3
    """How many checkpoints stay in --out; when the results are written, they are deleted."""
    max_minutes: float | None = None
    """Stop after the epoch during which this many minutes have passed."""


# The options that no weight depends on.
FREE = {"resume", "checkpoint_every", "keep_checkpoints", "max_minutes"}


class Stop:
    """Whether Ctrl-C or SIGTERM has come, which is asked between steps; a second one ends at once.

    Args:
        max_minutes: after which `late` is true.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._signal: int | None = None
        self._minutes = max_minutes
        self._start = time.perf_counter()

    def __enter__(self) -> Stop:
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return any_of(self._signal is not None)

    @property
    def late(self) -> bool:
        minutes = (time.perf_counter() - self._start) / 60
        return any_of(self._minutes is not None and minutes > self._minutes)

    def leave(self, where: str) -> None:
        """Say how to go on, and exit as a process does that a signal has ended, if one has come."""
        if first():
            print(f"stopped {where}; the same command with --resume auto goes on", flush=True)
        if self._signal is not None:
            sys.exit(128 + self._signal)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        print("\nstopping after this step; once more ends at once", file=sys.stderr, flush=True)


@contextmanager
def interruptible() -> Iterator[None]:
    """Where there is no step to finish, Ctrl-C ends with a sentence, too."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume auto goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


class Epochs(Protocol):
    epoch: int


def saved(
    run: Epochs,
    loop: Callable[[Stop], Iterator[Result]],
    state: Callable[[], State],
    *,
    checkpoints: Checkpoints,
    every: int,
    stop: Stop,
) -> Iterator[Result]:
    """What the loop yields after each epoch, once a checkpoint is written where one is due.

    Of several processes all take part in making the state, and one writes it.
    """

    def save() -> None:
        content = state()
        if first():
            checkpoints.save(content, run.epoch)

    due = True
    for result in loop(stop):
        late = stop.late
        due = late or run.epoch % every == 0
        if due:
            save()
        yield result
        if late:
            return
    if stop() or not due:
        save()


def found(checkpoints: Checkpoints, resume: Path | str | None, keys: set[str]) -> State | None:
    """The state to go on from, which a script knows by its keys; None at the start.

    Raises:
        FileNotFoundError, ValueError: no such file, a damaged one or one of something else; or a run that would
            start over among the checkpoints of another.
    """
    if resume is None:
        if checkpoints.files():
            raise ValueError(
                f"expected --resume auto or another --out, got {str(checkpoints.folder)!r} with the "
                f"checkpoints of an unfinished run"
            )
        return None
    read = checkpoints.latest() if resume == "auto" else Checkpoints.read(resume)
    if read is None:
        return None
    if read[1].keys() != keys:
        place = checkpoints.files()[-1] if resume == "auto" else resume
        raise ValueError(f"expected a checkpoint of this script, got {str(place)!r}")
    return read[1]


def clear(folder: Path) -> None:
    """Delete the checkpoints of a run, or of its parts: the results are written."""
    for place in [*folder.iterdir(), folder]:
        if place.is_dir():
            Checkpoints(place).clear()


def check_options(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse to go on with other options.

    Raises:
        ValueError: the options that differ.
    """
    differing = [name for name in ours if theirs.get(name) != ours[name]]
    if differing:
        raise ValueError(
            "expected the options that the checkpoint was made with, got others for "
            f"{', '.join('--' + name.replace('_', '-') for name in differing)}"
        )


def check(options: Options) -> None:
    """Refuse numbers that make no sense.

    Raises:
        ValueError: one below 1.
    """
    for name in ("checkpoint_every", "keep_checkpoints"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"expected --{name.replace('_', '-')} of at least 1, got {getattr(options, name)}"
            )
