"""The evaluation script: its outputs agree with each other and with the library, on any model and data."""

from __future__ import annotations

import csv
import importlib
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import tyro
from torch.utils.data import Subset
from torchvision.utils import save_image

from ferdlib.evaluation import PROTOCOLS, RobustnessReport, evaluate, run
from ferdlib.models import Normalized, load_checkpoint, small_cnn

ROOT = Path(__file__).parents[1]
EPS = 0.1
IMAGES = 60
TEXTS = {"report.json", "report.md", "report.tex", "report.csv"}
FIGURES = {"classwise.png", "confusion.png", "survival.png", "sweep.png"}


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module("evaluate")
    for name in ("evaluate", "image_data", "model_sources"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def digits(script):
    return script.load_any("digits", Path())


def save(path, **entries):
    """A small CNN's checkpoint, as the other examples write them."""
    sizes = {"in_channels": 1, "num_classes": 10} | entries
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small_cnn(sizes["in_channels"], sizes["num_classes"], width=4)
    content = {"architecture": "small_cnn_4", "state_dict": model.state_dict()}
    torch.save(content | sizes, path)


@pytest.fixture(scope="module")
def checkpoint(script, tmp_path_factory):
    """After a few steps on the digits that are not attacked."""
    path = tmp_path_factory.mktemp("model") / "student.pt"
    save(path)
    images = importlib.import_module("image_data").load("digits", Path(), "train")
    model = load_checkpoint(path).train()
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
def finished(script, checkpoint, tmp_path_factory):
    """A run with all that can be had, as a user starts it."""
    args = script.Args(
        checkpoint=checkpoint,
        data="digits",
        eps=EPS,
        without=("AutoAttack", "CW-inf"),
        test_images=IMAGES,
        sweep=(EPS, 0.03),
        trust=True,
        resume=True,
        out=tmp_path_factory.mktemp("runs") / "a",
    )
    command = [sys.executable, "examples/evaluate.py", "--checkpoint", str(checkpoint)]
    command += ["--data", "digits", "--eps", str(EPS), "--without", "AutoAttack", "CW-inf"]
    command += ["--test-images", str(IMAGES), "--sweep", str(EPS), "0.03", "--trust", "--resume"]
    command += ["--out", str(args.out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return args, result.stdout, RobustnessReport.load(args.out / "report.json")


def directly(script, images, checkpoint, *, count=IMAGES, protocol="fair-ard"):
    """The library's report of what the script was asked for."""
    attacks = PROTOCOLS[protocol].at(eps=EPS)
    if protocol == "fair-ard":
        attacks = attacks.without("AutoAttack", "CW-inf")
    data = Subset(images, script.chosen(images, count, 0).indices)
    names = images.class_names
    model = load_checkpoint(checkpoint)
    return evaluate(model, data, attacks, num_classes=len(names), class_names=names)


def test_the_report_is_the_librarys(finished, script, digits, checkpoint):
    _, _, report = finished
    expected = directly(script, digits, checkpoint)
    assert replace(report, findings=()) == expected
    assert len(report.findings) > 5
    assert report["clean"].average > report["PGD-20"].average > 0
    assert torch.bincount(report.targets).tolist() == [IMAGES // 10] * 10
    assert torch.equal(digits.labels[report.index], report.targets)


def test_all_files_are_there_and_agree(finished):
    args, printed, report = finished
    assert {path.name for path in args.out.iterdir()} == TEXTS | FIGURES | {"parts"}
    for name in FIGURES:
        assert (args.out / name).read_bytes().startswith(b"\x89PNG")
    assert (args.out / "report.md").read_text("utf-8") == report.to_markdown()
    assert (args.out / "report.tex").read_text("utf-8") == report.to_latex()
    with open(args.out / "report.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for column in report.columns:
        found = [float(row["accuracy"]) for row in rows if row["attack"] == column]
        assert found == report[column].class_accuracy.tolist()
    assert str(report) in printed
    written = printed.splitlines()[-1]
    assert all(name in written for name in TEXTS | FIGURES)


def test_the_sweep_begins_with_the_clean_images_and_meets_the_report(finished):
    _, printed, report = finished
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


def test_a_resumed_run_is_the_same_without_an_attack(finished, script, monkeypatch, capsys):
    args, printed, report = finished
    parts = {path: path.stat().st_mtime_ns for path in (args.out / "parts").rglob("*.json")}
    assert {path.parent.name for path in parts} == {"report", "sweep-0.03", f"sweep-{EPS}"}

    def refused(*_):
        raise AssertionError("attacked again")

    monkeypatch.setattr(run, "attacked", refused)
    script.main(args)
    assert capsys.readouterr().out == printed
    assert RobustnessReport.load(args.out / "report.json") == report
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    with pytest.raises(SystemExit, match="attacked again"):
        script.main(replace(args, out=args.out.with_name("b")))


def test_parts_of_another_model_are_refused(finished, script, tmp_path):
    args, _, report = finished
    save(tmp_path / "other.pt")
    assert "expected the model" in refusal(
        script, replace(args, checkpoint=tmp_path / "other.pt"), written=True
    )
    assert RobustnessReport.load(args.out / "report.json") == report


def test_against_puts_both_side_by_side_and_tests_them(finished, script, tmp_path, capsys):
    args, _, report = finished
    save(tmp_path / "untrained.pt")
    other = replace(
        args,
        checkpoint=tmp_path / "untrained.pt",
        against=args.out / "report.json",
        sweep=(),
        trust=False,
        resume=False,
        out=tmp_path / "b",
    )
    script.main(other)
    printed = capsys.readouterr().out
    mine = RobustnessReport.load(other.out / "report.json")
    comparison = script.compare({"this": mine, "against": report})
    assert str(comparison) in printed
    assert str(comparison.test("this", "against", "worst case")) in printed
    assert mine["clean"].average < report["clean"].average
    names = {path.name for path in other.out.iterdir()}
    assert names == TEXTS | FIGURES - {"sweep.png"}  # and no parts
    script.main(replace(other, without=("AutoAttack", "FGSM"), seed=1, out=tmp_path / "c"))
    printed = capsys.readouterr().out
    assert re.search(r"^ +clean +PGD-20$", printed, flags=re.MULTILINE)  # what both have
    assert "no paired test, Comparison.test: expected reports on the same samples" in printed


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
def package(tmp_path, checkpoint):
    """A package of somebody's, in the folder where they are."""
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "robust.py").write_text(FACTORY.format(path=str(checkpoint)))
    return tmp_path


def test_a_factory_is_imported_from_where_the_user_is(package, script, digits, checkpoint):
    command = [sys.executable, str(ROOT / "examples" / "evaluate.py"), "--factory"]
    command += ["nets.robust:trained", "--data", "digits", "--eps", str(EPS), "--out", "out"]
    command += ["--test-images", "20", "--protocol", "quick"]
    result = subprocess.run(command, cwd=package, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = RobustnessReport.load(package / "out" / "report.json")
    assert report == directly(script, digits, checkpoint, count=20, protocol="quick")


def test_mean_and_std_are_put_inside(script, digits, checkpoint, tmp_path):
    args = quick(checkpoint, mean=(0.3,), std=(0.4,), out=tmp_path)
    script.main(script.Args(**args))
    report = RobustnessReport.load(tmp_path / "report.json")
    model = Normalized(load_checkpoint(checkpoint), [0.3], [0.4])
    data = Subset(digits, script.chosen(digits, 20, 0).indices)
    found = evaluate(model, data, PROTOCOLS["quick"], num_classes=10)
    assert replace(found, class_names=report.class_names) == report


def quick(checkpoint, **options):
    """Options of a run of a second."""
    common = {"checkpoint": checkpoint, "data": "digits", "test_images": 20, "protocol": "quick"}
    return common | options


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
def test_a_data_set_of_torchvision_by_its_name(script, checkpoint, mnist, tmp_path, size):
    root, pixels, labels = mnist
    args = quick(checkpoint, data="MNIST", root=root, image_size=size, test_images=None)
    script.main(script.Args(**args, out=tmp_path))
    report = RobustnessReport.load(tmp_path / "report.json")
    assert torch.equal(report.targets, labels)
    assert report.index.tolist() == list(range(30))
    assert report.class_names[4] == "4 - four"
    assert report.manifest["data"]["shape"] == [1, *(size or (28, 28))]
    if size is None:
        with torch.no_grad():
            predictions = load_checkpoint(checkpoint)(pixels[:, None] / 255).argmax(dim=1)
        assert torch.equal(report.predictions["clean"], predictions)


def test_streamed_labels_are_those_of_the_images(script, mnist):
    root, _, labels = mnist
    streamed = script.load_any("MNIST", root)
    assert torch.equal(streamed.labels, labels)
    items = [(torch.zeros(1, 2, 2), k % 3) for k in range(7)]
    assert script.Streamed(items, ("a", "b", "c")).labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.fixture
def folder(tmp_path):
    for c, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "test" / name).mkdir(parents=True)
        for k in range(4):
            image = torch.zeros(3, 10, 8)
            image[c] = 1 - 0.1 * k
            save_image(image, tmp_path / "test" / name / f"{k}.png")
    save(tmp_path / "three.pt", in_channels=3, num_classes=3)
    return tmp_path


def test_folders_of_images(script, folder):
    options = {"test_images": 6, "figure_attack": "clean"}
    common = quick(folder / "three.pt", **options)
    decoded = script.Args(**common | {"data": "folder", "root": folder, "out": folder / "a"})
    read = replace(decoded, data="ImageFolder", root=folder / "test", out=folder / "b")
    script.main(decoded)
    script.main(read)
    reports = [RobustnessReport.load(args.out / "report.json") for args in (decoded, read)]
    assert reports[0] == reports[1]
    assert reports[0].class_names == ("ant", "bee", "cat")
    assert torch.bincount(reports[0].targets).tolist() == [2, 2, 2]
    save_image(torch.zeros(3, 8, 8), folder / "test" / "bee" / "1.png")
    message = refusal(script, replace(read, test_images=None, out=folder / "c"))
    assert "got (3, 8, 8) of image 5; --image-size gives them one size" in message
    script.main(replace(read, image_size=(8, 8), test_images=None, out=folder / "c"))
    assert len(RobustnessReport.load(folder / "c" / "report.json")) == 12


def refusal(script, args, *, written=False):
    """The one sentence that the script leaves with."""
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    text = str(stop.value.code)
    assert text.startswith("evaluate: ")
    assert "\n" not in text
    assert written or not args.out.exists()
    return text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": Path("nowhere.pt")}, "expected `path` to be a file, got 'nowhere.pt'"),
        ({"checkpoint": None}, "expected one of --checkpoint and --factory, got none or both"),
        ({"factory": "a:b"}, "expected one of --checkpoint and --factory"),
        ({"architecture": "resnet19"}, "expected `architecture` to be one of"),
        ({"architecture": "small_cnn_8"}, "weights of a small_cnn_8"),
        ({"checkpoint": Path("five.pt")}, r"for 10 classes.* got logits \(2, 5\)"),
        ({"checkpoint": Path("rgb.pt")}, r"images \(2, 1, 8, 8\), got RuntimeError: .*channels"),
        ({"mean": (0.5,)}, "expected --mean and --std together"),
        ({"mean": (0.5,) * 3, "std": (0.5,) * 3}, "got ValueError: .*3 channels"),
        ({"data": "MNISTT"}, "--data to be one of cifar10, .* torchvision.datasets, .* 'MNISTT'"),
        ({"data": "VOCDetection"}, "expected VOCDetection under 'data'"),
        ({"data": "MNIST"}, "expected MNIST under .*--download fetches it"),
        ({"data": "FakeData"}, "expected --num-classes, because FakeData does not say it"),
        ({"data": "folder"}, "a folder 'data/test' of class folders, got nothing there"),
        ({"image_size": (8, 8)}, "no --image-size for --data digits"),
        ({"num_classes": 11}, "expected --num-classes to be 10, those of digits, got 11"),
        ({"test_images": 0}, "1..540 images, got 0"),
        ({"protocol": "fair"}, "expected --protocol to be one of fair-ard, ferd, .* got 'fair'"),
        ({"without": ("PGD-20",)}, "'PGD-20'"),
        ({"without": ("FGSM", "PGD-10")}, "expected `attacks`"),
        ({"eps": 0.0}, "`eps`"),
        ({"sweep": (0.1, -0.1)}, "`eps`"),
        ({"seed": -1}, "`seed`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"figure_attack": "PGD-20"}, "--figure-attack to be one of clean, FGSM, PGD-10, worst"),
        ({"device": "abacus"}, "abacus"),
        ({"against": Path("nowhere.json")}, "nowhere.json"),
        ({"against": Path("five.pt")}, "a complete report in 'five.pt'"),
        (
            {"out": Path("five.pt/out")},
            "--out to be a folder that can be written, got 'five.pt/out'",
        ),
    ],
)
def test_wrong_input_is_one_sentence_and_writes_nothing(
    script, checkpoint, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "five.pt", num_classes=5)
    save(tmp_path / "rgb.pt", in_channels=3)
    before = set(tmp_path.rglob("*"))
    args = script.Args(**quick(checkpoint, out=tmp_path / "out") | options)
    assert re.search(message, refusal(script, args))
    assert set(tmp_path.rglob("*")) == before


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
def test_a_factory_that_makes_no_model(script, package, monkeypatch, factory, message):
    monkeypatch.chdir(package)
    monkeypatch.setattr(sys, "path", list(sys.path))
    args = script.Args(**quick(None, factory=factory, out=package / "out"))
    assert re.search(message, refusal(script, args))
    for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
        monkeypatch.delitem(sys.modules, name)


def test_a_report_of_other_classes_or_settings_is_no_comparison(finished, script, tmp_path):
    args, _, report = finished
    common = {"against": args.out / "report.json", "resume": False, "out": tmp_path / "b"}
    message = refusal(script, replace(args, eps=0.2, **common))
    assert "expected one setting for each attack" in message
    replace(report, class_names=tuple("abcdefghij")).save(tmp_path / "named.json")
    common["against"] = tmp_path / "named.json"
    assert "the same classes" in refusal(script, replace(args, **common))


def test_a_user_sees_a_sentence_and_no_traceback():
    command = [sys.executable, "examples/evaluate.py", "--checkpoint", "nowhere.pt"]
    command += ["--data", "digits"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert re.fullmatch("evaluate: .*expected `path` to be a file.*\n", result.stderr)


def test_help_says_the_units(script, capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(script.Args, args=["--help"])
    assert stop.value.code == 0
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for option in script.Args.__dataclass_fields__:
        assert f"--{option.replace('_', '-')}" in text
    for unit in ("units of [0, 1] pixels", "same units", "in pixels", "How many test images"):
        assert unit in text
