"""The trainer against plain epochs written from the paper and from its authors' release."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from reference_ferd import EpochRecord, paper_epoch, released_epoch
from tiny_ferd import SIZES, make_double_models

from ferdlib import losses
from ferdlib.trainer import FERDConfig, FERDTrainer

TINY = SIZES | {
    "generator_steps": 5,
    "generator_lr": 0.02,
    "bottleneck_steps": 8,
    "student_steps": 3,
    "attack_steps": 3,
    "margin_attack_steps": 4,
}
EPOCHS = {"paper": {"epochs": 2}, "released": {"epochs": 3, "warmup_epochs": 1}}
REFERENCES = {"paper": paper_epoch, "released": released_epoch}
# Under which some batch lacks a class, and an epoch's last batch is not always its best.
SEED = 20


def make_config(preset, **changes):
    return getattr(FERDConfig, preset)(**(TINY | EPOCHS[preset] | changes))


def run_trainer(preset, **changes):
    """The trainer, its epochs as records, and their non-robust fractions."""
    config = make_config(preset, **changes)
    trainer = FERDTrainer(
        *make_double_models(config.conditional_generator), config=config, seed=SEED
    )
    generator_losses, student_losses = [], []
    plain_loss, plain_step = losses.ferd_generator_loss, trainer.distill_step

    def recorded_loss(*args, **settings):
        total, parts = plain_loss(*args, **settings)
        generator_losses.append(total.item())
        return total, parts

    def recorded_step():
        loss = plain_step()
        student_losses.append(loss.item())
        return loss

    records, fractions = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "ferd_generator_loss", recorded_loss)
        patch.setattr(trainer, "distill_step", recorded_step)
        for stats in trainer.epochs():
            record = EpochRecord(
                generator_losses=generator_losses.copy(),
                class_probabilities=trainer.class_probabilities,
                student_losses=student_losses.copy(),
            )
            generator_losses.clear()
            student_losses.clear()
            records.append(record)
            fractions.append(stats.synthesis["nonrobust_fraction"])
    return trainer, records, fractions


@functools.cache
def run_reference(preset):
    """The student, the pool and the records of the plain epochs."""
    config = make_config(preset)
    teacher, student, generator = make_double_models(config.conditional_generator)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    rng = torch.Generator().manual_seed(SEED)
    p, pool, records = torch.full((3,), 1 / 3), [], []
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
        records.append(
            REFERENCES[preset](teacher, student, generator, config, rng, pool, p, optimizer)
        )
        p = records[-1].class_probabilities
    return student, pool, records


def flat(records, field):
    values = [torch.as_tensor(getattr(r, field), dtype=torch.float64) for r in records]
    return torch.cat(values)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_the_trainer_is_the_plain_algorithm(preset):
    trainer, ours, fractions = run_trainer(preset)
    student, pool, theirs = run_reference(preset)
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    for field in ("generator_losses", "class_probabilities", "student_losses"):
        close(flat(ours, field), flat(theirs, field))
    close(trainer.pool.column("images"), torch.cat(pool))
    close(trainer.student.state_dict(), student.state_dict())
    # Else mask, selection and absent classes would be compared where they do nothing.
    assert all(0 < fraction < 1 for fraction in fractions)
    assert any(r.generator_losses[-1] > min(r.generator_losses) for r in theirs)
    assert any(len(labels.unique()) < 3 for labels in trainer.pool.labels.split(12))
    steps = [len(record.student_losses) for record in theirs]
    assert steps == {"paper": [3, 3], "released": [0, 3, 3]}[preset]


@pytest.mark.parametrize(
    ("preset", "changes", "field"),
    [
        ("paper", {"adversarial_loss": "masked_kl"}, "generator_losses"),
        ("paper", {"bn_models": "teacher"}, "generator_losses"),
        ("paper", {"bottleneck_reduction": "mean"}, "generator_losses"),
        ("paper", {"mask_threshold": "batch"}, "generator_losses"),
        ("paper", {"selection": "last"}, "student_losses"),
        ("paper", {"reweight_temperature": 1.1}, "class_probabilities"),
        ("paper", {"absent_classes": "zero"}, "class_probabilities"),
        ("paper", {"attack_model": "student"}, "student_losses"),
        ("paper", {"gamma": 1.0}, "student_losses"),
        ("paper", {"clean_weight": 0.8}, "student_losses"),
        ("released", {"optimise_latents": False}, "generator_losses"),
        ("released", {"reset_generator": False}, "generator_losses"),
        ("released", {"adversarial_loss": "kl"}, "generator_losses"),
        ("released", {"mask_threshold": "sample"}, "generator_losses"),
        ("released", {"augment_synthesis": False}, "generator_losses"),
        ("released", {"margin_images": "stored"}, "class_probabilities"),
        ("released", {"absent_classes": "neutral"}, "class_probabilities"),
        ("released", {"augment": "crop"}, "student_losses"),
        ("released", {"gamma": 0.5}, "student_losses"),
        ("released", {"random_start": None}, "student_losses"),
    ],
)
def test_the_comparison_sees_every_choice(preset, changes, field):
    """A trainer under one other choice differs from the plain algorithm by more than the tolerance."""
    _, ours, _ = run_trainer(preset, **changes)
    _, _, theirs = run_reference(preset)
    assert (flat(ours, field) - flat(theirs, field)).abs().max() > 1e-4
