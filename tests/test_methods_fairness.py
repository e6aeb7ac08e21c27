"""The robust-fairness rules, on ARD and of their own: their equations, and the bugs of their releases."""

import copy

import numpy as np
import pytest
import torch
from tiny_methods import (
    K,
    batch,
    buffers,
    by_hand,
    ce,
    kl,
    make,
    model,
    recorded_steps,
    same,
    seeded,
    teachers,
)

from ferdlib.attacks import pgd
from ferdlib.reweight import confusion_weights

EPS, STEP = 8 / 255, 2 / 255
TEACHER = model(10)


def ard(student, x, x_adv):
    return 900 * kl(TEACHER(x) / 30, student(x_adv) / 30).detach()


def grey(seed, n=9):
    """A batch without black or white, so that a radius can be read off the perturbation."""
    x, y = batch(seed, n)
    return 0.3 + 0.4 * x, y


def step(method, student, seed, images=batch):
    """A batch, its attack and its loss."""
    x, y = images(seed)
    method.rng = seeded(seed)
    x_adv = method.attack(student, x, y)
    return x, y, x_adv, method.loss(student, x, x_adv, y)


def by_class(values, y):
    """Class means in NumPy, nan for an absent class."""
    values, y = np.asarray(values, dtype=float), y.numpy()
    return np.array([values[y == c].mean() if (y == c).any() else np.nan for c in range(K)])


def ascent(student, x, y, eps, step_size, seed, **changes):
    settings = {"loss": ce, "eps": eps, "step_size": step_size, "rng": seeded(seed)}
    return pgd(student, x, y, **(settings | changes))


def test_gair_weighs_each_sample_in_its_batch():
    method, student = make("gair-ard", begin=1), model()
    for epoch in range(3):
        x, y, x_adv, loss = step(method, student, epoch)
        expected, _, k = recorded_steps("ard", "paper", student, x, y, seeded(epoch), labels=y)
        assert torch.allclose(x_adv, expected, rtol=0, atol=1e-12)
        w = (1 + np.tanh(-1 + 5 * (1 - 2 * k / 10))) / 2
        w = torch.from_numpy(w / w.mean()) if epoch else 1.0
        assert torch.allclose(loss, w * ard(student, x, x_adv), rtol=1e-6)
        method.end_epoch()
    assert float(w.std()) > 0.1


def measured(student, batches, rng):
    """Clean and PGD-20 accuracies of each class, counted."""
    right, seen = np.zeros((2, K)), np.zeros(K)
    for x, y in batches:
        x_adv = pgd(student, x, y, loss=ce, eps=EPS, step_size=STEP, steps=20, rng=rng)
        for k, images in enumerate((x, x_adv)):
            for c in y[student(images).argmax(1) == y]:
                right[k, c] += 1
        seen += np.bincount(y.numpy(), minlength=K)
    return right / seen


def multipliers(old, rate, too_much):
    new = np.maximum(old + rate * too_much, 0)
    return new * min(1, 0.5 / new.sum()) if new.sum() else new


def test_frl_weights_react_to_the_errors():
    method, student = make("frl-ard", slack=0.05), model()
    batches = [batch(90), batch(91)]
    natural, boundary = np.zeros(K), np.zeros(K)
    for epoch in range(2):
        method.rng = seeded(5)
        method.validate(student, batches)
        method.end_epoch()
        clean, robust = measured(student, batches, seeded(5))
        error, gap = 1 - clean, clean - robust
        natural = multipliers(natural, 0.05, error - error.mean() - 0.05)
        boundary = multipliers(boundary, 0.1, gap - gap.mean() - 0.05)
        w = 1 + (K * natural - natural.sum() + K * boundary - boundary.sum()) / 2
        x, y, x_adv, loss = step(method, student, epoch)
        assert torch.allclose(loss, torch.from_numpy(w)[y] * ard(student, x, x_adv))
        assert w.mean() == pytest.approx(1)
        assert w.argmin() == error.argmin() == gap.argmin()
        assert w.max() > 1.02
        with torch.no_grad():  # another student in the next epoch
            student[-1].bias[1] += 1.0


