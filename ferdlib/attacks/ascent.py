"""Projected sign-gradient ascent in an L-infinity ball: every attack is a loss, a start and a step on it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidState, InvalidType, InvalidValue
from ferdlib._modes import borrowed, logits_of, modules_behind
from ferdlib.attacks.lifted import Exact, exact_of, lifted

Model = Callable[[Tensor], Any]
Loss = Callable[[Any, Any], Tensor]
OnStep = Callable[[int, Tensor, Any], None]
# Step, rows of the batch that are still attacked, the model's output for them -> flags of those that are done.
Stop = Callable[[int, Tensor, Any], Tensor]
RandomStart = Literal["uniform", "normal"] | Tensor | None

NORMAL_START_SCALE = 0.001


@dataclass(eq=False)
class Ascent:
    """The model, its images and the ball to climb in; `pgd` has the equation, and says what each means."""

    model: Model
    x: Tensor
    eps: float | Tensor
    step_size: float | Tensor
    steps: int
    random_start: RandomStart = None
    bounds: tuple[float, float] = (0.0, 1.0)
    train_mode: bool = False
    rng: torch.Generator | None = None
    origin: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # Not a public door: an error gets the name of the attack that makes the ascent.
        self.bounds = checked_bounds(self.bounds)
        _checks.callable_(model=self.model)
        _checks.images(x=self.x)
        _checks.integer(0, steps=self.steps)
        _checks.generator(self.rng)
        with torch.inference_mode(False):
            self.x = _plain(self.x)
            # Iterated in float32 or wider, whatever the dtype of the images.
            self.origin = wide(self.x)
        radii = {"eps": self.eps, "step_size": self.step_size}
        self.eps = _checks.per_sample("eps", self.eps, self.origin)
        self.step_size = _checks.per_sample("step_size", self.step_size, self.origin)
        self._check_values(radii)
        # Tensors would have to be read on the host for this.
        if isinstance(self.eps, float) and isinstance(self.step_size, float):
            if 0 < 2 * self.eps < self.step_size:
                message = "step_size %g is more than twice eps %g; are they swapped?"
                warn_once(message, self.step_size, self.eps)
            warn_of_width(self.eps, self.bounds)

    def _check_values(self, radii: dict[str, Any]) -> None:
        """Look at all values at once, and at each by itself only where something is wrong."""
        low, high = self.bounds
        given = (self.eps, self.step_size, self.random_start)
        tensors = [v.isfinite().all().to(self.x.device) for v in given if isinstance(v, Tensor)]
        fine = torch.stack([((self.x >= low) & (self.x <= high)).all(), *tensors]).all()
        if torch.compiler.is_compiling() or bool(fine):
            return
        _checks.images(self.bounds, x=self.x)
        for name, value in radii.items():
            on_host = value.cpu() if isinstance(value, Tensor) else value
            _checks.per_sample(name, on_host, self.x)
        raise _other_start(self.x, self.random_start)

    def check_targets(self, targets: Tensor) -> None:
        """Check what the loss takes second: one entry for each image."""
        _checks.tensor(targets=targets)
        if targets.ndim == 0 or len(targets) != len(self.x):
            came = _checks.got(targets)
            raise InvalidValue(f"expected `targets` of {len(self.x)} images, got {came}")
        _checks.one_device(x=self.x, targets=targets)

    def run(
        self,
        loss: Loss,
        targets: Tensor,
        on_step: OnStep | None = None,
        stop: Stop | None = None,
        exact: Exact | None = None,
    ) -> Tensor:
        """Climb `loss(model(x'), targets)` and return the last iterate, in the dtype of x.

        Samples that `stop` calls done keep their iterate, and leave the batch. `exact` is the direction of a loss
        that is not known here.
        """
        _checks.callable_(loss=loss)
        _checks.callable_or_none(on_step=on_step)
        exact = exact or exact_of(loss)
        # Of several models behind a callable, none is known to be the one to be trained.
        several = len(modules_behind(self.model)) > 1
        mode = None if self.train_mode and several else self.train_mode
        with torch.inference_mode(False), torch.enable_grad(), borrowed(self.model, training=mode):
            # Notation: adv, x^(t); left, its rows that are still attacked; here, the values of these rows.
            start = draw_start(self.origin, self.random_start, self.eps, self.rng)
            left: Any = slice(None)
            adv, targets = self._projected(self.origin + start, left), _plain(targets)
            index, health = torch.arange(len(adv), device=adv.device), adv.new_zeros(())
            for step in range(self.steps):
                # A slice is a view, so a batch that stays whole is not copied.
                here = adv[left].requires_grad_()
                # A copy, since a model may write to its input, which autograd forbids here.
                output, aims = self.model(here.to(self.x.dtype, copy=True)), targets[left]
                # A loss of one's own may want more of the output than its logits.
                seen = lifted(logits_of(output) if exact else output, aims, exact, self.train_mode)
                total = _total(loss, seen, aims)
                # The sign of NaN is 0 in torch: without this sum a broken model would pass for a robust one.
                health = health + total.detach()
                output = output.detach() if isinstance(output, Tensor) else output
                if on_step is not None:
                    on_step(step, here.detach(), output)
                if stop is not None:
                    stays = ~stop(step, index[left], output)
                    if not bool(stays.any()):
                        break
                (gradient,) = torch.autograd.grad(total, here, allow_unused=True)
                if gradient is None:
                    raise no_gradient()
                health = health + gradient.sum()
                stride = _rows(self.step_size, left) * gradient.sign()
                moved = self._projected(here.detach() + stride, left)
                if stop is None:
                    adv = moved
                else:
                    # Rows that are done keep the iterate by which they were judged.
                    left = index[left][stays]
                    adv = adv.index_put((left,), moved[stays])
            if not bool(health.isfinite()):
                came = "NaN or infinity; look at `model(x)` here"
                raise InvalidState(f"expected finite losses and gradients, got {came}")
            return rounded_inside(adv, self.x, self.eps, self.bounds)

    def _projected(self, adv: Tensor, rows: Any) -> Tensor:
        """Project into the ball of these rows, and then into the bounds."""
        origin, eps = self.origin[rows], _rows(self.eps, rows)
        return (origin + (adv - origin).clamp(-eps, eps)).clamp(*self.bounds)


@functools.cache
def warn_once(message: str, *numbers: float) -> None:
    """Log a warning that the next call of the same attack would only repeat."""
    logging.getLogger("ferdlib").warning(message, *numbers)


def warn_of_width(eps: float, bounds: tuple[float, float]) -> None:
    """Warn of a radius that lets every image become any other, as 8 does in place of 8/255."""
    width = bounds[1] - bounds[0]
    if eps >= width:
        said = "eps %g is as large as the width %g of the bounds: every image can become any other"
        warn_once(f"{said}; did you mean %g/255?", eps, width, eps)


def misclassified(labels: Tensor, train_mode: bool) -> Stop:
    """The rule of `early_stop`: a sample is done as soon as it is misclassified."""
    if train_mode:
        raise InvalidValue(
            "expected no `early_stop` with `train_mode`, where logits depend on the whole batch, got both"
        )
    _checks.labels(targets=labels)
    return lambda step, rows, output: predicted(step, output) != labels[rows]


def predicted(step: int, output: Any) -> Tensor:
    """Classes of the logits in an output."""
    return leading(step, output).argmax(dim=1)


def leading(step: int, output: Any) -> Tensor:
    """Logits in an output, or in a tuple that begins with them; checked at the first step."""
    logits = logits_of(output)
    logits = logits[0] if isinstance(logits, tuple) and logits else logits
    if step == 0:
        _checks.logits(**{"model(x)": logits})
    return logits  # type: ignore[no-any-return]


def draw_start(
    like: Tensor, random_start: RandomStart, eps: float | Tensor, rng: torch.Generator | None
) -> Tensor:
    """Draw x^(0) - x for images `like` these, which lend shape, dtype and device, on `rng.device`."""
    if random_start is None:
        return torch.zeros_like(like)
    if isinstance(random_start, Tensor):
        _checks.floating(random_start=random_start)
        if random_start.shape != like.shape:
            raise _other_start(like, random_start)
        return random_start.detach().to(like)
    _checks.choice(("uniform", "normal", None), random_start=random_start)
    source = like.device if rng is None else rng.device
    noise = torch.empty(like.shape, dtype=like.dtype, device=source)
    if random_start == "normal":
        return NORMAL_START_SCALE * noise.normal_(generator=rng).to(like.device)
    if isinstance(eps, Tensor):
        return eps * noise.uniform_(-1.0, 1.0, generator=rng).to(like.device)
    return noise.uniform_(-eps, eps, generator=rng).to(like.device)


def _other_start(like: Tensor, came: Any) -> InvalidValue:
    wanted = f"finite and of shape {tuple(like.shape)}"
    return InvalidValue(f"expected `random_start` {wanted}, got {_checks.got(came)}")


def checked_bounds(bounds: Any) -> tuple[float, float]:
    """The pair `(low, high)`, with low < high."""
    _checks.pair(bounds=bounds)
    low, high = bounds
    if low == high:
        raise InvalidValue(f"expected `bounds` with low < high, got ({low:g}, {high:g})")
    return float(low), float(high)


def rounded_inside(
    adv: Tensor, x: Tensor, eps: float | Tensor, bounds: tuple[float, float]
) -> Tensor:
    """Round `adv` to the dtype of x, towards x where half precision would leave ball or bounds."""
    if adv.dtype == x.dtype:
        return adv
    rounded = adv.to(x.dtype)
    back, (low, high) = rounded.to(adv.dtype), bounds
    outside = ((back - x.to(adv.dtype)).abs() > eps) | (back < low) | (back > high)
    return torch.where(outside, torch.nextafter(rounded, x), rounded)


def _total(loss: Loss, output: Any, targets: Tensor) -> Tensor:
    """Sum of the loss over samples; its complaints get the attack's name before their own."""
    try:
        values = loss(output, targets)
    except (TypeError, ValueError) as error:
        kind = InvalidType if isinstance(error, TypeError) else InvalidValue
        raise kind(str(error)) from error
    # A sum in half precision would underflow or overflow.
    total = wide(values).sum()
    if not total.requires_grad:
        raise no_gradient()
    return total


def no_gradient() -> InvalidValue:
    """Error of a model that gives an attack no direction."""
    return InvalidValue(
        "expected a loss that depends on the images, got one without a gradient; does `model` detach, or "
        "run in int8 or ONNX?"
    )


def _rows(value: float | Tensor, rows: Any) -> Any:
    return value[rows] if isinstance(value, Tensor) else value


def wide(value: Tensor) -> Tensor:
    """The values in float32 or wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _plain(value: Tensor) -> Tensor:
    """Detach, and copy what was made under `torch.inference_mode`, which autograd refuses."""
    return value.clone() if value.is_inference() else value.detach()
