"""A network's weights in the content of a file, under whatever wrappers, prefixes and synonyms they lie there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ferdlib._checks import InvalidValue

# Wrappers and prefixes that mean the network itself: of several that fit, the first in this order counts.
USUAL = ("state_dict", "model_state_dict", "model", "net", "student", "module")
# Parts of names that the network's forward does not read: a copy of the first stage in TRADES' network, other
# networks of the same script, and the count of an averaged model.
ASIDE = {"sub_block1", "teacher", "attacker", "ema", "ema_model", "model_ema", "n_averaged"}
# Parts that torch.compile, FSDP and activation checkpointing put into the names of what they wrap, at any depth.
WRAPPED = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Names that differ between public implementations of one architecture.
SYNONYMS = (("linear.", "fc."), ("shortcut.", "downsample."))
# Ends of the names under which models keep what they normalise their images by.
NORMALISERS = (("mean", "std"), ("mu", "sigma"))
# Names that an error lists before it counts the rest.
MOST_LISTED = 6


class Network(NamedTuple):
    """The part of a file that an architecture's names were found in."""

    wrappers: tuple[str, ...]
    prefix: str
    # Under the architecture's own names.
    weights: dict[str, Tensor]
    # What else its state dict holds, under the names of the file.
    rest: dict[str, Tensor]
    # Why the weights are not the architecture's; empty if they are.
    problems: str

    @property
    def path(self) -> list[str]:
        return [*self.wrappers, *self.prefix.split(".")[:-1]]

    @property
    def rank(self) -> tuple[bool, bool, list[int]]:
        order = [USUAL.index(part) if part in USUAL else len(USUAL) for part in self.path]
        return not ASIDE.isdisjoint(self.path), len(USUAL) in order, order


def find(content: Any, own: Mapping[str, Tensor], *, architecture: str, file: str) -> Network:
    """The one network in a file that is meant, with the names and shapes of `own`.

    Raises:
        InvalidValue: no such network, or several without a usual name among them.
    """
    found = [
        _network(wrappers, state, prefix, own)
        for wrappers, state in _state_dicts(content, set())
        for prefix in _prefixes(state, own)
    ]
    if not found:
        keys = some([str(key) for key in content]) if isinstance(content, Mapping) else ""
        raise InvalidValue(
            f"expected `path` to hold a state dict, plain or wrapped, got {file!r}, which holds none"
            + (f" but {keys}" if keys else "")
        )
    fitting = sorted((each for each in found if not each.problems), key=lambda each: each.rank)
    if not fitting:
        # The nearest one says best what is wrong.
        return max(found, key=lambda each: len(each.weights))
    first = fitting[0]
    rivals = [
        each for each in fitting[1:] if each.rank[0] == first.rank[0] and not _same(each, first)
    ]
    # Without a usual name, nothing says which one is meant.
    if rivals and first.rank[1]:
        names = some([".".join(each.path) for each in (first, *rivals)])
        raise InvalidValue(
            f"expected `path` to hold one {architecture}, got {file!r} with several, {names}; save the one "
            f"that is meant alone"
        )
    # Other whole networks of the same state dict are no part of this one.
    others = [each.prefix for each in fitting[1:] if each.wrappers == first.wrappers]
    beside = tuple(prefix for prefix in others if not first.prefix.startswith(prefix))
    rest = {k: v for k, v in first.rest.items() if not (beside and k.startswith(beside))}
    return first._replace(rest=rest)


