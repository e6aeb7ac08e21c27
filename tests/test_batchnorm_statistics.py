"""BatchNormStatistics against NumPy, and what it leaves behind: nothing."""

import math

import pytest
import torch
from torch import nn

from ferdlib import losses
from ferdlib.bottleneck import split_at


def two_norms():
    """Conv, BN, ReLU, BN, linear, in eval mode and with running statistics of no round number."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten()
    )
    for layer in (model[1], model[3]):
        layer.running_mean.copy_(torch.randn(3))
        layer.running_var.copy_(torch.rand(3) + 0.5)
    return model.double().eval()


def batchnorm_loss(model, x):
    """Eq. 8's L_bn, layer by layer."""
    total = 0.0
    with torch.no_grad():
        z = model[0](x)
        for layer, z_l in ((model[1], z), (model[3], model[2](model[1](z)))):
            by_channel = z_l.numpy().transpose(1, 0, 2, 3).reshape(3, -1)
            mean, variance = layer.running_mean.numpy(), layer.running_var.numpy()
            total += math.sqrt(((by_channel.mean(axis=1) - mean) ** 2).sum())
            total += math.sqrt(((by_channel.var(axis=1) - variance) ** 2).sum())
    return total


def images(n=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, 2, 5, 4, generator=rng, dtype=torch.float64)


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_batchnorm_statistics_are_equation_8():
    model, x = two_norms(), images()
    with losses.BatchNormStatistics(model) as statistics:
        model(x)
        inside = statistics.loss().item()
    assert statistics.loss().ndim == 0
    assert inside == statistics.loss().item() == pytest.approx(batchnorm_loss(model, x), rel=1e-12)


def test_batchnorm_statistics_by_hand():
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()  # remembers mean 0, variance 1
    with losses.BatchNormStatistics(model) as statistics:
        model(torch.tensor([[1.0, 0.0], [7.0, 8.0]]))  # means 4 and 4, biased variances 9 and 16
    assert statistics.loss().item() == pytest.approx(math.hypot(4, 4) + math.hypot(8, 15))


def test_statistics_of_two_processes_are_those_of_both_batches():
    """Two that see the same images count twice as many, with equal statistics."""
    model, x = two_norms(), images()
    with losses.BatchNormStatistics(model, reduce=lambda total: 2 * total) as statistics:
        model(x)
    assert statistics.loss().item() == pytest.approx(batchnorm_loss(model, x), rel=1e-12)


def test_last_forward_inside_the_block_wins():
    model, first, last = two_norms(), images(), images(5, seed=1)
    with losses.BatchNormStatistics(model) as statistics:
        model(first)
        model(last)
    model(first)
    assert statistics.loss().item() == pytest.approx(batchnorm_loss(model, last), rel=1e-12)
    with statistics:
        model(first)
    assert statistics.loss().item() == pytest.approx(batchnorm_loss(model, first), rel=1e-12)


def test_hooks_live_inside_the_block_only():
    model = two_norms()
    handle = model[1].register_forward_pre_hook(lambda *_: None)  # the user's own
    with losses.BatchNormStatistics(model):
        assert hooks(model) > 1
    assert hooks(model) == 1
    with pytest.raises(ZeroDivisionError), losses.BatchNormStatistics(model):
        raise ZeroDivisionError
    assert hooks(model) == 1
    handle.remove()


def test_gradient_reaches_the_input_and_buffers_stay():
    model, x = two_norms(), images()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def loss(x):
        with losses.BatchNormStatistics(model) as statistics:
            model(x)
        return statistics.loss()

    torch.autograd.gradcheck(loss, [x.requires_grad_()])
    (gradient,) = torch.autograd.grad(loss(x), x)
    assert gradient.abs().max() > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_batchnorm_statistics_read_half_precision_in_float32():
    model = nn.Sequential(nn.BatchNorm2d(1)).bfloat16().eval()
    x = torch.full((2, 1, 8, 8), 300.0, dtype=torch.bfloat16)
    x[0] = 302.0  # mean 301 and variance 1: neither fits into bfloat16 on the way
    with losses.BatchNormStatistics(model) as statistics:
        model(x)
    assert statistics.loss().dtype == torch.float32
    assert statistics.loss().item() == pytest.approx(301.0)


class SkipsOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def forward(self, x, skip=False):
        return x if skip else self.used(x)


def test_a_batchnorm_that_is_never_reached_is_tolerated():
    model = SkipsOne().eval()
    with losses.BatchNormStatistics(model) as statistics:
        model(torch.ones(3, 2, 4, 4))
    assert statistics.loss().item() == pytest.approx(2 * math.sqrt(2))


def test_nothing_fired():
    model, message = SkipsOne().eval(), r"^BatchNormStatistics\.loss: expected a forward"
    with losses.BatchNormStatistics(model) as statistics:
        with pytest.raises(RuntimeError, match=message):
            statistics.loss()
        model(torch.ones(3, 2, 4, 4))
        model(torch.ones(3, 2, 4, 4), skip=True)  # the last forward, without BatchNorm
    with pytest.raises(RuntimeError, match=message):
        statistics.loss()


def test_models_without_statistics():
    with pytest.raises(ValueError, match="^BatchNormStatistics: expected `model` to have Batch"):
        losses.BatchNormStatistics(nn.Sequential(nn.Conv2d(1, 1, 1), nn.InstanceNorm2d(1)))
    untracked = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1, track_running_stats=False))
    with pytest.raises(ValueError, match=r"^BatchNormStatistics: .*`model` to track .*'1'"):
        losses.BatchNormStatistics(untracked)


def test_batchnorm_statistics_through_the_parts_of_split_at():
    model, x = two_norms(), images()
    features, head = split_at(model, "2")  # between the two norms
    with losses.BatchNormStatistics(model) as statistics:
        head(features(x))
    assert statistics.loss().item() == pytest.approx(batchnorm_loss(model, x), rel=1e-12)
