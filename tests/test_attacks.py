"""The attacks against closed forms, other libraries and their equations, and how strong they are."""

import copy
import inspect

import foolbox
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from sklearn.datasets import load_digits
from torch import nn

from ferdlib import losses
from ferdlib.attacks import autoattack, cw_linf, fgsm, least_pgd_steps, pgd, utae_pgd
from ferdlib.attacks.ascent import draw_start
from ferdlib.models import small_cnn

DTYPES = (torch.float32, torch.float64)
LINF = {"pgd": pgd, "fgsm": fgsm, "cw_linf": cw_linf, "least_pgd_steps": least_pgd_steps}
IMAGE = (2, 6, 5)


def batch(n=8, dtype=torch.float32, num_classes=4, seed=0, shape=IMAGE):
    """Images with many pixels at or near the bounds, and labels."""
    rng = torch.Generator().manual_seed(seed)
    x = (torch.rand(n, *shape, generator=rng, dtype=torch.float64) * 1.2 - 0.1).clamp(0, 1)
    return x.to(dtype), torch.randint(num_classes, (n,), generator=rng)


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(dim=1) == y).double().mean().item()


class Linear(nn.Module):
    """Logits W x + b, where class 0 is the only rival of every other class."""

    def __init__(self, num_classes, dtype, offset=0.0):
        super().__init__()
        rng = torch.Generator().manual_seed(num_classes)
        size = IMAGE[0] * IMAGE[1] * IMAGE[2]
        self.w = torch.randn(num_classes, size, generator=rng, dtype=torch.float64).to(dtype)
        self.b = torch.full((num_classes,), offset - 3000.0, dtype=dtype)

    def forward(self, x):
        label = torch.arange(len(x)) % (len(self.w) - 1) + 1
        bias = self.b.repeat(len(x), 1)
        bias[:, 0] += 3000
        bias[torch.arange(len(x)), label] += 3000
        return x.flatten(1) @ self.w.T + bias

    def optimum(self, x, y, eps):
        slope = (self.w[0] - self.w[y]).reshape(x.shape)
        return (x + eps * slope.sign()).clamp(0, 1)


@pytest.mark.parametrize("offset", [0.0, -500.0])
@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attack", list(LINF))
def test_linear_model_gives_the_closed_form(attack, dtype, num_classes, offset):
    model, eps = Linear(num_classes, dtype, offset), 0.07
    x, _ = batch(dtype=dtype)
    y = torch.arange(len(x)) % (num_classes - 1) + 1
    arguments = {} if attack == "fgsm" else {"steps": 8, "step_size": 0.02}
    if attack == "cw_linf":
        arguments["confidence"] = 1e6
    x_adv = LINF[attack](model, x, y, eps=eps, **arguments)
    x_adv = x_adv[0] if attack == "least_pgd_steps" else x_adv
    assert x_adv.dtype == dtype
    assert torch.equal(x_adv, model.optimum(x, y, eps))
    assert not torch.equal(x_adv, x)


@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_equals_torchattacks(tiny_model, random_start):
    model = tiny_model()
    x, y = batch()
    reference = torchattacks.PGD(model, eps=0.1, alpha=0.03, steps=7, random_start=random_start)
    torch.manual_seed(5)
    expected = reference(x, y)
    torch.manual_seed(5)
    start = "uniform" if random_start else None
    x_adv = pgd(model, x, y, eps=0.1, step_size=0.03, steps=7, random_start=start)
    assert torch.equal(x_adv, expected)


def test_fgsm_equals_torchattacks(tiny_model):
    model = tiny_model()
    x, y = batch()
    assert torch.equal(fgsm(model, x, y, eps=0.1), torchattacks.FGSM(model, eps=0.1)(x, y))


@pytest.mark.parametrize("name", ["pgd", "fgsm"])
def test_foolbox_agrees(tiny_model, name):
    model = tiny_model()
    x, y = batch()
    other = foolbox.PyTorchModel(copy.deepcopy(model), bounds=(0, 1), device="cpu")
    if name == "pgd":
        x_adv = pgd(model, x, y, eps=0.1, step_size=0.03, steps=7, random_start=None)
        reference = foolbox.attacks.LinfProjectedGradientDescentAttack(
            abs_stepsize=0.03, steps=7, random_start=False
        )
    else:
        x_adv = fgsm(model, x, y, eps=0.1)
        reference = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    raw, _, _ = reference(other, x, y, epsilons=0.1)
    assert torch.equal(x_adv, raw)


