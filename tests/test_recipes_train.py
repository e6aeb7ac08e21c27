"""`ferdlib train`: the loop for every method, what is kept, what continues, what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import refused, run, save_folder, save_model
from tiny_ferd import same
from torchvision.utils import save_image

from ferdlib import methods
from ferdlib.checkpoints import write_file
from ferdlib.evaluation import RobustnessReport, evaluate
from ferdlib.methods import rules
from ferdlib.models import load_checkpoint, small_cnn
from ferdlib.recipes import data as images_of
from ferdlib.recipes import train, training
from ferdlib.recipes.options import (
    ImageOptions,
    ModelOptions,
    ObjectiveOptions,
    RunOptions,
    SelectionOptions,
    SGDOptions,
    Train,
)

COLUMNS = ("clean", "FGSM", "PGD-20", "CW-inf")
RUN = ["--smoke", "--epochs", 3, "--batch-size", 200, "--attack-steps", 2, "--val-images", 60]
PAIRS = [
    *(("natural", "none"), ("sat", "none"), ("trades", "dafa"), ("bat", "none"), ("ard", "fair")),
    *(("iad", "fair"), ("rslad", "gair"), ("mtard", "wat"), ("adaad", "frl"), ("absld", "fat")),
    *(("ard", "cfa"), ("ard", "faal")),
]


@pytest.fixture(scope="module")
def data():
    """60 digits to train on, 30 held out."""
    images, _ = images_of.load_train_test(ImageOptions(data="digits"))
    return images_of.hold_out(images.part(torch.arange(90)), 30, seed=0)


def options(method="ard", rule="none", out=Path("nowhere"), **changes):
    """Small enough for a second, large enough that the rules have something to see."""
    settings = {"epochs": 3, "batch_size": 20, "attack_steps": 2} | changes

    def group(kind, **own):
        fields = kind.__dataclass_fields__
        return kind(**own | {k: v for k, v in settings.items() if k in fields})

    run_options = group(RunOptions, out=out, device="cpu")
    return train.resolved(
        Train(
            objective=group(ObjectiveOptions, method=method, rule=rule),
            models=group(ModelOptions, student="small_cnn_4"),
            sgd=group(SGDOptions),
            selection=group(SelectionOptions),
            run=run_options,
        )
    )


def begin(data, method="ard", rule="none", **changes):
    """A training with teachers whose logits differ between images."""
    teachers = {}
    for k, name in enumerate(train.wanted_teachers(method)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(k)
            teachers[name] = small_cnn(1, 10, width=3).eval()
    return train.begin(options(method, rule, **changes), *data, teachers)


@pytest.mark.parametrize(("method", "rule"), PAIRS, ids=lambda word: word)
def test_each_method_trains_and_a_resumed_run_is_the_undisturbed_one(method, rule, data):
    straight = begin(data, method, rule)
    start = {k: v.clone() for k, v in straight.student.state_dict().items()}
    epochs = list(straight.train())
    assert [epoch["loss"] > 0 for epoch in epochs] == [True] * 3
    assert straight.method.epoch == straight.method.rule.epoch == 3
    weights = straight.student.state_dict()
    assert all(v.isfinite().all() for v in weights.values())
    assert all(not torch.equal(start[k], v) for k, v in weights.items() if "weight" in k)

    stopped = begin(data, method, rule)
    next(stopped.train())
    state = stopped.state_dict()
    torch.rand(7)  # the global generator is elsewhere in another process
    resumed = begin(data, method, rule)
    resumed.load_state_dict(state)
    assert len(list(resumed.train())) == 2
    assert same(resumed.state_dict(), straight.state_dict())


def test_the_loop_is_attack_loss_and_sgd(data):
    ours = begin(data, "rslad", "fair", epochs=2)
    epochs = list(ours.train())

    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    student = small_cnn(1, 10, width=4).to(memory_format=torch.channels_last)
    method = methods.RSLAD(
        num_classes=10,
        teacher=begin(data, "rslad").teachers["teacher"],
        rule=rules.LPS(clip=(5 / 6, 5 / 2)),
        eps=0.1,
        step_size=0.025,
        steps=2,
        rng=rng,
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    x, y = data[0].pixels, data[0].labels
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
        assert epochs[epoch]["loss"] == pytest.approx(sum(losses) / 3)
        assert epochs[epoch]["train/learning_rate"] == pytest.approx(lr)
    assert same(ours.student.state_dict(), student.state_dict())


def test_rules_that_validate_see_the_images_held_out_once_an_epoch(data, monkeypatch):
    seen = []

    def watched(self, method, student, batches):
        x, y = zip(*batches, strict=True)
        seen.append((self.epoch, torch.cat(x), torch.cat(y)))

    monkeypatch.setattr(rules.WAT, "validate", watched)
    monkeypatch.setattr(rules.WAT, "end_epoch", rules.Rule.end_epoch)
    list(begin(data, "ard", "wat").train())
    assert [epoch for epoch, _, _ in seen] == [0, 1, 2]  # before end_epoch
    assert all(same((x, y), (data[1].pixels, data[1].labels)) for _, x, y in seen)


def test_dates_move_with_the_number_of_epochs(data):
    def dates(method, rule="none", **changes):
        found = begin(data, method, rule, **changes)
        milestones = [step // 3 for step in sorted(found.schedule.milestones)]  # 3 steps an epoch
        part = found.method if rule == "none" else found.method.rule
        return milestones, getattr(part, "begin", getattr(part, "rate_drops", None))

    assert dates("iad", epochs=40) == ([20, 30], 12)
    assert dates("iad", epochs=40, preset="released") == ([20], 12)
    assert dates("mtard", epochs=300) == ([215, 260, 285], (215, 260, 285))
    assert dates("absld", epochs=30) == ([22, 26, 28], (22, 26, 28))
    assert dates("ard", "dafa", epochs=100) == ([50, 75], 35)
    assert dates("iad", epochs=1)[1] == 1  # never before the first epoch
    assert dates("iad", epochs=40, settings={"begin": 3}) == ([20, 30], 3)
    assert dates("ard", "dafa", epochs=100, rule_settings={"begin": 4}) == ([50, 75], 4)


def test_presets_and_options_reach_method_and_optimizer(data):
    paper, released = (begin(data, "ard", "fair", preset=p) for p in ("paper", "released"))
    assert (paper.method.kl_mean, paper.method.rule.count) == (False, "first")
    assert (released.method.kl_mean, released.method.rule.count) == (True, "correct")
    assert [r.optimizer.param_groups[0]["nesterov"] for r in (paper, released)] == [False, True]
    ball = (paper.method.eps, paper.method.step_size, paper.method.steps)
    assert ball == pytest.approx((0.1, 0.025, 2))
    assert paper.method.rule.clip == released.method.rule.clip == (5 / 6, 5 / 2)
    changes = {"eps": 0.2, "attack_steps": 3, "clip": None, "rule_settings": {"beta": 1.0}}
    changes |= {"settings": {"temperature": 5}, "lr": 0.02, "weight_decay": 0.1}
    changed = begin(data, "ard", "fair", **changes)
    found = changed.method
    assert (found.eps, found.step_size, found.steps) == pytest.approx((0.2, 0.05, 3))
    assert (found.rule.beta, found.rule.clip, found.temperature) == (1.0, None, 5)
    assert changed.optimizer.param_groups[0]["lr"] == 0.02
    natural = begin(data, "natural").method
    assert (natural.eps, natural.steps) == (0, 0)
    robust = train.teacher_args(options(), "teacher")
    assert (robust.objective.eps, robust.objective.step_size) == pytest.approx((0.14, 0.035))
    cifar = train.resolved(
        Train(
            objective=ObjectiveOptions(method="trades", rule="none"),
            images=ImageOptions(data="cifar10"),
        )
    )
    sgd, val_images = cifar.sgd, cifar.selection.val_images
    assert (sgd.epochs, sgd.batch_size, sgd.lr, val_images) == (76, 128, 0.1, 1000)
    assert (cifar.models.student, cifar.objective.eps) == ("resnet18", None)
    assert train.protocol("fair-ard", cifar).attacks[1].eps == 8 / 255


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_other_schedules_end_low(schedule, data):
    rates = [e["train/learning_rate"] for e in begin(data, "sat", schedule=schedule).train()]
    assert rates[-1] < 0.1 / 3
    assert (rates[0] == 0.1) == (schedule == "cosine")


class Found:
    """An attack's result of given figures."""

    row_names = tuple(map(str, range(10)))

    def __init__(self, average, worst):
        self.average, self.worst_class = average, worst
        self.class_accuracy = torch.full((10,), worst)


