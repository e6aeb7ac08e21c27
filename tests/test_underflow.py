"""Attacks on samples whose gradient is too small for the digits that it has on its way."""

import copy
import logging

import pytest
import torch
from torch import nn

from ferdlib import losses
from ferdlib.attacks import ascent, autoattack, fgsm, least_pgd_steps, pgd, utae_pgd
from ferdlib.evaluation import PROTOCOLS, evaluate

BALL = {"eps": 0.1, "step_size": 0.025, "random_start": None}
X, Y = torch.full((3, 1, 4, 4), 0.5), torch.tensor([1, 1, 1])


class Brightness(nn.Module):
    """Class 1 leads by `margin` at the mean pixel 0.5, and by nothing at 0.45; the other logit may be constant."""

    def __init__(self, margin, constant=False):
        super().__init__()
        slope = margin / 0.05 / 16
        other = 0.0 if constant else -slope / 2
        self.layer = nn.Linear(16, 2)
        self.layer.weight.data = torch.tensor([[other], [other + slope]]).expand(2, 16).clone()
        self.layer.bias.data = torch.tensor([-other * 16 * 0.45, -(other + slope) * 16 * 0.45])

    def forward(self, x):
        return self.layer(x.flatten(1))


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(
    ("dtype", "margin"),
    [
        (torch.float16, 20.0),
        (torch.float16, 300.0),
        (torch.bfloat16, 300.0),
        (torch.float32, 20.0),  # where p_y rounds to 1
        (torch.float32, 300.0),  # where all gradients of the cross-entropy round to 0
        (torch.float64, 3000.0),
    ],
)
def test_a_confident_sample_is_attacked_like_any_other(dtype, margin, constant):
    """The second step brings the mean pixel from 0.5 to 0.45, and the fourth to 0.4."""
    model, x = Brightness(margin, constant).to(dtype), X.to(dtype)
    x_adv, counts = least_pgd_steps(model, x, Y, **BALL)
    torch.testing.assert_close(x_adv, torch.full_like(x, 0.4), atol=2e-3, rtol=0)
    assert counts.max() <= 3
    assert counts.min() >= 2
    # A function, and a mixture of confident and other samples.
    mixed = torch.cat([x[:1], x[:1] * 0 + 0.451])
    x_adv = pgd(lambda z: model(z).float(), mixed, Y[:2], **BALL)
    torch.testing.assert_close(x_adv[0], torch.full_like(x[0], 0.4), atol=2e-3, rtol=0)
    x_adv = fgsm(lambda z: (model(z), "more")[0], x, Y, eps=0.1)
    torch.testing.assert_close(x_adv, torch.full_like(x, 0.4), atol=2e-3, rtol=0)


def test_inside_autocast_too():
    with torch.autocast("cpu", torch.float16):
        x_adv = pgd(Brightness(20.0), X, Y, **BALL)
    torch.testing.assert_close(x_adv, X - 0.1)


@pytest.mark.parametrize("attack", [pgd, utae_pgd])
@pytest.mark.parametrize(("teacher", "expected"), [(25.0, 0.6), (200.0, 0.6), (100.0, 0.4)])
def test_a_divergence_of_two_certain_predictions_has_a_direction(attack, teacher, expected):
    """Away from the teacher's prediction, which is surer than the student's 150 or less sure."""
    reference = torch.tensor([[0.0, teacher]]).expand(3, 2)
    more = {"loss": losses.distillation} if attack is pgd else {"gamma": 0.0}
    x_adv = attack(Brightness(150.0), X, reference, **BALL, **more)
    up = teacher < 150
    torch.testing.assert_close(x_adv, torch.full_like(X, 0.6 if up else 0.4))
    student = Brightness(150.0, constant=True)
    assert torch.equal(attack(student, X, student(X), **BALL | {"random_start": X * 0}, **more), X)


@pytest.mark.parametrize(("train_mode", "scale"), [(False, 2.5), (True, 0.08)])
def test_scaling_changes_no_sign_where_nothing_underflows(tiny_model, train_mode, scale):
    """The textbook loop on logits that are sure of some samples, with BatchNorm's batch statistics or not."""
    model = nn.Sequential(tiny_model(), Scaled(scale)).eval()
    x = torch.rand(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(dim=1)
    plain = copy.deepcopy(model).train(train_mode)
    adv = x
    for _ in range(5):
        adv = adv.requires_grad_()
        loss = nn.functional.cross_entropy(plain(adv), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, adv)
        adv = adv.detach() + 0.02 * gradient.sign()
        adv = (x + (adv - x).clamp(-0.05, 0.05)).clamp(0, 1)
    seen = []
    x_adv = pgd(
        model,
        x,
        y,
        eps=0.05,
        step_size=0.02,
        steps=5,
        random_start=None,
        train_mode=train_mode,
        on_step=lambda step, x_adv, logits: seen.append(logits.softmax(1).amax(1)),
    )
    assert torch.equal(x_adv, adv)
    assert seen[0].min() < 0.9
    assert seen[0].max() > 1 - 2**-8


class Scaled(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, z):
        return self.by * z


class Flat(nn.Module):
    """Of the dark images no gradient."""

    def forward(self, x):
        z = Brightness(1.0)(x)
        return torch.where(x.mean((1, 2, 3))[:, None] < 0.45, z.detach() + 0 * z, z)


def test_samples_that_no_step_moved_are_counted_once(caplog):
    x = torch.cat([X, X * 0.5, X * 0.6])
    y = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0])
    evaluate(Flat(), (x, y), PROTOCOLS["quick"].at(eps=0.001), num_classes=2, batch_size=2)
    assert [m for m in caplog.messages if "gradients are zero" in m] == [
        f"evaluate: {name} left 6 samples where they began, for their gradients are zero: it tells nothing of them"
        for name in ("FGSM", "PGD-10")
    ]


def test_autoattack_moves_a_confident_sample_in_half_precision():
    found = autoattack(Brightness(30.0).half(), X.half(), Y, num_classes=2, eps=0.1, version="rand")
    assert not found.robust.any()


def test_autoattack_refuses_a_model_that_breaks_inside_the_ball():
    """Its own attacks take NaN for an attempt that failed."""

    def of_logits(x):
        z = Brightness(5.0)(x)
        return torch.where((x.mean((1, 2, 3)) < 0.499)[:, None], torch.nan, z)

    def of_gradient(x):
        return Brightness(5.0)(x) + 0 * (x[:, 0, 0, :2] - 0.5).abs().sqrt()

    for model in (of_logits, of_gradient):
        with pytest.raises(RuntimeError, match="^autoattack: expected finite logits and gradients"):
            autoattack(model, X, Y, num_classes=2, eps=0.01)


def test_a_radius_as_wide_as_the_bounds_is_warned_of_once(caplog):
    ascent.warn_once.cache_clear()
    for _ in range(2):
        pgd(Brightness(1.0), X, Y, eps=8, step_size=2, steps=1)
        autoattack(Brightness(1.0), X, Y, num_classes=2, eps=8.0, version="rand")
    (message,) = caplog.messages
    assert message.startswith("eps 8 is as large as the width 1 of the bounds")
    pgd(Brightness(1.0), X, Y, eps=8, step_size=2, steps=1, bounds=(0.0, 255.0))
    assert len(caplog.messages) == 1
    assert caplog.records[0].levelno == logging.WARNING