def test_frl_remargin_widens_the_classes_with_boundary_errors():
    method, student = make("frl-ard", remargin=True, slack=0.07), model()
    batches = [batch(90), batch(91)]
    x, y = grey(1)
    method.rng = seeded(5)
    plain = method.attack(student, x, y)
    assert torch.allclose(plain, ascent(student, x, y, EPS, EPS / 4, 5), rtol=0, atol=1e-12)
    method.rng = seeded(5)
    method.validate(student, batches)
    clean, robust = measured(student, batches, seeded(5))
    gap = clean - robust
    factors = np.clip(np.exp(2 * 0.2 * (gap - gap.mean() - 0.07)), 0.98, 3)
    assert factors.max() > 1.01
    eps = torch.from_numpy(EPS * factors)[y]
    method.rng = seeded(5)
    found = method.attack(student, x, y)
    expected = ascent(student, x, y, eps, EPS * factors.max() / 4, 5)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert torch.allclose((found - x).abs().flatten(1).amax(1), eps)


@pytest.mark.parametrize("name", ["frl-ard", "wat-ard"])
@pytest.mark.parametrize("train_mode", [False, True])
def test_validate_leaves_no_trace(name, train_mode):
    method, student = make(name, train_mode=train_mode), model().train()
    student[1].eval()
    student[0].bias.requires_grad_(False)
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    flags = [m.training for m in student.modules()]
    before, state = buffers(student), copy.deepcopy(student.state_dict())
    batches = [batch(90), batch(91)]
    images = copy.deepcopy(batches)
    forwards = []
    student.register_forward_pre_hook(lambda *_: forwards.append(1))
    method.validate(student, iter(batches))
    # PGD-20, images and examples; ARD's own attack and its loss
    assert len(forwards) == 2 * (20 + 2 if name == "frl-ard" else 10 + 1)
    assert same(buffers(student), before)
    assert same(list(student.state_dict().values()), list(state.values()))
    assert [m.training for m in student.modules()] == flags
    assert [p.requires_grad for p in student.parameters()].count(False) == 1
    assert all(bool((p.grad == 1).all()) for p in student.parameters())
    assert all(same(a, b) for a, b in zip(images, batches, strict=True))


@pytest.mark.parametrize("name", ["frl-ard", "wat-ard"])
def test_an_epoch_that_was_not_validated_is_not_ended(name):
    """Without it, these methods would be plain ARD."""
    method, student = make(name), model()
    for epoch in range(2):
        step(method, student, epoch)
        with pytest.raises(
            RuntimeError, match=f"(FRL|WAT).end_epoch: expected validate.* epoch {epoch}"
        ):
            method.end_epoch()
        method.validate(student, [batch(90), batch(91)])
        method.end_epoch()
        assert method.epoch == epoch + 1


def test_gair_wants_its_own_attack():
    method, student = make("gair-ard", begin=0), model()
    x, y = batch(0)
    with pytest.raises(
        RuntimeError, match=r"^GAIRAT.combine: expected images of the method.s own attack"
    ):
        method.loss(student, x, x, y)


@pytest.mark.parametrize("train_mode", [False, True])
def test_wat_hedges_with_the_summed_losses(train_mode):
    """Of K + 1 experts, each class's loss and their average, on balanced held-out data."""
    method, student = make("wat-ard", rate=0.05, train_mode=train_mode), model()
    batches = [(batch(seed, n=8)[0], torch.arange(8) % K) for seed in (90, 91)]
    total = np.zeros(K + 1)
    for epoch in range(2):
        method.rng, rng = seeded(epoch), seeded(epoch)
        method.validate(student, batches)
        method.end_epoch()
        found = [ard(student, x, by_hand("ard", "paper", student, x, y, rng)) for x, y in batches]
        labels = torch.cat([y for _, y in batches])
        assert torch.bincount(labels).tolist() == [4] * K
        total += [*by_class(torch.cat(found), labels), float(torch.cat(found).mean())]
        w = np.exp(0.05 * (total - total.max()))
        w = torch.from_numpy(K * w / w.sum())
        x, y, x_adv, loss = step(method, student, epoch)
        assert torch.allclose(loss, (w[y] + w[K]) * ard(student, x, x_adv))
        with torch.no_grad():
            student[-1].bias[1] += 1.0
    assert float(w.std()) > 0.1


def test_wat_does_not_overflow():
    method, student = make("wat-ard", rate=1e4), model()
    for _ in range(3):
        method.validate(student, [batch(90), batch(91)])
        method.end_epoch()
    *_, loss = step(method, student, 0)
    assert bool(loss.isfinite().all())
    w = method.rule.hedge.class_weights
    assert float(w.sum()) + method.rule.hedge.average_weight == pytest.approx(K)
    assert float(w.max()) == pytest.approx(K)


