"""Class-wise accuracy and fairness figures, from counts.

Accuracies are fractions in [0, 1], one per class, `nan` for a class without samples. The figures
ignore such a class, are float64, and are `nan` themselves where no class has samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ferdlib import _oldchecks as _checks

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
        TypeError: labels that are not int64; for logits, take `argmax(1)` first.
        ValueError: shapes that differ, or labels out of range (checked on every device).

    Example:
        >>> import torch
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    name = "confusion_matrix"
    k = _checks.integer(name, "num_classes", num_classes, low=2)
    if isinstance(predictions, Tensor) and predictions.is_floating_point():
        raise TypeError(
            f"{name}: expected `predictions` as int64 labels, got {_checks.got(predictions)}; "
            f"take argmax(1) of the logits"
        )
    # On the host, where the range can be read: a wrong pair of labels could count as a right one.
    true = _checks.labels(name, _checks.tensor(name, "targets", targets).cpu(), num_classes=k)
    predicted = _checks.labels(
        name,
        _checks.tensor(name, "predictions", predictions).cpu(),
        length=len(true),
        num_classes=k,
        argument="predictions",
    )
    counts = torch.bincount(true * k + predicted, minlength=k * k)
    return counts.reshape(k, k).to(targets.device)


def class_accuracy(confusion: Tensor) -> Tensor:
    """Accuracy of each class, the diagonal over the row sums.

    Args:
        confusion: int64 counts `(K, K)`, rows true, columns predicted.

    Returns:
        float64 `(K,)` in [0, 1]; `nan` for a class without samples.

    Raises:
        TypeError: counts that are not int64.
        ValueError: a matrix that is not square with K >= 2, or negative counts.

    Example:
        >>> import torch
        >>> class_accuracy(torch.tensor([[3, 1], [0, 0]]))
        tensor([0.7500,    nan], dtype=torch.float64)
    """
    counts = _counts("class_accuracy", confusion)
    return counts.diagonal().double() / counts.sum(dim=1)


def average(acc: Tensor) -> Tensor:
    """Macro mean, each present class counting the same however many samples it has.

    Args:
        acc: class accuracies `(K,)` in [0, 1], `nan` for an absent class.

    Returns:
        0-dim float64; `nan` if all classes are absent.

    Raises:
        TypeError: a dtype that is not float.
        ValueError: a shape that is not `(K,)` with K >= 2, or values outside [0, 1].

    Example:
        >>> import torch
        >>> average(torch.tensor([0.5, 1.0, torch.nan]))
        tensor(0.7500, dtype=torch.float64)
    """
    return _accuracies("average", acc).nanmean()


def worst_class(acc: Tensor) -> Tensor:
    """Accuracy of the worst present class.

    Args, Returns, Raises: as for `average`.

    Example:
        >>> import torch
        >>> worst_class(torch.tensor([0.5, 1.0, torch.nan]))
        tensor(0.5000, dtype=torch.float64)
    """
    a = _accuracies("worst_class", acc)
    return torch.where(a.isnan().all(), math.nan, a.nan_to_num(nan=math.inf).min())


def worst_fraction(acc: Tensor, fraction: float = 0.1) -> Tensor:
    r"""Mean of the worst $\lceil \text{fraction} \cdot n \rceil$ of the n present classes.

    At the default 0.1 this is FERD's worst-10 % (Tables 1 and 5): a mean over classes, no quantile.
    With ten classes it is the worst class.

    Args, Returns, Raises: as for `average`; the fraction is in (0, 1].

    Example:
        >>> import torch
        >>> worst_fraction(torch.tensor([0.9, 0.2, 0.4, 0.8]), 0.5)  # (0.2 + 0.4) / 2
        tensor(0.3000, dtype=torch.float64)
    """
    a = _accuracies("worst_fraction", acc)
    share = _checks.number("worst_fraction", "fraction", fraction, low=0, high=1, open_low=True)
    present = a[~a.isnan()].sort().values
    # A product that should be whole may come out above: 0.07 * 100 = 7.000000000000001, not 8.
    return present[: math.ceil(share * len(present) * (1 - 1e-12))].mean()


def nsd(acc: Tensor, *, ddof: int = 0) -> Tensor:
    r"""Normalised standard deviation, $\mathrm{SD} / \mathrm{mean}$; the lower, the fairer.

    The measure of Fair-ARD (section 2.1) and FERD. Neither says which SD: `ddof=0` is the
    population's, numpy's default, and `ddof=1` the sample's, larger by $\sqrt{K / (K - 1)}$.

    Args, Returns, Raises: as for `average`; `ddof` is an int >= 0. The result is at least 0, and
    `nan` also if every accuracy is 0, or if no more than `ddof` classes are present.

    Example:
        >>> import torch
        >>> nsd(torch.tensor([0.25, 0.75]))  # 0.25 / 0.5
        tensor(0.5000, dtype=torch.float64)
    """
    a = _accuracies("nsd", acc)
    freedom = (~a.isnan()).sum() - _checks.integer("nsd", "ddof", ddof, low=0)
    mean = a.nanmean()
    # torch's own std warns where there are no degrees of freedom.
    variance = (a - mean).square().nansum() / freedom
    return torch.where(freedom > 0, variance, math.nan).sqrt() / mean


def inheritance_ratio(student: Tensor, teacher: Tensor) -> Tensor:
    """Student / teacher, what a student has of its teacher's class robustness (Fair-ARD Table 1).

    Args:
        student: class accuracies `(K,)` in [0, 1], `nan` for an absent class.
        teacher: the same of the teacher, under the same attack.

    Returns:
        float64 `(K,)`, above 1 where the student is better. Where the teacher's accuracy is 0,
        `inf`, or `nan` if the student's is 0 too; `nan` where a class is absent from either.

    Raises: as for `average`, and ValueError for shapes that differ.

    Example:
        >>> import torch
        >>> inheritance_ratio(torch.tensor([0.25, 0.6]), torch.tensor([0.5, 0.6]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    name = "inheritance_ratio"
    s = _accuracies(name, student, argument="student")
    t = _accuracies(name, teacher, argument="teacher")
    _checks.alike(name, student=s, teacher=t)
    return s / t


def target_entropy(confusion: Tensor) -> Tensor:
    r"""How evenly the errors of each class spread over the other classes.

    $$H_i = -\frac{1}{\log(K - 1)} \sum_{j \ne i} q_{ij} \log q_{ij}, \qquad
      q_{ij} = \frac{n_{ij}}{\sum_{j' \ne i} n_{ij'}}$$

    The bias that FERD's uniform targets are to remove (section 3.2), as one figure per class.

    Args:
        confusion: int64 counts `(K, K)`, rows true, columns predicted.

    Returns:
        float64 `(K,)` in [0, 1] up to rounding: 0 if all errors of a class go to one other class,
        1 if they go to all others equally; `nan` for a class without errors, and for K = 2.

    Raises: as for `class_accuracy`.

    Example:
        >>> import torch
        >>> target_entropy(torch.tensor([[5, 2, 2], [3, 6, 0], [0, 0, 9]]))
        tensor([1., 0., nan], dtype=torch.float64)
    """
    errors = _counts("target_entropy", confusion).clone().fill_diagonal_(0).double()
    q = errors / errors.sum(dim=1, keepdim=True)
    return torch.xlogy(q, 1 / q).sum(dim=1) / math.log(len(q) - 1)


def _counts(function: str, confusion: Tensor) -> Tensor:
    _checks.tensor(function, "confusion", confusion)
    if confusion.dtype != torch.int64:
        raise TypeError(
            f"{function}: expected `confusion` as int64 counts, got {_checks.got(confusion)}"
        )
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1] or len(confusion) < 2:
        raise ValueError(
            f"{function}: expected `confusion` of shape (K, K) with K >= 2, got "
            f"{tuple(confusion.shape)}"
        )
    if bool((confusion < 0).any()):
        raise ValueError(
            f"{function}: expected non-negative counts in `confusion`, got {confusion.min()}"
        )
    return confusion


def _accuracies(function: str, value: Tensor, *, argument: str = "acc") -> Tensor:
    a = _checks.class_vector(function, value, argument=argument).double()
    outside = a[(a < 0) | (a > 1)]
    if len(outside):
        raise ValueError(
            f"{function}: expected `{argument}` in [0, 1] (or nan), got {outside[0]:g}; "
            f"divide percentages by 100"
        )
    return a
