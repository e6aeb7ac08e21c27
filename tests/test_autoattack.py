"""`autoattack` against `pyautoattack.AutoAttack` itself, and its manners."""

import copy
import logging
import math
import re
import sys
from itertools import pairwise

import pytest
import torch
from pyautoattack import AutoAttack
from torch import nn

from ferdlib.attacks import autoattack
from ferdlib.attacks.autoattack import VERSIONS, _attacks, _compiled, _Logits

NEEDED = {"apgd-t": 4, "apgd-dlr": 3}  # the classes that these losses need


@pytest.fixture
def tracing():
    """The official suite stops tracing; keep that from the debugger and the coverage."""
    trace = sys.gettrace()
    yield
    sys.settrace(trace)


class Stairs(nn.Module):
    """Quantised images: their zero gradients leave work for the later attacks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((8 * x).round() / 8)


def problem(tiny_model, num_classes, n):
    """Images of which the model calls all but the first right."""
    model = Stairs(tiny_model(num_classes=num_classes, in_channels=1, seed=2)).eval()
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    y[0] = (y[0] + 1) % num_classes
    return model, x, y


def official(model, x, y, *, num_classes, eps, version, batch_size, seed, caplog):
    """The suite's own evaluation, its settings for few classes made by hand."""
    suite = AutoAttack(model, eps=eps, version=version, seed=seed)
    if num_classes < 10:
        attacks = [name for name in VERSIONS[version] if num_classes >= NEEDED.get(name, 2)]
        assert version == "standard"
        suite = AutoAttack(model, eps=eps, version="custom", attacks=attacks, seed=seed)
        suite.apgd.n_restarts = 1
        suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = num_classes - 1
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="auto-attack"):
        x_adv, predicted = suite.run_standard_evaluation(x, y, batch_size=batch_size)
    # Its only trace of single attacks is in its log.
    lines = re.findall(r"robust accuracy after (\S+): ([\d.]+)%", caplog.text)
    return x_adv, predicted == y, {name.lower(): float(rate) for name, rate in lines}


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize(
    ("num_classes", "version", "eps", "n"),
    [
        (10, "standard", 0.05, 8),
        (3, "standard", 0.05, 8),
        (2, "standard", 0.05, 8),
        (10, "rand", 0.05, 4),
        (10, "plus", 0.05, 4),
    ],
)
def test_it_is_the_official_evaluation(tiny_model, caplog, num_classes, version, eps, n):
    model, x, y = problem(tiny_model, num_classes, n)
    arguments = {"num_classes": num_classes, "eps": eps, "version": version}
    arguments |= {"batch_size": 5, "seed": 3}
    random, twin = torch.get_rng_state(), copy.deepcopy(model)
    seen = []
    result = autoattack(
        model, x, y, **arguments, on_batch=lambda *word: seen.append((word[0], word[1].clone()))
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())

    x_adv, robust, rates = official(twin, x, y, caplog=caplog, **arguments)
    torch.set_rng_state(random)
    assert torch.equal(result.robust, robust)
    assert torch.equal(result.x_adv, x_adv)
    ours = {name: 100 * flags.float().mean().item() for name, flags in result.per_attack.items()}
    assert "apgd-ce" in rates
    assert {name: ours[name] for name in rates} == pytest.approx(rates, abs=0.01)

    assert list(ours) == [
        "clean",
        *(a for a in VERSIONS[version] if num_classes >= NEEDED.get(a, 2)),
    ]
    flags = list(result.per_attack.values())
    assert all((later <= earlier).all() for earlier, later in pairwise(flags))
    assert torch.equal(flags[-1], result.robust)
    assert flags[-1].sum() < flags[0].sum()
    assert flags[0].tolist() == [False] + [True] * (n - 1)
    with torch.no_grad():
        assert torch.equal(model(result.x_adv).argmax(dim=1) == y, result.robust)
    assert (result.x_adv - x).abs().max() <= eps + 1e-6
    assert result.x_adv.min() >= 0
    assert result.x_adv.max() <= 1
    unchanged = (result.x_adv == x).all(dim=(1, 2, 3))
    assert torch.equal(unchanged, result.robust | ~flags[0])

    with torch.no_grad():
        assert torch.equal(result.predictions, model(result.x_adv).argmax(dim=1))
    assert torch.equal(result.predictions == y, result.robust)
    assert_heard(seen, result.per_attack, batch_size=5)


