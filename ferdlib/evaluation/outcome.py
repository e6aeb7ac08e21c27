"""What one attack of a protocol does to one block of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib.attacks import autoattack
from ferdlib.attacks.ascent import NORMAL_START_SCALE, Ascent, Model
from ferdlib.evaluation.batches import Batches
from ferdlib.evaluation.data import Block
from ferdlib.evaluation.noise import uniform
from ferdlib.evaluation.protocols import AttackSpec
from ferdlib.losses import cross_entropy, cw_margin

CustomAttack = Callable[[Any, Tensor, Tensor], Tensor]
OnBatch = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Outcome:
    """Per sample, int64 `(N,)` on the CPU: the class predicted under the attack, and when it was fooled.

    `fooled_at` counts in `stages`, the names of what a sample goes through: the iterates of PGD, the
    members of AutoAttack, otherwise the attack alone. It is their number for a sample that withstood all.
    """

    predictions: Tensor
    fooled_at: Tensor
    stages: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """What all attacks of a run share: the model in eval mode, and what is expected of it."""

    function: str
    model: Model
    num_classes: int
    bounds: tuple[float, float]
    seed: int
    batches: Batches
    custom: Mapping[str, CustomAttack]
    early_stop: bool = True

    def settle(self, x: Tensor) -> None:
        """Find the number of samples at a time, if that is still open."""
        self.batches.settle(lambda part: self.shaped(self.model(part), len(part)), x)

    def logits(self, x: Tensor) -> Tensor:
        """What the model says of the images."""
        with torch.no_grad():
            logits = self.shaped(self.model(x), len(x))
        # argmax finds a class for NaN too: without this a broken model would pass for a robust one.
        if bool(logits.isnan().any()):
            raise RuntimeError(f"{self.function}: expected numbers as logits `model(x)`, got NaN")
        return logits

    def classes(self, x: Tensor) -> Tensor:
        """What the model takes the images for."""
        return self.logits(x).argmax(dim=1)

    def shaped(self, logits: Any, samples: int) -> Tensor:
        """Logits of the expected shape; their values are not read, which would stall an accelerator."""
        shape = (samples, self.num_classes)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != shape:
            raise ValueError(
                f"{self.function}: expected `model(x)` to be logits of shape (N, num_classes) = {shape}, "
                f"got {_checks.got(logits)}"
            )
        return logits


def clean(setting: Setting, block: Block) -> Outcome:
    """Without an attack."""
    predicted = setting.batches.over(block, lambda batch: setting.classes(batch.x))
    return _whole(torch.cat(predicted), block, ("clean",))


def attacked(
    setting: Setting, spec: AttackSpec, block: Block, on_batch: OnBatch | None = None
) -> Outcome:
    """Under the attack that the specification describes."""
    if spec.kind == "autoattack":
        return _autoattack(setting, spec, block, on_batch)
    attack = _custom if spec.kind == "custom" else _iterated
    parts = setting.batches.over(block, lambda batch: attack(setting, spec, batch))
    return Outcome(
        torch.cat([part.predictions for part in parts]),
        torch.cat([part.fooled_at for part in parts]),
        parts[0].stages,
    )


def on_survivors(
    setting: Setting,
    spec: AttackSpec,
    block: Block,
    before: Tensor,
    on_batch: OnBatch | None = None,
) -> Outcome:
    """The attack on what has withstood all `before`; a sample that fell keeps the class that it fell to."""
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
        begin = starts(spec, setting.seed, restart, block.index[alive.cpu()], x)
        first, at_first, last = _walk(setting, spec, x, y, begin)
        fooled_at[alive] = torch.minimum(fooled_at[alive], first)
        predictions[alive] = (
            torch.where(first <= steps, at_first, y) if spec.judge == "any" else last
        )
        alive = alive[predictions[alive] == y]
        if len(alive) == 0:
            break
    stages = tuple(f"x{t}" for t in range(steps + 1))
    return Outcome(predictions.cpu(), fooled_at.cpu(), stages)


def _walk(
    setting: Setting, spec: AttackSpec, x: Tensor, y: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """First misclassified iterate (steps + 1 if none), the class found there, and that of the last one.

    Where any iterate decides, a sample is left out after the first misclassified one.
    """
    steps = spec.steps or 0
    stop = setting.early_stop and spec.judge == "any"
    path = y.repeat(steps + 1, 1)  # the class of each iterate; the label where nobody looked

    def watch(step: int, _: Tensor, logits: Any) -> None:
        torch.argmax(setting.shaped(logits, len(y)), dim=1, out=path[step])

    def decided(step: int, index: Tensor, logits: Any) -> Tensor:
        path[step, index] = setting.shaped(logits, len(index)).argmax(dim=1)
        return path[step, index] != y[index]

    def objective(logits: Tensor, labels: Tensor) -> Tensor:
        if spec.kind == "cw":
            return cw_margin(logits, labels, confidence=spec.confidence)
        return cross_entropy(logits, labels)

    step_size = spec.step_size or 0.0
    ascent = Ascent(setting.model, x, spec.eps, step_size, steps, start, setting.bounds)
    x_adv = ascent.run(objective, y, None if stop else watch, decided if stop else None)
    left = (path[:steps] == y).all(dim=0) if stop else torch.ones_like(y, dtype=torch.bool)
    if bool(left.any()):
        path[steps, left] = setting.classes(x_adv[left])
    wrong = path != y
    at = wrong.int().argmax(dim=0)  # of several largest the first
    first = torch.where(wrong.any(dim=0), at, steps + 1)
    return first, path.gather(0, at[None]).squeeze(0), path[steps]


def starts(spec: AttackSpec, seed: int, restart: int, index: Tensor, x: Tensor) -> Tensor | None:
    """x^(0) - x, whose noise is each sample's own."""
    if spec.start is None:
        return None
    noise = uniform(seed, restart, index.to(x.device), x.shape[1:])
    if spec.start == "normal":
        noise = NORMAL_START_SCALE * torch.special.ndtri(noise)
    else:
        noise = spec.eps * (2 * noise - 1)
    return noise.float()


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
    stages = tuple(result.per_attack)
    fooled_at = torch.stack([robust.long() for robust in result.per_attack.values()]).sum(dim=0)
    return Outcome(result.predictions.cpu(), fooled_at.cpu(), stages)


