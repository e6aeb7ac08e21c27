"""The figures of a report against scikit-learn, NumPy and published numbers; files and tables."""

import csv
import errno
import io
import json
import logging
import math
import os
import resource
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics import confusion_matrix, recall_score

from ferdlib import metrics
from ferdlib.evaluation import (
    AttackResult,
    AttackSpec,
    Protocol,
    RobustnessReport,
    evaluate,
)

nan = math.nan
# PGD-20 accuracy of each CIFAR-10 class in FAAL's training log.
FAAL = (0.537, 0.665, 0.363, 0.458, 0.439, 0.395, 0.416, 0.468, 0.581, 0.561)


def ints(*values):
    return torch.tensor(values)


def report(targets, predictions, num_classes, **change):
    """By hand: each attack's predictions by name, fooled in its last stage."""
    names = [name for name in predictions if name != "clean"]
    attacks = [AttackSpec(name=n, kind="pgd", eps=0.1, step_size=0.1, steps=1) for n in names]
    stages = dict.fromkeys(names, ("x0", "x1")) | {"clean": ("clean",)}
    wrong = {name: (p == targets).long() for name, p in predictions.items()}
    fields = {
        "protocol": Protocol(name="by hand", attacks=tuple(attacks)),
        "class_names": tuple(f"c{k}" for k in range(num_classes)),
        "index": torch.arange(len(targets)),
        "targets": targets,
        "predictions": predictions,
        "fooled_at": {name: len(stages[name]) - 1 + robust for name, robust in wrong.items()},
        "stages": {name: stages[name] for name in predictions},
    }
    return RobustnessReport(**(fields | change))


def guesses(targets, num_classes, share, seed):
    """Right for about the share of the samples."""
    rng = np.random.default_rng(seed)
    other = torch.from_numpy(rng.integers(0, num_classes, len(targets)))
    return torch.where(torch.from_numpy(rng.random(len(targets))) < share, targets, other)


@pytest.mark.parametrize("absent", [False, True], ids=["all there", "one absent"])
@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_figures_are_those_of_sklearn_and_numpy(num_classes, absent):
    rng = np.random.default_rng(num_classes)
    share = rng.dirichlet(np.ones(num_classes))  # as unbalanced as can be
    share[1] *= not absent
    y = np.concatenate(
        [np.arange(num_classes), rng.choice(num_classes, 900, p=share / share.sum())]
    )
    y = y[y != 1] if absent else y
    targets = torch.from_numpy(y)
    attacks = {"clean": 0.9, "FGSM": 0.6, "PGD": 0.5}
    drawn = {
        name: guesses(targets, num_classes, s, k) for k, (name, s) in enumerate(attacks.items())
    }
    made = report(targets, drawn, num_classes)

    right = np.all([(p == targets).numpy() for p in drawn.values()], axis=0)
    first = np.select([(p != targets).numpy() for p in drawn.values()], list(drawn.values()), y)
    expected = {name: p.numpy() for name, p in drawn.items()} | {"worst case": first}
    assert made.columns == tuple(made) == tuple(expected)
    assert "worst case" in made
    assert "PGD-7" not in made
    labels = np.arange(num_classes)
    for name, predicted in expected.items():
        found = made[name]
        counts = confusion_matrix(y, predicted, labels=labels)
        recalls = recall_score(y, predicted, labels=labels, average=None, zero_division=nan)
        present = recalls[~np.isnan(recalls)]
        assert (found.confusion.numpy() == counts).all()
        assert (found.totals.numpy() == counts.sum(axis=1)).all()
        assert (found.correct.numpy() == counts.diagonal()).all()
        np.testing.assert_allclose(found.class_accuracy, recalls, rtol=0, atol=1e-12)
        tenth = np.sort(present)[: math.ceil(len(present) / 10)]
        figures = [found.average, found.worst_class, found.worst_10, found.nsd]
        by_numpy = [present.mean(), present.min(), tenth.mean(), present.std() / present.mean()]
        np.testing.assert_allclose(figures, by_numpy, rtol=0, atol=1e-12)
        assert found.worst_index == np.nanargmin(recalls)
        assert found.worst_name == f"c{np.nanargmin(recalls)}"
        np.fill_diagonal(counts, 0)
        if num_classes > 2:
            spread = [
                entropy(row) / math.log(num_classes - 1) if row.any() else nan for row in counts
            ]
            np.testing.assert_allclose(found.target_entropy, spread, rtol=0, atol=1e-12)
        else:
            assert found.target_entropy.isnan().all()
    assert (made["worst case"].robust.numpy() == right).all()
    assert made["worst case"].average < made["PGD"].average


