"""Runs that are stopped, killed or short of disk: what was saved stays, and what goes on is the same run.

As a program, `python tests/test_long_runs.py 50`, it kills a run so many times.
"""

from __future__ import annotations

import errno
import importlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from sklearn.datasets import load_digits
from torch import nn

from ferdlib.methods import METHODS, create
from ferdlib.models import load_checkpoint, small_cnn
from ferdlib.synthesis import ImagePool
from ferdlib.trainer import Checkpoints, FERDConfig, FERDTrainer

ROOT = Path(__file__).parents[1]
EXAMPLES = ("ard", "ard_setup", "cifar10_ferd", "files", "image_data", "long_run", "model_sources")
EXAMPLES += ("quickstart", "train_teacher")
TINY = {
    "num_classes": 3,
    "layer": "layer4",
    "image_shape": (1, 8, 8),
    "epochs": 3,
    "warmup_epochs": 1,
    "batch_size": 12,
    "generator_steps": 2,
    "generator_width": 4,
    "latent_dim": 5,
    "bottleneck_steps": 2,
    "student_steps": 4,
    "attack_steps": 2,
    "margin_attack_steps": 2,
    "crop_padding": 1,
}


def make_trainer(preset=FERDConfig, seed=0, **changes):
    torch.manual_seed(5)
    teacher, student = small_cnn(1, 3, width=4), small_cnn(1, 3, width=2)
    parts = {k: changes.pop(k) for k in list(changes) if k not in FERDConfig.__slots__}
    if "method" in parts:
        parts["method"] = parts["method"](teacher)
    return FERDTrainer(teacher, student, config=preset(**(TINY | changes)), seed=seed, **parts)


def same(one, other):
    """Bit for bit, wherever tensors are in dicts and lists."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(9), other.nan_to_num(9))
    return one == other or (one != one and other != other)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_saved_comes_back(tmp_path):
    state = {
        "weights": nn.Linear(3, 2).state_dict(),
        "plain": [None, True, 3, 0.5, float("nan"), "text", b"bytes", (1, 2)],
        "by number": {0: torch.arange(3)},
        "parameter": nn.Parameter(torch.ones(2)),
    }
    checkpoints = Checkpoints(tmp_path / "new" / "folder")
    assert checkpoints.latest() is None
    path = checkpoints.save(state, 7)
    step, found = checkpoints.latest()
    assert (step, checkpoints.files()) == (7, [path])
    assert same(found, state)
    assert torch.load(path, weights_only=True).keys() == {"format", "step", "state"}


def test_the_last_ones_stay_and_later_ones_are_given_up(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 9, 10, 100):
        checkpoints.save({"step": step}, step)
    assert [Checkpoints.read(path)[0] for path in checkpoints.files()] == [10, 100]
    checkpoints.save({"step": 11}, 11)  # gone on from 10, or begun anew
    assert [Checkpoints.read(path)[0] for path in checkpoints.files()] == [10, 11]
    checkpoints.save({"step": "again"}, 11)
    assert checkpoints.latest() == (11, {"step": "again"})


def test_what_a_killed_process_left_is_removed_and_other_files_stay(tmp_path):
    (tmp_path / "checkpoint-0000000003.partial").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    checkpoints.save({}, 1)
    assert set(contents(tmp_path)) == {"checkpoint-0000000001.pt", "notes.txt"}
    checkpoints.clear()
    assert set(contents(tmp_path)) == {"notes.txt"}
    (tmp_path / "notes.txt").unlink()
    checkpoints.clear()
    assert not tmp_path.exists()
    checkpoints.clear()


@dataclass
class Own:
    number: int = 0


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": {"b": [0, np.float64(1)]}}, r"state\['a'\]\['b'\]\[1\]"),
        ({"path": Path("x")}, r"PosixPath.* as state\['path'\]"),
        ({"own": Own()}, r"Own.* as state\['own'\]"),
        ({"call": len}, r"state\['call'\]"),
        ({(1, 2): 3}, r"plain keys in state, got tuple"),
        ([1], "`state` to be a dict, got list"),
    ],
)
def test_other_objects_are_refused_by_their_place(state, place, tmp_path):
    with pytest.raises(TypeError, match=rf"^Checkpoints.save: expected .*{place}"):
        Checkpoints(tmp_path / "none").save(state, 1)
    assert not (tmp_path / "none").exists()


def test_wrong_arguments_get_one_sentence(tmp_path):
    for kind, words, call in (
        (TypeError, "Checkpoints: expected `folder`", partial(Checkpoints, 3)),
        (ValueError, "Checkpoints: expected `keep` >= 1", partial(Checkpoints, tmp_path, keep=0)),
        (
            ValueError,
            "Checkpoints.save: expected `step` >= 0",
            lambda: Checkpoints("x").save({}, -1),
        ),
        (FileNotFoundError, "Checkpoints.read: .* 'none'", lambda: Checkpoints.read("none")),
    ):
        with pytest.raises(kind, match=f"^{words}"):
            call()


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"a": torch.zeros(100)}, 1)
    newest = checkpoints.save({"a": torch.zeros(100)}, 2)
    whole = newest.read_bytes()
    cases = {"complete checkpoint": [whole[: len(whole) // 2], b"", b"text"]}
    foreign = tmp_path / "foreign"
    for content, words in (
        ({"weights": torch.zeros(2)}, "a file that Checkpoints.save wrote"),
        ({"format": 2, "step": 2, "state": {}}, "of format 1, got .* with int 2"),
    ):
        torch.save(content, foreign)
        cases[words] = [foreign.read_bytes()]
    for words, found in cases.items():
        for content in found:
            newest.write_bytes(content)
            with pytest.raises(ValueError, match=f"^Checkpoints.read: expected .*{words}") as error:
                checkpoints.latest()
            assert str(newest) in str(error.value)
    newest.unlink()
    assert checkpoints.latest()[0] == 1


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(where, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"a": 1}, 1)
    before = contents(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, where, full)
    with pytest.raises(
        OSError, match=r"^Checkpoints.save: .*checkpoint-0000000002.* No space left"
    ):
        checkpoints.save({"a": 2}, 2)
    assert contents(tmp_path) == before


def test_a_disk_that_fills_while_torch_writes_is_a_disk_that_is_full(tmp_path):
    """The system lets no file grow beyond 100 kB, and torch complains of that in words of its own."""
    program = """
