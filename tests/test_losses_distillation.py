"""Robust distillation by hand, and against the bugs of the releases; its equations are in test_losses.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from ferdlib import losses

every_k = pytest.mark.parametrize("k", [2, 10, 100])


def tau(y):
    return 0.5 + y / 4


def inputs(n=7, k=5, *, scale=2.0):
    rng = torch.Generator().manual_seed(0)
    z = scale * torch.randn(4, n, k, generator=rng, dtype=torch.float64)
    return [*z, torch.randint(k, (n,), generator=rng)]


P = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)  # p = (3/4, 1/4)
U = torch.zeros(1, 2, dtype=torch.float64)
P_TO_U = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
U_TO_P = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
LOG2 = math.log(2)
ZERO = torch.tensor([0])


@pytest.mark.parametrize(
    ("value", "by_hand"),
    [
        (losses.trades(U, P, ZERO), LOG2 + 6 * U_TO_P),
        (losses.trades(P, U, ZERO), math.log(4 / 3) + 6 * P_TO_U),
        (losses.ard(U, U, 30 * P, ZERO), 900 * P_TO_U),
        (losses.ard(P, U, 2 * P, ZERO, temperature=2.0, alpha=0.0), math.log(4 / 3)),
        (losses.rslad(P, U, P), 5 / 6 * P_TO_U),
        (losses.rslad(U, P, P), 1 / 6 * P_TO_U),
        (losses.iad(P, U, U, P, ZERO, exponent=1.0), P_TO_U / 4),  # p_T(y | x~) = 3/4
        (losses.iad(P, U, U, P, ZERO, exponent=0.0), 0.0),
        (losses.adaad(P, U, U, P), P_TO_U),
        (losses.adaad(P, U, U, P, alpha=0.0), U_TO_P),
        (losses.absld(P, U, 2 * P, adv_temperature=2.0, clean_temperature=2.0), 5 / 6 * P_TO_U),
        (losses.mtard(P, U, U, P, adv_weight=1.0), P_TO_U),
        (losses.mtard(P, U, U, P, adv_weight=0.0), U_TO_P),
        (losses.bat(P, U, U, ZERO), LOG2 + 6 * P_TO_U),
        (losses.bat(U, P, U, ZERO), math.log(4 / 3) + P_TO_U),
        (losses.bat(U, U, P, ZERO, beta=0.0), LOG2 + P_TO_U),
    ],
)
def test_value_by_hand(value, by_hand):
    assert value.item() == pytest.approx(by_hand, rel=1e-9, abs=1e-12)


@every_k
def test_equal_logits_leave_no_divergence_at_all(k):
    a, *_, y = inputs(6, k)
    zero, plain = a.new_zeros(6), losses.cross_entropy(a, y)
    assert torch.equal(losses.trades(a, a, y), plain)
    assert torch.equal(losses.ard(a, a, a, y), zero)
    assert torch.equal(losses.ard(a, a, a, y, alpha=0.25), 0.75 * plain)
    assert torch.equal(losses.rslad(a, a, a), zero)
    assert torch.equal(losses.iad(a, a, a, a, y), zero)
    assert torch.equal(losses.adaad(a, a, a, a, alpha=0.5), zero)
    assert torch.equal(losses.absld(a, a, a, adv_temperature=1, clean_temperature=1.0), zero)
    assert torch.equal(losses.mtard(a, a, a, a), zero)
    assert torch.equal(losses.bat(a, a, a, y, uniform_weight=0.0), plain)


@every_k
def test_trades_without_beta_is_cross_entropy(k):
    a, b, *_, y = inputs(6, k)
    for weights in ({"beta": 0.0}, {"kl_weight": 0.0}):
        assert torch.equal(losses.trades(a, b, y, **weights), losses.cross_entropy(a, y))


def test_alpha_1_leaves_the_clean_images_out():
    a, b, c, d, y = inputs()
    a.requires_grad_()
    b.requires_grad_()
    for value in (
        losses.ard(a, b, c, y),
        losses.iad(a, b, c, d, y, introspection=False),
        losses.adaad(a, b, c, d),
    ):
        gradient, other = torch.autograd.grad(value.sum(), [a, b])
        assert not gradient.any()
        assert other.abs().max() > 1e-3
    assert torch.equal(losses.ard(None, b, c, y), losses.ard(a, b, c, y))
    assert torch.equal(losses.adaad(None, b, None, d), losses.adaad(a, b, c, d))
    early = {"introspection": False}
    assert torch.equal(losses.iad(None, b, c, None, y, **early), losses.iad(a, b, c, d, y, **early))
    early["alpha"] = 0.5
    assert torch.equal(losses.iad(a, b, c, None, y, **early), losses.iad(a, b, c, d, y, **early))


def test_logits_that_are_needed_may_not_be_none():
    a, b, c, d, y = inputs()
    with pytest.raises(TypeError, match="^ard: expected `student_clean`"):
        losses.ard(None, b, c, y, alpha=0.5)
    with pytest.raises(TypeError, match="^adaad: expected `student_clean`"):
        losses.adaad(None, b, None, d, alpha=0.5)
    with pytest.raises(TypeError, match="^iad: expected `student_clean`"):
        losses.iad(None, b, c, None, y, alpha=0.5, introspection=False)
    for clean, adv in ((None, d), (a, None)):
        with pytest.raises(TypeError, match="^iad: expected `(student_clean|teacher_adv)`"):
            losses.iad(clean, b, c, adv, y)


def test_trades_trains_both_arguments_of_its_divergence():
    a, b, *_, y = inputs()
    a.requires_grad_()
    b.requires_grad_()
    clean, adv = torch.autograd.grad(losses.trades(a, b, y).sum(), [a, b])
    p, q = a.softmax(dim=1), b.softmax(dim=1)
    torch.testing.assert_close(adv, 6 * (q - p))
    ratio = p.log() - q.log()
    through_reference = p * (ratio - (p * ratio).sum(dim=1, keepdim=True))
    torch.testing.assert_close(clean, p - F.one_hot(y, 5) + 6 * through_reference)
    two = losses.cross_entropy(a, y) + 6 * losses.kl_divergence(a, b)
    torch.testing.assert_close(losses.trades(a, b, y), two)


def test_kl_weight_of_one_over_k_is_torchs_mean():
    a, b, c, d, y = inputs(6, 5)

    def released(student, teacher, t=1.0):
        with pytest.warns(UserWarning, match="batchmean"):
            return torch.nn.KLDivLoss()((student / t).log_softmax(1), (teacher / t).softmax(1))

    w = {"kl_weight": 1 / 5}
    plain = losses.cross_entropy(a, y).mean()
    pairs = [
        (losses.ard(a, b, c, y, **w), 900 * released(b, c, 30)),
        (losses.ard(a, b, c, y, alpha=0.5, **w), 450 * released(b, c, 30) + plain / 2),
        (losses.rslad(a, b, c, **w), (5 * released(b, c) + released(a, c)) / 6),
        (losses.adaad(a, b, c, d, **w), released(b, d)),
        (losses.mtard(a, b, c, d, **w), (released(b, d) + released(a, c)) / 2),
        (
            losses.absld(a, b, c, adv_temperature=2.0, clean_temperature=0.5, **w),
            (5 * released(b, c / 2) + released(a, 2 * c)) / 6,
        ),
    ]
    for value, expected in pairs:
        torch.testing.assert_close(value.mean(), expected)


@every_k
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_ard_at_temperature_30_matches_centred_logits_within_a_percent(k, scale):
    a, b, c, _, y = inputs(2000, k, scale=scale)
    d = c - b
    matching = (d - d.mean(dim=1, keepdim=True)).square().sum(dim=1) / (2 * k)
    value = losses.ard(a, b, c, y).mean().item()
    assert value == pytest.approx(matching.mean().item(), rel=0.01)


def test_iad_trains_its_own_reference_unless_told_not_to():
    a, b, c, d, y = inputs()
    a.requires_grad_()
    b.requires_grad_()
    through, to_adv = torch.autograd.grad(losses.iad(a, b, c, d, y).sum(), [a, b])
    assert through.abs().max() > 1e-3
    value = losses.iad(a, b, c, d, y, detach_student=True)
    cut, as_well = torch.autograd.grad(value.sum(), [a, b])
    assert not cut.any()
    torch.testing.assert_close(as_well, to_adv)
    value = losses.iad(a, b, c, d, y, detach_student=True, alpha=0.25)  # the cross-entropy stays
    (gradient,) = torch.autograd.grad(value.sum(), a)
    torch.testing.assert_close(gradient, 0.75 * (a.softmax(dim=1) - F.one_hot(y, 5)))


def test_absld_gives_each_term_its_own_temperature_and_edits_nothing():
    a, b, teacher, _, y = inputs()
    kept, t_adv, t_nat = teacher.clone(), tau(y), 3 * tau(y)
    ours = losses.absld(a, b, teacher, adv_temperature=t_adv, clean_temperature=t_nat)
    assert torch.equal(teacher, kept)
    assert torch.equal(t_adv, tau(y))
    # The release: two views of one storage, each divided in place.
    first, second = teacher.detach(), teacher.detach()
    first /= t_adv[:, None]
    second /= t_nat[:, None]
    assert torch.equal(first, second)
    aliased = (5 * losses.distillation(b, first) + losses.distillation(a, second)) / 6
    assert (ours - aliased).abs().min() > 1e-4


def test_mtards_clean_term_knows_the_natural_teacher_only():
    a, b, natural, robust, _ = inputs()
    a.requires_grad_()
    gradients = []
    for n, r in [(natural, robust), (natural, -robust), (robust, robust)]:
        value = losses.mtard(a, b, n, r, adv_weight=0.25)
        gradients.append(torch.autograd.grad(value.sum(), a)[0])
    torch.testing.assert_close(gradients[0], 0.75 * (a.softmax(1) - natural.softmax(1)))
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])  # what Fair-MTARD's release computes
