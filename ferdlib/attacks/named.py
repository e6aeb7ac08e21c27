"""The named attacks: a loss, a start and a step rule on the ascent."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public
from ferdlib._modes import ask, borrowed, logits_of
from ferdlib.attacks.ascent import Ascent, Loss, Model, OnStep, RandomStart, misclassified
from ferdlib.attacks.lifted import of_divergence
from ferdlib.losses import _kernels, cross_entropy, cw_margin


@public
def pgd(
    model: Model,
    x: Tensor,
    targets: Tensor,
    *,
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
) -> Tensor:
    r"""Projected gradient ascent on `loss` in an L-infinity ball (Madry et al. 2018; Fair-ARD Eq. 5).

    $$x^{(t+1)} = \Pi_{B_\epsilon(x) \cap [lo, hi]}\left(x^{(t)}
      + \alpha \, \mathrm{sign} \nabla_{x^{(t)}} \ell(f(x^{(t)}), y)\right)$$

    Returns the last iterate, after exactly `steps` forward and input-gradient passes. With `early_stop`
    each sample's first misclassified iterate is returned instead, and the sample costs nothing after it:
    a returned image that is classified correctly means that the attack failed at all of x^(0)..x^(K).

    The model runs in eval mode and is given back as it was. So do the modules behind a callable: those that
    a function reads, the object of a bound method, the parts of a `functools.partial`. One that Python does
    not show, in a dict or behind a server, runs as it is. The attack works under `torch.no_grad`, autocast and
    `torch.inference_mode`.

    Args:
        model: any callable from images to what `loss` takes first; for the built-in losses logits `(N, K)`,
            or an output that has them as `logits`. Normalisation lives inside it.
        x: float images `(N, C, H, W)` inside `bounds`.
        targets: whatever `loss` takes second: int64 labels `(N,)`, or reference logits `(N, K)`.
        loss: called as `loss(model(x_adv), targets)`; its sum over samples is ascended. Turn the sign of
            a loss that should fall.
        eps: radius $\epsilon \ge 0$ in units of the images, a number or one per sample `(N,)`.
        step_size: $\alpha \ge 0$ in the same units, a number or one per sample `(N,)`.
        steps: number of updates; 0 returns the (projected) start.
        random_start: "uniform" in the ball, "normal" for 0.001 * N(0, 1), None for x itself, or a
            tensor x0 - x of x's shape. Every start is projected to the ball and the bounds.
        bounds: smallest and largest pixel value.
        train_mode: run the model in train mode, as ARD's released attack does. A model in train mode
            keeps its modules' own flags, another one is switched for the attack; of several models behind a
            callable none is. BatchNorm then uses batch statistics, and its running statistics move.
        rng: source of the start's noise, drawn on its own device; None takes torch's default
            generator. With a generator, the global random state is neither read nor advanced.
        on_step: called as `on_step(step, x_adv, logits)` with detached tensors before each update; with
            `early_stop`, with the samples that are still attacked. `StepCounter` is one.
        early_stop: leave out samples that are misclassified; needs labels as `targets`, and a model that
            returns logits. Exact, as far as rounding does not depend on the size of a batch.

    Returns:
        Adversarial images like `x` (shape, dtype, device), detached, inside ball and bounds. They are
        iterated in float32 or wider whatever the dtype of x.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or range, images outside the bounds or not finite, a loss that does not
            depend on them, or `early_stop` with `train_mode`: fewer samples are another batch to BatchNorm.
        RuntimeError: loss or gradient became NaN or infinite during the attack.

    Example:
        >>> def model(x):  # the second logit grows with the first pixel
        ...     return torch.stack([torch.zeros(len(x)), x[:, 0, 0, 0]], dim=1)
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> pgd(model, x, torch.tensor([1]), eps=0.1, step_size=0.05, random_start=None)
        tensor([[[[0.4000, 0.5000]]]])
    """
    ascent = Ascent(model, x, eps, step_size, steps, random_start, bounds, train_mode, rng)
    ascent.check_targets(targets)
    stop = misclassified(targets, train_mode) if early_stop else None
    return ascent.run(loss, targets, on_step, stop)


@public
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

    `pgd` with one step of `eps`, and with its arguments, result and errors. The textbook attack has no
    random start; Fair-ARD's evaluation code uses `random_start="normal"`.

    Example:
        >>> def model(x):
        ...     return torch.stack([torch.zeros(len(x)), x[:, 0, 0, 0]], dim=1)
        >>> fgsm(model, torch.full((1, 1, 1, 2), 0.5), torch.tensor([1]), eps=0.1)
        tensor([[[[0.4000, 0.5000]]]])
    """
    ascent = Ascent(model, x, eps, eps, 1, random_start, bounds, train_mode, rng)
    ascent.check_targets(targets)
    return ascent.run(loss, targets, on_step)


