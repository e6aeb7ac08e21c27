"""`evaluate` on models whose robustness is known in closed form, and however its work is cut."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import make_tiny_model
from scipy import stats
from torch import nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from ferdlib.evaluation import AttackSpec, Protocol, compare, evaluate, merge
from ferdlib.evaluation.samples import GAMMA, Samples, splitmix


def pixels(*values):
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def ints(*values):
    return torch.tensor(values)


def above(score, x):
    """Class 1 where the score is positive."""
    return torch.stack([torch.zeros_like(score(x)), score(x)], dim=1)


def at_half(x):
    return above(lambda x: x[:, 0, 0, 0] - 0.5, x)


def well(x):
    """Class 0 within 0.1 of a half, class 1 on both sides."""
    return above(lambda x: (x[:, 0, 0, 0] - 0.5).abs() - 0.1, x)


def ascent(name="PGD", kind="pgd", **settings):
    base = {"eps": 0.25, "step_size": 0.125, "steps": 4, "start": None}
    return AttackSpec(name=name, kind=kind, **(base | settings))


def protocol(*attacks, seed=0):
    return Protocol(name="test", attacks=attacks, seed=seed)


def test_every_iterate_of_a_threshold():
    """The labels' pixels move towards 0.5 by 1/8 a step, 0.4 in all; a sample falls as it gets across."""
    x = pixels(0.45, 0.55, 0.7, 0.89, 0.93, 0.45, 0.05)
    y = ints(1, 1, 1, 1, 1, 0, 0)
    fooled_at = [0, 1, 2, 4, 5, 1, 5]
    fooled_by = ("clean", "PGD", "PGD", "PGD", "", "PGD", "")
    for judge in ("last", "any"):
        attack = ascent(eps=0.4, judge=judge)
        report = evaluate(at_half, (x, y), protocol(attack), num_classes=2)
        assert report.stages["PGD"] == ("x0", "x1", "x2", "x3", "x4")
        assert report.fooled_at["PGD"].tolist() == fooled_at
        assert report.predictions["PGD"].tolist() == [0, 0, 0, 0, 1, 1, 0]
        assert report.predictions["clean"].tolist() == [0, 1, 1, 1, 1, 0, 0]
        assert report.survival("PGD")[0].tolist() == [1, 0.5, 0.5, 0.5, 0.5]
        assert report.survival("PGD")[1].tolist() == pytest.approx([0.8, 0.6, 0.4, 0.4, 0.2])
        assert report.survival("clean").tolist() == [[1.0], [0.8]]
        assert report.winners == fooled_by
        assert report["PGD"].class_accuracy.tolist() == [0.5, 0.2]


def test_the_worst_case_is_taken_sample_by_sample():
    """At 1/8 the first attack reaches 0.55, at 1/4 the second 0.7; the third is kept from the left."""
    x, y = pixels(0.45, 0.55, 0.7, 0.9), ints(1, 1, 1, 1)

    def leftwards(model, x, targets):
        return torch.where(x == 0.9, x - 0.45, x)

    attacks = (
        ascent("weak", eps=0.125),
        ascent("strong"),
        AttackSpec(name="own", kind="custom", eps=0.5),
    )
    report = evaluate(at_half, (x, y), protocol(*attacks), num_classes=2, custom={"own": leftwards})
    assert report.winners == ("clean", "weak", "strong", "own")
    assert report.winner.tolist() == [0, 1, 2, 3]
    robust = {name: report[name].robust.tolist() for name in report.columns}
    assert robust == {
        "clean": [False, True, True, True],
        "weak": [False, False, True, True],
        "strong": [False, False, False, True],
        "own": [False, True, True, False],
        "worst case": [False] * 4,
    }
    turned = evaluate(
        at_half, (x, y), protocol(*attacks[::-1]), num_classes=2, custom={"own": leftwards}
    )
    assert turned.winners == ("clean", "strong", "strong", "own")


def test_any_iterate_or_the_last():
    """0.75 falls to 0.55, inside the well, overshoots to 0.35, and is driven back, again and again."""
    x, y = pixels(0.75, 0.95), ints(1, 1)
    swing = ascent(eps=0.65, step_size=0.2)
    last, both = (
        evaluate(well, (x, y), protocol(replace(swing, judge=judge)), num_classes=2)
        for judge in ("last", "any")
    )
    # 0.95 goes 0.75, 0.55, 0.35, 0.55: the last iterate of this one is inside.
    assert last.predictions["PGD"].tolist() == [1, 0]
    assert both.predictions["PGD"].tolist() == [0, 0]
    for report in (last, both):
        assert report.fooled_at["PGD"].tolist() == [1, 2]
        assert report.survival("PGD")[1].tolist() == [1, 0.5, 0, 0, 0]
    assert last.winners == ("", "PGD")


