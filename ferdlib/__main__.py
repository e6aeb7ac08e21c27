"""The command line: `ferdlib COMMAND ...`, `python -m ferdlib ...` or `torchrun -m ferdlib ...`."""

from __future__ import annotations

import importlib
import io
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any

from ferdlib.recipes import Stopped

# Each command's line in `ferdlib --help`, and the two examples at the end of its own.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "quickstart": (
        "FERD from end to end on digits, in minutes on a CPU",
        "ferdlib quickstart",
        "ferdlib quickstart --ablate --out runs/ablation --resume auto",
    ),
    "train": (
        "train or distil a robust model with labelled images",
        "ferdlib train --method trades --rule none --data cifar10 --download",
        "ferdlib train --method rslad --rule fair --data cifar10 --teacher runs/train/student.pt",
    ),
    "distill": (
        "distil a robust student without data (FERD)",
        "ferdlib distill --smoke",
        "ferdlib distill --teacher runs/train/student.pt --student mobilenet_v2 --preset paper",
    ),
    "evaluate": (
        "measure a model class by class under a published protocol",
        "ferdlib evaluate --checkpoint runs/quickstart/student.pt --data digits --eps 0.1",
        "ferdlib evaluate --factory mine:net --data GTSRB --num-classes 43 --image-size 32 32",
    ),
    "export": (
        "write a student as ONNX and torch.export files, checked",
        "ferdlib export --student runs/distill/student.pt --data cifar10",
        "ferdlib export --student runs/quickstart/student.pt --data digits --eps 0.1",
    ),
    "reproduce": (
        "compare methods over seeds in one table",
        "ferdlib reproduce --methods ard fair-ard --seeds 0 1",
        "ferdlib reproduce --measure val --out runs/choice",
    ),
}
SEVERAL = ("train", "distill", "evaluate")
RESUMABLE = ("quickstart", "train", "distill", "evaluate")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; wrong input ends with one sentence and a status other than 0."""
    for stream in (sys.stdout, sys.stderr):
        # A class may have a name that the terminal has no letters for.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help"):
        lines = (f"  {command:<12}{about[0]}" for command, about in COMMANDS.items())
        print("usage: ferdlib COMMAND [options]\n\n" + "\n".join(lines))
        print("\nferdlib COMMAND --help lists the options of a command.")
        return
    if name == "--version":
        print(importlib.import_module("ferdlib").__version__)
        return
    if name not in COMMANDS:
        _refuse("", f"expected a command of {', '.join(COMMANDS)}, got {name!r}")
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1" and name not in SEVERAL:
        several = ", ".join(SEVERAL)
        _refuse(name, f"expected a single process, got {processes}; {several} run on several")
    try:
        args = parse(name, rest)
        importlib.import_module(f"ferdlib.recipes.{name}").run(args)
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped {stop}; {_again(name, rest)}", flush=True)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        print(f"\nstopped; {_again(name, rest)}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        said = str(error) or type(error).__name__
        if processes != "1":
            # What one process finds, every one says.
            said = importlib.import_module("ferdlib._meeting").reason_to_end(said)
        _refuse(name, said)


def parse(name: str, argv: Sequence[str]) -> Any:
    """Read the options of a command; `--help` ends with two examples."""
    try:
        import tyro

        from ferdlib.recipes import options
    except ImportError as error:
        raise ImportError(
            f'expected the packages of the recipes, got {error}; pip install "ferdlib[recipes]"'
        ) from error
    kind = getattr(options, name.capitalize())
    default = options.distill_defaults(argv) if name == "distill" else tyro.MISSING_NONPROP
    try:
        return tyro.cli(
            kind,
            prog=f"ferdlib {name}",
            args=argv,
            default=default,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except SystemExit as stop:
        if not stop.code:
            print("examples:\n  " + "\n  ".join(COMMANDS[name][1:]))
        raise


def _again(name: str, argv: Sequence[str]) -> str:
    given = "--resume" in argv or name not in RESUMABLE
    more = [] if given else ["--resume"] if name == "evaluate" else ["--resume", "auto"]
    return f"go on: {shlex.join(['ferdlib', name, *argv, *more])}"


def _refuse(name: str, message: str) -> None:
    sentence = " ".join(message.split())
    sys.exit(f"ferdlib {name}: {sentence}".replace(" :", ":"))


if __name__ == "__main__":
    main()
