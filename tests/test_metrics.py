"""Metrics against published figures, a second implementation, and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from ferdlib import metrics

nan = math.nan

# PGD-20 accuracy of each CIFAR-10 class in FAAL's training log.
FAAL = torch.tensor(
    [0.537, 0.665, 0.363, 0.458, 0.439, 0.395, 0.416, 0.468, 0.581, 0.561], dtype=torch.float64
)
SCALARS = [metrics.average, metrics.worst_class, metrics.worst_fraction, metrics.nsd]


def acc(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def close(actual, expected, atol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)


def test_faal_fixture():
    close(metrics.average(FAAL), 0.4883)
    close(metrics.worst_class(FAAL), 0.363)
    close(metrics.worst_fraction(FAAL), 0.363)
    close(metrics.nsd(FAAL), 0.1842, atol=5e-5)
    close(metrics.nsd(FAAL, ddof=1), 0.1941, atol=5e-5)


@pytest.mark.parametrize(
    ("worst", "printed"),
    [
        pytest.param((28.1, 21.6, 19.7, 16.9), (85.15, 80.60, 80.74, 72.53), id="ARD"),
        pytest.param((27.9, 21.9, 21.2, 18.6), (84.55, 81.72, 86.89, 79.83), id="IAD"),
        pytest.param((29.8, 23.8, 22.6, 20.9), (90.30, 88.81, 92.62, 89.70), id="RSLAD"),
    ],
)
def test_inheritance_of_the_cat_class_in_fair_ard(worst, printed):
    """Table 2's worst class over the teacher's cat, under four attacks, is Table 1's cat column."""
    teacher = acc(33.0, 26.8, 24.4, 23.3) / 100
    ratio = metrics.inheritance_ratio(acc(*worst) / 100, teacher)
    close(ratio * 100, printed, atol=0.005 + 1e-9)


def test_inheritance_without_a_denominator():
    student, teacher = acc(0.2, 0.0, nan, 0.5), acc(0.0, 0.0, 0.5, nan)
    close(metrics.inheritance_ratio(student, teacher), [math.inf, nan, nan, nan])


def test_confusion_matrix_rows_are_true():
    counts = metrics.confusion_matrix(torch.tensor([2, 2, 0, 1]), torch.tensor([0, 0, 0, 1]), 4)
    expected = torch.tensor([[1, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert counts.dtype == torch.int64
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("num_classes", [2, 5, 12])
def test_confusion_matrix_agrees_with_sklearn(num_classes):
    rng = np.random.default_rng(num_classes)
    targets, predictions = rng.integers(0, num_classes, (2, 60))
    expected = sklearn_confusion_matrix(targets, predictions, labels=range(num_classes))
    counts = metrics.confusion_matrix(
        torch.from_numpy(predictions), torch.from_numpy(targets), num_classes
    )
    assert (counts.numpy() == expected).all()
    present = expected.sum(axis=1) > 0
    by_class = metrics.class_accuracy(counts).numpy()
    np.testing.assert_allclose(by_class[present], (expected.diagonal() / expected.sum(1))[present])


def test_confusion_matrices_of_batches_add_up():
    targets, predictions = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 2, 1, 2, 0])
    parts = [
        metrics.confusion_matrix(predictions[s], targets[s], 3) for s in (slice(2), slice(2, 5))
    ]
    whole = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 0, 1]])
    assert torch.equal(parts[0] + parts[1], whole)


def test_confusion_matrix_of_nothing():
    empty = torch.empty(0, dtype=torch.int64)
    counts = metrics.confusion_matrix(empty, empty, 3)
    assert torch.equal(counts, torch.zeros(3, 3, dtype=torch.int64))
    close(metrics.class_accuracy(counts), [nan, nan, nan])


def test_class_accuracy():
    counts = torch.tensor([[3, 1, 0], [0, 0, 0], [1, 1, 2]])
    close(metrics.class_accuracy(counts), [0.75, nan, 0.5])


def test_absent_classes_are_ignored():
    a = acc(0.2, nan, 0.6, nan)
    close(metrics.average(a), 0.4)
    close(metrics.worst_class(a), 0.2)
    close(metrics.worst_fraction(a, 0.5), 0.2)
    close(metrics.worst_fraction(a, 0.51), 0.4)
    close(metrics.nsd(a), 0.2 / 0.4)
    close(metrics.nsd(a, ddof=1), math.sqrt(0.08) / 0.4)


