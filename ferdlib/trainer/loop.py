"""FERD's Algorithm 1: synthesise, reweight, distil."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import repeat
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ferdlib import _oldchecks as _checks
from ferdlib._modes import borrowed
from ferdlib._ranks import Ranks
from ferdlib.methods import FrozenTeacher, Method
from ferdlib.models.freeze import FrozenModel, fast_copy
from ferdlib.synthesis import Inversion, Source
from ferdlib.synthesis.health import NonFiniteError
from ferdlib.synthesis.inversion import OptimizerFactory, adam
from ferdlib.trainer import guards, parts
from ferdlib.trainer import state as states
from ferdlib.trainer.cache import TeacherCache
from ferdlib.trainer.config import FERDConfig
from ferdlib.trainer.guards import StepLosses
from ferdlib.trainer.parts import Rule
from ferdlib.trainer.probabilities import ClassProbabilities
from ferdlib.trainer.stats import CollapseMonitor, EpochStats, of_images

LOG = logging.getLogger("ferdlib")

AttackStep = Callable[[nn.Module, Tensor, Tensor], Tensor]
StudentOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


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
        method: attack and loss, instead of FERD's. A source or method with an `rng` that is None gets the
            trainer's.
        attack: called as `attack(student, x, y)`, instead of the method's; where that is what a
            method learns from (the Fair- ones, GAIRAT), it must be called in it.
        validation: batches `(x, y)` of held-out images, iterated once per epoch, for methods that `validate`.
        reweight: class means of the margin `(K,)` to class probabilities `(K,)`, instead of the config's rule.
        student_optimizer: makes the student's optimizer from its parameters, instead of the config's SGD.
        generator_optimizer: makes the generator's from parameter groups at every epoch, instead of Adam.
        seed: of all randomness, >= 0.
        diagnostics: folder for a JSON file with the figures of a run that stops at NaN or infinity; None
            writes none.
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
        diagnostics: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        parts.check_models(teacher, student, config)
        parts.check_given(
            generator=generator,
            source=source,
            method=method,
            attack=attack,
            reweight=reweight,
            student_optimizer=student_optimizer,
            generator_optimizer=generator_optimizer,
        )
        self._rng = torch.Generator().manual_seed(
            _checks.integer("FERDTrainer", "seed", seed, low=0)
        )
        self._ranks = Ranks.here()
        noise = self._ranks.noise(self._rng)
        self._share = self._ranks.share("FERDTrainer", "config.batch_size", config.batch_size)
        own = next(student.parameters()).device
        self.device = own if device is None else _checks.device("FERDTrainer", device)
        self.teacher, self.student = teacher.to(self.device), student.to(self.device)
        self.config = config
        self._fast_teacher = fast_copy(teacher) if config.fold_batchnorm else teacher
        self._teacher_logits = FrozenTeacher(self._fast_teacher)
        if source is None:
            parts.check_logits(teacher, student, config, self.device)
            generator = generator or parts.fresh_generator(config, self.device, self._rng)
            optimizer = generator_optimizer or adam
            generator = generator.to(self.device)
            source = parts.inversion(config, teacher, generator, optimizer, noise, self._ranks)
        self.source: Source = source
        self.generator = generator
        self.method: Method = method or parts.distillation(config, self._fast_teacher, noise)
        parts.check_method(self.method, validation)
        for part in (self.method, self.source):
            if getattr(part, "rng", noise) is None:
                part.rng = noise  # type: ignore[union-attr]
        self._validation = validation
        self._attack = attack or self.method.attack
        self._crops = parts.crops(config, noise)
        self.pool = parts.pool(config, self._ranks)
        self._cache = TeacherCache(self.pool, config, self.method, replaced=attack is not None)
        self._parallel = self._ranks.parallel(student)
        trained = [p for p in student.parameters() if p.requires_grad]
        self.student_optimizer = (student_optimizer or partial(parts.sgd, config))(trained)
        self._initial_rates = [group["lr"] for group in self.student_optimizer.param_groups]
        self.class_probabilities = torch.full((config.num_classes,), 1 / config.num_classes)
        self._probabilities = ClassProbabilities(
            config,
            reweight or parts.rule(config),
            self._fast_teacher,
            self._teacher_logits,
            noise,
            self._ranks,
        )
        self._diagnostics = (
            None if diagnostics is None else _checks.path("FERDTrainer", "diagnostics", diagnostics)
        )
        self.epoch = 0
        self._monitor = CollapseMonitor()
        self._batch: tuple[Tensor, Tensor] | None = None
        # The losses of an epoch that was stopped among its student steps.
        self._stopped: list[Tensor] | None = None

    def epochs(self, *, stop: Callable[[], bool] | None = None) -> Iterator[EpochStats]:
        """Train from `epoch` to `config.epochs`, and yield after each.

        The loop body may evaluate, log, save `state_dict()` or stop; a stopped loop is continued by
        calling `epochs()` again.

        Args:
            stop: asked before each epoch and each student step; once it says so, the loop ends there and
                `state_dict()` holds the place. With another source than an `Inversion`, and with several
                processes, it is asked before each epoch only, because the place within cannot be kept.

        Raises:
            RuntimeError: a loss, a gradient or logits became NaN or infinite. Looked at once per stage of an
                epoch, so that no step waits for an answer.
        """
        if stop is not None:
            _checks.callable_("FERDTrainer.epochs", "stop", stop)
        kept = isinstance(self.source, Inversion) and self._ranks.size == 1
        inside = stop if kept else None
        while self.epoch < self.config.epochs and not (stop is not None and stop()):
            try:
                stats = self._run_epoch(inside)
            except NonFiniteError as error:
                self._end(error)
            if stats is None:
                return
            yield stats

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
        x, y = self._batch
        if self.config.margin_images == "last" and isinstance(self.source, Inversion):
            assert self.source.last_images is not None
            x = self.source.last_images
        self.class_probabilities = self._probabilities.update(self.class_probabilities, x, y)
        return self.class_probabilities

    def distill_step(self) -> Tensor:
        """One step of the student on a batch from the pool (Algorithm 1, lines 15 to 17).

        Returns:
            The batch's mean loss, a detached scalar.

        Raises:
            RuntimeError: the pool is empty.
        """
        index = self.pool.draw(self._share, rng=self._rng)
        x, y = self.pool[index]
        crops = None if self._crops is None else self._crops(len(x), device=x.device)
        x = x if crops is None else crops(x)
        # A student in train mode keeps its own flags: layers that its owner froze stay frozen.
        training = None if self.student.training else True
        with (
            parts.precision(self.config, self.device),
            borrowed(self.student, training=training, freeze=False),
        ):
            x_adv = self._cache.recall(index, x)
            if x_adv is None:
                x_adv = self._attack(self.student, x, y)
            loss = self.method.loss(self._parallel, x, x_adv, y).mean()
        self.student_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.student_optimizer.step()
        return self._ranks.mean(loss)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on as if nothing had happened, as copies.

        Taken between epochs, or when `epochs(stop=...)` has ended; the teacher is not in it. It holds tensors
        and plain values only, as `Checkpoints` and `torch.load(..., weights_only=True)` want it.
        """
        stopped = None
        if self._stopped is not None:
            stopped = {"losses": self._stopped, "batch": self._batch}
        state = {
            "config": asdict(self.config),
            "epoch": self.epoch,
            "student": self.student.state_dict(),
            "student_optimizer": self.student_optimizer.state_dict(),
            "source": self.source.state_dict(),
            "method": self.method.state_dict(),
            "class_probabilities": self.class_probabilities,
            "statistic": self._probabilities.statistic,
            "largest_diversity": self._monitor.largest_diversity,
            "rng": {name: rng.get_state() for name, rng in self._generators().items()},
            "stopped": stopped,
        }
        return {
            **copy.deepcopy(state),
            "pool": states.gathered(self.pool.state_dict(), self._ranks),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()` of a trainer with the same config.

        Raises:
            ValueError: the state was made under another config (the fields that differ are named), for
                another student, or with other random generators, or within an epoch, from which several
                processes cannot go on; nothing is loaded then.
        """
        states.check(state, asdict(self.config), self.student, self._generators())
        self.pool.load_state_dict(states.parted(state["pool"], self._ranks), device=self.device)
        state = copy.deepcopy({key: value for key, value in state.items() if key != "pool"})
        self.student.load_state_dict(state["student"])
        self.student_optimizer.load_state_dict(state["student_optimizer"])
        self.source.load_state_dict(state["source"])
        self.method.load_state_dict(state["method"])
        self.class_probabilities = state["class_probabilities"]
        self._probabilities.statistic = state["statistic"]
        self._monitor.largest_diversity = state["largest_diversity"]
        for name, rng in self._generators().items():
            rng.set_state(state["rng"][name])
        self.epoch = state["epoch"]
        self._batch = self._stopped = None
        if state["stopped"] is not None:
            x, y = state["stopped"]["batch"]
            self._batch = x.to(self.device), y.to(self.device)
            self._stopped = state["stopped"]["losses"]

    def _generators(self) -> dict[str, torch.Generator]:
        return states.generators(self._rng, method=self.method, source=self.source)

    def _run_epoch(self, stop: Callable[[], bool] | None) -> EpochStats | None:
        """None if it was stopped among its student steps."""
        start = time.perf_counter()
        warmup = self.epoch < self.config.warmup_epochs
        begun, self._stopped = self._stopped, None
        step_losses = StepLosses(begun or [])
        steps = 0 if warmup else self.config.student_steps - len(step_losses.values)
        for _ in self._turns(steps, begun=begun is not None):
            if stop is not None and stop():
                step_losses.mean()  # refuses to keep what is not finite
                self._stopped = step_losses.values
                return None
            try:
                step_losses.add(self.distill_step(), self.student)
            except (RuntimeError, ValueError):  # an attack refuses a student that is not finite
                step_losses.blame(self.student)
                raise
        if self._batch is None:
            raise RuntimeError("FERDTrainer: expected `source` to yield a batch, got none")
        student_loss = step_losses.mean()
        if not warmup:  # the method has seen nothing of a warm-up epoch
            if self._validation is not None:
                batches = ((x.to(self.device), y.to(self.device)) for x, y in self._validation)
                self.method.validate(self.student, batches)  # type: ignore[attr-defined]
            if hasattr(self.method, "sync"):
                self.method.sync()
            self.method.end_epoch()
            self._ranks.average_buffers(self.student)
        self.epoch += 1
        stats = self._stats(warmup, student_loss, time.perf_counter() - start)
        LOG.info("%s", stats)
        self._monitor.watch(stats)
        return stats

    def _turns(self, steps: int, *, begun: bool) -> Iterator[None]:
        """One for each step of the student; the single batch of an epoch that was begun is stored."""
        if begun:
            self._follow_teacher()
            yield from repeat(None, steps)
            return
        if self.config.schedule != "constant":  # the optimizer's owner may change it
            parts.set_rates(self.student_optimizer, self._initial_rates, self.config, self.epoch)
        self._batch = None
        for batch in self._batches():
            self._store(batch)
            self.update_class_probabilities()
            yield from repeat(None, steps)

    def _end(self, error: NonFiniteError) -> NoReturn:
        guards.stop(
            error,
            self._diagnostics,
            epoch=self.epoch + 1,
            class_probabilities=self.class_probabilities,
            learning_rates=[group["lr"] for group in self.student_optimizer.param_groups],
            models={"student": self.student, "generator": self.generator},
        )

    def _stats(self, warmup: bool, student_loss: float, seconds: float) -> EpochStats:
        assert self._batch is not None
        return EpochStats(
            epoch=self.epoch,
            warmup=warmup,
            student_loss=student_loss,
            learning_rate=self.student_optimizer.param_groups[0]["lr"],
            class_probabilities=tuple(self.class_probabilities.tolist()),
            synthesis=dict(self.source.metrics),
            seconds=seconds,
            **of_images(
                self.pool, self._batch, self._teacher_logits, self.config.num_classes, self._ranks
            ),
        )

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._follow_teacher()
        return self.source.epoch(self.student, self.class_probabilities)

    def _follow_teacher(self) -> None:
        """Its owner may have loaded weights since the trainer was made."""
        if isinstance(self._fast_teacher, FrozenModel):
            self._fast_teacher.follow(self.teacher)

    def _store(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = self.pool.stored(batch[0]), batch[1]
        with parts.precision(self.config, self.device):
            columns = self._cache.columns(x, y, partial(self._attack, self.student))
        self.pool.add(*batch, **columns)
        self._batch = batch
        return batch