def assert_heard(seen, per_attack, *, batch_size):
    """A call after each batch of each attack, with flags that only ever fall."""
    rates = iter(seen)
    for (_, before), (name, after) in pairwise(per_attack.items()):
        flags = before
        for _ in range(math.ceil(int(before.sum()) / batch_size)):
            heard, robust = next(rates)
            assert heard == name
            assert (robust <= flags).all()
            assert (robust != flags).sum() <= batch_size
            flags = robust
        assert torch.equal(flags, after)
    assert list(rates) == []


def test_what_was_seen_instead():
    """One pixel: class 2 above 0.6, class 1 above 0.4, class 0 below."""

    def model(images):
        x = images[:, 0, 0, 0]
        return torch.stack([0 * x, 100 * (x - 0.4), 250 * (x - 0.52)], dim=1)

    x = torch.tensor([0.9, 0.65, 0.5, 0.45, 0.65, 0.1]).reshape(-1, 1, 1, 1)
    y = torch.tensor([2, 2, 2, 1, 0, 0])
    seen = []
    result = autoattack(
        model,
        x,
        y,
        num_classes=3,
        eps=0.1,
        batch_size=2,
        on_batch=lambda *word: seen.append((word[0], word[1].clone())),
    )
    # 0.65 falls to class 1 and 0.45 to 0, which a ball of 0.1 around them reaches; the third and the
    # fifth were wrong before.
    assert result.predictions.tolist() == [2, 1, 1, 0, 2, 0]
    assert result.robust.tolist() == [True, False, False, False, False, True]
    assert_heard(seen, result.per_attack, batch_size=2)
    assert [name for name, _ in seen][:2] == ["apgd-ce"] * 2
    assert seen[-1][0] == "square"


def test_no_empty_batch_is_asked_for():
    """`view(len(images), -1)`, as many networks have it, is an error for no images."""
    weight = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))

    def model(images):
        return images.view(len(images), -1) @ weight

    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    heard = []
    result = autoattack(
        model,
        x,
        model(x).argmax(dim=1),
        num_classes=10,
        eps=0.9,
        on_batch=lambda *word: heard.append(word[0]),
    )
    assert not result.robust.any()
    assert heard == ["apgd-ce"]
    assert list(result.per_attack) == ["clean", *VERSIONS["standard"]]


@pytest.mark.parametrize(
    "layout", [lambda x: x.mT.contiguous().mT, lambda x: x.to(memory_format=torch.channels_last)]
)
def test_images_may_lie_in_memory_as_they_like(tiny_model, layout):
    model, x = (
        tiny_model(num_classes=3),
        torch.rand(3, 2, 6, 5, generator=torch.Generator().manual_seed(0)),
    )
    given, arguments = layout(x), {"num_classes": 3, "eps": 0.9}
    found = autoattack(model, given, model(x).argmax(1), **arguments).x_adv
    assert found.stride() == given.stride() != x.stride()
    assert torch.equal(found, autoattack(model, x, model(x).argmax(1), **arguments).x_adv)


@pytest.mark.parametrize("defaults", [(torch.float64, None), (torch.float32, "meta")])
def test_torchs_defaults_change_nothing(tiny_model, defaults):
    model, x = tiny_model(num_classes=3), torch.rand(3, 2, 6, 5, generator=torch.Generator())
    y, arguments = model(x).argmax(1), {"num_classes": 3, "eps": 0.9}
    expected = autoattack(model, x, y, **arguments).x_adv
    try:
        torch.set_default_dtype(defaults[0])
        torch.set_default_device(defaults[1])
        found = autoattack(model, x, y, **arguments).x_adv
        assert torch.get_default_dtype() == defaults[0]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile reads it
