"""Gradients that do not vanish on their way through the model.

The sign of a gradient is all that an ascent uses, so the loss of each sample may be scaled freely. A confident
sample needs that: its loss is nearly flat, and in half precision its gradient rounds to 0, where the attack stands
still and the model passes for robust.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ferdlib.losses import cross_entropy, distillation

# Logits (N, K) and targets -> a column that is never 0, and the direction of the gradient with its label's entry.
Exact = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Below ordinary gradients of logits, and 17 bits above the smallest number of float16.
FLOOR = 2.0**-7
SMALLEST = 2.0**-120
EXPONENT = 0x7F800000


def lifted(
    output: Any, targets: Any = None, exact: Exact | None = None, coupled: bool = False
) -> Any:
    """Logits in float32 or wider, of whose gradient each row is scaled up by a power of two before it goes on.

    Powers of two change no digit, so wherever nothing underflowed the sign of the images' gradient is the same.

    Args:
        output: of the model; anything but a float tensor `(N, ...)` is returned as it is.
        exact: of the loss, for rows in which the gradient has lost an entry by rounding.
        coupled: True where a sample's logits depend on the others: then all rows have one scale.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim < 2:
        return output
    return _Lifted.apply(output, targets, exact, coupled)


def of_cross_entropy(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""Direction of $p - e_y$, which is 0 in float32 as soon as $p_y$ rounds to 1: $q - e_y$ with q without y."""
    label = y[:, None]
    others = z.scatter(1, label, -torch.inf).softmax(dim=1).nan_to_num()
    return label, others.scatter(1, label, -1.0)


def of_divergence(z: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    r"""Direction of $p - p_{ref}$ from logarithms, for two predictions that are nearly certain of one class."""
    log_p, log_r = z.log_softmax(dim=1), reference.to(z).log_softmax(dim=1)
    top = log_p.argmax(dim=1, keepdim=True)
    a, b = (log.scatter(1, top, -torch.inf) for log in (log_p, log_r))
    largest = torch.maximum(a, b).amax(dim=1, keepdim=True)
    others = ((a - largest).exp() - (b - largest).exp()).nan_to_num()
    return top, others.scatter(1, top, -others.sum(dim=1, keepdim=True))


def exact_of(loss: object) -> Exact | None:
    """Direction of a loss of this library that is known beyond the digits of its gradient."""
    return {id(cross_entropy): of_cross_entropy, id(distillation): of_divergence}.get(id(loss))


class _Lifted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, targets: Any, exact: Exact | None, coupled: bool
    ) -> Tensor:
        ctx.dtype, ctx.targets, ctx.exact, ctx.coupled = output.dtype, targets, exact, coupled
        z = output.to(torch.promote_types(output.dtype, torch.float32))
        ctx.save_for_backward(z)
        return z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.exact is not None and not ctx.coupled:
            column, direction = ctx.exact(*ctx.saved_tensors, ctx.targets)
            gradient = torch.where(gradient.gather(1, column) == 0, direction, gradient)
        largest = gradient.abs().flatten(1).amax(dim=1).float()
        largest = largest.amax().expand_as(largest) if ctx.coupled else largest
        # Without its mantissa it is a power of two; no device lacks these bits, as some lack `frexp`.
        power = (largest.clamp(min=SMALLEST).view(torch.int32) & EXPONENT).view(torch.float32)
        scale = (FLOOR / power).clamp(min=1).to(gradient)
        gradient = gradient * scale.reshape(-1, *[1] * (gradient.ndim - 1))
        return gradient.to(ctx.dtype), None, None, None
