"""A fast copy of a model for attacks: evaluation mode for good, BatchNorm folded, channels-last."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from typing_extensions import override

from ferdlib import _checks
from ferdlib._checks import InvalidState, InvalidValue, public

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class FrozenModel(nn.Module):
    """A fast copy in eval mode for good, from images to logits; made by `freeze_for_attack`.

    Attributes:
        folded: BatchNorm layers that are now part of a convolution, with its name.
        kept: BatchNorm layers that are left, because they do not follow a convolution of their own.

    Raises:
        RuntimeError: a forward after `training` was set by force.

    Example:
        >>> from ferdlib.models import preact_resnet18
        >>> fast = freeze_for_attack(preact_resnet18(10))  # one of a block's two norms follows a convolution
        >>> len(fast.folded), len(fast.kept), fast.train().training
        (8, 9, False)
    """

    def __init__(
        self,
        network: Any,
        *,
        folded: dict[str, str],
        kept: tuple[str, ...],
        channels_last: bool,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.network = network
        self.folded, self.kept = folded, kept
        self._format = torch.channels_last if channels_last else torch.preserve_format
        self._autocast = autocast
        self.train(False)

    @override
    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    @public
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise InvalidState(
                "expected eval mode, got train mode; attack the model itself with `train_mode`"
            )
        x = x.to(memory_format=self._format)
        if self._autocast is None:
            logits: Tensor = self.network(x)
            return logits
        with torch.autocast(x.device.type, dtype=self._autocast):
            logits = self.network(x)
        return logits.float()

    @public
    def follow(self, model: nn.Module) -> None:
        """Take over the present weights and statistics of the model that was copied.

        Raises:
            TypeError: `model` is not a module.
            ValueError: `model` has other layers.
        """
        _checks.module(model=model)
        theirs, layers = _tensors(model), dict(model.named_modules())
        own = _tensors(getattr(self.network, "_orig_mod", self.network))
        # A folded convolution has a bias also if the model's has none.
        biases = {f"{conv}.bias" for conv in self.folded.values()}
        same = self.folded.keys() <= layers.keys() and all(
            name in biases or (name in theirs and theirs[name].shape == value.shape)
            for name, value in own.items()
        )
        if not same:
            raise InvalidValue(
                f"expected `model` with the layers of this copy, got a {type(model).__name__} with others"
            )
        with torch.no_grad():
            for norm, conv in self.folded.items():
                theirs |= _fused(conv, layers[conv], layers[norm])
            for name, value in own.items():
                value.copy_(theirs[name])

    def extra_repr(self) -> str:
        return f"{len(self.folded)} of {len(self.folded) + len(self.kept)} BatchNorm layers folded"


@public
def freeze_for_attack(
    model: nn.Module,
    *,
    fold_batchnorm: bool = True,
    channels_last: bool = True,
    compile: bool | str = False,
    autocast: torch.dtype | None = None,
) -> FrozenModel:
    r"""Copy a model into one that computes the same logits faster, for attacks and for frozen teachers.

    Weights do not require gradients, and BatchNorm in eval mode becomes part of the convolution before it:

    $$\gamma \frac{(w * x + b) - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta = w' * x + b', \quad
      w' = \frac{\gamma}{\sqrt{\sigma^2 + \varepsilon}} w$$

    The logits are those of the model in eval mode to about 1e-6 of their size in float32, so an attack may
    step another way where a gradient is near zero. The model is left alone, and its later training reaches
    the copy only through `FrozenModel.follow`, which costs no more than copying the weights.

    Args:
        model: a module from images `(N, C, H, W)` to logits; for `fold_batchnorm` one that torch.fx can
            trace. Layers with hooks or parametrizations are not folded.
        fold_batchnorm: fold BatchNorm into the convolutions.
        channels_last: convert weights and images to that memory format, which most convolutions like better.
        compile: also `torch.compile`; a string is its mode, "reduce-overhead" captures CUDA graphs. The
            first forwards of each shape are slow then.
        autocast: torch.bfloat16 or torch.float16 for the forward; the logits are float32. Far from exact:
            signs of gradients change.

    Returns:
        A `FrozenModel` on the model's device.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `fold_batchnorm` for a model that torch.fx cannot trace, or an unknown dtype.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> model = small_cnn(1, 3, width=4).eval()
        >>> fast, x = freeze_for_attack(model), torch.rand(2, 1, 8, 8)
        >>> torch.allclose(fast(x), model(x), atol=1e-5), len(fast.folded), len(fast.kept)
        (True, 4, 0)
    """
    _checks.module(model=model)
    _checks.choice((None, torch.bfloat16, torch.float16), autocast=autocast)
    network: Any = copy.deepcopy(model).eval().requires_grad_(False)
    folded: dict[str, str] = {}
    if fold_batchnorm:
        try:
            network = fx.symbolic_trace(network)
        except Exception as error:  # whatever the model's own code makes of a proxy
            raise InvalidValue(
                f"expected `model` to be traceable by torch.fx, got a {type(model).__name__} with "
                f"{type(error).__name__}: {' '.join(str(error).split())}; pass fold_batchnorm=False"
            ) from error
        folded = _fold(network)
    kept = tuple(name for name, m in network.named_modules() if isinstance(m, _NORMS))
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    if compile:
        network = torch.compile(network, mode=compile if isinstance(compile, str) else None)
    return FrozenModel(
        network, folded=folded, kept=kept, channels_last=channels_last, autocast=autocast
    )


def fast_copy(model: nn.Module) -> nn.Module:
    """Return `freeze_for_attack(model)`, or the model itself if torch.fx cannot trace it."""
    try:
        return freeze_for_attack(model)
    except ValueError as error:
        logging.getLogger("ferdlib").info("%s; it is attacked as it is", error)
        return model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _fused(name: str, conv: Any, norm: Any) -> dict[str, Tensor]:
    """Return a convolution's weight and bias, by their names in the model, with the norm behind it."""
    statistics = norm.running_mean, norm.running_var, norm.eps
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def _fold(network: fx.GraphModule) -> dict[str, str]:
    """Fold each BatchNorm that alone reads a convolution's output; return norm to convolution, by name."""
    modules: dict[str, Any] = dict(network.named_modules())
    calls = Counter(
        id(modules[str(n.target)]) for n in network.graph.nodes if n.op == "call_module"
    )
    folded = {}
    for node in list(network.graph.nodes):
        source = node.args[0] if node.op == "call_module" and node.args else None
        # Another reader of the convolution wants its output without the norm.
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        conv, norm = modules[str(source.target)], modules[str(node.target)]
        # A subclass may compute something else, and a norm without statistics takes the batch's own.
        plain = type(conv) is nn.Conv2d and type(norm) in _NORMS
        if not plain or norm.running_mean is None or calls[id(conv)] > 1 or calls[id(norm)] > 1:
            continue
        # A hook would see other numbers, or vanish with the norm.
        if any(m._forward_hooks or m._forward_pre_hooks for m in (conv, norm)):
            continue
        fused = _fused(str(source.target), conv, norm).values()
        conv.weight, conv.bias = (nn.Parameter(v.detach(), requires_grad=False) for v in fused)
        node.replace_all_uses_with(source)
        network.graph.erase_node(node)
        folded[str(node.target)] = str(source.target)
    network.delete_all_unused_submodules()
    network.recompile()
    return folded
