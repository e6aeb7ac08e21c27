"""Whole jobs on top of the library, each a command of `ferdlib`: train, distill, evaluate, export and more.

`options` holds the options of every command, without torch; the module of a command's name does the work. Wrong
input is a ValueError, TypeError, OSError or RuntimeError before anything is written; the command line makes it one
sentence.
"""

__all__: list[str] = []


class Stopped(Exception):
    """A run that ended early, after a checkpoint.

    Args:
        place: where it stopped, in words.
        status: exit status of the process.
    """

    def __init__(self, place: str, status: int) -> None:
        super().__init__(place)
        self.status = status
