"""The examples run as a user runs them, at a small size."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ferdlib.evaluation import PROTOCOLS, RobustnessReport, compare
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


def test_quickstart_prints_the_table_and_the_test(quickstart):
    out, printed, progress = quickstart
    lines = re.findall(r"^(\S.*?)((?: +(?:\d+\.\d+|-)){15})$", printed, flags=re.MULTILINE)
    names = ["teacher", "FERD", "all three parts", "w/o reweighting", "w/o FAEs (= FERD)"]
    names += ["w/o UTAEs", "w/o all three"]
    rows = {name: cells.split() for name, cells in lines}
    assert list(rows) == names
    assert rows["FERD"] == rows["w/o FAEs (= FERD)"]
    for row in rows.values():
        numbers = [float(cell) if cell != "-" else float("nan") for cell in row]
        clean, fgsm, pgd, cw, worst_case = numbers[::3]
        assert 100 >= clean >= fgsm >= 0
        assert fgsm + 5 >= pgd >= worst_case >= 0
        assert fgsm + 5 >= cw >= worst_case
        averages_and_worst = zip(numbers[::3], numbers[1::3], strict=True)
        assert all(average >= worst >= 0 for average, worst in averages_and_worst)
    reports = {n: RobustnessReport.load(out / f"report-{n}.json") for n in ("teacher", "FERD")}
    for name, report in reports.items():
        assert report.columns == ("clean", "FGSM", "PGD-20", "CW-inf", "worst case")
        cells = [(100 * report[c].average, 100 * report[c].worst_class) for c in report.columns]
        shown = [
            (float(a), float(w)) for a, w in zip(rows[name][::3], rows[name][1::3], strict=True)
        ]
        assert shown == [pytest.approx(cell, abs=0.005001) for cell in cells]
    assert str(reports["FERD"]) in printed
    assert str(compare(reports).test("FERD", "teacher", "PGD-20")) in printed
    assert "epoch" in progress


def test_quickstart_attacks_at_its_threat_model(quickstart):
    report = RobustnessReport.load(quickstart[0] / "report-FERD.json")
    assert len(report) == 540
    expected = PROTOCOLS["fair-ard"].at(eps=0.1).without("AutoAttack")
    assert report.protocol == expected
    for attack, steps in zip(report.protocol.attacks, (1, 20, 20), strict=True):
        assert attack.steps == steps
        assert attack.step_size == pytest.approx(0.1 if steps == 1 else 0.025)


def test_quickstart_writes_pictures_and_a_student_that_loads(quickstart):
    out, _, _ = quickstart
    for name in ("classwise.png", "weights.png", "synthetic.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    student = load_checkpoint(out / "student.pt")
    teacher_size = sum(p.numel() for p in small_cnn(1, 10, width=40).parameters())
    assert 4 * sum(p.numel() for p in student.parameters()) <= teacher_size
    report = RobustnessReport.load(out / "report-FERD.json")
    assert report.manifest["model"]["parameters"] == sum(p.numel() for p in student.parameters())
    with torch.no_grad():
        predictions = student(digits(seed=0)).argmax(dim=1)
    assert torch.equal(predictions, report.predictions["clean"])


def digits(seed):
    """The quickstart's test digits."""
    bunch = load_digits()
    _, test = train_test_split(
        range(len(bunch.target)), test_size=540, random_state=seed, stratify=bunch.target
    )
    return torch.tensor(bunch.images, dtype=torch.float32)[test, None] / 16


def test_quickstart_help_and_wrong_input():
    for arguments, status in ((["--help"], 0), (["--epochs", "many"], 2)):
        command = [sys.executable, "examples/quickstart.py", *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == status
        assert "Traceback" not in result.stderr
