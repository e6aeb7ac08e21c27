"""CFA's fairness-aware weight averaging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ferdlib import _oldchecks as _checks


class FairAverage:
    r"""Moving average of a model over the epochs in which its worst class is robust enough (FAWA).

    $$\bar\theta \leftarrow \alpha \bar\theta + (1 - \alpha) \theta \quad \text{if}
      \quad \min_c r_c \ge \text{threshold}$$

    Weights and floating-point buffers, BatchNorm's statistics among them, are averaged; integer
    ones (its counter of batches) are copied. The first average is a copy of the model.

    Args:
        model: what is trained, unwrapped. A deep copy is made; the model itself is only ever read.
        decay: alpha in [0, 1], per update: per epoch in CFA.
        threshold: in [0, 1]; the release's default is 0.24 and its README's example 0.2.

    Attributes:
        module: the average, in eval mode and without weight gradients; before the first update that
            averages, the model as it was given.

    Raises:
        TypeError, ValueError: a model that is no module, or has other parameters or buffers than the
            first one; settings out of range; accuracies that are not float `(K,)` in [0, 1], or of
            no class at all; a state of another kind.

    Reference: Wei et al., CFA: Class-wise calibrated fair adversarial training, 2023.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 2)
        >>> average = FairAverage(model, decay=0.75)
        >>> for bias, accuracy in [(1.0, 0.1), (4.0, 0.3), (8.0, 0.5)]:
        ...     _ = nn.init.constant_(model.bias, bias)
        ...     average.update(model, torch.tensor([0.6, accuracy]))
        False
        True
        True
        >>> average.module.bias  # 0.75 * 4 + 0.25 * 8
        Parameter containing:
        tensor([5., 5.])
    """

    _name = "FairAverage"

    def __init__(self, model: nn.Module, *, decay: float = 0.88, threshold: float = 0.2) -> None:
        _checks.module(self._name, "model", model)
        self.decay = _checks.number(self._name, "decay", decay, low=0.0, high=1.0)
        self.threshold = _checks.number(self._name, "threshold", threshold, low=0.0, high=1.0)
        self._average = AveragedModel(model, avg_fn=self._mixed, use_buffers=True)
        self.module.eval().requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        return self._average.module

    @property
    def updates(self) -> int:
        """How many models are in the average."""
        return int(self._average.n_averaged)

    def update(self, model: nn.Module, class_accuracy: Tensor) -> bool:
        """Take the model into the average, if the accuracies allow it; returns whether they did.

        Args:
            model: the one that was given at first, or one like it.
            class_accuracy: its own robust accuracies `(K,)` on held-out data; `nan` for an absent
                class, which does not count.
        """
        expected = [tuple(value.shape) for value in _values(self.module)]
        _checks.module(self._name, "model", model)
        if [tuple(value.shape) for value in _values(model)] != expected:
            raise ValueError(
                f"{self._name}: expected `model` with the parameters and buffers of the first one, "
                f"got other shapes"
            )
        # As tensors: 0.7 in float32 reaches 0.7, though as a float it is less.
        if not bool(self._worst(class_accuracy) >= self.threshold):
            return False
        self._average.update_parameters(model)
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the average's weights and buffers, and of how many models are in it."""
        return {key: value.clone() for key, value in self._average.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned."""
        # torch loads what fits before it complains of what does not.
        _checks.state(self._name, state, self._average.state_dict())
        self._average.load_state_dict(state)

    def _mixed(self, average: Tensor, current: Tensor, _: Tensor | int) -> Tensor:
        if not (current.is_floating_point() or current.is_complex()):
            return current
        return self.decay * average + (1 - self.decay) * current

    def _worst(self, class_accuracy: Tensor) -> Tensor:
        a = _checks.class_vector(self._name, class_accuracy, argument="class_accuracy")
        present = a[~a.isnan()]
        if not len(present):
            raise ValueError(
                f"{self._name}: expected `class_accuracy` of at least one class, got only nan"
            )
        outside = present[(present < 0) | (present > 1)]
        if len(outside):
            raise ValueError(
                f"{self._name}: expected `class_accuracy` in [0, 1] (or nan), got {outside[0]:g}; "
                f"divide percentages by 100"
            )
        return present.min()


def _values(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())
