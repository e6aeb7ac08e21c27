"""CFA's fairness-aware weight averaging."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public
from ferdlib.models.freeze import copied


class FairAverage:
    r"""Moving average of a model over the epochs in which its worst class is robust enough (FAWA).

    $$\bar\theta \leftarrow \alpha \bar\theta + (1 - \alpha) \theta \quad \text{if}
      \quad \min_c r_c \ge \text{threshold}$$

    Weights and floating-point buffers, BatchNorm's statistics among them, are averaged; integer
    ones (its counter of batches) are copied. The first average is a copy of the model.

    Args:
        model: the trained one, unwrapped. A deep copy is made; the model itself is only ever read.
        decay: alpha in [0, 1], per update: per epoch in CFA.
        threshold: in [0, 1]; the release's default is 0.24 and its README's example 0.2.

    Reference: Wei et al., CFA: Class-wise calibrated fair adversarial training, 2023.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> average = FairAverage(model, decay=0.75)
        >>> for bias, accuracy in [(1.0, 0.1), (4.0, 0.3), (8.0, 0.5)]:
        ...     _ = nn.init.constant_(model.bias, bias)
        ...     _ = average.update(model, torch.tensor([0.6, accuracy]))
        >>> average.module.bias.tolist()  # 0.75 * 4 + 0.25 * 8
        [5.0, 5.0]
    """

    @public
    def __init__(self, model: nn.Module, *, decay: float = 0.88, threshold: float = 0.2) -> None:
        _checks.module(model=model)
        _checks.real(0, 1, decay=decay, threshold=threshold)
        self.decay, self.threshold = decay, threshold
        # A copy of a copy: torch's own cannot take weights that a hook makes.
        self._average = AveragedModel(copied(model), avg_fn=self._mixed, use_buffers=True)
        self.module.eval().requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """The average, in eval mode and without weight gradients; before an update the model as it was given."""
        return self._average.module

    @property
    def updates(self) -> int:
        """Number of models in the average."""
        return int(self._average.n_averaged)

    @public
    def update(self, model: nn.Module, class_accuracy: Tensor) -> bool:
        """Take the model into the average if the accuracies allow it; returns whether they did.

        Args:
            model: the one that was given at first, or one like it.
            class_accuracy: its own robust accuracies `(K,)` on held-out data; `nan` for an absent
                class, which does not count.
        """
        _checks.module(model=model)
        if _shapes(model) != _shapes(self.module):
            raise InvalidValue(
                "expected `model` with the parameters and buffers of the first one, got other shapes"
            )
        _checks.class_vector(0, 1, class_accuracy=class_accuracy)
        present = class_accuracy[~class_accuracy.isnan()]
        if not len(present):
            raise InvalidValue("expected `class_accuracy` of at least one class, got only nan")
        # Compared as tensors: 0.7 in float32 reaches 0.7, though as a float it is less.
        if not bool(present.min() >= self.threshold):
            return False
        self._average.update_parameters(model)
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the average's weights and buffers, and of the number of models in it."""
        return {key: value.clone() for key, value in self._average.state_dict().items()}

    @public
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned."""
        # torch loads what fits before it complains of what does not.
        _checks.state(state, self._average.state_dict())
        self._average.load_state_dict(state)

    def _mixed(self, average: Tensor, current: Tensor, _: Tensor | int) -> Tensor:
        if not (current.is_floating_point() or current.is_complex()):
            return current
        return self.decay * average + (1 - self.decay) * current


def _shapes(model: nn.Module) -> list[torch.Size]:
    return [value.shape for value in (*model.parameters(), *model.buffers())]
