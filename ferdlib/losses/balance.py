"""Quantities that robust distillation and fair training balance while they run.

Between classes: their temperatures (ABSLD) and the variance of their losses (FAT). Between two
teachers: the weights of their losses (MTARD). Errors as the package says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public


@public
def class_temperatures(
    temperatures: Tensor,
    class_losses: Tensor,
    *,
    rate: float = 0.1,
    low: float = 0.5,
    high: float = 5.0,
) -> Tensor:
    r"""ABSLD's rule at the end of an epoch: a harder class gets a lower temperature, so a sharper teacher.

    $$\tau_c \leftarrow \mathrm{clip}(\tau_c - r \, g_c / \max_j |g_j|, low, high), \qquad
      g_c = L_c - \bar L$$

    Args:
        temperatures: `(K,)`, > 0; the release starts from ones.
        class_losses: class *means* `(K,)` of the student's cross-entropy, on $\tilde x$ for the
            adversarial and on x for the clean temperatures (`reweight.ClassMean`). The release
            sums, which compares class sizes unless they are equal. `nan` is an absent class: it
            keeps its temperature and is left out of the mean. If all others are equal, nothing moves.
        rate: r >= 0.
        low, high: 0 < low <= high.

    Returns:
        New temperatures `(K,)` in the dtype and on the device of the old.

    Example:
        >>> class_temperatures(torch.ones(3), torch.tensor([1.0, 2.0, 6.0]))  # gaps -2, -1, 3
        tensor([1.0667, 1.0333, 0.9000])
    """
    _checks.class_vector(class_losses=class_losses)
    _checks.class_vector(num_classes=len(class_losses), temperatures=temperatures)
    _checks.real(0, rate=rate)
    _checks.divisor(low=low)
    _checks.real(low, high=high)
    if not bool((temperatures > 0).all()):
        raise InvalidValue(f"expected `temperatures` > 0, got {temperatures.tolist()}")
    losses = _checks.double(class_losses, temperatures.device)
    tau = _checks.double(temperatures)
    present = losses[~losses.isnan()]
    # The ends are compared, because the mean of equal losses may round away from them.
    if not len(present) or bool(present.min() == present.max()):
        return temperatures.clone()
    gap = losses - present.mean()
    moved = (tau - rate * gap / gap.nan_to_num().abs().max()).clamp(low, high)
    return torch.where(losses.isnan(), tau, moved).to(temperatures.dtype)


@public
def class_variance(values: Tensor, targets: Tensor, *, num_classes: int, ddof: int = 1) -> Tensor:
    r"""FAT's regulariser, the variance over classes of their mean loss, $\sum_c (l_c - \bar l)^2 / (C - ddof)$.

    Over the C classes *present* in the batch; the release has 100 slots and counts the empty ones as
    losses of 0, so that equal losses are penalised. Added to the mean loss with a factor a, it is as if
    class c weighed $n_c / N + 2 a (l_c - \bar l) / (C - 1)$ (at ddof 1).

    Takes losses `(N,)`; `ddof` >= 0 is 1 in the release, the sample variance. Returns a scalar with its
    graph; 0 if no more than `ddof` classes are present.

    Example:
        >>> values, targets = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2])
        >>> class_variance(values, targets, num_classes=10)  # of the means 2 and 5
        tensor(4.5000)
    """
    _checks.floating(values=values)
    if values.ndim != 1:
        raise InvalidValue(f"expected `values` of shape (N,), got {tuple(values.shape)}")
    _checks.integer(2, num_classes=num_classes)
    _checks.integer(0, ddof=ddof)
    _checks.labels(targets=targets, like=values, num_classes=num_classes)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    member = F.one_hot(targets, num_classes).bool()
    counts = member.sum(dim=0)
    # Selected, not multiplied: a NaN stays in its own class.
    means = torch.where(member, values[:, None], 0.0).sum(dim=0) / counts.clamp(min=1)
    classes = (counts > 0).sum()
    gaps = torch.where(counts > 0, means - means.sum() / classes.clamp(min=1), 0.0)
    squares, freedom = gaps.square().sum(), classes - ddof
    # Nothing here reads a value on the host, which would stall an accelerator at every step.
    return torch.where(freedom > 0, squares / freedom.clamp(min=1), 0.0)


class MTARDBalance:
    r"""MTARD's loss weights, which follow how far each of the two losses has come since the start.

    $$w_{nat} \leftarrow w_{nat} - r \left( w_{nat}
      - \frac{\hat L_{nat}^b}{\hat L_{adv}^b + \hat L_{nat}^b} \right), \qquad
      \hat L = L(t) / L(0), \qquad w_{adv} = 1 - w_{nat}$$

    L(0) are the losses of the first `update`, one batch, so it belongs into a checkpoint. Nothing is
    read back from an accelerator but at that first update. Two losses of 0, or one that is not
    finite, leave the weights alone. If several processes train, average the losses over them.

    Args:
        rate: r in [0, 1], an attribute to schedule: the release divides it by 10 at epochs 215, 260
            and 285 of 300.
        exponent: b >= 0.

    Attributes:
        clean_weight, adv_weight: float64 scalar tensors of sum 1, each 1/2 at the start.
        initial_losses: L(0), adversarial and clean, float64 `(2,)`; empty before the first update.

    Raises: as the package says, and ValueError for first losses that are not finite and > 0.

    Example:
        >>> balance = MTARDBalance(rate=0.5)
        >>> _ = balance.update(torch.tensor(2.0), torch.tensor(1.0))
        >>> adv_weight, _ = balance.update(torch.tensor(1.0), torch.tensor(1.5))  # 1/2 and 3/2
        >>> adv_weight  # w_nat = 1/2 - 1/2 (1/2 - 3/4)
        tensor(0.3750, dtype=torch.float64)
    """

    @public
    def __init__(self, *, rate: float = 0.025, exponent: float = 1.0) -> None:
        _checks.real(0, 1, rate=rate)
        _checks.real(0, exponent=exponent)
        # A state holds the rate.
        self.rate, self.exponent = _checks.plain(rate), _checks.plain(exponent)
        self.clean_weight = torch.tensor(0.5, dtype=torch.float64, device="cpu")
        self.initial_losses = torch.empty(0, dtype=torch.float64, device="cpu")

    @property
    def adv_weight(self) -> Tensor:
        return 1 - self.clean_weight

    @public
    def update(self, adv_loss: Tensor, clean_loss: Tensor) -> tuple[Tensor, Tensor]:
        """Move the weights by the batch means of both losses; return `(adv_weight, clean_weight)`."""
        _checks.scalar(adv_loss=adv_loss, clean_loss=clean_loss)
        # A schedule may have set it.
        _checks.real(0, 1, rate=self.rate)
        now = _checks.double(torch.stack([adv_loss, clean_loss.to(adv_loss.device)]).detach())
        if not len(self.initial_losses):
            if not bool((now.isfinite() & (now > 0)).all()):
                wanted = "finite `adv_loss` and `clean_loss` > 0 at the first update"
                raise InvalidValue(f"expected {wanted}, got {now.tolist()}")
            self.initial_losses = now
        # A divergence of 0 may round to just below it, and a power of that be nan.
        powers = (now.clamp(min=0) / self.initial_losses.to(now)) ** self.exponent
        total, w = powers.sum(), self.clean_weight.to(now)
        share = torch.where(total.isfinite() & (total > 0), powers[1] / total, w)
        self.clean_weight = w - self.rate * (w - share)
        return self.adv_weight, self.clean_weight

    def state_dict(self) -> dict[str, Any]:
        """Two tensors and the rate: all that continuing needs."""
        weight, initial = self.clean_weight.clone(), self.initial_losses.clone()
        return {"clean_weight": weight, "initial_losses": initial, "rate": self.rate}

    @public
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        _checks.keys(self.state_dict(), state=state)
        _checks.scalar(clean_weight=state["clean_weight"])
        _checks.floating(initial_losses=(initial := state["initial_losses"]))
        _checks.real(0, 1, rate=state["rate"])
        if initial.shape not in ((0,), (2,)):
            came = tuple(initial.shape)
            raise InvalidValue(f"expected `initial_losses` of shape (0,) or (2,), got {came}")
        self.rate = state["rate"]
        self.clean_weight = _checks.double(state["clean_weight"].detach()).clone()
        self.initial_losses = _checks.double(initial.detach()).clone()
