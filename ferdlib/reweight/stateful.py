"""Class weights that accumulate over epochs: FRL's Lagrange multipliers and WAT's hedge."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib.reweight._common import checked_state, class_values

__all__ = ["FRLWeights", "HedgeWeights"]


class FRLWeights:
    r"""FRL's class weights: Lagrange multipliers of "no class errs much more than the average".

    With the natural error $e_c$ and the boundary error $b_c$ (clean minus robust accuracy) of each
    class, and their means over classes (the release's over samples: the same on balanced data), each
    `update` adds

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
        remargin: whether `eps_factors` follow too, $\lambda^2_c \mathrel{+}= r_2 (b_c - \bar b -
            \delta_1)$, without a bound of its own.
        margin_rate: $r_2 \ge 0$.

    Attributes:
        clean_multipliers, boundary_multipliers, margin_multipliers: $\lambda^0, \lambda^1,
            \lambda^2$, float64 `(K,)`, zeros at first, on the device of the last accuracies.

    Raises:
        TypeError, ValueError: settings or a state of another kind; accuracies that are not float
            `(K,)` in [0, 1], or of no class at all.

    Reference: Xu et al., To be robust or to be fair, 2021.

    Example:
        >>> frl = FRLWeights(2, clean_slack=0.0, boundary_slack=0.1, rate=0.5)
        >>> frl.update(torch.tensor([0.9, 0.5]), torch.tensor([0.8, 0.1]))  # b = (0.1, 0.4)
        >>> frl.clean_weights  # lambda = (0, 0.5 * 0.2)
        tensor([0.9000, 1.1000], dtype=torch.float64)
        >>> frl.boundary_weights  # lambda = (0, 2 * 0.5 * (0.15 - 0.1))
        tensor([0.9500, 1.0500], dtype=torch.float64)
    """

    _name = "FRLWeights"

    def __init__(
        self,
        num_classes: int,
        *,
        clean_slack: float = 0.1,
        boundary_slack: float = 0.1,
        rate: float = 0.05,
        limit: float = 0.5,
        remargin: bool = False,
        margin_rate: float = 0.2,
    ) -> None:
        name = self._name
        self.num_classes = _checks.integer(name, "num_classes", num_classes, low=2)
        self.clean_slack = _checks.number(name, "clean_slack", clean_slack, low=0.0)
        self.boundary_slack = _checks.number(name, "boundary_slack", boundary_slack, low=0.0)
        self.rate = _checks.number(name, "rate", rate, low=0.0)
        self.limit = _checks.number(name, "limit", limit, low=0.0, high=1.0)
        self.remargin = remargin
        self.margin_rate = _checks.number(name, "margin_rate", margin_rate, low=0.0)
        self.clean_multipliers = torch.zeros(self.num_classes, dtype=torch.float64)
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
        r"""$\exp(2 \lambda^2)$ cut off at 0.98 and 3: factors of the attack's radius, `(K,)`.

        The release's step is a quarter of the largest of its radii.
        """
        return (2 * self.margin_multipliers).exp().clamp(0.98, 3.0)

    def update(self, clean_accuracy: Tensor, robust_accuracy: Tensor) -> None:
        """Move the multipliers by an epoch's class accuracies `(K,)` on held-out data.

        A class that is `nan` in either is absent.
        """
        name, k = self._name, self.num_classes
        clean = class_values(name, "clean_accuracy", clean_accuracy, k, accuracy=True)
        robust = class_values(name, "robust_accuracy", robust_accuracy, k, accuracy=True)
        rate = _checks.number(name, "rate", self.rate, low=0.0)
        error, boundary = 1 - clean, clean - robust.to(clean.device)
        if bool(boundary.isnan().all()):
            raise ValueError(
                f"{name}: expected `robust_accuracy` of a class that `clean_accuracy` has too, got none"
            )
        error = error.masked_fill(boundary.isnan(), torch.nan)
        too_much = error - error.nanmean() - self.clean_slack
        self.clean_multipliers = self._moved(self.clean_multipliers, rate * too_much)
        too_much = boundary - boundary.nanmean() - self.boundary_slack
        self.boundary_multipliers = self._moved(self.boundary_multipliers, 2 * rate * too_much)
        if self.remargin:
            step = (self.margin_rate * too_much).nan_to_num()
            self.margin_multipliers = self.margin_multipliers.to(step.device) + step

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the multipliers, and the rate as it is now."""
        return {
            "clean_multipliers": self.clean_multipliers.clone(),
            "boundary_multipliers": self.boundary_multipliers.clone(),
            "margin_multipliers": self.margin_multipliers.clone(),
            "rate": torch.tensor(self.rate, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned."""
        loaded = checked_state(self._name, state, self.state_dict())
        self.rate = loaded.pop("rate").item()
        for key, value in loaded.items():
            setattr(self, key, value)

    def _moved(self, multipliers: Tensor, step: Tensor) -> Tensor:
        moved = (multipliers.to(step.device) + step.nan_to_num()).clamp(min=0)
        total = moved.sum()
        return torch.where(total > self.limit, moved * (self.limit / total), moved)

    def _weights(self, multipliers: Tensor) -> Tensor:
        w = 1 + self.num_classes * multipliers - multipliers.sum()
        return w.clamp(min=0)  # a sum that is the limit 1 may round to above it


class HedgeWeights:
    r"""WAT's class weights: a hedge over the classes, and the average as one more expert.

    With the class losses $L_c$ of held-out data and their average $\bar L$, after t epochs

    $$(w_1, \dots, w_K, w_{K+1}) = K\,\mathrm{softmax}\Big(\eta \sum_{\tau \le t}
      (L_1, \dots, L_K, \bar L)\Big),$$

    so it is all K + 1 that sum to K; before the first update each is 1. The training loss is
    $\frac{1}{N} \sum_i w_{y_i} l_i + w_{K+1} \frac{1}{N} \sum_i l_i$:
    `(w.class_weights.to(l)[y] * l).mean() + w.average_weight * l.mean()`.

    A softmax does not see what all its entries have in common, so what is kept is the excess over
    the average, $\sum_\tau (L_c - \bar L)$. An absent class adds nothing to it: its weight keeps its
    ratio to the average's, where adding no *loss* would make it pass for the easiest one.

    Args:
        num_classes: K >= 2.
        rate: $\eta \ge 0$.

    Attributes:
        excess: the sum above, float64 `(K,)`, on the device of the last losses.
        updates: how many epochs are in it.

    Raises:
        TypeError, ValueError: settings or a state of another kind; losses that are not finite float
            `(K,)`, or of no class at all; an average that is no number.

    Reference: Li and Liu, WAT: Improve the worst-class robustness in adversarial training, 2023.

    Example:
        >>> hedge = HedgeWeights(2, rate=1.0)
        >>> hedge.update(torch.tensor([4.0, 1.0]).log(), torch.tensor(2.0).log().item())
        >>> hedge.class_weights  # 2 * (4, 1, 2) / 7
        tensor([1.1429, 0.2857], dtype=torch.float64)
        >>> round(hedge.average_weight, 4)
        0.5714
    """

    _name = "HedgeWeights"

    def __init__(self, num_classes: int, *, rate: float = 0.1) -> None:
        self.num_classes = _checks.integer(self._name, "num_classes", num_classes, low=2)
        self.rate = _checks.number(self._name, "rate", rate, low=0.0)
        self.excess = torch.zeros(self.num_classes, dtype=torch.float64)
        self.updates = 0

    @property
    def class_weights(self) -> Tensor:
        """Float64 `(K,)`, on the device of the last losses."""
        return self._weights()[:-1]

    @property
    def average_weight(self) -> float:
        """The weight of the plain mean loss."""
        return self._weights()[-1].item()

    def update(self, class_losses: Tensor, average_loss: float) -> None:
        """Add an epoch's mean loss of each class `(K,)` on held-out data, and that of all samples."""
        k = self.num_classes
        losses = class_values(self._name, "class_losses", class_losses, k)
        average = _checks.number(self._name, "average_loss", average_loss)
        self.excess = self.excess.to(losses.device) + (losses - average).nan_to_num()
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that continuing needs."""
        return {"excess": self.excess.clone(), "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned."""
        loaded = checked_state(self._name, state, self.state_dict())
        self.excess, self.updates = loaded["excess"], int(loaded["updates"])

    def _weights(self) -> Tensor:
        if not self.updates:
            return self.excess.new_ones(self.num_classes + 1)
        return self.num_classes * F.softmax(self.rate * F.pad(self.excess, (0, 1)), dim=0)
