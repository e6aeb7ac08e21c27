"""The losses of FERD: BatchNorm statistics (Eq. 8), generator (Eq. 9), distillation (Eq. 11)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ferdlib import _checks
from ferdlib._checks import InvalidState, InvalidValue, public
from ferdlib.losses import _kernels
from ferdlib.losses.distillation import distillation

Reduce = Callable[[Tensor], Tensor]


class BatchNormStatistics:
    r"""Distance of a batch's statistics from those a model's BatchNorm layers remember (FERD Eq. 8, $L_{bn}$).

    $$L_{bn} = \sum_l \|\mu_l(x) - \mu_l\|_2 + \|\sigma^2_l(x) - \sigma^2_l\|_2$$

    The batch mean and the *biased* batch variance of each layer's input, per channel, against its
    running statistics; the norms are not squared, and every layer counts the same. Layers that the
    forward never reaches contribute nothing.

    Use it as a context manager around one forward; `loss()` keeps the graph, and stays readable
    after the block. Leave the block before any layer fires again: a second forward replaces the
    statistics of the first.

    Args:
        model: a module with at least one BatchNorm layer that tracks running statistics. It should
            be in eval mode, or its running statistics move with the batch that is compared to them.
        reduce: sums a tensor over processes, with gradients: the statistics are then those of all
            processes' batches together, and every process must run the forward.

    Raises: as the package says, and ValueError without a BatchNorm layer, or for one without statistics.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(2)).eval()  # remembers mean 0, variance 1
        >>> with BatchNormStatistics(model) as statistics:
        ...     _ = model(torch.ones(3, 2, 4, 4))  # mean 1, variance 0 in both channels
        >>> statistics.loss()  # sqrt(2) + sqrt(2)
        tensor(2.8284)
    """

    @public
    def __init__(self, model: nn.Module, *, reduce: Reduce | None = None) -> None:
        _checks.module(model=model)
        _checks.callable_or_none(reduce=reduce)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
        if not layers:
            kind = type(model).__name__
            raise InvalidValue(f"expected `model` to have BatchNorm layers, got {kind} without any")
        if bare := [name for name, layer in layers.items() if layer.running_mean is None]:
            raise InvalidValue(f"expected `model` to track statistics, got none in {bare[0]!r}")
        self._model, self._layers, self._reduce = model, list(layers.values()), reduce
        self._seen: dict[nn.Module, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self._seen.clear()
        self._handles = [self._model.register_forward_pre_hook(self._restart)]
        self._handles += [layer.register_forward_pre_hook(self._compare) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _restart(self, module: nn.Module, inputs: Any) -> None:
        # A layer that this forward does not reach must not keep the statistics of the last one.
        self._seen.clear()

    def _compare(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        # Half precision has too few digits for a variance around a large mean.
        x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
        variance, mean = torch.var_mean(x, dim=[d for d in range(x.ndim) if d != 1], correction=0)
        if self._reduce is not None:
            variance, mean = _pooled(variance, mean, x.numel() // x.shape[1], self._reduce)
        norm = torch.linalg.vector_norm
        self._seen[layer] = norm(mean - layer.running_mean) + norm(variance - layer.running_var)

    @public
    def loss(self) -> Tensor:
        """$L_{bn}$ of the last forward inside the block, a scalar; RuntimeError if there was none."""
        if not self._seen:
            raise InvalidState(
                "expected a forward inside the `with` block, got none through a BatchNorm"
            )
        return torch.stack(list(self._seen.values())).sum()


def _pooled(variance: Tensor, mean: Tensor, count: int, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Biased variance and mean over all processes, from this one's and its number of values."""
    n = mean.new_full((1,), float(count))
    # One sum for both, since each is a message between processes.
    sums = reduce(torch.cat([n, n * mean]))
    common = sums[1:] / sums[0].detach()
    # Squares around the common mean: around 0, large means would cost the digits of the variance.
    squares = reduce(n * (variance + (mean - common).square()))
    return squares / sums[0].detach(), common


@public
def masked_distillation(logits: Tensor, reference_logits: Tensor) -> Tensor:
    r"""`distillation` where model and reference predict the same class, 0 elsewhere (CMI, Fast).

    $$\mathbb 1[\arg\max z = \arg\max z_{ref}] \, KL(p_{ref} \| p)$$

    The student's logits come first. In nats.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> masked_distillation(student, teacher)  # they disagree
        tensor([0.])
    """
    z, reference = _checks.logits(logits=logits, reference_logits=reference_logits)
    agree = z.argmax(dim=1) == reference.argmax(dim=1)
    # Where they disagree the divergence may be infinite, which times 0 is NaN.
    return _kernels.kl(reference, torch.where(agree[:, None], z, reference)) * agree


