"""What leaving out samples that are fooled already saves, where half of them are."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ferdlib.attacks import least_pgd_steps, pgd
from ferdlib.models import resnet18

from .harness import Goal, Group, Prepared, Settings
from .problems import Data, digits, train

EPOCHS, IMAGE_SIZE = 2, 32
TRAINING_EPS, TRAINING_STEPS = 0.1, 2
PGD_STEPS, LPS_STEPS = 20, 10
SHARE, TOLERANCE = 0.5, 0.05  # of the images that withstand PGD-20

ANY_FULL, ANY_EARLY = "PGD-20 at any iterate, full", "PGD-20 at any iterate, early stop"
LPS_FULL, LPS_EARLY = "least PGD steps, full", "least PGD steps, early stop"


def withstood(
    model: nn.Module, data: Data, eps: float, settings: Settings, *, early_stop: bool
) -> Tensor:
    """Which samples are classified correctly at each of x^(0)..x^(20), bool `(N,)`."""
    x, y = data
    correct = torch.ones_like(y, dtype=torch.bool)

    def judge(step: int, x_adv: Tensor, logits: Tensor) -> None:
        correct.logical_and_(logits.argmax(dim=1) == y)

    x_adv = pgd(
        model,
        x,
        y,
        eps=eps,
        step_size=eps / 4,
        steps=PGD_STEPS,
        rng=settings.noise(),
        on_step=None if early_stop else judge,  # an early stop returns the iterate that decides
        early_stop=early_stop,
    )
    with torch.no_grad():
        return correct & (model(x_adv).argmax(dim=1) == y)


def counted(
    model: nn.Module, data: Data, eps: float, settings: Settings, *, early_stop: bool
) -> Tensor:
    """The least PGD steps of each sample, int64 `(N,)`."""
    return least_pgd_steps(
        model,
        *data,
        eps=eps,
        step_size=eps / 4,
        steps=LPS_STEPS,
        rng=settings.noise(),
        early_stop=early_stop,
    )[1]


def half_fooling(model: nn.Module, data: Data, settings: Settings) -> tuple[float, float]:
    """The radius that half of the samples withstand, by bisection, and the share that does."""
    low, high = 0.0, 0.5
    for _ in range(14):
        eps = (low + high) / 2
        share = withstood(model, data, eps, settings, early_stop=True).float().mean().item()
        if abs(share - SHARE) <= TOLERANCE:
            return eps, share
        low, high = (eps, high) if share > SHARE else (low, eps)
    raise RuntimeError(f"expected a radius that about {SHARE:.0%} withstand, got {share:.0%}")


def prepare(settings: Settings) -> Prepared:
    torch.manual_seed(settings.seed)
    seen, held_out = (
        (F.interpolate(x, IMAGE_SIZE, mode="bilinear").repeat(1, 3, 1, 1), y)
        for x, y in digits(settings.seed, settings.device)
    )
    noise = settings.noise()
    attack = partial(
        pgd, eps=TRAINING_EPS, step_size=TRAINING_EPS / 2, steps=TRAINING_STEPS, rng=noise
    )
    model = resnet18(10).to(settings.device)
    model = settings.place(train(model, seen, epochs=EPOCHS, rng=noise, attack=attack))
    x, y = (tensor[: settings.batch_size] for tensor in held_out)
    data = settings.place(x), y
    eps, share = half_fooling(model, data, settings)
    attacked = {"model": model, "data": data, "eps": eps, "settings": settings}
    return Prepared(
        competitors={
            ANY_FULL: partial(withstood, **attacked, early_stop=False),
            ANY_EARLY: partial(withstood, **attacked, early_stop=True),
            LPS_FULL: partial(counted, **attacked, early_stop=False),
            LPS_EARLY: partial(counted, **attacked, early_stop=True),
        },
        note=f"At eps {eps:.4f}, {share:.0%} of {len(y)} held-out digits withstand PGD-20.",
        check=check,
    )


def check(outcomes: dict[str, Tensor]) -> str:
    for full, early in ((ANY_FULL, ANY_EARLY), (LPS_FULL, LPS_EARLY)):
        assert torch.equal(outcomes[full], outcomes[early]), f"{full} and {early} disagree"
    return "Flags and counts are the same with and without early stop."


GROUP = Group(
    about=(
        f"A ResNet-18 after {EPOCHS} epochs of adversarial training (PGD-{TRAINING_STEPS}, eps {TRAINING_EPS}) on "
        "digits of 32x32 pixels, at a radius that half of the images withstand: PGD-20 judged at any iterate, and "
        "least PGD steps of 10."
    ),
    goals=(
        Goal(ANY_FULL, "/", ANY_EARLY, ">=", 1.5),
        Goal(LPS_EARLY, "/", LPS_FULL, "<=", 0.65),
    ),
    prepare=prepare,
)
