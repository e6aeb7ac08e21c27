"""Non-robust channels of a feature map: FERD's use of Kim et al.'s information bottleneck.

Split a model in two, learn how much noise each channel bears, and mask the channels that bear little. All
raise TypeError for other types and dtypes, ValueError for other shapes, names and numbers out of range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ferdlib import _checks
from ferdlib._checks import InvalidState, InvalidType, InvalidValue, public
from ferdlib._modes import borrowed
from ferdlib.losses import _kernels
from ferdlib.models.tracing import NotCopyable, check_layer, trace

__all__ = ["noise_scale", "nonrobust_channels", "nonrobust_logits", "split_at"]

Part = Callable[[Tensor], Tensor]

# Kim et al. guard the variance by the same amount: a dead channel has log(sigma^2 / 0).
VARIANCE_GUARD = 1e-10


@public
def split_at(model: nn.Module, layer_name: str) -> tuple[nn.Module, nn.Module]:
    """Cut a model behind one of its layers: `head(features(x)) == model(x)`.

    Both parts share the model's submodules, and so follow its weights, device and train/eval flags; plain
    numbers that its forward reads stay those of the cut. `head` leaves its input alone, also where an in-place
    activation follows. The model is traced in eval mode, its hooks and wrappers included. For one that
    `torch.fx` cannot trace, pass your own pair of callables instead.

    Args:
        model: module that torch.fx can trace.
        layer_name: a name of `model.named_modules()`, such as "layer4" or "bn1"; a container is cut
            behind its last layer. Everything later must depend on the input through it alone.

    Returns:
        `(features, head)`: images to the layer's output, and the layer's output to logits.

    Raises:
        ValueError: a model that cannot be traced; no such layer, one that the forward does not use exactly
            once, or one that a skip connection bypasses.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten())
        >>> features, head = split_at(model, "0")
        >>> x = torch.rand(4, 1, 5, 5)
        >>> torch.equal(head(features(x)), model(x))
        True
    """
    _checks.module(model=model)
    check_layer(model, layer_name)
    try:
        graph, attributes = trace(model, whole=layer_name)
    except NotCopyable as error:
        came = f"a {type(model).__name__} with {error}; pass your own (features, head) pair"
        wanted = "`model` to be traceable by torch.fx"
        raise InvalidValue(f"expected {wanted}, got {came}") from error.__cause__
    cuts = [n for n in graph.nodes if n.op == "call_module" and n.target == layer_name]
    if len(cuts) != 1:
        wanted = f"{layer_name!r} to run once in a forward"
        raise InvalidValue(f"expected `layer_name` {wanted}, got {len(cuts)}")
    front, back = _cut(graph, cuts[0])
    return _module(model, attributes, front), _module(model, attributes, back)


def _cut(graph: fx.Graph, cut: fx.Node) -> tuple[fx.Graph, fx.Graph]:
    """Copy the nodes up to the cut into one graph, and those behind it into another."""
    front, back = fx.Graph(), fx.Graph()
    part, copies, layer = front, dict[fx.Node, fx.Node](), cut.target
    for node in graph.nodes:
        for argument in node.all_input_nodes:
            # Behind the cut, a weight may be read again; anything else that is computed before is a bypass.
            if argument not in copies:
                if argument.op != "get_attr":
                    came = f"a connection from {argument.name!r} around it"
                    raise InvalidValue(f"expected `layer_name` {layer!r} on every path, got {came}")
                copies[argument] = part.node_copy(argument)
        copies[node] = part.node_copy(node, copies.__getitem__)
        if node is cut:
            front.output(copies[cut])
            # The head works on a copy of its input, so in-place activations leave that alone.
            entry = back.placeholder("features")
            part, copies = back, {cut: back.call_method("clone", (entry,))}
    return front, back


def _module(model: nn.Module, attributes: dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """Make a module of the graph that shares the model's submodules, parameters and buffers."""
    part = fx.GraphModule(attributes, graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            owner = node.target.rpartition(".")[0]
            theirs, ours = model.get_submodule(owner), part.get_submodule(owner)
            # fx copies references, which go stale when `.to()` replaces a buffer. A constant in a
            # forward, which is no buffer of the model, stays as it is.
            vars(ours).update({k: v for k, v in ours._buffers.items() if k not in theirs._buffers})
            ours._buffers, ours._parameters = theirs._buffers, theirs._parameters
    return part


@public
def noise_scale(
    features: Tensor,
    head: Part,
    targets: Tensor,
    *,
    beta: float = 0.3,
    steps: int = 50,
    lr: float = 0.1,
    noise: Literal["channel", "element"] = "channel",
    reduction: Literal["mean", "sum"] = "mean",
    rng: torch.Generator | None = None,
) -> Tensor:
    r"""Scale of the noise that each channel bears before the prediction suffers (FERD Eq. 4 and 5).

    $$Z_I = Z + \sigma \epsilon, \quad \sigma = \mathrm{softplus}(\lambda), \qquad
      \min_\lambda CE(f_{l+}(Z_I), y) + \beta R, \quad
      r_c = \frac{v_c}{\sigma_c^2} + \log\frac{\sigma_c^2}{v_c} - 1$$

    Adam on $\lambda$, from 0, with fresh noise at every step, on the mean over samples; $v_c$ is the unbiased
    spatial variance of Z. $R$ alone is smallest at $\sigma_c^2 = v_c$; the cross-entropy pushes the noise of
    useful channels down. The paper gives no $\beta$; 0.3 with "mean" is the release's.

    Args:
        features: Z, float `(N, C, H, W)` with at least two positions H * W; taken as a constant.
        head: maps features to logits `(N, K)`; a module is run in eval mode and given back as it was.
        targets: int64 labels `(N,)`.
        beta: $\beta \ge 0$, the weight of the regulariser.
        steps: Adam steps >= 0 (0 gives softplus(0) = log 2 everywhere).
        lr: Adam's learning rate > 0; with 50 steps of 0.1, $|\lambda|$ stays below about 5.
        noise: one draw per sample and "channel" (the release), or per "element".
        reduction: R is half the "mean" of r_c over channels (Kim et al., the release), or their "sum"
            without the half (Eq. 5 as printed), 2C times as strong.
        rng: source of the noise; None takes torch's default generator.

    Returns:
        $\sigma$, `(N, C)`, positive, in units of the features.

    Raises:
        RuntimeError: the objective became NaN or infinite; on an accelerator, where a look would stall every
            step of a generator, the result is NaN instead.

    Example:
        >>> z, y = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        >>> noise_scale(z, head, y).shape
        torch.Size([2, 3])
    """
    z = _feature_map(features)
    _checks.callable_(head=head)
    _checks.labels(like=z, targets=targets)
    _checks.real(0, beta=beta)
    _checks.positive(lr=lr)
    _checks.integer(0, steps=steps)
    _checks.choice(("channel", "element"), noise=noise)
    _checks.choice(("mean", "sum"), reduction=reduction)
    _checks.generator(rng)
    shape = z.shape if noise == "element" else (*z.shape[:2], 1, 1)
    source = z.device if rng is None else rng.device
    # Notation: v, variances; raw, lambda; r, the regulariser of each channel.
    with torch.inference_mode(False), torch.enable_grad(), borrowed(head):
        z, targets = z.detach().clone(), targets.clone()
        v = _spatial_variance(z).clamp(min=VARIANCE_GUARD)
        raw = torch.zeros_like(v, requires_grad=True)
        optimizer = torch.optim.Adam([raw], lr=lr)
        health = v.new_zeros(())
        for step in range(steps):
            sigma = F.softplus(raw)
            epsilon = torch.randn(shape, generator=rng, dtype=z.dtype, device=source).to(z.device)
            noisy = z + sigma[..., None, None] * epsilon
            (logits,) = _checks.logits(**{"head(features)": head(noisy.to(features.dtype))})
            if step == 0:
                _checks.labels(num_classes=logits.shape[1], targets=targets)
            ratio = v / sigma.square()
            r = ratio - ratio.log() - 1
            penalty = r.sum(dim=1) if reduction == "sum" else r.mean(dim=1) / 2
            objective = (_kernels.cross_entropy(logits, targets) + beta * penalty).mean()
            # `backward` would leave gradients in the weights of a head that cannot be frozen.
            (raw.grad,) = torch.autograd.grad(objective, raw)
            health = health + objective.detach()
            optimizer.step()
        finite = health.isfinite()
        if _checks.readable(finite) and not bool(finite):
            raise InvalidState("expected a finite objective, got NaN; look at `head(features)`")
        return _checks.marked(F.softplus(raw).detach(), finite).to(features.dtype)


@public
def nonrobust_channels(
    features: Tensor, sigma: Tensor, *, threshold: Literal["sample", "batch", "channel"] = "sample"
) -> Tensor:
    r"""Mask of the channels that bear less noise than a limit (FERD Eq. 6).

    $$i_{nr} = \mathrm{not}(\sigma_c^2 > limit)$$

    with $v$ the unbiased spatial variance of each sample's channel. Measured on robust teachers, the two
    maxima are so rarely exceeded that nearly every channel counts as non-robust.

    Args:
        features: Z, float `(N, C, H, W)`.
        sigma: `(N, C)` of `noise_scale`.
        threshold: the limit is the largest v over the "sample"'s channels (Eq. 6 as printed), over all
            channels of the "batch" (the release), or the "channel"'s own v, above which its noise
            drowns its signal.

    Returns:
        bool `(N, C)`, True where non-robust; `.float().mean()` is the non-robust fraction.

    Example:
        >>> z = torch.tensor([[[[0.0, 2.0]], [[0.0, 4.0]]]])  # variances 2 and 8
        >>> sigma = torch.tensor([[2.0, 2.0]])  # squares 4 and 4
        >>> nonrobust_channels(z, sigma), nonrobust_channels(z, sigma, threshold="channel")
        (tensor([[True, True]]), tensor([[False,  True]]))
    """
    z = _feature_map(features).detach()
    _checks.floating(sigma=sigma)
    _one_per_channel(z, sigma=sigma)
    _checks.choice(("sample", "batch", "channel"), threshold=threshold)
    limit = _spatial_variance(z)
    if threshold == "sample":
        limit = limit.amax(dim=1, keepdim=True)
    elif threshold == "batch":
        limit = limit.amax()
    return ~(sigma.detach().to(z).square() > limit)


@public
def nonrobust_logits(features: Tensor, head: Part, mask: Tensor) -> Tensor:
    r"""Prediction of the non-robust features alone, $f_{l+}(i_{nr} \cdot Z)$ (FERD Eq. 7's argument).

    Logits `(N, K)`. Gradients flow into the features; the mask is a constant.

    Args:
        features: Z, float `(N, C, H, W)`.
        head: maps features to logits `(N, K)`, called in the mode that it is in.
        mask: bool `(N, C)` of `nonrobust_channels`.

    Example:
        >>> z, mask = torch.ones(1, 2, 2, 2), torch.tensor([[True, False]])
        >>> nonrobust_logits(z, lambda z: z.sum(dim=(2, 3)), mask)
        tensor([[4., 0.]])
    """
    _check_map(features)
    _checks.callable_(head=head)
    _checks.tensor(mask=mask)
    if mask.dtype != torch.bool:
        raise InvalidType(f"expected `mask` in bool, got {_checks.got(mask)}")
    _checks.one_device(features=features, mask=mask)
    _one_per_channel(features, mask=mask)
    return head(features * mask[..., None, None])


def _check_map(features: Tensor) -> None:
    if isinstance(features, Tensor) and features.ndim == 3:
        came = f"expected `features` of shape (N, C, H, W), got {tuple(features.shape)}"
        remedy = "pass tokens (N, L, D) as `features.transpose(1, 2)[..., None]`"
        raise InvalidValue(f"{came}; {remedy}, one map as `features[None]`")
    _checks.images(features=features)


def _feature_map(features: Tensor) -> Tensor:
    """Checked features in float32 or wider."""
    _check_map(features)
    # Eq. 5 and 6 take the variance over positions.
    if not len(features) or features[0, 0].numel() < 2:
        came = f"{tuple(features.shape)}; cut at an earlier layer"
        raise InvalidValue(f"expected `features` with samples and several positions, got {came}")
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _one_per_channel(features: Tensor, **named: Tensor) -> None:
    shape = tuple(features.shape[:2])
    for name, value in named.items():
        if value.shape != shape:
            raise InvalidValue(f"expected `{name}` of shape {shape}, got {tuple(value.shape)}")


def _spatial_variance(z: Tensor) -> Tensor:
    """Unbiased variance over the positions, `(N, C)`."""
    return z.flatten(2).var(dim=2, correction=1)
