"""The benchmarks' harness on toys: who runs when, what the numbers are, and that a miss is shown."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import attacks, early_stop, harness
from benchmarks.harness import Goal, Group, Prepared, Settings, Spread
from benchmarks.report import Report

from ferdlib.models import small_cnn

ROOT = Path(__file__).parents[1]

# Seconds: the warm-up, and three rounds.
DURATIONS = {
    "ours": (50.0, 1.0, 3.0, 2.0),
    "theirs": (70.0, 2.0, 6.0, 8.0),
    "bare": (90.0, 1.0, 1.0, 4.0),
}
GOALS = (
    Goal("theirs", "/", "ours", ">=", 2.5),
    Goal("ours", "/", "bare", "<=", 1.5),
    Goal("ours", "-", "bare", "<=", 0.9),
    Goal("absent", "/", "ours", ">=", 1.0),
)


class Toy:
    """Competitors that take the time they are told, by a clock of their own."""

    def __init__(self, durations=DURATIONS):
        self.now = 0.0
        self.log = []
        self.left = {name: iter(values) for name, values in durations.items()}

    def clock(self):
        return self.now

    def competitor(self, name):
        def run():
            self.now += next(self.left[name])
            self.log.append(name)
            return name

        return run

    def group(self, **changes):
        competitors = {name: self.competitor(name) for name in self.left}
        prepared = Prepared(competitors, skipped={"absent": "No module named 'absent'"}, **changes)
        return Group("Toys.", GOALS, lambda settings: prepared)


@pytest.fixture
def result():
    toy = Toy()
    group = toy.group(note="A note.", check=lambda outcomes: f"{len(outcomes)} checked.")
    return harness.run("toy", group, Settings(rounds=3), clock=toy.clock)


def test_rounds_are_interleaved_and_rotate_after_an_untimed_run():
    toy = Toy()
    result = harness.run("toy", toy.group(), Settings(rounds=3), clock=toy.clock)
    assert [toy.log[k : k + 3] for k in range(0, 12, 3)] == [
        ["ours", "theirs", "bare"],
        ["ours", "theirs", "bare"],
        ["theirs", "bare", "ours"],
        ["bare", "ours", "theirs"],
    ]
    assert result.times == {name: list(values[1:]) for name, values in DURATIONS.items()}


def test_numbers_worked_out_by_hand(result):
    assert Spread.of(result.times["ours"]) == (2.0, 1.5, 2.5)
    assert Spread.of([4.0, 1.0]) == (2.5, 1.75, 3.25)
    # Medians 6 and 2; round by round 2, 2 and 4.
    assert GOALS[0].measured(result.times) == (3.0, 2.0, 3.0)
    # Medians 2 and 1; round by round 0, 2 and -2.
    assert GOALS[2].measured(result.times) == (1.0, -1.0, 1.0)


def test_a_miss_is_a_miss(result):
    assert [goal.verdict(result.times) for goal in GOALS] == [
        "met",
        "missed",
        "missed",
        "not measured",
    ]
    at = replace(GOALS[1], limit=2.0)
    assert at.verdict(result.times) == "met"
    assert replace(at, comparison=">=", limit=2.01).verdict(result.times) == "missed"


def test_the_table_hides_nothing(result):
    text = Report.of(Settings(rounds=3), (result,)).to_markdown()
    assert "Goals: 1 met, 2 missed, 1 not measured." in text
    assert text[text.index("## toy") :] == (
        "## toy\n"
        "\n"
        "Toys.\n"
        "\n"
        "A note. 3 checked.\n"
        "\n"
        "| competitor | s |\n"
        "|---|---|\n"
        "| ours | 2.000 [1.500, 2.500] |\n"
        "| theirs | 6.000 [4.000, 7.000] |\n"
        "| bare | 1.000 [1.000, 2.500] |\n"
        "| absent | skipped: No module named 'absent' |\n"
        "\n"
        "| goal | measured | |\n"
        "|---|---|---|\n"
        "| theirs / ours >= 2.5 | 3.000 [2.000, 3.000] | met |\n"
        "| ours / bare <= 1.5 | 2.000 [0.750, 2.000] | missed |\n"
        "| ours - bare <= 0.9 s | 1.000 [-1.000, 1.000] s | missed |\n"
        "| absent / ours >= 1 |  | not measured |\n"
    )


def test_competitors_that_cannot_be_built_are_named():
    def missing():
        from ferdlib import no_such_name

        return no_such_name

    competitors, skipped = harness.available({"there": lambda: len, "missing": missing})
    assert competitors == {"there": len}
    assert list(skipped) == ["missing"]
    assert "no_such_name" in skipped["missing"]


def test_json_round_trip(result):
    report = Report.of(Settings(rounds=3), (result,))
    assert Report.from_json(report.to_json()) == report
    content = json.loads(report.to_json())
    assert content["results"][0]["times"]["theirs"] == [2.0, 6.0, 8.0]
    assert content["machine"]["cpu"]
    assert content["versions"]["torch"] == torch.__version__
    assert content["settings"]["threads"] == 2


def test_results_that_differ_stop_the_group_before_the_timing():
    toy = Toy()
    same, other = torch.tensor([3, 1]), torch.tensor([3, 2])
    full, early = early_stop.LPS_FULL, early_stop.LPS_EARLY
    flags = dict.fromkeys((early_stop.ANY_FULL, early_stop.ANY_EARLY), same)
    early_stop.check(flags | {full: same, early: same.clone()})
    group = toy.group(check=lambda _: early_stop.check(flags | {full: same, early: other}))
    with pytest.raises(AssertionError, match="disagree"):
        harness.run("toy", group, Settings(), clock=toy.clock)
    assert len(toy.log) == len(DURATIONS)


def test_the_command_writes_both_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "GROUPS", {"toy": Toy().group(), "toy again": Toy().group()})
    command.main(command.Args(rounds=2, threads=1, out=tmp_path / "new"))
    markdown = (tmp_path / "new" / "benchmarks.md").read_text("utf-8")
    assert markdown in capsys.readouterr().out
    report = Report.from_json((tmp_path / "new" / "benchmarks.json").read_text("utf-8"))
    assert report.to_markdown() == markdown
    assert [result.group for result in report.results] == ["toy", "toy again"]
    assert {len(times) for r in report.results for times in r.times.values()} == {2}
    assert "out" not in report.settings
    with pytest.raises(SystemExit, match="expected --only of toy, toy again, got attacks"):
        command.main(command.Args(only=("attacks",)))
    with pytest.raises(SystemExit, match="--rounds"):
        command.main(command.Args(rounds=0))


def test_the_list_names_every_group_and_goal(tmp_path):
    program = [sys.executable, "-m", "tests.benchmarks", "--list", "--out", str(tmp_path / "none")]
    run = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for name, group in command.GROUPS.items():
        assert f"{name}: {group.about}\n" in run.stdout
        assert all(f"goal: {goal}\n" in run.stdout for goal in group.goals)
    assert not (tmp_path / "none").exists()


def test_the_attacks_run_and_their_goals_are_measured(monkeypatch):
    """A goal with a wrong name would pass for one whose competitor could not run."""
    monkeypatch.setattr(attacks, "resnet18", lambda classes: small_cnn(3, classes, width=2))
    monkeypatch.setattr(torch, "compile", lambda model, mode: model)  # takes longer than the rest
    result = harness.run("attacks", attacks.GROUP, Settings(rounds=1, batch_size=2))
    assert result.skipped == {}
    assert all(goal.measured(result.times) for goal in result.goals)
