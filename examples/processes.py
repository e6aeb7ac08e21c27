"""The processes that `torchrun` starts: who this one is, and where it works."""

from __future__ import annotations

import atexit
import datetime
import os

import torch
from torch import distributed


def join(device: str) -> str:
    """Meet the other processes, if torchrun has started this one; the device of this one.

    NCCL on CUDA, gloo elsewhere. One that waits for another for ten minutes ends the job.
    """
    if "LOCAL_RANK" not in os.environ:
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    atexit.register(distributed.destroy_process_group)
    return device


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def any_of(flag: bool) -> bool:
    """Whether it is set on some process; all of them must ask."""
    if not distributed.is_initialized():
        return flag
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    asked = torch.tensor(int(flag), device=device)
    distributed.all_reduce(asked)
    return bool(asked)
