"""The one L-infinity ascent that every attack of the library is a loss on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ferdlib import _oldchecks as _checks
from ferdlib._modes import borrowed
from ferdlib._ranks import drawn
from ferdlib.losses import cross_entropy

Model = Callable[[Tensor], Any]
Loss = Callable[[Any, Any], Tensor]
OnStep = Callable[[int, Tensor, Any], None]
# The step, which samples are still attacked (indices into the batch), their logits -> which of them are done.
Settled = Callable[[int, Tensor, Any], Tensor]
RandomStart = Literal["uniform", "normal"] | Tensor | None

NORMAL_START_SCALE = 0.001


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

    The last iterate is returned, after exactly `steps` forward and input-gradient passes; with
    `early_stop` the first one that is misclassified, and no work is done on a sample after it. Then a
    sample is robust to the attack at *any* of x^(0)..x^(K) if what is returned is classified correctly.
    The model runs in eval mode and is given back as it was; works under `torch.no_grad`, autocast and
    `torch.inference_mode`. A callable that is not an `nn.Module` (a lambda around one, say) is run as it
    is: its modes are the caller's business.

    Args:
        model: any callable from images to what `loss` takes first; logits `(N, K)` for the built-in
            losses. Normalisation lives inside it.
        x: float images `(N, C, H, W)` inside `bounds`.
        targets: whatever `loss` takes second: int64 labels `(N,)`, or reference logits `(N, K)`.
        loss: called as `loss(model(x_adv), targets)`; its sum over samples is ascended. A loss that
            should fall is passed with its sign turned.
        eps: radius $\epsilon \ge 0$ in units of the images, a number or one per sample `(N,)`.
        step_size: $\alpha \ge 0$ in the same units, a number or one per sample `(N,)`.
        steps: how many updates; 0 returns the (projected) start.
        random_start: "uniform" in the ball, "normal" for 0.001 * N(0, 1), None for x itself, or a
            tensor x0 - x of x's shape. Every start is projected to the ball and the bounds.
        bounds: smallest and largest pixel value.
        train_mode: run the model in train mode, as ARD's released attack does: a model already in
            train mode keeps its modules' own flags, another is switched for the attack. BatchNorm then
            uses batch statistics, and its running statistics move.
        rng: source of the start's noise, drawn on its own device; None takes torch's default
            generator. With a generator, the global random state is neither read nor advanced.
        on_step: called as `on_step(step, x_adv, logits)` with detached tensors before each update; with
            `early_stop`, with the samples that are still attacked.
        early_stop: leave out what is misclassified already; `targets` must be labels then, and the model
            return logits. Exact, as far as rounding does not depend on the size of a batch.

    Returns:
        Adversarial images like `x` (shape, dtype, device), detached, inside ball and bounds. They are
        iterated in float32 or wider whatever the dtype of x.

    Raises:
        TypeError: `x` is not a float tensor, or an argument has the wrong type.
        ValueError: a wrong shape, images outside the bounds or not finite, a negative radius or step,
            an unknown start, a loss that does not depend on the images, or `early_stop` with
            `train_mode` (fewer samples are another batch to BatchNorm) or without labels.
        RuntimeError: loss or gradient became NaN or infinite during the attack.

    Example:
        >>> def model(x):  # the second logit grows with the first pixel
        ...     return torch.stack([torch.zeros(len(x)), x[:, 0, 0, 0]], dim=1)
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> pgd(model, x, torch.tensor([1]), eps=0.1, step_size=0.05, random_start=None)
        tensor([[[[0.4000, 0.5000]]]])
    """
    return ascend(
        "pgd",
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
        on_step=on_step,
        settled=misclassified("pgd", targets, train_mode) if early_stop else None,
    )


def misclassified(function: str, labels: Tensor, train_mode: bool) -> Settled:
    """A sample is done as soon as it is misclassified."""
    check_early_stop(function, train_mode)
    _checks.labels(function, labels)

    def settled(step: int, index: Tensor, logits: Any) -> Tensor:
        z = _checks.logits(function, logits, argument="model(x)")
        return z.argmax(dim=1) != labels[index]

    return settled


def check_early_stop(function: str, train_mode: bool) -> None:
    if train_mode:
        raise ValueError(
            f"{function}: expected no `early_stop` with `train_mode`, where each sample's logits depend on "
            f"the whole batch, got both"
        )


