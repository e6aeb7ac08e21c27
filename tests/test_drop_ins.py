"""The drop-ins run as a user runs them, and the documented change to somebody's loop is the shown one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score

from ferdlib import losses
from ferdlib.attacks import fgsm
from ferdlib.bottleneck import split_at
from ferdlib.reweight import ClassWeights, lps_power, normalize

ROOT = Path(__file__).parents[1]
DROP_INS = ROOT / "examples" / "drop_in"
CLIP = (5 / 6, 5 / 2)


def load(name):
    """A drop-in as a module of its own, so that what a test replaces in it is gone with it."""
    spec = importlib.util.spec_from_file_location(f"drop_in_{name}", DROP_INS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def diff_blocks(text):
    return re.findall(r"^```diff\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def patched(lines, diff):
    """The lines after a unified diff, each of whose hunks must fit where it says."""
    result, done = [], 0
    for hunk in re.split(r"^(?=@@)", diff, flags=re.MULTILINE)[1:]:
        header, *body = hunk.splitlines()
        start, length = map(int, re.match(r"@@ -(\d+),(\d+) ", header).groups())
        old = [line[1:] for line in body if line[:1] != "+"]
        assert old == lines[start - 1 : start - 1 + length], header
        result += lines[done : start - 1] + [line[1:] for line in body if line[:1] != "-"]
        done = start - 1 + length
    return result + lines[done:]


def test_the_documented_diff_turns_ard_into_its_reweighted_version():
    (diff,) = diff_blocks((ROOT / "docs/how-to/reweight.md").read_text("utf-8"))
    before = (DROP_INS / "ard.py").read_text("utf-8")
    after = (DROP_INS / "ard_reweighted.py").read_text("utf-8")
    assert "\n".join([*patched(before.splitlines(), diff), ""]) == after
    hunks = diff[diff.index("@@") :]
    added = re.findall(r"^\+", hunks, flags=re.MULTILINE)
    removed = re.findall(r"^-", hunks, flags=re.MULTILINE)
    assert len(removed) <= len(added) <= 5


def test_a_diff_that_does_not_fit_is_refused():
    diff = "--- a\n+++ b\n@@ -2,2 +2,3 @@\n two\n+new\n three\n"
    assert patched(["one", "two", "three"], diff) == ["one", "two", "new", "three"]
    with pytest.raises(AssertionError, match="@@ -2,2"):
        patched(["one", "2", "three"], diff)


def test_the_reweighted_loop_weighs_the_next_epoch_by_this_ones_least_steps():
    module, epochs = load("ard_reweighted"), []

    class Watched(ClassWeights):
        def __call__(self, values, targets):
            result = super().__call__(values, targets)
            assert torch.equal(result.double(), self.weights[targets].float().double())
            return result

        def step(self):
            assert int(self.counts.sum()) == 1257  # each image of the epoch, once
            used, kappa = self.weights, self.compute()
            super().step()
            epochs.append((used, kappa, self.weights))

    module.ClassWeights = Watched
    accuracy = module.main(teacher_epochs=1, epochs=2)
    assert accuracy.shape == (10,)
    (first, kappa, weights), (second, _, _) = epochs
    assert torch.equal(first, torch.ones(10).double())
    assert torch.equal(second, weights)
    assert ((kappa >= 0) & (kappa <= 10)).all()
    assert torch.isclose(lps_power(kappa).mean(), torch.tensor(1.0).double())
    assert torch.equal(weights, normalize(lps_power(kappa), clip=CLIP))
    assert weights.argmax() == kappa.argmin()
    assert weights.max() > 1 > weights.min()


def test_the_plain_loop_learns_from_its_teacher(capsys):
    accuracy = load("ard").main(teacher_epochs=2, epochs=3)
    assert accuracy.mean() > 0.25
    assert f"average {accuracy.mean():.1%}" in capsys.readouterr().out


def test_the_trades_loop_trains_on_uniform_target_examples(capsys):
    module, rises = load("trades_utae"), []
    utae_pgd = module.utae_pgd

    def watched(model, x, *, gamma, eps, step_size):
        x_adv = utae_pgd(model, x, gamma=gamma, eps=eps, step_size=step_size)
        model.eval()
        with torch.no_grad():
            reference, z = model(x), model(x_adv)
            there = losses.distillation(z, reference) - gamma * losses.uniformity(z)
            here = -gamma * losses.uniformity(reference)
        model.train()
        rises.append((there - here).mean().item())
        return x_adv

    module.utae_pgd = watched
    accuracy = module.main(epochs=2)
    assert len(rises) == 2 * 26
    assert min(rises) > 0
    assert accuracy.mean() > 0.3
    assert f"average {accuracy.mean():.1%}" in capsys.readouterr().out


def test_the_classwise_figures_are_scikit_learns(capsys):
    module, seen = load("classwise_metrics"), []
    confusion_matrix = module.metrics.confusion_matrix

    class Metrics:
        """ferdlib.metrics, with an ear on the loop's predictions."""

        def __getattr__(self, name):
            return getattr(sys.modules["ferdlib.metrics"], name)

        def confusion_matrix(self, predictions, targets, num_classes):
            seen.append((predictions, targets))
            return confusion_matrix(predictions, targets, num_classes)

    module.metrics = Metrics()
    module.main(steps=20)
    printed = capsys.readouterr().out
    predictions, targets = (torch.cat(part) for part in zip(*seen, strict=True))
    assert len(targets) == 540
    recall = recall_score(targets, predictions, average=None, zero_division=0)
    figures = {
        "accuracy under PGD-20:": (predictions == targets).double().mean(),
        "average": balanced_accuracy_score(targets, predictions),
        "worst class": recall.min(),
        "NSD": recall.std() / recall.mean(),
    }
    for name, value in figures.items():
        assert f"{name} {value:.4f}" in printed


