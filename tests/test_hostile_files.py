"""A file that wants to run something when it is read is refused in one sentence; and nothing calls home."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro

import ferdlib
from ferdlib.models import build_model, load_checkpoint, load_robustbench
from ferdlib.trainer import Checkpoints

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(p.stem for p in (ROOT / "examples").glob("*.py"))


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


@pytest.fixture(scope="module")
def examples():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


# The script, where the file lies, and the options that have it read.
DIGITS = ["--data", "digits", "--device", "cpu"]
ARD = [*DIGITS, "--student", "small_cnn_2", "--teacher-architecture", "small_cnn_4"]
READS = {
    "cifar10_ferd --teacher": ("t.pt", ["--smoke", "--teacher", "FILE"]),
    "cifar10_ferd --resume": ("c.pt", ["--smoke", "--resume", "FILE"]),
    "cifar10_ferd --resume auto": ("out/checkpoints/NEWEST", ["--smoke", "--resume", "auto"]),
    "ard --teacher": ("t.pt", [*ARD, "--teacher", "FILE"]),
    "ard --natural-teacher": ("t.pt", [*ARD, "--method", "mtard", "--natural-teacher", "FILE"]),
    "ard --resume": (
        "out/checkpoints/student/NEWEST",
        [*ARD, "--method", "sat", "--resume", "auto"],
    ),
    "ard --resume, its teacher": ("out/checkpoints/teacher/NEWEST", [*ARD, "--resume", "auto"]),
    "train_teacher --resume": (
        "out/checkpoints/NEWEST",
        [*DIGITS, "--architecture", "small_cnn_2", "--resume", "auto"],
    ),
    "quickstart --resume": ("out/checkpoints/teacher/NEWEST", ["--resume", "auto"]),
    "quickstart --resume, its student": (
        "out/checkpoints/student-0/NEWEST",
        ["--resume", "auto", "--teacher-epochs", "0"],
    ),
    "evaluate --checkpoint": ("m.pt", [*DIGITS, "--checkpoint", "FILE"]),
    "evaluate --against": ("r.json", [*DIGITS, "--checkpoint", "MODEL", "--against", "FILE"]),
    "evaluate --resume": (
        "out/parts/report/header.json",
        [*DIGITS, "--checkpoint", "MODEL", "--resume"],
    ),
    "export_student --student": ("s.pt", ["--data", "digits", "--student", "FILE"]),
    "fair_ard_table": (
        "out/teacher-0.pt",
        ["--methods", "ard", "--seeds", "0", "--jobs", "1", "--epochs", "1"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", READS)
def test_every_example_refuses_it(case, kind, examples, tmp_path, marker, monkeypatch):
    script, (place, options) = case.split()[0], READS[case]
    module = examples(script)
    path = plant(tmp_path / place.replace("NEWEST", "checkpoint-0000000001.pt"), marker, kind)
    if script == "fair_ard_table":  # its teacher was trained and measured
        (path.parent / "teacher-0.json").write_text("{}")
    if case == "quickstart --resume, its student":
        small = module.small_cnn(1, 10, width=module.TEACHER_WIDTH)
        monkeypatch.setattr(module, "train_teacher", lambda *_: small)
    model = tmp_path / "model.pt"
    weights = build_model("small_cnn_2", 10, in_channels=1).state_dict()
    sizes = {"architecture": "small_cnn_2", "num_classes": 10, "in_channels": 1}
    torch.save(sizes | {"state_dict": weights}, model)
    given = {"FILE": str(path), "MODEL": str(model)}
    words = [*(given.get(word, word) for word in options), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        module.main(words if script == "cifar10_ferd" else tyro.cli(module.Args, args=words))
    assert isinstance(stop.value.code, str), "one sentence, and exit status 1"
    assert "\n" not in stop.value.code
    assert path.name in stop.value.code
    assert not marker.exists()


OFFLINE = """
import importlib, runpy, socket, sys

class Refused(socket.socket):
    def __init__(self, *_, **__):
        raise AssertionError("a socket was asked for")

socket.socket = Refused
sys.path.insert(0, "examples")
for name in sys.argv[1].split(","):
    importlib.import_module(name)
sys.argv = ["cifar10_ferd.py", "--smoke", "--test-images", "10", "--out", sys.argv[2]]
runpy.run_path("examples/cifar10_ferd.py", run_name="__main__")
"""


def test_neither_the_imports_nor_a_smoke_run_open_a_socket(tmp_path):
    modules = [m.name for m in pkgutil.walk_packages(ferdlib.__path__, "ferdlib.")]
    names = ",".join([*modules, *SCRIPTS])
    command = [sys.executable, "-c", OFFLINE, names, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "student.pt").is_file()


def test_a_socket_would_be_noticed(tmp_path):
    program = OFFLINE.replace("importlib.import_module(name)", "socket.socket()")
    command = [sys.executable, "-c", program, "ferdlib", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "a socket was asked for" in result.stderr