def test_a_compiled_model_gives_a_gradient_for_each_class():
    """Its backward runs once, while untargeted FAB wants one for each class of a forward."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    x = torch.rand(4, 1, 4, 4, requires_grad=True)
    compiled = torch.compile(model, backend="aot_eager")
    function = torch.compile(lambda x: model(x), backend="aot_eager")
    for attacked in (model, compiled, lambda x: compiled(x), function):
        logits, found = _Logits(attacked, x.dtype), []
        logits.again = not _compiled(attacked)
        assert logits.again == (attacked is model)
        z = logits(x)
        for k in range(3):
            found += torch.autograd.grad(z[:, k].sum(), x, retain_graph=True)
        expected = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x)
        torch.testing.assert_close(torch.stack(found), expected)


def settings(num_classes, version):
    images, found = torch.full((1, 1, 8, 8), 0.5), {}
    pinned = ("n_iter", "n_restarts", "n_target_classes", "n_queries", "eot_iter", "targeted")
    logits = _Logits(lambda x: torch.zeros(len(x), num_classes), torch.float32)
    for name, perturb in _attacks(logits, images, num_classes, 0.1, version, 7):
        attack = perturb.__self__
        assert (attack.eps, attack.seed, attack.norm) == (0.1, 7, "Linf")
        found[name] = {key: getattr(attack, key) for key in pinned if hasattr(attack, key)}
        found[name]["loss"] = getattr(attack, "loss", None)
        found[name]["rho"] = getattr(attack, "thr_decr", getattr(attack, "p_init", None))
    return found


def test_the_published_settings_are_pinned():
    apgd = {"n_iter": 100, "n_restarts": 1, "eot_iter": 1, "rho": 0.75}
    fab = {"n_iter": 100, "n_restarts": 1, "targeted": True, "n_target_classes": 9}
    assert settings(10, "standard") == {
        "apgd-ce": apgd | {"loss": "ce"},
        "apgd-t": apgd | {"loss": "dlr-targeted", "n_target_classes": 9},
        "fab-t": fab | {"loss": None, "rho": None},
        "square": {
            "n_queries": 5000,
            "n_restarts": 1,
            "targeted": False,
            "loss": "margin",
            "rho": 0.8,
        },
    }


@pytest.mark.parametrize(("num_classes", "targets"), [(2, 1), (3, 2), (4, 3), (10, 9), (100, 9)])
def test_targets_follow_the_classes(num_classes, targets):
    found = settings(num_classes, "standard")
    assert ("apgd-t" in found) == (num_classes > 3)
    assert {s["n_target_classes"] for s in found.values() if "n_target_classes" in s} == {targets}
    assert ("apgd-dlr" in settings(num_classes, "plus")) == (num_classes > 2)


def test_other_versions_keep_their_settings():
    plus, rand = settings(10, "plus"), settings(10, "rand")
    assert [plus[name]["n_restarts"] for name in VERSIONS["plus"]] == [5, 5, 5, 1, 1, 1]
    assert [plus[name]["targeted"] for name in ("fab", "fab-t")] == [False, True]
    assert {s["eot_iter"] for s in rand.values()} == {20}
    assert [s["loss"] for s in rand.values()] == ["ce", "dlr"]


def test_weights_behind_a_lambda_get_no_gradient(tiny_model):
    model, x, y = problem(tiny_model, 3, 2)
    model.model[0].weight.grad = torch.ones_like(model.model[0].weight)
    result = autoattack(lambda images: model(images), x, y, num_classes=3, eps=1e-3)
    assert result.per_attack["apgd-ce"].any()  # so FAB ran, which calls backward
    first, *others = [p.grad for p in model.parameters()]
    assert torch.equal(first, torch.ones_like(first))
    assert others == [None] * len(others)


@pytest.mark.usefixtures("tracing")
def test_tracing_goes_on(tiny_model):
    model, x, y = problem(tiny_model, 10, 2)

    def tracer(frame, event, argument):
        return None

    sys.settrace(tracer)
    autoattack(model, x, y, num_classes=10, eps=0.9)
    assert sys.gettrace() is tracer


def test_the_random_state_survives_an_exception():
    def model(images):
        if images.requires_grad:
            raise ZeroDivisionError
        return torch.ones(len(images), 1) * torch.tensor([1.0, 0.0])

    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        autoattack(model, torch.rand(2, 1, 8, 8), torch.tensor([0, 0]), num_classes=2)
    after_one_draw = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.rand(2, 1, 8, 8)
    assert torch.equal(torch.get_rng_state(), after_one_draw)


@pytest.mark.parametrize("labels", [[0, 1], [1, 0]])
def test_wrong_images_and_no_images(labels):
    def model(images):
        return torch.stack([0 * images[:, 0, 0, 0], 100 + images.sum(dim=(1, 2, 3))], dim=1)

    x = torch.rand(2, 1, 8, 8)
    none = autoattack(model, x[:0], torch.tensor(labels)[:0], num_classes=2)
    assert none.x_adv.shape == (0, 1, 8, 8)
    assert none.robust.shape == none.per_attack["square"].shape == (0,)
    wrong = autoattack(model, x, torch.tensor([0, 0]), num_classes=2)
    assert not wrong.robust.any()
    assert torch.equal(wrong.x_adv, x)
