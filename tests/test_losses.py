"""Every loss against its equation in float64 NumPy, its derivative, and by hand."""

import math

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


def ce(z, y):
    return -own(log_softmax(z), y)


def margin(z, y):
    rivals = [max(z[i, j] for j in range(z.shape[1]) if j != y[i]) for i in range(len(z))]
    return own(z, y) - np.array(rivals)


def penalty(z):
    return kl(z, 0 * z)


def masked(s, t):
    return kl(t, s) * (s.argmax(axis=1) == t.argmax(axis=1))


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


def tau(y):
    """A temperature for each label, exact in every dtype: a column in the equations."""
    return 0.5 + y / 4 if isinstance(y, torch.Tensor) else (0.5 + y / 4)[:, None]


def scaled(t, s, y):
    return tau(y)[:, 0] ** 2 * kl(t / tau(y), s / tau(y))


def trust(z, y, exponent):
    return np.exp(-ce(z, y)) ** exponent


class Case:
    """A call of a loss by letters, and its equation on the same arrays.

    a to d are logits and y labels. In distillation a is S(x), b is S(x~), c is T(x) and d is T(x~); MTARD has
    T_nat(x) and T_adv(x~) in c and d, BAT has S(x_lc) and S(x_fa) in b and c.
    """

    def __init__(self, name, letters, equation, gradients="ab", **keywords):
        self.name, self.letters, self.formula, self.keywords = name, letters, equation, keywords
        self.gradients = [letter for letter in gradients if letter in letters]

    def __call__(self, *arguments):
        found = dict(zip("abcdy", arguments, strict=True))
        keywords = {k: v(found["y"]) if callable(v) else v for k, v in self.keywords.items()}
        return getattr(losses, self.name)(*(found[letter] for letter in self.letters), **keywords)

    def equation(self, *arrays):
        return eval(self.formula, globals(), dict(zip("abcdy", arrays, strict=True)))


