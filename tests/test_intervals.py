"""Intervals and paired tests against scipy, numbers worked out by hand, and the coverage they promise."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from ferdlib import metrics
from ferdlib.stats import (
    average_interval,
    draws,
    holm,
    mcnemar,
    nsd_interval,
    paired_permutation,
    simultaneous_interval,
    wilson_interval,
    worst_class_interval,
    worst_fraction_interval,
)

nan = math.nan
FIGURES = {
    "worst class": (metrics.worst_class, worst_class_interval),
    "worst 10 %": (metrics.worst_fraction, worst_fraction_interval),
    "average": (metrics.average, average_interval),
    "NSD": (metrics.nsd, nsd_interval),
}
INTERVALS = {f.__name__: f for _, f in FIGURES.values()}
BOOTSTRAPS = {f.__name__: f for f in (average_interval, nsd_interval)}
every_interval = pytest.mark.parametrize("name", INTERVALS)
every_figure = pytest.mark.parametrize(
    "figure", ["average", "worst_class", "worst_fraction", "nsd"]
)


def ints(*values):
    return torch.tensor(values)


def close(actual, expected, atol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)


def worlds(classes):
    """True class accuracies to measure coverage with."""
    # PGD-20 accuracy of each CIFAR-10 class in FAAL's training log.
    faal = [0.537, 0.665, 0.363, 0.458, 0.439, 0.395, 0.416, 0.468, 0.581, 0.561]
    grid = (np.arange(classes) + 0.5) / classes
    one_bad = np.full(classes, 0.6)
    one_bad[0] = 0.2
    found = {
        "FAAL": np.tile(faal, classes // 10),
        "Beta(2, 3)": stats.beta.ppf(grid, 2, 3),
        "Beta(10, 10)": stats.beta.ppf(grid, 10, 10),
        "all 0.5": np.full(classes, 0.5),
        "one bad": one_bad,
        "0.42 to 0.58": np.linspace(0.42, 0.58, classes),
        "all 0.98": np.full(classes, 0.98),
    }
    return {name: torch.from_numpy(truth) for name, truth in found.items()}


def measure(truth, n, repeats, *, figures=tuple(FIGURES), draws=1000, seed=0):
    """Of each figure: coverage, share of intervals above the truth, mean width, and that over the
    width of the Wilson interval of the class that came out worst."""
    totals = torch.full((len(truth),), n)
    rng = torch.Generator().manual_seed(seed)
    true = torch.stack([FIGURES[f][0](truth) for f in figures])[:, None]
    limits = torch.empty(repeats, len(figures), 2, dtype=torch.float64)
    wilson = torch.empty(repeats, dtype=torch.float64)
    for r in range(repeats):
        correct = torch.binomial(totals.double(), truth, generator=rng).long()
        for k, f in enumerate(figures):
            bootstrap = {"draws": draws, "seed": r} if f in ("average", "NSD") else {}
            limits[r, k] = FIGURES[f][1](correct, totals, **bootstrap)
        low, high = wilson_interval(correct.min()[None], totals[:1])[0]
        wilson[r] = high - low
    # Up to rounding, which matters where all classes are equal.
    above, below = limits[..., :1] > true + 1e-9, limits[..., 1:] < true - 1e-9
    width = (limits[..., 1] - limits[..., 0]).mean(dim=0)
    rows = zip(
        1 - (above | below).double().mean(dim=(0, 2)),
        above.double().mean(dim=(0, 2)),
        width,
        width / wilson.mean(),
        strict=True,
    )
    return {f: tuple(map(float, row)) for f, row in zip(figures, rows, strict=True)}


def wilson_coverage(n, p):
    """Exact coverage at each true accuracy, by summing over all outcomes."""
    x = torch.arange(n + 1)
    low, high = wilson_interval(x, torch.full_like(x, n)).numpy().T[:, :, None]
    return (stats.binom.pmf(x.numpy()[:, None], n, p) * ((low <= p) & (p <= high))).sum(axis=0)


def clopper_pearson(x, n, tail):
    low, high = stats.beta.ppf(tail, x, n - x + 1), stats.beta.ppf(1 - tail, x + 1, n - x)
    return torch.from_numpy(np.stack([np.where(x == 0, 0, low), np.where(x == n, 1, high)], axis=1))


def test_wilson_by_hand():
    z2 = 3.841458820694124  # the 95 % point of chi squared with one degree of freedom
    close(wilson_interval(ints(0, 4), ints(4, 4)), [[0, z2 / (4 + z2)], [4 / (4 + z2), 1]])


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_agrees_with_scipy(confidence):
    counts = [(x, n) for n in (1, 2, 54, 1000, 50_000) for x in {0, 1, n // 3, n - 1, n}]
    x, n = torch.tensor(counts).T
    tests = [stats.binomtest(*c).proportion_ci(confidence, method="wilson") for c in counts]
    close(wilson_interval(x, n, confidence=confidence), [[t.low, t.high] for t in tests])


@pytest.mark.parametrize(
    ("n", "least", "most"), [(54, 0.927, 0.980), (100, 0.926, 0.979), (1000, 0.939, 0.961)]
)
def test_exact_coverage_of_wilson(n, least, most):
    """Between 93 and 98 % but for slivers of p, and close to 95 % on average over neighbouring p."""
    p = np.linspace(0.02, 0.98, 4801)
    coverage = wilson_coverage(n, p)
    assert least <= coverage.min()
    assert coverage.max() <= most
    assert ((coverage >= 0.93) & (coverage <= 0.98)).mean() > 0.997
    assert coverage.mean() == pytest.approx(0.951, abs=0.0015)
    windows = np.convolve(coverage, np.full(100, 0.01), "valid")  # 0.02 wide
    assert windows.min() > 0.946
    assert windows.max() < 0.966


@pytest.mark.parametrize("n", [1, 2, 54, 1000, 10_000, 50_000])
def test_simultaneous_agrees_with_scipy(n):
    x = np.unique(np.r_[0, 1, 2, np.linspace(0, n, 11).astype(int), n - 1, n].clip(0, n))
    found = simultaneous_interval(torch.from_numpy(x), torch.full((len(x),), n))
    close(found, clopper_pearson(x, n, (1 - 0.95 ** (1 / len(x))) / 2))


def test_simultaneous_with_unequal_totals_and_an_absent_class():
    x, n = np.array([3, 0, 700, 40_000]), np.array([5, 0, 1000, 40_001])
    found = simultaneous_interval(torch.from_numpy(x), torch.from_numpy(n), confidence=0.8)
    close(found[1], [nan, nan])
    kept = n > 0
    close(found[kept], clopper_pearson(x[kept], n[kept], (1 - 0.8 ** (1 / 3)) / 2))


def test_simultaneous_by_hand():
    """All of n right: P(X = n) = L^n is the tail, for any n."""
    tail = (1 - math.sqrt(0.95)) / 2
    expected = [[tail ** (1 / 7), 1], [0, 1 - tail ** (1 / 30)]]
    close(simultaneous_interval(ints(7, 0), ints(7, 30)), expected)


def test_worst_class_takes_the_least_of_both_limits():
    """The least upper limit need not be that of the class with the least accuracy."""
    x, n = ints(1, 400, 0, 900), ints(4, 1000, 0, 1000)
    limits = simultaneous_interval(x, n)
    assert limits[0, 0] < limits[1, 0] < limits[1, 1] < limits[0, 1]
    close(worst_class_interval(x, n), [limits[0, 0], limits[1, 1]])


def test_worst_fraction_averages_the_least_limits():
    x, n = ints(30, 10, 20, 40, 0), ints(50, 50, 50, 50, 0)
    limits = simultaneous_interval(x, n, confidence=0.9)
    expected = (limits[1] + limits[2]) / 2
    close(worst_fraction_interval(x, n, fraction=0.5, confidence=0.9), expected)
    close(worst_fraction_interval(x, n), worst_class_interval(x, n))


def test_average_is_close_to_the_normal_interval():
    x, n = ints(300, 500, 0, 700), ints(1000, 1000, 0, 1000)
    half = 1.96 * math.sqrt((0.21 + 0.25 + 0.21) / 1000) / 3
    close(average_interval(x, n), [0.5 - half, 0.5 + half], atol=1e-3)


@pytest.mark.parametrize("classes", [10, 300])
def test_classes_that_are_all_wrong_or_all_right_are_not_certain(classes):
    """Wilson's upper limit of 0 right in all samples together, z² / (N + z²), and its mirror image."""
    z2, n = 3.841458820694124, torch.full((classes,), 2)
    limit = z2 / (2 * classes + z2)
    close(average_interval(0 * n, n), [0, limit])
    close(average_interval(n, n), [1 - limit, 1])
    # Half of the classes each: half as far for their half of the mean, which has half of the samples.
    half = torch.where(torch.arange(classes) % 2 > 0, n, 0)
    far = z2 / (classes + z2) / 2
    close(average_interval(half, n), [0.5 - far, 0.5 + far])


