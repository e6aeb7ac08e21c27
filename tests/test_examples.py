"""The examples run as a user runs them, at a small size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ferdlib.models import load_checkpoint, small_cnn

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "examples/quickstart.py", "--teacher-epochs", "6", "--epochs", "2"]
    command += ["--ablate", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return out, result.stdout, result.stderr


def test_quickstart_prints_the_table(quickstart):
    _, printed, progress = quickstart
    rows = [line for line in printed.splitlines() if re.match(r"^(teacher|FERD|all|w/o).*\|", line)]
    names = ["teacher", "FERD", "all three parts", "w/o reweighting", "w/o FAEs (= FERD)"]
    names += ["w/o UTAEs", "w/o all three"]
    assert [row.split("|")[0].strip() for row in rows] == names
    assert rows[1].split("|")[1:] == rows[4].split("|")[1:]
    for row in rows:
        cells = [re.findall(r"\d+\.\d+|nan|\(\d\)", cell) for cell in row.split("|")[1:]]
        assert [len(cell) for cell in cells] == [4, 4, 4, 4]
        clean, fgsm, pgd, cw = (float(cell[0]) for cell in cells)
        assert clean >= fgsm >= 0
        assert fgsm + 5 >= pgd >= 0
        assert fgsm + 5 >= cw >= 0
    assert "epoch" in progress


def test_quickstart_writes_pictures_and_a_student_that_loads(quickstart):
    out, _, _ = quickstart
    for name in ("classwise.png", "synthetic.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    rows = json.loads((out / "classwise.json").read_text())["models"]
    assert {len(accuracy) for row in rows.values() for accuracy in row.values()} == {10}
    student = load_checkpoint(out / "student.pt")
    teacher_size = sum(p.numel() for p in small_cnn(1, 10, width=40).parameters())
    assert 4 * sum(p.numel() for p in student.parameters()) <= teacher_size


def test_quickstart_help_and_wrong_input():
    for arguments, status in ((["--help"], 0), (["--epochs", "many"], 2)):
        command = [sys.executable, "examples/quickstart.py", *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == status
        assert "Traceback" not in result.stderr
