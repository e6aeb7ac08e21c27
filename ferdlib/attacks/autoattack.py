"""The official AutoAttack (Croce & Hein 2020), class counts from 2 up, and no trace left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib._modes import borrowed
from ferdlib.attacks.ascent import Model, rounded_inside

OnBatch = Callable[[str, Tensor], None]

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}


@dataclass(frozen=True, slots=True)
class AutoAttackResult:
    """What `autoattack` found.

    Attributes:
        x_adv: like the images; the adversarial example where one was found, else the image itself.
        robust: bool `(N,)`, correct on the clean image and under every attack.
        per_attack: for "clean" and each attack that ran, in order, bool `(N,)`: still robust after it
            (cumulative). Attacks that need more classes than there are do not appear.
        predictions: int64 `(N,)`, the class that the model gave `x_adv` when it was judged; the label
            where the sample is robust.
    """

    x_adv: Tensor
    robust: Tensor
    per_attack: dict[str, Tensor]
    predictions: Tensor


def autoattack(
    model: Model,
    x: Tensor,
    targets: Tensor,
    *,
    num_classes: int,
    eps: float = 8 / 255,
    version: Literal["standard", "plus", "rand"] = "standard",
    batch_size: int = 250,
    seed: int = 0,
    on_batch: OnBatch | None = None,
) -> AutoAttackResult:
    """AutoAttack in the L-infinity ball, by the authors' own attacks from `pyautoattack`.

    Each attack runs on the samples that all before it left robust, in batches of `batch_size`, with the
    authors' settings: the flags equal those of `pyautoattack.AutoAttack` with the same seed and batches.
    Held off are its defects: the global random state is restored, no tracing function is touched, weight
    gradients are not accumulated, train/eval flags come back, and few classes work. For K < 10 the targeted
    attacks aim at K - 1 classes; for K <= 3 the targeted DLR loss is undefined and `apgd-t` is left out,
    for K = 2 `apgd-dlr` too.

    Args:
        model: any callable from images to logits `(N, K)`. It is run in eval mode.
        x: float images `(N, C, H, W)` in [0, 1]; attacked in float32.
        targets: int64 labels `(N,)`.
        num_classes: K >= 2, the number of the model's logits.
        eps: radius > 0, in units of the images.
        version: "standard" (the published evaluation), "plus" or "rand" (for randomised models).
        batch_size: samples per batch. It changes the noise, and so may change single flags.
        seed: of the attacks' noise.
        on_batch: called as `on_batch(attack, robust)` after each batch of each attack, with its name and
            the flags so far, bool `(N,)`, which go on changing: copy what is to be kept.

    Returns:
        An `AutoAttackResult`; `result.robust.float().mean()` is the robust accuracy.

    Raises:
        TypeError: `x` is not a float tensor, or an argument has the wrong type.
        ValueError: images outside [0, 1], labels or logits that do not fit `num_classes`, an unknown version.
        RuntimeError: the model's logits are NaN.

    Example:
        >>> def model(x):  # class 1 while the pixel is above 0.45
        ...     return torch.stack([torch.full((len(x),), 0.45), x[:, 0, 0, 0]], dim=1)
        >>> x = torch.tensor([0.5, 0.9]).reshape(2, 1, 1, 1)
        >>> autoattack(model, x, torch.tensor([1, 1]), num_classes=2, eps=0.1).robust
        tensor([False,  True])
    """
    name = "autoattack"
    _checks.callable_(name, "model", model)
    _checks.integer(name, "num_classes", num_classes, low=2)
    _checks.images(name, x, bounds=(0.0, 1.0))
    _checks.labels(name, targets, length=x.shape[0], num_classes=num_classes, device=x.device)
    _checks.number(name, "eps", eps, low=0.0, open_low=True)
    _checks.choice(name, "version", version, tuple(VERSIONS))
    _checks.integer(name, "batch_size", batch_size, low=1)
    _checks.integer(name, "seed", seed, low=0)
    if on_batch is not None:
        _checks.callable_(name, "on_batch", on_batch)

    def forward(batch: Tensor) -> Tensor:
        output = model(batch.to(x.dtype))
        return _checks.logits(name, output, argument="model(x)").float()

    def logits(batch: Tensor) -> Tensor:
        if torch.is_grad_enabled() and batch.requires_grad:
            return _InputGradient.apply(batch, forward)  # type: ignore[no-any-return]
        return forward(batch)

    def classes(batch: Tensor) -> Tensor:
        z = logits(batch)
        # argmax finds a class for NaN too: without this a broken model would pass for a robust one.
        if bool(z.isnan().any()):
            raise RuntimeError(f"{name}: expected numbers as logits `model(x)`, got NaN")
        if z.shape[1] != num_classes:
            raise ValueError(
                f"{name}: expected `num_classes` to equal the model's number of logits "
                f"{z.shape[1]}, got {num_classes}"
            )
        return z.argmax(dim=1)

    with torch.inference_mode(False), _kept_random_state(), borrowed(model), torch.no_grad():
        images, labels = x.detach().float().clone(), targets.clone()
        clean = [classes(batch) for batch in images.split(batch_size) if len(batch)]
        predictions = torch.cat(clean) if clean else labels.clone()
        robust = predictions == labels
        x_adv, per_attack = x.detach().clone(), {"clean": robust.clone()}
        for attack, perturb in _attacks(logits, images, num_classes, eps, version, seed):
            for index in robust.nonzero().squeeze(1).split(batch_size):
                if len(index) == 0:  # what `split` makes of none
                    break
                found = perturb(images[index], labels[index]).detach()
                # What is judged is what is returned, so it is rounded before and not after.
                found = rounded_inside(found, x[index], eps, (0.0, 1.0))
                predicted = classes(found)
                fooled = predicted != labels[index]
                x_adv[index[fooled]] = found[fooled]
                predictions[index[fooled]] = predicted[fooled]
                robust[index[fooled]] = False
                if on_batch is not None:
                    on_batch(attack, robust)
            per_attack[attack] = robust.clone()
    return AutoAttackResult(x_adv, robust, per_attack, predictions)


def square(
    model: Model, x: Tensor, targets: Tensor, *, eps: float, queries: int, seed: int
) -> Tensor:
    """AutoAttack's black-box member alone, bool `(N,)`: which samples withstood so many queries."""
    from pyautoattack.square import SquareAttack

    with torch.inference_mode(False), _kept_random_state(), borrowed(model), torch.no_grad():
        images = x.detach().float().clone()

        def logits(batch: Tensor) -> Tensor:
            return _checks.logits("square", model(batch.to(x.dtype)), argument="model(x)").float()

        attack: Any = SquareAttack(
            logits,
            n_queries=queries,
            eps=eps,
            norm="Linf",
            seed=seed,
            device=images.device,
            resc_schedule=True,  # its schedule is made for 5,000
        )
        found = attack.perturb(images, targets.clone())
        return logits(found).argmax(dim=1) == targets


