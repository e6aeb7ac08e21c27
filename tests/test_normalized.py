"""Normalisation inside the model: the formula, what it leaves alone, and eps in pixels."""

import pytest
import torch
from torch import nn

from ferdlib.attacks import pgd
from ferdlib.bottleneck import split_at
from ferdlib.models import Normalized, build_model, small_cnn


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_normalized_is_the_formula():
    mean, std = [0.5, 0.25], [0.25, 2.0]
    x = torch.rand(3, 2, 4, 5)
    out = Normalized(nn.Identity(), mean, std)(x)
    for c in range(2):
        torch.testing.assert_close(out[:, c], (x[:, c] - mean[c]) / std[c])


def test_normalized_keeps_its_numbers_out_of_the_state_dict():
    inner = small_cnn(1, 3, width=2)
    model = Normalized(small_cnn(1, 3, width=2), [0.5], [0.25])
    checkpoint = {f"model.{key}": value for key, value in inner.state_dict().items()}
    assert model.state_dict().keys() == checkpoint.keys()
    model.load_state_dict(checkpoint)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(model.eval()(x), inner.eval()((x - 0.5) / 0.25))
    assert {name for name, _ in model.named_buffers(recurse=False)} == {"mean", "std"}


def test_normalized_follows_dtype_and_device():
    model = Normalized(small_cnn(1, 3, width=2), [0.5], [0.25]).to(torch.float64)
    assert model(torch.rand(2, 1, 8, 8, dtype=torch.float64)).dtype == torch.float64
    assert model.mean.dtype == model.std.dtype == torch.float64
    model.to("meta")
    assert model(torch.rand(2, 1, 8, 8, dtype=torch.float64, device="meta")).device.type == "meta"


def test_normalized_feature_layers_can_be_cut():
    model = Normalized(small_cnn(1, 3, width=2), [0.5], [0.25]).eval()
    assert model.feature_layers == tuple(f"model.layer{i}" for i in (1, 2, 3, 4))
    x = torch.rand(2, 1, 8, 8)
    for name in model.feature_layers:
        features, head = split_at(model, name)
        assert torch.equal(head(features(x)), model(x))
    assert Normalized(nn.Identity(), [0.5], [0.25]).feature_layers == ()
    model, x = (
        Normalized(build_model("wide_resnet_10_1"), [0.5] * 3, [0.2] * 3),
        torch.rand(2, 3, 8, 8),
    )
    features, head = split_at(model.eval(), "model.bn1")
    assert torch.equal(head(features(x)), model(x))


def test_eps_stays_in_pixel_units():
    model = Normalized(small_cnn(1, 3, width=2), [0.5], [0.01])
    x, y = torch.rand(6, 1, 8, 8, generator=seeded()), torch.tensor([0, 1, 2, 0, 1, 2])
    x_adv = pgd(model, x, y, eps=0.1, step_size=0.05, steps=3, rng=seeded(1))
    change = (x_adv - x).abs()
    assert change.max() <= 0.1 + 1e-6
    assert change.amax(dim=(1, 2, 3)).min() > 0.05
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.filterwarnings("ignore")  # of TorchScript's end
def test_torchscript_reads_it_and_its_frozen_form_is_attacked():
    model, x = Normalized(small_cnn(1, 3, width=4), [0.5], [0.2]).eval(), torch.rand(2, 1, 8, 8)
    scripted = torch.jit.freeze(torch.jit.script(model))
    assert torch.allclose(scripted(x), model(x), atol=1e-6)
    settings = {"targets": torch.tensor([0, 1]), "steps": 2, "random_start": None}
    expected = pgd(model, x, **settings)
    torch.testing.assert_close(pgd(scripted, x, **settings), expected, rtol=0, atol=1e-6)
