"""Runs that are stopped, killed or short of disk: what was saved stays, and what goes on is the same run."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import tyro
from kills import environment, kill
from sklearn.datasets import load_digits
from tiny_ferd import SIZES, make_models, same
from tiny_ferd import make_trainer as tiny_trainer

from ferdlib.methods import METHODS, build_method
from ferdlib.models import load_checkpoint
from ferdlib.synthesis import ImagePool
from ferdlib.trainer import Checkpoints, FERDConfig, FERDTrainer

ROOT = Path(__file__).parents[1]
EXAMPLES = ("ard", "ard_setup", "cifar10_ferd", "files", "image_data", "long_run", "model_sources")
EXAMPLES += ("quickstart", "train_teacher")
TINY = SIZES | {
    "epochs": 3,
    "warmup_epochs": 1,
    "generator_steps": 2,
    "bottleneck_steps": 2,
    "student_steps": 4,
}
make_trainer = partial(tiny_trainer, TINY)


def stop_after(count):
    """Says so at the last of so many questions."""
    questions = iter(range(count - 1))
    return lambda: next(questions, None) is None


def through_a_file(state, tmp_path):
    Checkpoints(tmp_path, keep=1).save(state, 0)
    return Checkpoints(tmp_path).latest()[1]


def assert_resuming_is_exact(make, tmp_path, questions=(3, 9)):
    straight = make()
    expected = straight.fit()
    for count in questions:
        stopped = make()
        begun = list(stopped.epochs(stop=stop_after(count)))
        resumed = make(seed=9)
        resumed.load_state_dict(through_a_file(stopped.state_dict(), tmp_path))
        assert resumed.epoch == len(begun) < 3
        rest = resumed.fit()
        assert same(resumed.state_dict(), straight.state_dict())
        for mine, theirs in zip([*begun, *rest], expected, strict=True):
            values = [
                {k: getattr(s, k) for k in s.__slots__ if k != "seconds"} for s in (mine, theirs)
            ]
            assert same(*values)
        assert same([*stopped.epochs()][-1].class_counts, expected[-1].class_counts)
        assert same(
            stopped.state_dict(), straight.state_dict()
        )  # the one that stopped goes on, too


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preset": FERDConfig.paper},
        {"preset": FERDConfig.released},
        {"precision": "bfloat16"},
        {"pool_capacity": 20, "pool_dtype": "uint8"},
        {"augment": "none", "cache_teacher_logits": "images"},
        {"attack_model": "teacher", "uniformity_loss_weight": 1.0},
        {"schedule": "constant", "conditional_generator": True, "margin_images": "last"},
        {"reweighting": "lps_power", "absent_classes": "neutral", "fold_batchnorm": False},
        {"student_optimizer": partial(torch.optim.Adam, lr=0.01)},
    ],
    ids=lambda changes: next(iter(changes), "default"),
)
def test_a_run_that_stops_between_two_steps_goes_on_exactly(changes, tmp_path):
    assert_resuming_is_exact(partial(make_trainer, **changes), tmp_path)


@pytest.mark.parametrize(
    ("name", "own_rng"),
    [*((name, False) for name in METHODS if name != "ferd"), ("ard", True), ("fair-rslad", True)],
)
def test_every_method_goes_on_exactly_within_an_epoch(name, own_rng, tmp_path):
    def make(seed=0):
        teacher, student = make_models()
        teachers = {"teacher": teacher, "natural_teacher": teacher}
        kind = METHODS[name.rpartition("-")[2]]
        wanted = {k: v for k, v in teachers.items() if k in kind.__dataclass_fields__}
        rng = torch.Generator().manual_seed(seed) if own_rng else None
        begin = {"begin": 1} if hasattr(kind, "begin") else {}
        method = build_method(name, 3, **wanted, rng=rng, **begin)
        x = torch.tensor(load_digits().images[:12], dtype=torch.float32)[:, None] / 16
        return FERDTrainer(
            teacher,
            student,
            config=FERDConfig(**TINY),
            method=method,
            validation=[(x, torch.arange(12) % 3)] if method.needs_validation else None,
            seed=seed,
        )

    assert_resuming_is_exact(make, tmp_path, questions=(9,))


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


def test_another_source_is_stopped_between_epochs_only(tmp_path):
    def make(seed=0):
        return make_trainer(source=Several(seed), seed=seed)

    straight, stopped = make(), make()
    straight.fit()
    assert len(list(stopped.epochs(stop=stop_after(2)))) == 1
    resumed = make(seed=4)
    resumed.load_state_dict(through_a_file(stopped.state_dict(), tmp_path))
    resumed.fit()
    assert same(resumed.state_dict(), straight.state_dict())


def test_a_source_without_a_generator_gets_the_trainers():
    source = Several()
    source.rng = None
    trainer = make_trainer(source=source)
    state = torch.get_rng_state()
    trainer.fit()
    assert torch.equal(torch.get_rng_state(), state)


def test_other_states_are_refused_and_nothing_is_loaded():
    trainer = make_trainer()
    before = trainer.state_dict()
    other = make_trainer(source=Several()).state_dict()
    for state, words in (
        ({"weights": 1}, "what `state_dict` returned"),
        (other, "random generators of trainer, got those of trainer, source"),
    ):
        with pytest.raises(ValueError, match=f"^FERDTrainer.load_state_dict: expected .*{words}"):
            trainer.load_state_dict(state)
    assert same(trainer.state_dict(), before)


def test_a_pool_comes_back_on_the_device_that_is_asked_for():
    pool, other = ImagePool(), ImagePool()
    pool.add(torch.rand(2, 1, 4, 4), torch.arange(2))
    other.load_state_dict(pool.state_dict(), device="meta")
    assert other.labels.device.type == "meta"


def command(folder, epochs):
    program = str(ROOT / "tests" / "long_run_program.py")
    return [sys.executable, program, str(folder), str(epochs)]


def killed_again_and_again(folder, kills, seed=0):
    """A run that is killed so many times, and one that is not: both students, and unreadable files met."""
    epochs = 3 * kills + 2  # more than it gets done before it is killed as often
    quiet = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    straight = subprocess.Popen(command(folder / "straight", epochs), **quiet, text=True)
    draw, unreadable = random.Random(seed), 0
    (folder / "straight").mkdir()
    for _ in range(kills):
        run = subprocess.Popen(command(folder / "killed", epochs), **quiet, text=True)
        for _ in range(draw.randint(1, 3)):
            assert run.stdout.readline(), "it ended by itself"
        time.sleep(draw.uniform(0, 0.1))
        unreadable += kill(run, folder / "killed")
    subprocess.run(command(folder / "killed", epochs), **quiet, check=True)
    straight.communicate()
    students = [torch.load(folder / name / "student.pt") for name in ("straight", "killed")]
    return *students, unreadable


def test_a_run_that_is_killed_three_times_is_the_undisturbed_one(tmp_path):
    straight, killed, unreadable = killed_again_and_again(tmp_path, 3)
    assert unreadable == 0
    assert same(killed, straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_a_step_and_a_second_one_at_once(number, tmp_path):
    streams = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = subprocess.Popen(command(tmp_path, 1000), **streams, text=True)
    assert run.stdout.readline() == "begins after 0\n"
    assert run.stdout.readline() == "epoch 1\n"
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + number, err
    assert out.splitlines()[-1].endswith("the same command with --resume auto goes on")
    assert "stopping after this step; once more ends at once" in err
    program = """
