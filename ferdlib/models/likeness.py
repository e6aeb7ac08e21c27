"""How a copy is told from its model."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from numpy import random as numpy_random
from torch import Tensor, nn

# Functions that read and set the state of a random generator.
_State = tuple[Callable[[], Any], Callable[[Any], Any]]


def one_line(error: object, limit: int = 160) -> str:
    """Shorten another library's message."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class Draws:
    """The random generators that a forward can draw from, as they were."""

    def __init__(self, model: nn.Module) -> None:
        states: list[_State] = [
            (torch.get_rng_state, torch.set_rng_state),
            (random.getstate, random.setstate),
            (numpy_random.get_state, numpy_random.set_state),
        ]
        for device in {p.device for p in model.parameters() if p.device.type == "cuda"}:
            read = partial(torch.cuda.get_rng_state, device)
            states.append((read, partial(torch.cuda.set_rng_state, device=device)))
        for module in model.modules():
            for value in vars(module).values():
                if isinstance(value, torch.Generator):
                    states.append((value.get_state, value.set_state))
                elif isinstance(value, random.Random):
                    states.append((value.getstate, value.setstate))
                elif isinstance(value, numpy_random.Generator):
                    bits: Any = value.bit_generator
                    states.append(
                        (partial(getattr, bits, "state"), partial(setattr, bits, "state"))
                    )
        self._states = states
        self._first = [read() for read, _ in states]
        self._marks = self.marks()

    def marks(self) -> list[bytes]:
        """The states now, to be compared."""
        return [_mark(read()) for read, _ in self._states]

    def moved(self) -> bool:
        """True if something has been drawn."""
        return self.marks() != self._marks

    def rewind(self) -> None:
        """Give the generators their states back."""
        for (_, write), state in zip(self._states, self._first, strict=True):
            write(state)


def _mark(state: Any) -> bytes:
    return state.cpu().numpy().tobytes() if isinstance(state, Tensor) else pickle.dumps(state)