def test_a_class_without_errors_widens_the_average_to_its_side_alone():
    """In quadrature: the class of 2 of 2 has Wilson's limit 2 / (2 + z²), and a third of the mean."""
    x, n = ints(300, 500), ints(1000, 1000)
    low, high = (average_interval(x, n) * 2 - 0.8) / 3
    far = 3.841458820694124 / (2 + 3.841458820694124) / 3
    found = average_interval(ints(300, 500, 2), ints(1000, 1000, 2)) - 0.6
    close(found, [-math.hypot(low, far), high], atol=1e-3)


def test_nsd_of_classes_without_spread_is_that_of_their_limits():
    """Both limits of two right in two are sqrt(tail) and 1: (1 - l) / (1 + l); unlike classes may be equal."""
    low = math.sqrt((1 - math.sqrt(0.95)) / 2)
    close(nsd_interval(ints(2, 2), ints(2, 2)), [0, (1 - low) / (1 + low)], atol=1e-7)
    close(nsd_interval(ints(2, 0), ints(2, 2)), [0, 1])
    close(nsd_interval(ints(2, 0, 0), ints(2, 0, 0)), [0, 0], atol=1e-7)
    least, most = nsd_interval(ints(1000, 0), ints(1000, 1000))
    # The nearest that they may come to each other is l and 1 - l, with l^1000 = tail.
    end = ((1 - math.sqrt(0.95)) / 2) ** (1 / 1000)
    close(torch.stack([least, most]), [2 * end - 1, 1])


