"""The fairness-aware average: what it averages, when, and that the model is only read."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ferdlib.methods import FairAverage

FAIR, UNFAIR = torch.tensor([0.9, 0.5]), torch.tensor([0.9, 0.1])


def make_model(seed=0):
    """Weights, BatchNorm's float and integer buffers, a bool and a non-persistent buffer."""
    rng = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
    model.register_buffer("flag", torch.tensor(True))
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    return change(model, rng)


def change(model, rng):
    """Other weights and statistics, as after an epoch."""
    statistics = [model[1].running_mean, model[1].running_var, model.scratch]
    with torch.no_grad():
        for value in [*model.parameters(), *statistics]:
            value.copy_(torch.rand(value.shape, generator=rng))
        model[1].num_batches_tracked += 7
    return model


def values(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_equal(model, other):
    for name, value in values(model).items():
        assert torch.equal(value, values(other)[name]), name


@pytest.mark.parametrize("decay", [0.7, 0.0, 1.0])
def test_the_average_is_the_formula_for_weights_and_buffers(decay):
    model, rng = make_model(), torch.Generator().manual_seed(1)
    average, expected = FairAverage(model, decay=decay), None
    for _ in range(5):
        change(model, rng)
        assert average.update(model, FAIR)
        now = {name: value.detach().clone() for name, value in values(model).items()}
        expected = expected or now
        for name, value in now.items():
            if value.is_floating_point():
                value.copy_(decay * expected[name] + (1 - decay) * value)
        expected = now
    for name, value in values(average.module).items():
        torch.testing.assert_close(value.detach(), expected[name], msg=name)
    assert average.module[1].num_batches_tracked == model[1].num_batches_tracked == 42
    assert average.module.flag.dtype == torch.bool
    assert average.updates == 5


def test_the_first_average_is_a_copy_whatever_came_before():
    model, rng = make_model(), torch.Generator().manual_seed(1)
    average, start = FairAverage(model), copy.deepcopy(model)
    for _ in range(3):
        assert not average.update(change(model, rng), UNFAIR)
        assert_equal(average.module, start)
    assert average.updates == 0
    assert average.update(model, FAIR)
    assert_equal(average.module, model)
    frozen = copy.deepcopy(model)
    assert not average.update(change(model, rng), UNFAIR)
    assert_equal(average.module, frozen)


@pytest.mark.parametrize(
    ("accuracy", "threshold", "averaged"),
    [
        ([0.2, 0.9], 0.2, True),
        ([0.19, 0.9], 0.2, False),
        ([math.nan, 0.3], 0.2, True),
        ([math.nan, 0.1], 0.2, False),
        ([0.0, 0.0], 0.0, True),
        ([0.7, 0.9], 0.7, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_worst_class_decides(accuracy, threshold, averaged, dtype):
    model = nn.Linear(1, 2)
    average = FairAverage(model, threshold=threshold)
    assert average.update(model, torch.tensor(accuracy, dtype=dtype)) is averaged


def test_the_model_is_only_read():
    model = make_model().train()
    model[0].eval()
    model[3].weight.requires_grad_(False)
    model(torch.rand(2, 2, 6, 6)).sum().backward()
    before = copy.deepcopy(model)
    average = FairAverage(model)
    for accuracy in (FAIR, UNFAIR, FAIR):
        average.update(model, accuracy)
    assert_equal(model, before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for parameter, old in zip(model.parameters(), before.parameters(), strict=True):
        assert parameter.requires_grad == old.requires_grad
        assert (parameter.grad is None) == (not parameter.requires_grad)
    assert not any(m.training for m in average.module.modules())
    assert not any(p.requires_grad for p in average.module.parameters())
    with torch.no_grad():
        model[3].bias.zero_()
    assert average.module[3].bias.any()


def test_the_average_continues_from_its_state():
    model, rng = make_model(), torch.Generator().manual_seed(1)
    average, again = FairAverage(model), FairAverage(make_model(5))
    average.update(change(model, rng), FAIR)
    average.update(change(model, rng), FAIR)
    state = average.state_dict()
    again.load_state_dict(state)
    for value in state.values():
        value.zero_()
    change(model, rng)
    for a in (average, again):
        assert a.updates == 2
        a.update(model, FAIR)
    # Refused before anything is loaded, though all but one layer fits.
    other = make_model(6)
    other[3] = nn.Linear(48, 5)
    with pytest.raises(ValueError, match=r"^FairAverage.load_state_dict: .* module\.3\.weight"):
        again.load_state_dict(FairAverage(other).state_dict())
    for name, value in average.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_weight_that_a_hook_makes_is_averaged_by_what_it_is_made_of():
    """Pruned to its larger half; 0.75 * 2 + 0.25 * 6 = 3."""
    model = prune.l1_unstructured(nn.Linear(2, 1, bias=False), "weight", amount=1)
    averages = []
    for value in (2.0, 6.0):
        model.weight_orig.data.fill_(value)
        model(torch.ones(1, 2))  # the weight has a history now
        averages = averages or [FairAverage(model, decay=0.75, threshold=0.0)]
        averages[0].update(model, torch.tensor([1.0, 1.0]))
    assert float(averages[0].module(torch.ones(1, 2)).detach()) == 3.0
