"""The training script for every method, and the table of Fair-ARD in small."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import tyro
from tiny_ferd import same
from torchvision.utils import save_image

from ferdlib import methods
from ferdlib.evaluation import RobustnessReport, compare, evaluate
from ferdlib.methods import METHODS, MTARD, Distilled
from ferdlib.models import load_checkpoint, small_cnn

ROOT = Path(__file__).parents[1]
OWN = ("fair_ard_table", "ard", "ard_setup", "quickstart", "train_teacher")
OWN += ("files", "image_data", "long_run", "model_sources")
COLUMNS = ("clean", "FGSM", "PGD-20", "CW-inf")
# Small enough for a second, large enough that the methods' rules have something to see.
TINY = {"student": "small_cnn_4", "epochs": 3, "batch_size": 20, "attack_steps": 2, "device": "cpu"}
RUN = ["--student", "small_cnn_4", "--teacher-architecture", "small_cnn_6", "--epochs", "3"]
RUN += ["--teacher-epochs", "1", "--batch-size", "200", "--attack-steps", "2", "--device", "cpu"]
RUN += ["--val-images", "60", "--test-images", "40"]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module("ard")
    for name in OWN:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def setup(script):
    return sys.modules["ard_setup"]


@pytest.fixture(scope="module")
def table(script):
    return importlib.import_module("fair_ard_table")


@pytest.fixture(scope="module")
def data(setup):
    """60 digits to train on, 30 held out."""
    images, _ = setup.load_splits("digits", Path())
    few = images.part(setup.stratified(images, 90, 0))
    held_out = setup.stratified(few, 30, 0)
    kept = torch.ones(90, dtype=torch.bool).index_fill(0, held_out, False)
    return setup.Data(few.part(kept.nonzero().flatten()), few.part(held_out))


def teachers_of(name):
    """As many as the method wants, with logits that differ between images."""
    found = {}
    for k, (teacher, kind) in enumerate({"teacher": Distilled, "natural_teacher": MTARD}.items()):
        if issubclass(METHODS[name], kind):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(k)
                found[teacher] = small_cnn(1, 10, width=3).eval()
    return found


def begin(script, setup, data, name, **changes):
    args = setup.resolved(script.Args(method=name, **TINY | changes))
    return setup.begin(args, data, teachers_of(name))


def run_main(script, *arguments):
    script.main(tyro.cli(script.Args, args=[str(a) for a in arguments]))


def refused(script, *arguments):
    """The one sentence that it ends with."""
    with pytest.raises(SystemExit) as stop:
        run_main(script, *arguments)
    assert isinstance(stop.value.code, str)  # printed, with exit status 1
    assert stop.value.code.count("\n") == 0
    return stop.value.code


@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains_and_a_resumed_run_is_the_undisturbed_one(
    name, script, setup, data, tmp_path
):
    straight = begin(script, setup, data, name)
    start = {k: v.clone() for k, v in straight.student.state_dict().items()}
    epochs = list(script.train(straight, data))
    assert [epoch.loss > 0 for epoch in epochs] == [True] * 3
    assert straight.method.epoch == 3
    weights = straight.student.state_dict()
    assert all(v.isfinite().all() for v in weights.values())
    assert all(not torch.equal(start[k], v) for k, v in weights.items() if "weight" in k)

    stopped = begin(script, setup, data, name)
    next(script.train(stopped, data))
    teachers = setup.digests(teachers_of(name))
    stopped = replace(stopped, args=replace(stopped.args, out=tmp_path))
    setup.checkpoints(stopped.args, "student").save(setup.state_of(stopped, teachers), 1)
    torch.rand(7)  # the global generator is elsewhere in another process
    resumed = begin(script, setup, data, name)
    resumed = replace(resumed, args=replace(resumed.args, out=tmp_path, resume="auto"))
    setup.resume(resumed, "student", teachers)
    assert resumed.epoch == 1
    assert len(list(script.train(resumed, data))) == 2
    assert same(resumed.state_dict(), straight.state_dict())


def test_the_loop_is_attack_loss_and_sgd(script, setup, data):
    run = begin(script, setup, data, "fair-rslad", epochs=2)
    epochs = list(script.train(run, data))

    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    student = small_cnn(1, 10, width=4).to(memory_format=torch.channels_last)
    teacher = teachers_of("fair-rslad")["teacher"].to(memory_format=torch.channels_last)
    method = methods.FairRSLAD(
        num_classes=10,
        teacher=teacher,
        clip=(5 / 6, 5 / 2),
        eps=0.1,
        step_size=0.025,
        steps=2,
        rng=rng,
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    x, y = data.train.pixels, data.train.labels
    for epoch, lr in enumerate((0.1, 0.01)):  # 215 of 300 epochs is 1 of 2, 260 and 285 are 2
        optimizer.param_groups[0]["lr"] = lr
        losses = []
        for index in torch.randperm(60, generator=rng).split(20):
            x_adv = method.attack(student, x[index], y[index])
            loss = method.loss(student, x[index], x_adv, y[index]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        method.end_epoch()
        assert epochs[epoch].loss == pytest.approx(sum(losses) / 3)
        assert epochs[epoch].lr == pytest.approx(lr)
    assert same(run.student.state_dict(), student.state_dict())


def test_methods_that_validate_see_the_images_held_out_once_an_epoch(
    script, setup, data, monkeypatch
):
    seen = []

    def watched(self, student, batches):
        x, y = zip(*batches, strict=True)
        seen.append((self.epoch, torch.cat(x), torch.cat(y)))

    monkeypatch.setattr(METHODS["wat-ard"], "measure", watched)
    list(script.train(begin(script, setup, data, "wat-ard"), data))
    assert [epoch for epoch, _, _ in seen] == [0, 1, 2]  # before end_epoch
    assert all(same((x, y), (data.val.pixels, data.val.labels)) for _, x, y in seen)


def test_dates_move_with_the_number_of_epochs(script, setup, data):
    def dates(name, epochs, **changes):
        run = begin(script, setup, data, name, epochs=epochs, **changes)
        drops = getattr(run.method, "rate_drops", None)
        return sorted(run.schedule.milestones), getattr(run.method, "begin", drops)

    assert dates("iad", 40) == ([20, 30], 12)
    assert dates("iad", 40, preset="released") == ([20], 12)
    assert dates("mtard", 300) == ([215, 260, 285], (215, 260, 285))
    assert dates("absld", 30) == ([22, 26, 28], (22, 26, 28))
    assert dates("dafa-ard", 100) == ([50, 75], 35)
    assert dates("sat", 1) == ([1], None)  # never before the first epoch
    assert dates("iad", 40, settings={"begin": 3}) == ([20, 30], 3)


def test_presets_and_options_reach_method_and_optimizer(script, setup, data):
    paper, released = (
        begin(script, setup, data, "fair-ard", preset=preset) for preset in ("paper", "released")
    )
    assert (paper.method.kl_mean, paper.method.count) == (False, "first")
    assert (released.method.kl_mean, released.method.count) == (True, "correct")
    assert [r.optimizer.param_groups[0]["nesterov"] for r in (paper, released)] == [False, True]
    assert (paper.method.eps, paper.method.step_size, paper.method.steps) == (0.1, 0.025, 2)
    assert paper.method.clip == released.method.clip == (5 / 6, 5 / 2)
    assert begin(script, setup, data, "fair-ard", clip=None).method.clip is None
    options = {"eps": 0.2, "attack_steps": 3, "beta": 1.0, "settings": {"temperature": 5}}
    changed = begin(script, setup, data, "fair-ard", **options, lr=0.02, weight_decay=0.1).method
    assert (changed.eps, changed.step_size, changed.steps) == (0.2, 0.05, 3)
    assert (changed.beta, changed.temperature) == (1.0, 5)
    digits = setup.resolved(script.Args(teacher=Path("t.pt")))
    natural = setup.teacher_args(digits, "natural_teacher")
    assert (natural.student, natural.eps, natural.attack_steps) == ("small_cnn_40", 0, 0)
    robust = setup.teacher_args(digits, "teacher")
    assert robust.method == "sat"
    assert (robust.eps, robust.step_size) == pytest.approx((0.14, 0.035))
    cifar = setup.resolved(script.Args(method="trades", data="cifar10"))
    assert (cifar.student, cifar.epochs, cifar.batch_size, cifar.lr) == ("resnet18", 76, 128, 0.1)
    assert (cifar.eps, cifar.teacher_eps, cifar.val_images) == (None, None, 1000)
    assert script.protocol("fair-ard", cifar).attacks[1].eps == 8 / 255


def test_the_best_epoch_on_the_images_held_out_is_kept(script, setup, data, monkeypatch):
    figures = [(0.5, 0.1), (0.4, 0.3), (0.6, 0.1), (0.2, 0.5)]  # sums 0.6, 0.7, 0.7, 0.7
    seen = []

    class Found:
        def __init__(self, pair):
            self.average, self.worst_class = pair
            self.class_accuracy = torch.full((10,), pair[1])

    def scripted(model, images, args):
        assert images is data.val
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return Found(figures[len(seen) - 1])

    monkeypatch.setattr(script, "robustness", scripted)
    for select, kept in (("best", 2), ("last", 4)):
        seen.clear()
        run = begin(script, setup, data, "ard", epochs=4, select=select)
        list(script.train(run, data))
        assert run.best["epoch"] == kept
        assert same(script.selected(run).state_dict(), seen[kept - 1])
        assert not run.student.training


def test_cfa_keeps_its_average_once_the_worst_class_is_robust(script, setup, data, monkeypatch):
    worst = iter([0.1, 0.5, 0.5])

    class Found:
        average = worst_class = 0.5

        def __init__(self, value):
            self.class_accuracy = torch.full((10,), value)

    looked = []

    def scripted(model, images, args):
        looked.append(model)
        return Found(next(worst) if model is run.student else 0.5)

    monkeypatch.setattr(script, "robustness", scripted)
    run = begin(script, setup, data, "cfa-ard", select="last")
    epochs = script.train(run, data)
    next(epochs)
    assert run.average.updates == 0
    assert same(run.best["weights"], run.student.state_dict())
    list(epochs)
    average = run.average.module
    assert [model is average for model in looked] == [False, False, True, False, True]
    assert same(run.best["weights"], average.state_dict())
    assert not same(run.best["weights"], run.student.state_dict())
    assert begin(script, setup, data, "ard").average is None
    assert begin(script, setup, data, "ard", fair_average=True).average is not None
    assert begin(script, setup, data, "cfa-ard", fair_average=False).average is None


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, "examples/ard.py", "--smoke", "--method", "fair-mtard"]
    command += ["--tensorboard", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return out, result


def test_smoke_prints_the_report_of_the_student_that_it_leaves(smoke, script, setup):
    out, result = smoke
    report = RobustnessReport.load(out / "report.json")
    assert len(report) == 100
    assert report.columns == (*COLUMNS, "worst case")
    assert {attack.eps for attack in report.protocol.attacks} == {0.1}
    for column in COLUMNS:
        shown = re.search(rf"^{column} +(\d+\.\d) .*?(\d+\.\d) \[", result.stdout, re.MULTILINE)
        found = (100 * report[column].average, 100 * report[column].worst_class)
        assert shown.groups() == tuple(f"{value:.1f}" for value in found)
    tested = setup.chosen(setup.load_splits("digits", Path())[1], 100, 0)
    student = load_checkpoint(out / "student.pt")
    assert evaluate(student, tested, report.protocol, num_classes=10) == report
    assert "2/2" in result.stderr
    names = {f.name for f in out.iterdir()}
    assert names >= {"teacher.pt", "natural_teacher.pt"}
    assert "checkpoints" not in names
    assert any((out / "tensorboard").iterdir())


def test_stopped_and_resumed_as_a_user_does(script, tmp_path, capsys):
    common = [*RUN, "--method", "fair-ard", "--select", "last"]
    run_main(script, *common, "--out", tmp_path / "a", "--max-minutes", "0")
    assert (
        "stopped after epoch 1 of 3; the same command with --resume auto goes on"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "a" / "student.pt").exists()
    sentence = refused(script, *common, "--out", tmp_path / "a", "--resume", "auto", "--beta", "1")
    assert sentence.endswith("got others for --beta")
    other = tmp_path / "other.pt"
    content = torch.load(tmp_path / "a" / "teacher.pt", weights_only=True)
    content["state_dict"]["fc.bias"] += 1
    torch.save(content, other)
    resume = ["--out", tmp_path / "a", "--resume", "auto"]
    sentence = refused(script, *common, *resume, "--teacher", other)
    assert sentence.endswith("got others for --teacher")
    run_main(script, *common, *resume)
    run_main(script, *common, "--out", tmp_path / "b")
    students = [load_checkpoint(tmp_path / folder / "student.pt") for folder in "ab"]
    assert same(*(student.state_dict() for student in students))
    reports = [RobustnessReport.load(tmp_path / folder / "report.json") for folder in "ab"]
    assert reports[0] == reports[1]


def test_the_test_images_choose_nothing(script, setup, tmp_path, monkeypatch):
    options = [*RUN, "--method", "wat-ard"]
    run_main(script, *options, "--out", tmp_path / "a")
    original = setup.load_splits

    def poisoned(source, root, **rest):
        images, test = original(source, root, **rest)
        pixels = torch.rand(test.pixels.shape, generator=torch.Generator().manual_seed(0))
        return images, replace(test, pixels=pixels, labels=test.labels.flip(0))

    monkeypatch.setattr(setup, "load_splits", poisoned)
    run_main(script, *options, "--out", tmp_path / "b")
    students = [load_checkpoint(tmp_path / folder / "student.pt") for folder in "ab"]
    assert same(*(student.state_dict() for student in students))
    reports = [RobustnessReport.load(tmp_path / folder / "report.json") for folder in "ab"]
    assert reports[0] != reports[1]


def test_the_images_held_out_are_not_trained_on(script, setup):
    args = setup.resolved(script.Args(smoke=True, method="sat"))
    work = setup.prepare(args)
    rows = [images.pixels.flatten(1) for images in (work.data.train, work.data.val)]
    assert [len(part) for part in rows] == [1000, 257]
    assert int(work.data.val.labels.bincount().min()) >= 25
    everything = setup.load_splits("digits", Path())[0].pixels.flatten(1)
    both = torch.cat(rows)
    assert torch.equal(both[both.sum(1).argsort()].sum(0), everything.sum(0))
    apart = (rows[0][:, None, :] != rows[1][None]).any(dim=2)
    twins = (everything[:, None, :] == everything[None]).all(dim=2).sum() - len(everything)
    assert int((~apart).sum()) <= int(twins)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes, each bright in a channel of its own."""
    root = tmp_path_factory.mktemp("images")
    rng = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 4)):
        for c, name in enumerate(("ant", "bee", "cow")):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                image = torch.zeros(3, 8, 8)
                image[c] = 0.5 + 0.5 * torch.rand(8, 8, generator=rng)
                save_image(image, root / split / name / f"{k}.png")
    return root


