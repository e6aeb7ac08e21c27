"""Crop and flip against slicing, and the small models against counts made by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ferdlib.attacks import pgd
from ferdlib.augment import crop_flip
from ferdlib.bottleneck import split_at
from ferdlib.models import Normalized, resnet18, small_cnn


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def crops(image, padding, flip):
    """Every image that crop and flip can make of one `(C, H, W)`, keyed by (row, column, mirror)."""
    _, height, width = image.shape
    padded = F.pad(image, [padding] * 4)
    made = {}
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            crop = padded[:, row : row + height, column : column + width]
            made[row, column, False] = crop
            if flip:
                made[row, column, True] = crop.flip(2)
    return made


def parameters(x, out, padding, flip=True):
    """Which crop each row is; an empty place means that it is none of its own image."""
    found = []
    for image, row in zip(x, out, strict=True):
        candidates = crops(image, padding, flip).items()
        found.append([key for key, crop in candidates if torch.equal(crop, row)])
    assert all(len(keys) == 1 for keys in found)
    return [keys[0] for keys in found]


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("flip", [True, False])
def test_each_row_is_one_crop_of_its_own_image(padding, flip):
    x = torch.rand(40, 3, 6, 5, generator=seeded())
    out = crop_flip(x, padding=padding, flip=flip, rng=seeded(1))
    assert out.shape == x.shape
    keys = parameters(x, out, padding, flip)
    assert len(set(keys)) > 1 or (padding == 0 and not flip)
    if not flip:
        assert not any(mirror for _, _, mirror in keys)


def test_the_default_is_padding_4_with_flip():
    x = torch.rand(60, 1, 9, 8, generator=seeded())
    keys = parameters(x, crop_flip(x, rng=seeded(1)), 4)
    assert {0, 8} <= {row for row, _, _ in keys}
    assert {mirror for _, _, mirror in keys} == {True, False}


def test_offsets_and_flips_are_uniform_and_independent():
    x = torch.rand(1, 1, 5, 4, generator=seeded()).expand(3600, -1, -1, -1)
    keys = parameters(x, crop_flip(x, padding=1, rng=seeded(1)), 1)
    counts = [keys.count(key) for key in crops(x[0], 1, True)]
    assert len(counts) == 18
    # 200 expected of each, with a standard deviation of 14.
    assert min(counts) > 140
    assert max(counts) < 260


def test_no_padding_and_no_flip_is_the_identity():
    x = torch.rand(4, 2, 3, 5)
    assert torch.equal(crop_flip(x, padding=0, flip=False), x)


def test_gradient_counts_the_visible_pixels():
    x = (torch.rand(30, 2, 4, 5, generator=seeded()) + 1).requires_grad_()
    out = crop_flip(x, padding=2, rng=seeded(1))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert set(gradient.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(gradient.sum(dim=(1, 2, 3)), (out != 0).sum(dim=(1, 2, 3)).float())
    assert not torch.equal(gradient, torch.ones_like(gradient))


def test_randomness_comes_from_rng_alone():
    x, before = torch.rand(20, 1, 8, 8), torch.get_rng_state()
    first, again = crop_flip(x, rng=seeded(3)), crop_flip(x, rng=seeded(3))
    assert torch.equal(first, again)
    assert not torch.equal(first, crop_flip(x, rng=seeded(4)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    default = crop_flip(x)
    assert not torch.equal(default, crop_flip(x))  # the default generator advances
    torch.manual_seed(5)
    assert torch.equal(crop_flip(x), default)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_crop_flip_keeps_dtype_and_leaves_its_input(dtype):
    x = torch.rand(2, 3, 5, 7).to(dtype)
    before = x.clone()
    out = crop_flip(x, padding=9)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    assert torch.equal(x, before)


IMAGES = torch.rand(2, 1, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "argument", "kind"),
    [
        ({"x": IMAGES.tolist()}, "x", TypeError),
        ({"x": (IMAGES * 255).byte()}, "x", TypeError),
        ({"x": IMAGES[0]}, "x", ValueError),
        ({"padding": -1}, "padding", ValueError),
        ({"padding": 1.0}, "padding", TypeError),
        ({"rng": 0}, "rng", TypeError),
    ],
)
def test_crop_flip_errors(arguments, argument, kind):
    with pytest.raises(kind, match=f"^crop_flip: expected .*`{argument}`"):
        crop_flip(**({"x": IMAGES} | arguments))


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (64, 64)])
def test_small_cnn_shapes(size):
    model = small_cnn(2, 5, width=3)
    x = torch.rand(4, 2, *size)
    assert model(x).shape == (4, 5)
    half = tuple((side + 1) // 2 for side in size)
    expected = {"layer1": (3, *size), "layer2": (6, *size), "layer3": (6, *half)}
    for name, shape in (expected | {"layer4": (6, *half)}).items():
        assert split_at(model, name)[0](x).shape == (4, *shape)


@pytest.mark.parametrize(("c", "k", "w"), [(1, 10, 32), (3, 7, 4), (1, 2, 1)])
def test_small_cnn_parameter_count(c, k, w):
    # Convolutions without bias: 9 (c w + w 2w + 2w 2w + 2w 2w); BatchNorm: 2 (w + 3 * 2w); linear.
    by_hand = 9 * (c * w + 10 * w * w) + 14 * w + 2 * w * k + k
    model = small_cnn(c, k, width=w)
    assert sum(p.numel() for p in model.parameters()) == by_hand
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_small_cnn_defaults():
    model = small_cnn()
    assert model.layer1[0].weight.shape == (32, 1, 3, 3)
    assert model.fc.weight.shape == (10, 64)


def test_resnet18_is_the_published_one():
    model = resnet18(10)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    # Without the 64 more channels' linear layer: 513 numbers per class.
    assert sum(p.numel() for p in resnet18(7).parameters()) == 11_173_962 - 3 * 513
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    assert resnet18(4, in_channels=1).eval()(torch.rand(2, 1, 8, 8)).shape == (2, 4)


def test_resnet18_halves_the_resolution_from_layer2_on():
    model, x = resnet18(10).eval(), torch.rand(1, 3, 32, 32)
    expected = zip(model.feature_layers, ((64, 32), (128, 16), (256, 8), (512, 4)), strict=True)
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (1, 10)
        for name, (channels, side) in expected:
            features, head = split_at(model, name)
            z = features(x)
            assert z.shape == (1, channels, side, side)
            assert torch.equal(head(z), logits)


@pytest.mark.parametrize(
    ("make", "arguments", "argument", "kind"),
    [
        (small_cnn, {"in_channels": 0}, "in_channels", ValueError),
        (small_cnn, {"num_classes": 1}, "num_classes", ValueError),
        (small_cnn, {"width": 0}, "width", ValueError),
        (small_cnn, {"width": 2.0}, "width", TypeError),
        (resnet18, {"num_classes": 1}, "num_classes", ValueError),
        (resnet18, {"num_classes": "10"}, "num_classes", TypeError),
        (resnet18, {"in_channels": 0}, "in_channels", ValueError),
    ],
)
def test_model_errors(make, arguments, argument, kind):
    with pytest.raises(kind, match=f"^{make.__name__}: expected `{argument}`"):
        make(**arguments)


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


def test_eps_stays_in_pixel_units():
    model = Normalized(small_cnn(1, 3, width=2), [0.5], [0.01])
    x, y = torch.rand(6, 1, 8, 8, generator=seeded()), torch.tensor([0, 1, 2, 0, 1, 2])
    x_adv = pgd(model, x, y, eps=0.1, step_size=0.05, steps=3, rng=seeded(1))
    change = (x_adv - x).abs()
    assert change.max() <= 0.1 + 1e-6
    assert change.amax(dim=(1, 2, 3)).min() > 0.05
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "argument", "kind"),
    [
        ({"model": lambda x: x}, "model", TypeError),
        ({"mean": [0.5, 0.5]}, "mean", ValueError),
        ({"mean": 0.5, "std": 0.25}, "mean", ValueError),
        ({"std": [0.25, 0.25]}, "std", ValueError),
        ({"std": [0.0]}, "std", ValueError),
        ({"std": [-1.0]}, "std", ValueError),
        ({"std": [float("nan")]}, "std", ValueError),
    ],
)
def test_normalized_errors(arguments, argument, kind):
    right = {"model": nn.Identity(), "mean": [0.5], "std": [0.25]}
    with pytest.raises(kind, match=f"^Normalized: expected .*`{argument}`"):
        Normalized(**(right | arguments))
