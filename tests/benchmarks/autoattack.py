"""AutoAttack: ferdlib's run of the authors' attacks, and that of their own package."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from torch import Tensor, nn

from ferdlib.attacks import autoattack, pgd
from ferdlib.models import build_model, freeze_for_attack

from .harness import Competitor, Goal, Group, Prepared, Settings
from .problems import digits, train

SAMPLES = 500
TRAINING_EPS = {
    "small_cnn_16": 0.1,
    "wide_resnet_16_1": 0.05,
}  # weaker than the attack's, so that few
EPS = {"small_cnn_16": 0.2, "wide_resnet_16_1": 0.15}  # digits are left for its slow members
SIZES = {"small_cnn_16": 8, "wide_resnet_16_1": 16}
EPOCHS = 5

OURS, OFFICIAL = "ferdlib autoattack on the fast copy", "pyautoattack"


def prepare(settings: Settings) -> Prepared:
    competitors: dict[str, Competitor] = {}
    for name, side in SIZES.items():
        torch.manual_seed(settings.seed)
        seen, held_out = (
            (F.interpolate(x, side, mode="bilinear"), y)
            for x, y in digits(settings.seed, settings.device)
        )
        noise, radius = settings.noise(), TRAINING_EPS[name]
        attack = partial(pgd, eps=radius, step_size=radius / 2, steps=3, rng=noise)
        model = build_model(name, 10, in_channels=1).to(settings.device)
        model = train(model, seen, epochs=EPOCHS, rng=noise, attack=attack)
        x, y = (tensor[:SAMPLES] for tensor in held_out)
        attacked = {"x": x, "y": y, "eps": EPS[name], "seed": settings.seed}
        competitors[f"{OURS}, {name}"] = partial(ours, freeze_for_attack(model), **attacked)
        # FAB leaves gradients in its weights
        competitors[f"{OFFICIAL}, {name}"] = partial(official, copy.deepcopy(model), **attacked)
    return Prepared(competitors=competitors, check=check)


def ours(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
    return autoattack(model, x, y, num_classes=10, eps=eps, batch_size=SAMPLES, seed=seed).robust


def official(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
    suite = AutoAttack(model, device=x.device, eps=eps, seed=seed)
    return suite.run_standard_evaluation(x, y, batch_size=SAMPLES)[1] == y


def check(outcomes: dict[str, Tensor]) -> str:
    said = []
    for name in SIZES:
        robust = outcomes[f"{OURS}, {name}"]
        assert torch.equal(robust, outcomes[f"{OFFICIAL}, {name}"]), f"they disagree on {name}"
        said.append(f"{int(robust.sum())} of {len(robust)} digits withstand both on {name}")
    return f"{', '.join(said)}: the same ones."


GROUP = Group(
    about=(
        f"AutoAttack, version standard, on {SAMPLES} held-out digits in one batch: a small CNN of width 16 at 8x8 "
        f"pixels and eps {EPS['small_cnn_16']}, and a WideResNet-16-1 at 16x16 pixels and eps "
        f"{EPS['wide_resnet_16_1']}, after {EPOCHS} epochs of adversarial training, float32."
    ),
    goals=tuple(Goal(f"{OFFICIAL}, {name}", "/", f"{OURS}, {name}", ">=", 1.3) for name in SIZES),
    prepare=prepare,
)
