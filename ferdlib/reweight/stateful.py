"""Class weights that accumulate over epochs: FRL's Lagrange multipliers and WAT's hedge.

Both raise as the package says, for a statistic of no class at all and for a state of another kind too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public

FRL_MULTIPLIERS = ("clean_multipliers", "boundary_multipliers", "margin_multipliers")


@dataclass(eq=False)
class FRLWeights:
    r"""FRL's class weights: Lagrange multipliers of "no class errs much more than the average".

    (Xu et al., To be robust or to be fair, 2021.) With the natural error $e_c$ and the boundary error
    $b_c$ (clean minus robust accuracy) of each class, and their means over classes (the release's over
    samples: the same on balanced data), each `update` adds

    $$\lambda^0_c \mathrel{+}= r\,(e_c - \bar e - \delta_0), \qquad
      \lambda^1_c \mathrel{+}= 2 r\,(b_c - \bar b - \delta_1),$$

    cuts both off at 0, and scales each to a sum of `limit` if it has more. FRL's weights
    $1/K + \lambda_c - \bar\lambda$ sum to 1; here they are K times that, of mean 1:

    $$w_c = 1 + K \lambda_c - \textstyle\sum_j \lambda_j \;\ge\; 1 - \text{limit} \;\ge\; 0.$$

    FRL divides by the weights of the batch, $\sum_i w_{y_i} l_i / \sum_i w_{y_i}$, where the factor
    cancels; `clean_weights` go to the clean cross-entropy, `boundary_weights` to TRADES' KL.
    An absent class moves none of its multipliers, and the means are those of the others.

    Args:
        num_classes: K >= 2.
        clean_slack, boundary_slack: $\delta_0, \delta_1 \ge 0$; the release has 0.07 with `remargin`.
        rate: r >= 0; an attribute, for a schedule to change (the release halves it at epoch 40).
        limit: in [0, 1], so that no weight is negative.
        remargin: lets `eps_factors` follow too, $\lambda^2_c \mathrel{+}= r_2 (b_c - \bar b -
            \delta_1)$, without a bound of its own.
        margin_rate: $r_2 \ge 0$.

    Attributes:
        clean_multipliers, boundary_multipliers, margin_multipliers: $\lambda^0, \lambda^1,
            \lambda^2$, float64 `(K,)`, zeros at first, on the device of the last accuracies.

    Example:
        >>> frl = FRLWeights(2, clean_slack=0.0, boundary_slack=0.1, rate=0.5)
        >>> frl.update(torch.tensor([0.9, 0.5]), torch.tensor([0.8, 0.1]))  # b = (0.1, 0.4)
        >>> frl.clean_weights  # lambda = (0, 0.5 * 0.2)
        tensor([0.9000, 1.1000], dtype=torch.float64)
        >>> frl.boundary_weights  # lambda = (0, 2 * 0.5 * (0.15 - 0.1))
        tensor([0.9500, 1.0500], dtype=torch.float64)
    """

    num_classes: int
    _: KW_ONLY
    clean_slack: float = 0.1
    boundary_slack: float = 0.1
    rate: float = 0.05
    limit: float = 0.5
    remargin: bool = False
    margin_rate: float = 0.2

    @public
    def __post_init__(self) -> None:
        _checks.integer(2, num_classes=self.num_classes)
        _checks.real(0, clean_slack=self.clean_slack, boundary_slack=self.boundary_slack)
        _checks.real(0, rate=self.rate, margin_rate=self.margin_rate)
        _checks.real(0, 1, limit=self.limit)
        zeros = torch.zeros(self.num_classes, dtype=torch.float64, device="cpu")
        self.clean_multipliers = zeros
        self.boundary_multipliers = self.clean_multipliers.clone()
        self.margin_multipliers = self.clean_multipliers.clone()

    @property
    def clean_weights(self) -> Tensor:
        """Float64 `(K,)` of mean 1, ones before the first update."""
        return self._weights(self.clean_multipliers)

    @property
    def boundary_weights(self) -> Tensor:
        """Float64 `(K,)` of mean 1, ones before the first update."""
        return self._weights(self.boundary_multipliers)

    @property
    def eps_factors(self) -> Tensor:
        r"""Factors of the attack's radius, $\exp(2 \lambda^2)$ cut off at 0.98 and 3, `(K,)`."""
        # The release's step is a quarter of the largest of its radii.
        return (2 * self.margin_multipliers).exp().clamp(0.98, 3.0)

    @public
    def update(self, clean_accuracy: Tensor, robust_accuracy: Tensor) -> None:
        """Move the multipliers by an epoch's class accuracies `(K,)` on held-out data, `nan` for absent."""
        k, clean, robust = self.num_classes, clean_accuracy, robust_accuracy
        _checks.class_vector(0, 1, num_classes=k, clean_accuracy=clean, robust_accuracy=robust)
        # A schedule may have set it.
        _checks.real(0, rate=self.rate)
        clean, robust = (_checks.double(acc.detach()) for acc in (clean, robust))
        error, boundary = 1 - clean, clean - _checks.double(robust, clean.device)
        if bool(boundary.isnan().all()):
            raise InvalidValue(
                "expected a class in `clean_accuracy` and `robust_accuracy`, got none"
            )
        error = error.masked_fill(boundary.isnan(), torch.nan)
        too_much = error - error.nanmean() - self.clean_slack
        self.clean_multipliers = self._moved(self.clean_multipliers, self.rate * too_much)
        too_much = boundary - boundary.nanmean() - self.boundary_slack
        self.boundary_multipliers = self._moved(self.boundary_multipliers, 2 * self.rate * too_much)
        if self.remargin:
            step = (self.margin_rate * too_much).nan_to_num()
            multipliers = _checks.double(self.margin_multipliers, step.device)
            self.margin_multipliers = multipliers + step

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the multipliers, and the rate as it is now."""
        multipliers = {name: getattr(self, name).clone() for name in FRL_MULTIPLIERS}
        return multipliers | {"rate": torch.tensor(self.rate, dtype=torch.float64, device="cpu")}

    @public
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state that `state_dict` returned."""
        _checks.state(state, self.state_dict())
        for name in FRL_MULTIPLIERS:
            setattr(self, name, state[name].clone())
        self.rate = state["rate"].item()

    def _moved(self, multipliers: Tensor, step: Tensor) -> Tensor:
        moved = (_checks.double(multipliers, step.device) + step.nan_to_num()).clamp(min=0)
        total = moved.sum()
        # Divided first: the reciprocal of a tiny total is infinite.
        return torch.where(total > self.limit, moved / total * self.limit, moved)

    def _weights(self, multipliers: Tensor) -> Tensor:
        w = 1 + self.num_classes * multipliers - multipliers.sum()
        # A sum that is the limit 1 may round to above it.
        return w.clamp(min=0)