import os, signal, sys
from long_run import Stop
with Stop() as stop:
    os.kill(os.getpid(), int(sys.argv[1]))
    assert stop()
    os.kill(os.getpid(), int(sys.argv[1]))
    print("still here")
"""
    arguments = [sys.executable, "-c", program, str(int(number))]
    ended = subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (-number, "")


@pytest.fixture(scope="module")
def examples():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module
    for name in EXAMPLES:
        sys.modules.pop(name, None)


def run_main(module, *arguments):
    words = [str(a) for a in arguments]
    takes_words = module.__name__ == "cifar10_ferd"
    module.main(words if takes_words else tyro.cli(module.Args, args=words))


def interrupt(monkeypatch, owner, name, count):
    """Ctrl-C at the so-manieth call of a step."""
    plain, calls = getattr(owner, name), []

    def step(*arguments, **more):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments, **more)

    monkeypatch.setattr(owner, name, step)


def step_of(module, name):
    """What is called once in each step of a script's training."""
    if name == "ard":
        return module, "precision"
    if name == "train_teacher":
        return module.Training, "_loss"
    return module.FERDTrainer, "distill_step"


DIGITS = ["--data", "digits", "--val-images", "60", "--test-images", "20", "--batch-size", "400"]
DIGITS += ["--attack-steps", "1", "--device", "cpu", "--epochs", "2"]
ARD = ["--student", "small_cnn_2", "--teacher-architecture", "small_cnn_3", "--teacher-epochs", "2"]
SCRIPTS = {
    "train_teacher": ([*DIGITS, "--architecture", "small_cnn_2", "--eps", "0.1"], "teacher.pt"),
    "ard": ([*DIGITS, *ARD, "--method", "fair-ard"], "student.pt"),
    "cifar10_ferd": (["--smoke", "--test-images", "10", "--device", "cpu"], "student.pt"),
}