@pytest.mark.parametrize("classes", [2, 10, 300])
def test_every_estimate_is_inside_its_interval(classes):
    """But the measured NSD, of which noise is a part, unless every class is all right or all wrong."""
    rng = torch.Generator().manual_seed(classes)
    for most in (1, 2, 5, 54, 2**62):
        n = torch.randint(1, most + 1, (classes,), generator=rng)
        for share in (0.0, 0.03, 0.5, 0.97, 1.0):
            x = torch.binomial(n.double(), torch.full((classes,), share).double(), generator=rng)
            x = x.long().minimum(n)
            acc = x.double() / n
            for value, interval in [
                (metrics.average(acc), average_interval(x, n, draws=200)),
                (metrics.worst_class(acc), worst_class_interval(x, n)),
                (metrics.worst_fraction(acc), worst_fraction_interval(x, n)),
                *[(metrics.nsd(acc), nsd_interval(x, n))] * bool(((x == 0) | (x == n)).all()),
                *zip(acc, wilson_interval(x, n), strict=True),
            ]:
                # Two ways to a mean may round differently.
                assert value.isnan() or interval[0] - 1e-15 <= value <= interval[1] + 1e-15
            assert share in (0, 1) or most == 2**62 or average_interval(x, n, draws=200).diff() > 0


def test_nsd_is_close_to_the_normal_interval_where_noise_is_small():
    """Two classes: NSD = |a - b| / (a + b), whose gradient is 2 (b, -a) / (a + b)^2."""
    n, a, b = 1_000_000, 0.6, 0.4
    half = 1.96 * 2 * math.sqrt(b**2 * a * (1 - a) + a**2 * b * (1 - b)) / math.sqrt(n)
    found = nsd_interval(ints(600_000, 0, 400_000), ints(n, 0, n))
    close(found, [0.2 - half, 0.2 + half], atol=1e-4)


