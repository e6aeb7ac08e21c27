"""What goes with the losses of robust distillation, by hand, and against the bugs of the releases."""

import math

import numpy as np
import pytest
import torch

from ferdlib import losses, reweight


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("temperatures", "class_losses", "keywords", "by_hand"),
    [
        ([1, 1, 1], [1, 2, 6], {}, [1 + 0.2 / 3, 1 + 0.1 / 3, 0.9]),  # gaps -2, -1, 3
        ([1, 2, 3], [1, 2, 6], {"rate": 0.3}, [1.2, 2.1, 2.7]),
        ([0.55, 4.95], [2, 1], {}, [0.5, 5.0]),
        ([1, 1], [2, 1], {"rate": 1.0, "low": 0.7, "high": 1.5}, [0.7, 1.5]),
        ([1, 1], [2, 1], {"rate": 0.0}, [1, 1]),
        ([1, 7, 1, 1], [1, math.nan, 2, 6], {}, [1 + 0.2 / 3, 7, 1 + 0.1 / 3, 0.9]),
        ([1, 2, 7], [3, 3, 3], {}, [1, 2, 7]),
        ([1, 2, 7], [0.1, 0.1, 0.1], {}, [1, 2, 7]),  # their mean rounds to more than 0.1
        ([1, 2, 7], [math.nan, 5, math.nan], {}, [1, 2, 7]),
        ([1, 2, 7], [math.nan] * 3, {}, [1, 2, 7]),
    ],
)
def test_class_temperatures_by_hand(temperatures, class_losses, keywords, by_hand):
    tau, means = vector(*temperatures), vector(*class_losses)
    new = losses.class_temperatures(tau, means, **keywords)
    np.testing.assert_allclose(new, by_hand, rtol=1e-12)
    assert tau.tolist() == temperatures
    assert new is not tau
    single = losses.class_temperatures(tau.float(), means, **keywords)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, new.float())


def test_class_sizes_do_not_move_temperatures():
    targets = torch.tensor([0] * 90 + [1] * 9 + [2])
    mean = reweight.ClassMean(3)
    mean.update(torch.full((100,), 0.75), targets)
    ones = torch.ones(3)
    assert torch.equal(losses.class_temperatures(ones, mean.compute()), ones)
    by_sums = losses.class_temperatures(ones, mean.sums)  # the release
    assert by_sums.argmin() == 0
    assert by_sums[0].item() == pytest.approx(0.9)


@pytest.mark.parametrize("exponent", [1.0, 2.0, 0.5, 0.0])
def test_balance_is_the_recurrence(exponent):
    history = np.random.default_rng(0).uniform(0.1, 3, (9, 2))
    balance = losses.MTARDBalance(rate=0.3, exponent=exponent)
    w = 0.5
    for step, (adv, clean) in enumerate(history):
        if step == 5:
            balance.rate *= 0.1
        rate = 0.3 if step < 5 else 0.03
        x_adv, x_nat = (adv / history[0, 0]) ** exponent, (clean / history[0, 1]) ** exponent
        w = w - rate * (w - x_nat / (x_adv + x_nat))
        adv_weight, clean_weight = balance.update(vector(adv)[0], vector(clean)[0])
        assert clean_weight.item() == pytest.approx(w, rel=1e-12)
        assert adv_weight.item() == pytest.approx(1 - w, rel=1e-12)
        assert torch.equal(balance.clean_weight, clean_weight)
        assert torch.equal(balance.adv_weight, adv_weight)
    assert balance.initial_losses.tolist() == history[0].tolist()


def test_balance_starts_even_and_favours_what_has_come_less_far():
    balance = losses.MTARDBalance()
    assert balance.rate == 0.025
    assert balance.adv_weight == balance.clean_weight == 0.5
    assert balance.update(torch.tensor(9.0), torch.tensor(0.1)) == (0.5, 0.5)
    adv_weight, clean_weight = balance.update(torch.tensor(9.0), torch.tensor(0.05))
    assert adv_weight > 0.5 > clean_weight


