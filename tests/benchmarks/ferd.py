"""FERD's epochs written to the letter, and those of `FERDTrainer`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ferdlib.models import build_model
from ferdlib.synthesis import Generator
from ferdlib.trainer import FERDConfig, FERDTrainer

from .harness import Competitor, Goal, Group, Prepared, Settings
from .problems import digits, train

PAPER, PAPER_OURS = "paper() written to the letter", "paper(), FERDTrainer"
RELEASED, RELEASED_OURS = "released() as the release does it", "released(), FERDTrainer"
SIZES: dict[str, Any] = {
    "num_classes": 10,
    "layer": "block3",
    "image_shape": (1, 32, 32),
    "epochs": 1,
    "warmup_epochs": 0,
    "batch_size": 16,
    "generator_steps": 15,
    "generator_width": 16,
    "student_steps": 30,
}
TEACHER, STUDENT = "wide_resnet_16_4", "wide_resnet_16_1"


def prepare(settings: Settings) -> Prepared:
    from ..reference_ferd import paper_epoch, released_epoch

    torch.manual_seed(settings.seed)
    (x, y), _ = digits(settings.seed, settings.device)
    seen = F.interpolate(x, SIZES["image_shape"][1:], mode="bilinear"), y
    teacher, student = (
        build_model(name, 10, in_channels=1).to(settings.device) for name in (TEACHER, STUDENT)
    )
    teacher = train(teacher, seen, epochs=1, rng=settings.noise())

    def models(config: FERDConfig) -> tuple[nn.Module, nn.Module, nn.Module]:
        labels = config.num_classes if config.conditional_generator else None
        torch.manual_seed(settings.seed)
        generator = Generator(config.image_shape, width=config.generator_width, num_classes=labels)
        return copy.deepcopy(teacher), copy.deepcopy(student), generator.to(settings.device)

    def ours(config: FERDConfig) -> list[float]:
        trainer = FERDTrainer(*models(config), config=config, seed=settings.seed)
        return [stats.student_loss for stats in trainer.epochs()]

    def letter(config: FERDConfig, epoch: Callable[..., Any]) -> list[float]:
        parts = models(config)
        rng, pool = torch.Generator().manual_seed(settings.seed), []
        optimizer = torch.optim.SGD(
            parts[1].parameters(),
            lr=config.student_lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
        p, found = torch.full((config.num_classes,), 1 / config.num_classes), []
        for _ in range(config.epochs):
            record = epoch(*parts, config, rng, pool, p, optimizer)
            schedule.step()
            p = record.class_probabilities
            found.append(sum(record.student_losses) / len(record.student_losses))
        return found

    paper, released = FERDConfig.paper(**SIZES), FERDConfig.released(**SIZES)
    competitors: dict[str, Competitor] = {
        PAPER: partial(letter, paper, paper_epoch),
        PAPER_OURS: partial(ours, paper),
        RELEASED: partial(letter, released, released_epoch),
        RELEASED_OURS: partial(ours, released),
    }
    return Prepared(competitors=competitors, check=check)


def check(outcomes: dict[str, list[float]]) -> str:
    """Rounding grows from step to step; in float64 tests/test_reference_ferd.py compares them one by one."""
    said = [f"{name} {losses[-1]:.4f}" for name, losses in outcomes.items()]
    return f"Mean student loss of the epoch: {', '.join(said)}."


GROUP = Group(
    about=(
        f"An epoch of FERD on 32x32 images, batches of {SIZES['batch_size']}, {SIZES['generator_steps']} "
        f"generator and {SIZES['student_steps']} student steps; teacher {TEACHER}, student {STUDENT}."
    ),
    goals=(
        Goal(PAPER, "/", PAPER_OURS, ">=", 5),
        Goal(RELEASED, "/", RELEASED_OURS, ">=", 1.3),
    ),
    prepare=prepare,
)
