"""What FERD's options that save work change in logits and examples, measured on held-out digits.

python -m tests.benchmarks.errors
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from ferdlib.attacks import pgd, utae_pgd
from ferdlib.augment import Crops
from ferdlib.losses import distillation
from ferdlib.models import create, freeze_for_attack
from ferdlib.trainer import FERDConfig

from .problems import digits, train

GAMMA = FERDConfig.paper(num_classes=10, layer="").gamma


@dataclass(frozen=True)
class Args:
    """Compare the teacher's logits and its uniform-target examples with and without each option."""

    architecture: str = "wide_resnet_16_1"
    """Of the teacher."""
    size: int = 32
    """Side of the images in pixels."""
    padding: int = 4
    """Of the crops, in pixels."""
    eps: float = 0.05
    """Radius of training and examples."""
    epochs: int = 3
    """Of the teacher's adversarial training."""
    seed: int = 0
    """Of all of it."""


def figures(args: Args) -> dict[str, float]:
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    seen, (x, _) = (
        (F.interpolate(images, args.size, mode="bilinear"), y)
        for images, y in digits(args.seed, "cpu")
    )
    ball = {"eps": args.eps, "step_size": args.eps / 4}
    attack = partial(pgd, **ball, steps=4, rng=rng)
    teacher = train(
        create(args.architecture, 10, in_channels=1),
        seen,
        epochs=args.epochs,
        rng=rng,
        attack=attack,
    )
    crops = Crops.draw(len(x), padding=args.padding, rng=rng)
    cropped = crops(x)
    ascend = partial(utae_pgd, teacher, gamma=GAMMA, **ball, steps=10, random_start=None)
    exact, joint = ascend(cropped), crops(ascend(x))
    with torch.no_grad():
        logits = teacher(cropped)
        one_by_one = torch.cat([teacher(image[None]) for image in cropped])
        folded = freeze_for_attack(teacher)(cropped)
        found = {
            "crops: largest difference of a logit": largest(logits - one_by_one),
            "fold_batchnorm: largest difference of a logit": largest(logits - folded),
            "largest logit": largest(logits),
            "joint: share of pixels that differ": float(
                ((exact - joint).abs() > 1e-6).float().mean()
            ),
        }
        for name, images in {"none": cropped, "exact": exact, "joint": joint}.items():
            made = teacher(images)
            uniform = distillation(made, torch.zeros_like(made))
            climbed = distillation(made, logits) - GAMMA * uniform
            found[f"what the attack climbs, {name}"] = float(climbed.mean())
    return found


def largest(values: Tensor) -> float:
    return float(values.abs().max())


if __name__ == "__main__":
    for name, value in figures(tyro.cli(Args)).items():
        print(f"{name}: {value:.3g}")
