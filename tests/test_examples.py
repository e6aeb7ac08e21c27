"""The examples run as a user runs them, at a small size."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from ferdlib.evaluation import PROTOCOLS, RobustnessReport, compare
from ferdlib.models import load_checkpoint, small_cnn
from ferdlib.recipes.data import load

ROOT = Path(__file__).parents[1]


def example(name, folder, *words):
    """Run a copy of one file, in a folder of its own."""
    shutil.copy(ROOT / "examples" / name, folder)
    return subprocess.run(
        [sys.executable, name, *words], cwd=folder, capture_output=True, text=True, check=False
    )


def test_quickstart(tmp_path):
    result = example("quickstart.py", tmp_path, "--teacher-epochs", "1", "--epochs", "2")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "runs" / "quickstart"
    reports = {n: RobustnessReport.load(out / f"report-{n}.json") for n in ("teacher", "student")}
    for report in reports.values():
        assert len(report) == 540
        assert report.protocol == PROTOCOLS["fair-ard"].at(eps=0.1).without("AutoAttack")
    assert str(compare(reports)) in result.stdout
    assert str(reports["student"]) in result.stdout
    assert "epoch" in result.stderr
    for name in ("classwise.png", "weights.png", "synthetic.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    student, (x, _) = small_cnn(1, 10, width=16), load("digits").batch(slice(None))
    student.load_state_dict(torch.load(out / "student.pt", weights_only=True))
    with torch.no_grad():
        predictions = student.eval()(x).argmax(dim=1)
    assert torch.equal(predictions, reports["student"].predictions["clean"])


def test_cifar10_ferd_smoke(tmp_path):
    result = example("cifar10_ferd.py", tmp_path, "--smoke")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "runs" / "cifar10_ferd"
    assert load_checkpoint(out / "student.pt")(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    report = RobustnessReport.load(out / "report-student.json")
    assert str(report) in result.stdout
    assert (out / "synthetic.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_input_ends_with_a_sentence(tmp_path):
    for name, words in (("quickstart.py", ["--epochs", "many"]), ("cifar10_ferd.py", [])):
        result = example(name, tmp_path, *words)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert "expected --teacher FILE" in result.stderr or "invalid int" in result.stderr