@public
def ferd_generator_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    targets: Tensor,
    nonrobust_logits: Tensor | None,
    batchnorm_loss: Tensor,
    *,
    adv_weight: float = 1.0,
    bn_weight: float = 5.0,
    onehot_weight: float = 1.0,
    uniformity_weight: float = 5.0,
    divergence: Callable[[Tensor, Tensor], Tensor] = distillation,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""FERD's generator objective (Eq. 8 and 9), to be minimised.

    $$L_{gen} = \lambda_{adv} L_{adv} + \lambda_{bn} L_{bn} + \lambda_{oh} L_{oh}
      + \lambda_{uni} L_{uni}$$

    with $L_{adv} = -KL(f^T \| f^S)$, the cross-entropy $L_{oh} = CE(f^T, y)$ and
    $L_{uni} = KL(U \| f^T_{l+}(Z_{nr}))$, each a mean over the batch. The paper prints $L_{adv}$ without
    its minus sign, and says that it encourages divergence; only with the sign does it.

    Args:
        teacher_logits, student_logits: $f^T(x)$ and $f^S(x)$.
        targets: the labels that the images were synthesised for.
        nonrobust_logits: those of `bottleneck.nonrobust_logits`; None leaves the part out.
        batchnorm_loss: the scalar of `BatchNormStatistics.loss`.
        adv_weight, bn_weight, onehot_weight, uniformity_weight: the four $\lambda \ge 0$.
        divergence: the distance that $L_{adv}$ grows, called as `divergence(student_logits,
            teacher_logits)`: `distillation`, `masked_distillation` or `decoupled_kl`.

    Returns:
        The weighted total, and the four unweighted parts by name: `adversarial` (at most 0 for a
        KL), `batchnorm`, `onehot`, `uniformity`. All are scalars with their graph.

    Example:
        >>> z, y = torch.zeros(3, 2), torch.tensor([0, 1, 1])
        >>> total, parts = ferd_generator_loss(z, z, y, z, torch.tensor(0.1))
        >>> total  # 5 * 0.1 + log 2
        tensor(1.1931)
    """
    given = {} if nonrobust_logits is None else {"nonrobust_logits": nonrobust_logits}
    teacher, student, *nonrobust = _checks.logits(
        teacher_logits=teacher_logits, student_logits=student_logits, **given
    )
    _checks.labels(targets=targets, like=teacher, num_classes=teacher.shape[1])
    _checks.scalar(batchnorm_loss=batchnorm_loss)
    _checks.real(0, adv_weight=adv_weight, bn_weight=bn_weight)
    _checks.real(0, onehot_weight=onehot_weight, uniformity_weight=uniformity_weight)
    _checks.callable_(divergence=divergence)
    uniform = _kernels.uniformity(nonrobust[0]).mean() if nonrobust else teacher.new_zeros(())
    parts = {
        # Minus, for the generator looks for images on which the student differs from its teacher.
        "adversarial": -divergence(student, teacher).mean(),
        "batchnorm": batchnorm_loss,
        "onehot": _kernels.cross_entropy(teacher, targets).mean(),
        "uniformity": uniform,
    }
    weights = (adv_weight, bn_weight, onehot_weight, uniformity_weight)
    weighted = [w * part for w, part in zip(weights, parts.values(), strict=True)]
    return torch.stack(weighted).sum(), parts


@public
def ferd_distillation_loss(
    student_clean: Tensor,
    student_adv: Tensor,
    teacher_clean: Tensor,
    *,
    clean_weight: float = 5 / 6,
    adv_weight: float = 1 / 6,
) -> Tensor:
    r"""FERD's distillation objective (Eq. 11) of each sample.

    $$\lambda_1 KL(f^T(x) \| f^S(x)) + \lambda_2 KL(f^T(x) \| f^S(x_U))$$

    The paper and its release weigh the clean term by 5/6; RSLAD, where the numbers come from, gives
    5/6 to the adversarial one. In nats; take the mean for Eq. 11.

    Args:
        teacher_clean: the teacher on the images; no gradient flows into it.
        clean_weight, adv_weight: $\lambda_1, \lambda_2 \ge 0$.

    Example:
        >>> teacher = torch.tensor([[3.0, 1.0]]).log()
        >>> ferd_distillation_loss(torch.zeros(1, 2), teacher, teacher)  # 5/6 * 0.1308
        tensor([0.1090])
    """
    clean, adv, teacher = _checks.logits(
        student_clean=student_clean, student_adv=student_adv, teacher_clean=teacher_clean
    )
    _checks.real(0, clean_weight=clean_weight, adv_weight=adv_weight)
    teacher = teacher.detach()
    return clean_weight * _kernels.kl(teacher, clean) + adv_weight * _kernels.kl(teacher, adv)