import resource, sys, torch
from ferdlib.trainer import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save({"a": torch.zeros(10)}, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save({"a": torch.zeros(1_000_000)}, 2)
except OSError as error:
    print(error)
print(checkpoints.latest())
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    sentence, latest, *rest = result.stdout.splitlines()
    assert sentence.startswith("Checkpoints.save: expected to write ")
    assert "File too large" in sentence
    assert latest.startswith("(1, {'a': tensor([0.")
    assert rest == []
    assert set(contents(tmp_path)) == {"checkpoint-0000000001.pt"}


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save({}, 1)
    before = contents(tmp_path / "run")
    (tmp_path / "run").chmod(0o500)
    if os.access(tmp_path / "run", os.W_OK):  # as root

        def refused(*_):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(OSError, match=r"^Checkpoints.save: expected to write .*Permission denied"):
        checkpoints.save({}, 2)
    monkeypatch.undo()
    (tmp_path / "run").chmod(0o700)
    assert contents(tmp_path / "run") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^Checkpoints.save: expected to write"):
        Checkpoints(tmp_path / "file").save({}, 1)


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
        {"cache_teacher_logits": "crops"},
        {"attack_model": "teacher", "cache_teacher_utae": "joint", "uniformity_loss_weight": 1.0},
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
    [*((name, False) for name in METHODS), ("ard", True), ("fair-rslad", True)],
)
def test_every_method_goes_on_exactly_within_an_epoch(name, own_rng, tmp_path):
    def make(seed=0):
        def method(teacher):
            teachers = {"teacher": teacher, "natural_teacher": teacher}
            kind = METHODS[name]
            wanted = {k: v for k, v in teachers.items() if k in kind.__dataclass_fields__}
            rng = torch.Generator().manual_seed(seed) if own_rng else None
            begin = {"begin": 1} if hasattr(kind, "begin") else {}
            return create(name, 3, **wanted, rng=rng, **begin)

        x = torch.tensor(load_digits().images[:12], dtype=torch.float32)[:, None] / 16
        data = [(x, torch.arange(12) % 3)] if hasattr(METHODS[name], "validate") else None
        return make_trainer(method=method, validation=data, seed=seed)

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


def environment():
    places = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    return os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}


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
        run.kill()
        run.communicate()
        assert run.returncode == -signal.SIGKILL
        for path in Checkpoints(folder / "killed" / "checkpoints").files():
            try:
                Checkpoints.read(path)
            except ValueError:
                unreadable += 1
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


def test_quickstart_is_interrupted_and_goes_on(examples, tmp_path, monkeypatch):
    module = examples("quickstart")
    plain = module.config
    small = {"student_steps": 4, "generator_steps": 2, "margin_attack_steps": 2}
    monkeypatch.setattr(module, "config", lambda epochs: plain(epochs, **small))
    options = ["--teacher-epochs", "1", "--epochs", "2"]

    def train(folder, *more):
        args = tyro.cli(module.Args, args=[*options, "--out", str(tmp_path / folder), *more])
        trainer, models = module.train(args, module.digits(0)["train"])
        return models["teacher"].state_dict(), trainer.state_dict()

    with monkeypatch.context() as patch:
        interrupt(patch, module.FERDTrainer, "distill_step", 3)
        with pytest.raises(SystemExit) as stop:
            train("a", "--resume", "auto")
    assert stop.value.code == 130
    with pytest.raises(ValueError, match="expected --resume auto or another --out, got"):
        train("a")
    assert same(train("a", "--resume", "auto"), train("b"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        asked = int(sys.argv[1])
        one, other, met = killed_again_and_again(Path(place), asked)
        print(
            f"{asked} kills, {asked} resumes, {met} unreadable files, students "
            f"{'the same bit for bit' if same(one, other) else 'that differ'}"
        )
        sys.exit(met > 0 or not same(one, other))
