"""A program that kills the quickstart at random moments, lets it go on, and compares what came of it.

    python -m tests.benchmarks.kills --kills 50 --out kills

A kill is as likely at any moment as at any other: while modules load, the teacher is trained, a checkpoint is
written, the student is distilled, or both are attacked. Run after run is begun, each with the next seed, until
there were as many kills as asked for; then the last one is left alone, and so is one run beside each.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ferdlib.evaluation import RobustnessReport
from ferdlib.trainer import Checkpoints

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Args:
    """Kill the quickstart, and say whether its results are those of a run that nobody disturbed."""

    out: Path
    """New folder for the runs."""
    kills: int = 50
    """Number of kills."""
    mean_seconds: float = 30.0
    """Mean of the exponential time from the start of a run to its kill."""


def environment() -> dict[str, str]:
    """Make runs the same bit for bit."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def kill(run: subprocess.Popen[str], folder: Path) -> int:
    """Kill a run, and count the checkpoints under its folder that cannot be read."""
    run.kill()
    run.communicate()
    assert run.returncode == -signal.SIGKILL, f"it ended by itself: {run.returncode}"
    unreadable = 0
    for path in folder.rglob("checkpoint-*.pt"):
        try:
            Checkpoints.read(path)
        except ValueError:
            unreadable += 1
    return unreadable


def start(out: Path, seed: int, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ferdlib", "quickstart"]
    command += ["--out", str(out), "--seed", str(seed), *options]
    with (out.parent / f"{out.name}.log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(command, env=environment(), stdout=log, stderr=log, text=True)


def place(out: Path) -> str:
    """Name the newest checkpoint of a run."""
    found = sorted(out.rglob("checkpoint-*.pt"), key=lambda path: path.stat().st_mtime)
    return str(found[-1].relative_to(out / "checkpoints")) if found else "no checkpoint"


def same_results(one: Path, other: Path) -> bool:
    """Compare the students bit for bit, and every prediction of the reports."""
    students = [torch.load(out / "student.pt")["state_dict"] for out in (one, other)]
    return students[0].keys() == students[1].keys() and all(
        [
            *(torch.equal(students[0][key], students[1][key]) for key in students[0]),
            *(
                RobustnessReport.load(one / name) == RobustnessReport.load(other / name)
                for name in ("report-teacher.json", "report-FERD.json")
            ),
        ]
    )


def main(args: Args) -> None:
    args.out.mkdir(parents=True)
    draw, kills, unreadable, same = random.Random(0), 0, 0, True
    for seed in itertools.count():
        straight, killed = args.out / f"straight-{seed}", args.out / f"killed-{seed}"
        assert start(straight, seed).wait() == 0, f"see {straight}.log"
        while True:
            run, begun = start(killed, seed, "--resume", "auto"), time.perf_counter()
            left = kills < args.kills
            try:
                code = run.wait(draw.expovariate(1 / args.mean_seconds) if left else None)
            except subprocess.TimeoutExpired:
                unreadable += kill(run, killed)
                kills += 1
                seconds = time.perf_counter() - begun
                print(
                    f"seed {seed}, kill {kills} after {seconds:.1f} s: {place(killed)}", flush=True
                )
            else:
                assert code == 0, f"see {killed}.log"
                break
        equal = same_results(straight, killed)
        same = same and equal
        print(f"seed {seed}: {'the same' if equal else 'OTHER'} student and reports", flush=True)
        if kills == args.kills:
            break
    print(f"{kills} kills in {seed + 1} runs, {unreadable} unreadable files")
    sys.exit(unreadable > 0 or not same)


if __name__ == "__main__":
    main(tyro.cli(Args))
