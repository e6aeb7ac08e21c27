"""A run to be killed by the tests: `long_run_program.py FOLDER EPOCHS` goes on, and writes student.pt."""

import sys
from pathlib import Path

import torch
from tiny_ferd import SIZES, make_trainer

from ferdlib.trainer import Checkpoints
from long_run import Stop, found, saved

TINY = SIZES | {"warmup_epochs": 1, "generator_steps": 2, "bottleneck_steps": 2, "student_steps": 4}


def main(folder: Path, epochs: int) -> None:
    torch.set_num_threads(1)
    trainer = make_trainer(TINY, epochs=epochs)
    checkpoints = Checkpoints(folder / "checkpoints")
    state = found(checkpoints, "auto", {"trainer"})
    if state is not None:
        trainer.load_state_dict(state["trainer"])
    print("begins after", trainer.epoch, flush=True)
    with Stop() as stop:
        for stats in saved(
            trainer,
            lambda stop: trainer.epochs(stop=stop),
            lambda: {"trainer": trainer.state_dict()},
            checkpoints=checkpoints,
            every=1,
            stop=stop,
        ):
            print("epoch", stats.epoch, flush=True)
    if trainer.epoch < epochs:
        stop.leave(f"after epoch {trainer.epoch}")
    torch.save(trainer.student.state_dict(), folder / "student.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
