"""Files on disk, each whole or not there: one writer for all of them, and the states of a run."""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ferdlib import _checks
from ferdlib._checks import InvalidType, InvalidValue, got, public
from ferdlib._files import read_plain

__all__ = ["Checkpoints", "digest", "write_file"]

FORMAT = 1
NAME = re.compile(r"checkpoint-(\d{10,})\.pt")
# Seconds after which a file that nobody has written to was left behind by a killed process.
ABANDONED = 600
# Types that `torch.load(weights_only=True)` reads; their subclasses, such as numpy's numbers, it does not.
PLAIN = (type(None), bool, int, float, str, bytes)
SEQUENCES = (list, tuple, torch.Size)
MAPPINGS = (dict, OrderedDict, Counter)
TENSORS = (Tensor, nn.Parameter)


def write_file(
    target: str | os.PathLike[str], content: str | bytes | Callable[[BinaryIO], object]
) -> None:
    """Write a file whole or not at all.

    The content goes to a temporary file in the same folder, is synced to the disk and then takes the name. A
    process that is killed leaves the old file, or none. Two processes that write the same file do not meet: the
    last one's is there in the end. A link in the file's place is replaced, not followed.

    Args:
        target: the file; its folder must exist.
        content: text (UTF-8), bytes, or a function that writes to an open binary file.

    Raises:
        OSError: a full disk, or a folder that is missing or cannot be written; an old file is untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_file(Path(folder, "a.txt"), "whole")
        ...     Path(folder, "a.txt").read_text()
        'whole'
    """
    final = Path(target)
    partial = final.with_name(f"{final.name}.{secrets.token_hex(4)}.partial")
    if isinstance(content, str):
        content = content.encode()
    # A new file under a name that nobody can have planted a link at; what is there is not ours to remove.
    opened = open(partial, "xb")  # noqa: SIM115
    try:
        with opened as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
        _sync_folder(final.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # torch raises an error of its own about a file that the system did not let it finish.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        # A disk that is full does not say which file it was.
        if cause.filename is None and cause.errno is not None:
            cause.filename = str(final)
        raise cause from None


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Delete the temporary files that killed processes have left in a folder."""
    for file in folder.glob(f"{pattern}.partial"):
        # Another process may be faster.
        with suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > ABANDONED:
                file.unlink()


def _sync_folder(folder: Path) -> None:
    """Sync the new name to the disk, where a folder can be opened for that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@public
def digest(model: nn.Module) -> str:
    """SHA-256 of a model's kinds of layers, parameters and buffers, in hexadecimal.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> digest(nn.Linear(2, 1).double()) == digest(nn.Linear(2, 1))
        False
    """
    _checks.module(model=model)
    found = hashlib.sha256()
    for name, layer in model.named_modules():
        found.update(f"{name} {type(layer).__qualname__}\n".encode())
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(content.numpy().tobytes())
    return found.hexdigest()


class Checkpoints:
    """The last states of one run, in a folder of their own.

    A process that is killed, or a disk that is full, costs what was done since the last `save` and nothing
    that was saved. Only one process at a time may write to a folder.

    Args:
        folder: made by the first `save`.
        keep: number of states that stay, >= 1; older ones are deleted when a newer one is safe.

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

    @public
    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3) -> None:
        self.folder = _checks.path("folder", folder)
        _checks.integer(1, keep=keep)
        self.keep = keep

    def files(self) -> list[Path]:
        """Checkpoint files, oldest step first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((p for p in found if NAME.fullmatch(p.name)), key=_step)

    @public
    def save(self, state: dict[str, Any], step: int) -> Path:
        """Write a state, read it back, then delete all but the last `keep`.

        Files of later steps are deleted too: whoever continues from an earlier step gives them up.

        Args:
            state: tensors, numbers, strings, bytes, booleans and None, in dicts, lists and tuples.
            step: position of the run, >= 0: epochs or steps, but always the same; the same one again replaces
                its file.

        Returns:
            The file.

        Raises:
            TypeError: an object in the state that could not be read back, by its place there; nothing is written
                then.
            ValueError: a negative step, or a state that holds itself.
            OSError: a full disk, or a folder that cannot be written; what was saved before is untouched.
        """
        _checks.integer(0, step=step)
        _checks.instance(dict, state=state)
        try:
            _check_plain(state, "state")
        except RecursionError as error:
            raise InvalidValue("expected `state` of finite depth, got one too deep") from error
        target = self.folder / f"checkpoint-{step:010d}.pt"
        content = {"format": FORMAT, "step": step, "state": state}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(target, lambda file: _save_readable(content, file))
            self._tidy(step)
        except OSError as error:
            raise OSError(
                f"Checkpoints.save: expected to write {str(target)!r}, got {error}; what was saved before is "
                f"untouched"
            ) from error
        return target

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Newest step and its state, with tensors on the CPU; None if nothing was saved.

        Raises:
            ValueError: its file is damaged or something else; delete it to continue from the one before.
        """
        files = self.files()
        return self.read(files[-1]) if files else None

    @staticmethod
    @public
    def read(path: str | os.PathLike[str]) -> tuple[int, dict[str, Any]]:
        """Read step and state from one file, with tensors on the CPU; nothing in it is executed.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that cannot be read, or that `save` did not write.
        """
        source = _checks.file("path", path)
        name = repr(str(source))
        try:
            content = read_plain(source)
        except Exception as error:  # torch's type of error depends on what is wrong with the file
            raise InvalidValue(
                f"expected `path` to be a complete checkpoint of plain values, got {name}, of which nothing "
                f"was loaded; delete it to go on from the one before"
            ) from error
        if not isinstance(content, dict) or content.keys() != {"format", "step", "state"}:
            raise InvalidValue(
                f"expected `path` to be a file that Checkpoints.save wrote, got {name}"
            )
        plain = isinstance(content["state"], dict) and isinstance(content["step"], int)
        if content["format"] != FORMAT or not plain:
            raise InvalidValue(
                f"expected `path` of format {FORMAT}, got {name} with {got(content['format'])}"
            )
        return content["step"], content["state"]

    def clear(self) -> None:
        """Delete all checkpoints of a finished run, and the folder if nothing else is in it."""
        for file in [*self.files(), *self.folder.glob("checkpoint-*.partial")]:
            file.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _tidy(self, step: int) -> None:
        """Delete states beyond the last `keep`, and files that a killed process left half written."""
        earlier = [file for file in self.files() if _step(file) <= step]
        for file in {*self.files()} - {*earlier[-self.keep :]}:
            file.unlink(missing_ok=True)
        remove_abandoned(self.folder, "checkpoint-*")


def _step(file: Path) -> int:
    found = NAME.fullmatch(file.name)
    assert found is not None
    return int(found[1])


def _save_readable(content: dict[str, Any], file: BinaryIO) -> None:
    """Write a checkpoint, and refuse one that `read` would refuse before it takes the place of another."""
    torch.save(content, file)
    file.flush()
    try:
        # The numbers stay on the disk: a pool of images would be in memory twice.
        read_plain(file.name, mmap=True)
    except Exception as error:  # torch's type of error depends on what it does not read
        place, value = _unreadable(content["state"], "state")
        raise InvalidType(
            f"expected `state` of values that can be read back, got {got(value)} as {place}; save its numbers "
            f"instead"
        ) from error


def _unreadable(value: Any, place: str) -> tuple[str, Any]:
    """Find the innermost part of a state that cannot be read back, and its place."""
    for key, inner in _parts(value):
        buffer = io.BytesIO()
        torch.save(inner, buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, weights_only=True)
        except Exception:  # as above
            return _unreadable(inner, f"{place}[{key!r}]")
    return place, value


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if type(value) in MAPPINGS:
        return value.items()  # type: ignore[no-any-return]
    return enumerate(value) if type(value) in SEQUENCES else ()


def _check_plain(value: Any, place: str) -> None:
    for key, inner in _parts(value):
        if type(value) in MAPPINGS and type(key) not in PLAIN:
            raise InvalidType(f"expected plain keys in `{place}`, got {got(key)}")
        _check_plain(inner, f"{place}[{key!r}]")
    # A tensor on "meta" has a shape and no numbers.
    empty = isinstance(value, Tensor) and value.is_meta
    if type(value) not in (*MAPPINGS, *SEQUENCES, *PLAIN, *TENSORS) or empty:
        raise InvalidType(
            f"expected `state` of tensors and plain values, got {got(value)} as {place}; save its numbers instead"
        )
