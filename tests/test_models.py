"""The models against counts made by hand, written-out forward passes, and the cuts that they promise."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ferdlib import models
from ferdlib.bottleneck import split_at
from ferdlib.models import (
    build_model,
    mobilenet_v2,
    preact_resnet18,
    preact_resnet34,
    resnet18,
    resnet34,
    resnet56,
    small_cnn,
    wide_resnet,
)

RESNET = {"layer1": (64, 1), "layer2": (128, 2), "layer3": (256, 4), "layer4": (512, 8)}
# Of each layer that can be cut, in order: its channels, and by how much it divides the resolution.
CUTS = {
    "resnet18": RESNET,
    "resnet34": RESNET,
    "resnet56": {"layer1": (16, 1), "layer2": (32, 2), "layer3": (64, 4)},
    "resnet56_padding_shortcut": {"layer1": (16, 1), "layer2": (32, 2), "layer3": (64, 4)},
    "preact_resnet18": RESNET | {"bn": (512, 8)},
    "preact_resnet34": RESNET | {"bn": (512, 8)},
    "preact_resnet18_input_shortcut": RESNET | {"bn": (512, 8)},
    "mobilenet_v2": {"layers": (320, 8), "bn2": (1280, 8)},
    "wide_resnet_10_2": {"block1": (32, 1), "block2": (64, 2), "block3": (128, 4), "bn1": (128, 4)},
    "small_cnn_3": {"layer1": (3, 1), "layer2": (6, 1), "layer3": (6, 2), "layer4": (6, 2)},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def meta(name, num_classes=10, **arguments):
    """The model without memory for its numbers, for what depends on shapes alone."""
    with torch.device("meta"):
        return build_model(name, num_classes, **arguments)


def trained(name, num_classes=10, dtype=torch.float32):
    """A model in eval mode whose BatchNorm layers differ by channel and fit its activations."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_model(name, num_classes)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
                module.momentum = 1  # the statistics of one batch
        model(torch.rand(8, 3, 16, 16))
    return model.eval().to(dtype)


def wide_parameters(depth, width, num_classes):
    """Zagoruyko and Komodakis 2016, Table 1: pairs of 3x3 convolutions, a BatchNorm before each."""
    blocks, count, a = (depth - 4) // 6, 27 * 16, 16
    for b in (16 * width, 32 * width, 64 * width):
        count += 2 * a + 9 * a * b + 2 * b + 9 * b * b + (a * b if a != b else 0)
        count += (blocks - 1) * (4 * b + 18 * b * b)
        a = b
    return count + 2 * a + a * num_classes + num_classes


@pytest.mark.parametrize(
    ("depth", "width", "num_classes", "published"),
    [
        (34, 10, 10, 46_160_474),
        (28, 10, 10, 36_479_194),
        (28, 4, 10, 5_849_050),
        (16, 4, 10, 2_748_890),
        (34, 10, 100, 46_160_474 + 90 * 641),
        (10, 1, 10, 77_850),  # the first stage has no convolution in its shortcut
    ],
)
def test_wide_resnet_parameter_count(depth, width, num_classes, published):
    assert wide_parameters(depth, width, num_classes) == published
    assert parameters(meta(f"wide_resnet_{depth}_{width}", num_classes)) == published


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        # Pre-activation: no BatchNorm in the stem (2 * 64) nor in the shortcuts (2 * (128 + 256 + 512)),
        # one of half the channels in each block that doubles them (2 * (64 + 128 + 256)), a final one of 512.
        ("preact_resnet18", 11_173_962 - 128 - 1792 - 896 + 1024),
        ("preact_resnet34", 21_282_122 - 128 - 1792 - 896 + 1024),
        ("resnet56", 855_770),
        # Without the two projections and their BatchNorms: c c / 2 + 2 c of c = 32 and 64.
        ("resnet56_padding_shortcut", 855_770 - 576 - 2176),
        ("mobilenet_v2", 2_296_922),
    ],
)
def test_parameter_count(name, published):
    assert parameters(meta(name)) == published
    # A class more is a row and a bias of the linear layer, a colour more 9 weights per filter of the stem.
    head = list(meta(name).modules())[-1]
    assert parameters(meta(name, 17)) == published + 7 * (head.in_features + 1)
    stem = meta(name).conv1.out_channels
    assert parameters(meta(name, in_channels=1)) == published - 18 * stem


