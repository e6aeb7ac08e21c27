"""The rules, each beside its formulas in NumPy: four epochs on ARD, and the bugs of their releases."""

import copy

import numpy as np
import pytest
import torch
from tiny_methods import (
    K,
    batch,
    by_class,
    by_hand,
    ce,
    kl,
    make,
    marked,
    model,
    recorded_steps,
    same,
    seeded,
    seen,
    step,
    teachers,
)
from torch import nn

from ferdlib.attacks import pgd
from ferdlib.methods import ARD, rules
from ferdlib.reweight import confusion_weights

EPS, STEP = 8 / 255, 2 / 255
TEACHER = model(10)
HELD_OUT = [(batch(seed, n=8)[0], torch.arange(8) % K) for seed in (90, 91)]


def ard(student, x, x_adv):
    return 900 * kl(TEACHER(x) / 30, student(x_adv) / 30).detach()


def grey(seed, n=9):
    """A batch without black or white, so that a radius can be read off the perturbation."""
    x, y = batch(seed, n)
    return 0.3 + 0.4 * x, y


class Plain:
    """A rule by hand: the ball and the loss of a batch, and what an epoch changes for the next one."""

    epoch = 0

    def ball(self, y):
        return EPS, STEP

    def loss(self, plain, logits, y, steps):
        return plain

    def end(self, logits, y, steps, measured):
        """See the epoch's logits, labels and counts, and figures of the held-out images."""


def measured(student, rng):
    """Clean and PGD-20 accuracies of each class, and ARD's loss of each sample with ARD's own attack."""
    right = []
    for attack in (lambda x, y: x, lambda x, y: pgd(student, x, y, steps=20, rng=rng, eps=EPS)):
        guesses = torch.cat([student(attack(x, y)).argmax(1) for x, y in HELD_OUT])
        right.append(by_class(guesses == torch.cat([y for _, y in HELD_OUT]), torch.arange(16) % K))
    rng.manual_seed(5)
    attacked = [(x, by_hand("ard", "paper", student, x, y, rng)) for x, y in HELD_OUT]
    return *right, torch.cat([ard(student, *pair) for pair in attacked]).numpy()


def follow(rule, hand):
    """Walk ARD with the rule and the rule by hand side by side; returns the last images and examples."""
    method, student = ARD(num_classes=K, teacher=TEACHER, rule=rule), model()
    for epoch in range(4):
        hand.epoch, seen = epoch, []
        for seed in range(3 * epoch, 3 * epoch + 3):
            x, y, x_adv, loss = step(method, student, seed, grey)
            eps, step_size = hand.ball(y)
            ball = {"eps": eps, "step_size": step_size}
            by_pgd, *steps = recorded_steps("ard", "paper", student, x, y, seeded(seed), y, **ball)
            assert torch.allclose(x_adv, by_pgd, rtol=0, atol=1e-12)
            logits = student(x_adv).detach()
            expected = hand.loss(ard(student, x, x_adv), logits, y, steps)
            assert torch.allclose(loss, torch.as_tensor(expected), rtol=1e-5)
            seen.append((logits, y, torch.tensor(np.array(steps)).T))
        method.rng = seeded(5)
        method.validate(student, HELD_OUT)
        hand.end(*map(torch.cat, zip(*seen, strict=True)), measured(student, seeded(5)))
        method.end_epoch()
        with torch.no_grad():  # another student in the next epoch
            student[-1].bias[epoch % K] += 0.7
    return x, x_adv


class GAIRAT(Plain):
    def loss(self, plain, logits, y, steps):
        w = (1 + np.tanh(-1 + 5 * (1 - 2 * steps[1] / 10))) / 2
        return plain * torch.from_numpy(w / w.mean() if self.epoch else np.ones(9))


class Weighted(Plain):
    w = np.ones(K)

    def loss(self, plain, logits, y, steps):
        return plain * torch.from_numpy(self.w)[y]


class LPS(Weighted):
    def __init__(self, function, column=0, clip=(0, np.inf)):
        self.function, self.column, self.clip = function, column, clip

    def end(self, logits, y, steps, measured):
        w = self.function(by_class(steps[:, self.column], y))
        self.w = np.clip(np.where(np.isnan(w), 1.0, w / np.nanmean(w)), *self.clip)


