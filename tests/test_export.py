"""`ferdlib export`: what is in the files, what is refused, and the check that refuses it."""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from commands import refused, run, save_model
from onnx import numpy_helper

from ferdlib import metrics
from ferdlib.models import load_checkpoint
from ferdlib.recipes import data, export
from ferdlib.recipes.options import Export

ROOT = Path(__file__).parents[1]
FILES = ("student.onnx", "student.pt2")
IMAGES = 60


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small CNN after a few steps on the digits."""
    path = save_model(tmp_path_factory.mktemp("student") / "student.pt")
    images, model = data.load("digits", split="train"), load_checkpoint(path).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for index in torch.randperm(2 * len(images)).remainder(len(images)).split(100)[:-1]:
            x, y = images.batch(index)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return save_model(path, state_dict=model.state_dict())


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("export"), []
    words = ["export", "--data", "digits", "--student", checkpoint, "--test-images", IMAGES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(map(str, parts))))
        run(*words, "--eps", 0.1, "--step-size", 0.025, "--out", out)
    return out, "\n".join(lines)


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


def test_the_folder_has_both_files_and_a_report(finished):
    out, _ = finished
    assert sorted(path.name for path in out.iterdir()) == ["export.json", *sorted(FILES)]
    found = json.loads((out / "export.json").read_text("utf-8"))
    assert found["student.onnx"]["bytes"] == (out / "student.onnx").stat().st_size


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [1, 7])
def test_a_file_gives_the_checkpoints_logits(finished, checkpoint, digits, name, size):
    x, _ = digits.batch(torch.arange(100, 100 + size))
    with torch.no_grad():
        expected = load_checkpoint(checkpoint)(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits_of(finished[0] / name, x), expected, atol=1e-5, rtol=0)


def test_the_files_hold_no_images_and_no_paths(finished):
    out, _ = finished
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
    # A model without a right answer has no NSD.
    lines = [line.replace(" - ", " nan ").split() for line in printed.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line and line[0] in ("PyTorch", "ONNX")}
    return {
        name: [[float(n) for n in row[k : k + 3]] for k in (0, 3)] for name, row in rows.items()
    }


def test_the_tables_say_what_the_files_do(finished, digits):
    out, printed = finished
    cells = [
        [cell.strip() for cell in line.split("|")]
        for line in printed.splitlines()
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
    assert "threads: 1" in printed
    x, y = digits.batch(data.stratified(digits, IMAGES, 0))
    predictions = logits_of(out / "student.onnx", x).argmax(dim=1)
    accuracy = metrics.class_accuracy(metrics.confusion_matrix(predictions, y, 10))
    tables = judged(printed)
    assert tables["ONNX"] == tables["PyTorch"]
    clean, attacked = tables["ONNX"]
    figures = [
        metrics.average(accuracy),
        metrics.worst_class(accuracy),
        metrics.nsd(accuracy) / 100,
    ]
    assert clean == pytest.approx([100 * float(f) for f in figures], abs=0.006)
    assert attacked[0] < clean[0]
    assert f"predictions that differ, of {IMAGES}: clean 0, PGD-20 0" in printed


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_refused_with_the_difference(
    finished, checkpoint, tmp_path, monkeypatch, name
):
    files = shifted(finished[0], name, 2e-4)
    monkeypatch.setattr(export, "exported", lambda *_: files)
    words = ["--student", checkpoint, "--data", "digits", "--test-images", 10]
    message = refused("export", *words, "--out", tmp_path / "out")
    assert f"expected {name} " in message
    difference = float(re.search(r"a difference of (\S+)", message)[1])
    assert difference == pytest.approx(2e-4, rel=0.05)
    assert not (tmp_path / "out").exists()


def test_a_difference_within_the_tolerance_is_reported(finished, checkpoint, digits):
    models = export.opened(shifted(finished[0], "student.onnx", 5e-5), threads=1)
    differences = export.check(load_checkpoint(checkpoint), models, digits.batch(slice(20))[0])
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
def test_the_check_refuses(checkpoint, digits, wrong, message):
    model = load_checkpoint(checkpoint)
    x, _ = digits.batch(slice(70))
    with pytest.raises(ValueError, match=message):
        export.check(model, {"x": lambda x: wrong(model(x))}, x)


def test_small_logits_are_compared_by_their_own_size(checkpoint, digits):
    model = load_checkpoint(checkpoint)
    x, _ = digits.batch(slice(70))
    with pytest.raises(ValueError, match="in a batch of 1"):
        export.check(lambda x: 1e-5 * model(x), {"x": lambda x: 0 * model(x)}, x)


def test_another_judge_gives_another_row(checkpoint, digits):
    model = load_checkpoint(checkpoint)
    args = Export(student=checkpoint, eps=0.1, step_size=0.025)
    some = digits.part(torch.arange(30)).batch(slice(None))
    printed = export.judged(model, lambda x: -model(x), some, args)
    tables = judged(printed)
    assert tables["PyTorch"] != tables["ONNX"]
    assert "predictions that differ, of 30: clean 30, PGD-20 30" in printed


def rgb(path):
    return save_model(path, in_channels=3)


@pytest.mark.parametrize(
    ("make", "words", "message"),
    [
        (lambda path: None, [], "to be a file"),
        (lambda path: path.write_bytes(b"no checkpoint"), [], "is it complete"),
        (save_model, ["--architecture", "resnet19"], "'resnet19'"),
        (save_model, ["--architecture", "small_cnn_8"], "weights of a small_cnn_8"),
        (rgb, [], r"images \(2, 1, 8, 8\)"),
        (lambda path: save_model(path, num_classes=5), [], "for 10 classes"),
        (
            save_model,
            ["--test-images", 541],
            "expected --test-images from 10, one of a class, to 540",
        ),
        (save_model, ["--test-images", 9], "expected --test-images from 10"),
        (save_model, ["--eps", 8], "in units of"),
        (save_model, ["--step-size", "nan"], "in units of"),
        (save_model, ["--threads", 0], "expected --threads of at least 1"),
        (save_model, ["--data", "folder"], "a folder .* of class folders, got nothing there"),
    ],
)
def test_wrong_input_is_one_sentence_and_writes_nothing(tmp_path, make, words, message):
    make(tmp_path / "student.pt")
    common = ["--student", tmp_path / "student.pt", "--data", "digits", "--root", tmp_path]
    assert re.search(message, refused("export", *common, "--out", tmp_path / "out", *words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(checkpoint, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    sentence = refused("export", "--student", checkpoint, "--data", "digits")
    assert re.search(rf'expected {package} to be installed.*"ferdlib\[export\]"', sentence)
