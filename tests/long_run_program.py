"""A run to be killed by the tests: `long_run_program.py FOLDER EPOCHS` goes on, and writes student.pt."""

import sys
from pathlib import Path

import torch

from ferdlib.models import small_cnn
from ferdlib.trainer import Checkpoints, FERDConfig, FERDTrainer
from long_run import Stop, found, saved

TINY = {
    "num_classes": 3,
    "layer": "layer4",
    "image_shape": (1, 8, 8),
    "batch_size": 12,
    "generator_steps": 2,
    "generator_width": 4,
    "latent_dim": 5,
    "bottleneck_steps": 2,
    "student_steps": 4,
    "attack_steps": 2,
    "margin_attack_steps": 2,
    "crop_padding": 1,
}


def main(folder: Path, epochs: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher, student = small_cnn(1, 3, width=4), small_cnn(1, 3, width=2)
    trainer = FERDTrainer(
        teacher, student, config=FERDConfig(**TINY, epochs=epochs, warmup_epochs=1)
    )
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
    torch.save(student.state_dict(), folder / "student.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
