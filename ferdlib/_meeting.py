"""Words between processes through the store of `torch.distributed`, beside its collective calls.

A collective call has a timeout, and where one process does not come, the others learn only that. Here a process
waits for another one as long as that lives, and reads why it ended.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import time
from typing import Any

from torch import distributed

# Seconds after which a process that gives no sign of life is taken for dead.
TIMEOUT = 600.0
# Seconds between two signs of life.
BEAT = 5.0
# Seconds that a process which ends leaves the others to hear why.
FAREWELL = 5.0

_numbers = itertools.count()


class _Life(threading.Thread):
    """Signs of life of this process, and a last word, in the store of its group."""

    def __init__(self, store: Any, rank: int) -> None:
        super().__init__(name="ferdlib signs of life", daemon=True)
        self.store, self.rank = store, rank
        self._ended = threading.Event()

    def run(self) -> None:
        for beat in itertools.count():
            # The store is that of another process, which may have ended first.
            if not distributed.is_initialized() or not write(
                self.store, "life", self.rank, str(beat)
            ):
                return
            if self._ended.wait(BEAT):
                return

    def end(self) -> None:
        """Stop before the interpreter does, which must find no thread inside torch; say that this is the end."""
        self._ended.set()
        self.join(FAREWELL)
        write(self.store, "end", self.rank, _last_word)


_life: _Life | None = None
_last_word = ""


def sign_of_life() -> Any:
    """Begin to give signs of life, if that has not been done, and return the group's store."""
    global _life
    # Private, but there is no other way to a store that all processes of a group know.
    store = distributed.distributed_c10d._get_default_store()
    if _life is None or _life.store is not store:
        _life = _Life(store, distributed.get_rank())
        _life.start()
        atexit.register(_life.end)
    return store


def post(word: str | None = None, number: int | None = None) -> int:
    """Leave a word, if there is one, under the number of a meeting, or of the next one; return the number."""
    store = sign_of_life()
    number = next(_numbers) if number is None else number
    if word is not None:
        write(store, number, distributed.get_rank(), word)
    return number


def said_by(rank: int, number: int) -> str:
    """Wait for another process's word under this number, as long as that process lives."""
    store, pause = sign_of_life(), 0.001
    beat, since = None, time.monotonic()
    while (word := read(store, number, rank)) is None:
        reason = read(store, "end", rank)
        # What it said before it ended counts.
        if reason is not None and (word := read(store, number, rank)) is None:
            raise RuntimeError(f"rank {rank}: {reason or 'it has ended'}")
        now = read(store, "life", rank)
        if now != beat:
            beat, since = now, time.monotonic()
        if time.monotonic() - since > TIMEOUT:
            raise RuntimeError(f"rank {rank}: no sign of life for {TIMEOUT / 60:.0f} minutes")
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    return word


def meet(word: str = "") -> list[str]:
    """Wait for all processes, and return the word of each in order of rank; every process must call it."""
    number = post(word)
    return [said_by(rank, number) for rank in range(distributed.get_world_size())]


def reason_to_end(own: str) -> str:
    """Why this process ends: what another one found and ended with, or else its own reason, told to the others."""
    global _last_word
    if not distributed.is_initialized():
        return own
    store, rank = sign_of_life(), distributed.get_rank()
    others = [other for other in range(distributed.get_world_size()) if other != rank]
    reasons = {other: found for other in others if (found := read(store, "end", other))}
    _last_word = own
    write(store, "end", rank, own)
    if reasons:
        first = min(reasons)
        return own if own in reasons.values() else f"rank {first}: {reasons[first]}"
    # Whoever waits in `said_by` hears of it and ends, too.
    until = time.monotonic() + FAREWELL
    while time.monotonic() < until and any(read(store, "end", other) is None for other in others):
        time.sleep(0.05)
    return own


def write(store: Any, name: str | int, rank: int, word: str) -> bool:
    """Write a word of a process; False where the store is gone."""
    try:
        # Not every store knows an empty value.
        store.set(f"ferdlib/{name}/{rank}", f"={word}")
    except RuntimeError:
        return False
    return True


def read(store: Any, name: str | int, rank: int) -> str | None:
    """Read a word of a process, None if there is none; a store that is gone says that its process has ended."""
    key = f"ferdlib/{name}/{rank}"
    try:
        found: bytes | None = store.get(key) if store.check([key]) else None
    except RuntimeError:
        return "the process that kept the store has ended" if name == "end" else None
    return None if found is None else found.decode()[1:]