THREE_QUARTERS = torch.tensor(0.75, dtype=torch.float64)
TAUS = {"adv_temperature": tau, "clean_temperature": lambda y: 2 * tau(y)}
CASES = [
    Case("cross_entropy", "ay", "ce(a, y)"),
    Case("kl_divergence", "ab", "kl(a, b)"),
    Case("kl_divergence", "ab", "kl(a / 3, b / 3)", temperature=3.0),
    Case("distillation", "ab", "kl(b, a)"),
    Case("distillation", "ab", "kl(b / tau(y), a / tau(y))", temperature=tau),
    Case("margin", "ay", "margin(a, y)"),
    Case("cw_margin", "ay", "-np.maximum(margin(a, y) + 1, 0)", confidence=1.0),
    Case("uniformity", "a", "kl(0 * a, a)"),
    Case("confidence_penalty", "a", "penalty(a)"),
    # A part of the teacher's gradient is cut.
    Case("decoupled_kl", "ab", "decoupled(a, b, 2.0)", "a", pair_temperature=2.0),
    Case("masked_distillation", "ab", "masked(a, b)"),
    Case("ferd_distillation_loss", "abc", "(5 * kl(c, a) + kl(c, b)) / 6"),
    Case("trades", "aby", "ce(a, y) + 6 * kl(a, b)"),
    Case("trades", "aby", "ce(a, y) + kl(a, b) / 2", beta=2.0, kl_weight=0.25),
    Case("ard", "abcy", "900 * kl(c / 30, b / 30)"),
    Case(
        "ard",
        "abcy",
        "0.25 * 9 * 0.1 * kl(c / 3, b / 3) + 0.75 * ce(a, y)",
        **{"temperature": 3, "alpha": 0.25, "kl_weight": 0.1},
    ),
    Case("ard", "abcy", "(scaled(c, b, y) + ce(a, y)) / 2", temperature=tau, alpha=0.5),
    Case("rslad", "abc", "(5 * kl(c, b) + kl(c, a)) / 6"),
    Case("rslad", "abc", "0.025 * kl(c, b) + 0.075 * kl(c, a)", adv_weight=0.25, kl_weight=0.1),
    Case("iad", "abcdy", "kl(c, b) + (1 - trust(d, y, 0.1)) * kl(a, b)"),
    Case(
        "iad",
        "abcdy",
        "3 / 8 * (4 * kl(c / 2, b / 2) + (1 - trust(d, y, 1.5)) * kl(a, b)) + ce(a, y) / 4",
        **{"temperature": 2.0, "alpha": 0.75, "exponent": 1.5, "kl_weight": 0.5},
    ),
    Case(
        "iad",
        "abcdy",
        "scaled(c, b, y) + (1 - trust(d, y, 0.1)) * kl(a, b)",
        temperature=tau,
    ),
    Case("iad", "abcdy", "(kl(c, b) + ce(a, y)) / 2", alpha=0.5, introspection=False),
    Case(
        "iad",
        "abcdy",
        "kl(c, b) + (1 - trust(d, y, 0.1)) * kl(a, b)",
        gradients="b",
        detach_student=True,
    ),
    Case("adaad", "abcd", "kl(d, b)"),
    Case(
        "adaad",
        "abcd",
        "0.1 * (0.75 * kl(d / 3, b / 3) + 0.25 * kl(c / 3, a / 3))",
        **{"alpha": 0.75, "temperature": 3.0, "kl_weight": 0.1},
    ),
    Case("adaad", "abcd", "kl(d / tau(y), b / tau(y))", temperature=tau),
    Case(
        "absld",
        "abc",
        "(5 * kl(c / 2, b) + kl(c / 0.5, a)) / 6",
        adv_temperature=2,
        clean_temperature=0.5,
    ),
    Case(
        "absld",
        "abc",
        "0.025 * kl(c / tau(y), b) + 0.075 * kl(c / tau(y) / 2, a)",
        **TAUS,
        adv_weight=0.25,
        kl_weight=0.1,
    ),
    Case("mtard", "abcd", "(kl(d, b) + kl(c, a)) / 2"),
    Case(
        "mtard",
        "abcd",
        "0.075 * kl(d, b) + 0.025 * kl(c, a)",
        adv_weight=THREE_QUARTERS,
        kl_weight=0.1,
    ),
    Case("bat", "abcy", "ce(b, y) + 6 * kl(a, c) + penalty(b) + penalty(c)", "abc"),
    Case(
        "bat",
        "abcy",
        "ce(b, y) + 2 * kl(a, c) + (penalty(b) + penalty(c)) / 2",
        "abc",
        **{"beta": 2.0, "uniform_weight": 0.5},
    ),
]
every_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def inputs(n=7, k=5, *, dtype=torch.float64, scale=2.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    z = (scale * torch.randn(4, n, k, generator=rng, dtype=torch.float64)).to(dtype)
    # Half of the rows agree on the class, so that a mask has both values.
    z[1, ::2] = (z[0] + z[1] / 4)[::2]
    return [*z, torch.randint(k, (n,), generator=rng)]


def numpy(z, y):
    return [*(t.detach().double().numpy() for t in z), y.numpy()]


@every_loss
@pytest.mark.parametrize(("n", "k"), [(7, 2), (4, 3), (3, 10), (2, 100), (1, 5)])
def test_value_is_the_equation(case, n, k):
    *z, y = inputs(n, k)
    value = case(*z, y)
    assert value.shape == (n,)
    assert value.dtype == torch.float64
    np.testing.assert_allclose(value, case.equation(*numpy(z, y)), rtol=1e-9, atol=1e-10)


@every_loss
def test_gradient_is_the_derivative_and_constants_get_none(case):
    *z, y = inputs(4, 3, seed=1)
    letters = dict(zip("abcd", z, strict=True))
    free = [letters[letter].requires_grad_() for letter in case.gradients]
    torch.autograd.gradcheck(
        lambda *free: case(*(letters | dict(zip(case.gradients, free, strict=True))).values(), y),
        free,
    )
    if case.name == "decoupled_kl":
        return
    case(*(t.requires_grad_() for t in z), y).sum().backward()
    for letter, t in letters.items():
        assert letter in case.gradients or t.grad is None or not t.grad.any()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits_are_computed_in_float32(case, dtype):
    *z, y = inputs(dtype=dtype)
    value = case(*z, y)
    assert value.dtype == torch.float32
    # tau² amplifies the rounding of a divergence that is as much smaller.
    tolerance = {"rtol": 1e-4, "atol": 1e-3 if case.name == "ard" else 1e-5}
    np.testing.assert_allclose(value, case.equation(*numpy(z, y)), **tolerance)


@every_loss
def test_row_alone_is_row_in_batch(case):
    arguments = inputs()
    alone = [case(*(t[i : i + 1] for t in arguments)) for i in range(7)]
    torch.testing.assert_close(case(*arguments), torch.cat(alone), rtol=1e-12, atol=1e-12)


@every_loss
def test_extreme_logits_stay_finite(case):
    for scale in (1e4, -1e4):
        a = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0]]) * scale
        z, y = [a.roll(shift, dims=1) for shift in (0, 1, 2, 1)], torch.tensor([0, 2, 1])
        free = [z["abcd".index(letter)].requires_grad_() for letter in case.gradients]
        value = case(*z, y)
        assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), free))
        expected = case.equation(*numpy(z, y))
        np.testing.assert_allclose(value.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted({case.name for case in CASES}))
