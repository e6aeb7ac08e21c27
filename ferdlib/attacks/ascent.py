"""Projected sign-gradient ascent in an L-infinity ball: every attack is a loss, a start and a step on it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ferdlib import _checks
from ferdlib._checks import InvalidState, InvalidType, InvalidValue
from ferdlib._modes import borrowed

Model = Callable[[Tensor], Any]
Loss = Callable[[Any, Any], Tensor]
OnStep = Callable[[int, Tensor, Any], None]
# Step, rows of the batch that are still attacked, and their logits -> which of these rows are done.
Stop = Callable[[int, Tensor, Any], Tensor]
RandomStart = Literal["uniform", "normal"] | Tensor | None

NORMAL_START_SCALE = 0.001


class Ascent:
    r"""The model, its images, and the ball in which to climb: what all attacks share, checked once.

    $$x^{(t+1)} = \Pi_{B_\epsilon(x) \cap [lo, hi]}\left(x^{(t)}
      + \alpha \, \mathrm{sign} \nabla_{x^{(t)}} \ell(f(x^{(t)}), y)\right)$$

    (Madry et al. 2018; Fair-ARD Eq. 5). `pgd` says what each argument means.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        eps: float | Tensor,
        step_size: float | Tensor,
        steps: int,
        random_start: RandomStart = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        train_mode: bool = False,
        rng: torch.Generator | None = None,
    ) -> None:
        bounds = checked_bounds(bounds)
        _checks.callable_(model=model)
        _checks.images(bounds, x=x)
        _checks.integer(0, steps=steps)
        _checks.generator(rng)
        self.model, self.steps, self.random_start, self.rng = model, steps, random_start, rng
        self.bounds, self.train_mode = bounds, train_mode
        with torch.inference_mode(False):
            self.x = _plain(x)
            # Iterated in float32 or wider, whatever the dtype of the images.
            self.origin = self.x.to(torch.promote_types(x.dtype, torch.float32))
        self.eps = _checks.per_sample("eps", eps, self.origin)
        self.step_size = _checks.per_sample("step_size", step_size, self.origin)
        numbers = isinstance(self.eps, float) and isinstance(self.step_size, float)
        if numbers and 0 < 2 * self.eps < self.step_size:
            message = "step_size %g is more than twice eps %g; are they swapped?"
            logging.getLogger("ferdlib").warning(message, self.step_size, self.eps)

    def one_per_image(self, **named: Any) -> None:
        """Check what the loss takes second: tensors with one entry for each image."""
        _checks.tensor(**named)
        for name, value in named.items():
            if value.ndim == 0 or len(value) != len(self.x):
                raise InvalidValue(
                    f"expected `{name}` with one entry for each of {len(self.x)} images, got shape "
                    f"{tuple(value.shape)}"
                )
        _checks.one_device(x=self.x, **named)

    def run(
        self, loss: Loss, targets: Tensor, on_step: OnStep | None = None, stop: Stop | None = None
    ) -> Tensor:
        """Climb `loss(model(x'), targets)` and return the last iterate, in the dtype of x.

        Samples that `stop` calls done keep their iterate, and leave the batch.
        """
        _checks.callable_(loss=loss)
        if on_step is not None:
            _checks.callable_(on_step=on_step)
        with torch.inference_mode(False), torch.enable_grad(), self._mode():
            return self._climb(loss, _plain(targets), on_step, stop)

    def _climb(
        self, loss: Loss, targets: Tensor, on_step: OnStep | None, stop: Stop | None
    ) -> Tensor:
        # Notation: adv, x^(t); left, the rows of it that are still attacked; here, these rows.
        start = draw_start(self.origin, self.random_start, self.eps, self.rng)
        adv = self._projected(self.origin + start, slice(None))
        index = torch.arange(len(adv), device=adv.device)
        left: Any = slice(None)
        health = adv.new_zeros(())
        for step in range(self.steps):
            here = adv[left].requires_grad_()
            output = self.model(here.to(self.x.dtype))
            total = _total(loss, output, targets[left])
            # The sign of NaN is 0 in torch: without this sum a broken model would pass for a robust one.
            health = health + total.detach()
            logits = output.detach() if isinstance(output, Tensor) else output
            if on_step is not None:
                on_step(step, here.detach(), logits)
            if stop is not None:
                stays = ~stop(step, index[left], logits)
                if not bool(stays.any()):
                    break
            (gradient,) = torch.autograd.grad(total, here)
            health = health + gradient.sum()
            moved = here.detach() + _rows(self.step_size, left) * gradient.sign()
            moved = self._projected(moved, left)
            if stop is None:
                adv = moved
            else:
                left = index[left][stays]
                adv = adv.index_put((left,), moved[stays])
        if not bool(health.isfinite()):
            raise InvalidState(
                "expected finite losses and gradients, got NaN or infinity during the attack; look at "
                "`model(x)` on these images"
            )
        return rounded_inside(adv, self.x, self.eps, self.bounds)

    def _projected(self, adv: Tensor, rows: Any) -> Tensor:
        """Project into the ball of these rows, and then into the bounds."""
        origin, eps = self.origin[rows], _rows(self.eps, rows)
        offset = adv - origin
        if isinstance(eps, float):
            offset = offset.clamp(-eps, eps)
        else:
            offset = torch.minimum(torch.maximum(offset, -eps), eps)
        return (origin + offset).clamp(*self.bounds)

    def _mode(self) -> Any:
        """Freeze the model for the length of the attack, in eval mode unless asked otherwise."""
        if not self.train_mode:
            return borrowed(self.model, training=False)
        # A model that trains already keeps its frozen layers frozen.
        already = isinstance(self.model, nn.Module) and self.model.training
        return borrowed(self.model, training=None if already else True)


