"""`ferdlib distill`, `quickstart` and `reproduce` at the size of a smoke test, and wrong input."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from commands import refused, run, save_folder, save_model
from tiny_ferd import same

from ferdlib.checkpoints import Checkpoints
from ferdlib.evaluation import PROTOCOLS, RobustnessReport, compare
from ferdlib.models import build_model, load_checkpoint
from ferdlib.recipes import data, quickstart, reproduce, train
from ferdlib.recipes.options import Reproduce
from ferdlib.trainer import FERDConfig

PRESETS = {"default": FERDConfig, "paper": FERDConfig.paper, "released": FERDConfig.released}


def table_rows(printed, names="teacher|student"):
    """A name, and average, worst class and NSD under each attack."""
    pattern = rf"^(?:{names})(?: +(?:\d+\.\d+|-))+$"
    return [line.split() for line in re.findall(pattern, printed, flags=re.MULTILINE)]


def test_a_smoke_run_leaves_a_student_reports_and_figures(tmp_path, capsys):
    run("distill", "--smoke", "--tensorboard", "--out", tmp_path)
    printed, progress = capsys.readouterr()
    assert "2/2" in progress
    rows = table_rows(printed)
    assert [len(row) for row in rows] == [16, 16]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("student.pt", "teacher.pt", "report-student.json", "report-teacher.json"),
        *("classwise.png", "synthetic.png", "tensorboard"),
    }
    assert load_checkpoint(tmp_path / "student.pt")(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    for name, *cells in rows:
        report = RobustnessReport.load(tmp_path / f"report-{name}.json")
        assert report.class_names == tuple(f"class{c:03d}" for c in range(10))
        assert report.protocol == PROTOCOLS["fair-ard"].at(eps=8 / 255).without("AutoAttack")
        averages = [100 * report[column].average for column in report.columns]
        assert [float(cell) for cell in cells[::3]] == pytest.approx(averages, abs=0.005001)
    assert "evaluate it: ferdlib evaluate --checkpoint " in printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes, and a teacher of them."""
    root = save_folder(tmp_path_factory.mktemp("images"))
    save_model(root / "teacher.pt", num_classes=3, in_channels=3)
    return root


def ferd(folder):
    """Words of a run of a moment; sizes and number of classes come from the images."""
    words = ["distill", "--data", "folder", "--root", folder, "--teacher", folder / "teacher.pt"]
    words += ["--student", "small_cnn_2", "--epochs", 2, "--warmup-epochs", 1, "--batch-size", 6]
    words += ["--generator-steps", 2, "--generator-width", 4, "--student-steps", 2]
    return [*words, "--bottleneck-steps", 2, "--margin-attack-steps", 2]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resumed_run_is_the_undisturbed_one(preset, folder, tmp_path, capsys):
    words = [*ferd(folder), "--preset", preset]
    with pytest.raises(SystemExit) as stop:
        run(*words, "--out", tmp_path / "a", "--max-minutes", 0)
    assert not stop.value.code
    assert "stopped after epoch 1 of 2 of FERD; go on: " in capsys.readouterr().out
    (checkpoint,) = (tmp_path / "a" / "checkpoints" / "student").iterdir()
    config = Checkpoints.read(checkpoint)[1]["run"]["config"]
    resume = ["--out", tmp_path / "a", "--resume", "auto"]
    if preset == "default":
        assert refused(*words, *resume, "--gamma", 0.1).endswith("got others for --gamma")
        other = save_model(tmp_path / "other.pt", num_classes=3, in_channels=3, seed=1)
        assert refused(*words, *resume, "--teacher", other).endswith("got others for --teacher")
        assert "expected --resume auto or another" in refused(*words, "--out", tmp_path / "a")
        inside = ["--teacher-mean", 0.4, 0.4, 0.4, "--teacher-std", 1, 1, 1]
        assert "--teacher-mean, " in refused(*words, *resume, *inside)
        elsewhere = save_folder(tmp_path / "elsewhere", test=5)
        assert refused(*words, *resume, "--root", elsewhere).endswith("got others for --root")
    run(*words, *resume)
    assert not (tmp_path / "a" / "checkpoints").exists()
    run(*words, "--out", tmp_path / "b")
    assert same(*(load_checkpoint(tmp_path / f / "student.pt").state_dict() for f in "ab"))
    expected = PRESETS[preset](num_classes=3, layer="layer4", epochs=2, warmup_epochs=1)
    for name in ("attack_model", "mask_threshold", "reweighting", "gamma", "optimise_latents"):
        assert config[name] == getattr(expected, name), name


