"""A run to be killed by the tests: `long_run_program.py FOLDER EPOCHS` goes on, and writes student.pt."""

import sys
from pathlib import Path

import torch
from tiny_ferd import SIZES, make_trainer

from ferdlib.trainer import Checkpoints

TINY = SIZES | {"warmup_epochs": 1, "generator_steps": 2, "bottleneck_steps": 2, "student_steps": 4}


def main(folder: Path, epochs: int) -> None:
    torch.set_num_threads(1)
    trainer = make_trainer(TINY, epochs=epochs)
    checkpoints = Checkpoints(folder / "checkpoints")
    if latest := checkpoints.latest():
        trainer.load_state_dict(latest[1])
    print("begins after", trainer.epoch, flush=True)
    for stats in trainer.epochs():
        checkpoints.save(trainer.state_dict(), trainer.epoch)
        print("epoch", stats.epoch, flush=True)
    torch.save(trainer.student.state_dict(), folder / "student.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
