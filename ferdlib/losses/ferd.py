"""The losses of FERD: BatchNorm statistics (Eq. 8), generator (Eq. 9), distillation (Eq. 11)."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ferdlib import _oldchecks as _checks
from ferdlib._ranks import sum_over_ranks
from ferdlib.losses.basic import cross_entropy, distillation, labels_of, uniformity


class BatchNormStatistics:
    r"""How far a batch is from what a model's BatchNorm layers remember (FERD Eq. 8, $L_{bn}$).

    $$L_{bn} = \sum_l \|\mu_l(x) - \mu_l\|_2 + \|\sigma^2_l(x) - \sigma^2_l\|_2$$

    The batch mean and the *biased* batch variance of each layer's input, per channel, against its
    running statistics; the norms are not squared, and every layer counts the same. Layers that the
    forward never reaches contribute nothing.

    Use it as a context manager around one forward; `loss()` keeps the graph, and stays readable
    after the block. Leave the block before any layer fires again: a second forward replaces what the
    first one left.

    Args:
        model: a module with at least one BatchNorm layer that tracks running statistics. It should
            be in eval mode, or its running statistics move with the batch that is compared to them.
        across_ranks: take the statistics of the batches of all processes of `torch.distributed` together.
            Every process must run the forward. Gradients are those of a loss that each process adds to a sum, as
            DistributedDataParallel's mean of gradients wants it.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no BatchNorm layer, or one without running statistics (it is named).

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.BatchNorm2d(2)).eval()  # remembers mean 0, variance 1
        >>> with BatchNormStatistics(model) as statistics:
        ...     _ = model(torch.ones(3, 2, 4, 4))  # mean 1, variance 0 in both channels
        >>> statistics.loss()  # sqrt(2) + sqrt(2)
        tensor(2.8284)
    """

    def __init__(self, model: nn.Module, *, across_ranks: bool = False) -> None:
        _checks.module("BatchNormStatistics", "model", model)
        self._model = model
        self._across_ranks = across_ranks
        self._layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        if not self._layers:
            raise ValueError(
                "BatchNormStatistics: expected `model` to have BatchNorm layers, got "
                f"{type(model).__name__} without any"
            )
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                raise ValueError(
                    f"BatchNormStatistics: expected `model` to track running statistics, got layer "
                    f"{name!r} with track_running_stats=False"
                )
        self._seen: dict[_BatchNorm, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self._seen.clear()
        self._handles = [self._model.register_forward_pre_hook(self._restart)]
        self._handles += [layer.register_forward_pre_hook(self._compare) for layer in self._layers]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _restart(self, module: nn.Module, inputs: Any) -> None:
        self._seen.clear()

    def _compare(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
        reduced = [d for d in range(x.ndim) if d != 1]
        variance, mean = torch.var_mean(x, dim=reduced, correction=0)
        if self._across_ranks:
            variance, mean = _of_all_ranks(variance, mean, x.numel() // x.shape[1])
        self._seen[layer] = torch.linalg.vector_norm(
            mean - layer.running_mean
        ) + torch.linalg.vector_norm(variance - layer.running_var)

    def loss(self) -> Tensor:
        """$L_{bn}$ of the last forward inside the block, a scalar with its graph.

        Raises:
            RuntimeError: no BatchNorm layer has fired inside the block.
        """
        if not self._seen:
            raise RuntimeError(
                "BatchNormStatistics.loss: expected a forward of the model inside the `with` block, "
                "got none that reached a BatchNorm layer"
            )
        return torch.stack(list(self._seen.values())).sum()


def _of_all_ranks(variance: Tensor, mean: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Biased variance and mean of the samples of all processes, from each one's own and their number."""
    n = torch.full((1,), float(count), dtype=mean.dtype, device=mean.device)
    sums = sum_over_ranks(torch.cat([n, n * mean]))
    common = sums[1:] / sums[0].detach()
    # Squares around the common mean, of which few digits are lost.
    squares = sum_over_ranks(n * (variance + (mean - common).square()))
    return squares / sums[0].detach(), common