def test_a_folder_of_images_and_a_teacher_from_a_file(script, folder, tmp_path):
    common = ["--data", "folder", "--root", folder, "--val-images", "9", "--batch-size", "9"]
    common += ["--device", "cpu", "--attack-steps", "2", "--epochs", "4"]
    common += ["--student", "small_cnn_4", "--eps", "0.05"]
    run_main(script, *common, "--method", "sat", "--out", tmp_path / "sat", "--lr", "0.05")
    report = RobustnessReport.load(tmp_path / "sat" / "report.json")
    assert report.class_names == ("ant", "bee", "cow")
    assert report["clean"].average > 0.4
    teacher = tmp_path / "sat" / "student.pt"
    options = ["--method", "fair-ard", "--preset", "released", "--teacher", teacher]
    run_main(script, *common, *options, "--precision", "bfloat16", "--out", tmp_path / "fair")
    names = {file.name for file in (tmp_path / "fair").iterdir()}
    assert names == {"student.pt", "report.json"}
    sentence = refused(script, "--smoke", "--teacher", teacher, "--out", tmp_path / "none")
    assert "expected a model for images (2, 1, 8, 8)" in sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--preset", "released", "--method", "gair-ard"],
            "expected `preset` to be one of 'paper'",
        ),
        (["--method", "sat", "--teacher", "t.pt"], "expected no --teacher for sat, got one"),
        (["--method", "ard", "--natural-teacher", "t.pt"], "expected no --natural-teacher for ard"),
        (["--teacher", "missing.pt"], "missing.pt"),
        (["--settings", "radius", "2"], "expected `settings` to be one of"),
        (["--settings", "eps", "2"], "expected --settings without eps"),
        (["--settings", "temperature", "hot"], "'hot'"),
        (["--method", "ard", "--beta", "1"], "got 'beta'"),
        (["--beta", "-1"], "expected `beta`"),
        (["--clip", "2", "1"], "expected `clip`"),
        (["--eps", "0"], "expected `eps`"),
        (["--attack-steps", "-1"], "expected `steps`"),
        (["--val-images", "2000"], "expected to choose 1..1257 images, got 2000"),
        (["--batch-size", "1001"], "expected --batch-size in 1..1000"),
        (["--epochs", "0"], "expected --epochs and --teacher-epochs of at least 1"),
        (["--test-images", "600"], "expected to choose 1..540 images, got 600"),
        (["--student", "perceptron"], "got 'perceptron'"),
        (["--lr", "-1"], "-1"),
        (["--seed", "-1"], "expected `seed`"),
        (["--data", "cifar10", "--root", "nowhere"], "--download fetches it"),
        (["--checkpoint-every", "0"], "expected --checkpoint-every of at least 1, got 0"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_sentence_and_nothing_is_written(arguments, sentence, script, tmp_path):
    found = refused(script, "--smoke", *arguments, "--out", tmp_path / "out")
    assert found.startswith("ard: ")
    assert sentence in found
    assert not (tmp_path / "out").exists()


def test_a_training_that_runs_away_is_one_sentence(script, tmp_path):
    options = ["--smoke", "--method", "trades", "--lr", "1e20", "--out", tmp_path]
    assert "expected finite losses" in refused(script, *options)


def test_the_command_line_refuses_with_status_1():
    for name in ("ard", "fair_ard_table"):
        command = [sys.executable, f"examples/{name}.py", "--eps", "0"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert re.fullmatch(rf"{name}: .*expected `eps`.*\n", result.stderr)


TABLE = {"methods": ("ard", "fair-ard"), "seeds": (0, 1), "epochs": 1, "teacher_epochs": 1}
TABLE |= {"student_width": 2, "teacher_width": 3, "jobs": 1}


def few_digits(digits, seed):
    """Enough for one batch; every class is there."""
    sizes = {"train": 100, "val": 60, "test": 80}
    return {name: (x[: sizes[name]], y[: sizes[name]]) for name, (x, y) in digits(seed).items()}


@pytest.fixture(scope="module")
def tabled(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("table")
    args = table.Args(**TABLE, out=out)
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(table, "digits", partial(few_digits, table.digits))
        patch.setattr("builtins.print", lambda *parts: printed.append(" ".join(map(str, parts))))
        table.main(args)
    tasks = [(name, seed) for name in ("teacher", *args.methods) for seed in args.seeds]
    reports = {(n, s): RobustnessReport.load(out / f"{n}-{s}.json") for n, s in tasks}
    return args, reports, "\n".join(printed)


def cells(text):
    """The rows of all Markdown tables."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_is_that_of_the_reports(tabled):
    args, reports, printed = tabled
    assert (args.out / "table.md").read_text("utf-8") in printed
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
    assert (args.out / "table.tex").read_text("utf-8").count(r"$\pm$") == 3 * 12
    assert (args.out / "classwise.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"Seconds per epoch: teacher \d+\.\d\d ± .*, fair-ard \d+\.\d\d ±", printed)


def test_the_differences_are_those_of_the_paired_tests(tabled):
    args, reports, printed = tabled
    rows = cells(printed)[5:]
    assert [row[1] for row in rows] == list(COLUMNS)
    for row in rows:
        tests = [
            compare({name: reports[name, seed] for name in args.methods}).test(
                "fair-ard", "ard", row[1]
            )
            for seed in args.seeds
        ]
        assert row[0] == "fair-ard − ard"
        for shown, figure in ((row[2:4], "average"), (row[4:6], "worst_class")):
            pairs = [getattr(test, figure) for test in tests]
            mean = 100 * sum(difference for difference, _ in pairs) / 2
            assert shown[0].split(" ± ")[0] == f"{mean:+.1f}"
            up = sum(p < 0.05 and difference > 0 for difference, p in pairs)
            down = sum(p < 0.05 and difference < 0 for difference, p in pairs)
            assert shown[1] == f"{up} up, {down} down of 2"


def test_finished_trainings_are_skipped_and_others_added(table, tabled, monkeypatch):
    args, _, printed = tabled
    monkeypatch.setattr(table, "digits", partial(few_digits, table.digits))
    done = []
    finish = table.finish

    def watched(args, task):
        done.append(task)
        return finish(args, task)

    monkeypatch.setattr(table, "finish", watched)
    table.main(args)
    assert done == []
    assert (args.out / "table.md").read_text("utf-8") in printed
    (args.out / "ard-1.json").unlink()
    table.main(replace(args, methods=("ard", "sat"), seeds=(1,)))
    assert done == [("ard", 1), ("sat", 1)]
    table.main(args)
    assert (args.out / "table.md").read_text("utf-8").split("Seconds")[0] in printed
    with pytest.raises(SystemExit, match="got others for --epochs; take another --out"):
        table.main(replace(args, epochs=2))


def test_measured_on_the_held_out_digits_the_test_digits_are_not_touched(
    table, tabled, tmp_path, monkeypatch
):
    args, reports, _ = tabled
    digits = table.digits

    def without_test(seed):
        split = few_digits(digits, seed)
        del split["test"]
        return split

    monkeypatch.setattr(table, "digits", without_test)
    table.main(replace(args, on="val", seeds=(0,), out=tmp_path))
    for name in args.methods:
        assert len(RobustnessReport.load(tmp_path / f"{name}-0.json")) == 60
        students = [load_checkpoint(out / f"{name}-0.pt") for out in (args.out, tmp_path)]
        assert same(*(student.state_dict() for student in students))
    assert len(reports["ard", 0]) == 80
    assert "60 val digits" in (tmp_path / "table.md").read_text("utf-8")


def test_two_processes_find_what_one_finds(table, tmp_path):
    command = [sys.executable, "examples/fair_ard_table.py", "--methods", "ard", "fair-ard"]
    command += ["--seeds", "0", "--epochs", "1", "--teacher-epochs", "1", "--student-width", "2"]
    command += ["--teacher-width", "3", "--jobs", "2", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    reports = {n: RobustnessReport.load(tmp_path / f"{n}-0.json") for n in ("ard", "fair-ard")}
    assert [len(report) for report in reports.values()] == [540, 540]
    table.finish(table.Args(**TABLE, out=tmp_path), ("fair-ard", 0))  # in this process, again
    assert RobustnessReport.load(tmp_path / "fair-ard-0.json") == reports["fair-ard"]
    assert "±" not in cells(result.stdout)[1][1]  # one seed has no deviation


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": (0, 0)}, "expected different --seeds"),
        ({"seeds": (-1,)}, "expected `seed`"),
        ({"methods": ()}, "expected different --methods, at least one"),
        ({"methods": ("wat-ard",), "preset": "released"}, "expected `preset`"),
        ({"student_width": 0}, "expected `width`"),
        ({"epochs": 0}, "expected --epochs and --teacher-epochs of at least 1"),
        ({"jobs": 0}, "expected --jobs of at least 1"),
        ({"beta": -1.0}, "expected `beta`"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_wrong_input_to_the_table(changes, sentence, table, tmp_path):
    args = table.Args(**TABLE | {"out": tmp_path / "out"} | changes)
    with pytest.raises(SystemExit) as stop:
        table.main(args)
    assert sentence in stop.value.code
    assert not (tmp_path / "out").exists()
