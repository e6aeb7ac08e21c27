"""Every loss against its equation, in float64 NumPy or by hand."""

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


def own(z, y):
    return z[np.arange(len(y)), y]


def best_other(z, y):
    return np.array([max(z[i, j] for j in range(z.shape[1]) if j != y[i]) for i in range(len(z))])


def decoupled(s, t, temperature):
    """The double sum over pairs of classes, and the soft cross-entropy."""
    w, p, log_q = np.exp(log_softmax(t / temperature)), np.exp(log_softmax(t)), log_softmax(s)
    values = []
    for i in range(len(s)):
        gap = 0.0
        for j in range(s.shape[1]):
            for k in range(s.shape[1]):
                difference = (t[i, j] - t[i, k]) - (s[i, j] - s[i, k])
                gap += w[i, j] * w[i, k] * difference**2
        values.append(0.25 * gap - (p[i] * log_q[i]).sum())
    return np.array(values)


def masked(s, t):
    return kl(t, s) * (s.argmax(axis=1) == t.argmax(axis=1))


# name: the call on (a, b, y), and its equation.
EQUATIONS = {
    "cross_entropy": (
        lambda a, b, y: losses.cross_entropy(a, y),
        lambda a, b, y: -own(log_softmax(a), y),
    ),
    "kl_divergence": (lambda a, b, y: losses.kl_divergence(a, b), lambda a, b, y: kl(a, b)),
    "temperature 3": (
        lambda a, b, y: losses.kl_divergence(a, b, temperature=3.0),
        lambda a, b, y: kl(a / 3, b / 3),
    ),
    "distillation": (lambda a, b, y: losses.distillation(a, b), lambda a, b, y: kl(b, a)),
    "margin": (lambda a, b, y: losses.margin(a, y), lambda a, b, y: own(a, y) - best_other(a, y)),
    "cw_margin": (
        lambda a, b, y: losses.cw_margin(a, y, confidence=1.0),
        lambda a, b, y: -np.maximum(own(a, y) - best_other(a, y) + 1, 0),
    ),
    "uniformity": (lambda a, b, y: losses.uniformity(a), lambda a, b, y: kl(np.zeros_like(a), a)),
    "confidence_penalty": (
        lambda a, b, y: losses.confidence_penalty(a),
        lambda a, b, y: kl(a, np.zeros_like(a)),
    ),
    "decoupled_kl": (
        lambda a, b, y: losses.decoupled_kl(a, b, pair_temperature=2.0),
        lambda a, b, y: decoupled(a, b, 2.0),
    ),
    "masked_distillation": (
        lambda a, b, y: losses.masked_distillation(a, b),
        lambda a, b, y: masked(a, b),
    ),
    "ferd_distillation_loss": (
        lambda a, b, y: losses.ferd_distillation_loss(a, a.flip(0), b),
        lambda a, b, y: 5 / 6 * kl(b, a) + 1 / 6 * kl(b, a[::-1]),
    ),
}
every_loss = pytest.mark.parametrize("name", EQUATIONS)


def inputs(n=7, k=5, *, dtype=torch.float64, scale=2.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    a, b = (scale * torch.randn(2, n, k, generator=rng, dtype=torch.float64)).to(dtype)
    # Half of the rows agree on the class, so that a mask has both values.
    b[::2] = (a + b / 4)[::2]
    return a, b, torch.randint(k, (n,), generator=rng)


def numpy(*tensors):
    return [t.double().numpy() for t in tensors[:2]] + [t.numpy() for t in tensors[2:]]


@every_loss
@pytest.mark.parametrize(("n", "k"), [(7, 2), (4, 3), (3, 10), (2, 100), (1, 5)])
def test_value_is_the_equation(name, n, k):
    call, equation = EQUATIONS[name]
    arguments = inputs(n, k)
    value = call(*arguments)
    assert value.shape == (n,)
    assert value.dtype == torch.float64
    np.testing.assert_allclose(value.numpy(), equation(*numpy(*arguments)), rtol=1e-9, atol=1e-12)


@every_loss
def test_gradient_is_the_derivative(name):
    a, b, y = inputs(4, 3, seed=1)
    detached = name in ("decoupled_kl", "ferd_distillation_loss")  # parts of these are constants
    torch.autograd.gradcheck(
        lambda *z: EQUATIONS[name][0](*z, *([b] if detached else []), y),
        [t.requires_grad_() for t in ([a] if detached else [a, b])],
    )


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    call, equation = EQUATIONS[name]
    arguments = inputs(dtype=dtype)
    value = call(*arguments)
    assert value.dtype == torch.float32
    expected = equation(*numpy(*arguments))
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-4, atol=1e-5)