def ascent(objective, x, eps, step_size, steps, start=0.0):
    """The textbook loop: step, into the box around x, into [0, 1]."""
    adv = (x + start).clamp(0, 1)
    for _ in range(steps):
        adv.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(adv).sum(), adv)
        adv = adv.detach() + step_size * gradient.sign()
        adv = torch.max(torch.min(adv, x + eps), x - eps).clamp(0, 1)
    return adv


@pytest.mark.parametrize("confidence", [50.0, 0.0])
@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_cw_linf_equals_its_definition(tiny_model, shift, confidence):
    network = tiny_model().double()
    x, y = batch(dtype=torch.float64)
    y[::2] = network(x[::2]).argmax(dim=1)  # so that both sides of the clamp occur
    rows = torch.arange(len(x))

    def model(images):
        return network(images) + shift

    def objective(images):
        z = network(images)  # a margin does not see the shift
        other = z.clone()
        other[rows, y] = -torch.inf
        return -(z[rows, y] - other.max(dim=1).values + confidence).clamp(min=0)

    arguments = {"eps": 0.1, "step_size": 0.03, "steps": 6}
    x_adv = cw_linf(model, x, y, confidence=confidence, random_start=None, **arguments)
    expected = ascent(objective, x, **arguments)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)
    assert (x_adv != x).any()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_utae_pgd_equals_equation_10(tiny_model, gamma):
    model, teacher = tiny_model().double(), tiny_model(seed=1).double()
    x, _ = batch(dtype=torch.float64)
    reference = teacher(x).detach()
    start = 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    p, uniform = reference.softmax(dim=1), 1 / reference.shape[1]

    def objective(images):
        q = model(images).softmax(dim=1)
        away = (p * (p / q).log()).sum(dim=1)
        return away - gamma * (uniform * (uniform / q).log()).sum(dim=1)

    arguments = {"eps": 0.1, "step_size": 0.03, "steps": 6}
    adv = utae_pgd(model, x, reference, gamma=gamma, random_start=start, **arguments)
    expected = ascent(objective, x, start=start, **arguments)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)


def test_utae_pgd_refers_to_its_own_clean_logits_in_eval_mode(tiny_model):
    model = tiny_model()
    x, _ = batch()
    clean = model(x).detach()
    start = 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for mode in (False, True):
        own = utae_pgd(model.train(mode), x, eps=0.1, random_start=start)
        assert torch.equal(own, utae_pgd(model, x, clean, eps=0.1, random_start=start))
        assert not torch.equal(
            own, utae_pgd(model, x, clean.roll(1, 0), eps=0.1, random_start=start)
        )


def test_utae_pgd_from_x_itself_moves_by_its_uniform_term_alone():
    def model(images):  # softmax is exactly (1, 0), so KL(p || p) has a gradient of exact zeros
        return torch.stack([images[:, 0, 0, 0], torch.full((len(images),), -1e4)], dim=1)

    x = torch.full((2, 1, 1, 2), 0.5)
    arguments = {"eps": 0.1, "step_size": 0.02, "random_start": None}
    expected = x.clone()
    expected[:, 0, 0, 0] -= 0.1  # downhill in the winning logit
    assert torch.equal(utae_pgd(model, x, **arguments), expected)
    with pytest.raises(ValueError, match="^utae_pgd: expected `random_start` or `gamma` > 0"):
        utae_pgd(model, x, gamma=0, **arguments)
    # A start, or the reference of another model, gives a gradient.
    utae_pgd(model, x, gamma=0, **(arguments | {"random_start": "normal"}))
    utae_pgd(model, x, torch.ones(2, 2), gamma=0, **arguments)