def test_the_best_epoch_on_the_images_held_out_is_kept(data, monkeypatch):
    figures = [(0.5, 0.1), (0.4, 0.3), (0.6, 0.1), (0.2, 0.5)]  # sums 0.6, 0.7, 0.7, 0.7
    seen = []

    def scripted(self, model):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return Found(*figures[len(seen) - 1])

    monkeypatch.setattr(training.Training, "_robustness", scripted)
    for select, kept in (("best", 2), ("last", 4)):
        seen.clear()
        found = begin(data, epochs=4, select=select)
        list(found.train())
        assert found.best["epoch"] == kept
        assert same(found.selected().state_dict(), seen[kept - 1])
        assert not found.student.training


def test_cfa_keeps_its_average_once_the_worst_class_is_robust(data, monkeypatch):
    worst, looked = iter([0.1, 0.5, 0.5]), []

    def scripted(self, model):
        looked.append(model)
        return Found(0.5, next(worst) if model is self.student else 0.5)

    monkeypatch.setattr(training.Training, "_robustness", scripted)
    found = begin(data, "ard", "cfa", select="last")
    epochs = found.train()
    next(epochs)
    assert found.average.updates == 0
    assert same(found.best["weights"], found.student.state_dict())
    list(epochs)
    average = found.average.module
    assert [model is average for model in looked] == [False, False, True, False, True]
    assert same(found.best["weights"], average.state_dict())
    assert not same(found.best["weights"], found.student.state_dict())
    assert begin(data, "ard").average is None
    assert begin(data, "ard", "cfa", average="none").average is None


