"""Which channels of a feature map are non-robust: FERD's use of Kim et al.'s information bottleneck.

Split a model in two, learn how much noise each channel bears, and mask the channels that bear little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ferdlib import _oldchecks as _checks
from ferdlib._modes import borrowed
from ferdlib._ranks import drawn
from ferdlib.losses import cross_entropy

__all__ = ["noise_scale", "nonrobust_channels", "nonrobust_logits", "split_at"]

Part = Callable[[Tensor], Tensor]

# Kim et al. guard the variance by the same amount: a dead channel has log(sigma^2 / 0).
VARIANCE_GUARD = 1e-10


def split_at(model: nn.Module, layer_name: str) -> tuple[nn.Module, nn.Module]:
    """Cut a model behind one of its layers: `head(features(x)) == model(x)`.

    Both parts share the model's own submodules, so they follow its weights, its device and its
    train/eval flags. `head` leaves its input alone, also where an in-place activation follows the cut.
    The model is traced in eval mode. One that `torch.fx` cannot trace needs no `split_at`: pass your
    own pair of callables wherever a pair is asked for.

    Args:
        model: any module that torch.fx can trace.
        layer_name: a name of `model.named_modules()`, such as "layer4" or "bn1"; a container is cut
            behind its last layer. Everything later must depend on the input through it alone.

    Returns:
        `(features, head)`: images to the layer's output, and the layer's output to logits.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no such layer, a layer that the forward uses not at all or more than once, one
            that a skip connection bypasses, or a model that cannot be traced.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten())
        >>> features, head = split_at(model, "0")
        >>> x = torch.rand(4, 1, 5, 5)
        >>> torch.equal(head(features(x)), model(x))
        True
    """
    _checks.module("split_at", "model", model)
    if not isinstance(layer_name, str):
        raise TypeError(
            f"split_at: expected `layer_name` to be a string, got {_checks.got(layer_name)}"
        )
    names = [name for name, _ in model.named_modules() if name]
    if layer_name not in names:
        raise ValueError(
            f"split_at: expected `layer_name` to be a layer of the model, got {layer_name!r}; there "
            f"are {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
        )
    try:
        # In eval mode, because what a functional dropout reads from `training` is traced as a constant.
        with borrowed(model, freeze=False):
            graph = _Tracer(layer_name).trace(model)
    except Exception as error:
        raise ValueError(
            f"split_at: expected `model` to be traceable by torch.fx, got {type(model).__name__}, "
            f"which fails with: {error}; pass your own (features, head) pair instead"
        ) from error
    cuts = [n for n in graph.nodes if n.op == "call_module" and n.target == layer_name]
    if len(cuts) != 1:
        raise ValueError(
            f"split_at: expected `layer_name` {layer_name!r} to run once in a forward, got "
            f"{len(cuts)} times"
        )
    return _features(model, graph, cuts[0]), _head(model, graph, cuts[0])


class _Tracer(fx.Tracer):
    """Traces through user modules, but keeps the layer of the cut whole even if it is a container."""

    proxy_buffer_attributes = True  # else what a forward computes from a buffer becomes a constant

    def __init__(self, layer_name: str) -> None:
        super().__init__()
        self._layer_name = layer_name

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == self._layer_name or super().is_leaf_module(
            m, module_qualified_name
        )


def _features(model: nn.Module, graph: fx.Graph, cut: fx.Node) -> fx.GraphModule:
    """What runs up to and including the cut."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = part.node_copy(node, lambda n: copies[n])
        if node is cut:
            break
    part.output(copies[cut])
    return _module(model, part)


