"""One attack of a protocol on one block of samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidState, InvalidValue, got, has_float64
from ferdlib._modes import ask, lent
from ferdlib.attacks import autoattack, pgd
from ferdlib.attacks.ascent import NORMAL_START_SCALE, Model, predicted, rounded_inside
from ferdlib.evaluation.protocols import AttackSpec
from ferdlib.evaluation.samples import Block, uniform_noise
from ferdlib.losses import cross_entropy, cw_margin

CustomAttack = Callable[[Any, Tensor, Tensor], Tensor]
OnBatch = Callable[[str, Tensor], None]
T = TypeVar("T")

# Words of an allocator that has no more memory: those of the accelerators, and of the CPU.
FULL = ("out of memory", "DefaultCPUAllocator")


@dataclass(frozen=True)
class Outcome:
    """Class that each sample was taken for under an attack, and the stage that fooled it.

    Both are int64 `(N,)` on the CPU. `fooled_at` counts in `stages`, the names of what a sample goes through: the
    iterates of PGD, the members of AutoAttack, else the attack alone. It is their number for a sample that
    withstood all.
    """

    predictions: Tensor
    fooled_at: Tensor
    stages: tuple[str, ...]


@dataclass
class Setting:
    """Everything that the attacks of a run share: the model in eval mode, and what is expected of it.

    `batch_size` is the number of samples at a time; it is halved where memory ends.
    """

    model: Model
    num_classes: int
    bounds: tuple[float, float]
    seed: int
    batch_size: int
    custom: Mapping[str, CustomAttack] = field(default_factory=dict)
    early_stop: bool = True
    # Samples by attack that it could not move: their gradients are zero.
    unmoved: dict[str, int] = field(default_factory=dict)

    def logits(self, x: Tensor, *, differentiable: bool = False) -> Tensor:
        """Logits of the images, checked."""
        with torch.set_grad_enabled(differentiable):
            logits = self.shaped(ask(self.model, x), len(x))
        # argmax finds a class for NaN too: without this a broken model would pass for a robust one.
        if bool(logits.isnan().any()):
            raise InvalidState("expected numbers as logits `model(x)`, got NaN")
        return logits

    def shaped(self, logits: Any, samples: int) -> Tensor:
        """Check the shape of logits; their values are not read, which would stall an accelerator."""
        shape = (samples, self.num_classes)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != shape:
            wanted = f"logits of shape (N, num_classes) = {shape}"
            raise InvalidValue(f"expected `model(x)` to be {wanted}, got {got(logits)}")
        return logits

    def over(self, block: Block, work: Callable[[Block], T]) -> list[T]:
        """Apply `work` to one batch after another; one that memory cannot hold is halved."""
        done, results = 0, []
        while done < len(block):
            batch = block[done : done + self.batch_size]
            try:
                results.append(work(batch))
                done += len(batch)
            except (RuntimeError, MemoryError) as error:
                # Other backends than CUDA raise a plain RuntimeError; NumPy and Python a MemoryError.
                full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
                full = full or any(words in str(error) for words in FULL)
                if len(batch) == 1 or not full:
                    raise
                self.batch_size = len(batch) // 2
                said = "out of memory with %d samples at a time; going on with %d"
                logging.getLogger("ferdlib").warning(said, len(batch), self.batch_size)
        return results


def clean(setting: Setting, block: Block) -> Outcome:
    """Judge the images as they are."""
    classes = setting.over(block, lambda batch: setting.logits(batch.x).argmax(dim=1))
    return _single(torch.cat(classes), block, "clean")


def attacked(
    setting: Setting, spec: AttackSpec, block: Block, on_batch: OnBatch | None = None
) -> Outcome:
    """Attack a block as the specification says; `on_batch` hears of AutoAttack's batches."""
    if spec.kind == "autoattack":
        return _autoattack(setting, spec, block, on_batch)
    attack = _custom if spec.kind == "custom" else _iterated
    parts = setting.over(block, lambda batch: attack(setting, spec, batch))
    predictions = torch.cat([part.predictions for part in parts])
    fooled_at = torch.cat([part.fooled_at for part in parts])
    return Outcome(predictions, fooled_at, parts[0].stages)


def on_survivors(
    setting: Setting, spec: AttackSpec, block: Block, before: Tensor, on_batch: OnBatch
) -> Outcome:
    """Attack what has withstood all `before`; a sample that fell keeps the class that it fell to."""
    # AutoAttack would spend a hundred passes on each sample that is fooled already.
    left = (before == block.targets.cpu()).nonzero().squeeze(1)
    found = attacked(setting, spec, block[left], on_batch)
    return Outcome(
        before.index_put((left,), found.predictions),
        torch.zeros_like(before).index_put((left,), found.fooled_at),
        ("before", *found.stages[1:]),
    )


