"""`Checkpoints`: what was saved comes back or stays, on a disk that is full, damaged or read-only too."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_ferd import same
from torch import nn

from ferdlib.checkpoints import write_file
from ferdlib.trainer import Checkpoints

ROOT = Path(__file__).parents[1]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_saved_comes_back(tmp_path):
    state = {
        "weights": nn.Linear(3, 2).state_dict(),
        "plain": [None, True, 3, 0.5, float("nan"), "text", b"bytes", (1, 2)],
        "by number": {0: torch.arange(3)},
        "parameter": nn.Parameter(torch.ones(2)),
    }
    checkpoints = Checkpoints(tmp_path / "new" / "folder")
    assert checkpoints.latest() is None
    path = checkpoints.save(state, 7)
    step, found = checkpoints.latest()
    assert (step, checkpoints.files()) == (7, [path])
    assert same(found, state)
    assert torch.load(path, weights_only=True).keys() == {"format", "step", "state"}


def test_the_last_ones_stay_and_later_ones_are_given_up(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 9, 10, 100):
        checkpoints.save({"step": step}, step)
    assert [Checkpoints.read(path)[0] for path in checkpoints.files()] == [10, 100]
    checkpoints.save({"step": 11}, 11)  # gone on from 10, or begun anew
    assert [Checkpoints.read(path)[0] for path in checkpoints.files()] == [10, 11]
    checkpoints.save({"step": "again"}, 11)
    assert checkpoints.latest() == (11, {"step": "again"})


def test_what_a_killed_process_left_is_removed_and_other_files_stay(tmp_path):
    left, other = (tmp_path / f"checkpoint-0000000003.pt.{k}.partial" for k in "ab")
    for file in (left, other):
        file.write_bytes(b"half")
    os.utime(left, (0, 0))
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    checkpoints.save({}, 1)
    # The other one may be that of a process at work.
    assert set(contents(tmp_path)) == {"checkpoint-0000000001.pt", "notes.txt", other.name}
    checkpoints.clear()
    assert set(contents(tmp_path)) == {"notes.txt"}
    (tmp_path / "notes.txt").unlink()
    checkpoints.clear()
    assert not tmp_path.exists()
    checkpoints.clear()


@dataclass
class Own:
    number: int = 0


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": {"b": [0, np.float64(1)]}}, r"state\['a'\]\['b'\]\[1\]"),
        ({"path": Path("x")}, r"PosixPath.* as state\['path'\]"),
        ({"own": Own()}, r"Own.* as state\['own'\]"),
        ({"call": len}, r"state\['call'\]"),
        ({(1, 2): 3}, r"plain keys in `state`, got tuple"),
        ([1], "`state` to be a dict, got list"),
    ],
)
def test_other_objects_are_refused_by_their_place(state, place, tmp_path):
    with pytest.raises(TypeError, match=rf"^Checkpoints.save: expected .*{place}"):
        Checkpoints(tmp_path / "none").save(state, 1)
    assert not (tmp_path / "none").exists()


def with_attribute(value, attribute):
    value.attribute = attribute
    return value


PLACE = r"as state\['v'\]\[0\]\['w'\]"
MINE = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    "value",
    [
        with_attribute(OrderedDict(a=1), Path("x")),
        with_attribute(MINE, Path("x")),
        b"",
        10**700,
        torch.ones(2, device="meta"),
    ],
    ids=["OrderedDict", "Parameter", "bytes", "int", "meta"],
)
def test_what_could_not_be_read_back_is_refused_by_its_place_and_the_old_one_stays(value, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save({"epoch": 1}, 1)
    with pytest.raises(TypeError, match=rf"^Checkpoints.save: expected `state` .*{PLACE}"):
        checkpoints.save({"fine": 1, "v": [{"w": value}]}, 1)
    assert checkpoints.latest() == (1, {"epoch": 1})
    assert len(contents(tmp_path)) == 1


def test_a_state_that_holds_itself_is_refused(tmp_path):
    state = {}
    state["state"] = state
    with pytest.raises(ValueError, match=r"^Checkpoints.save: expected `state` of finite depth"):
        Checkpoints(tmp_path).save(state, 1)


def test_no_flipped_bit_is_read_as_a_number(tmp_path):
    state = {"weights": torch.arange(64.0), "epoch": 3}
    path = Checkpoints(tmp_path).save(state, 1)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert same(Checkpoints.read(path), (1, state)), place  # a bit that means nothing
        except ValueError:
            refused += 1
    assert refused > 64 * 4 / 7


def test_writers_of_one_file_do_not_meet_and_follow_no_link(tmp_path, monkeypatch):
    target, victim = tmp_path / "a.txt", tmp_path / "victim"

    def slow(file):
        write_file(target, "of another process")
        assert target.read_text() == "of another process"
        file.write(b"of this one")

    write_file(target, slow)
    assert contents(tmp_path) == {"a.txt": b"of this one"}
    victim.write_text("mine")
    target.unlink()
    target.symlink_to(victim)
    write_file(target, "new")
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / "a.txt.guessed.partial").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_file(target, "newer")
    assert (target.is_symlink(), target.read_text()) == (False, "new")
    assert victim.read_text() == "mine"
    assert (tmp_path / "a.txt.guessed.partial").is_symlink()


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"a": torch.zeros(100)}, 1)
    newest = checkpoints.save({"a": torch.zeros(100)}, 2)
    whole = newest.read_bytes()
    cases = {"complete checkpoint": [whole[: len(whole) // 2], b"", b"text"]}
    foreign = tmp_path / "foreign"
    for content, words in (
        ({"weights": torch.zeros(2)}, "a file that Checkpoints.save wrote"),
        ({"format": 2, "step": 2, "state": {}}, "of format 1, got .* with int 2"),
    ):
        torch.save(content, foreign)
        cases[words] = [foreign.read_bytes()]
    for words, found in cases.items():
        for content in found:
            newest.write_bytes(content)
            with pytest.raises(ValueError, match=f"^Checkpoints.read: expected .*{words}") as error:
                checkpoints.latest()
            assert str(newest) in str(error.value)
    newest.unlink()
    assert checkpoints.latest()[0] == 1


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(where, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"a": 1}, 1)
    before = contents(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, where, full)
    with pytest.raises(
        OSError, match=r"^Checkpoints.save: .*checkpoint-0000000002.* No space left"
    ):
        checkpoints.save({"a": 2}, 2)
    assert contents(tmp_path) == before


def test_a_disk_that_fills_while_torch_writes_is_a_disk_that_is_full(tmp_path):
    """The system lets no file grow beyond 100 kB, and torch complains of that in words of its own."""
    program = """
import resource, sys, torch
from ferdlib.trainer import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save({"a": torch.zeros(10)}, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save({"a": torch.zeros(1_000_000)}, 2)
except OSError as error:
    print(error)
print(checkpoints.latest())
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    sentence, latest, *rest = result.stdout.splitlines()
    assert sentence.startswith("Checkpoints.save: expected to write ")
    assert "File too large" in sentence
    assert latest.startswith("(1, {'a': tensor([0.")
    assert rest == []
    assert set(contents(tmp_path)) == {"checkpoint-0000000001.pt"}


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save({}, 1)
    before = contents(tmp_path / "run")
    (tmp_path / "run").chmod(0o500)
    if os.access(tmp_path / "run", os.W_OK):  # as root

        def refused(*_):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(OSError, match=r"^Checkpoints.save: expected to write .*Permission denied"):
        checkpoints.save({}, 2)
    monkeypatch.undo()
    (tmp_path / "run").chmod(0o700)
    assert contents(tmp_path / "run") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^Checkpoints.save: expected to write"):
        Checkpoints(tmp_path / "file").save({}, 1)
