"""Run a function on several gloo processes and bring back what each returns."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

# Importing torch takes longer than most of the work: one server imports it, and each process is a fork of that.
multiprocessing.set_forkserver_preload(["torch", "ferdlib.trainer.trainer", "ferdlib.methods"])


def on_ranks(size: int, work: Callable[..., Any], *args: Any, timeout: float = 180) -> list[Any]:
    """`work(rank, size, *args)` on each; results must be what `torch.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _enter, (size, folder, work, args, timeout), nprocs=size, start_method="forkserver"
        )
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(size)]


def _enter(
    rank: int,
    size: int,
    folder: str,
    work: Callable[..., Any],
    args: tuple[Any, ...],
    timeout: float,
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # no need of a name service
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        torch.save(work(rank, size, *args), Path(folder, f"{rank}.pt"))
    finally:
        distributed.destroy_process_group()