def with_accuracies(*accuracies, per_class=1000):
    """Errors go to the next class."""
    targets = torch.arange(len(accuracies)).repeat_interleave(per_class)
    right = torch.tensor([round(per_class * a) for a in accuracies])
    fine = torch.arange(per_class).repeat(len(accuracies)) < right[targets]
    predictions = torch.where(fine, targets, (targets + 1) % len(accuracies))
    return AttackResult.of("PGD-20", predictions, targets, num_classes=len(accuracies))


def test_published_class_accuracies():
    found = with_accuracies(*FAAL)
    assert found.class_accuracy.tolist() == pytest.approx(FAAL, abs=1e-12)
    assert found.average == pytest.approx(0.4883, abs=1e-12)
    assert (found.worst_class, found.worst_index, found.worst_name) == (0.363, 2, "2")
    assert found.worst_10 == 0.363
    assert round(found.nsd, 4) == 0.1842
    assert found.target_entropy.tolist() == [0.0] * 10


TEACHER = (33.0, 26.8, 24.4, 23.3)  # of the class "cat", under FGSM, PGD, CW and AutoAttack
STUDENTS = {  # Fair-ARD: the worst class of Table 2, the column "cat" of Table 1
    "ARD": ((28.1, 21.6, 19.7, 16.9), (85.15, 80.60, 80.74, 72.53)),
    "IAD": ((27.9, 21.9, 21.2, 18.6), (84.55, 81.72, 86.89, 79.83)),
    "RSLAD": ((29.8, 23.8, 22.6, 20.9), (90.30, 88.81, 92.62, 89.70)),
}


@pytest.mark.parametrize("name", list(STUDENTS))
def test_published_inheritance(name):
    for teacher, student, printed in zip(TEACHER, *STUDENTS[name], strict=True):
        cat, other = with_accuracies(student / 100, 0.9), with_accuracies(teacher / 100, 0.9)
        assert cat.worst_class == pytest.approx(student / 100)
        ratio = metrics.inheritance_ratio(cat.class_accuracy, other.class_accuracy)
        assert f"{100 * ratio[0]:.2f}" == f"{printed:.2f}"


def test_the_intervals_are_of_these_counts():
    """Wilson's limits for 27 of 54 are 0.3711 and 0.6289, as in its documentation."""
    found = with_accuracies(0.5, 1.0, per_class=54)
    np.testing.assert_allclose(found.class_interval[0], [0.3711, 0.6289], atol=5e-5)
    for value, interval in [
        (found.average, found.average_interval),
        (found.worst_class, found.worst_class_interval),
        (found.worst_10, found.worst_10_interval),
        (found.nsd, found.nsd_interval),
    ]:
        low, high = interval.tolist()
        assert low < value < high
    wider = replace(found, confidence=0.99)
    assert wider.class_interval[0, 0] < found.class_interval[0, 0]


@pytest.fixture(scope="module")
def full():
    """A report with groups, findings, an absent group and the members of AutoAttack."""
    x = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    attacks = (
        AttackSpec(name="PGD|2", kind="pgd", eps=0.1, step_size=0.05, steps=2, judge="any"),
        AttackSpec(name="AA", kind="autoattack", eps=0.99),
    )

    def model(x):
        return torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], dim=1)

    return evaluate(
        model,
        (x, (x.mean((1, 2, 3)) > 0.5).long()),
        Protocol(name="both", attacks=attacks),
        num_classes=2,
        class_names=["dark", "light, or so"],
        groups=torch.arange(8) % 3,
        group_names=["a", "b|c", "None", "absent"],
        trust=True,
    )


