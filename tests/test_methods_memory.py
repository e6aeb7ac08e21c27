"""Methods that change over the epochs, and BAT: their formulas beside what they do."""

import copy

import numpy as np
import pytest
import torch
from tiny_methods import K, batch, by_class, by_hand, ce, kl, make, model, seeded, step, teachers

from ferdlib.attacks import pgd
from ferdlib.methods import FERDDistillation, rules

TEACHER = model(10)


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("name", ["iad", "fair-iad"])
def test_introspection_begins_at_epoch_60(name, preset):
    method, student = make(name, preset, steps=2, train_mode=False), model()
    if name == "fair-iad":
        method.rule.beta = 0.0
    for epoch in range(61):
        x, y, x_adv, found = step(method, student, epoch)
        if epoch in (0, 59, 60):
            expected, parameters = kl(TEACHER(x), student(x_adv)), list(student.parameters())
            if epoch == 60:
                trust = TEACHER(x_adv).softmax(1)[torch.arange(len(y)), y] ** 0.1
                guided = trust * expected if preset == "paper" else expected
                expected = guided + (1 - trust) * kl(student(x), student(x_adv))
            assert torch.allclose(found, expected)
            # The student's own reference is trained too.
            a, b = (torch.autograd.grad(loss.sum(), parameters) for loss in (found, expected))
            assert all(torch.allclose(v, w, atol=1e-10) for v, w in zip(a, b, strict=True))
        method.end_epoch()


def test_a_share_of_cross_entropy():
    student = model()
    for name, t in (("ard", 5.0), ("iad", 2.0)):
        x, y, x_adv, found = step(make(name, alpha=0.75, temperature=t), student, 0)
        expected = 0.75 * t**2 * kl(TEACHER(x) / t, student(x_adv) / t) + 0.25 * ce(student(x), y)
        assert torch.allclose(found, expected)
    x, y, x_adv, found = step(make("adaad", alpha=0.75), student, 0)
    expected = 0.75 * kl(TEACHER(x_adv), student(x_adv)) + 0.25 * kl(TEACHER(x), student(x))
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_mtard_follows_the_losses_since_the_first_batch(preset):
    """w_nat <- w_nat - r (w_nat - L_nat / (L_adv + L_nat)), each L over that of the first batch."""
    method = make("mtard", preset, rate=0.5, rate_drops=(1,))
    robust, natural = teachers("mtard").values()
    student, w, first, rate = model(), 0.5, None, 0.5
    scale = 1 / K if preset == "released" else 1.0
    for k in range(6):
        x, _, x_adv, found = step(method, student, k)
        adv = scale * kl(robust(x_adv), student(x_adv)).detach()
        clean = scale * kl(natural(x), student(x)).detach()
        now = np.array([float(adv.mean()), float(clean.mean())])
        first = now if first is None else first
        relative = now / first
        w = w - rate * (w - relative[1] / relative.sum())
        assert torch.allclose(found, (1 - w) * adv + w * clean)
        if k == 2:
            method.end_epoch()
            rate = 0.05
            state = copy.deepcopy(method.state_dict())
            assert np.allclose(state["balance"]["initial_losses"], first)
            method = make("mtard", preset, rate=0.5, rate_drops=(1,))
            method.load_state_dict(state)
    assert abs(w - 0.5) > 0.01


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_absld_tempers_the_teacher_by_class(preset):
    """From class means, not sums; each term with its own temperature, the attack with the adversarial."""
    method, student = make("absld", preset, rate=0.4, rate_drops=(1,)), model()
    taus, scale = [np.ones(K)] * 2, 1 / K if preset == "released" else 1.0
    for epoch, rate in enumerate((0.4, 0.04, 0.04, 0.04)):
        risks, labels = [[], []], []
        for seed in (2 * epoch, 2 * epoch + 1):
            x, y, x_adv, loss = step(method, student, seed)
            adv, clean = (TEACHER(x) / torch.from_numpy(tau)[y, None] for tau in taus)
            settings = {"loss": lambda z, t: kl(t, z), "random_start": "normal"}
            expected = pgd(student, x, adv, **settings, rng=seeded(seed))
            assert torch.allclose(x_adv, expected, rtol=0, atol=1e-12)
            wanted = 5 / 6 * kl(adv, student(x_adv)) + 1 / 6 * kl(clean, student(x))
            assert torch.allclose(loss, scale * wanted)
            for found, images in zip(risks, (x_adv, x), strict=True):
                found.append(ce(student(images), y).detach())
            labels.append(y)
        for k, risk in enumerate(risks):
            mean = by_class(torch.cat(risk), torch.cat(labels))
            gap = np.nan_to_num(mean - np.nanmean(mean))
            taus[k] = np.clip(taus[k] - rate * gap / np.abs(gap).max(), 0.5, 5)
        method.end_epoch()
        assert np.allclose(method.adv_temperatures, taus[0])
        assert np.allclose(method.clean_temperatures, taus[1])
    assert not np.allclose(*taus, rtol=0.02)
    assert np.ptp(taus[0]) > 0.3


def test_bat_finds_both_sides_of_the_boundary():
    method, student, cases, path = make("bat"), model(), set(), []
    for seed in range(4):
        path.clear()
        x, y, x_adv, _ = step(method, student, seed)
        last = by_hand(
            "bat", "paper", student, x, y, seeded(seed), on_step=lambda *seen: path.append(seen[1])
        )
        for n, (inside, outside) in enumerate(zip(*x_adv.chunk(2), strict=True)):
            right = [bool(student(v[n : n + 1]).argmax() == y[n]) for v in path]
            first = right.index(False) if False in right else None
            cases.add(first)
            if first is None:  # never fooled
                expected = last[n], last[n]
            elif first == 0:  # the start is wrong already
                expected = x[n], path[0][n]
            else:
                expected = path[first - 1][n], path[first][n]
            assert torch.allclose(inside, expected[0], rtol=0, atol=1e-12)
            assert torch.allclose(outside, expected[1], rtol=0, atol=1e-12)
    assert {None, 0, 1, 2, 3} <= cases


def test_ferd_needs_the_number_of_classes_for_a_rule_only():
    assert make("ferd").num_classes == K
    x, y = batch()
    method = FERDDistillation(teacher=TEACHER, random_start=None)
    assert method.attack(model(), x, y).shape == x.shape
    with pytest.raises(ValueError, match=r"^FERDDistillation: expected `num_classes` >= 2, got 0"):
        FERDDistillation(teacher=TEACHER, rule=rules.FAT())
    moved = model().train()
    method = FERDDistillation(teacher=TEACHER, train_mode=True, attack_model="teacher")
    method.attack(moved, x, y)
    assert moved[1].num_batches_tracked == 0
    method.attack_model = "student"
    method.attack(moved, x, y)
    assert moved[1].num_batches_tracked == 10
