"""Checkpoints."""

import torch

from bad_input import table as t
from bad_input.table import any_of, bad, each, good
from ferdlib.checkpoints import Checkpoints, digest


def files():
    Checkpoints("saved").save({"epoch": 1}, 1)
    torch.save({"epoch": 1}, "other.pt")


good(digest, model=t.MODEL)
good(Checkpoints, folder="runs")
each(Checkpoints, folder=t.PATH, keep=t.integer(1))
good(Checkpoints.save, self=lambda: Checkpoints("runs"), state={"epoch": 1}, step=1)
wrong = any_of(TypeError, "a dict", "text", None)
each(Checkpoints.save, state=wrong, step=t.integer(0))
bad(Checkpoints.save, TypeError, "as state['epoch']", state={"epoch": t.quiet})
bad(Checkpoints.save, TypeError, "plain keys in `state['a']`", state={"a": {(1, 2): 1}})
good(Checkpoints.read, path="saved/checkpoint-0000000001.pt")
paths = t.PATH + any_of(FileNotFoundError, "to be a file", "none.pt", "saved")
each(Checkpoints.read, path=paths)
bad(Checkpoints.read, ValueError, "that Checkpoints.save wrote", path="other.pt")
