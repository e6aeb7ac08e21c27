"""Fair-ARD's reweighting of four methods, and IAD and MTARD beneath it, epoch by epoch."""

import copy

import numpy as np
import pytest
import torch
from tiny_methods import K, base, batch, ce, kl, make, model, recorded_steps, same, seeded, teachers
from torch import nn

from ferdlib.methods import ABSLD, ARD, rules

FAIR = [
    (name, preset)
    for name in ("fair-ard", "fair-iad", "fair-rslad", "fair-mtard")
    for preset in ("paper", "released")
]


def plain(name, preset, **settings):
    """The method without the reweighting, the released bug of Fair-MTARD kept."""
    if (name, preset) == ("fair-mtard", "released"):
        settings["clean_target"] = "robust"
    return make(base(name), preset, **settings)


def train(method, epochs=3):
    """Losses of every batch, and the student in the end."""
    student, seen = model().train(), []
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for epoch in range(epochs):
        for b in (0, 1):
            x, y = batch(2 * epoch + b)
            method.rng = seeded(epoch)
            loss = method.loss(student, x, method.attack(student, x, y), y)
            seen.append(loss.detach())
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        method.end_epoch()
    return seen, list(student.state_dict().values())


@pytest.mark.parametrize(("name", "preset"), FAIR)
def test_beta_zero_is_the_plain_method(name, preset):
    wanted, student = train(plain(name, preset))
    found, fair_student = train(make(name, preset, beta=0.0))
    assert same(found, wanted)
    assert same(fair_student, student)
    weighted, _ = train(make(name, preset))
    assert same(weighted[:2], wanted[:2])  # the first epoch has no weights yet
    assert not same(weighted[2:3], wanted[2:3])


def weights_by_hand(kappa, released):
    """The inverse square, of mean 1 over the classes that were there; the release clips."""
    w = (kappa + 1e-5) ** -2.0
    w = np.where(np.isnan(w), 1.0, w / np.nanmean(w))
    return np.clip(w, 5 / 6, 5 / 2) if released else w


@pytest.mark.parametrize(("name", "preset"), FAIR)
def test_weights_come_from_the_epoch_before(name, preset):
    method, unweighted = make(name, preset), plain(name, preset)
    student, weights = model().train(), np.ones(K)
    for epoch in range(3):
        sums, counts = np.zeros(K), np.zeros(K)
        for b in range(2):
            x, y = batch(2 * epoch + b)
            method.rng = seeded(b)
            expected, first, correct = recorded_steps(
                name, preset, student, x, y, seeded(b), labels=y
            )
            x_adv = method.attack(student, x, y)
            assert torch.allclose(x_adv, expected, rtol=0, atol=1e-12)
            loss = method.loss(student, x, x_adv, y)
            by_weight = torch.from_numpy(weights)[y] * unweighted.loss(student, x, x_adv, y)
            assert torch.allclose(loss, by_weight, rtol=1e-9)
            for c, d in zip(y.tolist(), first if preset == "paper" else correct, strict=True):
                sums[c] += d
                counts[c] += 1
            with torch.no_grad():
                student[-1].bias += 0.1 * torch.randn(K, generator=seeded(epoch)).double()
        kappa = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
        assert len(set(counts)) > 1  # divided by true counts, not by N / K
        assert np.allclose(method.rule.class_weights.compute().numpy(), kappa, equal_nan=True)
        method.end_epoch()
        unweighted.end_epoch()
        weights = weights_by_hand(kappa, preset == "released")
        assert np.allclose(method.rule.class_weights.weights.numpy(), weights, rtol=1e-9)
        assert not np.allclose(weights, 1)
        if preset == "paper":
            assert weights[counts > 0].mean() == pytest.approx(1)


