"""A teacher's logits by the identity of the images; goes as soon as the trainer passes them as a value."""

from __future__ import annotations

from torch import Tensor, nn

from ferdlib.methods.protocol import teacher_logits


class FrozenTeacher:
    """A teacher's logits in eval mode and without gradients, computed once per batch.

    Example:
        >>> import torch
        >>> teacher = FrozenTeacher(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
        >>> x = torch.rand(2, 1, 2, 2)
        >>> teacher(x) is teacher(x)
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._images: Tensor | None = None
        self._version = -1
        self._logits: Tensor | None = None

    def remember(self, x: Tensor, logits: Tensor) -> None:
        """Take the logits of `x` for known."""
        self._images, self._logits = x, logits
        self._version = -1 if x.is_inference() else x._version

    def __call__(self, x: Tensor) -> Tensor:
        version = -1 if x.is_inference() else x._version
        known = self._images is x and version == self._version != -1
        if self._logits is None or not known:
            self.remember(x, teacher_logits(self.model, x))
        assert self._logits is not None
        return self._logits