def ascend(
    function: str,
    model: Model,
    x: Tensor,
    targets: Tensor,
    *,
    loss: Loss,
    eps: float | Tensor,
    step_size: float | Tensor,
    steps: int,
    random_start: RandomStart,
    bounds: tuple[float, float],
    train_mode: bool,
    rng: torch.Generator | None,
    on_step: OnStep | None,
    settled: Settled | None = None,
    aim: str = "targets",
) -> Tensor:
    """`pgd` under the name of the public function that errors shall start with.

    Samples that are `settled` by their logits stay as they are, and leave the batch. `aim` is what that
    function calls its targets.
    """
    _checks.callable_(function, "model", model)
    bounds = checked_bounds(function, bounds)
    _checks.images(function, x, bounds=bounds)
    _checks.tensor(function, aim, targets)
    if targets.ndim == 0 or targets.shape[0] != x.shape[0]:
        raise ValueError(
            f"{function}: expected `{aim}` with one entry for each of {x.shape[0]} images, got "
            f"shape {tuple(targets.shape)}"
        )
    _checks.same_device(function, **{"x": x, aim: targets})
    _checks.callable_(function, "loss", loss)
    if on_step is not None:
        _checks.callable_(function, "on_step", on_step)
    _checks.integer(function, "steps", steps, low=0)
    _checks.generator(function, rng)
    with torch.inference_mode(False), torch.enable_grad(), run_mode(model, train_mode):
        x, targets = _plain(x), _plain(targets)
        origin = x.to(torch.promote_types(x.dtype, torch.float32))
        radius = _checks.per_sample(function, "eps", eps, origin)
        step_length = _checks.per_sample(function, "step_size", step_size, origin)
        numbers = isinstance(radius, float) and isinstance(step_length, float)
        if numbers and 0 < 2 * radius < step_length:
            logging.getLogger("ferdlib").warning(
                "%s: step_size %g is more than twice eps %g; are they swapped?",
                function,
                step_length,
                radius,
            )

        adv = _projected(
            origin + _start(function, origin, radius, random_start, rng), origin, radius, bounds
        )
        # What is still attacked: which samples, and what belongs to each of them.
        index = torch.arange(len(x), device=x.device)
        here, aims, reach, pace = origin, targets, radius, step_length
        result, health = adv, origin.new_zeros(())
        for step in range(steps):
            adv.requires_grad_()
            output = model(adv.to(x.dtype))
            values = _values(function, loss, output, aims)
            # A sum in half precision would underflow or overflow; the sign of its gradient is all we use.
            total = values.to(torch.promote_types(values.dtype, torch.float32)).sum()
            if not total.requires_grad:
                raise ValueError(
                    f"{function}: expected a loss that depends on the images, got one without a "
                    f"gradient; does the model detach, or run under no_grad?"
                )
            # sign(NaN) is 0 in torch: without this sum a broken model would pass for a robust one.
            health = health + total.detach()
            logits = output.detach() if isinstance(output, Tensor) else output
            if on_step is not None:
                on_step(step, adv.detach(), logits)
            done = None if settled is None else settled(step, index, logits)
            if done is not None and bool(done.all()):
                break
            (gradient,) = torch.autograd.grad(total, adv)
            health = health + gradient.sum()
            adv = adv.detach()
            moved = _projected(adv + pace * gradient.sign(), here, reach, bounds)
            if done is not None and bool(done.any()):
                result = result.index_put((index[done],), adv[done])
                stay = ~done
                index, moved, here, aims = index[stay], moved[stay], here[stay], aims[stay]
                reach, pace = (v[stay] if isinstance(v, Tensor) else v for v in (reach, pace))
            adv = moved
        if settled is not None:
            adv = result.index_put((index,), adv.detach())
        if not bool(health.isfinite()):
            raise RuntimeError(
                f"{function}: expected finite losses and gradients, got NaN or infinity during the "
                f"attack; look at `model(x)` on these images"
            )
        return rounded_inside(adv, x, radius, bounds)


def _projected(
    adv: Tensor, origin: Tensor, radius: float | Tensor, bounds: tuple[float, float]
) -> Tensor:
    offset = adv - origin
    if isinstance(radius, float):
        offset = offset.clamp(-radius, radius)
    else:
        offset = torch.minimum(torch.maximum(offset, -radius), radius)
    return (origin + offset).clamp(*bounds)


def _values(function: str, loss: Loss, output: Any, targets: Tensor) -> Tensor:
    """The loss, whose complaints about what it was given start with the attack's name too."""
    try:
        return loss(output, targets)
    except TypeError as error:
        raise TypeError(f"{function}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{function}: {error}") from error


def run_mode(model: object, train_mode: bool) -> Any:
    """The model's state for the length of an attack: frozen, in eval mode unless asked otherwise."""
    if not train_mode:
        return borrowed(model, training=False)
    already = isinstance(model, nn.Module) and model.training
    return borrowed(model, training=None if already else True)


def checked_bounds(function: str, bounds: Any) -> tuple[float, float]:
    low, high = _checks.pair(function, "bounds", bounds)
    if low == high:
        raise ValueError(f"{function}: expected `bounds` with low < high, got ({low:g}, {high:g})")
    return low, high


def _plain(value: Tensor) -> Tensor:
    """Detached, and usable by autograd even when it was made under `torch.inference_mode`."""
    return value.clone() if value.is_inference() else value.detach()


def _start(
    function: str,
    origin: Tensor,
    radius: float | Tensor,
    random_start: RandomStart,
    rng: torch.Generator | None,
) -> Tensor | float:
    if random_start is None:
        return 0.0
    if isinstance(random_start, Tensor):
        _checks.floating(function, "random_start", random_start)
        if random_start.shape != origin.shape or not bool(random_start.isfinite().all()):
            raise ValueError(
                f"{function}: expected `random_start` to be a finite x0 - x of shape "
                f"{tuple(origin.shape)}, got {_checks.got(random_start)}"
            )
        return random_start.detach().to(origin)
    _checks.choice(function, "random_start", random_start, ("uniform", "normal", None))
    device = origin.device if rng is None else rng.device

    def draw(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        noise = torch.empty(shape, dtype=origin.dtype, device=device)
        if random_start == "normal":
            return NORMAL_START_SCALE * noise.normal_(generator=generator)
        reach = radius if isinstance(radius, float) else 1.0
        return noise.uniform_(-reach, reach, generator=generator)

    start = drawn(draw, tuple(origin.shape), rng).to(origin.device)
    scaled = random_start == "uniform" and isinstance(radius, Tensor)
    return radius * start if scaled else start


def rounded_inside(
    adv: Tensor, x: Tensor, radius: float | Tensor, bounds: tuple[float, float]
) -> Tensor:
    """`adv` in the dtype of `x`, still in ball and bounds: rounding to half precision can leave both."""
    if adv.dtype == x.dtype:
        return adv
    rounded = adv.to(x.dtype)
    wide, (low, high) = rounded.to(adv.dtype), bounds
    outside = ((wide - x.to(adv.dtype)).abs() > radius) | (wide < low) | (wide > high)
    return torch.where(outside, torch.nextafter(rounded, x), rounded)