def test_the_first_stage_of_several_starts():
    """Some paths from 0.32..0.92 end beside the well that they crossed; later ones cross it sooner."""
    n = 200
    data = torch.full((n, 1, 1, 1), 0.62), torch.ones(n, dtype=torch.int64)
    swing = ascent(eps=0.3, step_size=0.2, start="uniform")
    few, many = (
        evaluate(well, data, protocol(replace(swing, restarts=restarts)), num_classes=2)
        for restarts in (1, 3)
    )
    once, often = few.fooled_at["PGD"], many.fooled_at["PGD"]
    assert set(once.tolist()) >= {0, 1, 2}
    assert (often <= once).all()
    assert (often < once).any()
    assert (many["PGD"].robust <= few["PGD"].robust).all()


class Trap(nn.Module):
    """Falls where a pixel is above 0.58, and gives no hint where that is; remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return above(lambda x: 0.1 - 1.0 * (x[:, 0, 0, 0] > 0.58) + 0 * x[:, 0, 0, 0], x)


def test_restarts_add_up():
    """Uniform in 0.5 ± 0.1, a start is above 0.58 one time in ten."""
    n, reports = 300, []
    data = torch.full((n, 1, 1, 1), 0.5), torch.ones(n, dtype=torch.int64)
    for restarts in (1, 2, 4, 8):
        model = Trap()
        attack = ascent(eps=0.1, step_size=0.0, steps=1, start="uniform", restarts=restarts)
        reports.append(evaluate(model, data, protocol(attack), num_classes=2, batch_size=n))
        robust = reports[-1]["PGD"].robust
        assert stats.binomtest(int(robust.sum()), n, 0.9**restarts).pvalue > 1e-3
        # Clean, then two passes for each start, over those that are left.
        left = [len(x) for x in model.seen[1::2]]
        assert len(left) == restarts
        assert left[0] == n
        assert all(b < a for a, b in pairwise(left))
    for fewer, more in pairwise(reports):
        a, b = fewer.predictions["PGD"], more.predictions["PGD"]
        assert (b <= a).all()
        assert (b < a).any()
        assert torch.equal(b[a == 0], a[a == 0])
        fell = a == 0
        assert torch.equal(fewer.fooled_at["PGD"][fell], more.fooled_at["PGD"][fell])


def starts(start, *, seed=0, restarts=1, batch_size=50, indices=None):
    """x^(0) - x of 200 grey images, one row each, as the model got them."""
    data = TensorDataset(torch.full((200, 1, 4, 4), 0.5), torch.ones(200, dtype=torch.int64))
    data = data if indices is None else Subset(data, indices)
    model = Trap()
    model.forward = lambda x: (model.seen.append(x.detach().clone()), above(one, x))[1]
    attack = ascent(eps=0.1, step_size=0.0, steps=1, start=start, restarts=restarts)
    report = evaluate(
        model, data, protocol(attack, seed=seed), num_classes=2, batch_size=batch_size
    )
    assert report["PGD"].robust.all()
    batches = model.seen
    per_batch = 1 + 2 * restarts
    return [
        torch.cat([batches[k] for k in range(1 + 2 * r, len(batches), per_batch)]).flatten(1) - 0.5
        for r in range(restarts)
    ]


def one(x):
    return 1 + 0 * x[:, 0, 0, 0]


def test_noise_is_splitmix64():
    """The first outputs of the state 1234567, as Rosetta Code lists them."""
    states = torch.full((5,), 1234567) + torch.arange(1, 6) * GAMMA
    assert [value % 2**64 for value in splitmix(states).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_starts_have_their_distribution_and_belong_to_a_sample():
    (noise,) = starts("uniform")
    assert noise.shape == (200, 16)
    assert noise.abs().max() <= 0.1 + 1e-7
    assert stats.kstest(noise.flatten(), stats.uniform(-0.1, 0.2).cdf).pvalue > 1e-3
    (normal,) = starts("normal")
    # The sum with 0.5 rounds to multiples of 6e-8, which is nothing beside 0.001.
    assert stats.kstest(normal.flatten() / 0.001, "norm").pvalue > 1e-3
    assert len({tuple(row) for row in noise.tolist()}) == 200
    assert (
        abs(float(torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1]))
        < 0.1
    )
    assert torch.equal(starts("uniform", batch_size=7)[0], noise)
    assert torch.equal(starts("uniform", indices=[150, 3])[0], noise[[150, 3]])
    (other,) = starts("uniform", seed=1)
    first, second = starts("uniform", restarts=2)
    assert torch.equal(first, noise)
    for different in (other, second):
        assert (different != noise).double().mean() > 0.99
        together = torch.stack([noise.flatten(), different.flatten()])
        assert abs(float(torch.corrcoef(together)[0, 1])) < 0.1


def test_the_optimal_attack_on_a_linear_model():
    """Of two classes with w = w_1 - w_0 the best attack sets x to clip(x ± eps sign w)."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(200, 2, 3, 5, generator=rng, dtype=torch.float64)
    y = torch.randint(2, (200,), generator=rng)
    weight = torch.randn(2, 30, generator=rng, dtype=torch.float64)
    bias = -0.5 * weight.sum(dim=1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 2).double())
    model[1].weight.data, model[1].bias.data = weight, bias

    w, b = weight[1] - weight[0], bias[1] - bias[0]
    sign = (2 * y - 1).double()[:, None]
    worst = (x.flatten(1) - 0.03 * sign * w.sign()).clamp(0, 1)
    margin = sign[:, 0] * (worst @ w + b)
    assert margin.abs().min() > 1e-6
    robust = margin > 0
    clean = sign[:, 0] * (x.flatten(1) @ w + b) > 0
    assert 20 < robust.sum() < clean.sum() - 10

    attacks = (
        ascent("FGSM", eps=0.03, step_size=0.03, steps=1),
        ascent("PGD-20", eps=0.03, step_size=0.0075, steps=20, start="uniform"),
        ascent("CW", "cw", eps=0.03, step_size=0.0075, steps=20, start="uniform"),
    )
    report = evaluate(model, (x, y), protocol(*attacks), num_classes=2)
    assert torch.equal(report["clean"].robust, clean)
    for name in ("FGSM", "PGD-20", "CW", "worst case"):
        assert torch.equal(report[name].robust, robust), name


