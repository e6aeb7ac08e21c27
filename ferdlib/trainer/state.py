"""What a state of `FERDTrainer` must fit, and the random generators that it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ferdlib._ranks import Ranks

KEYS = {"config", "epoch", "student", "student_optimizer", "source", "method", "pool"}
KEYS |= {"class_probabilities", "statistic", "largest_diversity", "rng", "stopped"}


def generators(rng: torch.Generator, **parts: object) -> dict[str, torch.Generator]:
    """The trainer's, and those of parts that have one of their own."""
    own = {name: getattr(part, "rng", None) for name, part in parts.items()}
    found = {"trainer": rng}
    for name, candidate in own.items():
        if isinstance(candidate, torch.Generator) and candidate is not rng:
            found[name] = candidate
    return found


def check(
    state: Any, config: dict[str, Any], student: nn.Module, rngs: dict[str, torch.Generator]
) -> None:
    """Refuse a state of another trainer before anything of it is loaded."""
    name = "FERDTrainer.load_state_dict"
    if not isinstance(state, dict) or state.keys() != KEYS:
        raise ValueError(f"{name}: expected what `state_dict` returned, got something else")
    saved = state["config"]
    differing = sorted(k for k in config.keys() | saved.keys() if saved.get(k) != config.get(k))
    if differing:
        raise ValueError(
            f"{name}: expected a state of the same config, got other values for {', '.join(differing)}"
        )
    # torch loads what fits before it complains of what does not.
    theirs, ours = (
        {key: tuple(value.shape) for key, value in weights.items()}
        for weights in (state["student"], student.state_dict())
    )
    if theirs != ours:
        raise ValueError(
            f"{name}: expected a state of the same student architecture, got other names or shapes for "
            f"{', '.join(sorted(dict(theirs.items() ^ ours.items())))}"
        )
    for key in ("class_probabilities", "statistic"):
        if tuple(state[key].shape) != (config["num_classes"],):
            raise ValueError(
                f"{name}: expected `{key}` of shape ({config['num_classes']},), got {tuple(state[key].shape)}"
            )
    if (
        state["stopped"] is not None and Ranks.here().size > 1
    ):  # whose class sums are of all images so far
        raise ValueError(
            f"{name}: expected a state between two epochs, from which several processes can go on, got one "
            f"within epoch {state['epoch'] + 1}; finish that with one process"
        )
    if state["rng"].keys() != rngs.keys():
        raise ValueError(
            f"{name}: expected random generators of {', '.join(rngs)}, got those of "
            f"{', '.join(state['rng'])}; give method and source an `rng` of their own or none, as before"
        )


def gathered(pool: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The state of a pool from its shares, on every process."""
    columns = {name: ranks.gathered(rows) for name, rows in pool["columns"].items()}
    return {"columns": columns, "added": pool["added"] * ranks.size}


def parted(pool: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """This process's share of such a state, however many processes made it."""
    added = ranks.share("FERDTrainer.load_state_dict", "images in the pool", pool["added"])
    return {"columns": {k: ranks.part(v) for k, v in pool["columns"].items()}, "added": added}