def test_saved_and_loaded(full, tmp_path):
    full.save(tmp_path / "report.json")
    again = RobustnessReport.load(tmp_path / "report.json")
    assert again == full
    assert again.timing == full.timing
    assert again.findings == full.findings
    assert again.groups.tolist() == full.groups.tolist()
    assert again.members("AA") == full.members("AA") != ()
    for column in (*full.columns, *full.members("AA")):
        assert torch.equal(again[column].correct, full[column].correct)
    assert str(again) == str(full)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"predictions": {}},
        {"index": ints(*range(1, 9))},
        {"class_names": ("x", "y")},
        {"groups": None},
        {"findings": ()},
        {"manifest": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_reports_differ_in_what_counts(full, change):
    assert replace(full, **change) != full
    assert replace(full, timing={}) == full
    assert full != "a report"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text[:-20],
            "RobustnessReport.load: expected a complete report in '.*json', got",
        ),
        (lambda text: "", "RobustnessReport.load: expected a complete report in '.*json', got"),
        (
            lambda text: "[]",
            "RobustnessReport.from_dict: expected `content` of a saved report, got list",
        ),
        (
            lambda text: "{}",
            "RobustnessReport.from_dict: expected `content` of a saved report, got dict",
        ),
        (
            lambda text: text.replace('"version": 1', '"version": 2', 1),
            "RobustnessReport.from_dict: expected `content` of version 1, got 2$",
        ),
        (
            lambda text: text.replace('"targets"', '"labels"'),
            r"RobustnessReport.from_dict: expected `content` of a complete report, got none of \['t",
        ),
    ],
)
def test_a_file_that_is_no_report(full, tmp_path, change, message):
    path = tmp_path / "report.json"
    full.save(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=f"^{message}"):
        RobustnessReport.load(path)


def test_a_file_that_cannot_be_written(full, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    full.save(path)
    before = path.read_text()
    message = "^RobustnessReport.save: expected to write '.*', got"

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match=f"{message} .*No space left on device: '{path}'"):
            full.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    for where in (tmp_path / "none" / "report.json", path / "report.json"):
        with pytest.raises(OSError, match=message):
            full.save(where)
    assert path.read_text() == before


def test_csv_and_pandas(full):
    lines = list(csv.DictReader(io.StringIO(full.to_csv())))
    frame = full.to_pandas()
    assert list(frame.columns) == list(lines[0])
    assert len(lines) == len(frame) == 4 * 4
    expected = [(full[column], k) for column in full.columns for k in range(4)]
    for line, (_, row), (found, k) in zip(lines, frame.iterrows(), expected, strict=True):
        assert (line["attack"], line["class"]) == (found.name, ["a", "b|c", "None", "absent"][k])
        assert (row["attack"], row["class"]) == (line["attack"], line["class"])
        assert int(line["samples"]) == row["samples"] == found.totals[k]
        assert int(line["correct"]) == row["correct"] == found.correct[k]
        values = [found.class_accuracy[k], *found.class_interval[k]]
        for name, value in zip(("accuracy", "low", "high"), values, strict=True):
            if k == 3:
                assert line[name] == ""
                assert math.isnan(row[name])
            else:
                assert float(line[name]) == row[name] == float(value)