class HedgeWeights:
    r"""WAT's class weights: a hedge over the classes, and the average as one more expert.

    (Li and Liu, WAT: Improve the worst-class robustness in adversarial training, 2023.) With the class
    losses $L_c$ of held-out data and the mean loss of their samples $\bar L$, after t epochs

    $$(w_1, \dots, w_K, w_{K+1}) = K\,\mathrm{softmax}\Big(\eta \sum_{\tau \le t}
      (L_1, \dots, L_K, \bar L)\Big),$$

    so the sum K is that of all K + 1; before the first update each is 1. The training loss is
    $\frac{1}{N} \sum_i w_{y_i} l_i + w_{K+1} \frac{1}{N} \sum_i l_i$:
    `(w.class_weights.to(l)[y] * l).mean() + w.average_weight * l.mean()`.

    A softmax does not change if all its entries shift alike, so the state is the excess over the
    average, $\sum_\tau (L_c - \bar L)$. An absent class adds nothing to it: its weight keeps its
    ratio to the average's, where adding no *loss* would make it pass for the easiest one.

    Args:
        num_classes: K >= 2.
        rate: $\eta \ge 0$.

    Attributes:
        excess: the sum above, float64 `(K,)`, on the device of the last losses.
        updates: number of epochs in it.

    Example:
        >>> hedge = HedgeWeights(2, rate=1.0)
        >>> hedge.update(torch.tensor([4.0, 1.0]).log(), torch.tensor(2.0).log().item())
        >>> hedge.class_weights  # 2 * (4, 1, 2) / 7
        tensor([1.1429, 0.2857], dtype=torch.float64)
        >>> round(hedge.average_weight, 4)
        0.5714
    """

    @public
    def __init__(self, num_classes: int, *, rate: float = 0.1) -> None:
        _checks.integer(2, num_classes=num_classes)
        _checks.real(0, rate=rate)
        self.num_classes, self.rate = num_classes, rate
        self.excess = torch.zeros(self.num_classes, dtype=torch.float64, device="cpu")
        self.updates = 0

    @property
    def class_weights(self) -> Tensor:
        """Float64 `(K,)`, on the device of the last losses."""
        return self._weights()[:-1]

    @property
    def average_weight(self) -> float:
        """The weight of the plain mean loss."""
        return self._weights()[-1].item()

    @public
    def update(self, class_losses: Tensor, average_loss: float) -> None:
        """Add an epoch's mean loss of each class `(K,)` on held-out data, and that of all samples."""
        _checks.class_vector(num_classes=self.num_classes, class_losses=class_losses)
        _checks.real(average_loss=average_loss)
        excess = _checks.double(class_losses.detach()) - average_loss
        if bool(excess.isnan().all()):
            raise InvalidValue("expected `class_losses` of at least one class, got only nan")
        self.excess = _checks.double(self.excess, excess.device) + excess.nan_to_num()
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that continuing needs."""
        return {"excess": self.excess.clone(), "updates": torch.tensor(self.updates, device="cpu")}

    @public
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state that `state_dict` returned."""
        _checks.state(state, self.state_dict())
        self.excess, self.updates = state["excess"].clone(), int(state["updates"])

    def _weights(self) -> Tensor:
        if not self.updates:
            return self.excess.new_ones(self.num_classes + 1)
        return self.num_classes * F.softmax(self.rate * F.pad(self.excess, (0, 1)), dim=0)
