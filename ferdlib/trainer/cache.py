"""Values that are computed once per stored image: the teacher's logits, and examples made on the teacher."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ferdlib.methods import FERDDistillation, FrozenTeacher, Method
from ferdlib.synthesis import ImagePool
from ferdlib.trainer.config import FERDConfig

Attack = Callable[[Tensor, Tensor], Tensor]


class TeacherCache:
    """Columns of the pool next to the images, filled when images are stored and read at each student step.

    Nothing is kept of images that are augmented at each step.

    Args:
        pool: where images are stored.
        config: its `cache_teacher_logits`, `cache_teacher_utae` and `augment` decide what is kept.
        method: its teacher's logits are kept, if it has any of clean images.
        replaced: another attack than the method's is used; its examples are never kept.
    """

    def __init__(
        self, pool: ImagePool, config: FERDConfig, method: Method, *, replaced: bool
    ) -> None:
        self.pool = pool
        plain = config.augment == "none"
        teacher = getattr(method, "logits", None)
        self.teacher = teacher if isinstance(teacher, FrozenTeacher) else None
        self.logits = plain and config.cache_teacher_logits == "images"
        fixed = isinstance(method, FERDDistillation) and method.attack_model == "teacher"
        same_every_time = plain and config.random_start is None
        self.examples = (
            fixed and same_every_time and not replaced and config.cache_teacher_utae == "exact"
        )

    def columns(self, x: Tensor, y: Tensor, attack: Attack) -> dict[str, Tensor]:
        """Compute what is kept of images `x`, as they are stored, with labels `y`."""
        columns = {}
        if self.teacher is not None and self.logits:
            columns["logits"] = self.teacher(x).detach()
        if self.examples:
            columns["examples"] = attack(x, y)
        return columns

    def recall(self, index: Tensor, x: Tensor) -> Tensor | None:
        """Hand the teacher the logits of `x` that are known, and return its examples if they are.

        Args:
            index: numbers of the images in the pool.
            x: the images.
        """
        if self.teacher is not None and self.logits:
            self.teacher.remember(x, self.pool.column("logits")[index])
        return self.pool.column("examples")[index] if self.examples else None
