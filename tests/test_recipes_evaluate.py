"""`ferdlib evaluate`: its outputs agree with each other and with the library, on any model and data."""

from __future__ import annotations

import csv
import errno
import os
import re
import struct
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from commands import refused, run, save_model
from torch.utils.data import Subset
from torchvision.utils import save_image

from ferdlib.evaluation import PROTOCOLS, RobustnessReport, compare, evaluate
from ferdlib.models import Normalized, load_checkpoint
from ferdlib.recipes import data

EPS = 0.1
IMAGES = 60
TEXTS = {"report.json", "report.md", "report.tex", "report.csv"}
FIGURES = {"classwise.png", "confusion.png", "survival.png", "sweep.png"}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """After a few steps on the digits that are not attacked."""
    path = save_model(tmp_path_factory.mktemp("model") / "student.pt")
    images, model = data.load("digits", split="train"), load_checkpoint(path).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for index in torch.randperm(2 * len(images)).remainder(len(images)).split(100)[:-1]:
            x, y = images.batch(index)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    content = torch.load(path, weights_only=True)
    torch.save(content | {"state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """A run with all that can be had: its words, what it printed, and its report."""
    out = tmp_path_factory.mktemp("runs") / "a"
    words = ["evaluate", "--checkpoint", checkpoint, "--data", "digits", "--eps", EPS]
    words += ["--without", "AutoAttack", "CW-inf", "--test-images", IMAGES, "--resume"]
    whole = [*words, "--sweep", EPS, 0.03, "--trust", "--out", out]
    printed = printed_by(whole)
    return words, whole, printed, out, RobustnessReport.load(out / "report.json")


def printed_by(words):
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(map(str, parts))))
        run(*words)
    return "\n".join(lines)


def directly(images, checkpoint, *, count=IMAGES, protocol="fair-ard"):
    """The library's report of what the command was asked for."""
    attacks = PROTOCOLS[protocol].at(eps=EPS)
    if protocol == "fair-ard":
        attacks = attacks.without("AutoAttack", "CW-inf")
    chosen = Subset(images, data.chosen(images, count, 0).indices)
    names = images.class_names
    model = load_checkpoint(checkpoint)
    return evaluate(model, chosen, attacks, num_classes=len(names), class_names=names)


def test_the_report_is_the_librarys(finished, digits, checkpoint):
    *_, report = finished
    assert replace(report, findings=()) == directly(digits, checkpoint)
    assert len(report.findings) > 5
    assert report["clean"].average > report["PGD-20"].average > 0
    assert torch.bincount(report.targets).tolist() == [IMAGES // 10] * 10
    assert torch.equal(digits.labels[report.index], report.targets)


def test_all_files_are_there_and_agree(finished):
    _, _, printed, out, report = finished
    assert {path.name for path in out.iterdir()} == TEXTS | FIGURES | {"parts"}
    for name in FIGURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert (out / "report.md").read_text("utf-8") == report.to_markdown()
    assert (out / "report.tex").read_text("utf-8") == report.to_latex()
    with open(out / "report.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for column in report.columns:
        found = [float(row["accuracy"]) for row in rows if row["attack"] == column]
        assert found == report[column].class_accuracy.tolist()
    assert str(report) in printed
    written, again = printed.splitlines()[-2:]
    assert all(name in written for name in TEXTS | FIGURES)
    assert f"--against {out / 'report.json'}" in again


def test_the_sweep_begins_with_the_clean_images_and_meets_the_report(finished):
    _, _, printed, _, report = finished
    lines = [re.split(r"  +", line) for line in printed.splitlines()]
    start = next(k for k, line in enumerate(lines) if line[0] == "eps")
    rows = {float(eps): cells for eps, *cells in lines[start + 1 : start + 4]}
    assert list(rows) == [0, 0.03, EPS]
    averages = [float(cells[0].split()[0]) for cells in rows.values()]
    assert averages == sorted(averages, reverse=True)
    for eps, column in ((0, "clean"), (EPS, "PGD-20")):
        average, worst, name = rows[eps]
        found = report[column]
        for cell, value, interval in (
            (average, found.average, found.average_interval),
            (worst, found.worst_class, found.worst_class_interval),
        ):
            shown = [float(n) for n in re.findall(r"\d+\.\d", cell)]
            assert shown == pytest.approx([100 * value, *(100 * interval).tolist()], abs=0.0501)
        assert name == found.worst_name


def test_a_resumed_run_is_the_same_without_an_attack(finished, monkeypatch, tmp_path):
    _, whole, printed, out, report = finished
    parts = {path: path.stat().st_mtime_ns for path in (out / "parts").rglob("*.json")}
    assert {path.parent.name for path in parts} == {"report", "sweep-0.03", f"sweep-{EPS}"}
    assert printed_by(whole) == printed
    assert RobustnessReport.load(out / "report.json") == report
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    save_model(tmp_path / "other.pt", seed=1)
    assert "expected the model" in refused(*whole, "--checkpoint", tmp_path / "other.pt")


def test_a_report_that_cannot_be_written_is_printed(checkpoint, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ferdlib.evaluation.report.write_file", full)
    said = refused(*QUICK, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert "RobustnessReport.save: expected to write '" in said
    assert "20 samples of 10 classes, protocol quick" in capsys.readouterr().out


def test_against_puts_both_side_by_side_and_tests_them(finished, tmp_path, checkpoint):
    words, _, _, out, report = finished
    save_model(tmp_path / "untrained.pt")
    other = [*words, "--checkpoint", tmp_path / "untrained.pt", "--no-resume"]
    other += ["--against", out / "report.json"]
    printed = printed_by([*other, "--out", tmp_path / "b"])
    mine = RobustnessReport.load(tmp_path / "b" / "report.json")
    comparison = compare({"this": mine, "against": report})
    assert str(comparison) in printed
    assert str(comparison.test("this", "against", "worst case")) in printed
    assert mine["clean"].average < report["clean"].average
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == TEXTS | FIGURES - {"sweep.png"}  # and no parts
    printed = printed_by([*other, "--test-images", 50, "--out", tmp_path / "c"])
    assert "no paired test, Comparison.test: expected reports on the same samples" in printed
    common = [*words, "--no-resume", "--against", out / "report.json", "--out", tmp_path / "d"]
    assert "expected one setting for each attack" in refused(*common, "--eps", 0.2)
    replace(report, class_names=tuple("abcdefghij")).save(tmp_path / "named.json")
    assert "the same classes" in refused(*common, "--against", tmp_path / "named.json")


FACTORY = """
from ferdlib.models import load_checkpoint

def trained():
    return load_checkpoint({path!r}).train()

def nothing():
    return None

def broken():
    raise KeyError("weights")
"""


@pytest.fixture
def package(tmp_path, checkpoint, monkeypatch):
    """A package of somebody's, in the folder where they are."""
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "robust.py").write_text(FACTORY.format(path=str(checkpoint)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
        del sys.modules[name]


QUICK = ["evaluate", "--data", "digits", "--test-images", 20, "--protocol", "quick"]


def test_a_factory_is_imported_from_where_the_user_is(package, digits, checkpoint):
    run(*QUICK, "--factory", "nets.robust:trained", "--eps", EPS, "--out", "out")
    report = RobustnessReport.load(package / "out" / "report.json")
    assert report == directly(digits, checkpoint, count=20, protocol="quick")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nets.robust:nothing", "got TypeError: 'NoneType' object is not callable"),
        ("nets.robust:broken", "with KeyError: 'weights'"),
        ("nets.robust:absent", "with AttributeError: .*'absent'"),
        ("nets.robust", "with AttributeError"),
        ("nets.fragile:trained", "with ModuleNotFoundError: No module named 'nets.fragile'"),
    ],
)
def test_a_factory_that_makes_no_model(package, factory, message):
    assert re.search(message, refused(*QUICK, "--factory", factory, "--out", "out"))
    assert not (package / "out").exists()


def test_mean_and_std_are_put_inside(digits, checkpoint, tmp_path):
    words = [*QUICK, "--checkpoint", checkpoint, "--mean", 0.3, "--std", 0.4, "--out", tmp_path]
    run(*words)
    report = RobustnessReport.load(tmp_path / "report.json")
    model = Normalized(load_checkpoint(checkpoint), [0.3], [0.4])
    chosen = Subset(digits, data.chosen(digits, 20, 0).indices)
    found = evaluate(model, chosen, PROTOCOLS["quick"], num_classes=10)
    assert replace(found, class_names=report.class_names) == report


def test_options_reach_the_library(checkpoint, tmp_path, monkeypatch):
    asked = []

    def stopped(_, data, protocol, **options):
        asked.append((protocol, len(data), options["fast"], options["batch_size"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("ferdlib.recipes.evaluate.evaluate", stopped)
    words = ["evaluate", "--checkpoint", checkpoint, "--data", "digits", "--out", tmp_path]
    for more in ([], ["--fast", "--survivors", "--batch-size", 64, "--test-images", 30]):
        with pytest.raises(SystemExit) as stop:
            run(*words, *more)
        assert stop.value.code == 130
    plain = PROTOCOLS["fair-ard"]
    assert asked == [(plain, 540, False, 128), (plain.on_survivors(), 30, True, 64)]


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """Noise in MNIST's own file format."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = torch.Generator().manual_seed(0)
    for prefix, count in (("train", 5), ("t10k", 30)):
        pixels = torch.randint(256, (count, 28, 28), generator=rng, dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8).remainder(10)
        header = struct.pack(">4i", 0x803, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.numpy().tobytes())
        header = struct.pack(">2i", 0x801, count)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
    return root, pixels, labels.long()


@pytest.mark.parametrize("size", [None, (8, 8)])
def test_a_data_set_of_torchvision_by_its_name(checkpoint, mnist, tmp_path, size):
    root, pixels, labels = mnist
    words = ["evaluate", "--data", "MNIST", "--root", root, "--protocol", "quick"]
    words += ["--image-size", *size] if size else []
    run(*words, "--checkpoint", checkpoint, "--out", tmp_path)
    report = RobustnessReport.load(tmp_path / "report.json")
    assert torch.equal(report.targets, labels)
    assert report.index.tolist() == list(range(30))
    assert report.class_names[4] == "4 - four"
    assert report.manifest["data"]["shape"] == [1, *(size or (28, 28))]
    if size is None:
        with torch.no_grad():
            predictions = load_checkpoint(checkpoint)(pixels[:, None] / 255).argmax(dim=1)
        assert torch.equal(report.predictions["clean"], predictions)


def test_streamed_labels_are_those_of_the_images(mnist):
    root, _, labels = mnist
    assert torch.equal(data.load_any("MNIST", root).labels, labels)
    items = [(torch.zeros(1, 2, 2), k % 3) for k in range(7)]
    assert data.Streamed(items, ("a", "b", "c")).labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_folders_of_images(tmp_path):
    for c, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "test" / name).mkdir(parents=True)
        for k in range(4):
            image = torch.zeros(3, 10, 8)
            image[c] = 1 - 0.1 * k
            save_image(image, tmp_path / "test" / name / f"{k}.png")
    model = save_model(tmp_path / "three.pt", in_channels=3, num_classes=3)
    words = [*QUICK[:1], *QUICK[3:], "--checkpoint", model, "--figure-attack", "clean"]
    words += ["--test-images", 6]
    run(*words, "--data", "folder", "--root", tmp_path, "--out", tmp_path / "a")
    read = [*words, "--data", "ImageFolder", "--root", tmp_path / "test"]
    run(*read, "--out", tmp_path / "b")
    reports = [RobustnessReport.load(tmp_path / f / "report.json") for f in "ab"]
    assert reports[0] == reports[1]
    assert reports[0].class_names == ("ant", "bee", "cat")
    assert torch.bincount(reports[0].targets).tolist() == [2, 2, 2]
    save_image(torch.zeros(3, 8, 8), tmp_path / "test" / "bee" / "1.png")
    message = refused(*read, "--test-images", "None", "--out", tmp_path / "c")
    assert "got (3, 8, 8) of image 5; --image-size gives them one size" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "nowhere.pt"], "expected `path` to be a file, got 'nowhere.pt'"),
        (["--checkpoint", "None"], "expected one of --checkpoint and --factory, got none or both"),
        (["--factory", "a:b"], "expected one of --checkpoint and --factory"),
        (["--architecture", "resnet19"], "'resnet19'"),
        (["--architecture", "small_cnn_8"], "weights of a small_cnn_8"),
        (["--checkpoint", "five.pt"], r"for 10 classes.* got logits \(2, 5\)"),
        (["--checkpoint", "rgb.pt"], r"images \(2, 1, 8, 8\), got RuntimeError: .*channels"),
        (["--mean", 0.5], "expected --mean and --std together"),
        (
            ["--checkpoint", "normal.pt", "--mean", 0.5, "--std", 0.5],
            "no --mean and --std, because the model normalises",
        ),
        (["--mean", *[0.5] * 3, "--std", *[0.5] * 3], "got ValueError: .*3 channels"),
        (["--data", "MNISTT"], "--data to be one of .* torchvision.datasets, .* 'MNISTT'"),
        (["--data", "VOCDetection"], "expected VOCDetection under 'data'"),
        (["--data", "MNIST"], "expected MNIST under .*--download fetches it"),
        (["--data", "FakeData"], "expected --num-classes, because FakeData does not say it"),
        (["--data", "folder"], "a folder 'data/test' of class folders, got nothing there"),
        (["--image-size", 8, 8], "no --image-size for --data digits"),
        (["--num-classes", 11], "expected --num-classes to be 10, those of digits, got 11"),
        (["--test-images", 0], "1..540, got 0"),
        (["--protocol", "fair"], "expected --protocol to be one of fair-ard, ferd, .* got 'fair'"),
        (["--without", "PGD-20"], "'PGD-20'"),
        (["--without", "FGSM", "PGD-10"], "`attacks`"),
        (["--eps", 0], "`eps`"),
        (["--sweep", 0.1, -0.1], "`eps`"),
        (["--seed", -1], "seed"),
        (["--batch-size", 0], "`batch_size`"),
        (["--figure-attack", "PGD-20"], "--figure-attack to be one of clean, FGSM, PGD-10, worst"),
        (["--device", "abacus"], "abacus"),
        (["--against", "nowhere.json"], "nowhere.json"),
        (["--against", "five.pt"], "a complete report in 'five.pt'"),
        (["--out", "five.pt/out"], "--out to be a folder that can be written, got 'five.pt/out'"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_sentence_and_writes_nothing(
    checkpoint, tmp_path, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "five.pt", num_classes=5)
    save_model(tmp_path / "rgb.pt", in_channels=3)
    torch.save(torch.load("five.pt") | {"mean": [0.5], "std": [0.5]}, "normal.pt")
    before = set(tmp_path.rglob("*"))
    common = [*QUICK, "--checkpoint", checkpoint, "--out", tmp_path / "out"]
    assert re.search(message, refused(*common, *words))
    assert set(tmp_path.rglob("*")) == before
