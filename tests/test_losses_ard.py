"""Robust distillation and its relatives against their equations, and the bugs of the releases."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ferdlib import losses


def log_softmax(z):
    shifted = z - z.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def kl(p_logits, q_logits):
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return (np.exp(p) * (p - q)).sum(axis=1)


def ce(z, y):
    return -log_softmax(z)[np.arange(len(y)), y]


def penalty(z):
    p = np.exp(log_softmax(z))
    return np.log(z.shape[1]) + np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0).sum(axis=1)


def tau(y):
    """A temperature for each label, exact in every dtype."""
    return 0.5 + y / 4


def column(y):
    return tau(y)[:, None]


def trust(z, y, exponent):
    return np.exp(log_softmax(z)[np.arange(len(y)), y]) ** exponent


# name: the call on logits a, b, c, d and labels y, and its equation. a is S(x), b is S(x~), c is T(x)
# and d is T(x~), except that MTARD has T_nat(x) and T_adv(x~) there, and BAT S(x_lc) and S(x_fa) in b and c.
EQUATIONS = {
    "trades": (
        lambda a, b, c, d, y: losses.trades(a, b, y),
        lambda a, b, c, d, y: ce(a, y) + 6 * kl(a, b),
    ),
    "trades, weights": (
        lambda a, b, c, d, y: losses.trades(a, b, y, beta=2.0, kl_weight=0.25),
        lambda a, b, c, d, y: ce(a, y) + 0.5 * kl(a, b),
    ),
    "ard": (
        lambda a, b, c, d, y: losses.ard(a, b, c, y),
        lambda a, b, c, d, y: 900 * kl(c / 30, b / 30),
    ),
    "ard, weights": (
        lambda a, b, c, d, y: losses.ard(a, b, c, y, temperature=3, alpha=0.25, kl_weight=0.1),
        lambda a, b, c, d, y: 0.25 * 9 * 0.1 * kl(c / 3, b / 3) + 0.75 * ce(a, y),
    ),
    "ard, temperatures": (
        lambda a, b, c, d, y: losses.ard(a, b, c, y, temperature=tau(y), alpha=0.5),
        lambda a, b, c, d, y: (tau(y) ** 2 * kl(c / column(y), b / column(y)) + ce(a, y)) / 2,
    ),
    "rslad": (
        lambda a, b, c, d, y: losses.rslad(a, b, c),
        lambda a, b, c, d, y: (5 * kl(c, b) + kl(c, a)) / 6,
    ),
    "rslad, weights": (
        lambda a, b, c, d, y: losses.rslad(a, b, c, adv_weight=0.25, kl_weight=0.1),
        lambda a, b, c, d, y: 0.1 * (0.25 * kl(c, b) + 0.75 * kl(c, a)),
    ),
    "iad": (
        lambda a, b, c, d, y: losses.iad(a, b, c, d, y),
        lambda a, b, c, d, y: kl(c, b) + (1 - trust(d, y, 0.1)) * kl(a, b),
    ),
    "iad, weights": (
        lambda a, b, c, d, y: losses.iad(
            a, b, c, d, y, temperature=2.0, alpha=0.75, exponent=1.5, kl_weight=0.5
        ),
        lambda a, b, c, d, y: (
            0.75 * 0.5 * (4 * kl(c / 2, b / 2) + (1 - trust(d, y, 1.5)) * kl(a, b))
            + 0.25 * ce(a, y)
        ),
    ),
    "iad, temperatures": (
        lambda a, b, c, d, y: losses.iad(a, b, c, d, y, temperature=tau(y)),
        lambda a, b, c, d, y: (
            tau(y) ** 2 * kl(c / column(y), b / column(y)) + (1 - trust(d, y, 0.1)) * kl(a, b)
        ),
    ),
    "iad, early": (
        lambda a, b, c, d, y: losses.iad(a, b, c, d, y, alpha=0.5, introspection=False),
        lambda a, b, c, d, y: (kl(c, b) + ce(a, y)) / 2,
    ),
    "iad, detached": (
        lambda a, b, c, d, y: losses.iad(a, b, c, d, y, detach_student=True),
        lambda a, b, c, d, y: kl(c, b) + (1 - trust(d, y, 0.1)) * kl(a, b),
    ),
    "adaad": (lambda a, b, c, d, y: losses.adaad(a, b, c, d), lambda a, b, c, d, y: kl(d, b)),
    "adaad, weights": (
        lambda a, b, c, d, y: losses.adaad(a, b, c, d, alpha=0.75, temperature=3.0, kl_weight=0.1),
        lambda a, b, c, d, y: 0.1 * (0.75 * kl(d / 3, b / 3) + 0.25 * kl(c / 3, a / 3)),
    ),
    "adaad, temperatures": (
        lambda a, b, c, d, y: losses.adaad(a, b, c, d, temperature=tau(y)),
        lambda a, b, c, d, y: kl(d / column(y), b / column(y)),
    ),
    "absld": (
        lambda a, b, c, d, y: losses.absld(a, b, c, adv_temperature=2, clean_temperature=0.5),
        lambda a, b, c, d, y: (5 * kl(c / 2, b) + kl(c / 0.5, a)) / 6,
    ),
    "absld, temperatures": (
        lambda a, b, c, d, y: losses.absld(
            a,
            b,
            c,
            adv_temperature=tau(y),
            clean_temperature=2 * tau(y),
            adv_weight=0.25,
            kl_weight=0.1,
        ),
        lambda a, b, c, d, y: (
            0.1 * (0.25 * kl(c / column(y), b) + 0.75 * kl(c / (2 * column(y)), a))
        ),
    ),
    "mtard": (
        lambda a, b, c, d, y: losses.mtard(a, b, c, d),
        lambda a, b, c, d, y: (kl(d, b) + kl(c, a)) / 2,
    ),
    "mtard, weights": (
        lambda a, b, c, d, y: losses.mtard(
            a, b, c, d, adv_weight=torch.tensor(0.75, dtype=torch.float64), kl_weight=0.1
        ),
        lambda a, b, c, d, y: 0.1 * (0.75 * kl(d, b) + 0.25 * kl(c, a)),
    ),
    "bat": (
        lambda a, b, c, d, y: losses.bat(a, b, c, y),
        lambda a, b, c, d, y: ce(b, y) + 6 * kl(a, c) + penalty(b) + penalty(c),
    ),
    "bat, weights": (
        lambda a, b, c, d, y: losses.bat(a, b, c, y, beta=2.0, uniform_weight=0.5),
        lambda a, b, c, d, y: ce(b, y) + 2 * kl(a, c) + 0.5 * (penalty(b) + penalty(c)),
    ),
}
every_loss = pytest.mark.parametrize("name", EQUATIONS)
every_k = pytest.mark.parametrize("k", [2, 10, 100])


def students(name):
    return 3 if name.startswith("bat") else 2


def inputs(n=7, k=5, *, dtype=torch.float64, scale=2.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    z = (scale * torch.randn(4, n, k, generator=rng, dtype=torch.float64)).to(dtype)
    return [*z, torch.randint(k, (n,), generator=rng)]


def numpy(tensors):
    return [t.detach().double().numpy() for t in tensors[:4]] + [tensors[4].numpy()]


@every_loss
@pytest.mark.parametrize(("n", "k"), [(7, 2), (4, 10), (3, 100), (1, 5)])
def test_value_is_the_equation(name, n, k):
    call, equation = EQUATIONS[name]
    arguments = inputs(n, k)
    value = call(*arguments)
    assert value.shape == (n,)
    assert value.dtype == torch.float64
    np.testing.assert_allclose(value, equation(*numpy(arguments)), rtol=1e-9, atol=1e-10)


@every_loss
def test_gradient_is_the_derivative(name):
    *z, y = inputs(4, 3, seed=1)
    first = 1 if name == "iad, detached" else 0  # S(x) is a constant there, so no derivative
    free = z[first : students(name)]
    rest = z[students(name) :]
    torch.autograd.gradcheck(
        lambda *free: EQUATIONS[name][0](*z[:first], *free, *rest, y),
        [t.requires_grad_() for t in free],
    )


@every_loss
def test_no_gradient_reaches_a_teacher(name):
    *z, y = inputs()
    for t in z:
        t.requires_grad_()
    EQUATIONS[name][0](*z, y).sum().backward()
    reached = [t.grad is not None for t in z]
    assert not any(reached[students(name) :])
    assert reached[1]


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    call, equation = EQUATIONS[name]
    arguments = inputs(dtype=dtype)
    value = call(*arguments)
    assert value.dtype == torch.float32
    # tau² amplifies the rounding of a divergence that is as much smaller.
    tolerance = {"rtol": 1e-4, "atol": 1e-3 if name == "ard" else 1e-5}
    np.testing.assert_allclose(value, equation(*numpy(arguments)), **tolerance)


@every_loss
def test_row_alone_is_row_in_batch(name):
    call, arguments = EQUATIONS[name][0], inputs()
    alone = [call(*(t[i : i + 1] for t in arguments)) for i in range(7)]
    torch.testing.assert_close(call(*arguments), torch.cat(alone), rtol=1e-12, atol=1e-12)


@every_loss
def test_extreme_logits_stay_finite(name):
    call, equation = EQUATIONS[name]
    for scale in (1e4, -1e4):
        a = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0]]) * scale
        z = [a.roll(shift, dims=1).requires_grad_() for shift in (0, 1, 2, 1)]
        y = torch.tensor([0, 2, 1])
        value = call(*z, y)
        gradients = torch.autograd.grad(value.sum(), z[: students(name)], allow_unused=True)
        assert all(g.isfinite().all() for g in gradients if g is not None)
        expected = equation(*numpy([*z, y]))
        np.testing.assert_allclose(value.detach(), expected, rtol=1e-5, atol=1e-5)


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
    with pytest.raises(TypeError, match="^ard: expected `student_clean`"):
        losses.ard(None, b, c, y, alpha=0.5)
    with pytest.raises(TypeError, match="^adaad: expected `student_clean`"):
        losses.adaad(None, b, None, d, alpha=0.5)


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


Z, Y = torch.zeros(3, 4), torch.tensor([0, 1, 2])
WRONG_LOGITS = [
    (Z.tolist(), TypeError),
    (None, TypeError),
    (Z.long(), TypeError),
    (Z[0], ValueError),
    (Z[:, :1], ValueError),
    (torch.zeros(3, 5), ValueError),
    (torch.zeros(2, 4), ValueError),
]
WRONG_TARGETS = [
    (Y.tolist(), TypeError),
    (Y.int(), TypeError),
    (Y[:2], ValueError),
    (Y[:, None], ValueError),
    (Y + 2, ValueError),
    (Y - 1, ValueError),
]
WRONG_WEIGHT = [(-1.0, ValueError), (math.inf, ValueError), ("1", TypeError), (True, TypeError)]
WRONG_SHARE = [*WRONG_WEIGHT, (1.01, ValueError)]
WRONG_TEMPERATURE = [
    *WRONG_WEIGHT,
    (0.0, ValueError),
    (torch.ones(2), ValueError),
    (torch.tensor([1.0, 0.0, 1.0]), ValueError),
    (torch.ones(3).long(), TypeError),
]
WRONG = {
    "targets": WRONG_TARGETS,
    "alpha": WRONG_SHARE,
    "adv_weight": WRONG_SHARE,
    **dict.fromkeys(("beta", "kl_weight", "exponent", "uniform_weight"), WRONG_WEIGHT),
    **{f"{name}temperature": WRONG_TEMPERATURE for name in ("", "adv_", "clean_")},
}
DISTILLATION = ("trades", "ard", "rslad", "iad", "adaad", "absld", "mtard", "bat")
ABSLD_TEMPERATURES = {"adv_temperature": 1.0, "clean_temperature": 1.0}


def right_arguments(name):
    """Zeros for all logits, labels, and no keyword but what is needed."""
    needed = [
        p.name
        for p in inspect.signature(getattr(losses, name)).parameters.values()
        if p.default is p.empty
    ]
    return {n: Y if n == "targets" else ABSLD_TEMPERATURES.get(n, Z) for n in needed}


def wrong_calls():
    for name in DISTILLATION:
        right = right_arguments(name)
        # At alpha = 1 the clean logits may be None.
        share = {"alpha": 0.5} if name in ("ard", "adaad") else {}
        for argument in inspect.signature(getattr(losses, name)).parameters:
            if argument in ("introspection", "detach_student"):
                continue
            for value, kind in WRONG.get(argument, WRONG_LOGITS):
                yield pytest.param(name, right | share | {argument: value}, argument, kind)
    for weight, kind in [(torch.ones(1), ValueError), (torch.tensor(1), TypeError)]:
        right = right_arguments("mtard")
        yield pytest.param("mtard", right | {"adv_weight": weight}, "adv_weight", kind)


@pytest.mark.parametrize(("name", "arguments", "argument", "kind"), list(wrong_calls()))
def test_errors_name_the_function_and_the_argument(name, arguments, argument, kind):
    with pytest.raises(kind, match=rf"^{re.escape(name)}: expected .*`{argument}`"):
        getattr(losses, name)(**arguments)


@pytest.mark.parametrize("name", DISTILLATION)
def test_the_right_arguments_of_the_error_tests_are_right(name):
    assert getattr(losses, name)(**right_arguments(name)).shape == (3,)
