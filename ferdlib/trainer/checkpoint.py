"""The states of a run on disk: each file whole or not there, and readable without running its content."""

from __future__ import annotations

import os
import re
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ferdlib import _checks

FORMAT = 1
NAME = re.compile(r"checkpoint-(\d{10,})\.pt")
# What `torch.load(weights_only=True)` reads; subclasses, such as numpy's numbers, it does not.
PLAIN = (type(None), bool, int, float, str, bytes)
SEQUENCES = (list, tuple, torch.Size)
MAPPINGS = (dict, OrderedDict, Counter)
TENSORS = (Tensor, nn.Parameter)


class Checkpoints:
    """The last states of one run, in a folder of their own.

    A process that is killed, or a disk that is full, costs what was done since the last `save` and nothing
    that was saved. Only one process at a time may write to a folder.

    Args:
        folder: made when something is saved.
        keep: how many states stay, >= 1; the older ones are deleted when a newer one is safe.

    Raises:
        TypeError, ValueError: a folder that is no path, or `keep` that is no positive integer.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> checkpoints = Checkpoints(folder.name, keep=2)
        >>> for step in (1, 2, 3):
        ...     path = checkpoints.save({"weights": torch.full((2,), step)}, step)
        >>> checkpoints.latest()
        (3, {'weights': tensor([3, 3])})
        >>> [path.name for path in checkpoints.files()]
        ['checkpoint-0000000002.pt', 'checkpoint-0000000003.pt']
        >>> folder.cleanup()
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3) -> None:
        self.folder = _checks.path("Checkpoints", "folder", folder)
        self.keep = _checks.integer("Checkpoints", "keep", keep, low=1)

    def files(self) -> list[Path]:
        """What is there, oldest step first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((p for p in found if NAME.fullmatch(p.name)), key=_step)

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Write a state, then delete what is not among the last `keep`.

        Files of later steps are deleted too: whoever goes on from an earlier step gives them up.

        Args:
            state: tensors, numbers, strings, bytes, booleans and None, in dicts, lists and tuples.
            step: where the run is, >= 0: epochs or steps, but always the same; the same one again replaces
                its file.

        Returns:
            The file.

        Raises:
            TypeError: another kind of object in the state, by its place there; nothing is written then.
            ValueError: a negative step.
            OSError: a full disk, or a folder that cannot be written; what was saved before is untouched.
        """
        _checks.integer("Checkpoints.save", "step", step, low=0)
        if not isinstance(state, dict):
            raise TypeError(
                f"Checkpoints.save: expected `state` to be a dict, got {_checks.got(state)}"
            )
        _check_plain(state, "state")
        path = self.folder / f"checkpoint-{step:010d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write({"format": FORMAT, "step": step, "state": state}, path)
            self._tidy(step)
        except OSError as error:
            raise OSError(
                f"Checkpoints.save: expected to write {str(path)!r}, got {error}; what was saved before is "
                f"untouched"
            ) from error
        return path

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest step and its state, with tensors on the CPU; None if nothing was saved.

        Raises:
            ValueError: its file is damaged or something else; the one before is there if it is deleted.
        """
        files = self.files()
        return self.read(files[-1]) if files else None

    @staticmethod
    def read(path: str | os.PathLike[str]) -> tuple[int, dict[str, Any]]:
        """Step and state of one file, with tensors on the CPU; nothing in it is executed.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that cannot be read, or that `save` did not write.
        """
        name = repr(str(path))
        if not _checks.path("Checkpoints.read", "path", path).is_file():
            raise FileNotFoundError(
                f"Checkpoints.read: expected `path` of a checkpoint, got no file {name}"
            )
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's differ by what is wrong with the file
            raise ValueError(
                f"Checkpoints.read: expected a complete checkpoint of tensors and plain values, got "
                f"{name}, of which nothing was loaded; delete it to go on from the one before"
            ) from error
        if not isinstance(content, dict) or content.keys() != {"format", "step", "state"}:
            raise ValueError(
                f"Checkpoints.read: expected a file that Checkpoints.save wrote, got {name}"
            )
        if content["format"] != FORMAT or not isinstance(content["state"], dict):
            raise ValueError(
                f"Checkpoints.read: expected a checkpoint of format {FORMAT}, got {name} with "
                f"{_checks.got(content['format'])}"
            )
        return content["step"], content["state"]

    def clear(self) -> None:
        """Delete what is there, and the folder if nothing else is in it: the run has reached its end."""
        for path in [*self.files(), *self.folder.glob("checkpoint-*.partial")]:
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _tidy(self, step: int) -> None:
        """Delete states beyond the last `keep`, and what a killed process left half written."""
        earlier = [path for path in self.files() if _step(path) <= step]
        for path in {*self.files()} - {*earlier[-self.keep :]}:
            path.unlink()
        for path in self.folder.glob("checkpoint-*.partial"):
            path.unlink()


def _step(path: Path) -> int:
    found = NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def _write(content: dict[str, Any], path: Path) -> None:
    """On return the content is on the disk under its name; on an error nothing of it is."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # torch complains of its own about a file that the system did not let it finish.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _sync_folder(folder: Path) -> None:
    """Have the new name on the disk, too, where a folder can be opened for that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_plain(value: Any, place: str) -> None:
    kind = type(value)
    if kind in MAPPINGS:
        for key, inner in value.items():
            if type(key) not in PLAIN:
                raise TypeError(
                    f"Checkpoints.save: expected plain keys in {place}, got {_checks.got(key)}"
                )
            _check_plain(inner, f"{place}[{key!r}]")
    elif kind in SEQUENCES:
        for number, inner in enumerate(value):
            _check_plain(inner, f"{place}[{number}]")
    elif kind not in PLAIN and kind not in TENSORS:
        raise TypeError(
            f"Checkpoints.save: expected tensors and plain values, got {_checks.got(value)} as {place}; "
            f"save its numbers instead"
        )
