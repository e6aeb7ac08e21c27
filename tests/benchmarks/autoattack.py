"""AutoAttack: ferdlib's run of the authors' attacks, and that of their own package."""

from __future__ import annotations

import copy
from functools import partial

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from ferdlib.attacks import autoattack, pgd
from ferdlib.models import freeze_for_attack, small_cnn

from .harness import Goal, Group, Prepared, Settings
from .problems import digits, train

SAMPLES, BATCH_SIZE = 500, 250
EPS, WIDTH, EPOCHS = 0.2, 8, 15

OURS, FAST, OFFICIAL = "ferdlib autoattack", "ferdlib autoattack on the fast copy", "pyautoattack"


def prepare(settings: Settings) -> Prepared:
    torch.manual_seed(settings.seed)
    seen, held_out = digits(settings.seed, settings.device)
    noise = settings.noise()
    attack = partial(pgd, eps=EPS, step_size=EPS / 4, steps=7, rng=noise)
    model = small_cnn(1, 10, width=WIDTH).to(settings.device)
    model = train(model, seen, epochs=EPOCHS, rng=noise, attack=attack)
    x, y = (tensor[:SAMPLES] for tensor in held_out)
    theirs = copy.deepcopy(model)  # FAB leaves gradients in its weights

    fast = freeze_for_attack(model)

    def ours(attacked: nn.Module) -> Tensor:
        return autoattack(
            attacked, x, y, num_classes=10, eps=EPS, batch_size=BATCH_SIZE, seed=settings.seed
        ).robust

    def official() -> Tensor:
        suite = AutoAttack(theirs, device=x.device, eps=EPS, seed=settings.seed)
        return suite.run_standard_evaluation(x, y, batch_size=BATCH_SIZE)[1] == y

    competitors = {OURS: partial(ours, model), FAST: partial(ours, fast), OFFICIAL: official}
    return Prepared(competitors=competitors, check=check)


def check(outcomes: dict[str, Tensor]) -> str:
    robust = outcomes[OURS]
    for other in (FAST, OFFICIAL):
        assert torch.equal(robust, outcomes[other]), f"{OURS} and {other} disagree"
    return f"All find the same {int(robust.sum())} of {len(robust)} digits robust."


GROUP = Group(
    about=(
        f"AutoAttack, version standard, on {SAMPLES} held-out digits of 8x8 pixels, eps {EPS}, in batches of "
        f"{BATCH_SIZE}; a small CNN of width {WIDTH} after {EPOCHS} epochs of adversarial training, float32."
    ),
    goals=(Goal(OFFICIAL, "/", FAST, ">=", 1.3),),
    prepare=prepare,
)
