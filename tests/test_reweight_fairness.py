"""Rules and states of robust-fairness methods against their formulas, written out or by hand."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize

from ferdlib import reweight
from ferdlib.reweight import (
    FRLWeights,
    HedgeWeights,
    cfa_margins,
    cfa_mixing,
    confusion_weights,
    gairat,
    kl_ball,
)

nan = math.nan


def vector(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def close(actual, expected, atol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# GAIRAT


def test_gairat_by_hand():
    """With shift -1 and 10 steps, u is 0 at 4 steps, -1 at 5, 4 at none and -6 at all."""
    k, values = torch.tensor([4, 5, 0, 10]), [0.0, -1.0, 4.0, -6.0]
    w = np.array([(1 + math.tanh(u)) / 2 for u in values])
    close(gairat(k.double(), 10), w / w.mean())
    assert gairat(k, 10).dtype == torch.float32
    close(gairat(k, 10).double(), w / w.mean(), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 7, 10, 20])
def test_gairat_is_lps_tanh_of_samples(steps):
    k = (steps * torch.rand(9, generator=seeded())).double()
    close(gairat(k, steps), reweight.lps_tanh(k, steps, shift=-1.0))
    for shift in (0.5, -500.0):
        close(gairat(k, steps, shift=shift), reweight.lps_tanh(k, steps, shift=shift))
    assert gairat(k, steps).mean().item() == pytest.approx(1)
    assert torch.equal(gairat(torch.tensor([1]), steps), torch.ones(1))


def test_gairat_does_not_round_half_of_an_odd_number_of_steps():
    """At 3.5 of 7 steps the ramp is at its middle; with int(7 / 2) it would be past it."""
    w = gairat(vector(3.5, 7.0), 7, shift=0.0)
    assert (w[1] / w[0]).item() == pytest.approx((1 + math.tanh(-5)) / 1)


# CFA


def test_cfa_by_hand():
    r = vector(0.0, 0.25, 1.0, nan)
    close(cfa_margins(r), [0.5, 0.75, 1.5, 1.0])
    close(cfa_margins(r, base=0.3), [0.3, 0.55, 1.3, 1.0])
    close(cfa_mixing(r, beta=4.0), [2 / 3, 3 / 4, 6 / 7, 4 / 5])
    close(cfa_mixing(r, beta=4.0, base=0.0), [0, 1 / 2, 4 / 5, 4 / 5])
    close(cfa_mixing(r, beta=0.0), [0.0] * 4)


def test_cfa_favours_the_easy_class_and_is_trades_for_an_absent_one():
    """Without accuracies both are plain TRADES: the radius as it is, and 6 / (1 + 6) of KL."""
    absent = torch.full((10,), nan)
    assert torch.equal(cfa_margins(absent), torch.ones(10))
    close(cfa_mixing(absent.double(), beta=6.0), [6 / 7] * 10)
    r = torch.linspace(0, 1, 100)
    for f in (cfa_margins, partial(cfa_mixing, beta=6.0)):
        assert bool((f(r).diff() > 0).all())
        assert torch.equal(f(torch.full((3,), 0.4)), f(torch.full((3,), 0.4))[[0, 0, 0]])


# FAAL


def divergence(p):
    """KL(U || p)."""
    return float(-np.log(len(p) * np.asarray(p, dtype=float)).mean())


@pytest.mark.parametrize("k", [2, 10, 100])
@pytest.mark.parametrize("radius", [1e-10, 0.01, 0.5, 5.0])
def test_kl_ball_is_on_the_sphere_and_of_the_closed_form(k, radius):
    a = torch.randn(k, generator=seeded(k), dtype=torch.float64)
    p = kl_ball(a, radius=radius)
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    assert bool((p > 0).all())
    assert divergence(p) == pytest.approx(radius, abs=1e-14, rel=1e-11)
    # 1 / p = (mu - a) / nu is a straight line in a that falls.
    slope = (1 / p).diff() / a.diff()
    torch.testing.assert_close(slope, slope[:1].expand(k - 1), rtol=1e-5, atol=0)
    assert slope[0] < 0


@pytest.mark.parametrize("k", [2, 3, 5, 10])
@pytest.mark.parametrize("radius", [0.05, 0.5, 2.0])
def test_kl_ball_agrees_with_a_general_solver(k, radius):
    a = torch.randn(k, generator=seeded(7 * k), dtype=torch.float64)
    p = kl_ball(a, radius=radius)
    found = minimize(
        lambda q: -q @ a.numpy(),
        np.full(k, 1 / k),
        method="SLSQP",
        bounds=[(1e-9, 1)] * k,
        constraints=[
            {"type": "eq", "fun": lambda q: q.sum() - 1},
            {"type": "ineq", "fun": lambda q: radius + np.log(k * q).mean()},
        ],
        options={"ftol": 1e-12, "maxiter": 1000},
    )
    assert found.success
    assert (p @ a).item() == pytest.approx(-found.fun, abs=1e-6)
    close(p, found.x, atol=1e-4)


def test_kl_ball_by_hand():
    """K = 2: KL = -log(4 p q) / 2, so p q = exp(-2 r) / 4."""
    p = (1 + math.sqrt(1 - math.exp(-1))) / 2
    close(kl_ball(vector(-3.0, 8.0)), [1 - p, p])


def test_one_of_ten_classes_reaches_0_575_at_faals_radius():
    """The most that one can have: for a given p_0, equal others are nearest to uniform."""
    most = brentq(lambda q: divergence([q, *[(1 - q) / 9] * 9]) - 0.5, 0.1, 0.99, xtol=1e-14)
    assert most == pytest.approx(0.5748, abs=5e-5)
    p = kl_ball(vector(1.0, *[0.0] * 9))
    close(p, [most, *[(1 - most) / 9] * 9])
    # Two worst classes share.
    p = kl_ball(vector(0.0, 1.0, 1.0, *[0.0] * 7))
    assert p[1] == p[2] < most / 1.5


def test_kl_ball_is_uniform_without_radius_or_differences():
    for k in (2, 10, 100):
        close(kl_ball(torch.arange(k).double(), radius=0.0), [1 / k] * k)
        for value in (-1.0, 0.0, 3.0, nan):
            close(kl_ball(torch.full((k,), value, dtype=torch.float64)), [1 / k] * k)
    # The mean of three times 0.1 rounds to more than 0.1.
    close(kl_ball(vector(0.1, 0.1, 0.1, nan)), [0.25] * 4)


def test_kl_ball_does_not_depend_on_shift_and_scale():
    a = vector(0.1, -0.4, 0.35, 0.0)
    for other in (a + 50, a * 1e-6, a * 1e6 - 3):
        close(kl_ball(other), kl_ball(a), atol=1e-6)


def test_kl_ball_of_an_extreme_radius_is_a_distribution():
    """At 1e5, all but the worst class are below the smallest float64."""
    close(kl_ball(vector(0.0, 1.0, 0.5), radius=1e5), [0.0, 1.0, 0.0])
    close(kl_ball(vector(0.0, 1.0, 0.5), radius=1e-300), [1 / 3] * 3)


def test_kl_ball_gives_an_absent_class_what_the_mean_score_would_get():
    a = vector(-0.6, nan, -0.2, -0.1)
    close(kl_ball(a), kl_ball(vector(-0.6, -0.3, -0.2, -0.1)))
    least = kl_ball(a.nan_to_num(nan=-1.0))
    assert least.argmin() == 1
    assert least[1] < kl_ball(a)[1]


def test_kl_ball_does_not_take_an_absent_class_for_the_worst():
    """Under the release's sum over samples it has the score 0, above all that are negative."""
    a = torch.full((100,), -0.3, dtype=torch.float64)
    a[0], a[1:40] = -0.1, nan
    p = kl_ball(a)
    assert p.argmax() == 0
    released = kl_ball(a.nan_to_num(nan=0.0))
    assert released.argmax() == 1
    assert p[1:40].sum() < 0.4 < 0.7 < released[1:40].sum()


