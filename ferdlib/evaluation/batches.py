"""How many samples go through the model at once: as many as are fastest, fewer where memory ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ferdlib.evaluation.data import Block

SIZES = (16, 32, 64, 128, 256, 512, 1024)  # tried in turn
GAIN = 1.05  # one that is not so much faster than that before is the last

T = TypeVar("T")
log = logging.getLogger("ferdlib")


class Batches:
    """Samples at a time: `size` of them, or with `search` the fastest number up to it."""

    def __init__(self, function: str, size: int, *, search: bool = False) -> None:
        self.function, self.size, self.search = function, size, search

    def settle(self, logits: Callable[[Tensor], Tensor], x: Tensor) -> None:
        """End the search: which of 16, 32, 64, ... images are the most per second in an attack's step?"""
        if not self.search:
            return
        most = min(self.size, len(x))
        sizes = [*(size for size in SIZES if size < most), most]
        self.size, self.search, fastest = sizes[0], False, 0.0
        for size in sizes:
            try:
                speed = size / _seconds(logits, x[:size])
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                break
            if speed > fastest:
                self.size = size
            if speed < GAIN * fastest:
                break
            fastest = speed
        log.info("%s: %d samples at a time, found by timing", self.function, self.size)

    def over(self, block: Block, work: Callable[[Block], T]) -> list[T]:
        """What `work` makes of one batch after another; one that memory cannot hold is halved."""
        done, results = 0, []
        while done < len(block):
            batch = block[done : done + self.size]
            try:
                results.append(work(batch))
                done += len(batch)
            except RuntimeError as error:
                if len(batch) == 1 or not _out_of_memory(error):
                    raise
                self.size = len(batch) // 2
                log.warning(
                    "%s: out of memory with %d samples at a time; going on with %d",
                    self.function,
                    len(batch),
                    self.size,
                )
        return results


def _seconds(logits: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Of a forward and an input gradient: the fewest of three, after one that warms up."""
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            total = logits(leaf).sum()
        if total.requires_grad:  # a custom attack may do without
            torch.autograd.grad(total, leaf, allow_unused=True)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])  # the machine may be busy with other things


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
