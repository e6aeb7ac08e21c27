"""A model or its fast copy, whichever may be attacked."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from ferdlib._checks import InvalidValue
from ferdlib.models.freeze import FrozenModel, compare


class StandIn(nn.Module):
    """A model's fast copy for as long as that is the model, else the model itself.

    Decided on the first images, and again on the first after `due` was set; one log line says why not.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.copy: FrozenModel | None = None
        self.due, self._given_up, self._remade = True, False, False

    def forward(self, x: Tensor) -> Any:
        return self.at(x)(x)

    def at(self, x: Tensor) -> nn.Module:
        """Return the copy or the model, whichever these images shall go through."""
        if self.due and not self._given_up:
            self.due = False
            try:
                if self.copy is None:
                    self.copy = FrozenModel(self.model)
                compare(self.copy, self.model, x)
            except InvalidValue as error:
                self._give_up(error)
        return self.model if self.copy is None else self.copy

    def follow(self, *, compare: bool = False) -> None:
        """Take over the model's present weights; with `compare`, look at the next images again."""
        self.due |= compare
        if self.copy is None:
            return
        origin = self.copy._origin
        try:
            self.copy.follow(self.model)
        except ValueError as error:
            self._give_up(error)
            return
        again, self._remade = self._remade, self.copy._origin is not origin
        self.due |= self._remade
        # Tracing costs more than an attack.
        if again and self._remade:
            self._give_up("it has attributes that change at every step")

    def _give_up(self, reason: object) -> None:
        self._given_up, self.copy = True, None
        said = "no fast copy of %s: %s; it is attacked as it is"
        logging.getLogger("ferdlib").info(said, type(self.model).__name__, reason)