def test_the_text_can_be_read(full):
    text = str(full)
    assert "8 samples of 4 groups, protocol both (seed 0)" in text
    rows = [line for line in text.splitlines() if line.lstrip().startswith(("clean", "PGD", "AA"))]
    assert rows[0].split()[:4] == ["clean", "100.0", "[66.8,", "100.0]"]
    assert "  apgd-ce" in text
    found, worst = full["PGD|2"], full["worst case"]
    assert f"{100 * found.average:.1f} [" in next(row for row in rows if "PGD" in row)
    assert "no samples, left out of every figure: absent" in text
    by = [int((full.winner == k).sum()) for k in range(3)]
    none = int(worst.robust.sum())
    assert f"first fooled by: clean {by[0]}, PGD|2 {by[1]}, AA {by[2]}; by none {none}" in text
    assert sum(by) + none == 8
    assert all(str(finding) in text for finding in full.findings)
    assert len(full.findings) > 5


def test_many_classes_show_the_worst_ten():
    targets = torch.arange(30).repeat_interleave(10)
    right = torch.arange(10).repeat(30) < (targets % 15) // 2 + 1
    predictions = torch.where(right, targets, (targets + 1) % 30)
    made = report(targets, {"clean": targets, "PGD": predictions}, 30)
    below = str(made).split("10 worst of 30")[1].split("first fooled")[0].splitlines()[2:-1]
    # Accuracy 0.1 for 0, 1, 15 and 16, 0.2 for 2, 3, 17 and 18, 0.3 for 4, 5, 19 and 20.
    names = [f"c{k}" for k in (0, 1, 15, 16, 2, 3, 17, 18, 4, 5)]
    assert [line.split()[0] for line in below if line] == names
    assert [line.split()[-1] for line in below if line] == ["10.0"] * 4 + ["20.0"] * 4 + [
        "30.0"
    ] * 2
    assert "worst 10 %" in str(made)
    assert made["PGD"].worst_10 == pytest.approx(0.1)


def test_a_report_of_many_classes_is_cheap():
    """Time and memory linear in classes: a matrix of them all would take 800 MB."""
    k = 10_000
    targets = torch.arange(10 * k) % k
    shares = {"clean": 0.9, "FGSM": 0.6, "PGD": 0.5, "CW": 0.4}
    drawn = {name: guesses(targets, k, share, 0) for name, share in shares.items()}
    made = report(targets, drawn, k)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = str(made) + made.to_markdown()
    assert time.process_time() - start < 10
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300 * 1024  # KiB
    assert "10 worst of 10000" in text


def test_markdown_has_a_row_for_each_column(full):
    text = full.to_markdown()
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    figures, classes = tables
    assert len(figures) == 2 + len(full.columns) + len(full.members("AA"))
    assert len(classes) == 2 + 4
    for table in tables:  # without the escaped ones
        assert len({line.replace(r"\|", "").count("|") for line in table}) == 1
    assert figures[3].startswith(r"| PGD\|2 |")
    assert classes[3].startswith(r"| b\|c | 3 | 100.0 |")
    assert classes[5] == "| absent | 0 | - | - | - | - |"
    assert "- AA: eps 0.99, AutoAttack standard, batches of 250" in text
    assert full.manifest["data"]["fingerprint"] in text
    findings = [str(finding).replace("|", r"\|") for finding in full.findings]
    assert sum(f"- {finding}" in text for finding in findings) == len(full.findings)


def test_what_is_asked_for_has_to_be_there(full):
    with pytest.raises(
        ValueError, match="^RobustnessReport: expected `column` to be one of 'clean'"
    ):
        full["PGD-20"]
    with pytest.raises(ValueError, match="^RobustnessReport.survival: expected `attack`"):
        full.survival("worst case")
    with pytest.raises(TypeError, match="unhashable"):
        hash(full)


def test_the_manifest_says_what_was_evaluated(full, caplog):
    manifest = json.loads(json.dumps(full.manifest))
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["data"]["samples"] == 8
    assert (manifest["data"]["shape"], manifest["data"]["dtype"]) == ([1, 2, 2], "float32")
    assert manifest["model"] == {"class": "callable", "parameters": 0, "fingerprint": None}
    assert manifest["bounds"] == [0.0, 1.0]
    assert set(full.timing["seconds"]) == {"clean", "PGD|2", "AA"}
    assert not [r for r in caplog.records if r.levelno > logging.WARNING]