def test_balance_continues_from_its_state():
    history = torch.rand(8, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    first = losses.MTARDBalance(rate=0.4)
    second = losses.MTARDBalance()
    second.load_state_dict(first.state_dict())  # before the first update, too
    for adv, clean in history[:4]:
        assert first.update(adv, clean) == second.update(adv, clean)
    first.rate = 0.2
    state = first.state_dict()
    assert {type(value) for value in state.values()} == {torch.Tensor, float}
    third = losses.MTARDBalance()
    third.load_state_dict(state)
    assert third.rate == 0.2
    for adv, clean in history[4:]:
        assert first.update(adv, clean) == third.update(adv, clean)
    assert first.clean_weight != state["clean_weight"]  # a copy was saved


def test_balance_of_degenerate_losses():
    for first in (0.0, -1e-9, math.nan, math.inf):
        for pair in ((first, 1.0), (1.0, first)):
            balance = losses.MTARDBalance()
            with pytest.raises(ValueError, match="expected .* at the first update"):
                balance.update(*map(torch.tensor, pair))
            assert balance.update(torch.tensor(1.0), torch.tensor(1.0)) == (0.5, 0.5)
    balance = losses.MTARDBalance(rate=0.5, exponent=0.5)
    balance.update(torch.tensor(1.0), torch.tensor(1.0))
    assert balance.update(torch.tensor(0.0), torch.tensor(1.0)) == (0.25, 0.75)
    for nothing in ((0.0, 0.0), (math.nan, 1.0), (1.0, math.inf)):
        assert balance.update(*map(torch.tensor, nothing)) == (0.25, 0.75)
    # Rounded to below 0, whose square root would be nan.
    assert balance.update(torch.tensor(1.0), torch.tensor(-1e-9)) == (0.625, 0.375)


def test_balance_is_cut_from_the_graph():
    adv = torch.tensor(2.0, requires_grad=True)
    balance = losses.MTARDBalance()
    for weight in (*balance.update(adv, adv.detach()), *balance.update(adv * 2, adv)):
        assert not weight.requires_grad
        assert weight.dtype == torch.float64


def test_a_step_reads_nothing_back():
    # A meta tensor has no values: whatever reads one, as a host does an accelerator's, raises.
    balance = losses.MTARDBalance()
    balance.update(torch.tensor(1.0), torch.tensor(2.0))
    loss = torch.tensor(1.0, device="meta")
    w, _ = balance.update(loss, loss)
    z = torch.zeros(3, 4, device="meta")
    value = losses.mtard(z, z, z, z, adv_weight=w)
    targets = torch.zeros(3, dtype=torch.int64, device="meta")
    assert losses.class_variance(value, targets, num_classes=4).shape == ()
    with pytest.raises(RuntimeError):
        losses.MTARDBalance().update(loss, loss)


def test_the_balance_weighs_the_loss_in_its_own_dtype():
    z = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    value = losses.mtard(*z, adv_weight=losses.MTARDBalance().adv_weight)
    assert value.dtype == torch.float32
    assert torch.equal(value, losses.mtard(*z))


@pytest.mark.parametrize("k", [2, 10, 100])
@pytest.mark.parametrize("ddof", [0, 1])
def test_class_variance_is_the_variance_of_the_class_means(k, ddof):
    rng = np.random.default_rng(k)
    values, targets = rng.normal(size=37), rng.integers(k, size=37)
    means = [values[targets == c].mean() for c in range(k) if (targets == c).any()]
    found = losses.class_variance(
        torch.tensor(values), torch.tensor(targets), num_classes=k, ddof=ddof
    )
    assert found.ndim == 0
    assert found.item() == pytest.approx(np.var(means, ddof=ddof), rel=1e-12)


def test_equal_losses_of_present_classes_cost_nothing():
    values, targets = torch.full((20,), 3.0), torch.arange(20) % 10
    assert losses.class_variance(values, targets, num_classes=10).item() == 0
    assert losses.class_variance(values, targets, num_classes=100).item() == 0
    # The release: 100 slots, where the 90 empty ones are losses of 0.
    slots = torch.zeros(100).index_add(0, targets, values / 2)
    assert slots.var().item() == pytest.approx(3.0**2 / 11)


@pytest.mark.parametrize(("classes", "ddof"), [([3], 1), ([3], 0), ([], 1), ([0, 1], 2)])
def test_class_variance_of_too_few_classes_is_0(classes, ddof):
    targets = torch.tensor(classes * 2, dtype=torch.int64)
    values = torch.arange(len(targets), dtype=torch.float64).requires_grad_()
    found = losses.class_variance(values, targets, num_classes=5, ddof=ddof)
    (gradient,) = torch.autograd.grad(found, values)
    assert found.item() == 0
    assert not gradient.any()


def test_class_variance_reweights_the_classes():
    a = 0.3
    values = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values.requires_grad_()
    targets = torch.tensor([0] * 15 + [2] * 9 + [4] * 5 + [6])
    objective = values.mean() + a * losses.class_variance(values, targets, num_classes=9)
    (gradient,) = torch.autograd.grad(objective, values)
    counts = torch.bincount(targets, minlength=9).double()
    means = torch.zeros(9, dtype=torch.float64).index_add(0, targets, values.detach()) / counts
    weights = counts / 30 + 2 * a * (means - means[counts > 0].mean()) / 3
    torch.testing.assert_close(gradient, (weights / counts)[targets])


def test_class_variance_derivative_and_precision():
    targets = torch.tensor([0, 0, 2, 2, 2, 4])
    values = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.autograd.gradcheck(
        lambda v: losses.class_variance(v, targets, num_classes=6), values.requires_grad_()
    )
    half = losses.class_variance(values.detach().half(), targets, num_classes=6)
    assert half.dtype == torch.float32


def test_a_refused_state_or_rate_changes_nothing():
    balance = losses.MTARDBalance()
    one, state = torch.tensor(1.0), balance.state_dict()
    for wrong, kind in [
        ({}, ValueError),
        (state | {"clean_weight": 0.5}, TypeError),
        (state | {"initial_losses": torch.ones(3)}, ValueError),
        (state | {"rate": 2.0}, ValueError),
    ]:
        with pytest.raises(kind, match=r"^MTARDBalance\.load_state_dict: expected `"):
            balance.load_state_dict(wrong)
    balance.rate = -1.0
    with pytest.raises(ValueError, match=r"^MTARDBalance\.update: expected `rate`"):
        balance.update(one, one)
    assert balance.clean_weight == 0.5
    assert balance.initial_losses.shape == (0,)
