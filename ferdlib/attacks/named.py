"""The named attacks: each one is a loss, a start and a step rule on the engine's ascent."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib._modes import borrowed
from ferdlib.attacks.engine import (
    Loss,
    Model,
    OnStep,
    RandomStart,
    ascend,
    check_early_stop,
    misclassified,
)
from ferdlib.losses import cross_entropy, cw_margin, distillation, uniformity


def fgsm(
    model: Model,
    x: Tensor,
    targets: Tensor,
    *,
    loss: Loss = cross_entropy,
    eps: float | Tensor = 8 / 255,
    random_start: RandomStart = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    train_mode: bool = False,
    rng: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    r"""Fast gradient sign method, $x + \epsilon \, \mathrm{sign} \nabla_x \ell(f(x), y)$ (Goodfellow et al. 2015).

    `pgd` with one step of `eps`. The textbook attack has no random start; Fair-ARD's evaluation code
    uses `random_start="normal"`.

    Args:
        model, x, targets, loss, eps, random_start, bounds, train_mode, rng, on_step: as in `pgd`.

    Returns:
        Adversarial images like `x`, detached.

    Raises:
        TypeError, ValueError, RuntimeError: as `pgd`.

    Example:
        >>> def model(x):
        ...     return torch.stack([torch.zeros(len(x)), x[:, 0, 0, 0]], dim=1)
        >>> fgsm(model, torch.full((1, 1, 1, 2), 0.5), torch.tensor([1]), eps=0.1)
        tensor([[[[0.4000, 0.5000]]]])
    """
    return ascend(
        "fgsm",
        model,
        x,
        targets,
        loss=loss,
        eps=eps,
        step_size=eps,
        steps=1,
        random_start=random_start,
        bounds=bounds,
        train_mode=train_mode,
        rng=rng,
        on_step=on_step,
    )


def cw_linf(
    model: Model,
    x: Tensor,
    targets: Tensor,
    *,
    confidence: float = 50.0,
    eps: float | Tensor = 8 / 255,
    step_size: float | Tensor = 2 / 255,
    steps: int = 20,
    random_start: RandomStart = "uniform",
    bounds: tuple[float, float] = (0.0, 1.0),
    train_mode: bool = False,
    rng: torch.Generator | None = None,
    on_step: OnStep | None = None,
    early_stop: bool = False,
) -> Tensor:
    r"""CW-inf as the distillation papers use it: PGD on the Carlini-Wagner margin, `losses.cw_margin`.

    The defaults are those of Fair-ARD's evaluation. It is not the original attack of Carlini and Wagner,
    which searches for the smallest perturbation.

    Args:
        confidence: $\kappa \ge 0$; the attack gains until the best other logit leads by it.
        model, x, targets, eps, step_size, steps, random_start, bounds, train_mode, rng, on_step, early_stop:
            as in `pgd`; targets are labels.

    Returns:
        Adversarial images like `x`, detached.

    Raises:
        TypeError, ValueError, RuntimeError: as `pgd`; ValueError for a negative confidence.

    Example:
        >>> def model(x):
        ...     return torch.stack([torch.zeros(len(x)), x[:, 0, 0, 0]], dim=1)
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> cw_linf(model, x, torch.tensor([1]), eps=0.1, random_start=None)
        tensor([[[[0.4000, 0.5000]]]])
    """
    kappa = _checks.number("cw_linf", "confidence", confidence, low=0.0)

    def objective(logits: Tensor, labels: Tensor) -> Tensor:
        return cw_margin(logits, labels, confidence=kappa)

    return ascend(
        "cw_linf",
        model,
        x,
        targets,
        loss=objective,
        eps=eps,
        step_size=step_size,
        steps=steps,
        random_start=random_start,
        bounds=bounds,
        train_mode=train_mode,
        rng=rng,
        on_step=on_step,
        settled=misclassified("cw_linf", targets, train_mode) if early_stop else None,
    )


def utae_pgd(
    model: Model,
    x: Tensor,
    reference_logits: Tensor | None = None,
    *,
    gamma: float = 0.5,
    eps: float | Tensor = 8 / 255,
    step_size: float | Tensor = 2 / 255,
    steps: int = 10,
    random_start: RandomStart = "normal",
    bounds: tuple[float, float] = (0.0, 1.0),
    train_mode: bool = False,
    rng: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    r"""Uniform-target adversarial examples (FERD Eq. 10).

    $$x_U^{t+1} = \Pi\left(x_U^t + \alpha \, \mathrm{sign} \nabla_{x_U^t}
      \left[KL(p_{ref} \| f(x_U^t)) - \gamma KL(U \| f(x_U^t))\right]\right)$$

    Away from the reference, yet towards no class in particular. `utae_pgd(teacher, x, random_start=None)`
    is Eq. 10 to the letter; `utae_pgd(student, x, teacher(x))` attacks the student that is trained, as
    RSLAD does, and is what `FERDTrainer` uses. With `gamma=0` and without a start away from x, a model
    that is its own reference gives no gradient but rounding noise, and the attack is none.

    Args:
        model: the attacked model, any callable from images to logits `(N, K)`.
        reference_logits: `(N, K)`, the prediction to move away from; None takes the model's own on x,
            in eval mode and without noise.
        gamma: weight $\gamma \ge 0$ of the uniform-target term; 0 is the inner attack of RSLAD.
        x, eps, step_size, steps, random_start, bounds, train_mode, rng, on_step: as in `pgd`.

    Returns:
        Adversarial images like `x`, detached.

    Raises:
        TypeError, ValueError, RuntimeError: as `pgd`; ValueError for a negative gamma.

    Example:
        >>> def model(x):
        ...     return torch.stack([torch.zeros(len(x)), x[:, 0, 0, 0]], dim=1)
        >>> x, teacher_logits = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[0.0, 4.0]])
        >>> utae_pgd(model, x, teacher_logits, eps=0.1, step_size=0.05, random_start=None)
        tensor([[[[0.4000, 0.5000]]]])
    """
    weight = _checks.number("utae_pgd", "gamma", gamma, low=0.0)
    if reference_logits is None:
        _checks.callable_("utae_pgd", "model", model)
        _checks.images("utae_pgd", x)
        with torch.no_grad(), borrowed(model):
            reference_logits = model(x)
    reference_logits = _checks.logits(
        "utae_pgd", reference_logits, argument="reference_logits"
    ).detach()

    def objective(logits: Tensor, reference: Tensor) -> Tensor:
        return distillation(logits, reference) - weight * uniformity(logits)

    return ascend(
        "utae_pgd",
        model,
        x,
        reference_logits,
        loss=objective,
        eps=eps,
        step_size=step_size,
        steps=steps,
        random_start=random_start,
        bounds=bounds,
        train_mode=train_mode,
        rng=rng,
        on_step=on_step,
        aim="reference_logits",
    )


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
    r"""PGD that counts its least number of steps to fool the model (Fair-ARD Eq. 5, FERD Eq. 24).

    $$d = \min\{t \in 0..K-1 : f(x^{(t)}) \ne y\}, \text{ and } K \text{ if there is none}$$

    The count costs nothing: it reads the K forwards that the attack makes anyway. The last iterate
    x^(K) is not evaluated, so "fooled by the last step" and "never fooled" are both K, as in the
    paper's Fig. 2. x^(0) is the random start.

    Args:
        labels: int64 `(N,)` that decide what is wrong; default `targets`, when those are labels. So an
            attack on teacher logits can be counted too.
        count: "first" is the paper's first crossing; "correct" is the number of x^(0)..x^(K-1) that
            are still classified correctly, as Fair-ARD's release and GAIRAT count. They differ only
            where an iterate crosses back.
        steps: K >= 1.
        early_stop: leave a sample out after its first crossing, for the count alone, at less than the attack's
            price; the images are then those that decided, x^(d) or x^(K-1). Not for "correct", which goes on.
        model, x, targets, loss, eps, step_size, random_start, bounds, train_mode, rng, on_step: as in
            `pgd`; the model returns logits `(N, K)`.

    Returns:
        The adversarial images of `pgd`, and the counts, int64 `(N,)` in `0..steps`.

    Raises:
        TypeError, ValueError, RuntimeError: as `pgd`; ValueError if `targets` are not labels and none
            are given, for an unknown count, or for `early_stop` with "correct" or with `train_mode`.

    Example:
        >>> def model(x):  # class 1 while the pixel is above 0.43
        ...     return torch.stack([torch.full((len(x),), 0.43), x[:, 0, 0, 0]], dim=1)
        >>> x = torch.full((1, 1, 1, 1), 0.5)
        >>> least_pgd_steps(model, x, torch.tensor([1]), eps=0.1, step_size=0.02, random_start=None)[1]
        tensor([4])
    """
    function = "least_pgd_steps"
    _checks.choice(function, "count", count, ("first", "correct"))
    _checks.integer(function, "steps", steps, low=1)
    _checks.tensor(function, "targets", targets)
    if on_step is not None:
        _checks.callable_(function, "on_step", on_step)
    argument = "targets" if labels is None else "labels"
    if labels is None:
        if targets.is_floating_point():
            raise ValueError(
                f"{function}: expected `labels` beside `targets` that are not labels, got None"
            )
        labels = targets
    _checks.images(function, x)
    truth = _checks.labels(function, labels, length=x.shape[0], device=x.device, argument=argument)
    if early_stop and count == "correct":
        raise ValueError(
            f"{function}: expected no `early_stop` with `count` 'correct', which goes on after the first "
            f"crossing, got both"
        )
    if early_stop:
        check_early_stop(function, train_mode)
    # Notation: left, the samples still attacked; alive, which have not been wrong so far; counts, d.
    with torch.inference_mode(
        False
    ):  # they are written to inside the attack, which runs without it
        left = torch.arange(len(x), device=x.device)
        counts = torch.zeros_like(left)
        alive = torch.ones_like(left, dtype=torch.bool)

    def observe(step: int, x_adv: Tensor, logits: Any) -> None:
        z = _checks.logits(function, logits, argument="model(x)")
        if step == 0:
            _checks.labels(function, truth, num_classes=z.shape[1], argument=argument)
        correct = z.argmax(dim=1) == truth[left]
        if count == "first":
            alive[left] = correct = alive[left] & correct
        counts[left] += correct
        if on_step is not None:
            on_step(step, x_adv, logits)

    def settled(step: int, index: Tensor, logits: Any) -> Tensor:
        nonlocal left
        left = index[alive[index]]
        # Of the last iterate nobody asks: x^(K) is not counted.
        return ~alive[index] if step < steps - 1 else torch.ones_like(index, dtype=torch.bool)

    x_adv = ascend(
        function,
        model,
        x,
        targets,
        loss=loss,
        eps=eps,
        step_size=step_size,
        steps=steps,
        random_start=random_start,
        bounds=bounds,
        train_mode=train_mode,
        rng=rng,
        on_step=observe,
        settled=settled if early_stop else None,
    )
    return x_adv, counts
