"""The exported files of a student: what is in them, what is refused, and the check that refuses it."""

from __future__ import annotations

import importlib
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import tyro
from onnx import numpy_helper

from ferdlib import metrics
from ferdlib.models import load_checkpoint, small_cnn

ROOT = Path(__file__).parents[1]
FILES = ("student.onnx", "student.pt2")
IMAGES = 60


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module("export_student")
    for name in ("export_student", "image_data"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def digits(script):
    return script.load("digits", Path(), "test")


@pytest.fixture(scope="module")
def checkpoint(script, tmp_path_factory):
    """A small CNN after a few steps on the digits."""
    images = script.load("digits", Path(), "train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small_cnn(1, 10, width=4)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for index in torch.randperm(len(images)).split(100)[:-1]:
            x, y = images.batch(index)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("student") / "student.pt"
    content = {"architecture": "small_cnn_4", "num_classes": 10, "in_channels": 1}
    torch.save(content | {"state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    command = [sys.executable, "examples/export_student.py", "--data", "digits"]
    command += ["--student", str(checkpoint), "--out", str(out), "--images", str(IMAGES)]
    command += ["--eps", "0.1", "--step-size", "0.025"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return out, result


def logits_of(path, x):
    if path.suffix == ".pt2":
        with torch.no_grad():
            return torch.export.load(path).module()(x)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def shifted(folder, name, amount):
    """Both files, one of them with another bias of the last layer: every logit moves by that amount."""
    files = {file: (folder / file).read_bytes() for file in FILES}
    if name == "student.onnx":
        model = onnx.load_from_string(files[name])
        (bias,) = (w for w in model.graph.initializer if w.name == "fc.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + amount, bias.name))
        files[name] = model.SerializeToString()
    else:
        program = torch.export.load(io.BytesIO(files[name]))
        with torch.no_grad():
            program.state_dict["fc.bias"].add_(amount)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        files[name] = buffer.getvalue()
    return files


def test_the_script_leaves_both_files_and_no_others_and_is_silent(run):
    out, result = run
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert result.stderr == ""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [1, 7])
def test_a_file_gives_the_checkpoints_logits(run, checkpoint, digits, name, size):
    x, _ = digits.batch(torch.arange(100, 100 + size))
    with torch.no_grad():
        expected = load_checkpoint(checkpoint)(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits_of(run[0] / name, x), expected, atol=1e-5, rtol=0)


def test_the_files_hold_no_images_and_no_paths(run):
    out, _ = run
    example = torch.export.load(out / "student.pt2").example_inputs[0][0]
    assert not example.any()
    with zipfile.ZipFile(out / "student.pt2") as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    contents.append((out / "student.onnx").read_bytes())
    for content in contents:
        assert b"cnn.py" not in content
        assert str(ROOT).encode() not in content


def judged(printed):
    """Average, worst class and NSD of each judge: clean, and under the attack."""
    lines = [line.split() for line in printed.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line and line[0] in ("PyTorch", "ONNX")}
    return {
        name: [[float(n) for n in row[k : k + 3]] for k in (0, 3)] for name, row in rows.items()
    }


def test_the_tables_say_what_the_files_do(run, script, digits):
    out, result = run
    cells = [
        [cell.strip() for cell in line.split("|")]
        for line in result.stdout.splitlines()
        if line.count("|") == 4
    ]
    rows = {row[0]: row[1:] for row in cells}
    for name in FILES:
        size, *times, difference = rows[name]
        assert float(size) == pytest.approx((out / name).stat().st_size / 1024, abs=0.1)
        assert float(difference) <= 1e-4
        for cell in times:
            median, low, high = map(float, re.findall(r"\d+\.\d+", cell))
            assert 0 < low <= median <= high
    assert "threads: 1" in result.stdout
    x, y = digits.batch(script.stratified(digits, IMAGES, 0))
    predictions = logits_of(out / "student.onnx", x).argmax(dim=1)
    accuracy = metrics.class_accuracy(metrics.confusion_matrix(predictions, y, 10))
    tables = judged(result.stdout)
    assert tables["ONNX"] == tables["PyTorch"]
    clean, attacked = tables["ONNX"]
    figures = [
        metrics.average(accuracy),
        metrics.worst_class(accuracy),
        metrics.nsd(accuracy) / 100,
    ]
    assert clean == pytest.approx([100 * float(f) for f in figures], abs=0.006)
    assert attacked[0] < clean[0]
    assert f"predictions that differ, of {IMAGES}: clean 0, PGD-20 0" in result.stdout


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_refused_with_the_difference(
    run, script, checkpoint, tmp_path, monkeypatch, name
):
    files = shifted(run[0], name, 2e-4)
    monkeypatch.setattr(script, "exported", lambda *_: files)
    args = script.Args(student=checkpoint, data="digits", images=10, out=tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    message = str(stop.value.code)
    assert message.startswith(f"export_student: expected {name} ")
    difference = float(re.search(r"a difference of (\S+)", message)[1])
    assert difference == pytest.approx(2e-4, rel=0.05)
    assert not args.out.exists()


def test_a_difference_within_the_tolerance_is_reported(run, script, checkpoint, digits):
    models = script.opened(shifted(run[0], "student.onnx", 5e-5), threads=1)
    differences = script.check(load_checkpoint(checkpoint), models, digits.batch(slice(20))[0])
    assert differences["student.onnx"] == pytest.approx(5e-5, rel=0.05)
    assert differences["student.pt2"] < 1e-6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda z: z * torch.nan, "a difference of nan in a batch of 1"),
        (lambda z: z[:, :9], r"expected logits \(1, 10\) of x, got \(1, 9\)"),
        (lambda z: z.flip(0), "in a batch of 7"),
    ],
)
def test_the_check_refuses(script, checkpoint, digits, wrong, message):
    model = load_checkpoint(checkpoint)
    x, _ = digits.batch(slice(70))
    with pytest.raises(ValueError, match=message):
        script.check(model, {"x": lambda x: wrong(model(x))}, x)


def test_small_logits_are_compared_by_their_own_size(script, checkpoint, digits):
    model = load_checkpoint(checkpoint)
    x, _ = digits.batch(slice(70))
    with pytest.raises(ValueError, match="in a batch of 1"):
        script.check(lambda x: 1e-5 * model(x), {"x": lambda x: 0 * model(x)}, x)


def test_another_judge_gives_another_row(script, checkpoint, digits, capsys):
    model = load_checkpoint(checkpoint)
    args = script.Args(student=checkpoint, data="digits", eps=0.1, step_size=0.025)
    script.judge(model, lambda x: -model(x), digits.part(torch.arange(30)), args)
    printed = capsys.readouterr().out
    tables = judged(printed)
    assert tables["PyTorch"] != tables["ONNX"]
    assert "predictions that differ, of 30: clean 30, PGD-20 30" in printed


def test_files_are_written_whole_or_not_at_all(script, tmp_path, monkeypatch):
    (tmp_path / "student.onnx").write_bytes(b"old")

    def full(path, content):
        path.touch()
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="no space left"):
            script.write(dict.fromkeys(FILES, b"new"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]
    assert (tmp_path / "student.onnx").read_bytes() == b"old"
    script.write(dict.fromkeys(FILES, b"new"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(
        FILES, b"new"
    )


def test_help_says_the_units(script, capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(script.Args, args=["--help"])
    assert stop.value.code == 0
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for unit in (
        "units of [0, 1] pixels",
        "same units",
        "in pixels",
        "Test images that are",
        "CPU threads",
    ):
        assert unit in text


def save(path, **entries):
    weights = small_cnn(entries.get("in_channels", 1), entries.get("num_classes", 10), width=4)
    content = {"architecture": "small_cnn_4", "num_classes": 10, "in_channels": 1}
    torch.save(content | entries | {"state_dict": weights.state_dict()}, path)


def nothing(path):
    pass


def truncated(path):
    save(path)
    path.write_bytes(path.read_bytes()[:2000])


def another_architecture(path):
    save(path, architecture="small_cnn_8")


def three_channels(path):
    save(path, in_channels=3)


def five_classes(path):
    save(path, num_classes=5)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (nothing, {}, "expected `path` to be a file"),
        (truncated, {}, "is it complete"),
        (another_architecture, {}, "weights of a small_cnn_8"),
        (save, {"architecture": "small_cnn_8"}, "weights of a small_cnn_8"),
        (save, {"architecture": "resnet19"}, "expected `architecture` to be one of"),
        (three_channels, {}, r"images of a shape that .* takes, got digits with \(1, 8, 8\)"),
        (five_classes, {}, "the 5 classes of .*, got digits with 10"),
        (save, {"images": 541}, "expected --images from 10, one of a class, to 540"),
        (save, {"images": 9}, "expected --images from 10"),
        (save, {"eps": 8.0}, "in units of"),
        (save, {"step_size": float("nan")}, "in units of"),
        (save, {"threads": 0}, "expected --threads of at least 1"),
        (save, {"data": "folder"}, "a folder .* of class folders, got nothing there"),
    ],
)
def test_wrong_input_is_one_sentence_and_writes_nothing(script, tmp_path, make, options, message):
    path = tmp_path / "student.pt"
    make(path)
    args = {"student": path, "data": "digits", "root": tmp_path, "out": tmp_path / "out"}
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(**args | options))
    text = str(stop.value.code)
    assert text.startswith("export_student: ")
    assert re.search(message, text)
    assert "\n" not in text
    assert not args["out"].exists()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(script, checkpoint, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(student=checkpoint, data="digits"))
    assert re.search(rf'expected {package} to be installed.*"ferdlib\[export\]"', stop.value.code)
