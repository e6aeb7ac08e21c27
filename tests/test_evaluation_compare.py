"""Reports side by side: the papers' layout, paired tests worked out by hand, and shards put together."""

import csv
import io
import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import binom, binomtest
from torch.utils.data import Subset, TensorDataset

from ferdlib.evaluation import (
    PROTOCOLS,
    AttackSpec,
    Protocol,
    RobustnessReport,
    compare,
    evaluate,
    holm,
    merge,
)


def ascent(name, **change):
    return AttackSpec(
        name=name, **({"kind": "pgd", "eps": 0.1, "step_size": 0.1, "steps": 1} | change)
    )


def report(targets, num_classes, robust, **change):
    """By hand: for "clean" and each attack which samples it leaves right; the others go to the next class."""
    attacks = tuple(ascent(name) for name in robust if name != "clean")
    fooled = {name: r.long() * (1 if name == "clean" else 2) for name, r in robust.items()}
    fields = {
        "protocol": Protocol(name="by hand", attacks=attacks),
        "class_names": tuple(f"c{k}" for k in range(num_classes)),
        "index": torch.arange(len(targets)),
        "targets": targets,
        "predictions": {
            name: torch.where(r, targets, (targets + 1) % num_classes) for name, r in robust.items()
        },
        "fooled_at": fooled,
        "stages": {name: ("clean",) if name == "clean" else ("x0", "x1") for name in robust},
    }
    return RobustnessReport(**(fields | change))


def with_accuracies(per_class=10, **accuracies):
    """A report of these class accuracies; `clean=(0.9, 0.8)`, and the same under PGD if that is all."""
    if len(accuracies) == 1:
        accuracies["PGD"] = accuracies["clean"]
    count = len(accuracies["clean"])
    targets = torch.arange(count).repeat_interleave(per_class)
    at = torch.arange(per_class).repeat(count)
    right = {
        name: torch.tensor([round(per_class * a) for a in v]) for name, v in accuracies.items()
    }
    return report(targets, count, {name: at < r[targets] for name, r in right.items()})


@pytest.fixture
def three():
    return compare(
        {
            "A_1": with_accuracies(clean=(1.0, 0.8), PGD_20=(0.6, 0.4)),
            "50% & more": with_accuracies(clean=(0.9, 0.9), PGD_20=(0.5, 0.3)),
            r"f^T~\x": with_accuracies(clean=(0.7, 0.5), PGD_20=(0.0, 0.0)),
        }
    )


# Average, worst class and SD / mean of each, by hand: 0.2 / 1.8, 0.2 / 1, 0, 0.2 / 0.8, 0.2 / 1.2, 0 / 0.
CELLS = [
    ["90.00", "80.00", "0.111", "50.00", "40.00", "0.200"],
    ["90.00", "90.00", "0.000", "40.00", "30.00", "0.250"],
    ["60.00", "50.00", "0.167", "0.00", "0.00", "-"],
]


