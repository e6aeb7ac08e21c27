"""Cutting a model in two, and the noise that each channel bears."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ferdlib.bottleneck import noise_scale, nonrobust_channels, nonrobust_logits, split_at
from ferdlib.models import Normalized, resnet18, small_cnn


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mobilenet():
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(weights=None, num_classes=5)


def in_place():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(True), nn.Flatten()
    )


class OwnTensors(nn.Module):
    """Parameters, buffers and constants that its forward reads without a layer around them."""

    def __init__(self):
        super().__init__()
        self.before, self.inner = nn.Conv2d(3, 2, 3), nn.Module()
        self.register_buffer("offset", torch.rand(2, 1, 1))
        self.inner.scale = nn.Parameter(torch.rand(2, 1, 1))
        self.inner.register_buffer("shift", torch.rand(2, 1, 1))

    def forward(self, x):
        z = self.before(x - self.inner.shift[:1]) * self.inner.scale + self.inner.shift
        return (z - self.offset * torch.tensor(0.5)).mean(dim=(2, 3))


def called():
    """A model of which torch.fx, left alone, sees a part: hooks and a forward of the instance are missing."""
    model = in_place()
    model.register_forward_pre_hook(lambda module, args: (4 * args[0] - 2,))
    model.register_forward_hook(lambda module, args, z: 2 * z)
    plain = model.forward
    model.forward = lambda x: plain(x) + 1
    return model


class Optional(nn.Module):
    """An argument that nobody gives, and what a forward leaves behind."""

    def __init__(self):
        super().__init__()
        self.conv, self.kept = nn.Conv2d(3, 4, 3), []

    def forward(self, x, scale=None):
        z = self.last = self.conv(x)
        self.kept.append(z)
        return (z if scale is None else z * scale).mean((2, 3)) * torch.tensor(0.5)


CUTS = [
    (called, "2"),
    (Optional, "conv"),
    *((lambda: small_cnn(3, 4, width=3), f"layer{i}") for i in (1, 2, 3, 4)),
    (lambda: small_cnn(3, 4, width=3), "layer2.0"),  # inside a container
    (lambda: small_cnn(3, 4, width=3), "layer3.1"),
    *((resnet18, f"layer{i}") for i in (1, 2, 3, 4)),  # containers of residual blocks
    (resnet18, "bn1"),  # an in-place ReLU follows
    (resnet18, "layer2.0"),
    (mobilenet, "features.4"),
    (mobilenet, "features.1.conv.0"),
    (mobilenet, "features"),
    (in_place, "0"),
    (in_place, "2"),
    (lambda: Normalized(small_cnn(3, 4, width=3), [0.5] * 3, [0.2] * 3), "model.layer3"),
    (OwnTensors, "before"),
]


@pytest.mark.parametrize(("make", "layer"), CUTS)
def test_head_of_features_is_the_model(make, layer):
    torch.manual_seed(0)
    model, x = make(), torch.rand(2, 3, 12, 12)
    flags = [m.training for m in model.modules()]
    features, head = split_at(model, layer)
    assert [m.training for m in model.modules()] == flags
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *a: seen.append(a[2].clone()))
    model.eval()
    expected = model(x)
    handle.remove()
    z = features(x)
    assert torch.equal(z, seen[0])
    kept = z.clone()
    assert torch.equal(head(z), expected)
    assert torch.equal(z, kept)
    weights = [p for part in (features, head) for p in part.parameters()]
    assert {id(p) for p in weights} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(("make", "layer"), [(in_place, "0"), (mobilenet, "features.4")])
def test_gradients_flow_through_both_parts(make, layer):
    torch.manual_seed(0)
    model, x = make().eval(), torch.rand(2, 3, 12, 12, requires_grad=True)
    features, head = split_at(model, layer)
    wanted = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    gradients = torch.autograd.grad(head(features(x)).square().sum(), wanted)
    assert all(torch.equal(g, e) for g, e in zip(gradients, expected, strict=True))


def test_parts_follow_flags_weights_and_buffers():
    torch.manual_seed(0)
    model, x = small_cnn(3, 4, width=3), torch.rand(5, 3, 8, 8)
    features, head = split_at(model, "layer2")
    in_train, in_eval = model.train()(x), model.eval()(x)
    assert not torch.allclose(in_train, in_eval)
    assert torch.equal(head(features(x)), in_eval)
    model.train()
    assert torch.equal(head(features(x)), in_train)
    model.eval()
    assert not torch.allclose(model(x), in_eval)  # the parts moved the running statistics
    assert torch.equal(head(features(x)), model(x))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(head(features(x)), model(x))
    head.train()
    assert model.layer3[1].training
    assert not model.layer2[1].training


@pytest.mark.parametrize("make", [OwnTensors, lambda: Normalized(in_place(), [0.5] * 3, [0.2] * 3)])
def test_parts_follow_dtype_values_and_device_of_tensors_without_a_layer(make):
    torch.manual_seed(0)
    model = make()
    layer = "before" if isinstance(model, OwnTensors) else "model.0"
    features, head = split_at(model, layer)
    model.to(torch.float64)  # replaces the buffers
    for tensor in [*model.buffers(), *model.parameters()]:
        tensor.detach().mul_(2)
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    assert torch.equal(head(features(x)), model(x))
    model.to("meta")
    assert head(features(x.to("meta"))).device.type == "meta"


def test_the_model_is_left_as_it_was():
    model = Optional()
    before = {k: v for k, v in vars(model).items() if k != "kept"}
    split_at(model, "conv")
    assert model.kept == []
    assert {k: v for k, v in vars(model).items() if k != "kept"} == before


class Noisy(nn.Sequential):
    def forward(self, x):
        return super().forward(x + torch.rand(1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.spare = nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        return self.relu(self.relu(self.conv(x)) + x).flatten(1)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "layer", "kind", "message"),
    [
        (lambda x: x, "conv", TypeError, "`model` to be a torch.nn.Module"),
        (Residual(), "layer9", ValueError, "`layer_name` .*'layer9'; there are conv, relu, spare$"),
        (Residual(), "", ValueError, "`layer_name`"),
        (Residual(), "conv", ValueError, "`layer_name` 'conv' .*connection from 'x'"),
        (Residual(), "relu", ValueError, "`layer_name` 'relu' to run once in a forward, got 2"),
        (Residual(), "spare", ValueError, "`layer_name` 'spare' to run once in a forward, got 0"),
        (resnet18(), "layer2.1.conv1", ValueError, "`layer_name` .*connection from .* around it"),
        (Branching(), "conv", ValueError, "`model` to be traceable .*Branching.*own .* pair"),
        (Noisy(nn.Flatten()), "0", ValueError, "a Noisy with random numbers .*own .* pair"),
    ],
)
def test_split_at_errors(model, layer, kind, message):
    with pytest.raises(kind, match=f"^split_at: expected .*{message}"):
        split_at(model, layer)


def feature_map(n=3, c=4, *, dtype=torch.float32, seed=0):
    """Features whose channels have unlike variances."""
    z = torch.randn(n, c, 3, 5, generator=seeded(seed), dtype=torch.float64)
    return (z * torch.linspace(0.4, 3, c, dtype=torch.float64)[:, None, None]).to(dtype)


def make_head(c=4, k=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, k),
    )  # fmt: skip


def deaf(z):
    """A head that ignores its input, so that the regulariser alone is minimised."""
    return z.new_zeros(z.shape[0], 2)


Y = torch.tensor([0, 2, 1])
Y0 = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("head", "beta"), [(deaf, 0.3), (make_head(), 1e7)])
def test_regulariser_alone_gives_the_channel_its_own_variance(reduction, head, beta):
    z = 0.5 * feature_map()
    sigma = noise_scale(z, head, Y0, beta=beta, steps=500, reduction=reduction, rng=seeded())
    v = z.flatten(2).var(dim=2)
    torch.testing.assert_close(sigma.square(), v, rtol=1e-2, atol=0)
    assert v.max() > 10 * v.min()


def test_no_steps_give_log_2():
    sigma = noise_scale(feature_map(), deaf, Y0, steps=0)
    torch.testing.assert_close(sigma, torch.full((3, 4), math.log(2)))


def test_first_step_moves_lambda_by_lr_towards_the_variance():
    # dr/dsigma = 2 (sigma^2 - v) / sigma^3 at sigma = log 2: downhill is up where v > log(2)^2.
    z = feature_map()
    up = z.flatten(2).var(dim=2) > math.log(2) ** 2
    expected = torch.where(up, F.softplus(torch.tensor(0.2)), F.softplus(torch.tensor(-0.2)))
    assert len(up.unique()) == 2
    torch.testing.assert_close(noise_scale(z, deaf, Y0, steps=1, lr=0.2), expected)


@pytest.mark.parametrize(("scale", "sign"), [(1e4, 1), (0.0, -1)])
def test_lambda_stays_within_steps_times_lr(scale, sign):
    sigma = noise_scale(scale * feature_map(dtype=torch.float64), deaf, Y0, steps=20, lr=0.1)
    raw = sigma.expm1().log()  # the inverse of softplus
    assert (sign * raw > 1.0).all()
    assert (sign * raw < 2.0 * 1.05).all()  # Adam's steps exceed lr a little where gradients grow


@pytest.mark.parametrize("noise", ["channel", "element"])
def test_a_channel_that_matters_gets_less_noise(noise):
    z = feature_map(6, 1)
    z = (z - z.mean(dim=(2, 3), keepdim=True) + 0.1).expand(-1, 2, -1, -1)

    def head(z):  # class 0 wins by 40 times the mean of channel 0, which is 4; channel 1 is ignored
        score = 20 * z[:, 0].mean(dim=(1, 2))
        return torch.stack([score, -score], dim=1)

    y = torch.zeros(6, dtype=torch.int64)
    sigma = noise_scale(z, head, y, steps=200, noise=noise, rng=seeded())
    v = z.flatten(2).var(dim=2)[:, 1]
    assert (sigma[:, 0] < 0.8 * sigma[:, 1]).all()
    torch.testing.assert_close(sigma[:, 1].square(), v, rtol=0.05, atol=0)


def reference(z, head, y, *, beta, steps, lr, noise, reduction, rng):
    """Eq. 4 and 5 sample by sample and channel by channel, with torch's own Adam."""
    n, c, height, width = z.shape
    raw = torch.zeros(n, c, dtype=z.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=lr)
    for _ in range(steps):
        shape = (n, c, height, width) if noise == "element" else (n, c, 1, 1)
        epsilon = torch.randn(shape, generator=rng, dtype=z.dtype).expand(z.shape)
        total = 0.0
        for i in range(n):
            sigma = torch.log(1 + torch.exp(raw[i]))
            noisy = torch.stack([z[i, k] + sigma[k] * epsilon[i, k] for k in range(c)])
            total = total - head(noisy[None])[0].log_softmax(dim=0)[y[i]]
            for k in range(c):
                v = ((z[i, k] - z[i, k].mean()) ** 2).sum() / (height * width - 1)
                r = v / sigma[k] ** 2 + torch.log(sigma[k] ** 2 / v) - 1
                total = total + beta * (r if reduction == "sum" else r / (2 * c))
        optimizer.zero_grad()
        (total / n).backward()
        optimizer.step()
    return torch.log(1 + torch.exp(raw.detach()))