def test_wrong_input_gets_one_sentence_and_nothing_is_written(folder, tmp_path):
    small, truncated = tmp_path / "wrn.pt", tmp_path / "truncated.pt"
    torch.save(build_model("wide_resnet_10_1", 3).state_dict(), small)
    truncated.write_bytes(small.read_bytes()[:5000])
    two = save_model(tmp_path / "two.pt", num_classes=2, in_channels=3)
    grey = save_model(tmp_path / "grey.pt", num_classes=3)
    (tmp_path / "empty" / "test").mkdir(parents=True)
    known = ["--teacher-architecture", "small_cnn_4"]
    cases = [
        (["--teacher", small, *known], "missing: "),
        (["--teacher", truncated, *known], "is it complete"),
        (["--teacher", small], "`architecture`"),
        (["--teacher", two], "`teacher` to return logits of shape (N, 3)"),
        (["--teacher", "None"], "expected --teacher, a checkpoint of a robust model, got none"),
        (["--image-shape", 3, 16, 16], "--image-shape to be the data's, (3, 8, 8), got"),
        (["--num-classes", 4], "--num-classes to be the data's, 3, got 4"),
        (["--student", "resnet7"], "'resnet7'"),
        (["--layer", "layer9"], "`layer_name`"),
        (["--step-size", 2], "expected --step-size in units of [0, 1] pixels"),
        (["--root", tmp_path / "nowhere"], "got nothing there"),
        (["--root", tmp_path / "empty"], "a folder for each of at least 2 classes"),
        (["--teacher", grey], "channels"),
        (["--test-images", 0], "1..12, got 0"),
        (["--eps", 0], "`eps`"),
        (["--checkpoint-every", 0], "at least 1, got 0"),
        (["--teacher-mean", 0.5, 0.5, 0.5], "--teacher-std together"),
        (["--out", two / "out"], "--out to be a folder that can be written"),
    ]
    for words, part in cases:
        message = refused(*ferd(folder), "--out", tmp_path / "out", *words)
        assert part in message, (words, message)
        assert not (tmp_path / "out").exists()


@pytest.fixture
def small(monkeypatch):
    """The quickstart's students with few steps."""
    sizes = {"student_steps": 2, "generator_steps": 2, "margin_attack_steps": 2}
    sizes |= {"batch_size": 16, "attack_steps": 2, "bottleneck_steps": 2}
    plain = quickstart.config
    monkeypatch.setattr(quickstart, "config", lambda epochs, **c: plain(epochs, **(sizes | c)))
    monkeypatch.setattr(quickstart, "TEACHER", "small_cnn_4")


