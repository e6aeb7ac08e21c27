"""A device that every machine has: its tensors are out of the host's reach, and what the host reads is counted.

torch's slot for foreign devices is filled with one named "card", whose values lie in CPU tensors that only this
file knows. Operations that would mix devices are errors as on CUDA. A real card is watched in the same way.
"""

from __future__ import annotations

import collections
import traceback
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
PACKAGE = str(Path(__file__).parents[1] / "ferdlib")

# Their results, or the shapes of these, are known to the host only when the device has done them.
READS = {
    *(aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select),
    *(aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount),
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten.copy_, aten._to_copy}


class Module(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


# Now, because autograd counts the devices once, at the first backward of a process.
backend_registration._setup_privateuseone_for_python_backend("card", Module())


def autocast(op, dtype, *args):
    """An operation under autocast on the stand-in, for which torch has no kernels."""

    def cast(value):
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet("AutocastPrivateUse1")):
        return op(*tree_map(cast, args))


# Kept, because kernels end with their library.
LIBRARIES = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
LIBRARIES[0].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for op in (aten.conv2d.default, aten.linear.default, aten.matmul.default):
    LIBRARIES[1].impl(op, partial(autocast, op, torch.bfloat16), "AutocastPrivateUse1")
for op in (aten.log_softmax.int, aten.softmax.int, aten.nll_loss.default):
    LIBRARIES[1].impl(op, partial(autocast, op, torch.float32), "AutocastPrivateUse1")


class CardGenerator(torch.Generator):
    """A generator of the stand-in."""

    device = torch.device("card:0")


class Front(TorchFunctionMode):
    """Numbers are drawn where their generator is, as on CUDA; a deep copy copies hidden values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__ and args[0].device.type == "card":
            value, memo = args
            made = value.detach().clone()
            made = nn.Parameter(made) if isinstance(value, nn.Parameter) else made
            return memo.setdefault(id(value), made.requires_grad_(value.requires_grad))
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            # Made from Python's numbers without a word to anybody, and then sent.
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        result = func(*args, **kwargs)
        rng = kwargs.get("generator")
        if rng is not None and rng.device.type != result.device.type:
            wanted, came = result.device.type, rng.device.type
            raise RuntimeError(
                f"Expected a '{wanted}' device type for generator but found '{came}'"
            )
        return result


class Card(TorchDispatchMode):
    """Run the block with the stand-in, or with a real card, and count by place what the host reads.

    Attributes:
        reads: how often the host waited for a value, by line of the package.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.reads = kind, collections.Counter()

    def generator(self, seed: int = 0) -> torch.Generator:
        rng = CardGenerator() if self.kind == "card" else torch.Generator(self.kind)
        return rng.manual_seed(seed)

    def __enter__(self):
        self.front = Front().__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.front.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        here = [t.device.type == self.kind for t in tensors]
        target = kwargs.get("device")
        makes = any(here) if target is None else torch.device(target).type == self.kind
        leaves = (func is aten.copy_.default and not here[0]) or (
            func is aten._to_copy.default and not makes
        )
        if any(here) and (leaves or waits(func, args)):
            self._count(func)
        if self.kind != "card" or not (any(here) or makes):
            return func(*args, **kwargs)
        others = [t for t, on_card in zip(tensors, here, strict=True) if not on_card and t.ndim]
        if func.overloadpacket in INDEXING and here[0]:
            others = others if len(args) > 2 and not here[-1] and tensors[-1].ndim else []
        if any(here) and others and func.overloadpacket not in COPIES:
            raise RuntimeError(
                f"Expected all tensors to be on the same device in {func}, but got cpu too"
            )
        return self._run(func, args, kwargs, wrapped=makes and not leaves)

    def _run(self, func, args, kwargs, wrapped):
        """Compute on the hidden values, which views share as their tensors do."""
        originals = {}

        def hidden(value):
            if isinstance(value, torch.device):
                return torch.device("cpu") if value.type == "card" else value
            if not isinstance(value, Tensor) or value.device.type != "card":
                return value
            values, geometry = value.untyped_storage().values, (value.shape, value.stride())
            found = torch.empty(0, dtype=value.dtype, device="cpu")
            found.set_(values, value.storage_offset(), *geometry)
            originals[id(found)] = value, found
            return found

        def shown(value):
            if not isinstance(value, Tensor) or not wrapped:
                return value
            if id(value) in originals:
                return originals[id(value)][0]
            base = torch._C._acc.create_empty_tensor([0], value.dtype)
            base.untyped_storage().values = value.untyped_storage()
            view = torch._C._dynamo.guards._reinterpret_tensor
            return view(base, value.shape, value.stride(), value.storage_offset())

        args, kwargs = tree_map(hidden, (args, kwargs))
        return tree_map(shown, func(*args, **kwargs))

    def _count(self, func) -> None:
        places = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
        place = (
            f"{places[-1].filename.removeprefix(PACKAGE)[1:]}:{places[-1].lineno}"
            if places
            else "test"
        )
        self.reads[f"{place} {func}"] += 1


def waits(func, args) -> bool:
    """True of what the host can only go on from when it has a value; a mask as an index is one."""
    packet = func.overloadpacket
    if packet is aten.index or (packet in INDEXING and args[2].numel() > 1):
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return packet in READS
