"""Runs that are stopped or killed: what goes on is the same run, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from tiny_ferd import SIZES, make_models, same
from tiny_ferd import make_trainer as tiny_trainer

from ferdlib.methods import METHODS, RULES, build_method
from ferdlib.trainer import Checkpoints, FERDConfig, FERDTrainer

ROOT = Path(__file__).parents[1]
TINY = SIZES | {
    "epochs": 3,
    "warmup_epochs": 1,
    "generator_steps": 2,
    "bottleneck_steps": 2,
    "student_steps": 4,
}
make_trainer = partial(tiny_trainer, TINY)


def through_a_file(state, tmp_path):
    Checkpoints(tmp_path, keep=1).save(state, 0)
    return Checkpoints(tmp_path).latest()[1]


def assert_resuming_is_exact(make, tmp_path):
    """Stop after two of three epochs, and compare what goes on with a run that was not stopped."""
    straight, stopped, resumed = make(), make(), make(seed=9)
    expected, loop = straight.fit(), stopped.epochs()
    begun = [next(loop), next(loop)]
    state = stopped.state_dict()
    begun += loop  # what comes after the copy was taken does not reach it
    resumed.load_state_dict(through_a_file(state, tmp_path))
    assert resumed.epoch == 2
    rest = resumed.fit()
    assert same(resumed.state_dict(), straight.state_dict())
    assert same(stopped.state_dict(), straight.state_dict())
    for mine, theirs in zip([*begun, *rest], [*expected, expected[-1]], strict=True):
        names = [name for name in mine.__slots__ if name != "seconds"]
        assert same(*([getattr(s, name) for name in names] for s in (mine, theirs)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preset": FERDConfig.paper},
        {"preset": FERDConfig.released},
        {"precision": "bfloat16"},
        {"pool_capacity": 20, "pool_dtype": "uint8"},
        {"augment": "none", "cache_teacher_logits": "images"},
        {"schedule": "constant", "conditional_generator": True, "margin_images": "last"},
        {"reweighting": "lps_power", "absent_classes": "neutral", "fold_batchnorm": False},
        {"student_optimizer": partial(torch.optim.Adam, lr=0.01)},
    ],
    ids=lambda changes: next(iter(changes), "default"),
)
def test_a_run_that_stops_between_two_epochs_goes_on_exactly(changes, tmp_path):
    assert_resuming_is_exact(partial(make_trainer, **changes), tmp_path)


@pytest.mark.parametrize("name", [*METHODS, *(f"{rule}-ard" for rule in RULES), "own generator"])
def test_every_method_goes_on_exactly(name, tmp_path):
    def make(seed=0):
        teacher, student = make_models()
        own = torch.Generator().manual_seed(seed) if name == "own generator" else None
        called = "fair-rslad" if own else name
        teachers = {"teacher": teacher, "natural_teacher": teacher}
        wanted = METHODS[called.rpartition("-")[2]].__dataclass_fields__
        given = {key: model for key, model in teachers.items() if key in wanted}
        method = build_method(called, 3, **given, rng=own)
        if hasattr(method.rule, "begin"):
            method.rule.begin = 1
        x = torch.tensor(load_digits().images[:12], dtype=torch.float32)[:, None] / 16
        held_out = [(x, torch.arange(12) % 3)] if method.needs_validation else None
        config = FERDConfig(**TINY | {"warmup_epochs": 0})
        return FERDTrainer(
            teacher, student, config=config, method=method, validation=held_out, seed=seed
        )

    assert_resuming_is_exact(make, tmp_path)


class Several:
    """A source of three batches in an epoch, with a generator of its own."""

    def __init__(self, seed=0):
        self.metrics, self.rng = {}, torch.Generator().manual_seed(seed)

    def epoch(self, student, class_probabilities):
        for _ in range(3):
            yield torch.rand(6, 1, 8, 8, generator=self.rng), torch.arange(6) % 3

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_another_source_goes_on_exactly(tmp_path):
    assert_resuming_is_exact(lambda seed=0: make_trainer(source=Several(seed), seed=seed), tmp_path)


def test_a_source_without_a_generator_gets_one_of_the_seed():
    source = Several()
    source.rng = None
    trainer = make_trainer(source=source)
    state = torch.get_rng_state()
    trainer.fit()
    assert torch.equal(torch.get_rng_state(), state)


# A pool that has lost a label.
LOST = {"columns": {"images": torch.rand(6, 1, 8, 8), "labels": torch.arange(5)}, "added": 6}


def test_an_epoch_that_was_interrupted_has_no_state(caplog):
    trainer, calls = make_trainer(), []
    attack = trainer.method.attack

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return attack(*arguments)

    start = trainer.state_dict()
    trainer.method.attack = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    with pytest.raises(
        RuntimeError, match=r"^FERDTrainer.state_dict: expected .* within epoch 2; go"
    ):
        trainer.state_dict()
    trainer.load_state_dict(start)
    assert same(trainer.state_dict(), start)
    assert [stats.epoch for stats in trainer.epochs()] == [1, 2, 3]
    assert "begins again" not in caplog.text


@cache
def states():
    return make_trainer().state_dict(), make_trainer(source=Several()).state_dict()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda own, other: {"weights": 1}, "`state` as `state_dict` returned it"),
        (lambda own, other: other, "random generators of trainer, got those of trainer, source"),
        (
            lambda own, other: own | {"config": own["config"] | {"gamma": 0.1, "eps": 0.2}},
            "the same config, got other values for eps, gamma$",
        ),
        (
            lambda own, other: own | {"student": make_models()[0].state_dict()},
            r"the same student architecture, got .*fc\.weight",
        ),
        *(
            (
                lambda own, other, key=key: own | {key: torch.full((4,), 0.25)},
                rf"`{key}` of shape \(3,\), got \(4,\)",
            )
            for key in ("class_probabilities", "statistic")
        ),
        *(
            (lambda own, other, change=change: own | change, words)
            for change, words in [
                ({"epoch": -1}, r"`epoch` in 0\.\.3, got -1"),
                ({"epoch": "one"}, "`epoch` of type int, got str 'one'"),
                ({"config": []}, "`config` of type dict, got list"),
                ({"statistic": torch.ones(3)}, "`statistic` a float64 tensor .*, got a float32"),
                ({"rng": {"trainer": torch.ones(3)}}, r"`trainer` of shape \(\d+,\), got \(3,\)"),
                (
                    {"student_optimizer": {"param_groups": []}},
                    r"of \[\d+\] parameters .*, got \[\]",
                ),
                ({"pool": {"columns": {}, "added": 6}}, "`state` of 6 images in float32 .* none"),
                ({"pool": LOST}, "`state` of 6 images in float32 .* int64 tensor of shape .5,"),
            ]
        ),
        (lambda own, other: own | {"method": {"epoch": 3}}, ""),
        (lambda own, other: own | {"source": own["source"] | {"more": 1}}, ""),
    ],
)
def test_another_state_is_refused_and_nothing_is_loaded(make, words):
    trainer = make_trainer()
    next(trainer.epochs())
    before = trainer.state_dict()
    who = "FERDTrainer" if words else "(FERDDistillation|Inversion)"
    with pytest.raises(ValueError, match=rf"^{who}\.load_state_dict: expected .*{words}"):
        trainer.load_state_dict(make(*states()))
    assert same(trainer.state_dict(), before)


def started(folder, epochs):
    program = str(ROOT / "tests" / "long_run_program.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, program, str(folder), str(epochs)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_a_run_that_is_killed_twice_is_the_undisturbed_one(tmp_path):
    epochs, draw = 8, random.Random(0)
    (tmp_path / "straight").mkdir()
    straight = started(tmp_path / "straight", epochs)
    for _ in range(2):
        run = started(tmp_path / "killed", epochs)
        for _ in range(draw.randint(1, 3)):
            assert run.stdout.readline(), "it ended by itself"
        time.sleep(draw.uniform(0, 0.1))
        run.kill()
        run.communicate()
        assert run.returncode == -signal.SIGKILL
        for path in (tmp_path / "killed").rglob("checkpoint-*.pt"):
            Checkpoints.read(path)
    for run in (straight, started(tmp_path / "killed", epochs)):
        run.communicate()
        assert run.returncode == 0
    assert same(*(torch.load(tmp_path / name / "student.pt") for name in ("straight", "killed")))
