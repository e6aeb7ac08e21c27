"""One report from the processes of `torch.distributed`, each of which has evaluated its share."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch import distributed
from torch.utils.data import Dataset, Subset

from ferdlib import _oldchecks as _checks
from ferdlib.evaluation.compare import merge
from ferdlib.evaluation.report import RobustnessReport


def gather(report: RobustnessReport) -> RobustnessReport:
    """The report of all processes' samples, on each of them; every process must call it.

    Counts are exact integers whatever the number of processes. AutoAttack's noise depends on its batches, and so
    on how the data were shared out.

    Args:
        report: of this process's share of one data set, such as `share(data)`.

    Returns:
        `merge` of all shares; the report itself without `torch.distributed`.

    Raises:
        TypeError, ValueError: what is no report, or as `merge`.

    Example:
        >>> import torch
        >>> from ferdlib.evaluation import evaluate
        >>> def dark(x):
        ...     return torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], dim=1)
        >>> data = torch.utils.data.TensorDataset(torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))
        >>> len(gather(evaluate(dark, share(data), "quick", num_classes=2)))
        4
    """
    if not isinstance(report, RobustnessReport):
        raise TypeError(
            f"gather: expected `report` to be a RobustnessReport, got {_checks.got(report)}"
        )
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return report
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, report.to_dict())
    return merge([RobustnessReport.from_dict(part) for part in parts])


def share(data: Dataset[Any]) -> Dataset[Any]:
    """Every n-th sample from this process's rank on, of n processes; all of them without `torch.distributed`.

    Raises:
        TypeError: what is no data set of known length.

    Example:
        >>> import torch
        >>> len(share(torch.utils.data.TensorDataset(torch.rand(4, 1))))
        4
    """
    if not isinstance(data, Dataset) or not isinstance(data, Sized):
        raise TypeError(
            f"share: expected `data` to be a Dataset with a length, got {_checks.got(data)}"
        )
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return data
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return Subset(data, range(rank, len(data), size))