def multipliers(old, rate, too_much):
    new = np.maximum(old + rate * too_much, 0)
    return new * min(1, 0.5 / new.sum()) if new.sum() else new


class FRL(Weighted):
    natural, boundary, margins, factors = np.zeros(K), np.zeros(K), np.zeros(K), np.ones(K)

    def __init__(self, remargin):
        self.remargin = remargin

    def ball(self, y):
        if not self.remargin:
            return EPS, STEP
        return torch.tensor(EPS * self.factors)[y], EPS * self.factors.max() / 4

    def end(self, logits, y, steps, measured):
        error, gap = 1 - measured[0], measured[0] - measured[1]
        self.natural = multipliers(self.natural, 0.05, error - error.mean() - 0.05)
        self.boundary = multipliers(self.boundary, 0.1, gap - gap.mean() - 0.05)
        both = self.natural + self.boundary
        self.w = 1 + (K * both - both.sum()) / 2
        self.margins = self.margins + 0.2 * (gap - gap.mean() - 0.05)
        self.factors = np.clip(np.exp(2 * self.margins), 0.98, 3)


class FAT(Plain):
    def loss(self, plain, logits, y, steps):
        # Over the classes that are there; the release takes an absent class's loss for 0.
        return plain + 0.1 * np.nanvar(by_class(ce(logits, y), y), ddof=1)


class CFA(Plain):
    r = np.full(K, np.nan)

    def factors(self, y):
        return torch.from_numpy(np.where(np.isnan(self.r) | (self.epoch < 1), 1.0, 0.5 + self.r))[y]

    def ball(self, y):
        return EPS * self.factors(y), STEP * self.factors(y)

    def loss(self, plain, logits, y, steps):
        v = 6 * self.factors(y)
        mixing = v / (1 + v) if self.epoch else 1.0
        return (1 - mixing) * ce(logits, y) + mixing * plain

    def end(self, logits, y, steps, measured):
        self.r = by_class(logits.argmax(1) == y, y)


class DAFA(Weighted):
    def ball(self, y):
        return torch.tensor(EPS * self.w)[y], torch.tensor(STEP * self.w)[y]

    def end(self, logits, y, steps, measured):
        if self.epoch != 1:  # set once, after the second epoch
            return
        rows = logits.softmax(1).numpy()
        p = np.stack([by_class(rows[:, j], y) for j in range(K)], axis=1)
        self.w = np.ones(K)
        for i in range(K):
            for j in range(K):
                if p[i, i] < p[j, j]:
                    self.w[i] += 0.3 * p[i, j] * p[j, j]
                elif p[i, i] > p[j, j]:
                    self.w[i] -= 0.3 * p[j, i] * p[i, i]


class WAT(Weighted):
    w, total = np.full(K, 2.0), np.zeros(K + 1)  # both its experts weigh 1 at first

    def end(self, logits, y, steps, measured):
        losses, labels = measured[2], torch.arange(16) % K
        self.total = self.total + np.append(by_class(losses, labels), losses.mean())
        w = np.exp(0.05 * (self.total - self.total.max()))
        self.w = (K * w / w.sum())[:K] + (K * w / w.sum())[K]


def power(kappa):
    return (kappa + 1e-5) ** -2.0


# The limits of Fair-ARD's release.
CLIP = (5 / 6, 5 / 2)