def test_released_weights_of_one_epoch():
    kappa = [6.5, 8, 4.8, 3.2, 4.4, 5, 6.2, 6.8, 7.4, 7.1]
    low = 5 / 6
    clipped = [low, low, 1.21, 2.5, 1.44, 1.12, low, low, low, low]
    raw = [0.66, 0.44, 1.21, 2.73, 1.44, 1.12, 0.73, 0.60, 0.51, 0.55]
    for preset, expected in (("paper", raw), ("released", clipped)):
        method = make("fair-rslad", preset)
        found = method.rule.weigh(torch.tensor(kappa, dtype=torch.float64))
        assert np.allclose(found, expected, atol=6e-3)
    assert float(found.mean()) == pytest.approx(1.128, abs=1e-3)


def test_labels_are_counted_where_the_attack_aims_at_logits():
    method, student, (x, y) = make("fair-rslad", rng=seeded(1)), model(), batch()
    guesses = teachers("rslad")["teacher"](x).argmax(1)
    _, steps, _ = recorded_steps("rslad", "paper", student, x, y, seeded(1), labels=y)
    _, other, _ = recorded_steps("rslad", "paper", student, x, y, seeded(1), labels=guesses)
    assert not np.array_equal(steps, other)
    method.attack(student, x, y)
    found = method.rule.class_weights.sums.tolist()
    assert found == [steps[(y == c).numpy()].sum() for c in range(K)]


class Ridge(nn.Module):
    """Class 1 on a ridge around 0.545, from which PGD falls back and forth; class 0 elsewhere."""

    def forward(self, x):
        height = 4 * torch.exp(-(((x[:, 0, 0, 0] - 0.545) / 0.03) ** 2)) - 2
        return torch.stack([torch.zeros_like(height), height], dim=1)


def test_counts_differ_where_an_iterate_crosses_back():
    """0.5, 0.54, 0.58, 0.54, ...: wrong at every other iterate."""
    x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    settings = {"num_classes": 2, "teacher": nn.Identity(), "random_start": None}
    settings |= {"eps": 0.1, "step_size": 0.04}
    for count, expected in (("first", 1.0), ("correct", 5.0)):
        method = ARD(rule=rules.LPS(count=count), **settings)
        method.attack(Ridge(), x, y)
        assert method.rule.class_weights.compute()[0] == expected
    gair = ARD(rule=rules.GAIRAT(), **settings)
    gair.attack(Ridge(), x, y)
    assert gair.rule.counter.counts.tolist() == [5]


@pytest.mark.parametrize(("name", "preset"), FAIR)
def test_a_class_that_is_wrong_from_the_start(name, preset):
    """Its steps are 0; without a guard its weight would be infinite, and the others' 0 / 0."""
    method, student, (x, _) = (
        make(name, preset, train_mode=False, rng=seeded(1)),
        model(),
        batch(n=12),
    )
    predictions = student(x).argmax(1)
    y = torch.where(torch.arange(12) % 3 == 0, (predictions + 1) % K, predictions)
    student[-1].bias.data[0] = -100.0  # nothing is taken for class 0
    assert (y == 0).any()
    method.attack(student, x, y)
    method.end_epoch()
    weights = method.rule.class_weights.weights
    assert bool(weights.isfinite().all())
    assert int(weights.argmax()) == 0
    assert float(weights[0]) == (
        2.5 if preset == "released" else pytest.approx(len(set(y.tolist())))
    )
    loss = method.loss(student, x, method.attack(student, x, y), y)
    loss.mean().backward()
    assert bool(loss.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in student.parameters())


@pytest.mark.parametrize(("preset", "matters"), [("paper", True), ("released", False)])
def test_clean_teacher_of_fair_mtard(preset, matters):
    """The release computes the natural teacher's logits and never uses them."""
    student, (x, y) = model(), batch()
    found = []
    for seed in (11, 12):
        method = make("fair-mtard", preset, natural_teacher=model(seed), rng=seeded(1))
        x_adv = method.attack(student, x, y)
        found.append(method.loss(student, x, x_adv, y))
    assert torch.equal(*found) != matters
    target = model(12)(x) if matters else teachers("mtard")["teacher"](x_adv)
    robust, scale = teachers("mtard")["teacher"](x_adv), 1 if matters else 1 / K
    expected = scale / 2 * (kl(robust, student(x_adv)) + kl(target, student(x)))
    assert torch.allclose(found[1], expected)


