"""FERD's Algorithm 1: synthesise, reweight, distil."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ferdlib import _checks
from ferdlib._checks import InvalidState, public
from ferdlib._modes import borrowed, lent
from ferdlib.bottleneck import Part
from ferdlib.distributed import Ranks
from ferdlib.methods import Method
from ferdlib.methods.protocol import teacher_logits
from ferdlib.models.stand_in import StandIn
from ferdlib.synthesis import Source
from ferdlib.synthesis.health import NonFiniteError
from ferdlib.synthesis.inversion import Batch, OptimizerFactory, adam
from ferdlib.trainer import build
from ferdlib.trainer import state as trainer_state
from ferdlib.trainer.class_probabilities import ClassProbabilities, Rule
from ferdlib.trainer.config import FERDConfig
from ferdlib.trainer.monitor import CollapseMonitor, EpochStats, StepLosses, end_run, image_stats
from ferdlib.trainer.teacher import check_fit

LOG = logging.getLogger("ferdlib")

AttackStep = Callable[[nn.Module, Tensor, Tensor], Tensor]
StudentOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class FERDTrainer:
    """Distil a robust teacher into a student, fairly and without data (FERD Algorithm 1).

    Composition only: an `Inversion` fills an `ImagePool`, adversarial margins on the teacher set the class
    probabilities, a `FERDDistillation` trains the student. Each part can be replaced by passing another.
    The student is trained in place; the teacher is only borrowed. All randomness comes from `seed` (layers
    of the student that draw noise themselves, such as dropout, excepted).

    Several processes of `torch.distributed` train one student. Codes, labels, crops, a step's images and the
    margin attack's start are drawn for the global batch; the student's attack and the bottleneck draw on each.

    Args:
        teacher, student: modules from images in [0, 1] to logits `(N, K)`.
        generator: codes to images; None makes a `synthesis.Generator` of the config's shape.
        config: the settings.
        source: makes images, instead of FERD's inversion.
        method: attack and loss, instead of FERD's. Modules of a source or method follow the device; one with
            an `rng` that is None gets a generator from `seed`.
        attack: called as `attack(student, x, y)` with the student in train mode, whose modes and statistics come
            back as they were, instead of the method's; a rule that watches that (Fair-ARD's) learns nothing.
        validation: batches `(x, y)` of held-out images, iterated once per epoch, for methods that need them.
        reweight: class means of the margin `(K,)` to class probabilities `(K,)`, instead of the config's rule.
        student_optimizer: makes the student's optimizer from its parameters, instead of the config's SGD.
        generator_optimizer: makes the generator's from parameter groups at every epoch, instead of Adam.
        split: the teacher's `(features, head)`, for one that torch.fx cannot cut at `config.layer`.
        seed: of all randomness, >= 0.
        diagnostics: folder for a JSON file with the figures of a run that stops at NaN or infinity.
        device: where the models are moved; None leaves them where the student is.

    Attributes:
        teacher, student, generator, config, source, method, pool: the parts.
        class_probabilities: p, `(K,)`.
        epoch: epochs done.

    Raises:
        TypeError: models that are not modules, or a config of another type.
        ValueError: a teacher that is the student or shares weights with it, models whose logits do not
            fit the config, a layer that cannot be cut, no BatchNorm for L_bn, `validation` for a method that
            does not use it or none for one that does, `margin_images="last"` without `last_images`.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> config = FERDConfig(
        ...     num_classes=3, layer="layer4", image_shape=(1, 8, 8), epochs=2, warmup_epochs=1, batch_size=6,
        ...     generator_steps=2, generator_width=4, bottleneck_steps=2, student_steps=2)
        >>> trainer = FERDTrainer(small_cnn(1, 3, width=4), small_cnn(1, 3, width=2), config=config)
        >>> [stats.pool_size for stats in trainer.epochs()]
        [6, 12]
    """

    @public
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
        validation: Iterable[Batch] | None = None,
        reweight: Rule | None = None,
        student_optimizer: StudentOptimizer | None = None,
        generator_optimizer: OptimizerFactory | None = None,
        split: tuple[Part, Part] | None = None,
        seed: int = 0,
        diagnostics: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        build.check_models(teacher, student, config)
        build.check_parts(generator=generator, source=source, method=method)
        functions = {"attack": attack, "reweight": reweight, "student_optimizer": student_optimizer}
        build.check_functions(**functions, generator_optimizer=generator_optimizer)
        _checks.integer(0, seed=seed)
        self._diagnostics = (
            None if diagnostics is None else _checks.path("diagnostics", diagnostics)
        )
        self._ranks = Ranks.here()
        if self._ranks.size > 1:
            parts = [type(part).__name__ for part in (source, method, attack, reweight)]
            build.check_one_run(teacher, student, config=config, seed=seed, parts=parts)
        # Images of a student step on this process.
        self._share = self._ranks.share("config.batch_size", config.batch_size)
        # One process has one generator. Of several, each also has its own, seeded anew every epoch.
        self._rng = torch.Generator().manual_seed(_checks.plain(seed))
        self._own_rng = self._rng if self._ranks.size == 1 else torch.Generator()
        self._ranks.reseed(self._own_rng, self._rng)

        here = next(student.parameters()).device
        self.device = here if device is None else _checks.device(device)
        self.config, self.epoch = config, 0
        self.teacher, self.student = teacher.to(self.device), student.to(self.device)
        # Wherever only the teacher's logits count, a copy with BatchNorm folded gives them faster.
        self._fast_teacher = StandIn(teacher) if config.fold_batchnorm else teacher
        self._parallel = self._ranks.parallel(student)

        if source is None:
            check_fit(teacher, student, config, self.device)
            generator = generator or build.fresh_generator(config, self.device, self._rng)
            generator, rngs = generator.to(self.device), (self._rng, self._own_rng)
            made_of = config, teacher, split, generator, generator_optimizer or adam
            source = build.inversion(*made_of, *rngs, self._ranks)
        self.generator = generator
        self.source: Source = source
        self.pool = build.pool(config, self._ranks)
        # What a source has still to yield in an epoch that `synthesize` began.
        self._begun: Iterator[Batch] = iter(())
        self._batch: Batch | None = None
        # An epoch was begun and not finished: student and pool are those of no epoch.
        self._within = False

        self.class_probabilities = build.uniform(config)
        rule, fast = reweight or build.rule(config), self._fast_teacher
        self._probabilities = ClassProbabilities(config, rule, fast, self._rng, self._ranks)

        self.method: Method = method or build.distillation(config, fast, self._own_rng)
        self._attack, self._validation = attack, validation
        self._augment = build.augmentation(config, self._rng, self._ranks)
        trained = [p for p in student.parameters() if p.requires_grad]
        self.student_optimizer = (student_optimizer or partial(build.sgd, config))(trained)
        self._initial_rates = [group["lr"] for group in self.student_optimizer.param_groups]
        self._monitor = CollapseMonitor()

        self._keeps_logits = config.cache_teacher_logits == "images" and config.augment == "none"
        self._keeps_examples = attack is None and build.keeps_examples(config, self.method)
        build.check_together(config, self.source, self.method, validation)
        for part in (self.method, self.source):
            build.adopt(part, self.device, self._own_rng)

    def epochs(self) -> Iterator[EpochStats]:
        """Train from `epoch` to `config.epochs`, and yield after each epoch.

        The loop body may evaluate, log, save `state_dict()` or break; calling `epochs()` again continues.

        Raises:
            RuntimeError: a loss, a gradient or logits became NaN or infinite. Looked at once per stage of an
                epoch, so that no step waits for an answer.
        """
        while self.epoch < self.config.epochs:
            try:
                yield self._run_epoch()
            except NonFiniteError as error:
                end_run(
                    error,
                    self._diagnostics,
                    epoch=self.epoch + 1,
                    optimizer=self.student_optimizer,
                    models={"student": self.student, "generator": self.generator},
                    class_probabilities=self.class_probabilities.tolist(),
                )

    def fit(self) -> list[EpochStats]:
        """Run `epochs()` to the end.

        Interrupted within an epoch, by Ctrl-C too, the trainer has no state to save: go on from the last one.
        """
        return list(self.epochs())

    @public
    def synthesize(self) -> Batch:
        """Append the source's next batch to the pool (Algorithm 1, lines 6 to 11), and return it.

        A source that yields several batches an epoch goes on with its epoch at the next call.

        Raises:
            RuntimeError: the source yields none.
        """
        batch = next(self._begun, None)
        if batch is None:
            self._begun = self._source_epoch()
            batch = next(self._begun, None)
        if batch is None:
            raise InvalidState("expected `source` to yield a batch, got none")
        return self._store(batch)

    @public
    def update_class_probabilities(self) -> Tensor:
        """Set class probabilities from the last batch's adversarial margins (Eq. 1 and 2, line 12).

        Returns:
            The new `class_probabilities`, `(K,)` with sum 1.

        Raises:
            RuntimeError: nothing has been synthesised yet.
        """
        if self._batch is None:
            raise InvalidState("expected a synthesised batch, got none; call synthesize() first")
        x, y = self._batch
        if self.config.margin_images == "last":
            x = self.source.last_images  # type: ignore[attr-defined]
        self.class_probabilities = self._probabilities.update(self.class_probabilities, x, y)
        return self.class_probabilities

    @public
    def distill_step(self) -> Tensor:
        """Take one step of the student on a batch from the pool (Algorithm 1, lines 15 to 17).

        Returns:
            The batch's mean loss, a detached scalar; RuntimeError where the pool is empty.
        """
        # Each process holds other images, so the same numbers on all of them are a global batch.
        index = self.pool.draw(self._share, rng=self._rng)
        x, y = self.pool[index]
        x = x if self._augment is None else self._augment(x)
        # Until the weights have moved: an evaluation in another thread waits for the whole step.
        with borrowed(self.student, training=True, freeze=False), borrowed(self.teacher):
            with build.precision(self.config, self.device):
                reference = self._reference(index, x)
                x_adv = self._adversarial(index, x, y, reference)
                loss = self.method.loss(self._parallel, x, x_adv, y, reference).mean()
            # The gradients stay after the step, for the epoch's watch over finite numbers.
            self.student_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.student_optimizer.step()
        return self._ranks.mean(loss)

    @public
    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to go on as if nothing had happened, as copies.

        Taken between epochs; the teacher is not in it. It holds tensors and plain values only, as
        `Checkpoints` and `torch.load(..., weights_only=True)` want it. Every process must call it.

        Raises:
            RuntimeError: an epoch was interrupted.
        """
        if self._within:
            raise InvalidState(
                f"expected a trainer between two epochs, got one that was stopped within epoch {self.epoch + 1}; "
                f"go on from the last state that was saved"
            )
        return trainer_state.whole(self)

    @public
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()` of a trainer with the same config.

        Raises:
            ValueError: the state was made under another config (the fields that differ are named), for
                another student, source or method, or with other random generators; nothing is loaded then.
        """
        trainer_state.load(self, state)
        self._batch, self._begun, self._within = None, iter(()), False

    def _run_epoch(self) -> EpochStats:
        """Algorithm 1: for each batch of the source, store it, reweight the classes, distil."""
        start = time.perf_counter()
        warmup = self.epoch < self.config.warmup_epochs
        if self._within:
            LOG.warning(
                "FERDTrainer: epoch %d begins again, after steps of its own", self.epoch + 1
            )
        self._within = True
        self._batch, losses = None, StepLosses(self._ranks)
        self._ranks.reseed(self._own_rng, self._rng)
        build.set_rates(self.student_optimizer, self._initial_rates, self.config, self.epoch)
        for batch in self._source_epoch():
            self._store(batch)
            self.update_class_probabilities()
            for _ in range(0 if warmup else self.config.student_steps):
                with losses.watching(self.student, batch[0]):
                    losses.add(self.distill_step(), self.student)
        if self._batch is None:
            raise RuntimeError("FERDTrainer.epochs: expected `source` to yield a batch, got none")
        # Only now, because reading a loss makes an accelerator wait.
        student_loss = losses.mean(self.student, self._batch[0])
        if not warmup:
            self._end_epoch_of_method()
        self.epoch, self._within = self.epoch + 1, False
        stats = self._stats(warmup, student_loss, time.perf_counter() - start)
        LOG.info("%s", stats)
        self._monitor.watch(stats)
        return stats

    def _source_epoch(self) -> Iterator[Batch]:
        """Begin an epoch of the source; the teacher's owner may have loaded weights since the last one."""
        if isinstance(self._fast_teacher, StandIn):
            self._fast_teacher.follow(compare=True)
        made = self.source.epoch(self.student, self.class_probabilities)
        batches = build.lending(made, self.student, self.teacher)
        return batches if self._ranks.size == 1 else build.in_step(batches, self._ranks)

    def _store(self, batch: Batch) -> Batch:
        """Append a batch to the pool, with what is computed once per image."""
        x, y = batch
        # Compared outside of any attack, which the host does not interrupt.
        if isinstance(self._fast_teacher, StandIn):
            self._fast_teacher.at(x)
        columns = {}
        # Of the images as they will come back: rounding to uint8 changes logits.
        with build.precision(self.config, self.device):
            stored = self.pool.stored(x)
            reference = self.method.reference(stored) if self._keeps_logits else None
            if reference is not None:
                columns["logits"] = reference
            if self._keeps_examples:
                columns["examples"] = self.method.attack(self.student, stored, y, reference)
        self.pool.add(x, y, **columns)
        self._batch = batch
        return batch

    def _reference(self, index: Tensor, x: Tensor) -> Tensor | None:
        """The teacher's logits of the images of these numbers, stored or computed."""
        if "logits" in self.pool.columns:
            return self.pool.column("logits")[index]
        return self.method.reference(x)

    def _adversarial(self, index: Tensor, x: Tensor, y: Tensor, reference: Tensor | None) -> Tensor:
        """Examples of the images of these numbers, stored or computed."""
        if self._keeps_examples:
            return self.pool.column("examples")[index]
        if self._attack is not None:
            with lent(self.student, self._attack):
                return build.examples(self._attack(self.student, x.clone(), y.clone()), x)
        with borrowed(self.student, training=None, freeze=False):
            return self.method.attack(self.student, x, y, reference)

    def _end_epoch_of_method(self) -> None:
        """Let the method learn from the epoch; a warm-up epoch is none of its own."""
        if self._validation is not None:
            pairs = (_checks.batch(validation=each) for each in self._validation)
            batches = (tuple(each.to(self.device) for each in pair) for pair in pairs)
            with lent(self.student, self.teacher):
                self.method.validate(self.student, batches)  # type: ignore[attr-defined]
        if hasattr(self.method, "sync"):
            self.method.sync()
        self.method.end_epoch()
        self._ranks.average_buffers(self.student)

    def _stats(self, warmup: bool, student_loss: float, seconds: float) -> EpochStats:
        assert self._batch is not None
        x, y = self._batch
        logits = teacher_logits(self._fast_teacher, x)
        return EpochStats(
            epoch=self.epoch,
            warmup=warmup,
            student_loss=student_loss,
            learning_rate=self.student_optimizer.param_groups[0]["lr"],
            class_probabilities=tuple(self.class_probabilities.tolist()),
            synthesis=dict(self.source.metrics),
            seconds=seconds,
            **image_stats(self.pool, x, y, logits, self.config.num_classes, self._ranks),
        )