def test_nsd_scales_with_ddof():
    x, n = ints(20, 30, 45, 0), ints(54, 60, 50, 0)
    close(nsd_interval(x, n, ddof=1), nsd_interval(x, n) * math.sqrt(3 / 2))
    close(nsd_interval(x, n, ddof=3), [nan, nan])


def test_nsd_of_equal_classes_reaches_zero_and_may_leave_out_the_measured_one():
    x, n = ints(20, 27, 34, 27, 27, 27, 27, 27, 27, 27), torch.full((10,), 54)
    low, high = nsd_interval(x, n)
    assert low == 0 < high
    few = torch.full((100,), 27)
    few[:50] += 3
    few[50:] -= 3
    assert nsd_interval(few, torch.full((100,), 54))[1] < metrics.nsd(few / 54)


def test_nsd_of_a_single_error_still_reaches_zero():
    """Nearly all resamples have an estimate of 0, as the data: no correction may move beyond it."""
    low, high = nsd_interval(ints(*[54] * 99, 53), torch.full((100,), 54))
    assert low == 0 < high


@pytest.mark.parametrize("ddof", [0, 1])
def test_nsd_agrees_with_a_second_implementation(ddof):
    """In numpy, with other draws. Without the correction of bias, the limits are 0.01 lower."""
    x, n = np.array([27, 36, 48]), np.array([54, 50, 60])
    scale = 3 / (3 - ddof)

    def variance(a):
        return np.maximum(0, a.var(axis=-1) - (a * (1 - a) / (n - 1)).sum(axis=-1) * 2 / 9)

    acc = x / n
    pulled = acc.mean() + np.sqrt(variance(acc) / acc.var()) * (acc - acc.mean())
    drawn = np.random.default_rng(0).binomial(n, pulled, (100_000, 3)) / n
    t, estimate = (np.sqrt(scale * variance(a)) / a.mean(axis=-1) for a in (drawn, acc))
    bias = stats.norm.ppf((t <= estimate).mean())
    expected = np.quantile(t, stats.norm.cdf(2 * bias + stats.norm.ppf([0.025, 0.975])))
    close(nsd_interval(*map(torch.from_numpy, (x, n)), ddof=ddof, draws=100_000), expected, 0.003)


@every_interval
def test_absent_classes_are_left_out(name):
    x, n = ints(20, 30, 45), ints(54, 60, 50)
    expected = INTERVALS[name](x, n)
    close(INTERVALS[name](ints(20, 0, 30, 45, 0), ints(54, 0, 60, 50, 0)), expected)
    assert expected.dtype == torch.float64
    assert expected[0] < expected[1]


@every_interval
def test_more_confidence_is_wider(name):
    x, n = ints(20, 30, 45), ints(54, 60, 50)
    some, more = (INTERVALS[name](x, n, confidence=c) for c in (0.8, 0.99))
    assert more[0] < some[0] < some[1] < more[1]


@every_interval
def test_nothing_to_see_is_nan(name):
    close(INTERVALS[name](ints(0, 0), ints(0, 0)), [nan, nan])


def test_nsd_without_a_success_and_with_single_samples():
    close(nsd_interval(ints(0, 0), ints(5, 5)), [nan, nan])
    low, high = nsd_interval(ints(1, 0, 1), ints(1, 2, 1))  # many resamples are without one
    assert 0 <= low <= high < math.inf


