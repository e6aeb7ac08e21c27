"""Finished parts of an evaluation on disk: one small JSON file per attack and block, whole or absent."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidValue
from ferdlib.checkpoints import remove_abandoned, write_file
from ferdlib.evaluation.attack import Outcome, Setting, custom_images
from ferdlib.evaluation.protocols import Protocol
from ferdlib.evaluation.samples import Block, uniform_noise

FORMAT = 2
# Samples at which one model or attack is told from another.
PROBE = 8
# Logits of another kernel or machine differ by rounding, those of another model by more.
TOLERANCE = 1e-3
# A gradient also jumps where rounding takes a unit over its kink.
GRADIENT_TOLERANCE = 0.1

Look = dict[str, Tensor]


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
        remove_abandoned(self.folder, "*")
        found = self._read("header.json")
        if found is not None and found != header:
            names = sorted(k for k in header.keys() | found.keys() if header.get(k) != found.get(k))
            raise self._other(", ".join(names), "another")

    def begin(self, look: Callable[[], Look]) -> None:
        """Refuse a model or an attack that does other things to the first samples than the one that began.

        A function has no digest, and a model may have other code behind the same weights.
        """
        values = look()
        if not (self.folder / "header.json").exists():
            self._write("header.json", self.header)
        found = self._read("probe.json")
        if found is None:
            again = look()
            # Numbers that are others at the second look are random; they tell nothing.
            kept = {k: _rows(v) if _alike(k, v, again[k]) else None for k, v in values.items()}
            self._write("probe.json", kept)
            return
        for name, value in values.items():
            before = found.get(name)
            if before is None or _alike(name, _numbers(before).to(value.dtype), value):
                continue
            wanted = {"logits": "model and data", "gradients": "model"}.get(name, name)
            came = name if name in ("logits", "gradients") else "results"
            raise self._other(wanted, f"other {came} for the first samples")

    def load(self, attack: str, number: int, digest: int) -> tuple[Outcome, float] | None:
        """Read an outcome and its seconds, if it was finished."""
        found = self._read(_file(attack, number))
        if found is None:
            return None
        if found["data"] != f"{digest:032x}":
            raise self._other("data", f"other samples in block {number}")
        predictions, fooled_at = (
            torch.tensor(found[name], dtype=torch.int64, device="cpu")
            for name in ("predictions", "fooled_at")
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


def look(setting: Setting, protocol: Protocol, block: Block) -> Look:
    """Logits and gradients at a few samples, and logits where each attack of the user takes them.

    Torch's random numbers are the same each time, so that a model with noise can be told from another one.
    """
    block = block[:PROBE]
    with _fixed_noise(block.x.device):
        parts = setting.over(block, lambda batch: _at(setting, protocol, batch))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _at(setting: Setting, protocol: Protocol, block: Block) -> Look:
    x = block.x.detach().requires_grad_()
    wanted = any(spec.kind != "custom" for spec in protocol.attacks)
    with torch.set_grad_enabled(wanted):
        logits = setting.logits(x, differentiable=wanted)
        # A combination of the logits whose gradient does not vanish where the model is certain.
        total = (logits * torch.linspace(-1, 1, logits.shape[1], device="cpu").to(logits)).sum()
    found = {"logits": logits.detach()}
    if wanted:
        depends = total.requires_grad
        found_at = torch.autograd.grad(total, x, allow_unused=True)[0] if depends else None
        gradient = (torch.zeros_like(x) if found_at is None else found_at).flatten(1).cpu().double()
        noise = uniform_noise(0, 0, block.index, x.shape[1:]).flatten(1) - 0.5
        found["gradients"] = torch.stack([gradient.norm(dim=1), (gradient * noise).sum(1)], dim=1)
    for spec in protocol.attacks:
        if spec.kind == "custom":
            name = f"attack {spec.name!r}"
            found[name] = setting.logits(custom_images(setting, spec, block)).detach()
    return {name: value.cpu().double() for name, value in found.items()}


def _rows(values: Tensor) -> list[list[float | str]]:
    """Rows for JSON, which has no word for the infinite logit of a masked class."""
    return [[n if math.isfinite(n) else str(n) for n in row] for row in values.tolist()]


def _numbers(rows: list[list[float | str]]) -> Tensor:
    """The values of `_rows`."""
    numbers = [[float(n) for n in row] for row in rows]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _alike(name: str, before: Tensor, now: Tensor) -> bool:
    """Equal but for rounding."""
    if before.shape != now.shape:
        return False
    finite = before.abs().where(before.isfinite(), 0)
    size = finite.max() if before.numel() else before.new_zeros(())
    near = GRADIENT_TOLERANCE * size if name == "gradients" else TOLERANCE * (1 + size)
    # Equal infinities have no difference.
    return not bool((((before - now).abs() > near) & (before != now)).any())


@contextmanager
def _fixed_noise(device: torch.device) -> Iterator[None]:
    """Run the block with torch's global generators at their start, and give the caller's states back."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        torch.set_rng_state(torch.Generator("cpu").get_state())
        if cuda is not None:
            torch.cuda.set_rng_state(torch.Generator(device).get_state(), device)
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file(attack: str, number: int) -> str:
    """Name of a file: that of the attack made safe, told apart by a digest of the real one."""
    safe = re.sub(r"[^A-Za-z0-9-]", "_", attack)[:40]
    mark = hashlib.blake2b(attack.encode(), digest_size=4).hexdigest()
    return f"{safe}-{mark}-{number:06d}.json"