def test_the_whole_loss_compiles_and_its_numbers_may_vary(name, monkeypatch):
    arguments = inputs(dtype=torch.float32)
    cases = [case for case in CASES if case.name == name]
    plain = [case(*arguments) for case in cases]
    compiled = torch.compile(getattr(losses, name), fullgraph=True, backend="eager")
    monkeypatch.setattr(losses, name, compiled)
    for case, value in zip(cases, plain, strict=True):
        assert torch.equal(case(*arguments), value)


def test_losses_of_a_batch_compile():
    *z, y = inputs(5, 4)
    compiled = torch.compile(losses.ferd_generator_loss, fullgraph=True, backend="eager")
    arguments = (z[0], z[1], y, z[2], z[0].mean())
    assert compiled(*arguments) == losses.ferd_generator_loss(*arguments)
    compiled = torch.compile(losses.class_variance, fullgraph=True, backend="eager")
    plain = losses.class_variance(z[0][:, 0], y, num_classes=4)
    assert torch.equal(compiled(z[0][:, 0], y, num_classes=4), plain)


def test_every_loss_is_in_the_table():
    others = {"BatchNormStatistics", "MTARDBalance", "class_temperatures"}
    of_a_batch = {"ferd_generator_loss", "class_variance"}
    assert {case.name for case in CASES} == set(losses.__all__) - others - of_a_batch


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


def test_a_masked_class_has_probability_0():
    """Classes of logit -inf. KL((1/2, 0, 1/2) || (1/4, 1/2, 1/4)) = log 2; of two left, entropy is log 2."""
    half = torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True)
    full = torch.tensor([[0.25, 0.5, 0.25]]).log().requires_grad_()
    cases = [
        (losses.kl_divergence(half, half), 0.0),
        (losses.kl_divergence(half, full), math.log(2)),
        (losses.confidence_penalty(half), math.log(3) - math.log(2)),
        (losses.decoupled_kl(half, half), math.log(2)),
        (losses.masked_distillation(half, full), 0.0),  # they disagree
        (losses.rslad(half, half, half), 0.0),
    ]
    for value, expected in cases:
        assert value.item() == pytest.approx(expected, abs=1e-6)
        gradients = torch.autograd.grad(value.sum(), (half, full), allow_unused=True)
        assert all(bool(g.isfinite().all()) for g in gradients if g is not None)
    for infinite in (losses.kl_divergence(full, half), losses.decoupled_kl(half, full)):
        assert infinite.item() == math.inf


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
    a, *_, y = inputs(4, 5)
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
    s, t, *_ = inputs(4, 3)
    t.requires_grad_()
    w = (t / 100).softmax(dim=1)
    gap = (t[:, :, None] - t[:, None, :]) - (s[:, :, None] - s[:, None, :])
    plain = 0.25 * (w[:, :, None] * w[:, None, :] * gap**2).sum()
    (expected,) = torch.autograd.grad(plain, t)
    (gradient,) = torch.autograd.grad(losses.decoupled_kl(s, t).sum(), t)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0.1


def test_distillation_turns_the_arguments_around():
    a, b, *_ = inputs()
    t = torch.linspace(0.5, 4, 7, dtype=torch.float64)
    assert torch.equal(losses.distillation(a, b), losses.kl_divergence(b, a))
    assert not torch.allclose(losses.distillation(a, b), losses.kl_divergence(a, b))
    turned = losses.kl_divergence(b, a, temperature=t)
    assert torch.equal(losses.distillation(a, b, temperature=t), turned)


@pytest.mark.parametrize("function", [losses.kl_divergence, losses.distillation])
def test_temperature_may_differ_by_sample(function):
    a, b, *_ = inputs()
    t = torch.linspace(0.5, 4, 7)
    rows = [function(a[i : i + 1], b[i : i + 1], temperature=t[i].item()) for i in range(7)]
    torch.testing.assert_close(function(a, b, temperature=t), torch.cat(rows))
    constant = function(a, b, temperature=torch.full((7,), 2.0))
    assert torch.equal(constant, function(a, b, temperature=2))


def test_no_gradient_reaches_the_teacher_of_the_distillation_loss():
    clean, adv, teacher = (inputs(seed=s)[0].requires_grad_() for s in range(3))
    losses.ferd_distillation_loss(clean, adv, teacher).sum().backward()
    assert teacher.grad is None
    scaled = (clean.softmax(dim=1) - teacher.softmax(dim=1)).detach()
    torch.testing.assert_close(clean.grad, 5 / 6 * scaled)
    torch.testing.assert_close(adv.grad, (adv.softmax(1) - teacher.softmax(1)).detach() / 6)


def generator_inputs():
    teacher, student, nonrobust, _, y = inputs(6, 4)
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
