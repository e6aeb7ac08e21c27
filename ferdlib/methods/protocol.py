"""What a trainer asks of a robust distillation method."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ferdlib import _oldchecks as _checks
from ferdlib._modes import borrowed


@runtime_checkable
class Method(Protocol):
    """Attack plus loss plus end-of-epoch rule.

    A step of training is `x_adv = method.attack(student, x, y)`, then
    `method.loss(student, x, x_adv, y).mean()` with the student in train mode. `end_epoch` updates what
    changes once per epoch (class weights, temperatures); `state_dict` gives it out. A method that learns
    from images that are not trained on (FRL, WAT) also has `validate(student, batches)`, before `end_epoch`;
    one that learns in several processes has `sync()`, between the two.
    """

    def attack(self, student: nn.Module, x: Tensor, y: Tensor) -> Tensor: ...

    def loss(self, student: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor: ...

    def end_epoch(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FrozenTeacher:
    """A teacher's logits in eval mode and without gradients, computed once per batch.

    Attack and loss of a step ask for the same images: the logits of the last tensor that came are kept
    until another one comes, or until that one is changed in place.

    Args:
        model: from images to logits `(N, K)`.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> teacher = FrozenTeacher(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
        >>> x = torch.rand(2, 1, 2, 2)
        >>> teacher(x) is teacher(x)
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = _checks.module("FrozenTeacher", "model", model)
        self._images: Tensor | None = None
        self._version = -1
        self._logits: Tensor | None = None

    def remember(self, x: Tensor, logits: Tensor) -> None:
        """Take the logits of `x` for known."""
        _checks.tensor("FrozenTeacher.remember", "x", x)
        _checks.tensor("FrozenTeacher.remember", "logits", logits)
        self._images, self._logits = x, logits
        self._version = -1 if x.is_inference() else x._version

    def __call__(self, x: Tensor) -> Tensor:
        _checks.tensor("FrozenTeacher", "x", x)
        # Tensors made under inference_mode have no version counter, and are not kept.
        version = -1 if x.is_inference() else x._version
        known = self._images is x and version == self._version != -1
        if self._logits is None or not known:
            with torch.no_grad(), borrowed(self.model):
                self.remember(x, self.model(x))
        assert self._logits is not None
        return self._logits
