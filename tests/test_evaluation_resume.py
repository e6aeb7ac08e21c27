"""`evaluate(resume=...)`: killed at any moment it goes on, and it refuses what it was not begun with.

Run as a program with a folder it is `killed_again_and_again`.
"""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from torch import nn

from ferdlib.checkpoints import write_file
from ferdlib.evaluation import PROTOCOLS, AttackSpec, Protocol, RobustnessReport, evaluate

K, N, BATCH = 4, 20, 5
X = torch.rand(N, 2, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % K
FILES = 4 * 3 + 2  # blocks times clean, FGSM and PGD-10; header and probe
PROBE = 1  # passes over the first samples
OWN = Protocol(name="own", attacks=(AttackSpec(name="own", kind="custom", eps=0.1),))


class Counting(nn.Module):
    """How often it was asked; slow on request."""

    def __init__(self, model=None, pause=0.0):
        super().__init__()
        self.model, self.pause, self.calls = model or make_tiny_model(K), pause, 0

    def forward(self, x):
        self.calls += 1
        time.sleep(self.pause)
        return self.model(x)


def run(folder, model=None, **change):
    arguments = {"data": (X, Y), "protocol": "quick", "num_classes": K, "batch_size": BATCH}
    return evaluate(model or Counting(), resume=folder, **(arguments | change))


def contents(folder):
    return {path.name: path.read_text() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def undisturbed():
    return run(None)


@pytest.fixture
def finished(tmp_path, undisturbed):
    """The folder of a finished run."""
    assert run(tmp_path / "run") == undisturbed
    return tmp_path / "run"


def killed_again_and_again(folder):
    """The same call, killed at five moments by SIGKILL and then left alone."""
    moments, model, killed = random.Random(), Counting(pause=0.02), 0
    for files in (0, 3, 4, 7, 11):
        child = os.fork()
        if child == 0:
            run(folder, model)
            os._exit(0)
        while len(list(folder.glob("*.json"))) < files:
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        time.sleep(0.05 * moments.random())
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        for path in folder.glob("*.json"):
            json.loads(path.read_text())
    assert killed >= 3  # a busy machine may be late once
    run(folder, model).save(folder.parent / "report.json")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_goes_on(tmp_path, undisturbed):
    command = [sys.executable, __file__, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert RobustnessReport.load(tmp_path / "report.json") == undisturbed
    assert len(list((tmp_path / "run").glob("*.json"))) == FILES


def test_an_interrupted_write_leaves_nothing_half(tmp_path, undisturbed, monkeypatch):
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(Path(target).name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert not (tmp_path / calls[-1]).exists()
    assert run(tmp_path) == undisturbed
    assert len(contents(tmp_path)) == FILES


def test_a_finished_run_needs_no_attack(finished, undisturbed):
    before, model = contents(finished), Counting()
    assert len(before) == FILES
    report = run(finished, model)
    assert report == undisturbed
    assert model.calls == PROBE
    assert contents(finished) == before
    # One more block of data is one more block of work, and nothing else.
    more = torch.cat([X, X[:3]]), torch.cat([Y, Y[:3]])
    model = Counting()
    assert run(finished, model, data=more) == run(None, data=more)
    assert model.calls == PROBE + 14


def test_seconds_are_those_of_the_work(finished):
    once, again = run(finished).timing, run(finished).timing
    assert once["seconds"] == again["seconds"]
    assert all(seconds > 0 for seconds in once["seconds"].values())


class Gelu(Counting):
    """The same weights and another architecture."""

    def __init__(self):
        super().__init__()
        for k, module in enumerate(self.model):
            if isinstance(module, nn.ReLU):
                self.model[k] = nn.GELU()


OTHER = [
    ({"model": Counting(make_tiny_model(K, seed=1))}, "model"),
    ({"model": Gelu()}, "model"),
    ({"model": make_tiny_model(K)}, "model"),
    ({"model": make_tiny_model(K).forward}, "model"),
    ({"protocol": PROTOCOLS["quick"].with_seed(1)}, "protocol"),
    ({"protocol": PROTOCOLS["quick"].at(eps=0.03)}, "protocol"),
    ({"protocol": PROTOCOLS["quick"].without("FGSM")}, "protocol"),
    ({"batch_size": 4}, "batch size"),
    ({"bounds": (-1.0, 1.0)}, "bounds"),
    ({"bounds": (-1.0, 1.0), "batch_size": 4}, "batch size, bounds"),
    ({"data": (X.flip(0), Y)}, "model and data"),
    ({"data": (torch.cat([X[:10], X[:10]]), Y)}, "data"),
    ({"data": (X, Y.flip(0))}, "data"),
    ({"data": (X.double(), Y), "model": Counting(make_tiny_model(K)).double()}, "model"),
]


@pytest.mark.parametrize(("change", "what"), OTHER)
def test_another_evaluation_is_refused(finished, undisturbed, change, what):
    before = contents(finished)
    message = rf"^evaluate: expected the {what} that `resume` '.*' was begun with, got .*; give another folder$"
    with pytest.raises(ValueError, match=message) as caught:
        run(finished, **change)
    assert repr(str(finished)) in str(caught.value)
    assert contents(finished) == before


def test_a_function_is_known_by_its_logits(tmp_path):
    model, other = make_tiny_model(K), make_tiny_model(K, seed=1)
    report = run(tmp_path, lambda x: model(x))
    assert run(tmp_path, lambda x: model(x) * (1 + 1e-6)) == report
    with pytest.raises(ValueError, match="^evaluate: expected the model and data that `resume`"):
        run(tmp_path, lambda x: other(x))


class Gated(nn.Module):
    """The same logits with and without a gradient behind them."""

    def __init__(self):
        super().__init__()
        self.model, self.masked = make_tiny_model(K), True

    def forward(self, x):
        z = self.model(x)
        return z.detach() + 0 * x.sum() if self.masked else z


def test_a_model_whose_gradient_was_repaired_is_another_one(tmp_path):
    model = Gated()
    run(tmp_path, model)
    assert run(tmp_path, model) == run(None, model)
    model.masked = False
    with pytest.raises(ValueError, match="expected the model that .* got other gradients for the"):
        run(tmp_path, model)


class Noisy(nn.Module):
    """A randomised defence, with torch's random numbers or those of a generator of its own."""

    def __init__(self, scale, rng=None):
        super().__init__()
        self.model, self.scale, self.rng = make_tiny_model(K), scale, rng

    def forward(self, x):
        return self.model(x + self.scale * torch.randn(x.shape, generator=self.rng))


def test_masked_logits_are_strict_json_and_hide_no_change(tmp_path):
    """Beside an infinite logit, other finite ones are still another model's; its gradients are not read."""
    by = 1.0

    def masked(x):
        return nn.functional.pad(by * x[:, 0, 0, :3], (0, 1), value=-torch.inf)

    change = {"protocol": OWN, "custom": {"own": lambda model, x, y: x}}
    first = run(tmp_path, masked, **change)
    for text in contents(tmp_path).values():
        json.loads(text, parse_constant=pytest.fail)
    assert run(tmp_path, masked, **change) == first
    by = 2.0
    with pytest.raises(ValueError, match="other logits for the first samples"):
        run(tmp_path, masked, **change)


@pytest.mark.parametrize("rng", [None, torch.Generator()])
def test_a_random_model_goes_on_and_the_callers_noise_is_what_it_was(tmp_path, rng):
    report = run(tmp_path, Noisy(0.1, rng))
    sorted(tmp_path.glob("PGD-10*.json"))[-1].unlink()
    before = torch.get_rng_state()
    again = run(tmp_path, Noisy(0.1, rng))
    assert torch.equal(again.predictions["FGSM"], report.predictions["FGSM"])
    if rng is None:
        with pytest.raises(ValueError, match="got other logits for the first samples"):
            run(tmp_path, Noisy(0.2))
        torch.set_rng_state(before)
        run(tmp_path, Noisy(0.1))  # everything is there
        assert torch.equal(torch.get_rng_state(), before)


def test_another_attack_of_the_same_name_is_refused(tmp_path):
    own = Protocol(name="own", attacks=(AttackSpec(name="mine", kind="custom", eps=0.1),))

    def brighter(by):
        return {"mine": lambda model, x, y: (x + by).clamp(0, 1)}

    def noisy(model, x, y):
        return (x + 0.1 * torch.rand(x.shape, generator=rng)).clamp(0, 1)

    report = run(tmp_path / "a", protocol=own, custom=brighter(0.01))
    assert run(tmp_path / "a", protocol=own, custom=brighter(0.01)) == report
    with pytest.raises(
        ValueError, match="^evaluate: expected the attack 'mine' that `resume` '.*'"
    ):
        run(tmp_path / "a", protocol=own, custom=brighter(0.1))
    # One with noise of its own cannot be told from another, and goes on.
    rng = torch.Generator()
    report = run(tmp_path / "b", protocol=own, custom={"mine": noisy})
    assert run(tmp_path / "b", protocol=own, custom={"mine": noisy}) == report


def test_what_fails_before_the_first_attack_begins_nothing(tmp_path):
    model = make_tiny_model(K)
    for change in (
        {"num_classes": 5},
        {"data": (X, Y + 1)},
        {"model": lambda x: (model(x), 0)},
        {"model": lambda x: model(x) * torch.nan},
    ):
        with pytest.raises((ValueError, RuntimeError), match="^evaluate: expected"):
            run(tmp_path, **change)
    assert run(tmp_path, batch_size=3) == run(None, batch_size=3)


def damaged(text, how):
    if how == "truncated":
        return text[: len(text) // 2]
    if how == "digit":  # the first: the last one of a float may change nothing
        at = re.search(r"\d", text).start()
        return text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
    return {"empty": "", "list": "[1, 2]", "unsealed": "{}"}[how]


@pytest.mark.parametrize("how", ["truncated", "digit", "empty", "list", "unsealed"])
@pytest.mark.parametrize("which", ["header", "probe", "clean", "PGD-10"])
def test_a_damaged_file_is_named_and_made_again(finished, undisturbed, which, how):
    path = sorted(finished.glob(f"{which}*.json"))[-1]
    text = path.read_text()
    path.write_text(damaged(text, how))
    assert path.read_text() != text
    with pytest.raises(ValueError, match="^evaluate: expected `resume` to hold complete") as caught:
        run(finished)
    assert f"a damaged {str(path)!r}; delete that file" in str(caught.value)
    path.unlink()
    model = Counting()
    assert run(finished, model) == undisturbed
    probes = 2 if which == "probe" else 1
    assert model.calls == probes * PROBE + {"clean": 1, "PGD-10": 11}.get(which, 0)
    assert len(contents(finished)) == FILES


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(OSError, match="^evaluate: expected `resume` to be a folder that can"):
            run(path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("which", ["header", "PGD-10"])
def test_a_full_disk(finished, tmp_path, undisturbed, which, monkeypatch):
    name, folder = sorted(finished.glob(f"{which}*.json"))[-1].name, tmp_path / "full"

    def full(target, content):
        if target.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_file(target, content)

    with monkeypatch.context() as patch:
        patch.setattr("ferdlib.evaluation.resume.write_file", full)
        message = f"^evaluate: expected to write '{folder / name}', got .*No space"
        with pytest.raises(OSError, match=message):
            run(folder)
    assert run(folder) == undisturbed


if __name__ == "__main__":
    killed_again_and_again(Path(sys.argv[1]))