@pytest.mark.parametrize(
    (
        "name",
        "step",
    ),  # within an epoch or at its end; of a teacher that is trained first, or the student
    [
        ("train_teacher", 3),
        ("train_teacher", 4),
        ("ard", 3),
        ("ard", 4),
        ("ard", 7),
        ("cifar10_ferd", 2),
    ],
)
def test_a_script_is_interrupted_and_goes_on(name, step, examples, tmp_path, monkeypatch, capsys):
    module = examples(name)
    options, result = SCRIPTS[name]
    with monkeypatch.context() as patch:
        interrupt(patch, *step_of(module, name), step)
        with pytest.raises(SystemExit) as stop:
            run_main(module, *options, "--out", tmp_path / "a", "--resume", "auto")
    assert stop.value.code == 130
    assert "the same command with --resume auto goes on" in capsys.readouterr().out
    assert not (tmp_path / "a" / result).exists()
    with pytest.raises(SystemExit, match="expected --resume auto or another --out, got"):
        run_main(module, *options, "--out", tmp_path / "a")
    with pytest.raises(SystemExit, match="got others for --seed"):
        run_main(module, *options, "--out", tmp_path / "a", "--resume", "auto", "--seed", "1")
    run_main(module, *options, "--out", tmp_path / "a", "--resume", "auto")
    run_main(module, *options, "--out", tmp_path / "b")
    students = [load_checkpoint(tmp_path / folder / result).state_dict() for folder in "ab"]
    assert same(*students)
    assert not (tmp_path / "a" / "checkpoints").exists()  # the results are written


@pytest.mark.parametrize(
    ("owner", "step", "count", "where"),
    [
        (None, "pgd", 3, "after epoch 1 of 2 of the teacher"),
        ("FERDTrainer", "distill_step", 3, "after epoch 1 of 2 of the student, FERD"),
    ],
    ids=["teacher", "student"],
)
def test_quickstart_is_interrupted_and_goes_on(
    owner, step, count, where, examples, tmp_path, monkeypatch, capsys
):
    module = examples("quickstart")
    plain = module.config
    small = {"student_steps": 4, "generator_steps": 2, "margin_attack_steps": 2}
    monkeypatch.setattr(module, "config", lambda epochs: plain(epochs, **small))
    monkeypatch.setattr(module, "TEACHER_WIDTH", 4)
    options = ["--teacher-epochs", "2", "--epochs", "2"]

    def train(folder, *more):
        args = tyro.cli(module.Args, args=[*options, "--out", str(tmp_path / folder), *more])
        trainer, models = module.train(args, module.digits(0)["train"])
        return models["teacher"].state_dict(), trainer.state_dict()

    with monkeypatch.context() as patch:
        interrupt(patch, module if owner is None else getattr(module, owner), step, count)
        with pytest.raises(SystemExit) as stop:
            train("a", "--resume", "auto")
    assert stop.value.code == 130
    assert f"stopped {where}; the same" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected --resume auto or another --out, got"):
        train("a")
    with pytest.raises(ValueError, match="got others for --seed"):
        train("a", "--resume", "auto", "--seed", "1")
    assert same(train("a", "--resume", "auto"), train("b"))


def test_a_cycle_of_the_soak_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.soak", "--cycles", "20", "--allowed", "inf"]
    result = subprocess.run(
        [*command, "--out", str(tmp_path / "held.json")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("20 cycles in ")
    held = json.loads((tmp_path / "held.json").read_text("utf-8"))
    # Three runs take turns, so a cycle is like the third before it, once their pools are full.
    for name in ("tensors", "files", "threads"):
        assert held[13][name] == held[19][name], name