def test_the_average_over_steps_is_exponential(data):
    found = begin(data, "sat", average="ema", epochs=1)
    biases = []
    found.optimizer.register_step_post_hook(
        lambda *_: biases.append(found.student.fc.bias.detach().clone())
    )
    list(found.train())
    expected = biases[0]  # the first average is a copy
    for bias in biases[1:]:
        expected = 0.98 * expected + 0.02 * bias
    assert len(biases) == 3
    assert torch.allclose(found.best["weights"]["fc.bias"], expected, atol=1e-6)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(map(str, parts))))
        words = ["--smoke", "--method", "mtard", "--rule", "fair", "--tensorboard"]
        run("train", *words, "--out", out)
    return out, "\n".join(lines)


def test_smoke_prints_the_report_of_the_student_that_it_leaves(smoke):
    out, printed = smoke
    report = RobustnessReport.load(out / "report.json")
    assert len(report) == 40
    assert report.columns == (*COLUMNS, "worst case")
    assert {attack.eps for attack in report.protocol.attacks} == {0.1}
    assert str(report) in printed
    tested = images_of.chosen(images_of.load("digits"), 40, 0)
    student = load_checkpoint(out / "student.pt")
    assert evaluate(student, tested, report.protocol, num_classes=10) == report
    names = {f.name for f in out.iterdir()}
    assert names == {
        *("student.pt", "teacher.pt", "natural_teacher.pt"),
        *("report.json", "classwise.png", "tensorboard"),
    }
    assert (out / "classwise.png").read_bytes().startswith(b"\x89PNG")
    again = re.search(r"^evaluate it: ferdlib (.*)$", printed, re.MULTILINE)[1].split()
    run(*again, "--without", "AutoAttack", "--test-images", 40, "--out", out / "again")
    assert (
        RobustnessReport.load(out / "again" / "report.json")
        .predictions["PGD-20"]
        .equal(report.predictions["PGD-20"])
    )


