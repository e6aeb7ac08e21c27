"""The processes that `torchrun` starts: who this one is, and where it works."""

from __future__ import annotations

import atexit
import datetime
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn


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
    return rank() == 0


def alone(script: str) -> None:
    """End where torchrun has started several and the script is for one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit(
            f"{script}: expected a single process, got torchrun's {os.environ['WORLD_SIZE']}; ard.py, "
            "cifar10_ferd.py and evaluate.py run on several"
        )


@contextmanager
def first_ahead(fetching: bool) -> Iterator[None]:
    """What the first process fetches within is there for the others, which wait."""
    waiting = fetching and count() > 1
    if waiting and not first():
        distributed.barrier()
    yield
    if waiting and first():
        distributed.barrier()


def count() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def part(rows: Tensor) -> Tensor:
    """Every so-manieth row: those of this process."""
    return rows[rank() :: count()]


def any_of(flag: bool) -> bool:
    """Whether it is set on some process; all of them must ask."""
    if not distributed.is_initialized():
        return flag
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    return bool(mean(torch.tensor(float(flag), device=device)))


def mean(value: Tensor) -> Tensor:
    """Over the processes; all of them must ask."""
    if count() == 1:
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / count()


def parallel(model: nn.Module) -> nn.Module:
    """The model, or one whose gradients are means over processes.

    Its BatchNorm layers become SyncBatchNorm on CUDA; on a CPU each process normalises by its own images, see
    `average_buffers`.
    """
    if count() == 1:
        return model
    device = next(model.parameters()).device
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    engine, settings = nn.parallel.DistributedDataParallel, {}
    # Buffers that come from another process at each forward would overwrite what a backward reads.
    new = "forward_sync_buffers" in inspect.signature(engine).parameters
    settings["forward_sync_buffers" if new else "broadcast_buffers"] = False
    return engine(model, device_ids=[device] if device.type == "cuda" else None, **settings)


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """What each process's BatchNorm has seen becomes the mean over them."""
    for buffer in model.buffers() if count() > 1 else ():
        if buffer.is_floating_point():
            buffer.copy_(mean(buffer))
