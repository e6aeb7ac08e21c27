"""The fast copy: the logits of the model, whatever its architecture, and nothing of it touched."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torchvision import models as zoo

from ferdlib._modes import borrowed
from ferdlib.attacks import pgd
from ferdlib.models import Normalized, build_model, freeze_for_attack, small_cnn
from ferdlib.models.stand_in import StandIn

OURS = (
    "resnet18",
    "resnet56",
    "wide_resnet_16_2",
    "preact_resnet18",
    "mobilenet_v2",
    "small_cnn_8",
)
THEIRS = ("densenet121", "shufflenet_v2_x1_0", "efficientnet_b0", "squeezenet1_0")


def used(model: nn.Module) -> nn.Module:
    """With BatchNorm statistics and weights that are not those of a fresh model."""
    rng = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.track_running_stats:
            m.running_mean.normal_(0, 0.3, generator=rng)
            m.running_var.uniform_(0.6, 1.6, generator=rng)
            nn.init.uniform_(m.weight, 0.7, 1.3, generator=rng)
            nn.init.normal_(m.bias, 0, 0.3, generator=rng)
    return model


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def by_name(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if name in OURS:
        return used(build_model(name, 10)), torch.rand(3, 3, 32, 32)
    return used(getattr(zoo, name)(weights=None, num_classes=10)), torch.rand(2, 3, 64, 64)


@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_logits_and_gradients_are_the_models(name):
    model, x = by_name(name)
    fast = freeze_for_attack(model)
    assert len(fast.folded) + len(fast.kept) == len(norms(model))
    assert len(norms(fast)) == len(fast.kept)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        assert float((fast(x) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    found = []  # in float64, where no ReLU or maximum changes sides by rounding
    for network in (model.double(), freeze_for_attack(model)):
        images = x.double().requires_grad_()
        found += torch.autograd.grad(network(images).square().sum(), images)
    assert float((found[0] - found[1]).abs().max()) < 1e-9 * float(found[0].abs().max())


@pytest.mark.parametrize(
    ("name", "folded", "kept"), [("resnet18", 20, 0), ("preact_resnet18", 8, 9)]
)
def test_what_can_be_folded_is(name, folded, kept):
    """In a pre-activation block only the second norm follows a convolution directly."""
    fast = freeze_for_attack(by_name(name)[0])
    assert (len(fast.folded), len(fast.kept)) == (folded, kept)
    assert f"{folded} of {folded + kept} BatchNorm layers folded" in str(fast)


def test_folded_weights_by_hand():
    """gamma / sqrt(var + eps) = 6 / sqrt(3 + 1) = 3: weight 2 * 3, bias (1 - 5) * 3 + 7."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=1.0))
    for tensor, value in zip(
        (*model.parameters(), model[1].running_mean, model[1].running_var),
        (2, 1, 6, 7, 5, 3),
        strict=True,
    ):
        tensor.data.fill_(value)
    fast = freeze_for_attack(model)
    (weight, bias) = fast.parameters()
    assert (float(weight), float(bias)) == (6.0, -5.0)
    assert float(fast(torch.full((1, 1, 1, 1), 0.5))) == -2.0


def test_float64_is_exact():
    model = used(small_cnn(2, 4, width=5)).double().eval()
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    assert torch.allclose(freeze_for_attack(model)(x), model(x), rtol=0, atol=1e-13)


def test_the_model_is_left_alone():
    model = used(small_cnn(2, 4, width=5)).train()
    model.layer2[1].eval()
    model.fc.bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    def seen():
        state = [v.clone() for v in model.state_dict().values()]
        return (
            state,
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
        )

    before, strides = seen(), [p.stride() for p in model.parameters()]
    fast = freeze_for_attack(model)
    pgd(fast, torch.rand(3, 2, 8, 8), torch.tensor([0, 1, 2]), steps=2)
    after = seen()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]
    assert [p.stride() for p in model.parameters()] == strides
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in fast.parameters())
    x = torch.rand(2, 2, 8, 8)
    logits = fast(x)
    with torch.no_grad():
        model.fc.weight.zero_()  # what happens later does not reach the copy
    assert torch.equal(fast(x), logits)