@pytest.mark.parametrize("metric", SCALARS)
def test_no_class_present_is_nan(metric):
    close(metric(acc(nan, nan)), nan)


@pytest.mark.parametrize("metric", SCALARS)
def test_scalars_are_float64_whatever_comes(metric):
    result = metric(acc(0.25, 0.75, dtype=torch.float32))
    assert result.dtype == torch.float64
    assert result.shape == ()


def test_average_is_macro():
    counts = torch.tensor([[90, 10], [1, 1]])
    close(metrics.average(metrics.class_accuracy(counts)), 0.7)


@pytest.mark.parametrize(
    ("classes", "fraction", "count"),
    [(100, 0.1, 10), (200, 0.1, 20), (100, 0.07, 7), (11, 0.1, 2), (10, 1e-9, 1), (10, 1.0, 10)],
)
def test_worst_fraction_takes_the_ceiling_but_no_rounding_error(classes, fraction, count):
    """0.07 * 100 is 7.000000000000001 in floating point, and is 7 classes all the same."""
    a = torch.arange(classes, dtype=torch.float64).flip(0) / classes
    close(metrics.worst_fraction(a, fraction), (count - 1) / 2 / classes)


def test_nsd_edges():
    close(metrics.nsd(acc(0.4, 0.4, 0.4)), 0.0)
    close(metrics.nsd(acc(0.0, 0.0)), nan)
    close(metrics.nsd(acc(0.4, nan), ddof=1), nan)
    close(metrics.nsd(acc(0.4, nan), ddof=2), nan)


def test_target_entropy():
    counts = torch.tensor([[7, 2, 2, 0], [1, 0, 1, 1], [0, 0, 5, 4], [0, 0, 0, 8]])
    close(metrics.target_entropy(counts), [math.log(2) / math.log(3), 1.0, 0.0, nan])


def test_target_entropy_leaves_its_argument_alone_and_needs_three_classes():
    counts = torch.tensor([[3, 2], [0, 4]])
    close(metrics.target_entropy(counts), [nan, nan])
    assert torch.equal(counts, torch.tensor([[3, 2], [0, 4]]))


def test_counts_may_be_so_large_that_their_sum_leaves_int64():
    most = 2**62
    counts = torch.tensor([[most, most, most], [0, most, 0], [0, 0, 0]])
    close(metrics.class_accuracy(counts), [1 / 3, 1, nan])


FIGURES = {
    "average": metrics.average,
    "worst_class": metrics.worst_class,
    "worst_fraction": lambda a: metrics.worst_fraction(a, 0.3),
    "nsd": metrics.nsd,
    "nsd, ddof 1": lambda a: metrics.nsd(a, ddof=1),
    "inheritance_ratio": lambda a: metrics.inheritance_ratio(a, a.flip(-1)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_many_are_those_of_each(name):
    a = torch.rand(4, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = a.masked_fill(torch.rand(4, 3, 7, generator=torch.Generator().manual_seed(1)) < 0.3, nan)
    a[0, 0] = nan
    found = FIGURES[name](a)
    each = torch.stack([FIGURES[name](row) for row in a.flatten(0, 1)])
    assert found.shape[:2] == (4, 3)
    close(found.flatten(0, 1), each)


def test_matrices_of_many_are_those_of_each():
    counts = torch.randint(9, (2, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    counts[0, 1, 2] = 0
    before = counts.clone()
    for figure in (metrics.class_accuracy, metrics.target_entropy):
        each = torch.stack([figure(matrix) for matrix in counts.flatten(0, 1)])
        close(figure(counts).flatten(0, 1), each)
    assert torch.equal(counts, before)


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        (lambda: metrics.average(acc(53.7, 66.5)), ValueError, "`acc` .* divide percentages"),
        # Rounded as it is printed otherwise, it would be inside.
        (lambda: metrics.average(acc(1 + 1e-12, 0.5)), ValueError, r"got 1\.000000000001$"),
        (lambda: metrics.worst_class(acc(0.5)), ValueError, "`acc` of shape .* K >= 2"),
        (lambda: metrics.nsd(acc(0.1, math.inf)), ValueError, "finite `acc`"),
        (lambda: metrics.inheritance_ratio(FAAL, FAAL[None]), ValueError, "equal shape"),
        (
            lambda: metrics.confusion_matrix(torch.rand(2, 3), torch.tensor([0, 1]), 3),
            TypeError,
            r"argmax\(1\)",
        ),
    ],
)
def test_errors_say_what_to_do(call, error, part):
    with pytest.raises(error, match=part):
        call()
