"""Finished parts of an evaluation on disk: one small JSON file per attack and block, whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Any

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidValue
from ferdlib.checkpoints import write_file
from ferdlib.evaluation.attack import Outcome

FORMAT = 1
# Logits of another kernel or machine differ by rounding, those of another model by more.
TOLERANCE = 1e-3


class Records:
    """A folder of finished outcomes, made for one model, data set and protocol."""

    def __init__(self, path: str | os.PathLike[str], header: dict[str, Any]) -> None:
        self.folder = _checks.path("resume", path)
        # As it comes back from a file, tuples as lists.
        self.header = header = json.loads(json.dumps({"format": FORMAT, **header}))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(f"no permission to write in {str(self.folder)!r}")
        except OSError as error:
            wanted = "`resume` to be a folder that can be written"
            raise OSError(f"evaluate: expected {wanted}, got {error}") from error
        found = self._read("header.json")
        if found is not None and found != header:
            names = sorted(k for k in header.keys() | found.keys() if header.get(k) != found.get(k))
            raise self._other(", ".join(names), "another")

    def begin(self, logits: Tensor) -> None:
        """Refuse a model that gives the first samples other logits than the one that began."""
        if not (self.folder / "header.json").exists():
            self._write("header.json", self.header)
        # A function has no digest, and a model may have other code behind the same weights.
        values = logits.detach().double().cpu()
        found = self._read("probe.json")
        if found is None:
            self._write("probe.json", {"logits": values.tolist()})
            return
        before = torch.tensor(found["logits"], dtype=torch.float64)
        near = TOLERANCE * (1 + before.abs().max()) if before.numel() else 0
        if before.shape != values.shape or bool(((before - values).abs() > near).any()):
            raise self._other("model and data", "other logits for the first samples")

    def load(self, attack: str, number: int, digest: int) -> tuple[Outcome, float] | None:
        """Read an outcome and its seconds, if it was finished."""
        found = self._read(_file(attack, number))
        if found is None:
            return None
        if found["data"] != f"{digest:032x}":
            raise self._other("data", f"other samples in block {number}")
        predictions, fooled_at = (
            torch.tensor(found[name], dtype=torch.int64) for name in ("predictions", "fooled_at")
        )
        return Outcome(predictions, fooled_at, tuple(found["stages"])), found["seconds"]

    def save(self, attack: str, number: int, digest: int, outcome: Outcome, seconds: float) -> None:
        """Write an outcome and its seconds."""
        content = {
            "data": f"{digest:032x}",
            "attack": attack,
            "predictions": outcome.predictions.tolist(),
            "fooled_at": outcome.fooled_at.tolist(),
            "stages": list(outcome.stages),
            "seconds": seconds,
        }
        self._write(_file(attack, number), content)

    def _other(self, wanted: str, came: str) -> InvalidValue:
        begun = f"that `resume` {str(self.folder)!r} was begun with"
        return InvalidValue(f"expected the {wanted} {begun}, got {came}; give another folder")

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            content: dict[str, Any] = json.loads(path.read_text("utf-8"))
            sealed = content.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError):
            content, sealed = {}, None
        # A file that was edited or cut short may still be valid JSON.
        if sealed != _seal(content):
            remedy = "delete that file and its part is computed again"
            came = f"a damaged {str(path)!r}"
            raise InvalidValue(f"expected `resume` to hold complete files, got {came}; {remedy}")
        return content

    def _write(self, name: str, content: dict[str, Any]) -> None:
        path = self.folder / name
        try:
            write_file(path, json.dumps({**content, "sha256": _seal(content)}))
        except OSError as error:
            raise OSError(f"evaluate: expected to write {str(path)!r}, got {error}") from error


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file(attack: str, number: int) -> str:
    """Name of a file: that of the attack made safe, told apart by a digest of the real one."""
    safe = re.sub(r"[^A-Za-z0-9-]", "_", attack)[:40]
    mark = hashlib.blake2b(attack.encode(), digest_size=4).hexdigest()
    return f"{safe}-{mark}-{number:06d}.json"