def test_latex_is_the_papers_table(three):
    lines = three.to_latex().splitlines()
    assert lines == [
        r"\begin{tabular}{lrrrrrr}",
        r"\toprule",
        r" & \multicolumn{3}{c}{clean} & \multicolumn{3}{c}{PGD\_20} \\",
        r"\cmidrule(lr){2-4}\cmidrule(lr){5-7}",
        r"Method & Avg. & Worst & NSD & Avg. & Worst & NSD \\",
        r"\midrule",
        r"A\_1 & \textbf{90.00} & \underline{80.00} & \underline{0.111}"
        r" & \textbf{50.00} & \textbf{40.00} & \textbf{0.200} \\",
        r"50\% \& more & \textbf{90.00} & \textbf{90.00} & \textbf{0.000}"
        r" & \underline{40.00} & \underline{30.00} & \underline{0.250} \\",
        r"f\textasciicircum{}T\textasciitilde{}\textbackslash{}x"
        r" & \underline{60.00} & 50.00 & 0.167 & 0.00 & 0.00 & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert [line.replace(r"\&", "").count("&") for line in lines[6:9]] == [6, 6, 6]


def test_one_model_is_not_ranked():
    made = with_accuracies(clean=(1.0, 0.8), PGD=(0.6, 0.4))
    assert compare({"A": made}).to_latex() == made.to_latex().replace("model &", "A &")
    assert "textbf" not in made.to_latex()
    assert "underline" not in made.to_latex()
    assert "worst case" not in made.to_latex()


def test_equal_models_are_all_best():
    made = with_accuracies(clean=(1.0, 0.8))
    text = compare({"A": made, "B": made}).to_latex()
    assert text.count(r"\textbf{90.00}") == 4
    assert "underline" not in text


def test_other_tables(three):
    # The worst case is that of PGD, whose survivors are among those of clean.
    rows = [[*row, *row[3:]] for row in CELLS]
    text = str(three).splitlines()
    assert text[0].split() == ["clean", "PGD_20", "worst", "case"]
    assert [line.split()[-9:] for line in text[3:]] == rows
    markdown = [
        [c.strip() for c in line.split("|")[1:-1]] for line in three.to_markdown().splitlines()
    ]
    assert markdown[0][1:4] == ["clean avg.", "clean worst", "clean NSD"]
    assert [row[1:] for row in markdown[2:]] == rows
    lines = list(csv.DictReader(io.StringIO(three.to_csv())))
    assert len(lines) == 9
    assert lines[1] == {
        "model": "A_1",
        "attack": "PGD_20",
        "average": "0.5",
        "worst class": "0.4",
        "nsd": lines[1]["nsd"],
    }
    assert float(lines[1]["nsd"]) == pytest.approx(0.2, abs=1e-12)
    assert lines[7]["nsd"] == ""


def test_columns_are_those_that_all_have():
    one = with_accuracies(clean=(1.0, 1.0), FGSM=(0.9, 0.9), PGD=(0.5, 0.5))
    two = with_accuracies(clean=(1.0, 1.0), PGD=(0.4, 0.4), CW=(0.3, 0.3))
    assert compare({"1": one, "again": one}).columns == ("clean", "FGSM", "PGD", "worst case")
    for reports in ({"1": one, "2": two}, {"2": two, "1": one}):
        assert compare(reports).columns == ("clean", "PGD")


def test_worst_tenth_from_a_hundred_classes_on():
    rising = [k / 200 for k in range(100)]
    many = compare({"A": with_accuracies(per_class=200, clean=rising)})
    few = compare({"A": with_accuracies(per_class=200, clean=rising[:99])})
    assert (many.worst, few.worst) == ("10%", "class")
    # The mean of 0, 0.005, ..., 0.045.
    assert "& 2.25 &" in many.to_latex()
    assert r"Worst-10\%" in many.to_latex()
    assert "worst-10%" in str(many)
    other = compare(many.reports, worst="class")
    assert "& 0.00 &" in other.to_latex()
    assert "worst 10%" in many.to_csv()


@pytest.mark.parametrize(
    ("reports", "error", "message"),
    [
        ({}, ValueError, "`reports` to be at least one RobustnessReport, got none"),
        ({"a": 1}, TypeError, "each of `reports` to be a RobustnessReport, got int 1"),
        (
            {k: with_accuracies(clean=[0.5] * n) for k, n in (("a", 2), ("b", 3))},
            ValueError,
            "`reports` of the same classes",
        ),
    ],
)
def test_reports_that_cannot_be_compared(reports, error, message):
    with pytest.raises(error, match=f"^compare: expected {message}"):
        compare(reports)


def test_one_name_means_one_attack():
    made = with_accuracies(clean=(1.0, 0.8), PGD=(0.6, 0.4))
    for change in ({"eps": 0.2}, {"steps": 2}, {"restarts": 3}, {"start": None}, {"judge": "any"}):
        weak = replace(made, protocol=replace(made.protocol, attacks=(ascent("PGD", **change),)))
        with pytest.raises(ValueError, match="^compare: expected one setting for each attack of"):
            compare({"a": made, "b": weak})
    other_noise = replace(made, protocol=made.protocol.with_seed(1))
    assert compare({"a": made, "b": other_noise}).columns == ("clean", "PGD", "worst case")


def discordant(only_a, only_b, per_class=20):
    """Two models by how many samples of each class only one of them gets right; the rest both do."""
    targets = torch.arange(len(only_a)).repeat_interleave(per_class)
    at = torch.arange(per_class).repeat(len(only_a))
    a, b = torch.tensor(only_a)[targets], torch.tensor(only_b)[targets]
    robust = {"a": ~((at >= a) & (at < a + b)), "b": at >= a}
    clean = torch.ones_like(at, dtype=torch.bool)
    return {
        name: report(targets, len(only_a), {"clean": clean, "PGD": r}) for name, r in robust.items()
    }


def test_paired_tests_by_hand():
    comparison = compare(discordant([8, 2, 0], [1, 3, 0]))
    found = comparison.test("a", "b", "PGD")
    p = [binomtest(1, 9).pvalue, binomtest(2, 5).pvalue, 1.0]
    assert found.class_p.tolist() == pytest.approx(
        holm(torch.tensor(p, dtype=torch.float64)).tolist()
    )
    assert found.class_p[0] == pytest.approx(3 * 20 / 2**9)
    assert found.class_differences.tolist() == pytest.approx([0.35, -0.05, 0.0])
    # Class accuracies 19/20, 17/20, 1 and 12/20, 18/20, 1.
    assert found.average[0] == pytest.approx(6 / 60)
    assert found.worst_class[0] == pytest.approx(17 / 20 - 12 / 20)
    sd = [torch.tensor(v).std(correction=0) / sum(v) * 3 for v in ([19.0, 17, 20], [12.0, 18, 20])]
    assert found.nsd[0] == pytest.approx(float(sd[0] - sd[1]), abs=1e-6)
    # Of 14 exchanged samples at most 4 or at least 10 go to one model: that is 10 against 4 or more.
    assert found.average[1] == pytest.approx(2 * binom.cdf(4, 14, 0.5), abs=0.02)
    assert comparison.test("a", "b").average == found.average  # PGD is the worst case
    assert comparison.test("a", "b", "clean").average == (0.0, 1.0)
    text = str(comparison.test("a", "b", "PGD"))
    assert text.startswith("a minus b, PGD, in % (NSD a fraction):")
    assert text.splitlines()[3].split()[:2] == ["average", "+10.0"]
    assert "c0" not in text  # 3 * 0.039


def test_a_clear_difference_is_named():
    comparison = compare(discordant([18, 0], [0, 0]))
    found = comparison.test("a", "b", "PGD")
    assert found.class_p.tolist() == pytest.approx([2 * 2 / 2**18, 1.0])
    assert max(found.average[1], found.worst_class[1]) < 1e-3
    assert str(found).splitlines()[-1].split()[:2] == ["c0", "+90.0"]


def test_the_test_is_antisymmetric():
    comparison = compare(discordant([8, 2, 0], [1, 3, 0]))
    one, two = comparison.test("a", "b", "PGD"), comparison.test("b", "a", "PGD")
    for name in ("average", "worst_class", "nsd"):
        (difference, p), (turned, same) = getattr(one, name), getattr(two, name)
        assert (difference, p) == (pytest.approx(-turned), same)
    assert torch.equal(one.class_differences, -two.class_differences)
    assert torch.equal(one.class_p, two.class_p)


def test_a_model_does_not_differ_from_itself():
    made = with_accuracies(clean=(1.0, 0.8), PGD=(0.6, 0.4))
    found = compare({"a": made, "b": made}).test("a", "b", "PGD")
    assert found.average == found.worst_class == found.nsd == (0.0, 1.0)
    assert found.class_p.tolist() == [1.0, 1.0]
    assert found.class_differences.tolist() == [0.0, 0.0]


def test_absent_rows_have_no_p():
    both = {
        name: replace(made, class_names=("c0", "c1", "gone"))
        for name, made in discordant([8, 2], [1, 3]).items()
    }
    found = compare(both).test("a", "b", "PGD")
    assert found.class_p.isnan().tolist() == [False, False, True]
    assert found.class_p[0] == pytest.approx(2 * 20 / 2**9)  # Holm over two, not three
    assert math.isnan(found.class_differences[2])


def test_only_the_same_samples_can_be_paired():
    made = with_accuracies(clean=(1.0, 0.8), PGD=(0.6, 0.4))
    made = replace(made, manifest={"data": {"fingerprint": "of these images"}})
    grouped = replace(made, groups=made.targets, group_names=made.class_names)
    for other in (
        replace(made, index=made.index + 1),
        replace(made, targets=made.targets.flip(0)),
        replace(grouped, groups=1 - grouped.groups),
        with_accuracies(per_class=20, clean=(1.0, 0.8), PGD=(0.6, 0.4)),
        replace(made, manifest={"data": {"fingerprint": "of other images"}}),
    ):
        comparison = compare({"a": made, "b": other})
        with pytest.raises(
            ValueError, match="^Comparison.test: expected reports on the same samples"
        ):
            comparison.test("a", "b")
    with pytest.raises(ValueError, match="^Comparison.test: expected `second`"):
        compare({"a": made}).test("a", "c")
    with pytest.raises(ValueError, match="^Comparison.test: expected `column`"):
        compare({"a": made}).test("a", "a", "CW")


def light(x):
    return torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], dim=1)


