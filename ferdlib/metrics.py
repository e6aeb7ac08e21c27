"""Class-wise accuracy and fairness figures, from counts.

Accuracies are fractions in [0, 1], float `(..., K)` with one per class, `nan` for a class without samples.
The figures are taken over the last axis: float64 `(...)`, so that the resamples of a bootstrap need no loop. They
ignore an absent class, and are `nan` where no class has samples. All raise TypeError for another dtype, ValueError
for K < 2, another shape or values out of range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidType, public

__all__ = [
    "average",
    "class_accuracy",
    "confusion_matrix",
    "inheritance_ratio",
    "nsd",
    "target_entropy",
    "worst_class",
    "worst_fraction",
]


@public
def confusion_matrix(predictions: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Counts: row i, column j holds how many samples of class i were predicted as j.

    The matrices of several batches, or processes, add up.

    Args:
        predictions: int64 labels `(N,)` in `0..num_classes-1`.
        targets: int64 labels `(N,)`, the true ones.
        num_classes: K >= 2, declared, so that an absent class keeps its row and column.

    Returns:
        int64 `(K, K)`, on the device of the targets.

    Raises:
        TypeError: labels that are not int64; of logits, take `argmax(1)` first.
        ValueError: shapes that differ, or labels out of range (checked on every device).

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    _checks.integer(2, num_classes=num_classes)
    _checks.tensor(targets=targets, predictions=predictions)
    if predictions.is_floating_point():
        got = _checks.got(predictions)
        raise InvalidType(
            f"expected `predictions` in int64, got {got}; take argmax(1) of the logits"
        )
    # On the host, where the range can be read: a wrong pair of labels could count as a right one.
    true, predicted, k = targets.cpu(), predictions.cpu(), num_classes
    _checks.labels(num_classes=k, targets=true)
    _checks.labels(num_classes=k, like=true, predictions=predicted)
    counts = torch.bincount(true * k + predicted, minlength=k * k)
    return counts.reshape(k, k).to(targets.device)


@public
def class_accuracy(confusion: Tensor) -> Tensor:
    """Accuracy of each class, the diagonal over the row sums.

    Args:
        confusion: int64 counts `(..., K, K)`, rows true, columns predicted.

    Returns:
        float64 `(..., K)` in [0, 1]; `nan` for a class without samples.

    Example:
        >>> class_accuracy(torch.tensor([[3, 1], [0, 0]]))
        tensor([0.7500,    nan], dtype=torch.float64)
    """
    _checks.confusion(batched=True, confusion=confusion)
    # Floats, for sums of counts may leave int64.
    counts = _checks.double(confusion)
    return counts.diagonal(dim1=-2, dim2=-1) / counts.sum(dim=-1)


@public
def average(acc: Tensor) -> Tensor:
    """Macro mean, each present class counting the same however many samples it has.

    Example:
        >>> average(torch.tensor([0.5, 1.0, torch.nan]))
        tensor(0.7500, dtype=torch.float64)
    """
    return _accuracies(acc).nanmean(dim=-1)


@public
def worst_class(acc: Tensor) -> Tensor:
    """Accuracy of the worst present class.

    Example:
        >>> worst_class(torch.tensor([[0.5, 1.0, torch.nan], [0.7, 0.3, 0.9]]))
        tensor([0.5000, 0.3000], dtype=torch.float64)
    """
    a = _accuracies(acc)
    worst = a.nan_to_num(nan=math.inf).amin(dim=-1)
    return worst.masked_fill(worst.isinf(), math.nan)


@public
def worst_fraction(acc: Tensor, fraction: float = 0.1) -> Tensor:
    r"""Mean of the worst $\lceil \text{fraction} \cdot n \rceil$ of the n present classes.

    At the default 0.1 this is FERD's worst-10 % (Tables 2 and 5): a mean over classes, no quantile.
    With ten classes it is the worst class. The fraction is in (0, 1].

    Example:
        >>> worst_fraction(torch.tensor([0.9, 0.2, 0.4, 0.8]), 0.5)  # (0.2 + 0.4) / 2
        tensor(0.3000, dtype=torch.float64)
    """
    _checks.positive(fraction=fraction)
    _checks.real(0, 1, fraction=fraction)
    # Absent classes are last.
    a = _accuracies(acc).sort(dim=-1).values
    present = (~a.isnan()).sum(dim=-1, keepdim=True)
    # A product that should be whole may come out above: 0.07 * 100 = 7.000000000000001, not 8.
    count = (fraction * _checks.double(present) * (1 - 1e-12)).ceil()
    worst = torch.arange(a.shape[-1], device=a.device) < count
    return torch.where(worst, a, 0.0).sum(dim=-1) / count.squeeze(-1)


@public
def nsd(acc: Tensor, *, ddof: int = 0) -> Tensor:
    r"""Normalised standard deviation, $\mathrm{SD} / \mathrm{mean}$; the lower, the fairer.

    The measure of Fair-ARD (section 2.1) and FERD. Neither says which SD: `ddof=0` is the
    population's, numpy's default, and `ddof=1` the sample's, larger by $\sqrt{K / (K - 1)}$.
    It is at least 0, and `nan` also if every accuracy is 0, or if no more than `ddof` classes are
    present.

    Example:
        >>> nsd(torch.tensor([0.25, 0.75]))  # 0.25 / 0.5
        tensor(0.5000, dtype=torch.float64)
    """
    _checks.integer(0, ddof=ddof)
    a = _accuracies(acc)
    freedom = (~a.isnan()).sum(dim=-1) - ddof
    mean = a.nanmean(dim=-1)
    # torch's own std warns where there are no degrees of freedom.
    variance = (a - mean[..., None]).square().nansum(dim=-1) / freedom
    return torch.where(freedom > 0, variance, math.nan).sqrt() / mean


@public
def inheritance_ratio(student: Tensor, teacher: Tensor) -> Tensor:
    """Student / teacher, the share of its teacher's class robustness that a student has (Fair-ARD Table 1).

    Args:
        student: class accuracies `(..., K)`.
        teacher: those of the teacher under the same attack, of equal shape.

    Returns:
        float64 `(..., K)`, above 1 where the student is better. Where the teacher's accuracy is 0,
        `inf`, or `nan` if the student's is 0 too; `nan` where a class is absent from either.

    Example:
        >>> inheritance_ratio(torch.tensor([0.25, 0.6]), torch.tensor([0.5, 0.6]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    _checks.class_vector(0, 1, batched=True, student=student, teacher=teacher)
    _checks.alike(student=student, teacher=teacher)
    return _checks.double(student) / _checks.double(teacher)


@public
def target_entropy(confusion: Tensor) -> Tensor:
    r"""Entropy of each class's errors over the other classes, as a share of the largest possible.

    $$H_i = -\frac{1}{\log(K - 1)} \sum_{j \ne i} q_{ij} \log q_{ij}, \qquad
      q_{ij} = \frac{n_{ij}}{\sum_{j' \ne i} n_{ij'}}$$

    The bias that FERD's uniform targets are to remove (section 3.2), as one figure per class.

    Args:
        confusion: int64 counts `(..., K, K)`, rows true, columns predicted.

    Returns:
        float64 `(..., K)` in [0, 1] up to rounding: 0 if all errors of a class go to one other class,
        1 if they go to all others equally; `nan` for a class without errors, and for K = 2.

    Example:
        >>> target_entropy(torch.tensor([[5, 2, 2], [3, 6, 0], [0, 0, 9]]))
        tensor([1., 0., nan], dtype=torch.float64)
    """
    _checks.confusion(batched=True, confusion=confusion)
    k = confusion.shape[-1]
    hits = torch.eye(k, dtype=torch.bool, device=confusion.device)
    errors = _checks.double(confusion.masked_fill(hits, 0))
    q = errors / errors.sum(dim=-1, keepdim=True)
    return torch.xlogy(q, 1 / q).sum(dim=-1) / math.log(k - 1)


def _accuracies(acc: Tensor) -> Tensor:
    _checks.class_vector(0, 1, batched=True, acc=acc)
    return _checks.double(acc)