@public
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
    r"""CW-inf of the distillation papers: PGD on the Carlini-Wagner margin, `losses.cw_margin`.

    The defaults are those of Fair-ARD's evaluation. It is not the original attack of Carlini and Wagner,
    which searches for the smallest perturbation. Other arguments, result and errors as in `pgd`.

    Args:
        targets: int64 labels `(N,)`.
        confidence: $\kappa \ge 0$; the attack gains until the best other logit leads by it.

    Example:
        >>> def model(x):
        ...     return torch.stack([torch.zeros(len(x)), x[:, 0, 0, 0]], dim=1)
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> cw_linf(model, x, torch.tensor([1]), eps=0.1, random_start=None)
        tensor([[[[0.4000, 0.5000]]]])
    """
    _checks.real(0, confidence=confidence)
    ascent = Ascent(model, x, eps, step_size, steps, random_start, bounds, train_mode, rng)
    ascent.check_targets(targets)
    stop = misclassified(targets, train_mode) if early_stop else None
    return ascent.run(partial(cw_margin, confidence=confidence), targets, on_step, stop)


@public
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
    RSLAD does, and is what `FERDTrainer` uses.

    A model that is its own reference has no first gradient in KL(p || p): the uniform term or a start
    away from x moves it. With neither, the signs of rounding noise would move most pixels at random, so
    `gamma=0` with `random_start=None` is refused there. Other arguments, result and errors as in `pgd`.

    Args:
        model: the attacked model, any callable from images to logits `(N, K)`.
        reference_logits: `(N, K)`, the prediction to move away from; None takes the model's own on x,
            in eval mode and without noise.
        gamma: weight $\gamma \ge 0$ of the uniform-target term; 0 is the inner attack of RSLAD.

    Example:
        >>> def model(x):
        ...     return torch.stack([torch.zeros(len(x)), x[:, 0, 0, 0]], dim=1)
        >>> x, teacher_logits = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[0.0, 4.0]])
        >>> utae_pgd(model, x, teacher_logits, eps=0.1, step_size=0.05, random_start=None)
        tensor([[[[0.4000, 0.5000]]]])
    """
    _checks.real(0, gamma=gamma)
    ascent = Ascent(model, x, eps, step_size, steps, random_start, bounds, train_mode, rng)
    if reference_logits is None:
        if gamma == 0 and random_start is None:
            raise InvalidValue(
                "expected `random_start` or `gamma` > 0 with a model's own `reference_logits`, got neither"
            )
        with torch.no_grad(), borrowed(model):
            reference_logits = ask(model, x)
    (reference,) = _checks.logits(reference_logits=reference_logits)

    def away(output: Any, reference: Tensor) -> Tensor:
        logits = logits_of(output)
        _checks.logits(**{"reference_logits": reference, "model(x)": logits})
        return _kernels.kl(reference, logits) - gamma * _kernels.uniformity(logits)

    # The uniform term alone has a gradient of every sample.
    return ascent.run(away, reference, on_step, exact=None if gamma else of_divergence)