def _custom(setting: Setting, spec: AttackSpec, block: Block) -> Outcome:
    """A function of the user, whose result is believed only inside ball and bounds."""
    # Copies: what an attack does in place shall not reach the images that it is judged by.
    x_adv = setting.custom[spec.name](setting.model, block.x.clone(), block.targets.clone())
    low, high = setting.bounds
    if not isinstance(x_adv, Tensor) or x_adv.shape != block.x.shape:
        raise ValueError(
            f"{setting.function}: expected the attack {spec.name!r} to return images of shape "
            f"{tuple(block.x.shape)}, got {_checks.got(x_adv)}"
        )
    x_adv = x_adv.detach().to(block.x)
    change = float((x_adv - block.x).abs().max())
    if not change <= spec.eps + 1e-6:
        raise ValueError(
            f"{setting.function}: expected the attack {spec.name!r} to stay within `eps` {spec.eps:g}, got "
            f"a change of {change:g}"
        )
    if float(x_adv.min()) < low or float(x_adv.max()) > high:
        raise ValueError(
            f"{setting.function}: expected the attack {spec.name!r} to stay inside bounds "
            f"[{low:g}, {high:g}], got values in [{x_adv.min():g}, {x_adv.max():g}]"
        )
    return _whole(setting.classes(x_adv), block, (spec.name,))


def _whole(predicted: Tensor, block: Block, stages: tuple[str, ...]) -> Outcome:
    withstood = predicted == block.targets
    return Outcome(predicted.cpu(), withstood.long().cpu(), stages)