@pytest.mark.parametrize("name", BOOTSTRAPS)
def test_draws_repeat_and_leave_the_global_generator_alone(name):
    x, n = ints(20, 30, 45), ints(54, 60, 50)
    state = torch.get_rng_state()
    first, again, other = (BOOTSTRAPS[name](x, n, draws=50, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("n", [54, 1000])
@pytest.mark.parametrize("world", worlds(10))
def test_worst_class_and_worst_fraction_cover(world, n):
    measured = measure(worlds(10)[world], n, 80, figures=("worst class", "worst 10 %"))
    assert all(coverage >= 0.95 for coverage, *_ in measured.values())


@pytest.mark.parametrize("world", ["FAAL", "all 0.5", "one bad"])
def test_worst_class_and_worst_fraction_cover_among_a_hundred_classes(world):
    measured = measure(worlds(100)[world], 100, 40, figures=("worst class", "worst 10 %"))
    assert all(coverage >= 0.95 for coverage, *_ in measured.values())


# In 600 repetitions, 1.8 percentage points are two standard errors of the coverage.
@pytest.mark.parametrize(
    ("world", "average", "nsd"),
    [
        ("FAAL", (0.93, 0.965), (0.925, 0.96)),
        ("Beta(2, 3)", (0.93, 0.965), (0.925, 0.96)),
        ("Beta(10, 10)", (0.93, 0.965), (0.92, 0.96)),
        ("one bad", (0.93, 0.965), (0.94, 0.98)),
        ("all 0.5", (0.93, 0.965), (0.975, 1)),
        ("0.42 to 0.58", (0.93, 0.965), (0.96, 1)),  # where noise is about as large
        ("all 0.98", (0.94, 0.985), (0.975, 1)),
    ],
)
def test_average_and_nsd_cover(world, average, nsd):
    measured = measure(worlds(10)[world], 54, 600, figures=("average", "NSD"), draws=500)
    assert average[0] <= measured["average"][0] <= average[1]
    assert nsd[0] <= measured["NSD"][0] <= nsd[1]


@pytest.mark.parametrize("world", ["FAAL", "one bad", "all 0.5"])
def test_the_normal_limit_of_many_classes_is_the_bootstrap(world, monkeypatch):
    """Limits of 10,000 draws; classes of different sizes, and a few absent."""
    rng = torch.Generator().manual_seed(0)
    totals = torch.randint(5, 40, (300,), generator=rng)
    totals[:5] = 0
    truth = worlds(300)[world]
    counts = torch.binomial(totals.double(), truth, generator=rng).long(), totals
    fast = average_interval(*counts), nsd_interval(*counts)
    monkeypatch.setattr(draws, "MANY_CLASSES", 300)
    slow = average_interval(*counts), nsd_interval(*counts)
    for one, two in zip(fast, slow, strict=True):
        width = float(two[1] - two[0])
        assert not torch.equal(one, two)
        close(one, two, atol=0.06 * width)


def test_average_and_nsd_cover_among_a_thousand_classes():
    measured = measure(worlds(1000)["FAAL"], 10, 400, figures=("average", "NSD"), draws=500)
    assert 0.92 <= measured["average"][0] <= 0.975
    assert 0.92 <= measured["NSD"][0] <= 0.975


def test_plain_percentiles_do_not_cover():
    """The reason for the other constructions: without them the truth is below the whole interval."""
    truth, n = worlds(10)["all 0.5"], 54
    rng = torch.Generator().manual_seed(0)
    acc = torch.binomial(torch.full((200, 10), 54.0).double(), truth.expand(200, 10), generator=rng)
    acc = (acc / n).expand(500, 200, 10)
    resampled = torch.binomial(torch.full_like(acc, n), acc, generator=rng) / n
    low_nsd = (resampled.std(dim=2, correction=0) / resampled.mean(dim=2)).quantile(0.025, dim=0)
    high_worst = resampled.amin(dim=2).quantile(0.975, dim=0)
    assert (low_nsd > 0).all()
    assert (high_worst < 0.5).double().mean() > 0.5


@pytest.mark.parametrize("scale", [1, 40, 1000])
def test_mcnemar_agrees_with_scipy(scale):
    counts = [(scale * b, scale * c) for b, c in product(range(6), repeat=2) if b + c]
    expected = [stats.binomtest(b, b + c, 0.5).pvalue for b, c in counts]
    found = mcnemar(*torch.tensor(counts).T)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=0)


def test_mcnemar_by_hand():
    close(mcnemar(ints(0, 5, 0, 2), ints(0, 0, 1, 2)), [1, 2 / 32, 1, 1])


def test_holm_by_hand():
    p = torch.tensor([0.01, nan, 0.02, 0.9, 0.022, 0.6], dtype=torch.float64)
    close(holm(p), [0.05, nan, 0.08, 1, 0.08, 1])
    close(holm(torch.tensor([0.3])), [0.3], atol=1e-7)
    assert holm(torch.empty(0)).shape == (0,)


def test_holm_keeps_the_order_of_the_tests():
    p = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    adjusted = holm(p)
    close(holm(p[order]), adjusted[order])
    assert (adjusted >= p).all()
    assert adjusted[p.argmin()] == min(1, 50 * p.min())


def two_models(n=400, classes=12, seed=0, better=0.0):
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randint(classes - 1, (n,), generator=rng)  # the last class is absent
    chance = 0.3 + 0.4 * rows / classes
    a, b = torch.rand(2, n, generator=rng)
    return a < chance + better, b < chance, rows, classes


@every_figure
def test_the_difference_is_that_of_the_metric(figure):
    a, b, rows, classes = two_models()
    by_class = [torch.stack([m[rows == k].double().mean() for k in range(classes)]) for m in (a, b)]
    f = getattr(metrics, figure)
    expected = float(f(by_class[0]) - f(by_class[1]))
    difference, p = paired_permutation(a, b, rows, classes, figure=figure, draws=100)
    assert difference == pytest.approx(expected, abs=1e-12)
    assert 0 < p <= 1
    swapped = paired_permutation(b, a, rows, classes, figure=figure, draws=100)
    assert swapped[0] == pytest.approx(-expected, abs=1e-12)


@every_figure
def test_permutation_agrees_with_exchanging_every_subset(figure):
    """Eight discordant samples have 2^8 exchanges, which the draws sample."""
    a = ints(1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0).bool()
    b = ints(0, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0).bool()
    rows = ints(0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2)
    swap = torch.tensor(list(product([False, True], repeat=12)))
    swap = swap[(swap <= (a != b)).all(dim=1)]

    def value(outcomes):
        by_class = torch.stack([outcomes[:, rows == k].double().mean(dim=1) for k in range(3)], 1)
        return torch.stack([getattr(metrics, figure)(row) for row in by_class])

    all_t = value(torch.where(swap, b, a)) - value(torch.where(swap, a, b))
    assert len(all_t) == 2**8
    observed = all_t[0].abs()
    exact = float((all_t.abs() >= observed - 1e-12).double().mean())
    difference, p = paired_permutation(a, b, rows, 3, figure=figure)
    assert abs(difference) == pytest.approx(float(observed), abs=1e-12)
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000) + 1e-4)


