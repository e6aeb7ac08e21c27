"""A copy is used only if it is the model: called as its owner calls it, compared with it, and following it."""

import random
import unittest.mock

import numpy
import pytest
import torch
from test_freeze import Branching, used
from torch import nn
from torch.nn.utils import prune

from ferdlib.models import FrozenModel, Normalized, freeze_for_attack, small_cnn
from ferdlib.models.stand_in import StandIn


def net() -> nn.Module:
    return used(small_cnn(1, 3, width=4)).eval()


# Read by a forward, and no attribute of a model.
SCALE = {0: 1.0}


class Around(nn.Module):
    """A network, and a function of it and the images."""

    def __init__(self, function=lambda self, x: self.net(x)):
        super().__init__()
        self.net, self.function, self.gate, self.scales = net(), function, 1.0, [1.0]
        self.slope, self.weight = nn.LeakyReLU(0.5), nn.Parameter(torch.tensor(2.0))
        self.register_buffer("log_t", torch.tensor(0.5))
        self.shift, self.rng = torch.tensor(1.5), None

    def forward(self, x):
        return self.function(self, x)

    def scaled(self, module, args, out):
        return out * self.weight


class Called(Around):
    def __call__(self, x):
        return super().__call__(2 * x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.b.weight = self.a.weight
        self.n, self.o, self.fc = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Linear(256, 3)

    def forward(self, x):
        return self.fc((self.n(self.a(x)).relu() + self.o(self.b(x)).relu()).flatten(1))


def with_hook(layer="", **hook):
    model, ((kind, function),) = net(), hook.items()
    getattr(model.get_submodule(layer), f"register_{kind}")(function)
    return model


def with_own_forward(layer=""):
    model = net()
    plain = model.get_submodule(layer).forward
    model.get_submodule(layer).forward = lambda x: 3 * plain(x - 0.5)
    return model


def of_a_hook(function):
    """The weight is made anew at every forward, and cannot be copied with its history."""
    model = nn.Sequential(
        function(nn.Conv2d(1, 4, 3)), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)
    )
    model(torch.rand(4, 1, 8, 8))
    return model


def with_hook_of_another_module():
    model = Around()
    model.net.fc.register_forward_hook(model.scaled)
    return model


WAYS = {
    "a pre-hook": lambda: with_hook(forward_pre_hook=lambda m, args: (2 * args[0] - 1,)),
    "a hook": lambda: with_hook(forward_hook=lambda m, args, z: -z),
    "a hook of a block": lambda: with_hook("layer2", forward_hook=lambda m, args, z: 2 * z),
    "a hook that is another module's": with_hook_of_another_module,
    "a forward of the instance": with_own_forward,
    "a forward of a layer": lambda: with_own_forward("layer1.0"),
    "a call of the class": Called,
    "a wrapper": lambda: nn.DataParallel(net()),
    "a wrapper that normalises": lambda: Normalized(net(), [0.5], [0.2]),
    "tied weights": lambda: used(Tied()),
    "a tensor made of a buffer": lambda: Around(lambda self, x: self.net(x) * self.log_t.exp()),
    "a tensor without a name": lambda: Around(lambda self, x: self.net(x) * torch.tensor(2.0)),
    "a plain tensor": lambda: Around(lambda self, x: self.net(x) * self.shift),
    "a method in place": lambda: Around(lambda self, x: self.net(x).mul_(self.log_t)),
    "noise of the input's shape": lambda: Around(lambda self, x: self.net(x + torch.randn_like(x))),
    "weight_norm": lambda: of_a_hook(nn.utils.weight_norm),
    "spectral_norm": lambda: of_a_hook(nn.utils.spectral_norm),
    "pruning": lambda: of_a_hook(lambda c: prune.l1_unstructured(c, "weight", 0.5)),
    "five dimensions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(128, 3)
    ),
    "a view": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), View(), nn.Linear(144, 3)),
}  # fmt: skip


class View(nn.Module):
    def forward(self, x):
        return x.view(-1, 144)


@pytest.mark.filterwarnings("ignore")  # of what torch has given up
@pytest.mark.parametrize("way", WAYS)
def test_the_copy_is_what_the_model_does_when_it_is_called(way):
    torch.manual_seed(0)
    model, x = WAYS[way](), torch.rand(3, 1, 8, 8)
    fast = freeze_for_attack(model)
    for _ in range(3):
        outcomes = []
        for network in (model.eval(), fast):
            torch.manual_seed(1)
            outcomes.append(network(x))
        assert torch.allclose(outcomes[1], outcomes[0], atol=1e-5)
        assert ("noise" in way) is not torch.equal(fast(x), fast(x))
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
        model(x).square().mean().backward()
        optimizer.step()
        fast.follow(model)


CHANGES = {
    "a number": lambda m: setattr(m, "gate", 3.0),
    "a number in a list": lambda m: m.scales.__setitem__(0, 3.0),
    "a number of a layer": lambda m: setattr(m.slope, "negative_slope", 0.9),
    "a kind of layer": lambda m: setattr(m, "slope", nn.GELU()),
    "a function": lambda m: setattr(m, "function", lambda self, x: 3 * gated(self, x)),
    "a plain tensor": lambda m: m.shift.sub_(3),
    "a hook": lambda m: m.register_forward_hook(lambda module, args, z: 3 * z),
    "a forward": lambda m: setattr(m, "forward", lambda x: 3 * m.net(x)),
}