def test_kl_ball_passes_no_gradient():
    assert not kl_ball(vector(0.1, 0.2).requires_grad_()).requires_grad


# DAFA


def dafa(p, strength):
    """The formula, written out."""
    k = len(p)
    w = np.ones(k)
    for i in range(k):
        for j in range(k):
            if p[i][i] < p[j][j]:
                w[i] += strength * p[i][j] * p[j][j]
            elif p[i][i] > p[j][j]:
                w[i] -= strength * p[j][i] * p[i][i]
    return w


@pytest.mark.parametrize("k", [2, 10, 100])
@pytest.mark.parametrize("strength", [0.0, 1.0, 1.5])
def test_confusion_weights_are_the_formula_and_sum_to_k(k, strength):
    p = torch.randn(k, k, generator=seeded(k), dtype=torch.float64)
    p = (p + 3 * torch.eye(k)).softmax(dim=1)
    w = confusion_weights(p, strength=strength)
    close(w, dafa(p.tolist(), strength))
    assert w.sum().item() == pytest.approx(k, abs=1e-10)


def test_confusion_weights_by_hand():
    p = torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.6, 0.3], [0.1, 0.0, 0.9]], dtype=torch.float64)
    # 1 gives 0 .4 * .6, 2 gives 0 .2 * .9 and 1 .3 * .9.
    close(confusion_weights(p), [1 + 0.24 + 0.18, 1 - 0.24 + 0.27, 1 - 0.18 - 0.27])