def test_foreign_teachers_are_cut_normalised_and_left_alone(capsys):
    module, kept = load("foreign_teachers"), {}
    distil = module.distil

    def watched(teacher, layer, seed):
        x = torch.rand(2, 3, 32, 32)
        raw = teacher.eval().model((x - teacher.mean) / teacher.std)
        features, head = split_at(teacher, layer)
        assert torch.allclose(head(features(x)), raw, atol=1e-5)
        kept[type(teacher.model)] = {k: v.clone() for k, v in teacher.state_dict().items()}
        return distil(teacher, layer, seed)

    module.distil = watched
    found = module.main()
    assert set(found) == {"timm", "torchvision"}
    for trainer, stats in found.values():
        assert 0 <= stats.student_loss < float("inf")
        state = trainer.teacher.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in kept[type(trainer.teacher.model)].items())
    assert capsys.readouterr().out.count("images of 32x32") == 2


def test_a_timm_model_is_evaluated_in_the_units_of_its_images(capsys):
    model, data, report = load("evaluate_timm").main()
    x, y = data.dataset.tensors
    x_adv = fgsm(model.eval(), x, y, eps=8 / 255)
    with torch.no_grad():
        attacked = model(x_adv).argmax(dim=1)
    assert torch.equal(report.predictions["FGSM"], attacked)
    assert str(report) in capsys.readouterr().out


DISTRIBUTED = re.compile(
    r"loss (\S+) -> (\S+), weights moved by (\S+), processes differ by (\S+)\n"
)
# Runs the program behind it, whose attacks then refuse what the drop-ins say must not be attacked.
GUARD = """
import runpy, sys
from torch.nn.parallel import DistributedDataParallel
from ferdlib import attacks

def guarded(attack):
    def checked(model, *arguments, **settings):
        assert not isinstance(model, DistributedDataParallel), "the wrapper is attacked"
        return attack(model, *arguments, **settings)
    return checked

attacks.pgd, attacks.utae_pgd = guarded(attacks.pgd), guarded(attacks.utae_pgd)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def output_of(*command):
    """What a program prints, run from the repository root with one thread per process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["lightning_module", "accelerate_loop"])
def test_two_processes_train_one_model(name, tmp_path):
    script, guard = str(DROP_INS / f"{name}.py"), tmp_path / "guard.py"
    guard.write_text(GUARD)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch = torchrun if name == "accelerate_loop" else []
    printed = output_of(*launch, str(guard), script, "--epochs", "2")
    assert "2 processes" in printed
    first, last, moved, apart = map(float, DISTRIBUTED.search(printed).groups())
    assert 0 < last < 0.8 * first
    assert moved > 0.5
    assert apart == 0
    if name == "lightning_module":
        assert ", 540 test digits" in printed