@pytest.mark.parametrize(
    ("rule", "hand"),
    [
        (rules.Uniform(), Plain()),
        (rules.LPS(), LPS(power)),
        (rules.LPS(count="correct", clip=CLIP), LPS(power, 1, CLIP)),
        (rules.LPS(count="correct", beta=1.0), LPS(lambda k: 1 / (k + 1e-5), 1)),
        (rules.LPS(function="linear"), LPS(lambda k: 1 - k / 11)),
        (rules.LPS(function="sigmoid", shift=1.0), LPS(lambda k: 1 / (1 + np.exp(k - 6)))),
        (rules.LPS(function="tanh"), LPS(lambda k: 1 + np.tanh(5 - k))),
        (rules.GAIRAT(begin=1), GAIRAT()),
        (rules.FRL(slack=0.05), FRL(False)),
        (rules.FRL(slack=0.05, remargin=True), FRL(True)),
        (rules.FAT(), FAT()),
        (rules.CFA(begin=1), CFA()),
        (rules.DAFA(begin=2, strength=0.3), DAFA()),
        (rules.WAT(rate=0.05), WAT()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_rule_is_its_formulas(rule, hand):
    x, x_adv = follow(rule, hand)
    if isinstance(rule, (rules.CFA, rules.DAFA)):
        radius = (x_adv - x).abs().flatten(1).amax(1)
        assert float(radius.max()) > 1.1 * float(radius.min())
        # Released DAFA cuts the radii off at EPS.
        assert isinstance(rule, rules.CFA) or float(radius.max()) > 1.05 * EPS


def test_faal_weights_are_the_worst_case_on_the_sphere():
    """p ~ 1 / (mu - a) with KL(U || p) = 1/2; an absent class counts as one of mean lead."""
    method, student = make("faal-ard"), model()
    x, y, x_adv, loss = step(method, student, 0)
    p = student(x_adv).softmax(1).detach()
    own = p[torch.arange(len(y)), y]
    lead = by_class(p.scatter(1, y[:, None], -1.0).amax(1) - own, y)
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


def test_fat_of_one_class_is_the_method():
    student, (x, _) = model(), batch()
    y = torch.full((9,), 2)
    assert torch.equal(*(make(name).loss(student, x, x, y) for name in ("ard", "fat-ard")))


def test_released_weights_of_one_epoch():
    kappa = torch.tensor([6.5, 8, 4.8, 3.2, 4.4, 5, 6.2, 6.8, 7.4, 7.1], dtype=torch.float64)
    low = 5 / 6
    clipped = [low, low, 1.21, 2.5, 1.44, 1.12, low, low, low, low]
    raw = [0.66, 0.44, 1.21, 2.73, 1.44, 1.12, 0.73, 0.60, 0.51, 0.55]
    for preset, expected in (("paper", raw), ("released", clipped)):
        found = make("fair-rslad", preset).rule.weigh(kappa)
        assert np.allclose(found, expected, atol=6e-3)
    assert float(found.mean()) == pytest.approx(1.128, abs=1e-3)


def test_labels_are_counted_where_the_attack_aims_at_logits():
    method, student = make("fair-rslad"), model()
    x, y, *_ = step(method, student, 0)
    guesses = teachers("rslad")["teacher"](x).argmax(1)
    walk = ("rslad", "paper", student, x, y)
    steps, other = (recorded_steps(*walk, seeded(), labels)[1] for labels in (y, guesses))
    assert not np.array_equal(steps, other)
    expected = [steps[(y == c).numpy()].sum() for c in range(K)]
    assert method.rule.class_weights.sums.tolist() == expected


class Ridge(nn.Module):
    """Class 1 on a ridge around 0.545, from which PGD falls back and forth; class 0 elsewhere."""

    def forward(self, x):
        height = 4 * torch.exp(-(((x[:, 0, 0, 0] - 0.545) / 0.03) ** 2)) - 2
        return torch.stack([torch.zeros_like(height), height], dim=1)


def test_counts_differ_where_an_iterate_crosses_back():
    """0.5, 0.54, 0.58, 0.54, ...: wrong at every other iterate."""
    x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    settings = {"random_start": None, "eps": 0.1, "step_size": 0.04}
    for rule, expected in ((rules.LPS(), 1), (rules.LPS(count="correct"), 5), (rules.GAIRAT(), 5)):
        ARD(num_classes=2, teacher=nn.Identity(), rule=rule, **settings).attack(Ridge(), x, y)
        counted = getattr(rule, "counter", None)
        assert expected == (counted.counts[0] if counted else rule.class_weights.compute()[0])


@pytest.mark.parametrize(("preset", "most"), [("paper", K), ("released", 2.5)])
def test_a_class_that_is_wrong_from_the_start(preset, most):
    """Its steps are 0; without a guard its weight would be infinite, and the others' 0 / 0."""
    method, student = make("fair-rslad", preset, rng=seeded(1)), model()
    x, y = batch(n=12)[0], torch.arange(12) % K
    student[-1].bias.data[0] = -100.0  # nothing is taken for class 0
    method.attack(student, x, torch.where(y == 0, 0, student(x).argmax(1)))
    method.end_epoch()
    weights = method.rule.class_weights.weights
    assert bool(weights.isfinite().all())
    assert float(weights[0]) <= most
    assert int(weights.argmax()) == 0
    loss = method.loss(student, x, method.attack(student, x, y), y)
    loss.mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in student.parameters())


@pytest.mark.parametrize("name", ["frl-ard", "wat-ard", "wat-mtard"])
@pytest.mark.parametrize("train_mode", [False, True])
def test_validate_leaves_no_trace(name, train_mode):
    method, student = make(name, train_mode=train_mode), marked(model().train())
    student[1].eval()
    before, images, forwards = seen(student), copy.deepcopy(HELD_OUT), []
    own = method.state_dict()
    student.register_forward_pre_hook(lambda *_: forwards.append(1))
    method.validate(student, iter(HELD_OUT))
    # PGD-20, images and examples; the method's own attack and its loss.
    assert len(forwards) == 2 * {"frl-ard": 22, "wat-ard": 11, "wat-mtard": 12}[name]
    assert seen(student) == before
    assert all(same(a, b) for a, b in zip(images, HELD_OUT, strict=True))
    if name == "wat-mtard":
        balances = [state["balance"]["initial_losses"] for state in (own, method.state_dict())]
        assert same(*([balance] for balance in balances))


@pytest.mark.parametrize("name", ["frl-sat", "wat-ard"])
def test_an_epoch_that_was_not_validated_is_not_ended(name):
    """Without it, these methods would be the plain ones."""
    method, student = make(name), model()
    for epoch in range(2):
        step(method, student, epoch)
        with pytest.raises(
            RuntimeError, match=rf"^\w+\.end_epoch: expected validate.* epoch {epoch}"
        ):
            method.end_epoch()
        method.validate(student, HELD_OUT)
        method.end_epoch()
        assert method.epoch == method.rule.epoch == epoch + 1


def test_rules_that_count_want_the_methods_own_attack():
    student, (x, y), (_, other) = model(), batch(0), batch(1)
    gair, fair = make("gair-ard", begin=0), make("fair-ard")
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"^GAIRAT\.combine: expected images of the method's"
        ):
            gair.loss(student, x, x, y)
        # Those of another batch are not its, either.
        gair.attack(student, x, other)
    gair.attack(student, x, y)
    gair.loss(student, x, x, y)
    fair.loss(student, x, x, y)
    with pytest.raises(RuntimeError, match=r"^LPS\.end_epoch: expected the method's own attack"):
        fair.end_epoch()


def test_wat_averages_over_samples_and_does_not_overflow():
    method, student = make("wat-ard", rate=1e4), model()
    x, y = batch(90)
    y = torch.where(torch.arange(9) < 7, 0, y)  # so that a mean of class means would be another one
    method.rng = seeded(0)
    method.validate(student, [(x, y)])
    losses = ard(student, x, by_hand("ard", "paper", student, x, y, seeded(0)))
    means = by_class(losses, y)
    excess = np.nan_to_num(means - float(losses.mean()))
    assert np.allclose(method.rule.hedge.excess.numpy(), excess)
    assert abs(np.nanmean(means) - float(losses.mean())) > 0.1
    method.end_epoch()
    *_, loss = step(method, student, 0)
    assert bool(loss.isfinite().all())
    w = method.rule.hedge.class_weights
    assert float(w.sum()) + method.rule.hedge.average_weight == pytest.approx(K)


def test_dafa_lowers_a_strength_that_leaves_a_class_no_weight(caplog):
    method, student = make("dafa-ard", begin=1, strength=100.0), model()
    for seed in range(3):
        step(method, student, seed)
    p = method.rule.sums / method.rule.sums.sum(dim=1, keepdim=True)
    method.end_epoch()
    w, gentle = method.rule.weights, confusion_weights(p, strength=0.01)
    assert f"DAFA: strength 100 would leave class {int(gentle.argmin())} no weight" in caplog.text
    assert (float(w.min()), float(w.mean())) == (pytest.approx(0.05), pytest.approx(1))
    # The same exchange between classes as at any other strength.
    assert torch.allclose((w - 1) / 0.95, (gentle - 1) / (1 - gentle.min()))