def test_groups_are_rows_and_classes_stay():
    """The samples of a threshold, in two groups of three and one that is absent."""
    x, y = pixels(0.45, 0.55, 0.7, 0.9, 0.45, 0.1), ints(1, 1, 1, 1, 0, 0)
    data = Subset(TensorDataset(x, y), [5, 4, 3, 2, 1])  # the first is not asked for
    report = evaluate(
        at_half,
        data,
        protocol(ascent()),
        num_classes=2,
        class_names=["dark", "light"],
        groups=ints(2, 0, 1, 1, 0, 0),
        group_names=["a", "b", "c", "d"],
    )
    assert report.index.tolist() == [1, 2, 3, 4, 5]
    assert report.row_names == ("a", "b", "c", "d")
    found = report["PGD"]
    assert found.totals.tolist() == [3, 2, 0, 0]
    assert found.correct.tolist() == [1, 1, 0, 0]
    assert found.class_accuracy.tolist()[:2] == pytest.approx([1 / 3, 1 / 2])
    assert found.confusion.tolist() == [[1, 1], [2, 1]]
    assert (found.worst_name, found.average) == ("a", pytest.approx(5 / 12))
    assert report.survival("PGD")[0].tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3, 1 / 3])


CUT = protocol(
    ascent("FGSM", eps=0.02, step_size=0.02, steps=1, start="normal"),
    ascent("PGD", eps=0.02, step_size=0.008, start="uniform", restarts=2, judge="any"),
    ascent("CW", "cw", eps=0.02, step_size=0.008, start="uniform"),
)


def samples(dtype=torch.float32, n=40):
    x = torch.rand(n, 2, 6, 5, generator=torch.Generator().manual_seed(3)).to(dtype)
    return x, make_tiny_model(seed=5).to(dtype)(x).argmax(dim=1).detach()