@pytest.mark.parametrize("name", ["small_cnn_8", "preact_resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("fold", [True, False])
def test_following_a_model_that_is_trained(name, fold):
    model, x = by_name(name)
    model = Normalized(model, [0.5, 0.4, 0.3], [0.2, 0.2, 0.3])
    fast, old = freeze_for_attack(model, fold_batchnorm=fold), model.eval()(x).detach()
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    model(x).square().mean().backward()
    optimizer.step()
    assert torch.allclose(fast(x), old, atol=1e-5)
    fast.follow(model)
    expected = model.eval()(x).detach()
    assert float((fast(x) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert float((old - expected).abs().max()) > 1e-3
    assert not any(p.requires_grad for p in fast.parameters())
    assert fast(x).grad_fn is None


class Shared(nn.Module):
    """One convolution before two norms, one norm behind two convolutions, and an output used twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
        self.bn1, self.bn2, self.bn3, self.bn4 = (nn.BatchNorm2d(2) for _ in range(4))
        self.bn5 = nn.BatchNorm2d(2, track_running_stats=False)

    def forward(self, x):
        a = self.bn2(self.conv1(self.bn1(self.conv1(x))))
        b = self.bn3(self.conv2(a))
        c = self.conv3(b)
        return self.bn5(self.bn3(self.bn4(c) + c)).flatten(1)


def test_what_must_not_be_folded_is_not():
    torch.manual_seed(0)
    model = used(Shared()).eval()
    fast = freeze_for_attack(model)
    assert fast.folded == {}
    assert set(fast.kept) == {"bn1", "bn2", "bn3", "bn4", "bn5"}
    x = torch.rand(3, 2, 4, 5)
    assert torch.allclose(fast(x), model(x), atol=1e-6)


def test_layers_with_hooks_keep_them():
    model, seen = used(small_cnn(2, 4, width=5)).eval(), []
    model.layer1[1].register_forward_hook(lambda *_: seen.append(1))
    fast = freeze_for_attack(model)
    assert len(fast.kept) == 1
    fast(torch.rand(2, 2, 8, 8))
    del seen[:]
    fast(torch.rand(2, 2, 8, 8))
    assert seen == [1]


class Branching(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


def test_what_cannot_be_traced_is_copied_without_folding():
    x = torch.rand(2, 1, 2, 2)
    assert torch.equal(freeze_for_attack(Branching(), fold_batchnorm=False)(x), x.flatten(1))
    model = Branching()
    assert StandIn(model).at(x) is model


@pytest.mark.parametrize("fold", [True, False])
def test_eval_mode_for_good(fold):
    model = used(small_cnn(2, 4, width=5)).train()
    fast, x = freeze_for_attack(model, fold_batchnorm=fold), torch.rand(4, 2, 8, 8)
    assert not any(m.training for m in fast.train().modules())
    assert torch.allclose(fast(x), model.eval()(x), atol=1e-5)
    with (
        borrowed(fast, training=True),
        pytest.raises(RuntimeError, match="^FrozenModel: expected ev"),
    ):
        fast(x)
    assert not any(m.training for m in fast.modules())
    again = copy.deepcopy(fast)
    assert torch.equal(again(x), fast(x))


class View(nn.Module):
    def forward(self, x):
        return x.view(-1, 128)


def test_channels_last_is_the_format_of_weights_and_work():
    """By default of this package's own models alone; a view does not bear it."""
    ours, theirs = used(small_cnn(2, 4, width=5)), zoo.squeezenet1_0(num_classes=3)
    found = []
    for model, channels_last in ((ours, None), (ours, True), (ours, False), (theirs, None)):
        fast, formats = freeze_for_attack(model, channels_last=channels_last), []
        conv = next(m for m in fast.modules() if isinstance(m, nn.Conv2d))
        conv.register_forward_hook(
            lambda m, args, out, formats=formats: formats.append(
                out.is_contiguous(memory_format=torch.channels_last)
            )
        )
        fast(torch.rand(2, conv.in_channels, 32, 32))
        found.append(formats[-1])
    assert found == [True, True, False, False]
    with pytest.raises(ValueError, match="whose copy has a RuntimeError: view size"):
        freeze_for_attack(View(), channels_last=True)(torch.rand(3, 2, 8, 8))


def test_autocast_gives_float32_logits_near_those_of_the_model():
    model, x = used(small_cnn(2, 4, width=5)).eval(), torch.rand(8, 2, 8, 8)
    z = freeze_for_attack(model, autocast=torch.bfloat16)(x)
    assert z.dtype == torch.float32
    difference = float((z - model(x)).detach().abs().max())
    assert 1e-6 < difference < 0.05
    x_adv = pgd(freeze_for_attack(model, autocast=torch.bfloat16), x, torch.arange(8) % 4, steps=3)
    assert x_adv.dtype == torch.float32
    assert float((x_adv - x).abs().max()) > 0


def test_compile_is_given_its_mode(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda m, mode: asked.append(mode) or m)
    for value in (False, True, "reduce-overhead"):
        freeze_for_attack(small_cnn(1, 3, width=4), compile=value)
    assert asked == [None, "reduce-overhead"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_compiled_logits_are_the_models():
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    model, x = used(nn.Sequential(*layers)).eval(), torch.rand(4, 1, 4, 4)
    fast = freeze_for_attack(model, compile=True)
    y = torch.tensor([0, 1, 2, 0])
    found, expected = (
        pgd(m, x, y, steps=3, random_start=None, eps=0.1, step_size=0.05) for m in (fast, model)
    )
    assert float((found - expected).abs().max()) < 1e-6
    assert torch.allclose(fast(found), model(found), atol=1e-6)