def normalisation(
    content: Any, network: Network, channels: int, file: str
) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation that the file keeps beside the network; they leave its `rest`."""
    near: dict[str, Any] = {key: value for key, value in network.rest.items() if _is_plain(value)}
    for depth in range(len(network.wrappers) + 1):
        # Beside a wrapper, only whole names are believed: a "test_mean" there is somebody's result.
        names = [name for pair in NORMALISERS for name in pair if name in content]
        near |= {name: content[name] for name in names if _is_vector(content[name], channels)}
        content = content[network.wrappers[depth]] if depth < len(network.wrappers) else content
    pairs = {
        key: key.removesuffix(mean) + std
        for key in near
        for mean, std in NORMALISERS
        if key.endswith(mean) and key.removesuffix(mean) + std in near
    }
    values = []
    for pair in pairs.items():
        mean, std = (
            torch.as_tensor(near[name], device="cpu").double().reshape(-1) for name in pair
        )
        # Single precision, in which the model computes.
        positive = (std.float() > 0) & std.float().isfinite()
        inside = (mean >= 0) & (mean <= 1)
        if not ({len(mean), len(std)} <= {1, channels} and positive.all() and inside.all()):
            raise InvalidValue(
                f"expected `path` to normalise images of {channels} channels in [0, 1], got {file!r} with "
                f"{pair[0]} {_rounded(mean)} and {pair[1]} {_rounded(std)}; save the network alone and wrap it "
                f"in models.Normalized"
            )
        values.append((mean.expand(channels).tolist(), std.expand(channels).tolist()))
    if any(value != values[0] for value in values):
        raise InvalidValue(
            f"expected `path` to normalise images in one way, got {file!r} with {some([*pairs])}; save the "
            f"network alone and wrap it in models.Normalized"
        )
    for pair in pairs.items():
        for name in pair:
            network.rest.pop(name, None)
    return values[0] if values else None


def _state_dicts(
    content: Any, seen: set[int], wrappers: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """All mappings of names to tensors, under at most three wrappers."""
    # A mapping may hold itself, or another one many times.
    if not isinstance(content, Mapping) or len(wrappers) > 3 or id(content) in seen:
        return
    seen.add(id(content))
    entries = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    if tensors:
        short = {WRAPPED.sub("", key): value for key, value in tensors.items()}
        # Two tensors may not end under one name.
        yield wrappers, short if len(short) == len(tensors) else tensors
    for key, value in entries.items():
        yield from _state_dicts(value, seen, (*wrappers, key))


def _prefixes(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Prefixes under which all names of an architecture are there, or else most of them."""
    known = {name for each in own for name in (each, *_synonyms(each))}
    deepest = max(name.count(".") for name in known) + 1
    votes = Counter({"": 0})
    for key in state:
        parts = key.split(".")
        for first in range(max(len(parts) - deepest, 0), len(parts)):
            name = ".".join(parts[first:])
            if name in known:
                votes[key.removesuffix(name)] += 1
    needed = sum(not _is_count(name) for name in own)
    return [p for p, n in votes.items() if n >= needed] or [max(votes, key=votes.__getitem__)]


def _network(
    wrappers: tuple[str, ...], state: dict[str, Tensor], prefix: str, own: Mapping[str, Tensor]
) -> Network:
    under = {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
    weights, rest = {}, dict(state)
    for name, key in under.items():
        # If the file has both names, neither stands for the other: two answers to one question.
        candidates = [name] + [other for other in _synonyms(name) if other not in under]
        if match := next((each for each in candidates if each in own), None):
            weights[match] = rest.pop(key)
    rest = {k: v for k, v in rest.items() if ASIDE.isdisjoint(k.removeprefix(prefix).split("."))}
    return Network(wrappers, prefix, weights, rest, _problems(weights, own))


def _synonyms(name: str) -> list[str]:
    pairs = (pair for both in SYNONYMS for pair in (both, both[::-1]))
    return [name.replace(a, b) for a, b in pairs if a in name]


def _is_count(name: str) -> bool:
    # Files of torch before 0.4.1 have no count of batches.
    return name.endswith("num_batches_tracked")


def _is_vector(value: Any, channels: int) -> bool:
    if isinstance(value, Tensor):
        return _is_plain(value) and value.numel() in (1, channels)
    whole = isinstance(value, (list, tuple)) and len(value) == channels
    return whole and all(isinstance(number, (int, float)) for number in value)


def _rounded(values: Tensor) -> str:
    return f"({some([f'{value:.4g}' for value in values.tolist()])})"


def _is_plain(value: Tensor) -> bool:
    # Quantised numbers mean nothing without their scale, and a tensor on "meta" has no numbers.
    return value.is_floating_point() and value.is_cpu and value.layout == torch.strided


def _same(one: Network, other: Network) -> bool:
    return all(
        value.dtype == other.weights[name].dtype and torch.equal(value, other.weights[name])
        for name, value in one.weights.items()
        if name in other.weights
    )


def _problems(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    both = [(name, weights[name], own[name]) for name in own if name in weights]
    return listed(
        {
            "missing": [n for n in own if n not in weights and not _is_count(n)],
            "of another shape": [
                f"{name} {tuple(theirs.shape)} instead of {tuple(ours.shape)}"
                for name, theirs, ours in both
                if theirs.shape != ours.shape
            ],
            "of another kind": [
                f"{name} {theirs.type()}"
                for name, theirs, ours in both
                if ours.is_floating_point() and not _is_plain(theirs)
            ],
        }
    )


def listed(problems: Mapping[str, Sequence[str]]) -> str:
    """Each kind of problem with the first names that have it."""
    return "; ".join(f"{kind}: {some(names)}" for kind, names in problems.items() if names)


def some(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    more = len(names) - MOST_LISTED
    return ", ".join(names[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