class Iterated(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def by_name(rows):
    x, y = default_collate(rows)
    return {"pixel_values": x, "labels": y, "idx": y}


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def whole(request):
    """Images, labels, a model and its report in one batch."""
    x, y = samples(request.param)
    model = make_tiny_model(seed=5).to(request.param)
    report = evaluate(model, (x, y), CUT, num_classes=4, batch_size=64)
    assert 0.2 < report["worst case"].average < 0.8
    assert len(set(report.fooled_at["PGD"].tolist())) > 3
    return TensorDataset(x, y), model, report


@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create", "ignore:.*fork.*:DeprecationWarning"
)
@pytest.mark.parametrize(
    "cut",
    [
        lambda data: DataLoader(data, batch_size=1),
        lambda data: DataLoader(data, batch_size=7),
        lambda data: DataLoader(data, batch_size=11, num_workers=2),
        lambda data: Subset(Subset(data, range(len(data))), torch.randperm(len(data)).tolist()),
        lambda data: Subset(data, range(-len(data), 0)),
        lambda data: DataLoader(Iterated(data), batch_size=6),
        lambda data: DataLoader(data, batch_size=7, collate_fn=by_name),
        lambda data: [(x[None], torch.tensor([y])) for x, y in data],
        lambda data: ((x, y) for x, y in DataLoader(data, batch_size=13)),
        lambda data: list(data.tensors),
    ],
    ids=[
        "one",
        "seven",
        "workers",
        "subset",
        "negative subset",
        "iterable",
        "mappings",
        "batches",
        "generator",
        "tensors",
    ],
)
def test_the_cut_changes_nothing(whole, cut):
    data, model, report = whole
    assert evaluate(model, cut(data), CUT, num_classes=4, batch_size=16) == report


@pytest.mark.parametrize(
    "sampler",
    [
        {"shuffle": True},
        {"sampler": SubsetRandomSampler(range(40))},
        {"sampler": WeightedRandomSampler([1.0] * 40, 40)},
    ],
)
def test_a_loader_in_random_order_is_refused(whole, sampler):
    """Its samples would have other numbers in each epoch: no groups, no resume, no paired test."""
    data, model, report = whole
    with pytest.raises(ValueError, match="^evaluate: expected `data` in a fixed order, got a Data"):
        evaluate(model, DataLoader(data, batch_size=9, **sampler), CUT, num_classes=4)
    assert evaluate(model, data, CUT.with_seed(1), num_classes=4) != report


def test_the_order_of_a_loader_is_kept(whole):
    """A sampler of the user gives running numbers, and the samples are read as it says."""
    data, model, report = whole
    order = list(range(39, -1, -1))
    known = evaluate(model, DataLoader(data, batch_size=9, sampler=order), CUT, num_classes=4)
    assert known == report
    numbered = evaluate(
        model, DataLoader(data, batch_size=9, sampler=iter(order)), CUT, num_classes=4
    )
    assert numbered.index.tolist() == list(range(40))
    assert torch.equal(numbered.targets, report.targets.flip(0))
    assert torch.equal(numbered.predictions["clean"], report.predictions["clean"].flip(0))
    # Noise goes with the number.
    assert not torch.equal(numbered.predictions["PGD"], report.predictions["PGD"].flip(0))


def test_shards_make_the_whole(whole):
    data, model, report = whole
    cuts = [range(0, 40, 2), range(1, 40, 2)]
    parts = [evaluate(model, Subset(data, cut), CUT, num_classes=4) for cut in cuts]
    assert merge(parts) == merge(parts[::-1]) == report
    # A sampler gives three processes 14 samples each, of which two are copies that no report counts.
    loaders = [
        DataLoader(data, batch_size=5, sampler=DistributedSampler(data, 3, rank, shuffle=True))
        for rank in range(3)
    ]
    padded = [evaluate(model, loader, CUT, num_classes=4) for loader in loaders]
    assert list(map(len, padded)) == [14, 13, 13]
    assert merge(padded) == report
    parts.append(evaluate(model, Subset(data, [-1, 0]), CUT, num_classes=4))
    joined = merge([merge(parts[::2]), parts[1]])  # its two samples are there twice, 0 and 39
    assert joined.manifest["data"]["fingerprint"] is None
    assert replace(joined, manifest=report.manifest) == report
    assert compare({"a": joined, "b": report}).test("a", "b").average == (0, 1)


def test_pinned_batches_may_be_lists():
    """As torch 2.6 returns them from a pinned tuple."""
    x, y = samples(n=5)
    stream = Samples([[x[:2], y[:2]], [x[2:], y[2:]]], 2, 4)
    assert torch.cat([block.x for block in stream.blocks(3)]).equal(x)
