"""A fast copy of a model for attacks: evaluation mode for good, BatchNorm folded."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from typing_extensions import override

from ferdlib import _checks
from ferdlib._checks import InvalidState, InvalidValue, public
from ferdlib.models.likeness import PlainState, difference, one_line
from ferdlib.models.normalized import Normalized
from ferdlib.models.tracing import NotCopyable, NotTraceable, check_copyable, trace

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class FrozenModel(nn.Module):
    """A fast copy in eval mode for good, from images to logits; made by `freeze_for_attack`.

    On the first images that it gets it is compared with the model, which costs a pass of a few of them.

    Attributes:
        folded: BatchNorm layers that are now part of a convolution, with its name.
        kept: BatchNorm layers that are left, because they do not follow a convolution of their own.

    Raises:
        RuntimeError: a forward after `training` was set by force.
        ValueError: logits or gradients that are not the model's.

    Example:
        >>> from ferdlib.models import preact_resnet18
        >>> fast = freeze_for_attack(preact_resnet18(10))  # one of a block's two norms follows a convolution
        >>> len(fast.folded), len(fast.kept), fast.train().training
        (8, 9, False)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        fold_batchnorm: bool = True,
        channels_last: bool | None = None,
        compile: bool | str = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        model = _uncompiled(model)
        if channels_last is None:
            channels_last = _ours(model)
        self._format = torch.channels_last if channels_last else torch.preserve_format
        self._fold, self._compile, self._autocast = fold_batchnorm, compile, autocast
        self._make(model)

    def _make(self, model: nn.Module) -> None:
        """Copy the model as it is now; where that fails, the copy stays what it was."""
        try:
            if self._fold:
                graph, attributes = trace(model)
                network: Any = copied(fx.GraphModule(attributes, graph))
            else:
                check_copyable(model)
                network = copied(model)
                _check_own_forwards(model, network)
        except NotCopyable as error:
            raise InvalidValue(f"a {type(model).__name__} with {error}") from error.__cause__
        network = network.eval().requires_grad_(False)
        self.folded: dict[str, str] = _fold(network) if self._fold else {}
        self.kept = tuple(name for name, m in network.named_modules() if isinstance(m, _NORMS))
        if self._format == torch.channels_last:
            for tensor in (*network.parameters(), *network.buffers()):
                if tensor.ndim == 4:
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        if self._compile:
            mode = self._compile if isinstance(self._compile, str) else None
            network = torch.compile(network, mode=mode)
        self.network = network
        self._origin = _Origin(model)
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
        model = self._origin.model()
        if model is not None and isinstance(x, Tensor):
            try:
                compare(self, model, x)
            except InvalidValue as error:
                raise InvalidValue(
                    f"expected a model that can be copied for attacks, got {error}; attack the model itself"
                ) from error.__cause__
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

        Where a number that is no tensor, a hook or a layer has changed, the copy is made anew.

        Raises:
            TypeError: `model` is not a module.
            ValueError: `model` has other layers, or cannot be copied any more.
        """
        _checks.module(model=model)
        model = _uncompiled(model)
        theirs, layers = _tensors(model), dict(model.named_modules())
        # Tensors that the forward makes are those of the trace.
        own = {k: v for k, v in _tensors(_uncompiled(self.network)).items() if k[:8] != "_traced_"}
        # A folded convolution has a bias also if the model's has none.
        biases = {f"{conv}.bias" for conv in self.folded.values()}
        # A tensor that is only an attribute of the model is a buffer of the copy.
        for name in own.keys() - theirs.keys() - biases:
            owner, _, attribute = name.rpartition(".")
            found = vars(layers[owner]).get(attribute) if owner in layers else None
            theirs |= {name: found} if isinstance(found, Tensor) else {}
        same = self.folded.keys() <= layers.keys() and all(
            name in biases or (name in theirs and theirs[name].shape == value.shape)
            for name, value in own.items()
        )
        if not same:
            raise InvalidValue(
                f"expected `model` with the layers of this copy, got a {type(model).__name__} with others"
            )
        if self._origin.plain != PlainState(model):
            try:
                self._make(model)
            except InvalidValue as error:
                wanted = "expected `model` that can be copied as it is now"
                raise InvalidValue(f"{wanted}, got {error}") from error.__cause__
            return
        with torch.no_grad():
            for norm, conv in self.folded.items():
                theirs |= _fused(conv, layers[conv], layers[norm])
            for name, value in own.items():
                value.copy_(theirs[name])
        self._origin.refresh(model)

    def extra_repr(self) -> str:
        return f"{len(self.folded)} of {len(self.folded) + len(self.kept)} BatchNorm layers folded"


def compare(copy: FrozenModel, model: nn.Module, x: Tensor) -> None:
    """Compare a copy, not compiled and without autocast, with its model on real images.

    Raises:
        ValueError: logits, gradients or random numbers that are not the model's.
    """
    if found := difference(model, _uncompiled(copy.network), x, copy._format):
        raise InvalidValue(f"a {type(model).__name__} whose copy has {found}")
    copy._origin.compared = len(x) > 0


class _Origin:
    """Plain state of the copied model, and the model itself until the copy is compared with it.

    A model that is trained meanwhile is nothing to compare with. A copy of this knows nothing.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.plain, self.compared = PlainState(model), model is None
        self.refresh(model)

    def __reduce__(self) -> tuple[type[_Origin], tuple[()]]:
        return _Origin, ()

    def refresh(self, model: nn.Module | None) -> None:
        """Remember the weights that the copy has."""
        if not self.compared and model is not None:
            self._model, self._versions = model, _versions(model)

    def model(self) -> nn.Module | None:
        """Return the model if it is to be compared now."""
        # `torch.jit.trace` and torch.compile would take the comparison for a part of the model.
        recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if self.compared or recorded:
            return None
        return self._model if _versions(self._model) == self._versions else None