def test_fat_adds_the_variance_over_the_classes_that_are_there():
    method, student = make("fat-ard"), model()
    x, y, x_adv, loss = step(method, student, 0)
    means = by_class(ce(student(x_adv), y).detach(), y)
    assert np.isnan(means).any()  # the release takes an absent class's loss for 0
    variance = np.nanvar(means, ddof=1)
    assert torch.allclose(loss, ard(student, x, x_adv) + 0.1 * variance)
    assert variance > 0.01
    one = torch.full_like(y, 2)  # with one class there is nothing between classes
    assert torch.equal(
        method.loss(student, x, x_adv, one), make("ard").loss(student, x, x_adv, one)
    )


def test_cfa_gives_the_robust_class_the_larger_radius():
    method, student = make("cfa-ard", begin=1), model()
    factors = torch.ones(K).double()
    for epoch in range(3):
        right, labels = [], []
        for seed in (2 * epoch, 2 * epoch + 1):
            x, y, x_adv, loss = step(method, student, seed, grey)
            expected = ascent(student, x, y, EPS * factors[y], STEP * factors[y], seed)
            assert torch.allclose(x_adv, expected, rtol=0, atol=1e-12)
            assert torch.allclose((x_adv - x).abs().flatten(1).amax(1), EPS * factors[y])
            mixing = (6 * factors / (1 + 6 * factors))[y] if epoch else 1.0
            own = (1 - mixing) * ce(student(x_adv), y)
            assert torch.allclose(loss, own + mixing * ard(student, x, x_adv))
            right.append(student(x_adv).argmax(1) == y)
            labels.append(y)
        method.end_epoch()
        r = by_class(torch.cat(right), torch.cat(labels))
        factors = torch.from_numpy(np.where(np.isnan(r), 1.0, 0.5 + r))
        assert factors[np.nanargmax(r)] > factors[np.nanargmin(r)]


def test_faal_weights_are_the_worst_case_on_the_sphere():
    """p ~ 1 / (mu - a) with KL(U || p) = 1/2; an absent class counts as one of mean lead."""
    method, student = make("faal-ard"), model()
    x, y, x_adv, loss = step(method, student, 0)
    p = student(x_adv).softmax(1).detach()
    own = p[torch.arange(len(y)), y]
    others = p.clone()
    others[torch.arange(len(y)), y] = -1
    lead = by_class(others.amax(1) - own, y)
    (absent,) = np.isnan(lead).nonzero()[0]
    w = by_class((loss / ard(student, x, x_adv)).detach(), y)
    q = np.where(np.isnan(w), K - np.nansum(w), w) / K
    assert (q > 0).all()
    assert -np.log(K * q).mean() == pytest.approx(0.5, abs=1e-5)
    a = np.where(np.isnan(lead), np.nanmean(lead), lead)
    slope, level = np.polyfit(a, 1 / q, 1)
    assert slope < 0
    assert np.allclose(1 / q, slope * a + level, rtol=1e-4)
    assert q[absent] < q.max()  # in the release it would lead wherever all margins are negative
    assert q.argmax() == np.nanargmax(lead)


def test_dafa_radii_are_used():
    method, student = make("dafa-ard", begin=2, strength=0.5), model()
    step(method, student, 0, grey)
    method.end_epoch()
    rows, labels = [], []
    for seed in (1, 2, 3):  # the last epoch before
        x, y, x_adv, loss = step(method, student, seed, grey)
        assert torch.allclose(loss, ard(student, x, x_adv))
        rows.append(student(x_adv).softmax(1).detach())
        labels.append(y)
    method.end_epoch()
    rows, labels = torch.cat(rows).numpy(), torch.cat(labels)
    p = np.stack([by_class(rows[:, j], labels) for j in range(K)], axis=1)
    w = np.ones(K)
    for i in range(K):
        for j in range(K):
            if p[i, i] < p[j, j]:
                w[i] += 0.5 * p[i, j] * p[j, j]
            elif p[i, i] > p[j, j]:
                w[i] -= 0.5 * p[j, i] * p[i, i]
    w = torch.from_numpy(w)
    for epoch in (2, 3):  # set once
        x, y, x_adv, loss = step(method, student, 10 + epoch, grey)
        radius = (x_adv - x).abs().flatten(1).amax(1)
        assert torch.allclose(radius, EPS * w[y])
        assert float(radius.max()) > 1.05 * EPS  # released: cut off at EPS
        assert float(radius.min()) < 0.95 * EPS
        expected = ascent(student, x, y, EPS * w[y], STEP * w[y], 10 + epoch)
        assert torch.allclose(x_adv, expected, rtol=0, atol=1e-12)
        assert torch.allclose(loss, w[y] * ard(student, x, x_adv))
        method.end_epoch()
        with torch.no_grad():
            student[-1].bias[1] += 1.0
    assert float(w.mean()) == pytest.approx(1)