def test_quickstart_prints_all_rows_and_leaves_what_loads(small, tmp_path, capsys):
    words = ["quickstart", "--teacher-epochs", 2, "--epochs", 2, "--ablate", "--test-images", 20]
    with pytest.raises(SystemExit):
        run(*words, "--out", tmp_path / "a", "--max-minutes", 0)
    assert "stopped after epoch 1 of 2 of teacher; go on: ferdlib quick" in capsys.readouterr().out
    run(*words, "--out", tmp_path / "a", "--resume", "auto")
    printed = capsys.readouterr().out
    lines = re.findall(r"^(\S.*?)((?: +(?:\d+\.\d+|-)){15})$", printed, flags=re.MULTILINE)
    rows = {name: cells.split() for name, cells in lines}
    assert list(rows) == ["teacher", "FERD", *quickstart.ABLATIONS]
    assert len(quickstart.ABLATIONS) == 6
    assert rows["FERD"] == rows["w/o FAEs (= FERD)"]
    out = tmp_path / "a"
    reports = {n: RobustnessReport.load(out / f"report-{n}.json") for n in ("teacher", "FERD")}
    expected = PROTOCOLS["fair-ard"].at(eps=0.1).without("AutoAttack")
    assert reports["FERD"].protocol == expected
    assert str(reports["FERD"]) in printed
    assert str(compare(reports).test("FERD", "teacher", "PGD-20")) in printed
    for name in ("classwise.png", "weights.png", "synthetic.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    images = data.chosen(data.load("digits"), 20, 0)
    with torch.no_grad():
        x = torch.stack([images[k][0] for k in range(20)])
        predictions = load_checkpoint(out / "student.pt")(x).argmax(dim=1)
    assert torch.equal(predictions, reports["FERD"].predictions["clean"])


def test_quickstart_refuses_what_makes_no_sense(tmp_path):
    for words, part in (
        (["--epochs", 0], "`epochs`"),
        (["--teacher-epochs", 0], "--epochs of at least 1"),
        (["--seed", -1], "seed"),
    ):
        assert part in refused("quickstart", *words, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


COLUMNS = ("clean", "FGSM", "PGD-20", "CW-inf")
TABLE = ["reproduce", "--methods", "ard", "fair-ard", "--seeds", 0, 1, "--epochs", 1]
TABLE += ["--teacher-epochs", 1, "--student", "small_cnn_2", "--teacher", "small_cnn_3"]


def cells(text):
    """The rows of all Markdown tables."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def few(images, count, seed, original=data.hold_out):
    """Few digits to train on, and few held out."""
    train, val = original(images, 400, seed)
    return train.part(torch.arange(100)), val.part(torch.arange(60))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("table"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "hold_out", few)
        patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(map(str, parts))))
        run(*TABLE, "--measure", "val", "--out", out)
        names = ("teacher", "ard", "fair-ard")
        reports = {
            (n, s): RobustnessReport.load(out / f"{n}-{s}" / "report.json")
            for n in names
            for s in (0, 1)
        }
        yield out, reports, "\n".join(lines)


def test_the_table_is_that_of_the_reports(table):
    out, reports, printed = table
    assert (out / "table.md").read_text("utf-8") in printed
    assert "60 val digits" in printed
    rows = cells(printed)
    assert rows[0][:4] == ["method", "clean avg.", "clean worst", "clean NSD"]
    by_name = {row[0]: row[1:] for row in rows[1:4]}
    assert list(by_name) == ["teacher", "ard", "fair-ard"]
    for name, row in by_name.items():
        expected = []
        for column in COLUMNS:
            for figure in ("average", "worst_class", "nsd"):
                a, b = (getattr(reports[name, seed][column], figure) for seed in (0, 1))
                scale, places = (1, 3) if figure == "nsd" else (100, 1)
                mean, deviation = (a + b) / 2, abs(a - b) / 2**0.5
                expected.append(f"{scale * mean:.{places}f} ± {scale * deviation:.{places}f}")
        assert row == expected
    assert (out / "classwise.png").read_bytes().startswith(b"\x89PNG")


def test_the_differences_are_those_of_the_paired_tests(table):
    _, reports, printed = table
    rows = cells(printed)[5:]
    assert [row[1] for row in rows] == list(COLUMNS)
    for row in rows:
        tests = [
            compare({name: reports[name, seed] for name in ("ard", "fair-ard")}).test(
                "fair-ard", "ard", row[1]
            )
            for seed in (0, 1)
        ]
        assert row[0] == "fair-ard - ard"
        for shown, figure in ((row[2:4], "average"), (row[4:6], "worst_class")):
            pairs = [getattr(test, figure) for test in tests]
            mean = 100 * sum(difference for difference, _ in pairs) / 2
            assert shown[0].split(" ± ")[0] == f"{mean:+.1f}"
            up = sum(p < 0.05 and difference > 0 for difference, p in pairs)
            down = sum(p < 0.05 and difference < 0 for difference, p in pairs)
            assert shown[1] == f"{up} up, {down} down of 2"


def test_finished_trainings_are_skipped_and_others_added(table, monkeypatch):
    out, _, printed = table
    done, plain = [], train.run

    def watched(args):
        done.append(args.run.out.name)
        plain(args)

    monkeypatch.setattr(train, "run", watched)
    words = [*TABLE, "--measure", "val", "--out", out]
    run(*words)
    assert done == []
    assert (out / "table.md").read_text("utf-8") in printed
    (out / "ard-1" / "report.json").unlink()
    run(*words, "--methods", "ard", "sat", "--seeds", 1)
    assert done == ["ard-1", "sat-1"]
    assert "take another --out" in refused(*words, "--epochs", 2)


def test_a_teacher_of_the_table_is_trained_at_a_larger_radius(tmp_path):
    args = Reproduce(eps=0.2, out=tmp_path)
    robust = reproduce.options_of(args, "teacher", 3)
    assert (robust.objective.method, robust.objective.rule) == ("sat", "none")
    assert robust.objective.eps == pytest.approx(0.28)
    assert (robust.models.student, robust.sgd.epochs, robust.run.seed) == ("small_cnn_40", 40, 3)
    student = reproduce.options_of(args, "fair-rslad", 3)
    assert (student.objective.rule, student.objective.method) == ("fair", "rslad")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seeds", 0, 0], "expected different --seeds"),
        (["--seeds", -1], "seed"),
        (["--methods", "wat-ard", "--preset", "released"], "`preset`"),
        (["--methods", "unfair-ard"], "unfair-ard"),
        (["--student", "small_cnn_0"], "`width`"),
        (["--epochs", 0], "expected --epochs of at least 1"),
        (["--clip", 2, 1], "expected `clip`"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_input_to_the_table(words, sentence, tmp_path):
    common = partial(refused, *TABLE, "--out", tmp_path / "out")
    assert sentence in common(*words)
    assert not (tmp_path / "out").exists()
