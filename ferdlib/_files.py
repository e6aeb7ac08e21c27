"""Files of `torch.save`: read without running anything in them, and compared with their checksums."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch


def read_plain(path: str | Path, *, mmap: bool = False) -> Any:
    """Read tensors and plain values, on the CPU; `mmap` leaves the numbers on the disk.

    Raises:
        Exception: of a type that depends on what is wrong with the file.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch can leave the checksums out, and never looks at them: a flipped bit would be another number.
            there = any(record.CRC for record in archive.infolist())
            damaged = archive.testzip() if there else None
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged!r}")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
