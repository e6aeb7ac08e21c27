"""Least PGD steps: how long each sample withstands an attack, counted on the attack's own forwards."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public
from ferdlib.attacks.ascent import (
    Ascent,
    Loss,
    Model,
    OnStep,
    RandomStart,
    Stop,
    leading,
    misclassified,
)
from ferdlib.losses import cross_entropy

COUNTS = ("first", "correct")


class StepCounter:
    r"""Count of the steps that fool the model, as the `on_step` of any attack (Fair-ARD Eq. 5, FERD Eq. 24).

    $$d = \min\{t \in 0..K-1 : f(x^{(t)}) \ne y\}, \text{ and } K \text{ if there is none}$$

    One counter is for one call of one attack, whose forwards it reads, so the count costs nothing. Of a
    model that returns a tuple it reads the first entry. With an attack's `early_stop` the labels must be
    those that decide there, too: the counter takes the samples that are left for those never fooled.

    Args:
        labels: int64 `(N,)` that decide what is wrong.
        steps: K >= 1 of the attack; x^(K) and later iterates are not counted.
        count: "first" is the paper's first crossing; "correct" is the number of x^(0)..x^(K-1) that are
            classified correctly, as Fair-ARD's release and GAIRAT count. They differ only where an
            iterate crosses back.

    Attributes:
        counts: int64 `(N,)` in `0..steps`, complete after the attack.

    Raises TypeError or ValueError, also for outputs that are not logits, or not of as many samples.

    Example:
        >>> from ferdlib.attacks import utae_pgd
        >>> def model(x):  # class 1 while the pixel is above 0.43
        ...     return torch.stack([torch.full((len(x),), 0.43), x[:, 0, 0, 0]], dim=1)
        >>> x, counter = torch.full((1, 1, 1, 1), 0.5), StepCounter(torch.tensor([1]), steps=10)
        >>> x_adv = utae_pgd(model, x, step_size=0.02, eps=0.1, random_start=None, on_step=counter)
        >>> counter.counts
        tensor([4])
    """

    @public
    def __init__(
        self, labels: Tensor, steps: int, *, count: Literal["first", "correct"] = "first"
    ) -> None:
        _checks.labels(labels=labels)
        _checks.integer(1, steps=steps)
        _checks.choice(COUNTS, count=count)
        self.labels, self.steps, self.count = labels, steps, count
        self.counts = torch.full_like(labels, steps if count == "first" else 0)

    @public
    def __call__(self, step: int, x_adv: Tensor, logits: Any) -> None:
        """Count x^(step), for which the model returned `logits`."""
        self.see(step, logits)

    def see(self, step: int, output: Any) -> None:
        """Count an iterate; for attacks that count under their own name in an error."""
        logits = leading(step, output)
        classes = logits.argmax(dim=1)
        if step == 0:
            _checks.labels(num_classes=logits.shape[1], labels=self.labels)
        # A method may show the last iterate too, which has no place in the count.
        if step >= self.steps:
            return
        rows = self._rows(len(classes))
        before, wrong = self.counts[rows], classes != self.labels[rows]
        # The value K stands for never fooled, so it can only be replaced once.
        if self.count == "correct":
            after = before + ~wrong
        else:
            after = torch.where(wrong & (before == self.steps), step, before)
        # Not in place: tensors made under `torch.inference_mode` could not be written to here.
        whole = len(classes) == len(self.labels)
        self.counts = after if whole else self.counts.index_put((rows,), after)

    def _rows(self, seen: int) -> Any:
        """The rows that an attack still asks about: with `early_stop`, those that were never wrong."""
        if seen == len(self.labels):
            return slice(None)
        left = (self.counts == self.steps).nonzero().squeeze(1)
        if len(left) != seen or self.count == "correct":
            wanted = f"{len(self.labels)} samples, {len(left)} are left"
            raise InvalidValue(f"expected `model(x)` of {wanted}, got {seen}")
        return left


@public
def least_pgd_steps(
    model: Model,
    x: Tensor,
    targets: Tensor,
    *,
    labels: Tensor | None = None,
    count: Literal["first", "correct"] = "first",
    loss: Loss = cross_entropy,
    eps: float | Tensor = 8 / 255,
    step_size: float | Tensor = 2 / 255,
    steps: int = 10,
    random_start: RandomStart = "uniform",
    bounds: tuple[float, float] = (0.0, 1.0),
    train_mode: bool = False,
    rng: torch.Generator | None = None,
    on_step: OnStep | None = None,
    early_stop: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""PGD with the least number of steps that fool the model (Fair-ARD Eq. 5, FERD Eq. 24).

    `pgd` under a `StepCounter`. The last iterate x^(K) is not evaluated, so "fooled by the last step" and
    "never fooled" are both K, as in the paper's Fig. 2. x^(0) is the random start. Other arguments and
    errors as in `pgd`.

    Args:
        model: returns logits `(N, K)`, or a tuple that begins with them.
        labels: int64 `(N,)` that decide what is wrong; default `targets`, when those are labels. So an
            attack on teacher logits can be counted too.
        steps, count: as for `StepCounter`.
        early_stop: leave a sample out after its first crossing, for the count alone, at less than the attack's
            price; the images are then those that decided, x^(d) or x^(K-1). Not for "correct", which goes on.

    Returns:
        The adversarial images of `pgd`, and the counts, int64 `(N,)` in `0..steps`.

    Example:
        >>> def model(x):  # class 1 while the pixel is above 0.43
        ...     return torch.stack([torch.full((len(x),), 0.43), x[:, 0, 0, 0]], dim=1)
        >>> x = torch.full((1, 1, 1, 1), 0.5)
        >>> least_pgd_steps(model, x, torch.tensor([1]), eps=0.1, step_size=0.02, random_start=None)[1]
        tensor([4])
    """
    _checks.choice(COUNTS, count=count)
    _checks.integer(1, steps=steps)
    ascent = Ascent(model, x, eps, step_size, steps, random_start, bounds, train_mode, rng)
    ascent.check_targets(targets)
    if labels is not None:
        _checks.labels(like=x, labels=labels)
    elif targets.is_floating_point():
        raise InvalidValue("expected `labels` beside `targets` that are not labels, got None")
    else:
        _checks.labels(like=x, targets=targets)
    _checks.callable_or_none(on_step=on_step)
    if early_stop and count == "correct":
        raise InvalidValue("expected no `early_stop` with `count` 'correct', got both")
    # The labels that decide, whatever the attack itself aims at.
    truth = targets if labels is None else labels
    counter = StepCounter(truth, steps, count=count)
    stop = _decided(truth, steps, train_mode) if early_stop else None

    def observe(step: int, x_adv: Tensor, output: Any) -> None:
        counter.see(step, output)
        if on_step is not None:
            on_step(step, x_adv, output)

    return ascent.run(loss, targets, observe, stop), counter.counts


def _decided(labels: Tensor, steps: int, train_mode: bool) -> Stop:
    """The early stop of a count: x^(K) is never counted, so no step need lead to it."""
    wrong = misclassified(labels, train_mode)
    return lambda step, rows, output: wrong(step, rows, output) | (step == steps - 1)