@every_loss
def test_row_alone_is_row_in_batch(name):
    a, b, y = inputs()
    a[6] = a[0]  # ferd_distillation_loss reads the reversed batch: its rows 0 and 6 are then equal
    b[6], y[6] = b[0], y[0]
    call = EQUATIONS[name][0]
    alone = call(a[:1], b[:1], y[:1])
    torch.testing.assert_close(call(a, b, y)[:1], alone, rtol=1e-12, atol=1e-12)


@every_loss
def test_extreme_logits_stay_finite(name):
    call, equation = EQUATIONS[name]
    for scale in (1e4, -1e4):
        a = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0]]) * scale
        b, y = a.roll(1, dims=1), torch.tensor([0, 2, 1])
        a.requires_grad_()
        value = call(a, b, y)
        (gradient,) = torch.autograd.grad(value.sum(), a)
        assert gradient.isfinite().all()
        expected = equation(*numpy(a.detach(), b, y))
        np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


LOG3 = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)  # p = (3/4, 1/4)
FLAT = torch.zeros(1, 2, dtype=torch.float64)
P_TO_U = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
U_TO_P = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)


@pytest.mark.parametrize(
    ("value", "by_hand"),
    [
        (losses.cross_entropy(torch.zeros(1, 4), torch.tensor([2])), math.log(4)),
        (losses.cross_entropy(LOG3, torch.tensor([0])), math.log(4 / 3)),
        (losses.kl_divergence(LOG3, FLAT), P_TO_U),
        (losses.kl_divergence(FLAT, LOG3), U_TO_P),
        (losses.kl_divergence(2 * LOG3, FLAT, temperature=2.0), P_TO_U),
        (losses.distillation(FLAT, LOG3), P_TO_U),
        (losses.uniformity(LOG3), U_TO_P),
        (losses.confidence_penalty(LOG3), P_TO_U),
        (losses.confidence_penalty(torch.tensor([[100.0, 0.0, 0.0]])), math.log(3)),
        (losses.margin(torch.tensor([[-3.0, -1.0, -2.0]]), torch.tensor([1])), 1.0),
        (losses.margin(torch.tensor([[-3.0, -1.0, -2.0]]), torch.tensor([0])), -2.0),
        (losses.margin(torch.tensor([[4.0, 4.0, 1.0]]), torch.tensor([0])), 0.0),
        (losses.margin(torch.tensor([[1.0, 4.0, 4.0]]), torch.tensor([0])), -3.0),
        (losses.cw_margin(torch.tensor([[5.0, 2.0]]), torch.tensor([0])), -53.0),
        (losses.cw_margin(torch.tensor([[0.0, 60.0]]), torch.tensor([0])), 0.0),
        (losses.cw_margin(torch.tensor([[0.0, 2.0]]), torch.tensor([0]), confidence=2.5), -0.5),
        # Two pairs, each with weight 1/4 and a squared gap of 1, times 1/4; cross-entropy log 2.
        (
            losses.decoupled_kl(FLAT, torch.tensor([[1.0, 0.0]]), pair_temperature=1e9),
            0.125 + math.log(2),
        ),
        (losses.decoupled_kl(FLAT, FLAT, cross_entropy_weight=3.0), 3 * math.log(2)),
        (losses.masked_distillation(0 * LOG3, LOG3), P_TO_U),
        (losses.masked_distillation(-LOG3, LOG3), 0.0),
        (losses.ferd_distillation_loss(FLAT, LOG3, LOG3), 5 / 6 * P_TO_U),
        (losses.ferd_distillation_loss(LOG3, FLAT, LOG3), 1 / 6 * P_TO_U),
        (losses.ferd_distillation_loss(LOG3, FLAT, LOG3, adv_weight=5 / 6), 5 / 6 * P_TO_U),
        (losses.ferd_distillation_loss(FLAT, LOG3, LOG3, clean_weight=0.0), 0.0),
    ],
)
def test_value_by_hand(value, by_hand):
    assert value.item() == pytest.approx(by_hand, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("k", [2, 3, 10, 100])
def test_degenerate_inputs(k):
    a = inputs(6, k)[0]
    zero, flat = a.new_zeros(6), a.new_full((6, k), -3.0)
    near = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(losses.kl_divergence(a, a + 5), zero, **near)
    torch.testing.assert_close(losses.distillation(a, a), zero, **near)
    torch.testing.assert_close(losses.uniformity(flat), zero, **near)
    torch.testing.assert_close(losses.confidence_penalty(flat), zero, **near)
    torch.testing.assert_close(losses.ferd_distillation_loss(a, a, a), zero, **near)
    p = a.softmax(dim=1)
    entropy = -(p * p.log()).sum(dim=1)
    torch.testing.assert_close(losses.confidence_penalty(a), math.log(k) - entropy, **near)
    torch.testing.assert_close(losses.decoupled_kl(a, a), entropy, **near)


def test_gradient_of_uniformity_is_softmax_minus_uniform():
    a = inputs(4, 5)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(losses.uniformity(a).sum(), a)
    torch.testing.assert_close(gradient, a.softmax(dim=1) - 1 / 5)


def test_gradient_of_cross_entropy_and_margin():
    a, _, y = inputs(4, 5)
    a.requires_grad_()
    onehot = F.one_hot(y, 5).double()
    (gradient,) = torch.autograd.grad(losses.cross_entropy(a, y).sum(), a)
    torch.testing.assert_close(gradient, a.softmax(dim=1) - onehot)
    (gradient,) = torch.autograd.grad(losses.margin(a, y).sum(), a)
    rival = F.one_hot(a.masked_fill(onehot.bool(), -math.inf).argmax(dim=1), 5)
    torch.testing.assert_close(gradient, onehot - rival)


def test_cw_margin_is_the_negative_margin_until_the_clamp():
    z, y = torch.tensor([[5.0, 2.0], [2.0, 5.0], [0.0, 9.0]], requires_grad=True), torch.zeros(3)
    value = losses.cw_margin(z, y.long(), confidence=4.0)
    assert value.tolist() == [-7.0, -1.0, 0.0]
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert gradient.tolist() == [[-1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]]


def test_teacher_gradient_of_decoupled_kl_flows_through_the_gap_only():
    s, t, _ = inputs(4, 3)
    t.requires_grad_()
    w = (t / 100).softmax(dim=1)
    gap = (t[:, :, None] - t[:, None, :]) - (s[:, :, None] - s[:, None, :])
    plain = 0.25 * (w[:, :, None] * w[:, None, :] * gap**2).sum()
    (expected,) = torch.autograd.grad(plain, t)
    (gradient,) = torch.autograd.grad(losses.decoupled_kl(s, t).sum(), t)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0.1


def test_distillation_turns_the_arguments_around():
    a, b, _ = inputs()
    t = torch.linspace(0.5, 4, 7, dtype=torch.float64)
    assert torch.equal(losses.distillation(a, b), losses.kl_divergence(b, a))
    assert not torch.allclose(losses.distillation(a, b), losses.kl_divergence(a, b))
    turned = losses.kl_divergence(b, a, temperature=t)
    assert torch.equal(losses.distillation(a, b, temperature=t), turned)


@pytest.mark.parametrize("function", [losses.kl_divergence, losses.distillation])
def test_temperature_may_differ_by_sample(function):
    a, b, _ = inputs()
    t = torch.linspace(0.5, 4, 7)
    rows = [function(a[i : i + 1], b[i : i + 1], temperature=t[i].item()) for i in range(7)]
    torch.testing.assert_close(function(a, b, temperature=t), torch.cat(rows))
    constant = function(a, b, temperature=torch.full((7,), 2.0))
    assert torch.equal(constant, function(a, b, temperature=2))


def test_no_hidden_factor_against_torch():
    a, b, _ = inputs(6, 4)
    log_q, log_p = (b / 3).log_softmax(dim=1), (a / 3).log_softmax(dim=1)
    value = losses.kl_divergence(a, b, temperature=3.0)
    batchmean = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    torch.testing.assert_close(value.mean(), batchmean)
    total = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    torch.testing.assert_close(value.sum(), total)


def test_no_gradient_reaches_the_teacher_of_the_distillation_loss():
    clean, adv, teacher = (inputs(seed=s)[0].requires_grad_() for s in range(3))
    losses.ferd_distillation_loss(clean, adv, teacher).sum().backward()
    assert teacher.grad is None
    scaled = (clean.softmax(dim=1) - teacher.softmax(dim=1)).detach()
    torch.testing.assert_close(clean.grad, 5 / 6 * scaled)
    torch.testing.assert_close(adv.grad, (adv.softmax(1) - teacher.softmax(1)).detach() / 6)


def generator_inputs():
    (teacher, student, y), nonrobust = inputs(6, 4), inputs(6, 4, seed=2)[0]
    return teacher, student, y, nonrobust, torch.tensor(0.7, dtype=torch.float64)


DIVERGENCES = {
    losses.distillation: lambda s, t: kl(t, s),
    losses.masked_distillation: masked,
    losses.decoupled_kl: lambda s, t: decoupled(s, t, 100.0),
}


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda f: f.__name__)
def test_generator_loss_is_the_weighted_sum(divergence):
    teacher, student, y, nonrobust, bn = generator_inputs()
    t, s, nr = (z.numpy() for z in (teacher, student, nonrobust))
    expected = {
        "adversarial": -DIVERGENCES[divergence](s, t).mean(),
        "batchnorm": 0.7,
        "onehot": -log_softmax(t)[np.arange(6), y.numpy()].mean(),
        "uniformity": kl(np.zeros_like(nr), nr).mean(),
    }
    arguments = (teacher, student, y, nonrobust, bn)
    total, parts = losses.ferd_generator_loss(*arguments, divergence=divergence)
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(expected, rel=1e-9)
    assert total.ndim == 0
    assert total.item() == pytest.approx(np.dot([1, 5, 1, 5], list(expected.values())), rel=1e-9)
    names = ("adv_weight", "bn_weight", "onehot_weight", "uniformity_weight")
    weights = dict(zip(names, (2.0, 3.0, 0.5, 7.0), strict=True))
    total, again = losses.ferd_generator_loss(*arguments, divergence=divergence, **weights)
    assert total.item() == pytest.approx(np.dot([2, 3, 0.5, 7], list(expected.values())), rel=1e-9)
    assert again == parts