def test_equal_classes_exchange_nothing():
    """The release's else branch takes from both, and the sum is less than K."""
    for k in (2, 10, 100):
        p = torch.full((k, k), 0.5 / (k - 1), dtype=torch.float64).fill_diagonal_(0.5)
        close(confusion_weights(p), [1.0] * k)
    p = torch.tensor([[0.5, 0.5, 0.0], [0.3, 0.5, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
    close(confusion_weights(p), [1.0, 1 + 0.2 * 0.8, 1 - 0.2 * 0.8])


def test_confusion_weights_leave_an_absent_class_out():
    p = torch.tensor([[0.5, 0.3, 0.2], [nan, nan, nan], [0.1, 0.1, 0.8]], dtype=torch.float64)
    close(confusion_weights(p), [1 + 0.2 * 0.8, 1, 1 - 0.2 * 0.8])
    close(confusion_weights(torch.full((3, 3), nan, dtype=torch.float64)), [1.0] * 3)


def test_a_weight_of_0_or_less_is_refused_with_the_largest_strength():
    """Nine classes that are all taken for the tenth."""
    p = torch.zeros(10, 10, dtype=torch.float64)
    p[:, 9], p[9, 9] = 0.8, 1.0
    p += torch.diag(vector(*[0.2] * 9, 0.0))
    assert dafa(p.tolist(), 1.0)[9] == pytest.approx(-6.2)
    with pytest.raises(ValueError, match=r"`strength` below 0\.138889 .* class 9 the weight -6\.2"):
        confusion_weights(p)
    assert confusion_weights(p, strength=0.1388).min() > 0
    with pytest.raises(ValueError, match="the weight 0"):  # exactly
        confusion_weights(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rules_keep_the_dtype(dtype):
    a = vector(0.2, 0.5, 0.9, dtype=dtype)
    for f in (cfa_margins, partial(cfa_mixing, beta=6.0), kl_ball, partial(gairat, steps=1)):
        assert f(a).dtype == dtype
        close(f(a).double(), f(a.double()), atol=0.01)
    p = torch.randn(100, 100, generator=seeded()).softmax(dim=1)
    if dtype != torch.bfloat16:  # its rows sum to 1 only within 1 %
        assert confusion_weights(p.to(dtype)).dtype == dtype


# FRL


def cost_sensitive(lam):
    """FRL's weights of sum 1, written out."""
    k = len(lam)
    return [
        1 / k + (k - 1) / k * lam[i] - sum(lam[j] for j in range(k) if j != i) / k for i in range(k)
    ]


class PlainFRL:
    """The update in NumPy, all classes present."""

    def __init__(self, k):
        self.lam = np.zeros((3, k))

    def update(self, clean, robust, d0, d1, rate, limit, margin_rate):
        error, boundary = 1 - clean, clean - robust
        g0 = error - error.mean() - d0
        g1 = boundary - boundary.mean() - d1
        self.lam += np.stack([rate * g0, 2 * rate * g1, margin_rate * g1])
        for row in self.lam[:2]:
            row[:] = np.maximum(row, 0)
            if row.sum() > limit:
                row *= limit / row.sum()


@pytest.mark.parametrize("k", [2, 10, 100])
def test_frl_is_the_formula_over_many_epochs(k):
    settings = {"clean_slack": 0.07, "boundary_slack": 0.05, "limit": 0.1, "margin_rate": 0.2}
    frl, plain, rng = FRLWeights(k, remargin=True, rate=0.3, **settings), PlainFRL(k), seeded(k)
    limited = 0
    for epoch in range(30):
        if epoch == 20:
            frl.rate /= 2
        clean = 0.5 + 0.5 * torch.rand(k, generator=rng, dtype=torch.float64)
        robust = clean * torch.rand(k, generator=rng, dtype=torch.float64)
        frl.update(clean, robust)
        rate = 0.3 if epoch < 20 else 0.15
        plain.update(clean.numpy(), robust.numpy(), 0.07, 0.05, rate, 0.1, 0.2)
        limited += np.isclose(plain.lam[:2].sum(axis=1), 0.1).sum()
        close(frl.clean_weights, k * np.array(cost_sensitive(plain.lam[0])))
        close(frl.boundary_weights, k * np.array(cost_sensitive(plain.lam[1])))
        close(frl.eps_factors, np.clip(np.exp(2 * plain.lam[2]), 0.98, 3))
        for w in (frl.clean_weights, frl.boundary_weights):
            assert w.mean().item() == pytest.approx(1)
            assert w.min() >= 0.9 - 1e-12
    assert limited >= 5


def test_frl_by_hand():
    frl = FRLWeights(3, rate=1.0, clean_slack=0.1, boundary_slack=0.0, limit=0.5)
    close(frl.clean_weights, [1.0] * 3)
    frl.update(vector(0.9, 0.9, 0.6), vector(0.8, 0.7, 0.3))
    # e - mean - d0 = (-.2, -.2, .1), b - mean - d1 = (-.1, 0, .1), twice the rate.
    close(frl.clean_multipliers, [0.0, 0.0, 0.1])
    close(frl.boundary_multipliers, [0.0, 0.0, 0.2])
    close(frl.clean_weights, [0.9, 0.9, 1.2])
    close(frl.boundary_weights, [0.8, 0.8, 1.4])
    close(frl.eps_factors, [1.0] * 3)  # without remargin


def test_frl_is_ones_while_no_class_errs_much_more_than_the_average():
    frl = FRLWeights(10)
    for _ in range(50):
        frl.update(torch.full((10,), 0.8), torch.full((10,), 0.3))
        frl.update(torch.linspace(0.75, 0.85, 10), torch.linspace(0.3, 0.35, 10))
    close(frl.clean_weights, [1.0] * 10)
    close(frl.boundary_weights, [1.0] * 10)


@pytest.mark.parametrize("limit", [0.0, 0.5, 0.9, 1.0])
def test_frl_weights_are_never_negative(limit):
    """w_c = 1 + K lambda_c - sum lambda >= 1 - limit: a larger limit is refused."""
    rng = seeded()
    frl = FRLWeights(7, rate=10.0, clean_slack=0.0, boundary_slack=0.0, limit=limit)
    for _ in range(50):
        clean = torch.rand(7, generator=rng)
        frl.update(clean, clean * torch.rand(7, generator=rng))
        for w in (frl.clean_weights, frl.boundary_weights):
            assert w.min() >= max(0.0, 1 - limit - 1e-12)
            assert w.mean().item() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"`limit` in \[0, 1\]"):
        FRLWeights(7, limit=1.01)


@pytest.mark.parametrize(("limit", "rate"), [(0.0, 5e-324), (0.0, 0.1), (5e-324, 1e-310)])
def test_frl_of_the_smallest_numbers_is_ones(limit, rate):
    frl = FRLWeights(3, clean_slack=0.0, boundary_slack=0.0, limit=limit, rate=rate)
    frl.update(torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.8, 0.1, 0.05]))
    assert frl.clean_weights.tolist() == frl.boundary_weights.tolist() == [1, 1, 1]


def test_frl_margins_are_cut_off():
    frl = FRLWeights(2, remargin=True, margin_rate=0.5, boundary_slack=0.07)
    clean, robust = vector(0.9, 0.9), vector(0.8, 0.1)  # b - mean - d1 = (-.42, .28)
    frl.update(clean, robust)
    close(frl.eps_factors, [0.98, math.exp(0.28)])
    for _ in range(5):
        frl.update(clean, robust)
    close(frl.margin_multipliers, [-6 * 0.21, 6 * 0.14])
    close(frl.eps_factors, [0.98, 3.0])


def test_frl_leaves_the_multipliers_of_an_absent_class_and_the_means_to_the_others():
    frl = FRLWeights(3, clean_slack=0.0, boundary_slack=0.0, rate=0.5, remargin=True)
    frl.update(vector(0.9, 0.5, 0.7), vector(0.8, 0.1, 0.5))
    before = frl.state_dict()
    frl.update(vector(0.9, nan, 0.5), vector(0.5, nan, 0.3))
    other = FRLWeights(2, clean_slack=0.0, boundary_slack=0.0, rate=0.5, remargin=True)
    other.update(vector(0.9, 0.7), vector(0.8, 0.5))
    close(before["clean_multipliers"], [0.0, 0.1, 0.0])
    close(frl.clean_multipliers, [0.0, 0.1, 0.1])
    close(frl.boundary_multipliers[1], before["boundary_multipliers"][1])
    close(frl.margin_multipliers[1], before["margin_multipliers"][1])
    # Absent under attack alone is absent.
    state = frl.state_dict()
    frl.update(vector(0.9, 0.0, 0.9), vector(0.5, nan, 0.5))
    close(frl.clean_multipliers, state["clean_multipliers"])


def test_frl_continues_from_its_state_and_its_changed_rate():
    rng = seeded()
    accuracies = [torch.rand(2, 4, generator=rng).sort(dim=0, descending=True)[0] for _ in range(6)]
    frl, again = FRLWeights(4, remargin=True), FRLWeights(4, remargin=True)
    for pair in accuracies[:3]:
        frl.update(*pair)
    frl.rate = 0.4
    state = frl.state_dict()
    again.load_state_dict(state)
    for value in state.values():
        value.zero_()
    for pair in accuracies[3:]:
        frl.update(*pair)
        again.update(*pair)
    assert again.rate == 0.4
    for name in ("clean_weights", "boundary_weights", "eps_factors"):
        close(getattr(again, name), getattr(frl, name))
    assert frl.clean_weights.max() > 1.01


def test_a_failed_frl_update_changes_nothing():
    frl = FRLWeights(2)
    with pytest.raises(ValueError, match="robust_accuracy"):
        frl.update(vector(0.9, nan), vector(nan, 0.5))
    frl.rate = -1.0
    with pytest.raises(ValueError, match="`rate`"):
        frl.update(vector(0.9, 0.1), vector(0.5, 0.0))
    close(frl.clean_multipliers, [0.0, 0.0])


# WAT


@pytest.mark.parametrize("k", [2, 10, 100])
def test_hedge_is_the_exponential_of_the_running_sums(k):
    hedge, rng, sums = HedgeWeights(k), seeded(k), np.zeros(k + 1)
    close(hedge.class_weights, [1.0] * k)
    assert hedge.average_weight == 1.0
    for _ in range(5):
        losses = 6 * torch.rand(k, generator=rng, dtype=torch.float64)
        hedge.update(losses, losses.mean().item())
        sums += [*losses.tolist(), losses.mean().item()]
        expected = k * np.exp(0.1 * sums) / np.exp(0.1 * sums).sum()
        close(hedge.class_weights, expected[:-1])
        assert hedge.average_weight == pytest.approx(expected[-1])
        assert hedge.class_weights.sum().item() + hedge.average_weight == pytest.approx(k)


def test_hedge_does_not_overflow():
    """A sum of 10,000 losses of 6 is far beyond exp(709)."""
    hedge = HedgeWeights(10, rate=0.1)
    losses = torch.full((10,), 6.0, dtype=torch.float64)
    for _ in range(10_000):
        hedge.update(losses, 6.0)
    close(hedge.class_weights, [10 / 11] * 10)
    for _ in range(10_000):
        hedge.update(losses + torch.arange(10), 10.5)
    close(hedge.class_weights, [*[0.0] * 9, 10.0])
    assert hedge.average_weight == 0.0


def test_hedge_keeps_the_ratio_of_an_absent_class_to_the_average():
    """Adding a loss of 0 for it would make it the easiest class of all."""
    hedge = HedgeWeights(3, rate=1.0)
    hedge.update(vector(1.0, 2.0, 3.0), 2.0)
    ratio = hedge.class_weights[2].item() / hedge.average_weight
    assert ratio == pytest.approx(math.e)
    for _ in range(20):
        hedge.update(vector(1.0, 3.0, nan), 2.0)
        assert hedge.class_weights[2].item() / hedge.average_weight == pytest.approx(ratio)
    close(hedge.excess, [-21.0, 20.0, 1.0])


def test_hedge_refuses_losses_of_no_class():
    hedge = HedgeWeights(2)
    with pytest.raises(ValueError, match=r"^HedgeWeights\.update: expected `class_losses`"):
        hedge.update(vector(nan, nan), 1.0)
    assert hedge.updates == 0


def test_hedge_continues_from_its_state():
    hedge, again = HedgeWeights(3), HedgeWeights(3)
    again.load_state_dict(hedge.state_dict())
    close(again.class_weights, [1.0] * 3)
    hedge.update(vector(1.0, 2.0, 6.0), 3.0)
    state = hedge.state_dict()
    again.load_state_dict(state)
    state["excess"].zero_()
    for h in (hedge, again):
        h.update(vector(2.0, nan, 1.0), 1.5)
    close(again.class_weights, hedge.class_weights)
    assert again.average_weight == hedge.average_weight
    assert again.updates == 2


def test_states_take_no_gradient_and_weigh_by_label():
    losses = vector(1.0, 3.0).requires_grad_()
    hedge = HedgeWeights(2)
    hedge.update(losses, 2.0)
    assert not hedge.class_weights.requires_grad
    targets, per_sample = torch.tensor([0, 1, 1]), torch.tensor([1.0, 2.0, 4.0])
    w = hedge.class_weights.to(per_sample)
    loss = (w[targets] * per_sample).mean() + hedge.average_weight * per_sample.mean()
    assert loss.item() == pytest.approx(
        ((w[0] + 6 * w[1]) / 3).item() + hedge.average_weight * 7 / 3
    )