def _attacks(
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    num_classes: int,
    eps: float,
    version: str,
    seed: int,
) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """The version's attacks by name, each set up as pyautoattack sets it up, reseeded per batch."""
    from pyautoattack import AutoAttack
    from pyautoattack.checks import check_randomized, check_range_output

    suite: Any = AutoAttack(logits, device=images.device, eps=eps, version=version, seed=seed)
    suite.apgd_targeted.n_target_classes = min(9, num_classes - 1)
    suite.fab.n_target_classes = min(9, num_classes - 1)
    log = logging.getLogger("ferdlib")
    if len(images):
        if version != "rand":
            check_randomized(logits, images[:1], images.new_zeros(1).long(), logger=log)
        check_range_output(logits, images[:1], logger=log)
    undefined = (
        {"apgd-t"} if num_classes == 3 else {"apgd-t", "apgd-dlr"} if num_classes < 3 else set()
    )
    for name in VERSIONS[version]:
        if name in undefined:
            continue
        if name.startswith("fab"):
            suite.fab.targeted = name == "fab-t"
            suite.fab.n_restarts = 1 if suite.fab.targeted else suite.fab.n_restarts
            attack = suite.fab
        elif name == "apgd-t":
            attack = suite.apgd_targeted
        elif name == "square":
            attack = suite.square
        else:
            attack = suite.apgd
            attack.loss = name.removeprefix("apgd-")
        attack.seed = seed
        yield name, attack.perturb


class _InputGradient(torch.autograd.Function):
    """A model whose weights `.backward()` cannot reach: FAB calls it, and a callable is not frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.logits = model(ctx.x)
        return ctx.logits.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # FAB differentiates one forward once per class.
        (of_x,) = torch.autograd.grad(ctx.logits, ctx.x, gradient, retain_graph=True)
        return of_x, None


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """The attacks of pyautoattack seed torch's global generators; give the caller's states back."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        else:  # their seed waits for CUDA to start; let the caller's come after it
            torch.cuda.manual_seed_all(torch.initial_seed())
