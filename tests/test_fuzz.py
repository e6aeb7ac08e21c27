"""Random input: what holds of the projection, of every weight rule, metric and report, whatever comes."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.metrics import recall_score
from torch.utils.data import Subset, TensorDataset

from ferdlib import attacks, metrics, reweight
from ferdlib.evaluation import AttackSpec, Protocol, RobustnessReport, evaluate, merge

# The same examples every time, and none kept on disk.
fuzz = settings(max_examples=50, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31 - 1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def ascents(draw):
    """Images in some bounds, and a ball, a start and steps of any size and shape for each."""
    n, rng = draw(st.integers(1, 3)), seeded(draw(seeds))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    low, high = draw(st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.25, 0.5), (-3.0, 100.0)]))
    x = low + (high - low) * torch.rand(n, 1, 2, 3, generator=rng, dtype=torch.float64)
    x = x.where(torch.rand(x.shape, generator=rng) < 0.8, draw(st.sampled_from([low, high])))

    def lengths():
        """A number, or one for each image; 0 among them."""
        if draw(st.booleans()):
            return draw(st.sampled_from([0.0, 1e-6, 8 / 255, 0.3, 5.0]))
        each = torch.rand(n, generator=rng, dtype=torch.float64)
        return (each * (torch.rand(n, generator=rng) < 0.7)).to(dtype)

    tensor = (6 * torch.rand(x.shape, generator=rng) - 3).to(dtype)
    arguments = {
        "eps": lengths(),
        "step_size": lengths(),
        "random_start": draw(st.sampled_from(["uniform", "normal", None, tensor])),
        "bounds": (low, high),
        "rng": rng,
    }
    return x.to(dtype).clamp(low, high), arguments


def linear_model(pixels, classes, seed):
    weight = torch.randn(pixels, classes, generator=seeded(seed), dtype=torch.float64)
    return lambda x: x.flatten(1).double() @ weight


def check_ball(x_adv, x, eps, bounds):
    assert (x_adv.dtype, x_adv.shape) == (x.dtype, x.shape)
    assert (x_adv >= bounds[0]).all()
    assert (x_adv <= bounds[1]).all()
    radius = torch.as_tensor(eps, dtype=torch.float64).reshape(-1, 1, 1, 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    # Where it is iterated, x + offset is rounded once; a narrower dtype is rounded towards x.
    rounded = radius + (x.double().abs() if x.dtype == wide else 0)
    rounding = torch.finfo(wide).eps * rounded
    assert ((x_adv.double() - x.double()).abs() <= radius + rounding).all()
    still = (radius == 0).expand_as(x)
    assert torch.equal(x_adv[still], x[still])


@fuzz
@given(ascents(), st.integers(1, 3), seeds)
def test_pgd_stays_in_ball_and_bounds(ascent, steps, seed):
    x, arguments = ascent
    y = torch.randint(3, (len(x),), generator=seeded(seed))
    x_adv = attacks.pgd(linear_model(6, 3, seed), x, y, steps=steps, **arguments)
    check_ball(x_adv, x, arguments["eps"], arguments["bounds"])


@fuzz
@given(ascents())
def test_no_step_returns_the_projected_start(ascent):
    x, arguments = ascent
    y = torch.zeros(len(x), dtype=torch.int64)
    start, eps = arguments["random_start"], arguments["eps"]
    x_adv = attacks.pgd(pytest.fail, x, y, steps=0, **arguments)
    check_ball(x_adv, x, eps, arguments["bounds"])
    if start is None:
        assert torch.equal(x_adv, x)
    elif isinstance(start, torch.Tensor):
        radius = torch.as_tensor(eps, dtype=torch.float64).reshape(-1, 1, 1, 1)
        offset = torch.minimum(torch.maximum(start.double(), -radius), radius)
        expected = (x.double() + offset).clamp(*arguments["bounds"])
        torch.testing.assert_close(x_adv, expected.to(x.dtype))


def statistics(low, high, *, absent=True):
    """Float64 `(K,)` in [low, high], of which some are nan."""
    present = st.floats(low, high, allow_subnormal=False)
    entry = present | st.just(math.nan) if absent else present
    return st.lists(entry, min_size=2, max_size=8).map(
        lambda entries: torch.tensor(entries, dtype=torch.float64)
    )


def close(a, b, rtol=1e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-9, equal_nan=True)


# Each rule with the sum of its weights (None: any) and the sign of their change with the statistic.
RULES = {
    "margin_softmax": (lambda m: reweight.margin_softmax(m, floor=0.1 / len(m)), (-30, 30), 1, -1),
    "margin_minmax": (lambda m: reweight.margin_minmax(m, low=0.1, high=0.7), (-30, 30), 1, -1),
    "lps_power": (reweight.lps_power, (0.1, 20), "K", -1),
    "lps_linear": (lambda k: reweight.lps_linear(k, 10), (0, 10), "K", -1),
    "lps_sigmoid": (lambda k: reweight.lps_sigmoid(k, 10), (0, 10), "K", -1),
    "lps_tanh": (lambda k: reweight.lps_tanh(k, 10, shift=-1.0), (0, 10), "K", -1),
    "gairat": (lambda k: reweight.gairat(k.nan_to_num(nan=5), 10), (0, 10), "K", -1),
    "cfa_margins": (reweight.cfa_margins, (0, 1), None, 1),
    "cfa_mixing": (lambda r: reweight.cfa_mixing(r, beta=6.0), (0, 1), None, 1),
    "kl_ball": (reweight.kl_ball, (-1, 1), 1, 1),
}


@pytest.mark.parametrize("name", RULES)
@fuzz
@given(st.data())
def test_rules_give_every_class_its_share(name, data):
    """Finite weights >= 0 with their sum, monotone in the statistic, whatever the order of the classes."""
    rule, limits, total, direction = RULES[name]
    statistic = data.draw(statistics(*limits))
    w = rule(statistic)
    assert (w.shape, w.dtype) == (statistic.shape, statistic.dtype)
    assert w.isfinite().all()
    assert (w >= 0).all()
    if total is not None:
        assert w.sum().item() == pytest.approx(len(w) if total == "K" else total, rel=1e-9)
    order = torch.randperm(len(w), generator=seeded(len(w)))
    close(rule(statistic[order]), w[order])
    present = ~statistic.isnan()
    sorted_w = w[present][statistic[present].argsort(stable=True)]
    assert (direction * sorted_w.diff() >= -1e-9).all()
    if name.startswith("lps"):
        assert (w[~present] == 1).all()


# Rules that know differences alone; min-max and the ball do not even know their scale.
@pytest.mark.parametrize("name", ["margin_softmax", "margin_minmax", "kl_ball"])
@fuzz
@given(statistics(-1, 1), st.floats(-5, 5), st.floats(0.1, 10))
def test_what_is_added_to_all_margins_changes_nothing(name, m, shift, scale):
    present = m[~m.isnan()]
    # Where the margins hardly differ, what they are shifted by decides how much of it is left.
    assume(not len(present) or not 0 < present.max() - present.min() < 1e-3)
    rule = RULES[name][0]
    close(rule((1.0 if name == "margin_softmax" else scale) * m + shift), rule(m))


def kl_from_uniform(p):
    return float(-(len(p) * p).log().mean())


@fuzz
@given(statistics(-1, 1, absent=False), st.floats(1e-3, 3), seeds)
def test_kl_ball_is_the_worst_case_of_its_ball(scores, radius, seed):
    assume(scores.max() - scores.min() > 1e-3)
    p = reweight.kl_ball(scores, radius=radius)
    assert kl_from_uniform(p) == pytest.approx(radius, rel=1e-6)
    other = torch.rand(len(p), generator=seeded(seed), dtype=torch.float64).clamp(min=1e-6)
    shares = torch.linspace(0, 1, 11, dtype=torch.float64)[:, None]
    mixed = (1 - shares) / len(p) + shares * other / other.sum()
    inside = [q for q in mixed if kl_from_uniform(q) <= radius]
    assert inside
    assert all((p * scores).sum() >= (q * scores).sum() - 1e-9 for q in inside)


@fuzz
@given(st.integers(2, 6), st.floats(0.01, 0.99), seeds)
def test_confusion_weights_up_to_the_strength_that_leaves_a_class_none(k, share, seed):
    rng = seeded(seed)
    p = (3 * torch.randn(k, k, generator=rng, dtype=torch.float64)).softmax(dim=1)
    p = torch.where(torch.rand(k, 1, generator=rng) < 0.2, math.nan, p)
    change = (reweight.confusion_weights(p, strength=1e-3) - 1) / 1e-3
    assume(change.min() < -1e-3)
    limit = float(-1 / change.min())
    w = reweight.confusion_weights(p, strength=share * limit)
    close(w, 1 + share * limit * change)
    assert (w > 0).all()
    assert w.mean().item() == pytest.approx(1)
    assert (w[p.isnan().all(dim=1)] == 1).all()
    with pytest.raises(ValueError, match="`strength` below"):
        reweight.confusion_weights(p, strength=limit * (1 + share))


@fuzz
@given(st.integers(2, 5), st.sampled_from([0.0, 1e-3, 0.1, 1.0]), st.floats(0, 1), seeds)
def test_weights_that_accumulate_stay_within_their_limits(k, rate, limit, seed):
    rng = seeded(seed)
    frl, hedge = reweight.FRLWeights(k, rate=rate, limit=limit), reweight.HedgeWeights(k, rate=rate)
    for _ in range(4):
        clean, robust = torch.rand(2, k, generator=rng, dtype=torch.float64)
        frl.update(clean, clean * robust)
        hedge.update(clean, float(clean.mean()))
        for w in (frl.clean_weights, frl.boundary_weights):
            assert (w >= 1 - limit - 1e-9).all()
            assert w.mean().item() == pytest.approx(1)
        assert (hedge.class_weights >= 0).all()
        assert hedge.class_weights.sum().item() + hedge.average_weight == pytest.approx(k)


@st.composite
def judged(draw):
    """Labels and predictions of some of K classes."""
    k, n = draw(st.integers(2, 7)), draw(st.integers(1, 40))
    classes = draw(st.lists(st.integers(0, k - 1), min_size=1, max_size=k, unique=True))
    targets = draw(st.lists(st.sampled_from(classes), min_size=n, max_size=n))
    predictions = draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n))
    return k, np.array(targets), np.array(predictions)


@fuzz
@given(judged(), st.floats(0.05, 1))
def test_metrics_are_those_of_numpy_and_scikit_learn(case, fraction):
    k, targets, predictions = case
    confusion = metrics.confusion_matrix(torch.tensor(predictions), torch.tensor(targets), k)
    every = list(range(k))
    np.testing.assert_array_equal(
        confusion, sklearn_confusion_matrix(targets, predictions, labels=every)
    )
    acc = metrics.class_accuracy(confusion)
    present = np.isin(every, targets)
    recall = recall_score(targets, predictions, labels=every, average=None, zero_division=0.0)
    expected = np.where(present, recall, np.nan)
    np.testing.assert_allclose(acc, expected)
    np.testing.assert_allclose(metrics.average(acc), np.nanmean(expected))
    np.testing.assert_allclose(metrics.worst_class(acc), np.nanmin(expected))
    worst = np.sort(expected[present])[: math.ceil(fraction * present.sum() - 1e-9)]
    np.testing.assert_allclose(metrics.worst_fraction(acc, fraction), worst.mean())
    if np.nanmean(expected) > 0:
        spread = np.nanstd(expected) / np.nanmean(expected)
        np.testing.assert_allclose(metrics.nsd(acc), spread, atol=1e-12)
    else:
        assert metrics.nsd(acc).isnan()
    errors = confusion.numpy() * (1 - np.eye(k))
    wrong = errors.sum(axis=1) > 0
    found = metrics.target_entropy(confusion).numpy()
    assert np.isnan(found[~wrong]).all()
    if k > 2:
        np.testing.assert_allclose(found[wrong], entropy(errors[wrong], axis=1) / math.log(k - 1))


@st.composite
def evaluations(draw):
    """A linear model, images, and a protocol of a few attacks with any settings."""
    k, n, seed = draw(st.integers(2, 4)), draw(st.integers(1, 8)), draw(seeds)
    x = torch.rand(n, 1, 2, 2, generator=seeded(seed))
    model = linear_model(4, k, seed)
    noise = torch.rand(x.shape, generator=seeded(seed + 1)) - 0.5
    y = model(x + 0.2 * noise).argmax(dim=1)  # mostly right, and often a matter of the noise
    specs = [
        AttackSpec(
            name=f"{kind} {i}",
            kind=kind,
            eps=draw(st.sampled_from([0.5, 0.1, 0.0])),
            step_size=draw(st.sampled_from([0.01, 0.1])),
            steps=draw(st.integers(1, 2)),
            start=draw(st.sampled_from(["uniform", "normal", None])),
            restarts=draw(st.integers(1, 2)),
            judge=draw(st.sampled_from(["last", "any"])),
        )
        for i, kind in enumerate(
            draw(st.lists(st.sampled_from(["pgd", "cw"]), min_size=1, max_size=2))
        )
    ]
    protocol = Protocol(name=draw(st.sampled_from(["a", "β, |"])), attacks=tuple(specs), seed=seed)
    shared = {"protocol": protocol, "num_classes": k, "batch_size": draw(st.integers(1, 8))}
    if draw(st.booleans()):
        shared["groups"] = torch.arange(n + 1) % 2  # of samples and one more, so that there are two
    if draw(st.booleans()):
        shared["class_names"] = [f'"{c}", {c}' for c in range(k)]
    return model, TensorDataset(x, y), shared


@settings(fuzz, max_examples=25)
@given(evaluations(), st.integers(1, 3), seeds)
def test_shards_put_together_are_the_whole_and_so_is_its_file(evaluation, count, seed):
    model, data, shared = evaluation
    assume(len(data) >= count)
    whole = evaluate(model, data, **shared)
    order = torch.randperm(len(data), generator=seeded(seed)).tolist()
    parts = [evaluate(model, Subset(data, order[i::count]), **shared) for i in range(count)]
    assert merge(parts) == whole
    assert whole != replace(whole, index=whole.index + 1)
    with tempfile.TemporaryDirectory() as folder:
        whole.save(path := Path(folder, "report.json"))
        assert RobustnessReport.load(path) == whole
