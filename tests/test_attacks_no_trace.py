"""What attacks leave behind (nothing), and the surroundings they work in."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ferdlib.attacks import autoattack, cw_linf, fgsm, least_pgd_steps, pgd, utae_pgd

K = 3
ASCENTS = {
    "pgd": partial(pgd, steps=4),
    "fgsm": fgsm,
    "cw_linf": partial(cw_linf, steps=4),
    "utae_pgd": lambda model, x, y, **rest: utae_pgd(model, x, steps=4, **rest),
    "least_pgd_steps": lambda model, x, y, **rest: least_pgd_steps(model, x, y, steps=4, **rest)[0],
}
ATTACKS = ASCENTS | {
    "autoattack": lambda model, x, y, **rest: autoattack(model, x, y, num_classes=K, **rest).x_adv
}
ascents = pytest.mark.parametrize("attack", list(ASCENTS))
attacks = pytest.mark.parametrize("attack", list(ATTACKS))


def batch(n=2, channels=2, height=6, width=5, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return torch.rand(n, channels, height, width, generator=rng).to(dtype)


def answers(model, x):
    with torch.no_grad():
        return model(x).argmax(dim=1)


def radius(attack):
    """So large for AutoAttack that its first attack ends the search."""
    return {"eps": 0.9} if attack == "autoattack" else {"eps": 0.1}


X = batch()


@pytest.fixture
def mixed(tiny_model):
    """Half in train mode, a frozen BatchNorm, a frozen parameter, gradients here and there."""
    model = tiny_model(num_classes=K)
    model.right = answers(model, X)
    model.train()[1].eval()
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.randn(model[3].weight.shape)
    model[9].bias.grad = torch.zeros(K)
    return model


def state(model):
    return {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "grad mode": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "hooks": sum(len(m._forward_hooks) for m in model.modules()),
    }


@attacks
def test_no_trace(mixed, attack):
    x, y = X.clone().requires_grad_(), mixed.right.clone()
    before = state(mixed)
    x_adv = ATTACKS[attack](mixed, x, y, **radius(attack))
    assert state(mixed) == before
    assert torch.equal(x, X)
    assert torch.equal(y, mixed.right)
    assert x.grad is None
    assert not x_adv.requires_grad
    assert x_adv.grad_fn is None
    assert not torch.equal(x_adv, x)


class Failing(nn.Module):
    def __init__(self, model, at):
        super().__init__()
        self.model, self.left = model, at

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError
        return self.model(x)


@attacks
@pytest.mark.parametrize("where", ["model", "hook"])
def test_no_trace_after_an_exception_on_the_way(mixed, attack, where):
    def on_step(step, x_adv, logits):
        raise ZeroDivisionError

    calls = {"fgsm": 1, "autoattack": 40}.get(attack, 3) if where == "model" else -1
    before, random, rest = state(mixed), torch.get_rng_state(), radius(attack)
    if attack != "autoattack":
        rest |= {"rng": torch.Generator(), "on_step": on_step if where == "hook" else None}
    elif where == "hook":
        rest["on_batch"] = partial(on_step, 0)
    with pytest.raises(ZeroDivisionError):
        ATTACKS[attack](Failing(mixed, calls), X, mixed.right, **rest)
    assert state(mixed) == before
    assert torch.equal(torch.get_rng_state(), random)


@attacks
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_under_no_grad_and_inference_mode(mixed, attack, mode):
    rest, y = radius(attack), mixed.right
    if attack != "autoattack":
        rest |= {"random_start": 0.05 * torch.ones_like(X), "eps": torch.tensor([0.1, 0.2])}
    expected = ATTACKS[attack](mixed.eval(), X, y, **rest)
    with mode():
        before = state(mixed)
        inside = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in rest.items()}
        x_adv = ATTACKS[attack](mixed, X.clone(), y.clone(), **inside)
        assert state(mixed) == before
    assert torch.equal(x_adv, expected)
    assert not torch.equal(x_adv, X)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_reference_logits_made_under_inference_mode(mixed, mode):
    with mode():
        reference = mixed.eval()(X).roll(1, 1)
        x_adv = utae_pgd(mixed, X, reference, random_start=None)
    assert torch.equal(x_adv, utae_pgd(mixed, X, reference.clone(), random_start=None))


@attacks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_in_and_out(tiny_model, attack, dtype):
    model, x = tiny_model(num_classes=K).to(dtype), batch(4, dtype=dtype)
    y, eps = answers(model, x), radius(attack)["eps"]
    x_adv = ATTACKS[attack](model, x, y, eps=eps)
    assert x_adv.dtype == dtype
    assert x_adv.shape == x.shape
    rounding = 1e-12 if dtype == torch.float64 and attack != "autoattack" else 1e-7
    assert (x_adv.double() - x.double()).abs().max() <= eps + rounding
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not torch.equal(x_adv, x)


@ascents
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_iterated_in_float32_and_stays_inside(tiny_model, attack, dtype):
    model, seen, eps = tiny_model(num_classes=K).to(dtype), [], 8 / 255
    x = (0.59 * batch(40) - 0.295).to(dtype)
    bounds = (-0.3, 0.3)  # to the nearest, both would be rounded outwards
    assert torch.tensor(bounds[1], dtype=dtype).item() > bounds[1]
    x_adv = ASCENTS[attack](
        model, x, answers(model, x), eps=eps, bounds=bounds, on_step=lambda *a: seen.append(a)
    )
    assert {iterate.dtype for _, iterate, _ in seen} == {torch.float32}
    assert (x_adv.double() - x.double()).abs().max() <= torch.tensor(eps).double()
    assert x_adv.double().abs().max() <= bounds[1]


@attacks
@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (3, 5, 4, 7), (0, 2, 6, 5)])
def test_shapes(tiny_model, attack, shape):
    model, x = tiny_model(num_classes=K, in_channels=shape[1]), batch(*shape)
    assert ATTACKS[attack](model, x, answers(model, x), **radius(attack)).shape == shape


@ascents
@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_class_counts(tiny_model, attack, num_classes):
    model, x = tiny_model(num_classes=num_classes), batch(8)
    y = answers(model, x)
    assert y.max() > 0
    x_adv = ASCENTS[attack](model, x, y, eps=0.3, rng=torch.Generator().manual_seed(0))
    assert (answers(model, x_adv) != y).any()


@ascents
@pytest.mark.parametrize(("start", "eps"), [("uniform", torch.tensor([0.1, 0.2])), ("normal", 0.1)])
def test_a_generator_is_the_only_randomness(tiny_model, attack, start, eps):
    model, y, before = tiny_model(num_classes=K), torch.tensor([0, 1]), torch.get_rng_state()
    run = partial(ASCENTS[attack], model, X, y, random_start=start, eps=eps)
    generator = torch.Generator().manual_seed(3)
    first, second = run(rng=generator), run(rng=generator)
    assert torch.equal(run(rng=torch.Generator().manual_seed(3)), first)
    assert not torch.equal(first, second)
    ASCENTS[attack](model, X, y, random_start=None)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    assert torch.equal(run(), first)
    assert torch.equal(run(), second)


@ascents
@pytest.mark.parametrize("training", [False, True])
def test_train_mode_moves_the_statistics_and_restores_the_flags(mixed, attack, training):
    if not training:
        mixed.eval()
    before = state(mixed)
    ASCENTS[attack](mixed, X, mixed.right, train_mode=True)
    after = state(mixed)
    moved = {k for k, v in after.pop("values").items() if v != before["values"][k]}
    norms = (4,) if training else (1, 4)  # a module frozen inside a training model stays frozen
    names = ("running_mean", "running_var", "num_batches_tracked")
    assert moved == {f"{i}.{name}" for i in norms for name in names}
    before.pop("values")
    assert after == before
    forwards = 1 if attack == "fgsm" else 4  # the reference of utae_pgd is taken in eval mode
    assert mixed[4].num_batches_tracked == forwards


class Wrapper(nn.Module):
    """As nn.DataParallel and DistributedDataParallel hold their module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


