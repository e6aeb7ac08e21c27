"""What a long evaluation says of itself on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from ferdlib.evaluation.data import Block


class Progress:
    """A tqdm bar over the samples with the worst case so far, or nothing."""

    def __init__(
        self, function: str, samples: int | None, names: tuple[str, ...], shown: bool | str
    ) -> None:
        self.names = names
        self.counts = torch.zeros(2, len(names), dtype=torch.int64)
        self.figures = ""
        self.bar = None
        if shown:
            try:
                from tqdm import tqdm
            except ImportError as error:
                raise ImportError(
                    f"{function}: expected tqdm for `progress`, got none; pip install tqdm"
                ) from error
            self.bar = tqdm(
                total=samples, unit="sample", desc=shown if isinstance(shown, str) else function
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, what: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"{what}{self.figures}")

    def member(self, name: str, robust: Tensor) -> None:
        """AutoAttack's word after each of its batches."""
        if self.bar is not None:
            self.say(f"{name}, {int(robust.sum())} of {len(robust)} left")

    def add(self, block: Block, robust: Tensor) -> None:
        """A finished block, and which of its samples withstood everything."""
        if self.bar is None:
            return
        targets = block.targets.cpu()
        self.counts[0] += torch.bincount(targets, minlength=len(self.names))
        self.counts[1] += torch.bincount(targets[robust], minlength=len(self.names))
        accuracy = self.counts[1].double() / self.counts[0]
        worst = int(accuracy.nan_to_num(nan=2.0).argmin())
        self.figures = (
            f"; worst case {100 * float(accuracy.nanmean()):.1f} %, worst class "
            f"{100 * float(accuracy[worst]):.1f} % ({self.names[worst]})"
        )
        self.bar.set_postfix_str(self.figures.removeprefix("; "), refresh=False)
        self.bar.update(len(block))