def test_adversarial_part_is_minus_kl_teacher_to_student():
    y, bn = torch.tensor([0]), torch.tensor(0.0)
    _, parts = losses.ferd_generator_loss(LOG3, FLAT, y, None, bn)
    assert parts["adversarial"].item() == pytest.approx(-P_TO_U)
    assert parts["uniformity"].item() == 0


def test_gradients_of_the_generator_loss():
    tensors = [t.requires_grad_(t.is_floating_point()) for t in generator_inputs()]
    teacher, student, _, nonrobust, bn = tensors
    total, _ = losses.ferd_generator_loss(*tensors)
    g_teacher, g_student, g_nonrobust, g_bn = torch.autograd.grad(
        total, [teacher, student, nonrobust, bn]
    )
    assert g_bn.item() == 5
    # d(-KL(t||s))/ds = (p_t - p_s) / N, and d(5 KL(U||p))/dz = 5 (p - U) / N.
    torch.testing.assert_close(g_student, (teacher.softmax(1) - student.softmax(1)) / 6)
    torch.testing.assert_close(g_nonrobust, 5 * (nonrobust.softmax(1) - 1 / 4) / 6)
    log_t, log_s = teacher.log_softmax(1), student.log_softmax(1)
    divergence = (log_t.exp() * (log_t - log_s)).sum() / 6
    plain = F.cross_entropy(teacher, tensors[2]) - divergence
    torch.testing.assert_close(g_teacher, torch.autograd.grad(plain, teacher)[0])