@public
def freeze_for_attack(
    model: nn.Module,
    *,
    fold_batchnorm: bool = True,
    channels_last: bool | None = None,
    compile: bool | str = False,
    autocast: torch.dtype | None = None,
) -> FrozenModel:
    r"""Copy a model into one that computes the same logits faster, for attacks and for frozen teachers.

    Weights do not require gradients, and BatchNorm in eval mode becomes part of the convolution before it:

    $$\gamma \frac{(w * x + b) - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta = w' * x + b', \quad
      w' = \frac{\gamma}{\sqrt{\sigma^2 + \varepsilon}} w$$

    The logits are those of the model in eval mode to about 1e-6 of their size in float32, so an attack may
    step another way where a gradient is near zero. The copy is compared with the model on the first images.
    The model is left alone, and its later training reaches the copy only through `FrozenModel.follow`, which
    costs no more than copying the weights.

    Args:
        model: a module from images `(N, C, H, W)` to logits; for `fold_batchnorm` one that torch.fx can
            trace, hooks and wrappers included. Layers with hooks or parametrizations are not folded.
        fold_batchnorm: fold BatchNorm into the convolutions.
        channels_last: convert weights and images to that memory format, which most convolutions like better
            and a `view` in a forward does not bear; None does so for the models of this package.
        compile: also `torch.compile`; a string is its mode, "reduce-overhead" captures CUDA graphs. The
            first forwards of each shape are slow then.
        autocast: torch.bfloat16 or torch.float16 for the forward; the logits are float32. Far from exact:
            signs of gradients change.

    Returns:
        A `FrozenModel` on the model's device.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a model that cannot be copied so that the copy computes the same, or an unknown dtype.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> model = small_cnn(1, 3, width=4).eval()
        >>> fast, x = freeze_for_attack(model), torch.rand(2, 1, 8, 8)
        >>> torch.allclose(fast(x), model(x), atol=1e-5), len(fast.folded), len(fast.kept)
        (True, 4, 0)
    """
    _checks.module(model=model)
    _checks.choice((None, torch.bfloat16, torch.float16), autocast=autocast)
    try:
        return FrozenModel(
            model,
            fold_batchnorm=fold_batchnorm,
            channels_last=channels_last,
            compile=compile,
            autocast=autocast,
        )
    except InvalidValue as error:
        untraced = isinstance(error.__context__, NotTraceable)
        remedy = "pass fold_batchnorm=False or attack" if untraced else "attack"
        wanted = "`model` that can be copied for attacks"
        raise InvalidValue(
            f"expected {wanted}, got {error}; {remedy} the model itself"
        ) from error.__cause__


def copied(model: nn.Module) -> Any:
    """Copy a module, those included whose weights hooks make anew at every forward."""
    # torch copies no tensor that has a history.
    made = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    try:
        return copy.deepcopy(model, made)
    except Exception as error:  # whatever a user's attributes make of it
        raise NotCopyable(f"something that cannot be copied: {one_line(error)}") from error


def _check_own_forwards(model: nn.Module, network: nn.Module) -> None:
    """Refuse a copy whose forward is still that of an instance of the model."""
    for name, module in network.named_modules():
        own = vars(module).get("forward")
        if own is not None and own is vars(model.get_submodule(name)).get("forward"):
            raise NotCopyable("a `forward` of its own instance, which a copy would share")


def _uncompiled(model: nn.Module) -> nn.Module:
    """Return the model behind `torch.compile`."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _ours(model: nn.Module) -> bool:
    """True for the models of this package, of which it is known that they bear another memory format."""
    while isinstance(model, Normalized):
        model = model.model
    return type(model).__module__.startswith(f"{__package__}.")


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    tensors = _tensors(model).values()
    return [(id(each), 0 if each.is_inference() else each._version) for each in tensors]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by name, each of tied ones under its own."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, module in model.named_modules(remove_duplicate=False)
        for values in (module._parameters, module._buffers)
        for name, value in values.items()
        if value is not None
    }


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
        if any(
            m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in (conv, norm)
        ):
            continue
        fused = _fused(str(source.target), conv, norm).values()
        conv.weight, conv.bias = (nn.Parameter(v.detach(), requires_grad=False) for v in fused)
        node.replace_all_uses_with(source)
        network.graph.erase_node(node)
        folded[str(node.target)] = str(source.target)
    network.delete_all_unused_submodules()
    network.recompile()
    return folded
