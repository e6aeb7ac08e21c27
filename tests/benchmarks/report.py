"""What was measured, where and with what: as JSON, and as Markdown for people."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections import Counter
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import select_unit

import ferdlib

from .harness import Goal, Result, Settings, Spread

PACKAGES = ("numpy", "torchattacks", "foolbox", "pyautoattack")


@dataclass(frozen=True)
class Report:
    """Results of groups that ran one after the other under the same settings."""

    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    results: tuple[Result, ...]

    @classmethod
    def of(cls, settings: Settings, results: tuple[Result, ...]) -> Report:
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine(settings.device),
            versions=versions(),
            # The command line's own options are no circumstance of the measurement.
            settings={f.name: getattr(settings, f.name) for f in fields(Settings)},
            results=results,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        content = json.loads(text)
        results = tuple(
            Result(**result | {"goals": tuple(Goal(**goal) for goal in result["goals"])})
            for result in content.pop("results")
        )
        return cls(**content, results=results)

    def to_markdown(self) -> str:
        verdicts = Counter(goal.verdict(r.times) for r in self.results for goal in r.goals)
        counts = ", ".join(f"{verdicts[v]} {v}" for v in ("met", "missed", "not measured"))
        facts = (
            ("machine", self.machine),
            ("versions", self.versions),
            ("settings", self.settings),
        )
        lines = [
            "# Benchmarks",
            "",
            f"Goals: {counts}.",
            "",
            f"- date: {self.date}",
            *(
                f"- {name}: {', '.join(f'{k} {v}' for k, v in fact.items())}"
                for name, fact in facts
            ),
            "",
            "Medians over the rounds, with the quartiles in brackets; a goal is judged by the medians, and its",
            "quartiles are those of the single rounds.",
        ]
        return "\n".join(lines + [line for r in self.results for line in _section(r)]) + "\n"


def _section(result: Result) -> list[str]:
    found = {name: Spread.of(times) for name, times in result.times.items()}
    unit, scale = select_unit(min((spread.median for spread in found.values()), default=1.0))
    rows = [f"| {name} | {_shown(spread, scale)} |" for name, spread in found.items()]
    rows += [f"| {name} | skipped: {why} |" for name, why in result.skipped.items()]
    lines = ["", f"## {result.group}", "", result.about]
    lines += ["", result.note] if result.note else []
    lines += ["", f"| competitor | {unit} |", "|---|---|", *rows]
    if result.goals:
        lines += ["", "| goal | measured | |", "|---|---|---|"]
    for goal in result.goals:
        spread, verdict = goal.measured(result.times), goal.verdict(result.times)
        measured = "" if spread is None else _shown(spread) + goal.unit
        lines.append(f"| {goal} | {measured} | {verdict} |")
    return lines


def _shown(spread: Spread, scale: float = 1.0) -> str:
    median, low, high = (f"{value / scale:.3f}" for value in spread)
    return f"{median} [{low}, {high}]"


def machine(device: str) -> dict[str, Any]:
    found = {"platform": platform.platform(), "cpu": cpu_model(), "cores": os.cpu_count()}
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def cpu_model() -> str:
    """Linux' name of the processor; elsewhere Python's, which says less."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "ferdlib": ferdlib.__version__}
    found["torch"] = str(torch.__version__)  # unlike the package's number, it tells the build
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