def misclassified(labels: Tensor, train_mode: bool) -> Stop:
    """The rule of `early_stop`: a sample is done as soon as its logits are wrong."""
    if train_mode:
        raise InvalidValue(
            "expected no `early_stop` with `train_mode`, where each sample's logits depend on the whole "
            "batch, got both"
        )
    _checks.labels(targets=labels)

    def stop(step: int, rows: Tensor, output: Any) -> Tensor:
        return logits_of(output).argmax(dim=1) != labels[rows]

    return stop


def logits_of(output: Any) -> Tensor:
    """Logits of a model's output, which may be a tuple that begins with them."""
    if isinstance(output, tuple) and output:
        output = output[0]
    (logits,) = _checks.logits(**{"model(x)": output})
    return logits


def draw_start(
    like: Tensor, random_start: RandomStart, eps: float | Tensor, rng: torch.Generator | None
) -> Tensor:
    """Draw x^(0) - x for images `like` these, which lend shape, dtype and device, on `rng.device`.

    To be drawn for the batch of all processes, and given as `random_start` to the attack on a part of it.
    """
    if random_start is None:
        return torch.zeros_like(like)
    if isinstance(random_start, Tensor):
        _checks.floating(random_start=random_start)
        if random_start.shape != like.shape or not bool(random_start.isfinite().all()):
            raise InvalidValue(
                f"expected `random_start` to be a finite x0 - x of shape {tuple(like.shape)}, got "
                f"{_checks.got(random_start)}"
            )
        return random_start.detach().to(like)
    _checks.choice(("uniform", "normal", None), random_start=random_start)
    noise = torch.empty(
        like.shape, dtype=like.dtype, device=like.device if rng is None else rng.device
    )
    if random_start == "normal":
        return NORMAL_START_SCALE * noise.normal_(generator=rng).to(like.device)
    if isinstance(eps, Tensor):
        return eps * noise.uniform_(-1.0, 1.0, generator=rng).to(like.device)
    return noise.uniform_(-eps, eps, generator=rng).to(like.device)


def checked_bounds(bounds: Any) -> tuple[float, float]:
    """The pair `(low, high)`, with low < high."""
    _checks.pair(bounds=bounds)
    low, high = bounds
    if low == high:
        raise InvalidValue(f"expected `bounds` with low < high, got ({low:g}, {high:g})")
    return low, high


def rounded_inside(
    adv: Tensor, x: Tensor, eps: float | Tensor, bounds: tuple[float, float]
) -> Tensor:
    """Round `adv` to the dtype of x, towards x where half precision would leave ball or bounds."""
    if adv.dtype == x.dtype:
        return adv
    rounded = adv.to(x.dtype)
    wide, (low, high) = rounded.to(adv.dtype), bounds
    outside = ((wide - x.to(adv.dtype)).abs() > eps) | (wide < low) | (wide > high)
    return torch.where(outside, torch.nextafter(rounded, x), rounded)


def _total(loss: Loss, output: Any, targets: Tensor) -> Tensor:
    """Sum the loss over samples; its complaints get the attack's name, as arguments' own do."""
    try:
        values = loss(output, targets)
    except TypeError as error:
        raise InvalidType(str(error)) from error
    except ValueError as error:
        raise InvalidValue(str(error)) from error
    # A sum in half precision would underflow or overflow; the sign of its gradient is all we use.
    total = values.to(torch.promote_types(values.dtype, torch.float32)).sum()
    if not total.requires_grad:
        raise InvalidValue(
            "expected a loss that depends on the images, got one without a gradient; does `model` "
            "detach, or run under no_grad?"
        )
    return total


def _rows(value: float | Tensor, rows: Any) -> float | Tensor:
    return value[rows] if isinstance(value, Tensor) else value


def _plain(value: Tensor) -> Tensor:
    """Detach, and copy what was made under `torch.inference_mode`, which autograd refuses."""
    return value.clone() if value.is_inference() else value.detach()
