"""What an evaluation has finished, on disk: one small JSON file per attack and block, whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Any

import torch
from torch import Tensor, nn

from ferdlib import _oldchecks as _checks
from ferdlib.evaluation.outcome import Outcome

FORMAT = 1
# Logits of another kernel or machine differ by rounding, those of another model by more.
TOLERANCE = 1e-3


def fingerprint(model: object) -> str | None:
    """SHA-256 of a module's kinds of layers, parameters and buffers; None for another callable."""
    if not isinstance(model, nn.Module):
        return None
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__}\n".encode())
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()


class Records:
    """A folder of finished outcomes, made for one model, data set and protocol."""

    def __init__(self, function: str, path: str | os.PathLike[str], header: dict[str, Any]) -> None:
        self.function, self.folder = function, _checks.path(function, "resume", path)
        self.header = header = json.loads(json.dumps({"format": FORMAT, **header}))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(f"no permission to write in {str(self.folder)!r}")
        except OSError as error:
            raise OSError(
                f"{function}: expected `resume` to be a folder that can be written, got {error}"
            ) from error
        found = self._read("header.json")
        if found is not None and found != header:
            names = sorted(k for k in header.keys() | found.keys() if header.get(k) != found.get(k))
            raise ValueError(
                f"{function}: expected the {', '.join(names)} that `resume` {str(self.folder)!r} was begun "
                f"with, got another; give another folder"
            )

    def begin(self, logits: Tensor) -> None:
        """Refuse a model that gives the first samples other logits than the one that began."""
        if not (self.folder / "header.json").exists():
            self._write("header.json", self.header)
        found = self._read("probe.json")
        values = logits.detach().double().cpu()
        if found is None:
            self._write("probe.json", {"logits": values.tolist()})
            return
        before = torch.tensor(found["logits"], dtype=torch.float64)
        scale = 1 + before.abs().max() if before.numel() else 1
        if before.shape != values.shape or not bool(
            ((before - values).abs() <= TOLERANCE * scale).all()
        ):
            raise ValueError(
                f"{self.function}: expected the model and data that `resume` {str(self.folder)!r} was begun "
                f"with, got other logits for the first samples; give another folder"
            )

    def load(self, attack: str, number: int, digest: int) -> tuple[Outcome, float] | None:
        """An outcome and its seconds, if it was finished."""
        name = _file(attack, number)
        found = self._read(name)
        if found is None:
            return None
        if found["data"] != f"{digest:032x}":
            raise ValueError(
                f"{self.function}: expected the data that `resume` {str(self.folder)!r} was begun with, got "
                f"other samples in block {number}; give another folder"
            )
        return (
            Outcome(
                torch.tensor(found["predictions"], dtype=torch.int64),
                torch.tensor(found["fooled_at"], dtype=torch.int64),
                tuple(found["stages"]),
            ),
            found["seconds"],
        )

    def save(self, attack: str, number: int, digest: int, outcome: Outcome, seconds: float) -> None:
        content = {
            "data": f"{digest:032x}",
            "attack": attack,
            "predictions": outcome.predictions.tolist(),
            "fooled_at": outcome.fooled_at.tolist(),
            "stages": list(outcome.stages),
            "seconds": seconds,
        }
        self._write(_file(attack, number), content)

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text("utf-8"))
            sealed = content.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError):
            content, sealed = {}, None
        if sealed != _seal(content):
            raise ValueError(
                f"{self.function}: expected `resume` to hold complete files, got a damaged {str(path)!r}; "
                f"delete that file and its part is computed again"
            )
        return content  # type: ignore[no-any-return]

    def _write(self, name: str, content: dict[str, Any]) -> None:
        """Whatever happens on the way, the file is whole or not there."""
        path = self.folder / name
        partial = path.with_name(f"{name}.partial")
        text = json.dumps({**content, "sha256": _seal(content)})
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            raise OSError(
                f"{self.function}: expected to write {str(path)!r}, got {error}"
            ) from error


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file(attack: str, number: int) -> str:
    """A file's name: that of the attack made safe, told apart by a digest of the real one."""
    safe = re.sub(r"[^A-Za-z0-9-]", "_", attack)[:40]
    mark = hashlib.blake2b(attack.encode(), digest_size=4).hexdigest()
    return f"{safe}-{mark}-{number:06d}.json"
