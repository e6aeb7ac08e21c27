"""Time ferdlib beside plain PyTorch and the libraries that people use, from the repository's root.

    python -m tests.benchmarks --list
    python -m tests.benchmarks --only attacks import
    python -m tests.benchmarks --device cuda --channels-last --out runs/benchmarks-gpu

The table is printed and written, with all times in the JSON file beside it. AutoAttack takes minutes a run
on a CPU, and each of its two competitors runs ten times.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from . import attacks, autoattack, early_stop, ferd, growth, imports
from .harness import Settings, run
from .report import Report

GROUPS = {
    "attacks": attacks.GROUP,
    "early-stop": early_stop.GROUP,
    "autoattack": autoattack.GROUP,
    "ferd": ferd.GROUP,
    "import": imports.GROUP,
    "growth": growth.GROUP,
}


@dataclass(frozen=True)
class Args(Settings):
    """Time ferdlib beside plain PyTorch and the libraries that people use."""

    only: tuple[str, ...] = ()
    """Groups to run; none named runs all."""
    list: bool = False
    """Print the groups and their goals, and stop."""
    out: Path = Path("runs/benchmarks")
    """Folder for benchmarks.json and benchmarks.md."""


def main(args: Args) -> None:
    if unknown := set(args.only) - set(GROUPS):
        sys.exit(f"benchmarks: expected --only of {', '.join(GROUPS)}, got {', '.join(unknown)}")
    if args.rounds < 1:
        sys.exit(f"benchmarks: expected --rounds of 1 and up, got {args.rounds}")
    chosen = args.only or tuple(GROUPS)
    if args.list:
        for name in chosen:
            print(f"{name}: {GROUPS[name].about}", *GROUPS[name].goals, sep="\n    goal: ")
        return
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report.of(args, ())
    for name in chosen:
        print(f"benchmarks: {name}", file=sys.stderr, flush=True)
        report = Report.of(args, (*report.results, run(name, GROUPS[name], args)))
        # Now and not at the end: a group takes long, and a later one may fail.
        (args.out / "benchmarks.json").write_text(report.to_json(), "utf-8")
        (args.out / "benchmarks.md").write_text(report.to_markdown(), "utf-8")
    print(report.to_markdown())


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m tests.benchmarks"))