@attacks
def test_wrappers_callables_and_layouts_change_nothing(tiny_model, attack):
    model, x = tiny_model(num_classes=K), batch(3)
    y, rest = answers(model, x), radius(attack)
    if attack != "autoattack":
        rest["random_start"] = None
    expected = ATTACKS[attack](model, x, y, **rest)
    assert torch.equal(ATTACKS[attack](Wrapper(model).train(), x, y, **rest), expected)
    model.eval()
    assert torch.equal(ATTACKS[attack](lambda images: model(images), x, y, **rest), expected)
    assert all(p.grad is None for p in model.parameters())
    strided = x.to(memory_format=torch.channels_last)
    layout = model.to(memory_format=torch.channels_last)
    close = (ATTACKS[attack](layout, strided, y, **rest) - expected).abs() < 1e-5
    assert close.float().mean() > 0.95


@attacks
def test_autocast(mixed, attack):
    seen = []
    mixed[9].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        before = state(mixed)
        x_adv = ATTACKS[attack](mixed, X, mixed.right, **radius(attack))
        assert state(mixed) == before
        student = mixed(X)  # an attack must not leave casted weights without a gradient behind
    assert set(seen) == {torch.bfloat16}
    assert x_adv.dtype == torch.float32
    assert not torch.equal(x_adv, X)
    weight = mixed[9].weight
    assert torch.autograd.grad(student.float().square().sum(), weight)[0].abs().sum() > 0


class HostReads(TorchDispatchMode):
    """How often a value is read from a tensor, for which an accelerator would be waited."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("attack", [pgd, least_pgd_steps], ids=lambda attack: attack.__name__)
def test_no_step_waits_for_a_value(attack, tiny_model):
    """With a loss that reads none: the library's own check labels, on the CPU alone."""
    model, x, y = tiny_model(), batch(), torch.tensor([0, 1])
    loss = partial(F.cross_entropy, reduction="none")
    counts = []
    for steps in (1, 9):
        with HostReads() as reads:
            attack(model, x, y, loss=loss, steps=steps)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0
