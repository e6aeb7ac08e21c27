"""Progress bar of an evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from ferdlib.evaluation.samples import Block


class Progress:
    """A tqdm bar over the samples with the worst case so far, or nothing."""

    def __init__(self, samples: int | None, names: tuple[str, ...], shown: bool | str) -> None:
        self.names, self.figures, self.bar = names, "", None
        self.counts = torch.zeros(2, len(names), dtype=torch.int64, device="cpu")
        if shown:
            try:
                from tqdm.auto import tqdm
            except ImportError as error:
                raise ImportError(
                    "evaluate: expected tqdm for `progress`, got none; pip install tqdm"
                ) from error
            title = shown if isinstance(shown, str) else "evaluate"
            self.bar = tqdm(total=samples, unit="sample", desc=title)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()

    def say(self, text: str) -> None:
        """Show the attack that is running."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"{text}{self.figures}")

    def member(self, name: str, robust: Tensor) -> None:
        """Show a member of AutoAttack after each of its batches."""
        # Reading the flags would stall an accelerator for nothing without a bar.
        if self.bar is not None:
            self.say(f"{name}, {int(robust.sum())} of {len(robust)} left")

    def add(self, block: Block, robust: Tensor) -> None:
        """Count a finished block, and which of its samples withstood everything."""
        if self.bar is None:
            return
        targets = block.targets.cpu()
        self.counts[0] += torch.bincount(targets, minlength=len(self.names))
        self.counts[1] += torch.bincount(targets[robust], minlength=len(self.names))
        accuracy = self.counts[1].double() / self.counts[0]
        worst = int(accuracy.nan_to_num(nan=2.0).argmin())
        average, least = 100 * float(accuracy.nanmean()), 100 * float(accuracy[worst])
        figures = f"worst case {average:.1f} %, worst class {least:.1f} % ({self.names[worst]})"
        self.figures = f"; {figures}"
        self.bar.set_postfix_str(figures, refresh=False)
        self.bar.update(len(block))