@pytest.fixture(scope="module")
def digits():
    """A small network trained on clean digits, and images it has not seen."""
    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(bunch.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small_cnn(1, 10, width=8)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(6):
            for index in torch.randperm(1600).split(100):
                optimizer.zero_grad()
                F.cross_entropy(model(x[index]), y[index]).backward()
                optimizer.step()
    return model.eval(), x[1600:1728], y[1600:1728]


STRONG = {
    "pgd": lambda m, x, y, **k: pgd(m, x, y, steps=20, step_size=0.05, **k),
    "cw_linf": lambda m, x, y, **k: cw_linf(m, x, y, step_size=0.05, **k),
    "least_pgd_steps": lambda m, x, y, **k: least_pgd_steps(m, x, y, step_size=0.05, **k)[0],
    "utae_pgd": lambda m, x, y, **k: utae_pgd(m, x, step_size=0.05, **k),
}


def strong(attack, digits, eps=0.2, most=0.05):
    """The one requirement on strength: nearly nothing of a clean model survives `eps`."""
    model, x, y = digits
    assert accuracy(model, x, y) > 0.9
    x_adv = attack(model, x, y, eps=eps, rng=torch.Generator().manual_seed(0))
    assert (x_adv - x).abs().max() <= eps + 1e-6
    assert accuracy(model, x_adv, y) <= most


@pytest.mark.parametrize("name", list(STRONG))
def test_attacks_are_strong(digits, name):
    strong(STRONG[name], digits)
    strong(STRONG[name], digits, eps=0.5, most=0.02)


def noise(model, x, y, *, eps, rng):
    return pgd(model, x, y, eps=eps, steps=0, rng=rng)


@pytest.mark.parametrize("weak", [lambda model, x, y, **_: x.clone(), noise])
def test_no_attack_and_noise_are_not_strong(digits, weak):
    with pytest.raises(AssertionError):
        strong(weak, digits)


def test_more_work_is_a_stronger_attack(digits):
    model, x, y = digits
    arguments = {"eps": 0.12, "step_size": 0.02, "random_start": None}
    pgd_1, pgd_5, pgd_20 = (
        accuracy(model, pgd(model, x, y, steps=n, **arguments), y) for n in (1, 5, 20)
    )
    one_step = accuracy(model, fgsm(model, x, y, eps=0.12), y)
    margin = accuracy(model, cw_linf(model, x, y, steps=20, **arguments), y)
    assert pgd_20 <= pgd_5 < pgd_1 < accuracy(model, x, y)
    assert max(pgd_20, margin) < one_step < accuracy(model, x, y)


RADII = {"eps": 8 / 255, "bounds": (0.0, 1.0), "train_mode": False, "rng": None}
STEPS = RADII | {"step_size": 2 / 255, "steps": 10, "random_start": "uniform", "on_step": None}
DEFAULTS = {
    pgd: STEPS | {"loss": losses.cross_entropy, "early_stop": False},
    fgsm: RADII | {"random_start": None, "loss": losses.cross_entropy, "on_step": None},
    cw_linf: STEPS | {"steps": 20, "confidence": 50.0, "early_stop": False},
    utae_pgd: STEPS | {"reference_logits": None, "gamma": 0.5, "random_start": "normal"},
    autoattack: {"eps": 8 / 255, "version": "standard", "batch_size": 250, "seed": 0},
}
DEFAULTS[least_pgd_steps] = DEFAULTS[pgd] | {"labels": None, "count": "first"}
DEFAULTS[autoattack] |= {"on_batch": None}


@pytest.mark.parametrize("attack", list(DEFAULTS), ids=lambda attack: attack.__name__)
def test_default_strength_is_pinned(attack):
    parameters = inspect.signature(attack).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == DEFAULTS[attack]


@pytest.mark.parametrize("random_start", ["uniform", "normal", None])
@pytest.mark.parametrize("attack", [*LINF.values(), utae_pgd], ids=lambda attack: attack.__name__)
def test_eps_zero_is_the_identity(tiny_model, attack, random_start):
    x, y = batch()
    second = None if attack is utae_pgd else y
    x_adv = attack(tiny_model(), x, second, eps=0.0, random_start=random_start)
    x_adv = x_adv[0] if attack is least_pgd_steps else x_adv
    assert torch.equal(x_adv, x)
    assert x_adv.data_ptr() != x.data_ptr()


def start(x, random_start, eps=0.1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.zeros(len(x), dtype=torch.int64)
    return pgd(lambda _: None, x, y, eps=eps, steps=0, random_start=random_start, rng=rng)


def test_uniform_start_fills_the_ball_and_each_sample_s_own():
    offset = start(torch.full((50, 2, 8, 8), 0.5), "uniform") - 0.5
    assert 0.0999 < offset.abs().max() <= 0.1 + 1e-7
    assert offset.std() == pytest.approx(0.1 / 3**0.5, rel=0.03)
    assert offset.mean().abs() < 0.003
    assert (offset.abs() < 0.01).float().mean() == pytest.approx(0.1, abs=0.01)
    eps = torch.tensor([0.0, 0.02, 0.3])
    offset = start(torch.full((3, 8, 32, 32), 0.5), "uniform", eps) - 0.5
    assert (offset.abs().amax((1, 2, 3)) <= eps + 1e-7).all()
    torch.testing.assert_close(offset.std((1, 2, 3)), eps / 3**0.5, rtol=0.03, atol=0)


def test_normal_start_is_small_noise():
    x = torch.full((50, 2, 8, 8), 0.5)
    assert (start(x, "normal") - x).std() == pytest.approx(0.001, rel=0.03)
    assert (start(x, "normal") - x).mean().abs() < 5e-5
    assert (start(x, "normal", eps=0.0005) - x).abs().max() <= 0.0005 + 1e-7


def test_a_start_for_all_processes_is_cut_into_parts():
    x, _ = batch(6)
    for random_start, eps in [("uniform", 0.1), ("normal", 0.1), (None, 0.1)]:
        rng = torch.Generator().manual_seed(0)
        whole = draw_start(x, random_start, eps, rng)
        parts = torch.cat([start(x[i::2], whole[i::2], eps) for i in (0, 1)])
        expected = start(x, random_start, eps)
        assert torch.equal(parts, torch.cat([expected[::2], expected[1::2]]))


@pytest.mark.parametrize("eps", [0.1, torch.tensor([0.1, 0.02, 0.0], dtype=torch.float64)])
def test_tensor_start_is_projected(eps):
    x, _ = batch(3, torch.float64)
    offset = 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    radius = torch.as_tensor(eps, dtype=torch.float64).reshape(-1, 1, 1, 1)
    expected = (x + offset.clamp(-radius, radius)).clamp(0, 1)
    torch.testing.assert_close(start(x, offset, eps), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("random_start", ["uniform", "normal", None])
def test_every_start_is_inside_other_bounds(random_start):
    x = torch.tensor([-1.0, 2.0, 0.0]).reshape(3, 1, 1, 1).expand(3, 2, 6, 5)
    y = torch.zeros(3, dtype=torch.int64)
    x_adv = pgd(lambda _: None, x, y, eps=4.0, steps=0, random_start=random_start, bounds=(-1, 2))
    assert x_adv.min() >= -1
    assert x_adv.max() <= 2


def test_per_sample_radii_and_steps_equal_scalar_ones(tiny_model):
    model = tiny_model().double()
    x, y = batch(4, torch.float64)
    eps = torch.tensor([0.0, 0.02, 0.1, 0.3], dtype=torch.float64)
    size = torch.tensor([0.1, 0.01, 0.03, 0.07], dtype=torch.float64)
    x_adv = pgd(model, x, y, eps=eps, step_size=size, steps=5, random_start=None)
    for i in range(4):
        row, label, e, a = x[i : i + 1], y[i : i + 1], eps[i].item(), size[i].item()
        alone = pgd(model, row, label, eps=e, step_size=a, steps=5, random_start=None)
        assert torch.equal(x_adv[i : i + 1], alone)
    assert ((x_adv - x).abs().amax((1, 2, 3)) - eps).abs().max() < 1e-12
    constant = torch.full((4,), 0.1, dtype=torch.float64)
    assert torch.equal(fgsm(model, x, y, eps=constant), fgsm(model, x, y, eps=0.1))


@pytest.mark.parametrize("attack", [*LINF.values(), utae_pgd], ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("with_start", [False, True])
def test_a_row_alone_equals_the_row_in_its_batch(tiny_model, attack, with_start):
    model = tiny_model().double()
    x, y = batch(5, torch.float64)
    offset = 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()

    def run(rows):
        second = model(x[rows]).detach().roll(1, 1) if attack is utae_pgd else y[rows]
        chosen = offset[rows] if with_start else None
        result = attack(model, x[rows], second, eps=0.1, random_start=chosen)
        return result if attack is least_pgd_steps else (result,)

    together = run(slice(0, 5))
    for i in range(5):
        for whole, alone in zip(together, run(slice(i, i + 1)), strict=True):
            assert torch.equal(whole[i : i + 1], alone)