def test_stopped_and_resumed_as_a_user_does(tmp_path, capsys):
    words = ["train", *RUN, "--select", "last"]
    with pytest.raises(SystemExit) as stop:
        run(*words, "--out", tmp_path / "a", "--max-minutes", 0)
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert re.search(
        r"stopped after epoch 1 of 2 of teacher; go on: ferdlib train .* --resume auto", printed
    )
    resume = ["--out", tmp_path / "a", "--resume", "auto"]
    assert "expected --resume auto or another --out" in refused(*words, "--out", tmp_path / "a")
    assert refused(*words, *resume, "--seed", 1).endswith("got others for --seed")
    with pytest.raises(SystemExit):  # within the student, after its first epoch
        run(*words, *resume, "--max-minutes", 0)
    with pytest.raises(SystemExit):
        run(*words, *resume, "--max-minutes", 0)
    assert not (tmp_path / "a" / "student.pt").exists()
    sentence = refused(*words, *resume, "--rule-settings", "beta", 1)
    assert sentence.endswith("got others for --rule-settings")
    run(*words, *resume)
    run(*words, "--out", tmp_path / "b")
    for name in ("student.pt", "teacher.pt"):
        states = [load_checkpoint(tmp_path / folder / name).state_dict() for folder in "ab"]
        assert same(*states)
    reports = [RobustnessReport.load(tmp_path / folder / "report.json") for folder in "ab"]
    assert reports[0] == reports[1]
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_a_signal_stops_after_the_epoch_with_its_status(tmp_path, capsys, monkeypatch):
    plain = training.Training._augmented

    def interrupted(self, index):
        if self.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, index)

    words = ["train", *RUN, "--batch-size", 1000, "--method", "sat", "--rule", "none"]
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_augmented", interrupted)
        with pytest.raises(SystemExit) as stop:
            run(*words, "--out", tmp_path / "a")
    assert stop.value.code == 128 + signal.SIGTERM
    out, err = capsys.readouterr()
    assert "stopped after epoch 2 of 3 of sat; go on: ferdlib train" in out
    assert "stopping after this epoch; once more ends at once" in err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run(*words, "--out", tmp_path / "a", "--resume", "auto")
    run(*words, "--out", tmp_path / "b")
    assert same(*(load_checkpoint(tmp_path / f / "student.pt").state_dict() for f in "ab"))


def test_the_test_images_choose_nothing(tmp_path, monkeypatch):
    words = ["train", *RUN, "--rule", "wat"]
    run(*words, "--out", tmp_path / "a")
    original = train.load_train_test

    def poisoned(*args):
        images, test = original(*args)
        pixels = torch.rand(test.pixels.shape, generator=torch.Generator().manual_seed(0))
        return images, replace(test, pixels=pixels, labels=test.labels.flip(0))

    monkeypatch.setattr(train, "load_train_test", poisoned)
    run(*words, "--out", tmp_path / "b")
    assert same(*(load_checkpoint(tmp_path / f / "student.pt").state_dict() for f in "ab"))
    reports = [RobustnessReport.load(tmp_path / folder / "report.json") for folder in "ab"]
    assert reports[0] != reports[1]


