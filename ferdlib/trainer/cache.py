"""What is computed once of each stored image: the teacher's logits, and examples made on the teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ferdlib.augment import Crops
from ferdlib.methods import FERDDistillation, FrozenTeacher, Method
from ferdlib.synthesis import ImagePool
from ferdlib.trainer.config import FERDConfig

Attack = Callable[[Tensor, Tensor], Tensor]


class TeacherCache:
    """Columns of the pool beside the images, filled as the config says and read at each student step.

    Logits and examples of an image that nothing changes are computed when it is stored; logits of its crops
    when they are first asked for.

    Args:
        pool: where images are stored.
        config: its `cache_teacher_logits`, `cache_teacher_utae` and `augment` decide what is kept.
        method: whose teacher's logits are kept, if it has any of clean images.
        replaced: whether another attack than the method's is used, whose examples are never kept.
    """

    def __init__(
        self, pool: ImagePool, config: FERDConfig, method: Method, *, replaced: bool
    ) -> None:
        self.pool = pool
        self.variants, self.num_classes = Crops.count(config.crop_padding), config.num_classes
        teacher = getattr(method, "logits", None)
        self.teacher = teacher if isinstance(teacher, FrozenTeacher) else None
        augmented = config.augment != "none"
        self.logits = config.cache_teacher_logits == "images" and not augmented
        self.crop_logits = config.cache_teacher_logits == "crops" and augmented
        fixed = isinstance(method, FERDDistillation) and method.attack_model == "teacher"
        same_every_time = not augmented and config.random_start is None
        self.examples = (fixed and not replaced) and (
            config.cache_teacher_utae == "joint"
            or (config.cache_teacher_utae == "exact" and same_every_time)
        )

    def columns(self, x: Tensor, y: Tensor, attack: Attack) -> dict[str, Tensor]:
        """What is kept of images `x`, as they are stored, with labels `y`."""
        columns = {}
        if self.teacher is not None and self.logits:
            columns["logits"] = self.teacher(x).detach()
        if self.examples:
            columns["examples"] = attack(x, y)
        if self.teacher is not None and self.crop_logits:
            shape = (len(x), self.variants, self.num_classes)
            columns["crop_logits"] = torch.full(shape, torch.nan, device=x.device)
        return columns

    def recall(self, index: Tensor, crops: Crops | None, x: Tensor) -> Tensor | None:
        """Hand the teacher the logits of `x` that are known, and return its examples if they are.

        Args:
            index: numbers of the images in the pool.
            crops: how they were augmented.
            x: the images after that.
        """
        if self.teacher is not None and self.logits:
            self.teacher.remember(x, self.pool.column("logits")[index])
        elif self.teacher is not None and self.crop_logits and crops is not None:
            self.teacher.remember(x, self._of_crops(self.teacher, index, crops, x))
        if not self.examples:
            return None
        examples = self.pool.column("examples")[index]
        return examples if crops is None else crops(examples)

    def _of_crops(self, teacher: FrozenTeacher, index: Tensor, crops: Crops, x: Tensor) -> Tensor:
        table, number = self.pool.column("crop_logits"), crops.number
        known = table[index, number]
        missing = known.isnan().any(dim=1)
        if bool(missing.any()):
            known[missing] = teacher(x[missing]).to(known)
            table[index[missing], number[missing]] = known[missing]
        return known
