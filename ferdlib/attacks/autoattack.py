"""The official AutoAttack (Croce & Hein 2020), class counts from 2 up, and no trace left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidState, InvalidValue, public
from ferdlib._modes import ask, borrowed, modules_behind
from ferdlib.attacks.ascent import Model, no_gradient, rounded_inside, warn_of_width
from ferdlib.attacks.lifted import lifted

OnBatch = Callable[[str, Tensor], None]

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}


@dataclass(frozen=True, slots=True)
class AutoAttackResult:
    """Result of `autoattack`.

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


@public
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

    Each attack runs on the samples that all before it left robust, with the authors' settings: the flags
    equal those of `pyautoattack.AutoAttack` with the same seed and batches. Its side effects are held off:
    the global random state, tracing functions, weight gradients and train/eval flags are left as they were.
    For K < 10 the targeted attacks aim at K - 1 classes; for K <= 3 the targeted DLR loss is undefined and
    `apgd-t` is left out, for K = 2 `apgd-dlr` too.

    Args:
        model: any callable from images to logits `(N, K)`. It is run in eval mode.
        x: float images `(N, C, H, W)` in [0, 1]; attacked in float32.
        targets: int64 labels `(N,)`.
        num_classes: K >= 2, the number of the model's logits.
        eps: radius > 0, in units of the images.
        version: "standard" (the published evaluation), "plus" or "rand" (for randomised models).
        batch_size: samples per batch. It changes the noise, and so may change single flags.
        seed: seed of the attacks' noise.
        on_batch: called as `on_batch(attack, robust)` after each batch of each attack, with its name and
            the flags so far, bool `(N,)`, which go on changing: copy what is to be kept.

    Returns:
        An `AutoAttackResult`; `result.robust.float().mean()` is the robust accuracy.

    Raises: as `pgd`, and ValueError for labels or logits that do not fit `num_classes`.

    Example:
        >>> def model(x):  # class 1 while the pixel is above 0.45
        ...     return torch.stack([torch.full((len(x),), 0.45), x[:, 0, 0, 0]], dim=1)
        >>> x = torch.tensor([0.5, 0.9]).reshape(2, 1, 1, 1)
        >>> autoattack(model, x, torch.tensor([1, 1]), num_classes=2, eps=0.1).robust
        tensor([False,  True])
    """
    _checks.callable_(model=model)
    _checks.integer(2, num_classes=num_classes)
    _checks.images((0.0, 1.0), x=x)
    _checks.labels(num_classes=num_classes, like=x, targets=targets)
    _checks.positive(eps=eps)
    _checks.choice(tuple(VERSIONS), version=version)
    _checks.integer(1, batch_size=batch_size)
    _checks.integer(0, seed=seed)
    _checks.callable_or_none(on_batch=on_batch)
    num_classes, batch_size, seed, eps = map(_checks.plain, (num_classes, batch_size, seed, eps))
    warn_of_width(eps, (0.0, 1.0))
    logits = _Logits(model, x.dtype)

    def classes(batch: Tensor) -> Tensor:
        z = logits(batch)
        # argmax finds a class for NaN too: without this a broken model would pass for a robust one.
        if bool(z.isnan().any()):
            raise InvalidState("expected numbers as logits `model(x)`, got NaN")
        if (k := z.shape[1]) != num_classes:
            wanted = f"{k}, the number of logits"
            raise InvalidValue(f"expected `num_classes` {wanted}, got {num_classes}")
        return z.argmax(dim=1)

    with torch.inference_mode(False), _held_off(x.device), borrowed(model), torch.no_grad():
        images, labels = _plain(x), targets.clone()
        clean = [classes(batch) for batch in images.split(batch_size) if len(batch)]
        predictions = torch.cat(clean) if clean else labels.clone()
        robust = predictions == labels
        x_adv, per_attack = x.detach().clone(), {"clean": robust.clone()}
        for attack, perturb in _attacks(logits, images, num_classes, eps, version, seed):
            for rows in robust.nonzero().squeeze(1).split(batch_size):
                # Splitting nothing gives one part without rows.
                if len(rows) == 0:
                    break
                found = perturb(images[rows], labels[rows]).detach()
                logits.check()
                # What is judged is what is returned, so it is rounded before and not after.
                found = rounded_inside(found, x[rows], eps, (0.0, 1.0))
                predicted = classes(found)
                fooled = predicted != labels[rows]
                x_adv[rows[fooled]] = found[fooled]
                predictions[rows[fooled]] = predicted[fooled]
                robust[rows[fooled]] = False
                if on_batch is not None:
                    on_batch(attack, robust)
            per_attack[attack] = robust.clone()
    return AutoAttackResult(x_adv, robust, per_attack, predictions)


def square(
    model: Model, x: Tensor, targets: Tensor, *, eps: float, queries: int, seed: int
) -> Tensor:
    """Flags of the samples that withstand AutoAttack's black-box member alone, bool `(N,)`."""
    from pyautoattack.square import SquareAttack

    with torch.inference_mode(False), _held_off(x.device), borrowed(model), torch.no_grad():
        images, logits = _plain(x), _Logits(model, x.dtype)
        attack: Any = SquareAttack(
            logits,
            n_queries=queries,
            eps=eps,
            norm="Linf",
            seed=seed,
            device=images.device,
            # The schedule is made for 5,000 queries, and is scaled to fewer.
            resc_schedule=True,
        )
        found = attack.perturb(images, targets.clone())
        robust = logits(found).argmax(dim=1) == targets
        logits.check()
        return robust


