"""The CIFAR-scale scripts at the size of a smoke test, their options, and wrong input."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ferdlib.evaluation import PROTOCOLS, RobustnessReport
from ferdlib.models import build_model, load_checkpoint
from ferdlib.trainer import Checkpoints, FERDConfig

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"examples/{script}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def table_rows(result: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """A name, and average, worst class and NSD under each attack, of teacher and student."""
    pattern = r"^(?:teacher|student)(?: +(?:\d+\.\d+|-))+$"
    return [line.split() for line in re.findall(pattern, result.stdout, flags=re.MULTILINE)]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    start = time.perf_counter()
    result = run("cifar10_ferd", "--smoke", "--tensorboard", "--out", out)
    assert result.returncode == 0, result.stderr
    return out, result, time.perf_counter() - start


def test_smoke_runs_two_epochs_in_time_and_prints_the_table(smoke):
    _, result, seconds = smoke
    assert seconds < 120
    assert "2/2" in result.stderr
    assert [len(row) for row in table_rows(result)] == [16, 16]


def test_smoke_leaves_a_student_and_figures(smoke):
    out, result, _ = smoke
    assert load_checkpoint(out / "student.pt")(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert not (out / "checkpoints").exists()
    assert (out / "synthetic.png").read_bytes().startswith(b"\x89PNG")
    for name, *cells in table_rows(result):
        report = RobustnessReport.load(out / f"report-{name}.json")
        assert report.class_names == tuple(f"class{c:03d}" for c in range(10))
        assert report.protocol == PROTOCOLS["fair-ard"].at(eps=8 / 255).without("AutoAttack")
        averages = [100 * report[column].average for column in report.columns]
        assert [float(cell) for cell in cells[::3]] == pytest.approx(averages, abs=0.005001)
    assert any((out / "tensorboard").iterdir())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of three classes, and a teacher trained on it by the script that trains teachers."""
    from torchvision.utils import save_image

    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 12), ("test", 4)):
        for c in range(3):
            (root / split / f"class{c}").mkdir(parents=True)
            for k in range(count):
                image = torch.zeros(3, 8, 8)
                image[c] = 0.5 + 0.5 * torch.rand(8, 8)
                save_image(image, root / split / f"class{c}" / f"{k}.png")
    return root


TEACHER = [
    "--data",
    "folder",
    "--architecture",
    "small_cnn_4",
    "--batch-size",
    "5",
    "--val-images",
    "6",
]
TEACHER += ["--augment", "none", "--attack-steps", "2", "--lr", "0.05"]


@pytest.fixture(scope="module")
def teacher(images):
    result = run(
        "train_teacher", *TEACHER, "--root", images, "--epochs", "4", "--out", images / "t"
    )
    assert result.returncode == 0, result.stderr
    return images / "t" / "teacher.pt", result.stdout


def test_train_teacher_learns_and_tests(teacher):
    path, printed = teacher
    model = load_checkpoint(path)
    assert model(torch.rand(1, 3, 8, 8)).shape == (1, 3)
    report = RobustnessReport.load(path.with_name("report.json"))
    assert str(report) in printed
    assert len(report) == 12
    assert report.columns == ("clean", "FGSM", "PGD-20", "CW-inf", "worst case")
    assert report["clean"].average > 0.34  # three classes, one colour each


@pytest.mark.parametrize(
    "options",
    [["sat"], ["trades"], ["natural", "--precision", "bfloat16", "--channels-last"]],
    ids=lambda o: o[0],
)
def test_a_resumed_teacher_is_the_undisturbed_one(options, images, tmp_path):
    common = [*TEACHER, "--root", images, "--epochs", "2", "--method", *options]
    stopped = run("train_teacher", *common, "--out", tmp_path, "--max-minutes", "0")
    assert "stopped after epoch 1 of 2" in stopped.stdout, stopped.stderr
    assert not (tmp_path / "teacher.pt").exists()
    resume = ["--out", tmp_path, "--resume", "auto"]
    other = run("train_teacher", *common, *resume, "--lr", "0.01")
    assert "got others for --lr" in error(other)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:3000])
    assert "a complete checkpoint" in error(run("train_teacher", *common, *resume))
    checkpoint.write_bytes(whole)
    resumed = run("train_teacher", *common, *resume)
    assert resumed.returncode == 0, resumed.stderr
    straight = run("train_teacher", *common, "--out", tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    ours, theirs = (
        torch.load(folder / "teacher.pt", weights_only=True)["state_dict"]
        for folder in (tmp_path, tmp_path / "straight")
    )
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def ferd(images, teacher, *more):
    sizes = ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "6", "--generator-steps", "2"]
    sizes += ["--generator-width", "4", "--student-steps", "2", "--num-classes", "3"]
    sizes += [
        "--bottleneck-steps",
        "2",
        "--margin-attack-steps",
        "2",
        "--image-shape",
        "3",
        "8",
        "8",
    ]
    return run(
        "cifar10_ferd", "--data", "folder", "--root", images, "--teacher", teacher[0],
        "--student", "small_cnn_2", *sizes, *more,
    )  # fmt: skip