def test_fair_before_a_method_with_a_state_keeps_both():
    def make_absld():
        return ABSLD(num_classes=K, teacher=model(10), rule=rules.LPS())

    method, again = make_absld(), make_absld()
    student, (x, y) = model(), batch()
    method.loss(student, x, method.attack(student, x, y), y)
    again.load_state_dict(method.state_dict())
    for m in (method, again):
        m.end_epoch()
    assert torch.equal(again.adv_temperatures, method.adv_temperatures)
    assert torch.equal(again.rule.class_weights.weights, method.rule.class_weights.weights)
    assert not torch.equal(again.adv_temperatures, torch.ones(K).double())


@pytest.mark.parametrize(("name", "settings"), [("iad", {}), ("fair-iad", {"beta": 0.0})])
def test_introspection_begins_at_epoch_60(name, settings):
    method, student, (x, y) = make(name, steps=2, **settings), model(), batch()
    teacher = teachers(name)["teacher"]
    for epoch in range(61):
        if epoch in (0, 59, 60):
            method.rng = seeded(epoch)
            x_adv = method.attack(student, x, y)
            expected = kl(teacher(x), student(x_adv))
            if epoch == 60:
                trust = teacher(x_adv).softmax(1)[torch.arange(len(y)), y] ** 0.1
                expected = trust * expected + (1 - trust) * kl(student(x), student(x_adv))
            found, parameters = method.loss(student, x, x_adv, y), list(student.parameters())
            assert torch.allclose(found, expected)
            # The student's own reference is trained too.
            a, b = (torch.autograd.grad(loss.sum(), parameters) for loss in (found, expected))
            assert all(torch.allclose(v, w, atol=1e-10) for v, w in zip(a, b, strict=True))
        elif "fair" in name:
            method.attack(student, x, y)
        method.end_epoch()


def test_a_share_of_cross_entropy():
    student, (x, y) = model(), batch()
    teacher = teachers("ard")["teacher"]
    for name, t in (("ard", 5.0), ("iad", 2.0)):
        method = make(name, alpha=0.75, temperature=t, rng=seeded())
        x_adv = method.attack(student, x, y)
        expected = 0.75 * t**2 * kl(teacher(x) / t, student(x_adv) / t) + 0.25 * ce(student(x), y)
        assert torch.allclose(method.loss(student, x, x_adv, y), expected)
    method = make("adaad", alpha=0.75, rng=seeded())
    x_adv = method.attack(student, x, y)
    expected = 0.75 * kl(teacher(x_adv), student(x_adv)) + 0.25 * kl(teacher(x), student(x))
    assert torch.allclose(method.loss(student, x, x_adv, y), expected)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_mtard_follows_the_losses_since_the_first_batch(preset):
    """w_nat <- w_nat - r (w_nat - L_nat / (L_adv + L_nat)), each L over that of the first batch."""
    method = make("mtard", preset, rate=0.5, rate_drops=(1,))
    robust, natural = teachers("mtard").values()
    student, w, first, rate = model(), 0.5, None, 0.5
    scale = 1 / K if preset == "released" else 1.0
    for step in range(6):
        x, y = batch(step)
        method.rng = seeded(step)
        x_adv = method.attack(student, x, y)
        adv = scale * kl(robust(x_adv), student(x_adv)).detach()
        clean = scale * kl(natural(x), student(x)).detach()
        now = np.array([float(adv.mean()), float(clean.mean())])
        first = now if first is None else first
        relative = now / first
        w = w - rate * (w - relative[1] / relative.sum())
        assert torch.allclose(method.loss(student, x, x_adv, y), (1 - w) * adv + w * clean)
        if step == 2:
            method.end_epoch()
            rate = 0.05
            state = copy.deepcopy(method.state_dict())
            assert np.allclose(state["balance"]["initial_losses"], first)
            method = make("mtard", preset, rate=0.5, rate_drops=(1,))
            method.load_state_dict(state)
    assert abs(w - 0.5) > 0.01