def test_resnet56_parameter_count_by_stage():
    # 18 convolutions of 9 c c, the first of a doubling stage 9 c c / 2, each with a BatchNorm of 2 c,
    # and a shortcut of c c / 2 with its own; 9 * 3 * 16 + 32 in the stem, 65 * 10 at the end.
    stages = [18 * (9 * 16**2 + 2 * 16)]
    stages += [9 * c * c // 2 + 17 * 9 * c * c + 18 * 2 * c + c * c // 2 + 2 * c for c in (32, 64)]
    model = meta("resnet56")
    assert [parameters(layer) for layer in (model.layer1, model.layer2, model.layer3)] == stages
    assert 464 + sum(stages) + 650 == 855_770


def mobilenet_by_hand():
    """Parameters and MACs at 32x32: Sandler et al. 2018, Table 2, in the form that the papers use.

    Here stem and second stage keep the resolution, the first block expands too (by 1), and a block that
    changes the channels without stride has a 1x1 convolution with BatchNorm in its shortcut.
    """
    rows = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2)]
    rows += [(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    a, side = 32, 32
    layers = [(27 * a, a, side)]  # weights, channels of the BatchNorm that follows, resolution
    for expansion, b, repeats, stride in rows:
        for step in [stride] + [1] * (repeats - 1):
            inner = expansion * a
            layers.append((a * inner, inner, side))
            side //= step
            layers += [(9 * inner, inner, side), (inner * b, b, side)]
            if step == 1 and a != b:
                layers.append((a * b, b, side))
            a = b
    layers.append((a * 1280, 1280, side))
    count = sum(weights + 2 * channels for weights, channels, _ in layers) + 1281 * 10
    return count, sum(weights * side**2 for weights, _, side in layers) + 1280 * 10


def test_mobilenet_by_hand_is_the_published_one():
    count, macs = mobilenet_by_hand()
    assert count == 2_296_922
    assert round(macs / 1e9, 3) == 0.091


# At a resolution of r x r a convolution costs its weights times r * r, and the linear layer its weights.
RESNET18_MACS = (
    27 * 64 * 1024
    + 4 * (9 * 64**2) * 1024
    # Twice the channels on a quarter of the pixels: the three later stages cost the same.
    + 3 * (9 * 64 * 128 + 3 * (9 * 128**2) + 64 * 128) * 256
)
RESNET34_MACS = (
    27 * 64 * 1024  # stem, then 6, 8, 12 and 6 convolutions, the first from half the channels
    + 6 * (9 * 64**2) * 1024
    + (9 * 64 * 128 + 7 * (9 * 128**2) + 64 * 128) * 256
    + (9 * 128 * 256 + 11 * (9 * 256**2) + 128 * 256) * 64
    + (9 * 256 * 512 + 5 * (9 * 512**2) + 256 * 512) * 16
)
WIDE_MACS = (
    27 * 16 * 1024
    + (9 * 16 * 160 + 9 * (9 * 160**2) + 16 * 160) * 1024
    + (9 * 160 * 320 + 9 * (9 * 320**2) + 160 * 320) * 256
    + (9 * 320 * 640 + 9 * (9 * 640**2) + 320 * 640) * 64
)


@pytest.mark.parametrize(
    ("name", "side", "num_classes", "by_hand", "giga"),
    [
        ("wide_resnet_34_10", 32, 10, WIDE_MACS + 640 * 10, 6.659),
        ("resnet18", 32, 10, RESNET18_MACS + 512 * 10, 0.555),
        ("resnet34", 32, 10, RESNET34_MACS + 512 * 10, 1.159),
        ("mobilenet_v2", 32, 10, mobilenet_by_hand()[1], 0.091),
        # The convolutions of the ResNets, on four times the pixels.
        ("preact_resnet18", 64, 200, 4 * RESNET18_MACS + 512 * 200, 2.222),
        ("preact_resnet34", 64, 200, 4 * RESNET34_MACS + 512 * 200, 4.638),
    ],
)
def test_multiply_accumulates(name, side, num_classes, by_hand, giga):
    model, counter = meta(name, num_classes).eval(), FlopCounterMode(display=False)
    with counter:
        model(torch.rand(1, 3, side, side, device="meta"))
    assert counter.get_total_flops() == 2 * by_hand
    assert round(by_hand / 1e9, 3) == giga


@pytest.mark.parametrize("name", CUTS)
def test_every_cut_is_exact_and_where_it_says(name):
    model, x = trained(name, 7), torch.rand(2, 3, 16, 24, generator=seeded())
    assert model.feature_layers == tuple(CUTS[name])
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (2, 7)
        for layer, (channels, divisor) in CUTS[name].items():
            features, head = split_at(model, layer)
            z = features(x)
            assert z.shape == (2, channels, 16 // divisor, 24 // divisor)
            kept = z.clone()
            assert torch.equal(head(z), logits)
            assert torch.equal(z, kept)


@pytest.mark.parametrize(
    ("name", "tap", "before", "last"),
    [
        ("wide_resnet_10_2", "bn1", ("conv1", "block1", "block2", "block3"), "fc"),
        ("preact_resnet18", "bn", ("conv1", *RESNET), "linear"),
        ("mobilenet_v2", "bn2", ("conv1", "bn1", F.relu, "layers", "conv2"), "linear"),
    ],
)
def test_the_recommended_tap_is_between_the_final_batchnorm_and_its_relu(name, tap, before, last):
    model, x = trained(name), torch.rand(2, 3, 16, 16, generator=seeded())
    assert model.feature_layers[-1] == tap
    z = x
    for step in (*before, tap):
        z = step(z) if callable(step) else model.get_submodule(step)(z)
    features, head = split_at(model, tap)
    assert torch.equal(features(x), z)
    assert (z < 0).float().mean() > 0.1
    by_hand = model.get_submodule(last)(z.clamp(min=0).mean(dim=(2, 3)))
    torch.testing.assert_close(head(z), by_hand)


class WrittenOut:
    """The layers of a network as functions of its state dict, by name."""

    def __init__(self, model):
        self.weights = model.state_dict()

    def __contains__(self, layer):
        return f"{layer}.weight" in self.weights

    def conv(self, x, layer, stride=1):
        w = self.weights[f"{layer}.weight"]
        groups = x.shape[1] // w.shape[1]
        return F.conv2d(x, w, stride=stride, padding=w.shape[2] // 2, groups=groups)

    def bn(self, x, layer):
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (self.weights[f"{layer}.{k}"][:, None, None] for k in keys)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def logits(self, z, layer):
        pooled = z.mean(dim=(2, 3))
        return pooled @ self.weights[f"{layer}.weight"].T + self.weights[f"{layer}.bias"]


def pre_activation(net, x, block, stride, shortcut, of_input=False):
    """He et al. 2016b: y = s + W2 relu(bn2(W1 a)), a = relu(bn1(x)); s is x, or W a (W x) where there is a W."""
    a = net.bn(x, f"{block}.bn1").relu()
    inner = net.bn(net.conv(a, f"{block}.conv1", stride), f"{block}.bn2").relu()
    s = x
    if f"{block}.{shortcut}" in net:
        s = net.conv(x if of_input else a, f"{block}.{shortcut}", stride)
    return s + net.conv(inner, f"{block}.conv2")


def wide_written_out(net, x, blocks):
    z = net.conv(x, "conv1")
    for stage, first_stride in (("block1", 1), ("block2", 2), ("block3", 2)):
        for k in range(blocks):
            stride = first_stride if k == 0 else 1
            z = pre_activation(net, z, f"{stage}.layer.{k}", stride, "convShortcut")
    return net.logits(net.bn(z, "bn1").relu(), "fc")


def preact_written_out(net, x, blocks, of_input=False):
    z = net.conv(x, "conv1")
    for stage, (count, first_stride) in enumerate(zip(blocks, (1, 2, 2, 2), strict=True), start=1):
        for k in range(count):
            stride = first_stride if k == 0 else 1
            z = pre_activation(net, z, f"layer{stage}.{k}", stride, "shortcut.0", of_input)
    return net.logits(net.bn(z, "bn").relu(), "linear")


def input_shortcut_written_out(net, x, blocks):
    return preact_written_out(net, x, blocks, of_input=True)


def resnet_written_out(net, x, blocks):
    """He et al. 2016a: y = relu(s + bn2(W2 relu(bn1(W1 x)))); s is x, bn(W x), or x between zeros."""
    z = net.bn(net.conv(x, "conv1"), "bn1").relu()
    for stage, count in enumerate(blocks, start=1):
        for k in range(count):
            block, stride = f"layer{stage}.{k}", 2 if stage > 1 and k == 0 else 1
            inner = net.bn(net.conv(z, f"{block}.conv1", stride), f"{block}.bn1").relu()
            inner = net.bn(net.conv(inner, f"{block}.conv2"), f"{block}.bn2")
            if f"{block}.downsample.0" in net:
                z = net.conv(z, f"{block}.downsample.0", stride)
                z = net.bn(z, f"{block}.downsample.1")
            elif stride == 2:
                zeros = torch.zeros_like(inner[:, : z.shape[1] // 2])
                z = torch.cat((zeros, z[:, :, ::2, ::2], zeros), dim=1)
            z = (z + inner).relu()
    return net.logits(z, "fc")


def mobilenet_written_out(net, x, strides):
    """Sandler et al. 2018, section 3.3: expand, filter by channel, project; the sum where stride is 1."""
    z = net.bn(net.conv(x, "conv1"), "bn1").relu()
    for k, stride in enumerate(strides):
        block = f"layers.{k}"
        inner = net.bn(net.conv(z, f"{block}.conv1"), f"{block}.bn1").relu()
        inner = net.bn(net.conv(inner, f"{block}.conv2", stride), f"{block}.bn2").relu()
        inner = net.bn(net.conv(inner, f"{block}.conv3"), f"{block}.bn3")
        if f"{block}.shortcut.0" in net:
            z = net.bn(net.conv(z, f"{block}.shortcut.0"), f"{block}.shortcut.1")
        z = z + inner if stride == 1 else inner
    return net.logits(net.bn(net.conv(z, "conv2"), "bn2").relu(), "linear")


@pytest.mark.parametrize(
    ("name", "written_out", "blocks"),
    [
        ("wide_resnet_10_1", wide_written_out, 1),
        ("wide_resnet_16_1", wide_written_out, 2),  # no convolution in any shortcut of block1
        ("wide_resnet_16_2", wide_written_out, 2),
        ("preact_resnet18", preact_written_out, (2, 2, 2, 2)),
        ("preact_resnet34", preact_written_out, (3, 4, 6, 3)),
        ("preact_resnet18_input_shortcut", input_shortcut_written_out, (2, 2, 2, 2)),
        ("preact_resnet34_input_shortcut", input_shortcut_written_out, (3, 4, 6, 3)),
        ("resnet18", resnet_written_out, (2, 2, 2, 2)),
        ("resnet34", resnet_written_out, (3, 4, 6, 3)),
        ("resnet56", resnet_written_out, (9, 9, 9)),
        ("resnet56_padding_shortcut", resnet_written_out, (9, 9, 9)),
        ("mobilenet_v2", mobilenet_written_out, [1, 1, 1, 2, 1, 1, 2] + [1] * 6 + [2, 1, 1, 1]),
    ],
)
def test_forward_is_the_one_written_out(name, written_out, blocks):
    model = trained(name, 3, torch.float64)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=seeded())
    with torch.no_grad():
        expected = written_out(WrittenOut(model), x, blocks)
        assert expected.std(dim=0).min() > 0.01  # the images are told apart
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("size", [(64, 64), (40, 56)])
def test_other_image_sizes_and_grey_images(name, size):
    model = meta(name, 5, in_channels=1)
    assert model(torch.rand(3, 1, *size, device="meta")).shape == (3, 5)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


PLAIN = (resnet18, resnet34, resnet56, preact_resnet18, preact_resnet34, mobilenet_v2)
FUNCTIONS = {make.__name__: make for make in PLAIN} | {
    "wide_resnet_16_3": lambda k, in_channels: wide_resnet(16, 3, k, in_channels=in_channels),
    "small_cnn_4": lambda k, in_channels: small_cnn(in_channels, k, width=4),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_create_is_the_function_of_that_name(name):
    with torch.device("meta"):
        expected = FUNCTIONS[name](6, in_channels=2).state_dict()
    found = meta(name, 6, in_channels=2).state_dict()
    shapes = [{k: v.shape for k, v in weights.items()} for weights in (found, expected)]
    assert shapes[0] == shapes[1]
    assert shapes[0]["layer1.0.weight" if "cnn" in name else "conv1.weight"][1] == 2


def test_create_is_the_old_name_of_build_model():
    with pytest.warns(DeprecationWarning, match="ferdlib.models.build_model"):
        model = models.create("small_cnn_2", 4, in_channels=2)
    assert (
        model.state_dict().keys()
        == build_model("small_cnn_2", 4, in_channels=2).state_dict().keys()
    )


def test_defaults():
    with torch.device("meta"):
        assert parameters(wide_resnet()) == 46_160_474
        for make in PLAIN:
            assert (
                parameters(make()) == parameters(make(10)) == parameters(build_model(make.__name__))
            )


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("wide_resnet_10_4", "block3.layer.0.conv2"),
        ("preact_resnet18", "layer2.0.conv2"),
        ("resnet18", "conv1"),
        ("resnet56", "layer3.0.conv2"),
    ],
)
def test_convolutions_start_with_variance_2_over_fan_out(name, layer):
    torch.manual_seed(0)
    conv = build_model(name).get_submodule(layer)
    # He et al. 2015; the relative error of a standard deviation of n draws is 1 / sqrt(2 n).
    tolerance = 4 / math.sqrt(2 * conv.weight.numel())
    expected = math.sqrt(2 / (9 * conv.out_channels))
    assert conv.weight.detach().std().item() == pytest.approx(expected, rel=tolerance)


def test_the_linear_layer_of_wide_resnet_starts_without_bias():
    assert not wide_resnet(10, 1).fc.bias.any()


@pytest.mark.parametrize(("c", "k", "w"), [(1, 10, 32), (3, 7, 4), (1, 2, 1)])
def test_small_cnn_parameter_count(c, k, w):
    # Convolutions without bias: 9 (c w + w 2w + 2w 2w + 2w 2w); BatchNorm: 2 (w + 3 * 2w); linear.
    by_hand = 9 * (c * w + 10 * w * w) + 14 * w + 2 * w * k + k
    assert parameters(small_cnn(c, k, width=w)) == by_hand


def test_small_cnn_defaults():
    model = small_cnn()
    assert model.layer1[0].weight.shape == (32, 1, 3, 3)
    assert model.fc.weight.shape == (10, 64)


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_small_cnn_takes_tiny_and_odd_images(size):
    model = small_cnn(2, 5, width=3)
    x = torch.rand(4, 2, *size)
    assert model(x).shape == (4, 5)
    half = tuple((side + 1) // 2 for side in size)
    assert split_at(model, "layer4")[0](x).shape == (4, 6, *half)