def gated(self, x):
    return self.slope(self.net(x) * self.gate * self.scales[0] - self.shift)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_beside_the_weights_reaches_the_copy(change):
    torch.manual_seed(0)
    model, x = Around(gated).eval(), torch.rand(3, 1, 8, 8)
    fast, old = freeze_for_attack(model), model(x)
    fast.follow(model)
    network = fast.network
    fast.follow(model)
    assert fast.network is network  # nothing has changed, so nothing is traced
    CHANGES[change](model)
    fast.follow(model)
    assert not torch.allclose(model(x), old, atol=1e-3)
    assert torch.allclose(fast(x), model(x), atol=1e-5)


def counting(self, x):
    self.log_t += 1
    return self.net(x) * self.log_t


def remembering(self, x):
    self.shift = (self.shift + self.net(x)).detach()
    return self.shift


def with_rng(draw):
    model = Around(lambda self, x: self.net(x) * draw(self.rng))
    model.rng = torch.Generator()
    return model


NONE = {
    "random numbers": [
        lambda: Around(lambda self, x: self.net(x + torch.randn(1, 1, 8, 8))),
        lambda: Around(lambda self, x: self.net(x) * random.choice((1, -1))),
        lambda: Around(lambda self, x: self.net(x) * numpy.random.rand()),
        lambda: with_rng(lambda rng: torch.rand(1, generator=rng)),
    ],
    "numbers made of weights": [
        lambda: Around(lambda self, x: self.net(x) * self._parameters["weight"].exp())
    ],
    "a forward that changes '(log_t|shift)'": [
        lambda: Around(counting),
        lambda: Around(lambda self, x: self.net(x) * self.log_t.add_(1)),
        lambda: Around(remembering),
    ],
    "`torch.no_grad\\(\\)`": [lambda: Around(lambda self, x: self.net(Rounded.apply(x)))],
    "backward hooks": [
        lambda: with_hook(full_backward_hook=lambda *_: None),
        lambda: with_hook("layer2", backward_hook=lambda *_: None),
    ],
    "TorchScript": [lambda: torch.jit.script(nn.Flatten())],
    "lazy weights in '0'": [lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten())],
    "TraceError": [lambda: Branching()],
}


class Rounded(torch.autograd.Function):
    """A gradient of its own, which its operations do not have."""

    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.filterwarnings("ignore")  # of TorchScript's end
@pytest.mark.parametrize(("reason", "make"), [(r, make) for r in NONE for make in NONE[r]])
def test_what_a_copy_cannot_be_is_refused_by_name_and_otherwise_attacked_itself(
    reason, make, caplog
):
    model, x = make().eval(), torch.rand(3, 1, 8, 8)
    state = torch.get_rng_state()
    message = f"^freeze_for_attack: expected `model` that can be copied for attacks, got a .* with {reason}"
    with pytest.raises(ValueError, match=message):
        freeze_for_attack(model)
    with caplog.at_level("INFO", logger="ferdlib"):
        assert StandIn(model).at(x) is model
    assert len(caplog.messages) == 1
    assert torch.equal(torch.get_rng_state(), state)


def elsewhere(images, traces):
    """One function for images, another for a trace."""
    return Around(lambda self, x: (images if torch.is_tensor(x) else traces)(self, x))


@pytest.mark.parametrize(
    ("model", "found"),
    [
        # Twice as much; the same, of which half has no gradient; none at all.
        (elsewhere(lambda self, x: self.net(x), lambda self, x: 2 * self.net(x)), "logits off by 1 of"),
        (elsewhere(lambda self, x: (self.net(x) + self.net(x).detach()) / 2, lambda self, x: self.net(x)),
         "gradients off by 1 of"),
        (elsewhere(lambda self, x: self.net(x).detach(), lambda self, x: self.net(x)), "another kind of"),
        (elsewhere(lambda self, x: self.net(x + torch.rand(1)), lambda self, x: self.net(x)),
         "other random numbers"),
        (elsewhere(lambda self, x: self.net(x), lambda self, x: self.net(x).view(-1, 7)), "a RuntimeError: shape"),
    ],
)  # fmt: skip
def test_a_copy_that_computes_something_else_is_found_on_the_first_images(model, found, caplog):
    model, x, state = model.eval(), torch.rand(3, 1, 8, 8), torch.get_rng_state()
    fast, message = freeze_for_attack(model), f"^FrozenModel: .* whose copy has .*{found}.*itself$"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            fast(x)
    with caplog.at_level("INFO", logger="ferdlib"):
        assert StandIn(model).at(x) is model
    assert found in caplog.text
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stand_in_looks_again_and_gives_up_where_attributes_change_at_every_step(caplog):
    model, x = Around(lambda self, x: self.net(x) * SCALE[0]), torch.rand(3, 1, 8, 8)
    steady, counting = StandIn(model), StandIn(Around(gated))
    assert isinstance(steady.at(x), FrozenModel)
    with unittest.mock.patch.dict(SCALE, {0: 3.0}):
        steady.follow()
        assert isinstance(steady.at(x), FrozenModel)  # as at every step, without a look
        steady.follow(compare=True)
        assert steady.at(x) is model
    kinds = []
    for step in range(4):
        counting.model.gate = float(step)
        counting.follow()
        kinds.append(type(counting.at(x)))
    assert kinds == [FrozenModel, FrozenModel, Around, Around]
