"""The trainer's state: collected, checked, and loaded whole or not at all."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ferdlib._checks import InvalidValue, got
from ferdlib.synthesis.pool import checked_state

# A `FERDTrainer`, whose module imports this one.
Trainer = Any


def whole(trainer: Trainer) -> dict[str, Any]:
    """Copy everything that the next epoch depends on; the processes' shares of the pool are put together."""
    ranks, pool = trainer._ranks, trainer.pool.state_dict()
    # So that any number of processes can go on.
    columns = {name: ranks.gathered(rows) for name, rows in pool["columns"].items()}
    pool = {"columns": columns, "added": pool["added"] * ranks.size}
    return {**copy.deepcopy(_own(trainer)), "pool": pool}


def load(trainer: Trainer, state: Any) -> None:
    """Continue from a state; one that is refused, also half way, changes nothing."""
    own, ranks = copy.deepcopy(_own(trainer)), trainer._ranks
    check(state, own)
    sizes: Any = {"dtype": trainer.pool.dtype, "capacity": trainer.config.pool_capacity}
    pool = checked_state(state["pool"], **sizes)
    share: dict[str, Any] = {"added": ranks.share("images in the pool", pool["added"])}
    share["columns"] = {name: ranks.part(rows) for name, rows in pool["columns"].items()}
    try:
        # Optimizers keep the tensors that they are given; the pool makes its own copy.
        _load(trainer, copy.deepcopy({key: state[key] for key in own}))
        trainer.pool.load_state_dict(share, device=trainer.device)
    # Also where it is interrupted.
    except BaseException:
        _load(trainer, own)
        raise
    # The state has the first process's generators; a part's own one differs between processes.
    for name, rng in _generators(trainer).items():
        if name != "trainer" and not ranks.first:
            ranks.reseed(rng, rng)


def _own(trainer: Trainer) -> dict[str, Any]:
    """Everything but the pool, not copied."""
    return {
        "config": asdict(trainer.config),
        "epoch": trainer.epoch,
        "student": trainer.student.state_dict(),
        "student_optimizer": trainer.student_optimizer.state_dict(),
        "source": trainer.source.state_dict(),
        "method": trainer.method.state_dict(),
        "class_probabilities": trainer.class_probabilities,
        "statistic": trainer._probabilities.statistic,
        "largest_diversity": trainer._monitor.largest_diversity,
        "rng": {name: rng.get_state() for name, rng in _generators(trainer).items()},
    }


def _load(trainer: Trainer, state: dict[str, Any]) -> None:
    for name in ("student", "student_optimizer", "source", "method"):
        getattr(trainer, name).load_state_dict(state[name])
    for name, rng in _generators(trainer).items():
        rng.set_state(state["rng"][name])
    trainer.class_probabilities, trainer.epoch = state["class_probabilities"], state["epoch"]
    trainer._probabilities.statistic = state["statistic"]
    trainer._monitor.largest_diversity = state["largest_diversity"]


def _generators(trainer: Trainer) -> dict[str, torch.Generator]:
    """The trainer's generator, and those of parts that have one of their own."""
    found = {"trainer": trainer._rng}
    for name in ("method", "source"):
        rng = getattr(getattr(trainer, name), "rng", None)
        shared = any(rng is each for each in (trainer._rng, trainer._own_rng))
        if isinstance(rng, torch.Generator) and not shared:
            found[name] = rng
    return found


def check(state: Any, own: dict[str, Any]) -> None:
    """Refuse a state of another trainer, or a damaged one, before anything of it is loaded."""
    if not isinstance(state, dict) or state.keys() != {*own, "pool"}:
        raise InvalidValue("expected `state` as `state_dict` returned it, got something else")
    _check_kinds(state, own)
    # A state that other settings made would go on as a run that nobody asked for.
    config, saved = own["config"], state["config"]
    differing = sorted(k for k in config.keys() | saved.keys() if saved.get(k) != config.get(k))
    if differing:
        raise InvalidValue(
            f"expected a state of the same config, got other values for {', '.join(differing)}"
        )
    if not 0 <= state["epoch"] <= config["epochs"]:
        raise InvalidValue(f"expected `epoch` in 0..{config['epochs']}, got {state['epoch']}")
    # torch loads what fits before it complains of what does not.
    theirs, ours = (
        {key: tuple(getattr(value, "shape", ())) for key, value in weights.items()}
        for weights in (state["student"], own["student"])
    )
    if theirs != ours:
        raise InvalidValue(
            f"expected a state of the same student architecture, got other names or shapes for "
            f"{', '.join(sorted(dict(theirs.items() ^ ours.items())))}"
        )
    if state["rng"].keys() != own["rng"].keys():
        raise InvalidValue(
            f"expected random generators of {', '.join(own['rng'])}, got those of {', '.join(state['rng'])}; give "
            f"method and source an `rng` of their own or none, as before"
        )
    _check_kinds(state["rng"], own["rng"])
    groups = [
        [len(group["params"]) for group in each["student_optimizer"].get("param_groups", ())]
        for each in (state, own)
    ]
    if groups[0] != groups[1]:
        raise InvalidValue(
            f"expected a state of the same student optimizer, of {groups[1]} parameters by group, got {groups[0]}"
        )


def _check_kinds(state: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse values of another type, and tensors of another dtype or shape, than one's own."""
    for name, mine in own.items():
        came = state[name]
        if isinstance(mine, Tensor) and isinstance(came, Tensor) and came.shape != mine.shape:
            raise InvalidValue(
                f"expected `{name}` of shape {tuple(mine.shape)}, got {tuple(came.shape)}"
            )
        same = got(came) == got(mine) if isinstance(mine, Tensor) else isinstance(came, type(mine))
        if not same and name not in ("source", "method"):
            wanted = got(mine) if isinstance(mine, Tensor) else f"of type {type(mine).__name__}"
            raise InvalidValue(f"expected `{name}` {wanted}, got {got(came)}")