def _iterated(setting: Setting, spec: AttackSpec, block: Block) -> Outcome:
    """PGD or CW from one start after another, each on the samples that withstood those before."""
    steps = spec.steps or 0
    device = block.x.device
    fooled_at = torch.full((len(block),), steps + 1, device=device)
    predictions = block.targets.clone()
    alive = torch.arange(len(block), device=device)
    for restart in range(spec.restarts):
        x, y = block.x[alive], block.targets[alive]
        begin = _start(spec, setting.seed, restart, block.index[alive.cpu()], x)
        path, still = _walk(setting, spec, x, y, begin)
        wrong = path != y
        # Of several largest, argmax finds the first.
        first = torch.where(wrong.any(dim=0), wrong.int().argmax(dim=0), steps + 1)
        fooled_at[alive] = torch.minimum(fooled_at[alive], first)
        if restart == 0:
            stood = int((still & ~wrong.any(dim=0)).sum())
            setting.unmoved[spec.name] = setting.unmoved.get(spec.name, 0) + stood
        last = first.clamp(max=steps) if spec.judge == "any" else torch.full_like(first, steps)
        predictions[alive] = path.gather(0, last[None]).squeeze(0)
        # A sample must withstand all starts, so that one is enough.
        alive = alive[predictions[alive] == y]
        if len(alive) == 0:
            break
    stages = tuple(f"x{t}" for t in range(steps + 1))
    return Outcome(predictions.cpu(), fooled_at.cpu(), stages)


def _walk(
    setting: Setting, spec: AttackSpec, x: Tensor, y: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Class of each iterate, `(steps + 1, N)`, and flags of the samples that ended where they began.

    Where any iterate decides, a sample is left out after the first misclassified one, and the label stands for
    the iterates that nobody looked at.
    """
    steps = spec.steps or 0
    stop = setting.early_stop and spec.judge == "any"
    path = y.repeat(steps + 1, 1)
    alive = torch.arange(len(y), device=y.device)

    begin = x

    def watch(step: int, x_adv: Tensor, output: Any) -> None:
        nonlocal alive, begin
        begin = x_adv if step == 0 else begin
        path[step, alive] = predicted(step, output)
        # `pgd` leaves out the same samples after this step.
        if stop:
            alive = alive[path[step, alive] == y[alive]]

    loss = partial(cw_margin, confidence=spec.confidence) if spec.kind == "cw" else cross_entropy
    x_adv = pgd(
        setting.model,
        x,
        y,
        loss=loss,
        eps=spec.eps,
        step_size=spec.step_size or 0.0,
        steps=steps,
        random_start=start,
        bounds=setting.bounds,
        on_step=watch,
        early_stop=stop,
    )
    begin = rounded_inside(begin, x, spec.eps, setting.bounds)
    still = (x_adv == begin).flatten(1).all(dim=1)
    if len(alive):
        path[steps, alive] = setting.logits(x_adv[alive]).argmax(dim=1)
    return path, still & (spec.eps > 0) & bool(spec.step_size)


def _start(spec: AttackSpec, seed: int, restart: int, index: Tensor, x: Tensor) -> Tensor | None:
    """x^(0) - x, whose noise is each sample's own."""
    if spec.start is None:
        return None
    # Drawn in float64, elsewhere where the images' device has none: the same noise on all.
    where = x.device if has_float64(x.device) else torch.device("cpu")
    noise = uniform_noise(seed, restart, index.to(where), x.shape[1:])
    if spec.start == "normal":
        noise = NORMAL_START_SCALE * torch.special.ndtri(noise)
    else:
        noise = spec.eps * (2 * noise - 1)
    return noise.float().to(x.device)


def _autoattack(
    setting: Setting, spec: AttackSpec, block: Block, on_batch: OnBatch | None
) -> Outcome:
    result = autoattack(
        setting.model,
        block.x,
        block.targets,
        num_classes=setting.num_classes,
        eps=spec.eps,
        version=spec.version,
        batch_size=spec.batch_size,
        seed=setting.seed,
        on_batch=on_batch,
    )
    # The flags are cumulative: a sample is fooled in the stage after the last that it withstood.
    fooled_at = torch.stack([robust.long() for robust in result.per_attack.values()]).sum(dim=0)
    return Outcome(result.predictions.cpu(), fooled_at.cpu(), tuple(result.per_attack))


def _custom(setting: Setting, spec: AttackSpec, block: Block) -> Outcome:
    classes = setting.logits(custom_images(setting, spec, block)).argmax(dim=1)
    return _single(classes, block, spec.name)


def custom_images(setting: Setting, spec: AttackSpec, block: Block) -> Tensor:
    """Run a function of the user, whose result is believed only inside ball and bounds."""
    attack = setting.custom[spec.name]
    # Copies: what an attack does in place shall not reach the images that it is judged by.
    with lent(setting.model, attack):
        x_adv = attack(setting.model, block.x.clone(), block.targets.clone())
    wanted = f"expected the attack {spec.name!r} to"
    if not isinstance(x_adv, Tensor) or x_adv.shape != block.x.shape:
        shape = tuple(block.x.shape)
        raise InvalidValue(f"{wanted} return images of shape {shape}, got {got(x_adv)}")
    x_adv = x_adv.detach().to(block.x)
    low, high = setting.bounds
    # Written so that a NaN is outside, too; the sum x + eps is rounded to a number of the images' size.
    change = float((x_adv - block.x).abs().max())
    if not change <= spec.eps + 1e-6 + torch.finfo(block.x.dtype).eps * max(-low, high):
        came = f"a change of {_checks.shown(change, spec.eps)}"
        raise InvalidValue(f"{wanted} stay within `eps` {spec.eps:g}, got {came}")
    if not bool(((x_adv >= low) & (x_adv <= high)).all()):
        raise InvalidValue(f"{wanted} stay {_checks.outside(x_adv, low, high)}")
    return x_adv


def _single(classes: Tensor, block: Block, stage: str) -> Outcome:
    """Outcome of a single stage."""
    return Outcome(classes.cpu(), (classes == block.targets).long().cpu(), (stage,))