def test_bat_finds_both_sides_of_the_boundary():
    method, student = make("bat", rng=seeded(1)), model()
    cases, path = set(), []

    def keep(_, iterate, logits):
        path.append(iterate)

    for seed in range(4):
        x, y = batch(seed)
        path.clear()
        method.rng = seeded(1)
        last = by_hand("bat", "paper", student, x, y, seeded(1), on_step=keep)
        inside, outside = method.attack(student, x, y).chunk(2)
        for n, label in enumerate(y):
            right = [bool(student(v[n : n + 1]).argmax() == label) for v in path]
            first = right.index(False) if False in right else None
            cases.add(first)
            if first is None:  # never fooled
                correct, wrong = last[n], last[n]
            elif first == 0:  # the start is wrong already
                correct, wrong = x[n], path[0][n]
            else:
                correct, wrong = path[first - 1][n], path[first][n]
            assert torch.allclose(inside[n], correct, rtol=0, atol=1e-12)
            assert torch.allclose(outside[n], wrong, rtol=0, atol=1e-12)
    assert {None, 0, 1, 2, 3} <= cases


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_absld_tempers_the_teacher_by_class(preset):
    """From class means, not sums; each term with its own temperature, the attack with the adversarial."""
    method, student = make("absld", preset, rate=0.4, rate_drops=(1,)), model()
    adv_tau = clean_tau = np.ones(K)
    scale = 1 / K if preset == "released" else 1.0
    for epoch, rate in enumerate((0.4, 0.04, 0.04)):
        adv_losses, clean_losses, labels = [], [], []
        for b in (0, 1):
            x, y, x_adv, loss = step(method, student, 2 * epoch + b)
            adv, clean = (TEACHER(x) / torch.from_numpy(t)[y, None] for t in (adv_tau, clean_tau))
            expected = pgd(
                student,
                x,
                adv,
                loss=lambda z, t: kl(t, z),
                random_start="normal",
                rng=seeded(2 * epoch + b),
            )
            assert torch.allclose(x_adv, expected, rtol=0, atol=1e-12)
            wanted = 5 / 6 * kl(adv, student(x_adv)) + 1 / 6 * kl(clean, student(x))
            assert torch.allclose(loss, scale * wanted)
            adv_losses.append(ce(student(x_adv), y).detach())
            clean_losses.append(ce(student(x), y).detach())
            labels.append(y)
        found = []
        for tau, losses in ((adv_tau, adv_losses), (clean_tau, clean_losses)):
            mean = by_class(torch.cat(losses), torch.cat(labels))
            gap = np.nan_to_num(mean - np.nanmean(mean))
            found.append(np.clip(tau - rate * gap / np.abs(gap).max(), 0.5, 5))
        adv_tau, clean_tau = found
        method.end_epoch()
        assert np.allclose(method.adv_temperatures, adv_tau)
        assert np.allclose(method.clean_temperatures, clean_tau)
    assert not np.allclose(adv_tau, clean_tau, rtol=0.02)
    assert np.ptp(adv_tau) > 0.3
    assert torch.equal(TEACHER(x), teachers("absld")["teacher"](x))


def test_dafa_lowers_a_strength_that_leaves_a_class_no_weight(caplog):
    method, student = make("dafa-ard", begin=1, strength=100.0), model()
    with pytest.raises(ValueError, match="^DAFA: expected `begin` >= 1, got 0"):
        make("dafa-ard", begin=0)
    for seed in range(3):
        step(method, student, seed)
    p = method.rule.sums / method.rule.sums.sum(dim=1, keepdim=True)
    method.end_epoch()
    assert "DAFA: strength 100 would leave class" in caplog.text
    w = method.rule.weights
    assert float(w.min()) == pytest.approx(0.05)
    assert float(w.mean()) == pytest.approx(1)
    # The same exchange between classes as at any other strength.
    gentle = confusion_weights(p, strength=0.01)
    assert torch.allclose((w - 1) / (1 - w.min()), (gentle - 1) / (1 - gentle.min()))