@every_figure
def test_permutation_keeps_its_level(figure):
    p = [paired_permutation(*two_models(seed=s), figure=figure, draws=99)[1] for s in range(300)]
    assert np.mean(np.array(p) <= 0.1) <= 0.1 + 2 * math.sqrt(0.09 / 300)


def test_permutation_finds_a_difference_and_none():
    a, b, rows, classes = two_models(better=0.3)
    difference, p = paired_permutation(a, b, rows, classes, figure="average")
    assert difference > 0.2
    assert p == 1 / 10_001
    assert paired_permutation(a, a, rows, classes, figure="nsd", draws=9) == (0, 1)


def test_permutation_without_figures_is_nan():
    nothing, rows = torch.zeros(4, dtype=torch.bool), ints(0, 0, 1, 1)
    nothing_to_share = paired_permutation(nothing, nothing, rows, 2, figure="nsd")
    assert all(map(math.isnan, nothing_to_share))
    no_samples = paired_permutation(nothing[:0], nothing[:0], rows[:0], 2, figure="average")
    assert all(map(math.isnan, no_samples))


def test_permutations_repeat_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (
        paired_permutation(*two_models(), figure="average", draws=500, seed=seed)
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again != other


def test_counts_and_percentages_are_not_confused():
    x, n = ints(1, 2), ints(3, 4)
    for interval in (wilson_interval, simultaneous_interval, *INTERVALS.values()):
        with pytest.raises(ValueError, match=f"^{interval.__name__}: .*; 95 % is 0.95$"):
            interval(x, n, confidence=95)
        with pytest.raises(ValueError, match="no larger than `totals`, got 3 of 1 in class 0"):
            interval(n, x)
        with pytest.raises(TypeError, match=f"^{interval.__name__}: expected `totals` in int64"):
            interval(x, n.double())
