"""Attacks that leave out what is decided, beside the full run that looks at every iterate itself."""

import pytest
import torch
from torch import nn

from ferdlib import losses
from ferdlib.attacks import cw_linf, least_pgd_steps, pgd

EPS, STEP, STEPS = 0.06, 0.02, 6


def model() -> nn.Module:
    """In float64, where no sign of a gradient hangs on how a batch is cut."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 3 * 5, 4)
    )
    return net.double().eval()


def batch(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(n, 2, 5, 7, generator=rng, dtype=torch.float64)
    y = model()(x).argmax(dim=1)
    return x, torch.where(torch.arange(n) % 8 == 5, (y + 1) % 4, y)  # some are wrong from the start


def settings(**changes) -> dict:
    rng = torch.Generator().manual_seed(2)
    return {"eps": EPS, "step_size": STEP, "steps": STEPS, "rng": rng} | changes


def first_wrong(attack, net, x, y, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    """The first misclassified iterate of each sample or else the last, and its number, one by one."""
    path = []
    last = attack(net, x, y, **settings(on_step=lambda _, adv, __: path.append(adv), **changes))
    path = torch.stack([*path, last])
    found, at = last.clone(), torch.full((len(x),), len(path))
    for i in range(len(x)):
        for t, images in enumerate(path):
            if int(net(images[i : i + 1]).argmax()) != int(y[i]):
                found[i], at[i] = images[i], t
                break
    return found, at


@pytest.mark.parametrize("attack", [pgd, cw_linf])
@pytest.mark.parametrize("random_start", ["uniform", None])
def test_the_first_misclassified_iterate_is_returned(attack, random_start):
    net, (x, y) = model(), batch()
    expected, at = first_wrong(attack, net, x, y, random_start=random_start)
    found = attack(net, x, y, early_stop=True, **settings(random_start=random_start))
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert {0, 1, 2, STEPS + 1} <= set(at.tolist())  # from the start, on the way, never
    assert torch.equal(net(found).argmax(dim=1) != y, at <= STEPS)


def test_radii_and_steps_stay_with_their_samples():
    net, (x, y) = model(), batch()
    each = {
        "eps": torch.linspace(0.02, 0.1, len(x)),
        "step_size": torch.linspace(0.03, 0.01, len(x)),
    }
    expected, _ = first_wrong(pgd, net, x, y, **each)
    found = pgd(net, x, y, early_stop=True, **settings(**each))
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("random_start", ["uniform", None])
def test_counts_are_those_of_all_steps(random_start):
    net, (x, y) = model(), batch()
    _, expected = least_pgd_steps(net, x, y, **settings(random_start=random_start))
    _, at = first_wrong(pgd, net, x, y, random_start=random_start)
    x_adv, found = least_pgd_steps(
        net, x, y, early_stop=True, **settings(random_start=random_start)
    )
    assert torch.equal(found, expected)
    assert torch.equal(found, at.clamp(max=STEPS))
    assert torch.equal((net(x_adv).argmax(dim=1) != y), at < STEPS)


def test_counts_of_an_attack_on_reference_logits():
    net, (x, y) = model(), batch()
    reference = net(x).detach() + torch.randn(len(x), 4, generator=torch.Generator().manual_seed(3))
    given = {"labels": y, "loss": losses.distillation}
    _, expected = least_pgd_steps(net, x, reference, **given, **settings())
    _, found = least_pgd_steps(net, x, reference, early_stop=True, **given, **settings())
    assert torch.equal(found, expected)
    assert len(set(found.tolist())) > 2


def test_nothing_is_done_for_what_is_decided():
    net, (x, y) = model(), batch()
    _, at = first_wrong(pgd, net, x, y)
    sizes = []
    net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    pgd(net, x, y, early_stop=True, **settings())
    assert sizes == [int((at >= t).sum()) for t in range(STEPS)]
    sizes.clear()
    pgd(net, x, (net(x).argmax(dim=1) + 1) % 4, early_stop=True, **settings(random_start=None))
    assert sizes[1:] == [len(x)]  # all wrong at once: one look, and no more


def test_on_step_sees_what_is_left():
    net, (x, y) = model(), batch()
    seen = []
    pgd(
        net,
        x,
        y,
        early_stop=True,
        **settings(on_step=lambda t, a, z: seen.append((len(a), len(z)))),
    )
    assert all(a == z for a, z in seen)
    assert seen[0][0] == len(x) > seen[-1][0]


def test_no_sample_and_no_step():
    net, (x, y) = model(), batch()
    assert torch.equal(pgd(net, x, y, early_stop=True, steps=0, random_start=None), x)
    assert pgd(net, x[:0], y[:0], early_stop=True).shape == (0, 2, 5, 7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_other_modes(mode):
    net, (x, y) = model(), batch()
    expected = pgd(net, x, y, early_stop=True, **settings())
    with mode():
        found = pgd(net, x, y, early_stop=True, **settings())
        counts = least_pgd_steps(net, x, y, early_stop=True, **settings())[1]
    assert torch.equal(found, expected)
    assert torch.equal(counts, least_pgd_steps(net, x, y, **settings())[1])


def test_what_cannot_stop_early():
    net, (x, y) = model(), batch()
    with pytest.raises(TypeError, match="^pgd: expected `targets`"):
        pgd(net, x, net(x).detach(), loss=losses.distillation, early_stop=True)
    with pytest.raises(ValueError, match="^least_pgd_steps: expected no `early_stop` with `count`"):
        least_pgd_steps(net, x, y, count="correct", early_stop=True)
