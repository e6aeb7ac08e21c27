"""PGD on a ResNet-18: what it costs over the gradients alone, and what others take for it."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ferdlib.attacks import least_pgd_steps, pgd
from ferdlib.models import freeze_for_attack, resnet18

from .harness import Competitor, Goal, Group, Prepared, Settings, available

EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 5

BARE = "bare forward and input gradient"
PGD, PGD_FAST = "ferdlib pgd", "ferdlib pgd on the fast copy"
PGD_COMPILED = "ferdlib pgd on the fast copy, compiled"
LPS = "ferdlib least_pgd_steps"
TORCHATTACKS, FOOLBOX = "torchattacks PGD", "foolbox LinfPGD"


def prepare(settings: Settings) -> Prepared:
    torch.manual_seed(settings.seed)
    x = settings.place(torch.rand(settings.batch_size, 3, 32, 32))
    y = torch.randint(10, (settings.batch_size,)).to(settings.device)
    model = settings.place(resnet18(10)).eval()

    def bare() -> Competitor:
        frozen = copy.deepcopy(model).requires_grad_(False)
        images = x.clone().requires_grad_()

        def run() -> None:
            for _ in range(STEPS):
                torch.autograd.grad(F.cross_entropy(frozen(images), y), images)

        return run

    def ours(attacked: nn.Module) -> Competitor:
        return partial(pgd, attacked, x, y, eps=EPS, step_size=STEP_SIZE, steps=STEPS)

    def ours_compiled() -> Competitor:
        fast = freeze_for_attack(model, compile=True)
        try:
            fast(x)
        except RuntimeError as error:  # of torch, where there is no C++ compiler
            raise ImportError(f"torch.compile fails: {str(error).splitlines()[0]}") from error
        return ours(fast)

    # The others leave gradients in the weights, or differentiate for them: each has a model of its own.
    def torchattacks_pgd() -> Competitor:
        import torchattacks

        attack = torchattacks.PGD(copy.deepcopy(model), eps=EPS, alpha=STEP_SIZE, steps=STEPS)
        return partial(attack, x, y)

    def foolbox_pgd() -> Competitor:
        import foolbox

        wrapped = foolbox.PyTorchModel(copy.deepcopy(model), bounds=(0, 1), device=settings.device)
        attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=STEPS, random_start=True)
        return partial(attack, wrapped, x, y, epsilons=EPS)

    builders = {
        BARE: bare,
        PGD: partial(ours, model),
        LPS: partial(
            partial, least_pgd_steps, model, x, y, eps=EPS, step_size=STEP_SIZE, steps=STEPS
        ),
        PGD_FAST: lambda: ours(freeze_for_attack(model)),
        PGD_COMPILED: ours_compiled,
        TORCHATTACKS: torchattacks_pgd,
        FOOLBOX: foolbox_pgd,
    }
    return Prepared(*available(builders))


GROUP = Group(
    about=(
        f"PGD of {STEPS} steps from a uniform start on a ResNet-18 in eval mode, 32x32 images, eps 8/255. "
        "Weights require gradients, as a fresh model's do, but for the bare loop and the fast copies, which "
        "are made, and compiled, before the timing."
    ),
    goals=(
        Goal(PGD, "/", BARE, "<=", 1.03),
        Goal(LPS, "/", PGD, "<=", 1.03),
        Goal(TORCHATTACKS, "/", PGD_FAST, ">=", 1.5),
        Goal(FOOLBOX, "/", PGD_FAST, ">=", 2.8),
    ),
    prepare=prepare,
)