def test_a_folder_of_images_and_a_teacher_from_a_file(tmp_path):
    root = save_folder(tmp_path / "images")
    words = ["train", "--data", "folder", "--root", root, "--val-images", 9, "--batch-size", 9]
    words += ["--attack-steps", 2, "--epochs", 4, "--student", "small_cnn_4", "--eps", 0.05]
    sat = ["--method", "sat", "--rule", "none", "--lr", 0.05]
    run(*words, *sat, "--out", tmp_path / "sat", "--measure", "val")
    report = RobustnessReport.load(tmp_path / "sat" / "report.json")
    assert report.class_names == ("ant", "bee", "cow")
    assert len(report) == 9
    teacher = tmp_path / "sat" / "student.pt"
    more = ["--preset", "released", "--teacher", teacher, "--precision", "bfloat16"]
    run(*words, *more, "--out", tmp_path / "fair")
    assert not (tmp_path / "fair" / "teacher.pt").exists()
    sentence = refused("train", "--smoke", "--teacher", teacher, "--out", tmp_path / "none")
    assert "expected a model for images (2, 1, 8, 8)" in sentence
    assert "expected --teacher FILE for ard, got none" in refused(*words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--preset", "released", "--rule", "gair"], "`preset`"),
        (["--method", "sat", "--teacher", "t.pt"], "expected no --teacher for sat, got one"),
        (["--natural-teacher", "t.pt"], "expected no --natural-teacher for ard"),
        (["--teacher", "missing.pt"], "missing.pt"),
        (["--settings", "radius", 2], "radius"),
        (["--settings", "eps", 2], "expected --settings without eps"),
        (["--settings", "temperature", "hot"], "'hot'"),
        (
            ["--rule-settings", "radius", 1],
            "expected --rule-settings of the rule 'fair', got radius",
        ),
        (["--rule-settings", "beta", -1], "expected `beta`"),
        (["--clip", 2, 1], "expected `clip`"),
        (["--eps", 0], "expected `eps`"),
        (["--attack-steps", -1], "expected `steps`"),
        (["--val-images", 2000], "expected --val-images in 10..1247"),
        (["--batch-size", 1001], "expected --batch-size in 1..1000"),
        (["--epochs", 0], "expected --epochs of at least 1"),
        (["--test-images", 600], "expected --test-images in 1..540, got 600"),
        (["--student", "perceptron"], "'perceptron'"),
        (["--lr", "nan"], "expected --lr above 0, got nan"),
        (["--eps", 8], "expected --eps in units of [0, 1] pixels, such as 8/255"),
        (["--seed", -1], "expected --seed of at least 0, got -1"),
        (["--data", "cifar10", "--root", "nowhere"], "--download fetches it"),
        (["--checkpoint-every", 0], "expected --checkpoint-every of at least 1, got 0"),
        (["--device", "abacus"], "abacus"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_sentence_and_nothing_is_written(words, sentence, tmp_path):
    assert sentence in refused("train", "--smoke", *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    save_model(tmp_path / "file")
    out = tmp_path / "file" / "out"
    assert "expected --out to be a folder" in refused("train", "--smoke", "--out", out)


def test_a_training_that_runs_away_is_one_sentence(tmp_path):
    words = ["--smoke", "--method", "trades", "--rule", "none", "--lr", 1e20]
    sentence = refused("train", *words, "--out", tmp_path)
    said = (
        r"got NaN or infinity in epoch (\d), step (\d) of the student; lower --lr; '(.*)' has the"
    )
    epoch, step, file = re.search(said, sentence).groups()
    found = json.loads(Path(file).read_text("utf-8"))
    assert (found["epoch"], found["step"], found["part"]) == (int(epoch), int(step), "student")
    assert len(found["losses"]["student"]) >= int(step) - 1


def test_other_images_under_the_same_options_are_refused(tmp_path):
    words = ["train", "--data", "folder", "--val-images", 9, "--batch-size", 9, "--eps", 0.05]
    words += ["--attack-steps", 1, "--epochs", 2, "--student", "small_cnn_2", "--method", "sat"]
    words += ["--rule", "none", "--out", tmp_path / "out"]
    roots = [save_folder(tmp_path / name, size=size) for name, size in (("a", 8), ("b", 8))]
    image = tmp_path / "b" / "train" / "ant" / "0.png"
    save_image(torch.zeros(3, 8, 8), image)
    with pytest.raises(SystemExit):
        run(*words, "--root", roots[0], "--max-minutes", 0)
    assert refused(*words, "--root", roots[1], "--resume", "auto").endswith("others for --root")


def test_a_disk_that_is_full_at_the_very_end_says_where_the_checkpoints_are(tmp_path, monkeypatch):
    words = ["train", *RUN, "--method", "sat", "--rule", "none", "--out", tmp_path]

    def full(target, content):
        if target.suffix == ".png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        write_file(target, content)

    with monkeypatch.context() as patch:
        patch.setattr("ferdlib.recipes.evaluate.write_file", full)
        sentence = refused(*words)
    assert f"the checkpoints in '{tmp_path}/checkpoints' stay: make room" in sentence
    assert "No space left on device: '" in sentence
    assert not list(tmp_path.rglob("*.partial"))
    run(*words, "--resume", "auto")
    assert (tmp_path / "classwise.png").exists()