@pytest.fixture(scope="module")
def shards():
    x = torch.rand(24, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, torch.arange(24) % 2)
    groups = torch.arange(24) % 3
    cuts = (range(24), range(0, 24, 2), range(1, 24, 2), range(0, 24, 4))
    return [evaluate(light, Subset(data, c), "quick", num_classes=2, groups=groups) for c in cuts]


def test_shards_are_put_together(shards):
    whole, even, odd, quarter = shards
    joined = merge([odd, even])
    assert joined == whole
    assert joined.groups.tolist() == [0, 1, 2] * 8
    assert joined.timing["seconds"]["FGSM"] == pytest.approx(
        odd.timing["seconds"]["FGSM"] + even.timing["seconds"]["FGSM"]
    )
    assert merge([whole]) == whole
    again = merge([even, quarter, odd, quarter])
    assert replace(again, manifest=whole.manifest) == whole
    assert again.manifest["data"]["samples"] == 24
    assert again.manifest["data"]["fingerprint"] is None


def test_shards_of_different_evaluations_are_refused(shards):
    _, even, odd, _ = shards
    model = {**odd.manifest["model"], "fingerprint": "other"}
    for other, what in [
        (replace(odd, protocol=odd.protocol.with_seed(1)), "protocol"),
        (replace(odd, manifest={**odd.manifest, "model": model}), "model"),
        (replace(odd, manifest={**odd.manifest, "bounds": [-1.0, 1.0]}), "bounds"),
        (replace(odd, manifest={**odd.manifest, "device": "a toaster"}), "device"),
    ]:
        with pytest.raises(
            ValueError, match=f"^merge: expected .* one evaluation, got others in {what}$"
        ):
            merge([even, other])
    with pytest.raises(ValueError, match="^merge: expected one setting for each attack"):
        merge([even, replace(odd, protocol=PROTOCOLS["quick"].at(eps=0.1))])
    with pytest.raises(ValueError, match="^merge: expected `reports` to be at least one"):
        merge([])


def test_two_outcomes_for_one_sample_are_refused(shards):
    whole, even, *_ = shards
    for name in ("predictions", "fooled_at"):
        found = getattr(even, name)
        changed = replace(even, **{name: {**found, "FGSM": 1 - found["FGSM"]}})
        with pytest.raises(
            ValueError, match="^merge: expected one outcome for each sample, got two"
        ):
            merge([whole, changed])