@pytest.mark.parametrize("preset", ["default", "paper", "released"])
def test_a_resumed_run_is_the_undisturbed_one(preset, images, teacher, tmp_path):
    def student(folder):
        return torch.load(folder / "student.pt", weights_only=True)["state_dict"]

    common = ["--preset", preset]
    stopped = ferd(images, teacher, *common, "--out", tmp_path, "--max-minutes", "0")
    assert "stopped after epoch 1 of 2" in stopped.stdout, stopped.stderr
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    state = Checkpoints.read(checkpoint)[1]["trainer"]["config"]
    resume = ["--resume", "auto" if preset == "default" else checkpoint]
    resumed = ferd(images, teacher, *common, "--out", tmp_path, *resume)
    assert resumed.returncode == 0, resumed.stderr
    assert [len(row) for row in table_rows(resumed)] == [16, 16]
    straight = ferd(images, teacher, *common, "--out", tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    ours, theirs = student(tmp_path), student(tmp_path / "straight")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    chosen = {"default": FERDConfig, "paper": FERDConfig.paper, "released": FERDConfig.released}
    expected = chosen[preset](num_classes=3, layer="layer4", epochs=2, warmup_epochs=1)
    for name in ("attack_model", "mask_threshold", "reweighting", "gamma", "optimise_latents"):
        assert state[name] == getattr(expected, name), name


def test_help_has_every_field_with_its_unit_or_symbol():
    printed = " ".join(run("cifar10_ferd", "--help").stdout.replace("│", " ").split())
    for field in dataclasses.fields(FERDConfig):
        assert f"--{field.name.replace('_', '-')}" in printed
    assert "default: teacher" in " ".join(
        run("cifar10_ferd", "--preset", "paper", "--help").stdout.replace("│", " ").split()
    )
    (tree,) = ast.parse(inspect.getsource(FERDConfig)).body
    texts = [n.value.value for n in tree.body if isinstance(n, ast.Expr)][1:]
    for text in texts:
        assert re.search("paper|release|kim et al", text.lower()), text


def error(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "expected" in line]
    return line


def test_wrong_input_gets_one_sentence_and_nothing_is_written(images, teacher, tmp_path):
    out = tmp_path / "out"
    small = tmp_path / "wrn.pt"
    torch.save(build_model("wide_resnet_10_1", 3).state_dict(), small)
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(small.read_bytes()[:5000])
    two = tmp_path / "two.pt"
    torch.save(build_model("small_cnn_4", 2).state_dict(), two)
    grey = tmp_path / "grey.pt"
    weights = build_model("small_cnn_4", 3, in_channels=1).state_dict()
    torch.save(
        {
            "architecture": "small_cnn_4",
            "num_classes": 3,
            "in_channels": 1,
            "state_dict": weights,
        },
        grey,
    )
    known = ["--teacher-architecture", "small_cnn_4"]
    cases = {
        "another architecture": (["--teacher", small, *known], "missing: "),
        "truncated": (["--teacher", truncated, *known], "is it complete"),
        "no architecture": (["--teacher", small], "`architecture`"),
        "more classes than the teacher": (["--teacher", two, *known], "fc.weight"),
        "other image size": (["--image-shape", "3", "16", "16"], "--image-shape to be the data's"),
        "other number of classes": (["--num-classes", "4"], "--num-classes to be the data's, 3"),
        "unknown student": (["--student", "resnet7"], "`architecture`"),
        "no such layer": (["--layer", "layer9"], "`layer_name`"),
        "no data": (["--root", tmp_path / "nowhere"], "got nothing there"),
        "not a checkpoint": (["--resume", small], "a file that Checkpoints.save wrote"),
        "half a checkpoint": (["--resume", truncated], "a complete checkpoint"),
        "grey teacher": (["--teacher", grey], "channels"),
        "no test images": (["--test-images", "0"], "1..12 images, got 0"),
        "no radius": (["--eps", "0"], "`eps`"),
        "no checkpoints": (["--checkpoint-every", "0"], "at least 1, got 0"),
        "half a normalisation": (["--teacher-mean", "0.5", "0.5", "0.5"], "--teacher-std together"),
    }
    for name, (arguments, part) in cases.items():
        message = error(ferd(images, teacher, "--out", out, *arguments))
        assert part in message, name
    empty = tmp_path / "empty"
    (empty / "test").mkdir(parents=True)
    assert "a folder for each of at least 2 classes" in error(
        ferd(images, teacher, "--out", out, "--root", empty)
    )
    assert not out.exists()
