"""FERD's Algorithm 1: synthesise, reweight, distil."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ferdlib import _checks, losses, reweight
from ferdlib._modes import borrowed
from ferdlib.attacks import least_pgd_steps, pgd
from ferdlib.methods import FrozenTeacher, Method
from ferdlib.models.freeze import FrozenModel, fast_copy
from ferdlib.synthesis import ImagePool, Inversion, Source
from ferdlib.synthesis.inversion import OptimizerFactory, adam
from ferdlib.trainer import parts
from ferdlib.trainer.cache import TeacherCache
from ferdlib.trainer.config import FERDConfig
from ferdlib.trainer.parts import Rule

LOG = logging.getLogger("ferdlib")

AttackStep = Callable[[nn.Module, Tensor, Tensor], Tensor]
StudentOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochStats:
    """What one epoch of `FERDTrainer` did.

    Attributes:
        epoch: number of epochs done, this one included.
        warmup: whether the student was left alone.
        student_loss: mean of the distillation loss over the epoch's steps; nan in warm-up.
        learning_rate: the student's, during the epoch.
        class_probabilities: p for the next epoch's labels.
        label_agreement: share of the stored batch that the teacher assigns to the label it was made for.
        diversity: standard deviation of a pixel over the stored batch, mean over pixels; 0 is collapse.
        pool_size: images stored so far.
        synthesis: the source's metrics: generator losses and the non-robust fraction for FERD's.
        seconds: wall-clock time.
    """

    epoch: int
    warmup: bool
    student_loss: float
    learning_rate: float
    class_probabilities: tuple[float, ...]
    label_agreement: float
    diversity: float
    pool_size: int
    synthesis: dict[str, float]
    seconds: float


class FERDTrainer:
    """Distil a robust teacher into a student, fairly and without data (FERD Algorithm 1).

    Composition only: an `Inversion` fills an `ImagePool`, adversarial margins on the teacher set the class
    probabilities, a `FERDDistillation` trains the student. Each part can be replaced by passing another.
    The student is trained in place; the teacher is only borrowed. All randomness comes from `seed` (layers
    of the student that draw noise themselves, such as dropout, excepted).

    Args:
        teacher: robust module from images in [0, 1] to logits `(N, K)`.
        student: module from the same images to logits `(N, K)`.
        generator: codes to images; None makes a `synthesis.Generator` of the config's shape.
        config: the settings.
        source: makes images, instead of FERD's inversion.
        method: attack and loss, instead of FERD's. If it has an `rng` that is None, the trainer's is set.
        attack: called as `attack(student, x, y)`, instead of the method's; where that is what a
            method learns from (the Fair- ones, GAIRAT), it must be called in it.
        validation: batches `(x, y)` of held-out images, iterated once per epoch, for methods that `validate`.
        reweight: class means of the margin `(K,)` to class probabilities `(K,)`, instead of the config's rule.
        student_optimizer: makes the student's optimizer from its parameters, instead of the config's SGD.
        generator_optimizer: makes the generator's from parameter groups at every epoch, instead of Adam.
        seed: of all randomness, >= 0.
        device: where the models are moved; None leaves them where the student is.

    Attributes:
        teacher, student, generator, config, source, method, pool: the parts.
        class_probabilities: p, `(K,)`.
        epoch: epochs done.

    Raises:
        TypeError: models that are not modules, or a config of another type.
        ValueError: a teacher that is the student or shares weights with it, models whose logits do not
            fit the config, a layer that cannot be cut; `validation` for a method without use for it, or none
            for one with.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> config = FERDConfig(
        ...     num_classes=3, layer="layer4", image_shape=(1, 8, 8), epochs=2, warmup_epochs=1, batch_size=6,
        ...     generator_steps=2, generator_width=4, bottleneck_steps=2, student_steps=2)
        >>> trainer = FERDTrainer(small_cnn(1, 3, width=4), small_cnn(1, 3, width=2), config=config)
        >>> [stats.pool_size for stats in trainer.epochs()]
        [6, 12]
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: nn.Module | None = None,
        *,
        config: FERDConfig,
        source: Source | None = None,
        method: Method | None = None,
        attack: AttackStep | None = None,
        validation: Iterable[tuple[Tensor, Tensor]] | None = None,
        reweight: Rule | None = None,
        student_optimizer: StudentOptimizer | None = None,
        generator_optimizer: OptimizerFactory | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        parts.check_models(teacher, student, config)
        self._rng = torch.Generator().manual_seed(
            _checks.integer("FERDTrainer", "seed", seed, low=0)
        )
        self.device = torch.device(device or next(student.parameters()).device)
        self.teacher, self.student = teacher.to(self.device), student.to(self.device)
        self.config = config
        self._fast_teacher = fast_copy(teacher) if config.fold_batchnorm else teacher
        self._teacher_logits = FrozenTeacher(self._fast_teacher)
        if source is None:
            parts.check_logits(teacher, student, config, self.device)
            generator = generator or parts.fresh_generator(config, self.device, self._rng)
            source = parts.inversion(
                config, teacher, generator.to(self.device), generator_optimizer or adam, self._rng
            )
        self.source: Source = source
        self.generator = generator
        self.method: Method = method or parts.distillation(config, self._fast_teacher, self._rng)
        parts.check_method(self.method, validation)
        if getattr(self.method, "rng", self._rng) is None:
            self.method.rng = self._rng  # type: ignore[attr-defined]
        self._validation = validation
        self._attack = attack or self.method.attack
        self._rule = reweight or parts.rule(config)
        self._crops = parts.crops(config, self._rng)
        self.pool = ImagePool(config.pool_capacity, getattr(torch, config.pool_dtype))
        self._cache = TeacherCache(self.pool, config, self.method, replaced=attack is not None)
        trained = [p for p in student.parameters() if p.requires_grad]
        self.student_optimizer = (student_optimizer or partial(parts.sgd, config))(trained)
        self._initial_rates = [group["lr"] for group in self.student_optimizer.param_groups]
        self.class_probabilities = torch.full((config.num_classes,), 1 / config.num_classes)
        self.epoch = 0
        self._statistic = torch.full((config.num_classes,), torch.nan, dtype=torch.float64)
        self._batch: tuple[Tensor, Tensor] | None = None

    def epochs(self) -> Iterator[EpochStats]:
        """Train from `epoch` to `config.epochs`, and yield after each.

        The loop body may evaluate, log, save `state_dict()` or stop; a stopped loop is continued by
        calling `epochs()` again.

        Raises:
            RuntimeError: a loss became NaN or infinite.
        """
        while self.epoch < self.config.epochs:
            yield self._run_epoch()

    def fit(self) -> list[EpochStats]:
        """Run `epochs()` to the end."""
        return list(self.epochs())

    def synthesize(self) -> tuple[Tensor, Tensor]:
        """One batch from the source, appended to the pool (Algorithm 1, lines 6 to 11)."""
        batch = next(self._batches(), None)
        if batch is None:
            raise RuntimeError("FERDTrainer: expected `source` to yield a batch, got none")
        return self._store(batch)

    def update_class_probabilities(self) -> Tensor:
        """Class probabilities from the last batch's adversarial margins (Eq. 1 and 2, Algorithm 1, line 12).

        Returns:
            The new `class_probabilities`, `(K,)` with sum 1.

        Raises:
            RuntimeError: nothing has been synthesised yet.
        """
        if self._batch is None:
            raise RuntimeError(
                "FERDTrainer.update_class_probabilities: expected a synthesised batch, got none; "
                "call synthesize() first"
            )
        if self._rule is None:
            return self.class_probabilities
        config = self.config
        means = self._class_means(*self._batch)
        if config.absent_classes == "zero":
            means = means.nan_to_num(nan=0.0)
        elif config.absent_classes == "previous":
            means = torch.where(means.isnan(), self._statistic, means)
        if config.margin_ema > 0:
            kept = torch.where(self._statistic.isnan(), means, self._statistic)
            means = config.margin_ema * kept + (1 - config.margin_ema) * means
        self._statistic = means
        self.class_probabilities = reweight.normalize(self._rule(means), to="sum").float()
        largest = float(self.class_probabilities.max())
        if largest > max(0.5, 2 / config.num_classes):
            LOG.warning(
                "FERDTrainer: class %d has probability %.2f; raise `class_floor` or `reweight_temperature`",
                int(self.class_probabilities.argmax()),
                largest,
            )
        return self.class_probabilities

    def distill_step(self) -> Tensor:
        """One step of the student on a batch from the pool (Algorithm 1, lines 15 to 17).

        Returns:
            The batch's mean loss, a detached scalar.

        Raises:
            RuntimeError: the pool is empty.
        """
        index = self.pool.draw(self.config.batch_size, rng=self._rng)
        x, y = self.pool[index]
        crops = None if self._crops is None else self._crops(len(x), device=x.device)
        x = x if crops is None else crops(x)
        # A student in train mode keeps its own flags: layers that its owner froze stay frozen.
        training = None if self.student.training else True
        with (
            parts.precision(self.config, self.device),
            borrowed(self.student, training=training, freeze=False),
        ):
            x_adv = self._cache.recall(index, crops, x)
            if x_adv is None:
                x_adv = self._attack(self.student, x, y)
            loss = self.method.loss(self.student, x, x_adv, y).mean()
        self.student_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.student_optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on as if nothing had happened, as copies.

        Taken between epochs; the teacher is not in it. `torch.save` writes it, and
        `torch.load(..., weights_only=True)` reads it.
        """
        state = {
            "config": asdict(self.config),
            "epoch": self.epoch,
            "student": self.student.state_dict(),
            "student_optimizer": self.student_optimizer.state_dict(),
            "source": self.source.state_dict(),
            "method": self.method.state_dict(),
            "pool": self.pool.state_dict(),
            "class_probabilities": self.class_probabilities,
            "statistic": self._statistic,
            "rng": self._rng.get_state(),
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()` of a trainer with the same config.

        Raises:
            ValueError: the state was made under another config (the fields that differ are named) or for
                another student; nothing is loaded then.
        """
        saved, own = state["config"], asdict(self.config)
        differing = sorted(k for k in own.keys() | saved.keys() if saved.get(k) != own.get(k))
        if differing:
            raise ValueError(
                "FERDTrainer.load_state_dict: expected a state of the same config, got other values "
                f"for {', '.join(differing)}"
            )
        # torch loads what fits before it complains of what does not.
        shapes = [
            {name: tuple(value.shape) for name, value in weights.items()}
            for weights in (state["student"], self.student.state_dict())
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "FERDTrainer.load_state_dict: expected a state of the same student architecture, got "
                f"other names or shapes for {', '.join(sorted(dict(shapes[0].items() ^ shapes[1].items())))}"
            )
        state = copy.deepcopy(state)
        self.student.load_state_dict(state["student"])
        self.student_optimizer.load_state_dict(state["student_optimizer"])
        self.source.load_state_dict(state["source"])
        self.method.load_state_dict(state["method"])
        self.pool.load_state_dict(state["pool"])
        self.class_probabilities, self._statistic = state["class_probabilities"], state["statistic"]
        self._rng.set_state(state["rng"])
        self.epoch = state["epoch"]
        self._batch = None

    def _run_epoch(self) -> EpochStats:
        start = time.perf_counter()
        config, warmup = self.config, self.epoch < self.config.warmup_epochs
        self._set_rates()
        self._batch = None
        step_losses: list[Tensor] = []
        for batch in self._batches():
            self._store(batch)
            self.update_class_probabilities()
            if not warmup:
                step_losses += [self.distill_step() for _ in range(config.student_steps)]
        if self._batch is None:
            raise RuntimeError("FERDTrainer: expected `source` to yield a batch, got none")
        x, y = self._batch
        student_loss = float(torch.stack(step_losses).mean()) if step_losses else float("nan")
        if step_losses and not student_loss < float("inf"):
            raise RuntimeError(
                f"FERDTrainer: expected a finite student loss, got {student_loss} in epoch {self.epoch}; "
                f"lower `student_lr`"
            )
        if not warmup:  # the method has seen nothing of a warm-up epoch
            if self._validation is not None:
                batches = ((x.to(self.device), y.to(self.device)) for x, y in self._validation)
                self.method.validate(self.student, batches)
            self.method.end_epoch()
        self.epoch += 1
        stats = EpochStats(
            epoch=self.epoch,
            warmup=warmup,
            student_loss=student_loss,
            learning_rate=self.student_optimizer.param_groups[0]["lr"],
            class_probabilities=tuple(self.class_probabilities.tolist()),
            label_agreement=float((self._teacher_logits(x).argmax(dim=1) == y).float().mean()),
            diversity=float(x.std(dim=0).mean()) if len(x) > 1 else 0.0,
            pool_size=len(self.pool),
            synthesis=dict(self.source.metrics),
            seconds=time.perf_counter() - start,
        )
        LOG.info("%s", stats)
        return stats

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self._fast_teacher, FrozenModel):
            self._fast_teacher.follow(self.teacher)  # its owner may have loaded weights since
        return self.source.epoch(self.student, self.class_probabilities)

    def _store(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = self.pool.stored(batch[0]), batch[1]
        with parts.precision(self.config, self.device):
            columns = self._cache.columns(x, y, partial(self._attack, self.student))
        self.pool.add(*batch, **columns)
        self._batch = batch
        return batch

    def _class_means(self, x: Tensor, y: Tensor) -> Tensor:
        """Class means of the adversarial margin (Eq. 2 without its sign) or of the least PGD steps."""
        config = self.config
        if config.margin_images == "last" and isinstance(self.source, Inversion):
            assert self.source.last_images is not None
            x = self.source.last_images
        labels = y if config.margin_labels == "sampled" else self._teacher_logits(x).argmax(dim=1)
        settings: dict[str, Any] = {
            "eps": config.eps,
            "step_size": config.step_size,
            "steps": config.margin_attack_steps,
            "rng": self._rng,
        }
        means = reweight.ClassMean(config.num_classes)
        if config.reweighting.startswith("lps"):
            means.update(least_pgd_steps(self._fast_teacher, x, labels, **settings)[1], labels)
        else:
            logits = self._teacher_logits(pgd(self._fast_teacher, x, labels, **settings))
            confidence = logits if config.margin_on == "logits" else logits.softmax(dim=1)
            means.update(losses.margin(confidence, labels), labels)
        return means.compute().cpu()

    def _set_rates(self) -> None:
        """The epoch's learning rates: a cosine of the epochs done, from the initial ones to 0."""
        config = self.config
        if config.schedule == "constant":
            return
        start = 0 if config.schedule_warmup else config.warmup_epochs
        done = max(0, self.epoch - start) / (config.epochs - start)
        for group, initial in zip(
            self.student_optimizer.param_groups, self._initial_rates, strict=True
        ):
            group["lr"] = initial * (1 + math.cos(math.pi * done)) / 2