Z, Y = torch.zeros(3, 4), torch.tensor([0, 1, 2])
WRONG_LOGITS = [
    (Z.tolist(), TypeError),
    (Z.long(), TypeError),
    (Z[0], ValueError),
    (Z[:, :1], ValueError),
    (Z[None], ValueError),
]
WRONG_TARGETS = [
    (Y.tolist(), TypeError),
    (Y.int(), TypeError),
    (Y[:2], ValueError),
    (Y[:, None], ValueError),
    (Y + 2, ValueError),
    (Y - 1, ValueError),
]
WRONG_TEMPERATURE = [
    (0.0, ValueError),
    (-1.0, ValueError),
    (math.nan, ValueError),
    ("2", TypeError),
    (torch.ones(2), ValueError),
    (torch.tensor([1.0, 0.0, 1.0]), ValueError),
    (torch.ones(3).long(), TypeError),
]
WRONG_WEIGHT = [(-1.0, ValueError), (math.inf, ValueError), (None, TypeError), (True, TypeError)]
OTHER_SHAPE = [*WRONG_LOGITS, (torch.zeros(3, 5), ValueError), (torch.zeros(2, 4), ValueError)]
GENERATOR = {
    "teacher_logits": Z,
    "student_logits": Z,
    "targets": Y,
    "nonrobust_logits": Z,
    "batchnorm_loss": torch.tensor(0.0),
}
DISTILLATION = dict.fromkeys(("student_clean", "student_adv", "teacher_clean"), Z)
# Each function: right arguments, and the wrong values of one at a time.
CONTRACTS = {
    "cross_entropy": ({"logits": Z, "targets": Y}, {}),
    "margin": ({"logits": Z, "targets": Y}, {}),
    "cw_margin": ({"logits": Z, "targets": Y}, {"confidence": WRONG_WEIGHT}),
    "uniformity": ({"logits": Z}, {}),
    "confidence_penalty": ({"logits": Z}, {}),
    "kl_divergence": ({"p_logits": Z, "q_logits": Z}, {"temperature": WRONG_TEMPERATURE}),
    "distillation": ({"logits": Z, "reference_logits": Z}, {"temperature": WRONG_TEMPERATURE}),
    "masked_distillation": ({"logits": Z, "reference_logits": Z}, {}),
    "decoupled_kl": (
        {"student_logits": Z, "teacher_logits": Z},
        {
            "mse_weight": WRONG_WEIGHT,
            "cross_entropy_weight": WRONG_WEIGHT,
            "pair_temperature": [(0.0, ValueError), (-1.0, ValueError), ("2", TypeError)],
        },
    ),
    "ferd_distillation_loss": (
        DISTILLATION,
        {"clean_weight": WRONG_WEIGHT, "adv_weight": WRONG_WEIGHT},
    ),
    "ferd_generator_loss": (
        GENERATOR,
        {
            **{f"{w}_weight": WRONG_WEIGHT for w in ("adv", "bn", "onehot", "uniformity")},
            "batchnorm_loss": [(0.5, TypeError), (torch.zeros(2), ValueError)],
        },
    ),
}


def wrong_calls():
    for name, (right, more) in CONTRACTS.items():
        wrong = {"targets": WRONG_TARGETS, "batchnorm_loss": []}
        pairs = len([argument for argument in right if argument not in wrong]) > 1
        for argument in right | more:
            default = OTHER_SHAPE if pairs else WRONG_LOGITS
            for value, kind in more.get(argument, wrong.get(argument, default)):
                yield pytest.param(name, right | {argument: value}, argument, kind)


@pytest.mark.parametrize(("name", "arguments", "argument", "kind"), list(wrong_calls()))
def test_errors_name_the_function_and_the_argument(name, arguments, argument, kind):
    with pytest.raises(kind, match=rf"^{re.escape(name)}: expected .*`{argument}`"):
        getattr(losses, name)(**arguments)


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_right_arguments_of_the_error_tests_are_right(name):
    getattr(losses, name)(**CONTRACTS[name][0])