def masked_distillation(logits: Tensor, reference_logits: Tensor) -> Tensor:
    r"""`distillation` where model and reference predict the same class, 0 elsewhere (CMI, Fast).

    $$\mathbb 1[\arg\max z = \arg\max z_{ref}] \, KL(p_{ref} \| p)$$

    Args:
        logits: `(N, K)`, the student's.
        reference_logits: `(N, K)`, the teacher's.

    Returns:
        `(N,)`, in nats, at least 0 up to rounding.

    Raises:
        TypeError: logits that are not float.
        ValueError: shapes that differ.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> masked_distillation(student, teacher)  # they disagree
        tensor([0.])
    """
    name = "masked_distillation"
    z = _checks.logits(name, logits)
    reference = _checks.logits(name, reference_logits, argument="reference_logits")
    _checks.alike(name, logits=z, reference_logits=reference)
    agree = z.argmax(dim=1) == reference.argmax(dim=1)
    return distillation(z, reference) * agree


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
        teacher_logits: `(N, K)`, $f^T(x)$.
        student_logits: `(N, K)`, $f^S(x)$.
        targets: int64 labels `(N,)` that the images were synthesised for.
        nonrobust_logits: `(N, K)` from `bottleneck.nonrobust_logits`; None leaves the part out.
        batchnorm_loss: the scalar of `BatchNormStatistics.loss`.
        adv_weight, bn_weight, onehot_weight, uniformity_weight: the four $\lambda \ge 0$.
        divergence: what $L_{adv}$ grows, called as `divergence(student_logits, teacher_logits)`:
            `distillation`, `masked_distillation` or `decoupled_kl`.

    Returns:
        The weighted total, and the four unweighted parts by name: `adversarial` (at most 0 for a
        KL), `batchnorm`, `onehot`, `uniformity`. All are scalars with their graph.

    Raises:
        TypeError: logits that are not float, labels that are not int64.
        ValueError: wrong shapes, labels out of range, or a negative weight.

    Example:
        >>> import torch
        >>> z, y = torch.zeros(3, 2), torch.tensor([0, 1, 1])
        >>> total, parts = ferd_generator_loss(z, z, y, z, torch.tensor(0.1))
        >>> total  # 5 * 0.1 + log 2
        tensor(1.1931)
    """
    name = "ferd_generator_loss"
    weights = {
        "adversarial": _checks.number(name, "adv_weight", adv_weight, low=0.0),
        "batchnorm": _checks.number(name, "bn_weight", bn_weight, low=0.0),
        "onehot": _checks.number(name, "onehot_weight", onehot_weight, low=0.0),
        "uniformity": _checks.number(name, "uniformity_weight", uniformity_weight, low=0.0),
    }
    teacher = _checks.logits(name, teacher_logits, argument="teacher_logits")
    student = _checks.logits(name, student_logits, argument="student_logits")
    _checks.alike(name, teacher_logits=teacher, student_logits=student)
    labels_of(name, targets, teacher)
    _checks.callable_(name, "divergence", divergence)
    if _checks.floating(name, "batchnorm_loss", batchnorm_loss).ndim != 0:
        raise ValueError(
            f"{name}: expected `batchnorm_loss` to be a scalar tensor, got shape "
            f"{tuple(batchnorm_loss.shape)}"
        )
    parts = {
        "adversarial": -divergence(student, teacher).mean(),
        "batchnorm": batchnorm_loss,
        "onehot": cross_entropy(teacher, targets).mean(),
        "uniformity": teacher.new_zeros(()),
    }
    if nonrobust_logits is not None:
        nonrobust = _checks.logits(name, nonrobust_logits, argument="nonrobust_logits")
        _checks.alike(name, teacher_logits=teacher, nonrobust_logits=nonrobust)
        parts["uniformity"] = uniformity(nonrobust).mean()
    total = torch.stack([weights[key] * part for key, part in parts.items()]).sum()
    return total, parts


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
    5/6 to the adversarial one.

    Args:
        student_clean: `(N, K)`, the student on the images.
        student_adv: `(N, K)`, the student on their adversarial examples.
        teacher_clean: `(N, K)`, the teacher on the images; no gradient flows into it.
        clean_weight: $\lambda_1 \ge 0$.
        adv_weight: $\lambda_2 \ge 0$.

    Returns:
        `(N,)`, in nats; take the mean for Eq. 11.

    Raises:
        TypeError: logits that are not float.
        ValueError: shapes that differ, or a negative weight.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[1.0986, 0.0]])
        >>> ferd_distillation_loss(torch.zeros(1, 2), teacher, teacher)  # 5/6 * 0.1308
        tensor([0.1090])
    """
    name = "ferd_distillation_loss"
    clean = _checks.number(name, "clean_weight", clean_weight, low=0.0)
    adversarial = _checks.number(name, "adv_weight", adv_weight, low=0.0)
    named = {
        "student_clean": _checks.logits(name, student_clean, argument="student_clean"),
        "student_adv": _checks.logits(name, student_adv, argument="student_adv"),
        "teacher_clean": _checks.logits(name, teacher_clean, argument="teacher_clean").detach(),
    }
    _checks.alike(name, **named)
    teacher = named["teacher_clean"]
    return clean * distillation(named["student_clean"], teacher) + adversarial * distillation(
        named["student_adv"], teacher
    )
