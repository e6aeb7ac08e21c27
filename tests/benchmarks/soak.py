"""A program that trains, saves, reads, attacks and evaluates again and again, and watches what it holds.

    python -m tests.benchmarks.soak --minutes 60

Memory that grows by a little each time ends a run of days. After each cycle the resident memory, the live tensors,
the open files and the threads are written down; the first quarter, in which caches fill, does not count. Nothing
is traced anew within it: torch.fx keeps the source of each trace, a kilobyte, for as long as the process lives.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from sklearn.datasets import load_digits

from ferdlib.attacks import cw_linf
from ferdlib.evaluation import RobustnessReport, evaluate
from ferdlib.methods import build_method
from ferdlib.trainer import Checkpoints, FERDConfig, FERDTrainer

from ..tiny_ferd import SIZES, make_models

PRESETS = (FERDConfig, FERDConfig.paper, FERDConfig.released)
SETTINGS = SIZES | {
    "epochs": 10**6,
    "warmup_epochs": 1,
    "generator_steps": 5,
    "bottleneck_steps": 5,
}
SETTINGS |= {"student_steps": 10, "batch_size": 24, "pool_capacity": 48}


@dataclass(frozen=True)
class Args:
    """Run cycles for a time, and say whether memory grew."""

    minutes: float = 60.0
    """Length of the run."""
    cycles: int | None = None
    """Number of cycles; None runs as many as there is time for."""
    out: Path | None = None
    """A JSON file for what was held after each cycle."""
    allowed: float = 8.0
    """Growth per hour that passes, in MiB."""


@dataclass(frozen=True)
class Held:
    """Resources held after a cycle, in MiB and counts."""

    seconds: float
    resident: float
    tensors: int
    files: int
    threads: int


def cycles(folder: Path) -> Iterator[None]:
    """In turn an epoch of a run of FERD, saved, read back and evaluated, and an epoch on labelled images."""
    runs = [
        FERDTrainer(*make_models(), config=preset(**SETTINGS), seed=k)
        for k, preset in enumerate(PRESETS)
    ]
    bunch = load_digits()
    x = torch.tensor(bunch.images[:60], dtype=torch.float32)[:, None] / 16
    y = torch.tensor(bunch.target[:60]) % 3
    teacher, student = make_models()
    method = build_method("fair-iad", 3, teacher=teacher, steps=3)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    for trainer in itertools.cycle(runs):
        next(trainer.epochs())
        checkpoints.save(trainer.state_dict(), trainer.epoch)
        latest = checkpoints.latest()
        assert latest is not None
        trainer.load_state_dict(latest[1])
        checkpoints.clear()
        for index in torch.arange(60).split(20):
            x_adv = method.attack(student, x[index], y[index])
            optimizer.zero_grad()
            method.loss(student, x[index], x_adv, y[index]).mean().backward()
            optimizer.step()
        method.end_epoch()
        cw_linf(student, x, y, steps=3)
        report = evaluate(trainer.student, (x, y), "quick", num_classes=3)
        report.save(folder / "report.json")
        assert RobustnessReport.load(folder / "report.json") == report
        yield


def held(start: float) -> Held:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return Held(
        seconds=time.perf_counter() - start,
        resident=pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        tensors=sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        files=len(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
    )


def soak(args: Args) -> list[Held]:
    found, start = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for _ in itertools.islice(cycles(Path(folder)), args.cycles):
            found.append(held(start))
            if found[-1].seconds > 60 * args.minutes:
                break
    return found


def growth(found: list[Held]) -> float:
    """MiB per hour by least squares, after the first quarter."""
    counted = found[len(found) // 4 :]
    hours = torch.tensor([one.seconds for one in counted], dtype=torch.float64) / 3600
    resident = torch.tensor([one.resident for one in counted], dtype=torch.float64)
    hours = hours - hours.mean()
    return float((hours * (resident - resident.mean())).sum() / hours.square().sum())


def main(args: Args) -> None:
    logging.getLogger("ferdlib").setLevel(logging.ERROR)  # runs so small collapse, and say so
    found = soak(args)
    if args.out is not None:
        args.out.write_text(json.dumps([asdict(one) for one in found]), "utf-8")
    slope, middle, last = growth(found), found[len(found) // 4], found[-1]
    print(f"{len(found)} cycles in {last.seconds / 60:.0f} minutes; growth {slope:.2f} MiB an hour")
    for name in ("resident", "tensors", "files", "threads"):
        print(
            f"{name}: {getattr(middle, name):.6g} after a quarter, {getattr(last, name):.6g} at the end"
        )
    same = all(getattr(middle, name) == getattr(last, name) for name in ("files", "threads"))
    sys.exit(slope > args.allowed or not same)


if __name__ == "__main__":
    main(tyro.cli(Args))
