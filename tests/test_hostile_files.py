"""A file that wants to run something when it is read is refused in one sentence; and nothing calls home."""

from __future__ import annotations

import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import refused, save_model

import ferdlib
from ferdlib.evaluation import evaluate
from ferdlib.models import build_model, load_checkpoint, load_robustbench
from ferdlib.trainer import Checkpoints

ROOT = Path(__file__).parents[1]


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


def plant(path, marker, kind):
    """The hostile object alone, or among weights in a file like ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile(marker)))
    else:
        weights = build_model("small_cnn_4", 10, in_channels=1).state_dict()
        content = {"format": 1, "step": 1, "state": {"a": Hostile(marker)}, "state_dict": weights}
        torch.save(content | {"architecture": "small_cnn_4"}, path)
    return path


KINDS = ["pickle", "torch"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_plant_is_hostile(kind, tmp_path, marker):
    path = plant(tmp_path / "file.pt", marker, kind)
    if kind == "pickle":
        pickle.loads(path.read_bytes()).close()
    else:
        torch.load(path, weights_only=False)["state"]["a"].close()
    assert marker.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "read",
    [
        load_checkpoint,
        lambda path: load_robustbench(path, name="model_cifar_wrn"),
        Checkpoints.read,
    ],
)
def test_the_library_refuses_it(read, kind, tmp_path, marker):
    path = plant(tmp_path / "file.pt", marker, kind)
    with pytest.raises(ValueError, match="expected .*file.pt"):
        read(path)
    assert not marker.exists()


# The command, where the file lies, and the options that have it read.
SAT = ["--smoke", "--method", "sat", "--rule", "none"]
READS = {
    "distill --teacher": ("t.pt", ["--smoke", "--teacher", "FILE"]),
    "distill --resume": ("out/checkpoints/student/NEWEST", ["--smoke", "--teacher", "RGB"]),
    "distill --resume, its teacher": ("out/checkpoints/teacher/NEWEST", ["--smoke"]),
    "train --teacher": ("t.pt", ["--smoke", "--teacher", "FILE"]),
    "train --natural-teacher": (
        "t.pt",
        ["--smoke", "--method", "mtard", "--natural-teacher", "FILE"],
    ),
    "train --resume": ("out/checkpoints/student/NEWEST", SAT),
    "train --resume, its teacher": ("out/checkpoints/teacher/NEWEST", ["--smoke"]),
    "quickstart --resume": ("out/checkpoints/teacher/NEWEST", []),
    "evaluate --checkpoint": ("m.pt", ["--data", "digits", "--checkpoint", "FILE"]),
    "evaluate --against": (
        "r.json",
        ["--data", "digits", "--checkpoint", "MODEL", "--against", "FILE"],
    ),
    "evaluate --resume": (
        "out/parts/report/header.json",
        ["--data", "digits", "--checkpoint", "MODEL", "--resume"],
    ),
    "export --student": ("s.pt", ["--data", "digits", "--student", "FILE"]),
    "reproduce": (
        "out/ard-0/report.json",
        ["--methods", "ard", "--seeds", "0", "--teacher-epochs", "1"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", READS)
def test_every_command_refuses_it(case, kind, tmp_path, marker, monkeypatch):
    command, (place, options) = case.split()[0], READS[case]
    path = plant(tmp_path / place.replace("NEWEST", "checkpoint-0000000001.pt"), marker, kind)
    if command == "reproduce":
        (tmp_path / "out" / "teacher-0").mkdir()
        save_report(tmp_path / "out" / "teacher-0" / "report.json")
    given = {"FILE": path, "MODEL": save_model(tmp_path / "model.pt")}
    given["RGB"] = save_model(tmp_path / "rgb.pt", in_channels=3)
    words = [*(given.get(word, word) for word in options), "--out", tmp_path / "out"]
    words += ["--resume", "auto"] if "checkpoints" in place else []
    assert path.name in refused(command, *words)
    assert not marker.exists()


def save_report(path):
    """Write a report as `evaluate` does."""
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4) % 2
    model = build_model("small_cnn_2", 2, in_channels=1)
    evaluate(model, (x, y), "quick", num_classes=2).save(path)


OFFLINE = """
import importlib, socket, sys

class Refused(socket.socket):
    def __init__(self, *_, **__):
        raise AssertionError("a socket was asked for")

socket.socket = Refused
for name in sys.argv[1].split(","):
    importlib.import_module(name)
from ferdlib.__main__ import main
main(["distill", "--smoke", "--test-images", "10", "--out", sys.argv[2]])
"""


def test_neither_the_imports_nor_a_smoke_run_open_a_socket(tmp_path):
    modules = [m.name for m in pkgutil.walk_packages(ferdlib.__path__, "ferdlib.")]
    names = ",".join(modules)
    command = [sys.executable, "-c", OFFLINE, names, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "student.pt").is_file()


def test_a_socket_would_be_noticed(tmp_path):
    program = OFFLINE.replace("importlib.import_module(name)", "socket.socket()")
    command = [sys.executable, "-c", program, "ferdlib", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "a socket was asked for" in result.stderr