def _head(model: nn.Module, graph: fx.Graph, cut: fx.Node) -> fx.GraphModule:
    """What runs behind the cut, on a copy of its input."""
    part = fx.Graph()
    entry = part.placeholder("features")
    copies: dict[fx.Node, fx.Node] = {cut: part.call_method("clone", (entry,))}
    nodes = list(graph.nodes)
    for node in nodes[nodes.index(cut) + 1 :]:
        for argument in node.all_input_nodes:
            if argument not in copies:
                if argument.op != "get_attr":
                    raise ValueError(
                        f"split_at: expected everything behind `layer_name` {cut.target!r} to pass "
                        f"through it, got a connection from {argument.name!r} around it"
                    )
                copies[argument] = part.node_copy(argument)
        copies[node] = part.node_copy(node, lambda n: copies[n])
    return _module(model, part)


def _module(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph as a module that shares the model's submodules, parameters and buffers."""
    part = fx.GraphModule(model, graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            owner = node.target.rpartition(".")[0]
            theirs, ours = model.get_submodule(owner), part.get_submodule(owner)
            # fx copies references, which go stale when `.to()` replaces a buffer. What is no buffer
            # of the model, such as a constant in its forward, stays as it is.
            vars(ours).update({k: v for k, v in ours._buffers.items() if k not in theirs._buffers})
            ours._buffers, ours._parameters = theirs._buffers, theirs._parameters
    return part


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
    r"""How much noise each channel bears before the prediction suffers (FERD Eq. 4 and 5).

    $$Z_I = Z + \sigma \epsilon, \quad \sigma = \mathrm{softplus}(\lambda), \qquad
      \min_\lambda CE(f_{l+}(Z_I), y) + \beta R, \quad
      r_c = \frac{v_c}{\sigma_c^2} + \log\frac{\sigma_c^2}{v_c} - 1$$

    Adam on $\lambda$, from 0, with fresh noise at every step; $v_c$ is the unbiased spatial variance of
    Z. $R$ alone is smallest at $\sigma_c^2 = v_c$; the cross-entropy pushes the noise of useful channels
    down. The objective is a mean over samples. The paper gives no $\beta$; 0.3 with "mean" is the release's.

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
        TypeError: features that are not float, labels that are not int64.
        ValueError: wrong shapes, a single spatial position, numbers out of range.
        RuntimeError: the objective became NaN or infinite.

    Example:
        >>> z, y = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        >>> noise_scale(z, head, y).shape
        torch.Size([2, 3])
    """
    name = "noise_scale"
    z = _feature_map(name, features)
    _checks.callable_(name, "head", head)
    _checks.labels(name, targets, length=z.shape[0], device=z.device)
    beta = _checks.number(name, "beta", beta, low=0.0)
    lr = _checks.number(name, "lr", lr, low=0.0, open_low=True)
    _checks.integer(name, "steps", steps, low=0)
    _checks.choice(name, "noise", noise, ("channel", "element"))
    _checks.choice(name, "reduction", reduction, ("mean", "sum"))
    _checks.generator(name, rng)
    device = z.device if rng is None else rng.device
    shape = z.shape if noise == "element" else (*z.shape[:2], 1, 1)

    def normal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=z.dtype, device=device)

    with torch.inference_mode(False), torch.enable_grad(), borrowed(head):
        z, targets = z.detach().clone(), targets.clone()
        v = _spatial_variance(z).clamp(min=VARIANCE_GUARD)
        raw = torch.zeros_like(v, requires_grad=True)
        optimizer = torch.optim.Adam([raw], lr=lr)
        health = v.new_zeros(())
        for _ in range(steps):
            sigma = F.softplus(raw)
            draw = drawn(normal, tuple(shape), rng).to(z.device)
            noisy = (z + sigma[..., None, None] * draw).to(features.dtype)
            logits = _checks.logits(name, head(noisy), argument="head(features)")
            _checks.labels(name, targets, num_classes=logits.shape[1])
            ratio = v / sigma.square()
            r = ratio - ratio.log() - 1
            penalty = r.sum(dim=1) if reduction == "sum" else r.mean(dim=1) / 2
            objective = (cross_entropy(logits, targets) + beta * penalty).mean()
            (raw.grad,) = torch.autograd.grad(objective, raw)
            health = health + objective.detach()
            optimizer.step()
        if not bool(health.isfinite()):
            raise RuntimeError(
                f"{name}: expected a finite objective, got NaN or infinity; look at `head(features)`"
            )
        return F.softplus(raw).detach().to(features.dtype)


def nonrobust_channels(
    features: Tensor, sigma: Tensor, *, threshold: Literal["sample", "batch", "channel"] = "sample"
) -> Tensor:
    r"""The channels that bear less noise than a limit (FERD Eq. 6).

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

    Raises:
        TypeError: features or sigma that are not float.
        ValueError: wrong shapes, a single spatial position, an unknown threshold.

    Example:
        >>> z = torch.tensor([[[[0.0, 2.0]], [[0.0, 4.0]]]])  # variances 2 and 8
        >>> sigma = torch.tensor([[2.0, 2.0]])  # squares 4 and 4
        >>> nonrobust_channels(z, sigma), nonrobust_channels(z, sigma, threshold="channel")
        (tensor([[True, True]]), tensor([[False,  True]]))
    """
    name = "nonrobust_channels"
    z = _feature_map(name, features).detach()
    _checks.floating(name, "sigma", sigma)
    if sigma.shape != z.shape[:2]:
        raise ValueError(
            f"{name}: expected `sigma` of shape {tuple(z.shape[:2])}, got {tuple(sigma.shape)}"
        )
    _checks.choice(name, "threshold", threshold, ("sample", "batch", "channel"))
    limit = _spatial_variance(z)
    if threshold == "sample":
        limit = limit.amax(dim=1, keepdim=True)
    elif threshold == "batch":
        limit = limit.amax()
    return ~(sigma.detach().to(z).square() > limit)


def nonrobust_logits(features: Tensor, head: Part, mask: Tensor) -> Tensor:
    r"""The prediction of the non-robust features alone, $f_{l+}(i_{nr} \cdot Z)$ (FERD Eq. 7's argument).

    Gradients flow into the features; the mask is a constant.

    Args:
        features: Z, float `(N, C, H, W)`.
        head: maps features to logits `(N, K)`, called in the mode that it is in.
        mask: bool `(N, C)` of `nonrobust_channels`.

    Returns:
        Logits `(N, K)`.

    Raises:
        TypeError: features that are not float, a mask that is not bool.
        ValueError: wrong shapes.

    Example:
        >>> z, mask = torch.ones(1, 2, 2, 2), torch.tensor([[True, False]])
        >>> nonrobust_logits(z, lambda z: z.sum(dim=(2, 3)), mask)
        tensor([[4., 0.]])
    """
    name = "nonrobust_logits"
    _checks.images(name, features, argument="features")
    if _checks.tensor(name, "mask", mask).dtype != torch.bool:
        raise TypeError(f"{name}: expected `mask` in bool, got {_checks.got(mask)}")
    _checks.callable_(name, "head", head)
    _checks.same_device(name, features=features, mask=mask)
    if mask.shape != features.shape[:2]:
        raise ValueError(
            f"{name}: expected `mask` of shape {tuple(features.shape[:2])}, got {tuple(mask.shape)}"
        )
    logits: Tensor = head(features * mask[..., None, None])
    return logits


def _feature_map(function: str, features: Any) -> Tensor:
    """Checked features in float32 or wider."""
    z = _checks.images(function, features, argument="features")
    if not len(z):
        raise ValueError(f"{function}: expected `features` of at least one sample, got none")
    if z.shape[2] * z.shape[3] < 2:
        raise ValueError(
            f"{function}: expected `features` with at least two spatial positions, because Eq. 5 and 6 "
            f"need their variance, got {tuple(z.shape)}; cut the model at an earlier layer"
        )
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _spatial_variance(z: Tensor) -> Tensor:
    return z.flatten(2).var(dim=2, correction=1)
