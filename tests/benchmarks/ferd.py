"""FERD's epochs written to the letter, and those of `FERDTrainer`."""

from __future__ import annotations

from .harness import Group, Prepared, Settings


def prepare(settings: Settings) -> Prepared:
    return Prepared(competitors={})


GROUP = Group(
    about="Epochs of FERD written to the letter, and the same epochs by `FERDTrainer`.",
    goals=(),
    prepare=prepare,
)