def _plain(x: Tensor) -> Tensor:
    """The images as pyautoattack, which takes views of them, must have them: float32 and contiguous."""
    return x.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)


class _Logits:
    """The model as pyautoattack takes it: float32 in and out, and no gradient but that of the images.

    Attributes:
        again: whether a forward is kept for several backwards, as untargeted FAB wants: one per class.
        broken: a flag, True where the model made NaN of finite numbers; `check` reads it.
    """

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self.model, self.dtype, self.again = model, dtype, False
        self.broken: Tensor | None = None

    def __call__(self, batch: Tensor) -> Tensor:
        if torch.is_grad_enabled() and batch.requires_grad:
            return _InputGradient.apply(batch, self)  # type: ignore[no-any-return]
        return self.forward(batch)

    def forward(self, batch: Tensor) -> Tensor:
        output = ask(self.model, batch.to(self.dtype))
        (z,) = _checks.logits(**{"model(x)": output})
        self.watch(z.detach().isnan().any() & batch.detach().isfinite().all())
        return lifted(output).float()  # type: ignore[no-any-return]

    def watch(self, broken: Tensor) -> None:
        """Remember a flag without reading it, which would stall an accelerator."""
        self.broken = broken if self.broken is None else self.broken | broken

    def check(self) -> None:
        """Refuse a model that broke: the attacks of pyautoattack take NaN for an attempt that failed."""
        if self.broken is not None and bool(self.broken):
            came = "NaN or infinity; look at `model(x)` here"
            raise InvalidState(f"expected finite logits and gradients, got {came}")


def _attacks(
    logits: _Logits,
    images: Tensor,
    num_classes: int,
    eps: float,
    version: str,
    seed: int,
) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """Attacks of the version by name, each set up as pyautoattack sets it up, reseeded per batch."""
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
    # The DLR loss divides by the gap to the third largest logit, its targeted form also to the fourth.
    undefined = {"apgd-t": num_classes < 4, "apgd-dlr": num_classes < 3}
    attacks = {"apgd-t": suite.apgd_targeted, "square": suite.square}
    for name in VERSIONS[version]:
        if undefined.get(name):
            continue
        if name.startswith("fab"):
            attack = suite.fab
            attack.targeted = name == "fab-t"
            attack.n_restarts = 1 if attack.targeted else attack.n_restarts
        else:
            attack = attacks.get(name, suite.apgd)
        if attack is suite.apgd:
            attack.loss = name.removeprefix("apgd-")
        logits.again = name == "fab" and not _compiled(logits.model)
        attack.seed = seed
        yield name, attack.perturb


def _compiled(model: Model) -> bool:
    """True of what torch.compile made: its backward frees what the forward kept, and runs once."""
    modules = [m for root in modules_behind(model) for m in root.modules()]
    marks = ("_torchdynamo_orig_callable", "_orig_mod", "_compiled_call_impl")
    return any(
        getattr(each, mark, None) is not None for each in (model, *modules) for mark in marks
    )


class _InputGradient(torch.autograd.Function):
    """A model whose weights `.backward()` cannot reach: FAB calls it, and a callable is not frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: _Logits) -> Tensor:
        ctx.model, ctx.x, ctx.logits = logits, x, None
        _InputGradient.run(ctx)
        return ctx.logits.detach()  # type: ignore[no-any-return]

    @staticmethod
    def run(ctx: Any) -> None:
        """Build the graph."""
        with torch.enable_grad():
            ctx.x = ctx.x.detach().requires_grad_()
            ctx.logits = ctx.model.forward(ctx.x)
        if not ctx.logits.requires_grad:
            raise no_gradient()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.logits is None:
            _InputGradient.run(ctx)
        keep = ctx.model.again
        (of_x,) = torch.autograd.grad(ctx.logits, ctx.x, gradient, keep, allow_unused=True)
        if of_x is None:
            raise no_gradient()
        ctx.logits = ctx.logits if keep else None
        ctx.model.watch(~of_x.isfinite().all() & gradient.isfinite().all())
        # pyautoattack takes views of it.
        return of_x.contiguous(), None


@contextmanager
def _held_off(device: torch.device) -> Iterator[None]:
    """Keep pyautoattack and torch's global settings apart: it seeds, and takes the usual defaults for granted."""
    dtype, default = torch.get_default_dtype(), torch.get_default_device()
    with _kept_random_state(), nullcontext() if default.type == "cpu" else device:
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """Give back the states of torch's global generators."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        else:
            # Their seed waits for CUDA to start; let the caller's come after it.
            torch.cuda.manual_seed_all(torch.initial_seed())