@pytest.mark.parametrize("noise", ["channel", "element"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fast_is_slow(noise, reduction):
    z, head = feature_map(dtype=torch.float64), make_head().double().eval()
    options = {"beta": 0.05, "steps": 8, "lr": 0.1, "noise": noise, "reduction": reduction}
    slow = reference(z, head, Y, **options, rng=seeded(1))
    head.zero_grad()
    fast = noise_scale(z, head, Y, **options, rng=seeded(1))
    torch.testing.assert_close(fast, slow, rtol=1e-7, atol=1e-9)
    other = {"mean": "sum", "sum": "mean"}[reduction]
    changed = noise_scale(z, head, Y, **(options | {"reduction": other}), rng=seeded(1))
    assert not torch.allclose(changed, slow, rtol=1e-3)


def test_defaults_are_the_release():
    z, head = feature_map(), make_head()
    release = {"beta": 0.3, "steps": 50, "lr": 0.1, "noise": "channel", "reduction": "mean"}
    explicit = noise_scale(z, head, Y, **release, rng=seeded())
    assert torch.equal(noise_scale(z, head, Y, rng=seeded()), explicit)


@pytest.mark.parametrize("noise", ["channel", "element"])
def test_shape_of_the_noise(noise):
    z, seen = feature_map(), []

    def head(noisy):
        seen.append((noisy - z).detach())
        return deaf(noisy)

    noise_scale(z, head, Y0, steps=3, noise=noise, rng=seeded())
    assert len(seen) == 3
    assert not torch.allclose(seen[0], seen[1])  # fresh at each step
    for added in seen:
        by_channel = added.flatten(2)
        spread = by_channel.amax(dim=2) - by_channel.amin(dim=2)
        assert (spread < 1e-5).all() if noise == "channel" else (spread > 0.1).all()
        # Its own in each sample and channel.
        assert len(by_channel[:, :, 0].flatten().unique()) == 12
    many = torch.zeros(500, 4, 1, 2)
    many[..., 1] = 1.0
    z = many
    noise_scale(many, head, torch.zeros(500, dtype=torch.int64), steps=1, noise=noise, rng=seeded())
    assert seen[-1].mean().item() == pytest.approx(0.0, abs=0.06)
    assert seen[-1].std().item() == pytest.approx(math.log(2), rel=0.06)


def test_noise_scale_leaves_no_trace():
    z, head = feature_map().requires_grad_(), make_head().train()
    head[1].eval()
    head[0].bias.requires_grad_(False)
    before = z.detach().clone(), {k: v.clone() for k, v in head.state_dict().items()}
    flags = [m.training for m in head.modules()], [p.requires_grad for p in head.parameters()]
    state = torch.get_rng_state()
    sigma = noise_scale(z, head, Y, steps=3, rng=seeded())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(z, before[0])
    assert all(torch.equal(v, before[1][k]) for k, v in head.state_dict().items())
    assert [m.training for m in head.modules()] == flags[0]
    assert [p.requires_grad for p in head.parameters()] == flags[1]
    assert z.grad is None
    assert all(p.grad is None for p in head.parameters())
    assert not sigma.requires_grad
    # Eval mode inside: dropout and batch statistics would change the result.
    assert torch.equal(noise_scale(z, head.eval(), Y, steps=3, rng=seeded()), sigma)
    # A callable that hides its weights cannot be frozen, and yet collects no gradient.
    assert torch.equal(noise_scale(z, lambda z: head(z), Y, steps=3, rng=seeded()), sigma)
    assert all(p.grad is None for p in head.parameters())


def test_noise_scale_repeats_and_works_without_grad_mode():
    z, head = feature_map(), make_head()
    sigma = noise_scale(z, head, Y, steps=5, rng=seeded())
    assert not torch.equal(noise_scale(z, head, Y, steps=5, rng=seeded(1)), sigma)
    with torch.no_grad():
        assert torch.equal(noise_scale(z, head, Y, steps=5, rng=seeded()), sigma)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(noise_scale(z + 0, head, Y + 0, steps=5, rng=seeded()), sigma)
    torch.manual_seed(0)  # what seeded() is seeded with
    assert torch.equal(noise_scale(z, head, Y, steps=5), sigma)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sigma_has_the_dtype_of_the_features(dtype):
    z, dtypes = 0.5 * feature_map(dtype=dtype), []

    def head(z):
        dtypes.append(z.dtype)
        return deaf(z)

    sigma = noise_scale(z, head, Y0, steps=400, rng=seeded())
    assert sigma.dtype == dtype
    assert set(dtypes) == {dtype}
    v = z.double().flatten(2).var(dim=2)
    torch.testing.assert_close(sigma.double().square(), v, rtol=0.03, atol=0)


# Unbiased variances 2, 8 and 0.5, 18; squares of sigma 4, 9 and 25, 1.
PAIRS = torch.tensor([[[[0.0, 2.0]], [[0.0, 4.0]]], [[[0.0, 1.0]], [[6.0, 0.0]]]])
SIGMA = torch.tensor([[2.0, 3.0], [5.0, 1.0]])


@pytest.mark.parametrize(
    ("threshold", "nonrobust"),
    [
        ("channel", [[False, False], [False, True]]),
        ("sample", [[True, False], [False, True]]),  # limits 8 and 18
        ("batch", [[True, True], [False, True]]),  # limit 18
    ],
)
def test_thresholds_by_hand(threshold, nonrobust):
    mask = nonrobust_channels(PAIRS, SIGMA, threshold=threshold)
    assert mask.dtype == torch.bool
    assert mask.tolist() == nonrobust
    half = nonrobust_channels(PAIRS.half(), SIGMA.double(), threshold=threshold)
    assert half.tolist() == nonrobust
    assert torch.equal(nonrobust_channels(PAIRS, SIGMA), mask) == (threshold == "sample")


@pytest.mark.parametrize("threshold", ["sample", "batch", "channel"])
def test_ties_are_nonrobust_and_the_variance_is_unbiased(threshold):
    z = torch.tensor([-2.0, 0.0, 2.0]).reshape(1, 1, 1, 3)  # variance 4, biased 8/3
    for sigma, nonrobust in ((1.9, True), (2.0, True), (2.001, False)):
        mask = nonrobust_channels(z, torch.tensor([[sigma]]), threshold=threshold)
        assert mask.item() is nonrobust


def test_a_dead_channel_is_robust_against_itself_only():
    z = torch.cat([torch.full((1, 1, 2, 2), 7.0), torch.rand(1, 1, 2, 2)], dim=1)
    sigma = torch.tensor([[1e-3, 1e-3]])
    assert nonrobust_channels(z, sigma, threshold="channel").tolist() == [[False, True]]
    assert nonrobust_channels(z, sigma, threshold="sample").tolist() == [[True, True]]


def test_nonrobust_logits_see_the_kept_channels_only():
    z = feature_map(2, 3).requires_grad_()
    mask = torch.tensor([[True, False, True], [False, False, True]])
    weight = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 5.0, 0.5]])
    logits = nonrobust_logits(z, lambda z: z.sum(dim=(2, 3)) @ weight.T, mask)
    sums = z.detach().sum(dim=(2, 3))
    by_hand = [
        sums[0, 0] + 3 * sums[0, 2], -sums[0, 0] + sums[0, 2] / 2, 3 * sums[1, 2], sums[1, 2] / 2
    ]  # fmt: skip
    torch.testing.assert_close(logits.flatten(), torch.stack(by_hand))
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), z)
    expected = torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 3.0]])
    assert torch.equal(gradient, expected[..., None, None].expand_as(gradient))


def test_an_objective_that_is_nan_is_an_error():
    head = make_head().train()
    with torch.no_grad():
        head[6].bias.fill_(math.nan)
    with pytest.raises(RuntimeError, match="^noise_scale: expected a finite objective"):
        noise_scale(feature_map(), head, Y, steps=2)
    assert head.training
