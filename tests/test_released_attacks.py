"""The attacks of the papers' releases, written out, against the calls of docs/how-to/coming-from.md."""

import copy

import pytest
import torch
import torch.nn.functional as F

from ferdlib import losses
from ferdlib.attacks import cw_linf, least_pgd_steps, pgd
from ferdlib.models import small_cnn


@pytest.fixture(scope="module")
def batch():
    """Images away from 0 and 1, where an unclipped start would matter, labels, a start, the teacher's logits."""
    rng = torch.Generator().manual_seed(0)
    x = 0.05 + 0.9 * torch.rand(16, 1, 8, 8, generator=rng, dtype=torch.float64)
    y = torch.randint(10, (16,), generator=rng)
    start = 8 / 255 * (2 * torch.rand(x.shape, generator=rng, dtype=torch.float64) - 1)
    return x, y, start, torch.randn(16, 10, generator=rng, dtype=torch.float64)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return small_cnn(1, 10, width=4).double().eval()


def released(net, x, start, objective, y, *, step_size, epsilon, steps):
    x_adv, correct = x + start, torch.zeros_like(y)
    for _ in range(steps):
        x_adv.requires_grad_()
        z = net(x_adv)
        correct += z.argmax(dim=1) == y
        (gradient,) = torch.autograd.grad(objective(z), x_adv)
        x_adv = x_adv.detach() + step_size * gradient.sign()
        x_adv = x_adv.clamp(x - epsilon, x + epsilon).clamp(0, 1)
    return x_adv, correct


def test_rslads_inner_loss_is_pgd_on_distillation(net, batch):
    x, y, start, reference = batch
    target, ball = F.softmax(reference, dim=1), {"step_size": 0.003, "steps": 10}

    def divergence(z):
        return F.kl_div(F.log_softmax(z, dim=1), target, reduction="sum")

    theirs, _ = released(net, x, 0.03 * start, divergence, y, epsilon=0.031, **ball)
    ball |= {"loss": losses.distillation, "random_start": 0.03 * start}
    assert torch.allclose(pgd(net, x, reference, eps=0.031, **ball), theirs)


def test_fair_ards_attack_is_least_pgd_steps_in_train_mode(net, batch):
    x, y, start, _ = batch
    net.train()
    ball = {"step_size": 2 / 255, "steps": 10}

    def cross_entropy(z):
        return F.cross_entropy(z, y, reduction="sum")

    copied = copy.deepcopy(net)
    theirs, kappa = released(copied, x, start, cross_entropy, y, epsilon=8 / 255, **ball)
    ball |= {"count": "correct", "train_mode": True, "random_start": start}
    ours, steps = least_pgd_steps(net, x, y, **ball)
    assert torch.allclose(ours, theirs)
    assert torch.equal(steps, kappa)


def test_fair_ards_cw_is_cw_linf(net, batch):
    x, y, start, _ = batch
    onehot = F.one_hot(y, 10)

    def carlini_wagner(z):
        real, other = (onehot * z).sum(dim=1), ((1 - onehot) * z - 10000 * onehot).amax(dim=1)
        return -(real - other + 50).clamp(min=0).sum()

    ball = {"step_size": 2 / 255, "epsilon": 8 / 255, "steps": 20}
    theirs, _ = released(net, x, start, carlini_wagner, y, **ball)
    assert torch.allclose(cw_linf(net, x, y, random_start=start), theirs)
