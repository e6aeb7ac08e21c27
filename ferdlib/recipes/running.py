"""Runs of hours: checkpoints that they continue from, signals and time limits that stop them, progress bars."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from tqdm import tqdm

from ferdlib.checkpoints import Checkpoints
from ferdlib.distributed import Ranks, check_same, gather
from ferdlib.recipes import Stopped
from ferdlib.recipes.options import RunOptions

KEYS = {"settings", "run"}
# Options that no weight depends on. Models from files enter the settings by their digests.
FREE = {"out", "resume", "checkpoint_every", "keep_checkpoints", "max_minutes", "tensorboard"}
FREE |= {"device", "root", "download", "test_images", "autoattack", "measure"}
FREE |= {"teacher", "natural_teacher", "teacher_architecture"}


class Run(Protocol):
    """A training that can be continued, and knows how many epochs it has done."""

    epoch: int

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Session:
    """The runs of one command, such as a teacher's and a student's, with their checkpoints under `out`.

    Within the block, Ctrl-C and SIGTERM stop a run after its epoch; a second one ends the process at once.
    """

    def __init__(self, options: RunOptions) -> None:
        for name in ("checkpoint_every", "keep_checkpoints"):
            if getattr(options, name) < 1:
                raise ValueError(
                    f"expected {flag(name)} of at least 1, got {getattr(options, name)}"
                )
        self.options = options
        self._signal: int | None = None
        self._start = time.perf_counter()

    def __enter__(self) -> Session:
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._handlers = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        for each in self._handlers:
            signal.signal(each, signal.SIG_DFL)
        print("\nstopping after this epoch; once more ends at once", file=sys.stderr, flush=True)

    def checkpoints(self, name: str) -> Checkpoints:
        """Checkpoints of a run by its name."""
        folder = self.options.out / "checkpoints" / name
        return Checkpoints(folder, keep=self.options.keep_checkpoints)

    def resume(self, run: Run, name: str, settings: Mapping[str, Any]) -> None:
        """Continue a run from its newest checkpoint, if --resume says so and there is one."""
        checkpoints = self.checkpoints(name)
        if self.options.resume is None and checkpoints.files():
            raise ValueError(
                f"expected --resume auto or another --out, got {str(checkpoints.folder)!r} with the checkpoints "
                f"of an unfinished run"
            )
        found = checkpoints.latest()
        # A process on another machine may see another folder, or have been given other options.
        step = None if found is None else found[0]
        check_same(**{flag(key): value for key, value in settings.items()}, checkpoints=step)
        if found is None:
            return
        if found[1].keys() != KEYS:
            raise ValueError(
                f"expected a checkpoint of this command, got {str(checkpoints.files()[-1])!r}"
            )
        theirs = found[1]["settings"]
        differing = [flag(each) for each in settings if theirs.get(each) != settings[each]]
        # Other images follow from another seed, too.
        differing = [each for each in differing if each != "--root"] or differing
        if differing:
            raise ValueError(
                f"expected the options that the checkpoint was made with, got others for {', '.join(differing)}"
            )
        run.load_state_dict(found[1]["run"])

    def finish(
        self,
        run: Run,
        name: str,
        settings: Mapping[str, Any],
        *,
        title: str,
        epochs: Iterator[Any],
        total: int,
        figures: Callable[[Any], dict[str, float]],
    ) -> None:
        """Take a run to its last epoch, with checkpoints and a bar.

        `settings` is everything that its weights depend on, `epochs` trains one of `total` epochs at each step,
        and `figures` gives an epoch's numbers, of which the bar shows those without a slash in their names. A
        signal, or time that is over, ends it with `Stopped`.
        """
        checkpoints, first = self.checkpoints(name), Ranks.here().first
        log = self._scalars(name) if self.options.tensorboard and first else None
        shown = {"desc": title, "unit": "epoch", "disable": not first, "dynamic_ncols": True}
        with tqdm(total=total, initial=run.epoch, **shown) as bar:
            for result in epochs:
                values = figures(result)
                bar.set_postfix(
                    {k: f"{v:.3g}" for k, v in values.items() if "/" not in k}, refresh=False
                )
                bar.update()
                if log is not None:
                    log(values, run.epoch)
                late, stopped = self._limits()
                if (
                    late
                    or stopped
                    or run.epoch in {total, *range(0, total, self.options.checkpoint_every)}
                ):
                    # All processes take part in making the state, and one writes it.
                    state = {"settings": dict(settings), "run": run.state_dict()}
                    if first:
                        checkpoints.save(state, run.epoch)
                    # However long the disk takes.
                    gather(None)
                if stopped or (late and run.epoch < total):
                    status = 128 + self._signal if self._signal else 0
                    raise Stopped(f"after epoch {run.epoch} of {total} of {title}", status)

    @contextmanager
    def results(self) -> Iterator[None]:
        """Write results in the block; where that fails, say where the work of hours lies."""
        try:
            yield
        except OSError as error:
            folder = self.options.out / "checkpoints"
            raise OSError(
                f"expected to write the results to {str(self.options.out)!r}, got {error}; the checkpoints in "
                f"{str(folder)!r} stay: make room, and give the command again with --resume auto"
            ) from error

    def clear(self) -> None:
        """Delete all checkpoints: the results are written."""
        folder = self.options.out / "checkpoints"
        if Ranks.here().first and folder.is_dir():
            for place in [*folder.iterdir(), folder]:
                Checkpoints(place).clear()

    def _limits(self) -> tuple[bool, bool]:
        """Report whether the time is over, and whether a signal has come, on any process."""
        limit, minutes = self.options.max_minutes, (time.perf_counter() - self._start) / 60
        late, ranks = limit is not None and minutes > limit, Ranks.here()
        return ranks.anywhere(late), ranks.anywhere(self._signal is not None)

    def _scalars(self, name: str) -> Callable[[dict[str, float], int], None]:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.options.out / "tensorboard" / name))

        def log(values: dict[str, float], epoch: int) -> None:
            for figure, value in values.items():
                writer.add_scalar(figure, value, epoch)
            writer.flush()

        return log


def settings_of(options: Any) -> dict[str, Any]:
    """Options that the weights depend on, groups laid flat."""
    found: dict[str, Any] = {}
    for name, value in vars(options).items():
        found |= asdict(value) if is_dataclass(value) else {name: value}  # type: ignore[arg-type]
    return {name: value for name, value in found.items() if name not in FREE}


def device(name: str) -> str:
    """Choose the device that `auto` stands for."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    torch.empty(0, device=name)
    return name


def flag(name: str) -> str:
    """Write an option's name as the command line does."""
    return f"--{name.replace('_', '-')}"


def command(name: str, **options: object) -> str:
    """Write a command with its options, but for those that are None, as a shell takes it."""
    given = [[flag(each), str(value)] for each, value in options.items() if value is not None]
    return shlex.join(["ferdlib", name, *(word for pair in given for word in pair)])


def check_ball(**options: float | None) -> None:
    """Refuse a radius or a step that is no share of the image range, such as 8 for 8/255."""
    for name, value in options.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(
                f"expected {flag(name)} in units of [0, 1] pixels, such as 8/255 = 0.0314, got {value}"
            )


def written(folder: Path, *names: str) -> str:
    """Say what was written."""
    return f"written to {folder}/: {', '.join(names)}"
