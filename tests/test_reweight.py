"""Reweighting rules against the papers' figures and numbers worked out by hand, and their state."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from ferdlib import reweight
from ferdlib.reweight import ClassMean, ClassWeights

nan = math.nan
MARGIN_RULES = [reweight.margin_softmax, reweight.margin_minmax]
LPS_RULES = [
    reweight.lps_power,
    partial(reweight.lps_linear, steps=10),
    partial(reweight.lps_sigmoid, steps=10),
    partial(reweight.lps_tanh, steps=10),
]
RULES = MARGIN_RULES + LPS_RULES

# The example that documents Fair-ARD's released weights: kappa, then weights raw and clipped.
KAPPA = [6.5, 8.0, 4.8, 3.2, 4.4, 5.0, 6.2, 6.8, 7.4, 7.1]
RAW = [0.66, 0.44, 1.21, 2.73, 1.44, 1.12, 0.73, 0.60, 0.51, 0.55]
CLIPPED = [5 / 6, 5 / 6, 1.21, 5 / 2, 1.44, 1.12, 5 / 6, 5 / 6, 5 / 6, 5 / 6]


def vector(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def close(actual, expected, atol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)


def test_softmax_needs_a_margin_gap_of_1_42_for_ferds_figure_4():
    """p = 0.314 for the fourth of ten classes, the other nine equal."""
    margins = torch.full((10,), 2.0, dtype=torch.float64)
    margins[3] -= math.log(0.314 * 9 / 0.686)
    p = reweight.margin_softmax(margins)
    close(p, [0.686 / 9 if c != 3 else 0.314 for c in range(10)])
    floored = [(1 - 10 * 0.05) * v + 0.05 for v in (0.686 / 9, 0.314)]
    p = reweight.margin_softmax(margins, floor=0.05)
    close(p, [floored[c == 3] for c in range(10)])


def test_softmax_by_hand():
    margins = vector(0.0, math.log(3.0))
    close(reweight.margin_softmax(margins), [0.75, 0.25])
    close(reweight.margin_softmax(margins, temperature=0.5), [0.9, 0.1])
    close(reweight.margin_softmax(margins, floor=0.2), [0.65, 0.35])
    close(reweight.margin_softmax(vector(-1e6, 1e6), floor=0.1), [0.9, 0.1])


def test_minmax_by_hand():
    close(reweight.margin_minmax(vector(5.0, 2.0, -1.0)), [0.05 / 0.375, 1 / 3, 0.2 / 0.375])
    close(reweight.margin_minmax(vector(0.0, 9.0), low=0.0, high=1.0), [1.0, 0.0])


def test_minmax_at_ten_classes_stays_below_figure_4():
    margins = vector(*[7.0] * 9, -50.0)
    p = reweight.margin_minmax(margins)
    close(p, [0.05 / 0.65] * 9 + [0.2 / 0.65])
    assert 0.3076 < p.max() <= 0.3077


def test_absent_class_gets_what_the_mean_margin_would():
    close(reweight.margin_softmax(vector(0.0, nan, 2 * math.log(3.0))), vector(9, 3, 1) / 13)
    close(reweight.margin_minmax(vector(0.0, nan, 0.0, 3.0)), vector(4, 3, 4, 1) / 12)


@pytest.mark.parametrize("rule", MARGIN_RULES)
def test_margin_rules_are_uniform_without_differences(rule):
    close(rule(torch.full((4,), -3.0, dtype=torch.float64)), [0.25] * 4)
    close(rule(torch.full((4,), nan, dtype=torch.float64)), [0.25] * 4)
    # The mean of three times 0.1 rounds to more than 0.1.
    close(rule(vector(0.1, 0.1, 0.1, nan)), [0.25] * 4)


def test_power_raw_and_clipped_as_fair_ard_released_it():
    w = reweight.lps_power(vector(*KAPPA))
    close(w, RAW, atol=0.005)
    close(w.mean(), 1.0)
    clipped = reweight.normalize(w, clip=(5 / 6, 5 / 2))
    close(clipped, CLIPPED, atol=0.005)
    close(clipped.mean(), 1.128, atol=5e-4)


def test_power_by_hand():
    close(reweight.lps_power(vector(1.0, 2.0), guard=0.0), [1.6, 0.4])
    close(reweight.lps_power(vector(1.0, 2.0), guard=1.0, beta=1.0), [1.2, 0.8])
    close(reweight.lps_power(vector(3.0, 0.0, 7.0), beta=0.0), [1.0] * 3)
    close(reweight.lps_power(vector(0.0, 10.0)), [2.0, 0.0], atol=1e-10)


def test_power_neither_overflows_nor_underflows():
    steep = reweight.lps_power(vector(0.0, 0.0, 1.0, dtype=torch.float32), beta=100.0)
    assert torch.equal(steep, vector(1.5, 1.5, 0.0, dtype=torch.float32))


def test_linear_by_hand():
    close(reweight.lps_linear(vector(0.0, 2.0), 3), [4 / 3, 2 / 3])
    close(reweight.lps_linear(vector(20.0, 20.0, 0.0), 20), vector(3, 3, 63) / 23)


def test_sigmoid_and_tanh_by_hand():
    """At kappa = steps/2 both are 1/2 before normalisation, and at 0.6 steps their u is -1."""
    kappa, e = vector(5.0, 6.0), math.e
    low, lowest = 1 / (1 + e), 1 / (1 + e**2)
    sigmoid = vector(0.5, low) * 2 / (0.5 + low)
    close(reweight.lps_sigmoid(kappa, 10), sigmoid)
    close(reweight.lps_tanh(kappa, 10), vector(0.5, lowest) * 2 / (0.5 + lowest))
    close(reweight.lps_sigmoid(kappa + 1, 10, shift=1.0), sigmoid)
    close(reweight.lps_tanh(kappa + 1, 10, shift=1.0), vector(0.5, lowest) * 2 / (0.5 + lowest))
    extreme = reweight.lps_tanh(kappa, 10, shift=-500.0)
    close(extreme, vector(1, e**-2) * 2 / (1 + e**-2))


@pytest.mark.parametrize("rule", LPS_RULES)
def test_lps_rules_are_ones_without_differences_and_for_absent_classes(rule):
    close(rule(torch.full((4,), 3.7, dtype=torch.float64)), [1.0] * 4)
    close(rule(torch.full((4,), nan, dtype=torch.float64)), [1.0] * 4)
    two = rule(vector(2.0, 5.0))
    assert two[0] > 1.1 > 0.9 > two[1]
    close(rule(vector(2.0, nan, 5.0)), [two[0], 1.0, two[1]])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rules_keep_the_dtype_and_favour_the_harder_class(rule, dtype):
    statistic = vector(1.0, 4.0, 8.0, dtype=dtype)
    w = rule(statistic)
    assert w.dtype == dtype
    assert w[0] > w[1] > w[2]
    assert torch.equal(statistic, vector(1.0, 4.0, 8.0, dtype=dtype))
    total = 1.0 if rule in MARGIN_RULES else 3.0
    assert w.double().sum().item() == pytest.approx(total, abs=0.005)


def test_a_rounded_moving_average_at_the_limit_is_accepted():
    close(reweight.lps_linear(vector(0.0, 3.0 + 1e-12), 3), [1.6, 0.4], atol=1e-9)


def test_normalize():
    w = vector(1.0, 3.0, 0.0, 4.0)
    close(reweight.normalize(w), [0.5, 1.5, 0.0, 2.0])
    close(reweight.normalize(w, to="sum"), [0.125, 0.375, 0.0, 0.5])
    close(reweight.normalize(w, clip=(5 / 6, 1.75)), [5 / 6, 1.5, 5 / 6, 1.75])
    close(reweight.normalize(w, to="sum", clip=(0.2, 0.4)), [0.2, 0.375, 0.2, 0.4])
    huge = torch.full((3,), 3e38)
    assert torch.equal(reweight.normalize(huge), torch.ones(3))


def filled(values=(4, 1, 7), targets=(0, 0, 2), num_classes=3):
    mean = ClassMean(num_classes)
    mean.update(torch.tensor(values), torch.tensor(targets))
    return mean


def test_class_mean_divides_by_true_counts():
    mean = filled()
    close(mean.compute(), [2.5, nan, 7.0])
    mean.update(torch.tensor([0.5], requires_grad=True), torch.tensor([1]))
    close(mean.compute(), [2.5, 0.5, 7.0])
    assert not mean.compute().requires_grad
    mean.update(torch.tensor([True, False]), torch.tensor([1, 1]))
    close(mean.compute(), [2.5, 0.5, 7.0])
    mean.reset()
    close(mean.compute(), [nan, nan, nan])


def test_class_mean_accumulates_in_float64():
    mean = ClassMean(2)
    for _ in range(3):
        mean.update(torch.tensor([2.0**24, 1.0]), torch.tensor([1, 1]))
    close(mean.compute(), [nan, (2.0**24 + 1) / 2])


def test_merge_is_one_pass():
    values, targets = torch.arange(12.0).sqrt(), torch.arange(12) % 4
    whole = filled(values.tolist(), targets.tolist(), 5)
    first = filled(values[:5].tolist(), targets[:5].tolist(), 5)
    second = filled(values[5:].tolist(), targets[5:].tolist(), 5)
    first.merge(second)
    close(first.compute(), whole.compute())
    close(whole.compute()[0], (0 + 2 + math.sqrt(8)) / 3, atol=1e-6)
    assert torch.equal(second.counts, torch.tensor([1, 2, 2, 2, 0]))


def test_class_mean_state_is_a_copy_and_comes_back():
    mean, other = filled(), ClassMean(3)
    state = mean.state_dict()
    other.load_state_dict(state)
    state["sums"].zero_()
    for m in (mean, other):
        m.update(torch.tensor([10.0]), torch.tensor([0]))
        close(m.compute(), [5.0, nan, 7.0])


def test_a_value_that_is_not_finite_does_not_pass_for_an_absent_class():
    mean = filled((1.0, nan, 2.0))
    assert mean.sums[2] == 2
    with pytest.raises(ValueError, match=r"^ClassMean\.compute: expected finite `values`"):
        mean.compute()


def test_class_weights_follow_one_epoch_behind():
    w, y = ClassWeights(3, partial(reweight.lps_power, guard=0.0)), torch.tensor([0, 1, 0])
    assert torch.equal(w(torch.tensor([1, 2, 1]), y), torch.ones(3))
    w.step()
    close(w.weights, [1.6, 0.4, 1.0])
    expected = vector(1.6, 0.4, 1.6, dtype=torch.float32)
    for _ in range(2):
        torch.testing.assert_close(w(torch.tensor([2, 1, 2]), y), expected)
    assert w(vector(2.0, 1.0, 2.0), y).dtype == torch.float64
    w.step()
    close(w.weights, [0.4, 1.6, 1.0])


def test_class_weights_continue_in_the_middle_of_an_epoch():
    w, again = (ClassWeights(2, lambda kappa: 1 / kappa) for _ in range(2))
    w(torch.tensor([2.0, 4.0]), torch.tensor([0, 1]))
    w.step()
    w(torch.tensor([1.0, 8.0]), torch.tensor([0, 1]))
    again.load_state_dict(w.state_dict())
    close(again.weights, [0.5, 0.25])
    for x in (w, again):
        x(torch.tensor([3.0]), torch.tensor([0]))
        x.step()
        close(x.weights, [0.5, 0.125])


def test_class_weights_keep_a_copy_of_what_the_rule_returns():
    table = vector(3.0, 1.0)
    w = ClassWeights(2, lambda _: table)
    w(torch.tensor([1]), torch.tensor([0]))
    w.step()
    table.zero_()
    close(w.weights, [3.0, 1.0])


def test_a_failed_step_changes_nothing():
    w = ClassWeights(2, lambda kappa: -kappa)
    w(torch.tensor([1, 3]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"^ClassWeights\.step: expected `rule` to return"):
        w.step()
    close(w.weights, [1.0, 1.0])
    close(w.compute(), [1.0, 3.0])


def test_a_class_weight_needs_values_and_a_finite_rule():
    w, y = ClassWeights(2, lambda kappa: 1 / (kappa - 1)), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match=r"^ClassWeights\.step: expected `values`"):
        w.step()
    w(torch.tensor([1, 3]), y)
    with pytest.raises(ValueError, match="expected `rule` to return"):
        w.step()
    w.rule = lambda _: y
    with pytest.raises(TypeError, match="expected `rule` to return"):
        w.step()


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (partial(reweight.margin_softmax, torch.ones(49), floor=1 / 49), "floor"),
        (partial(reweight.lps_power, vector(0.0, 2.0), guard=0.0), "guard"),
        (partial(reweight.normalize, torch.zeros(3)), "w"),
    ],
)
def test_limits_that_depend_on_two_arguments(call, argument):
    with pytest.raises(ValueError, match=rf"^{call.func.__name__}: expected `{argument}`"):
        call()
