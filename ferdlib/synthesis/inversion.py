"""FERD's source: a generator that is trained, every epoch, to invert the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ferdlib import _checks, bottleneck, losses
from ferdlib._checks import public
from ferdlib._modes import ask, borrowed, logits_of
from ferdlib.bottleneck import Part
from ferdlib.distributed import Ranks, sum_over_ranks
from ferdlib.synthesis.health import NonFiniteError
from ferdlib.synthesis.optimise import Objective, Selection, optimise
from ferdlib.synthesis.source import sample_labels

Batch = tuple[Tensor, Tensor]
OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make the lineage's optimizer of generator and latent codes."""
    return torch.optim.Adam(groups, betas=(0.5, 0.999))


@dataclass(kw_only=True)
class Inversion:
    r"""Fairness-aware examples by inverting a teacher (FERD section 4.3, Algorithm 1, lines 6-11).

    Each epoch draws latent codes and labels, trains the generator for `generator_steps` steps on
    `losses.ferd_generator_loss`, and yields one batch. One teacher pass per step gives BatchNorm
    statistics, features and logits; the bottleneck runs the head alone. Teacher and student are frozen
    and in eval mode meanwhile, and given back as they were.

    Attributes:
        teacher: the model that is inverted, with BatchNorm layers if `bn_loss_weight` is positive.
        features, head: its two parts, `bottleneck.split_at(teacher, layer)`.
        generator: codes to images, called with the labels too if it has an `embedding`; one without a
            method `reset(rng)` is never reset.
        batch_size: images per epoch, of all processes together.
        generator_steps: steps per epoch, >= 1.
        latent_dim: size of a latent code.
        adv_loss_weight, bn_loss_weight, onehot_loss_weight, uniformity_loss_weight: the $\lambda$ of
            Eq. 9. Without `uniformity_loss_weight` the bottleneck is not run.
        adversarial_from: the first epoch with $L_{adv}$.
        divergence: grown by $L_{adv}$, see `losses.ferd_generator_loss`.
        bn_models: models whose statistics $L_{bn}$ reads, "teacher" or "both".
        bottleneck_beta, bottleneck_steps, bottleneck_lr, bottleneck_noise, bottleneck_reduction: see
            `bottleneck.noise_scale`.
        mask_threshold: see `bottleneck.nonrobust_channels`.
        generator_lr, latent_lr: learning rates of the two groups given to `optimizer`.
        optimise_latents: train the codes too.
        reset_generator: start every epoch from fresh weights. With hundreds of steps an epoch that keeps
            images diverse; with tens it costs the images their quality.
        selection: keep the "batch" of the lowest loss, each "sample" at its lowest cross-entropy plus
            uniformity loss, or the "last" batch.
        label_sampling: see `sample_labels`.
        augment: applied to the images before teacher and student; what is kept is not augmented.
        optimizer: makes the epoch's optimizer from parameter groups.
        precision: called for a context around the forwards, for autocast.
        rng: source of codes, labels and fresh weights, in the same state on all processes of `ranks`; None
            takes torch's default generator.
        noise_rng: source of the bottleneck's noise, each process's own; None takes `rng`.
        ranks: the processes that share an epoch's images.
        metrics: the last step's unweighted losses, their `total`, and the `nonrobust_fraction` (nan
            without the bottleneck).
        last_images: the last step's images, augmented.
        epochs_done: number of epochs made.

    Raises:
        TypeError, ValueError: a setting of another type, name or range.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> from ferdlib.synthesis import Generator
        >>> teacher, student = small_cnn(1, 3, width=4), small_cnn(1, 3, width=2)
        >>> features, head = bottleneck.split_at(teacher, "layer4")
        >>> source = Inversion(
        ...     teacher=teacher, features=features, head=head, generator=Generator((1, 8, 8), width=4),
        ...     batch_size=6, generator_steps=2, bottleneck_steps=2)
        >>> x, y = next(source.epoch(student, torch.full((3,), 1 / 3)))
        >>> x.shape, y.shape
        (torch.Size([6, 1, 8, 8]), torch.Size([6]))
    """

    teacher: nn.Module
    features: Part
    head: Part
    generator: nn.Module
    batch_size: int = 256
    generator_steps: int = 200
    latent_dim: int = 100
    adv_loss_weight: float = 1.0
    bn_loss_weight: float = 5.0
    onehot_loss_weight: float = 1.0
    uniformity_loss_weight: float = 5.0
    adversarial_from: int = 0
    divergence: Callable[[Tensor, Tensor], Tensor] = losses.distillation
    bn_models: Literal["teacher", "both"] = "teacher"
    bottleneck_beta: float = 0.3
    bottleneck_steps: int = 50
    bottleneck_lr: float = 0.1
    bottleneck_noise: Literal["channel", "element"] = "channel"
    bottleneck_reduction: Literal["mean", "sum"] = "mean"
    mask_threshold: Literal["sample", "batch", "channel"] = "channel"
    generator_lr: float = 2e-3
    latent_lr: float = 0.015
    optimise_latents: bool = True
    reset_generator: bool = False
    selection: Selection = "batch"
    label_sampling: Literal["multinomial", "stratified"] = "multinomial"
    augment: Callable[[Tensor], Tensor] | None = None
    optimizer: OptimizerFactory = adam
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    rng: torch.Generator | None = None
    noise_rng: torch.Generator | None = None
    ranks: Ranks = field(default_factory=Ranks)
    metrics: dict[str, float] = field(default_factory=dict, init=False)
    last_images: Tensor | None = field(default=None, init=False)
    epochs_done: int = field(default=0, init=False)

    @public
    def __post_init__(self) -> None:
        named = partial(_checks.named, self)
        _checks.module(**named("teacher", "generator"))
        _checks.callable_(**named("features", "head", "divergence", "optimizer", "precision"))
        if self.augment is not None:
            _checks.callable_(augment=self.augment)
        _checks.integer(1, **named("batch_size", "generator_steps", "latent_dim"))
        _checks.integer(0, **named("adversarial_from", "bottleneck_steps"))
        _checks.real(0, **named("adv_loss_weight", "bn_loss_weight", "onehot_loss_weight"))
        _checks.real(0, **named("uniformity_loss_weight", "bottleneck_beta"))
        _checks.positive(**named("bottleneck_lr", "generator_lr", "latent_lr"))
        _checks.instance(bool, **named("optimise_latents", "reset_generator"))
        _checks.choice(("teacher", "both"), bn_models=self.bn_models)
        _checks.choice(("channel", "element"), bottleneck_noise=self.bottleneck_noise)
        _checks.choice(("mean", "sum"), bottleneck_reduction=self.bottleneck_reduction)
        _checks.choice(("sample", "batch", "channel"), mask_threshold=self.mask_threshold)
        _checks.choice(("batch", "sample", "last"), selection=self.selection)
        _checks.choice(("multinomial", "stratified"), label_sampling=self.label_sampling)
        _checks.generator(self.rng)
        if self.noise_rng is not None:
            _checks.instance(torch.Generator, noise_rng=self.noise_rng)
        self.ranks.share("batch_size", self.batch_size)
        self._parallel = self.ranks.parallel(self.generator)

    @public
    def epoch(self, student: nn.Module, class_probabilities: Tensor) -> Iterator[Batch]:
        """Yield the epoch's batch: images `(N, C, H, W)` in [0, 1] and the labels they were made for.

        Args:
            student: the other side of $L_{adv}$.
            class_probabilities: p, `(K,)` with sum 1.

        Raises:
            TypeError, ValueError: a student that is no module, or probabilities that are none.
            RuntimeError: the generator's loss or a gradient became NaN or infinite; found when all steps are
                done, so that no step waits for an answer.
        """
        _checks.module(student=student)
        _checks.class_vector(class_probabilities=class_probabilities)
        return self._epoch(student, class_probabilities)

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state and the epochs done."""
        return {
            "generator": self.generator.state_dict(),
            "epochs_done": self.epochs_done,
            "metrics": dict(self.metrics),
        }

    @public
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        _checks.keys(self.state_dict(), state=state)
        # torch loads what fits before it complains of what does not.
        _checks.state(state["generator"], self.generator.state_dict())
        _checks.integer(0, epochs_done=state["epochs_done"])
        self.generator.load_state_dict(state["generator"])
        self.epochs_done, self.metrics = state["epochs_done"], dict(state["metrics"])

    def _epoch(self, student: nn.Module, class_probabilities: Tensor) -> Iterator[Batch]:
        with borrowed(self.teacher, student, self.features, self.head), torch.enable_grad():
            batch = self._invert(student, class_probabilities)
        self.epochs_done += 1
        yield batch

    def _invert(self, student: nn.Module, class_probabilities: Tensor) -> Batch:
        """Algorithm 1, lines 6 to 10: draw codes and labels, train the generator, select."""
        weight = next(self.generator.parameters())
        device, latents = weight.device, self._latents(weight)
        labels = sample_labels(
            class_probabilities, self.batch_size, method=self.label_sampling, rng=self.rng
        )
        # Drawn for the global batch, so that the classes are those of one process.
        labels = self.ranks.part(labels).to(device)
        reset = getattr(self.generator, "reset", None)
        if self.reset_generator and callable(reset):
            reset(self.rng)
        # In train mode BatchNorm normalises by the batch that is being made.
        with borrowed(self.generator, training=True, freeze=False):
            made = optimise(
                partial(self._objective, student, latents, labels),
                self.optimizer(self._groups(latents)),
                steps=self.generator_steps,
                selection=self.selection,
                ranks=self.ranks,
            )
        self.metrics = made.metrics
        if made.bad is not None:
            raise NonFiniteError(
                f"Inversion.epoch: expected a finite generator loss and finite gradients, got {self.metrics} "
                f"at the end, the first from step {made.bad} of epoch {self.epochs_done + 1}; lower "
                f"`generator_lr` or the loss weights",
                part="generator",
                step=made.bad,
                losses={**self.metrics, "total": made.totals},
            )
        return made.images, labels

    def _latents(self, like: Tensor) -> Tensor:
        """Draw the global batch's codes, and take this process's."""
        home = like.device if self.rng is None else self.rng.device
        shape = (self.batch_size, self.latent_dim)
        # In one dtype, because the same seed gives other numbers in another.
        drawn = torch.randn(shape, generator=self.rng, device=home, dtype=torch.float32)
        codes = self.ranks.part(drawn).to(like)
        if self.optimise_latents:
            codes.requires_grad_()
            # A process's own codes share in a mean over all, as the generator's gradients do.
            codes.register_hook(lambda gradient: gradient / self.ranks.size)
        return codes

    def _groups(self, latents: Tensor) -> list[dict[str, Any]]:
        """Parameter groups of the epoch's optimizer."""
        weights = list(self.generator.parameters())
        groups: list[dict[str, Any]] = [{"params": weights, "lr": self.generator_lr}]
        if self.optimise_latents:
            groups.append({"params": [latents], "lr": self.latent_lr})
        return groups

    def _objective(self, student: nn.Module, latents: Tensor, labels: Tensor) -> Objective:
        """Evaluate Eq. 9 on the images that the generator makes of the codes now."""
        with self.precision():
            conditional = getattr(self.generator, "embedding", None) is not None
            images = self._parallel(latents, labels) if conditional else self._parallel(latents)
            # Under autocast the generator's are bfloat16, too coarse to be stored.
            images = images.float()
            x = images if self.augment is None else self.augment(images)
            self.last_images = x.detach()
            z, teacher_logits, student_logits, batchnorm_loss = self._passes(student, x)
            nonrobust, fraction = self._nonrobust(z, labels)
            adversarial = self.epochs_done >= self.adversarial_from
            total, parts = losses.ferd_generator_loss(
                teacher_logits,
                student_logits,
                labels,
                nonrobust,
                batchnorm_loss,
                adv_weight=self.adv_loss_weight if adversarial else 0.0,
                bn_weight=self.bn_loss_weight,
                onehot_weight=self.onehot_loss_weight,
                uniformity_weight=self.uniformity_loss_weight,
                divergence=self.divergence,
            )
            score = self.onehot_loss_weight * losses.cross_entropy(teacher_logits, labels)
            if nonrobust is not None:
                score = score + self.uniformity_loss_weight * losses.uniformity(nonrobust)
        return Objective(
            images=images.detach(),
            total=total,
            per_sample=score.detach(),
            parts=parts | {"nonrobust_fraction": fraction},
        )

    def _passes(self, student: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features and logits of the teacher, logits of the student, and L_bn (Eq. 8)."""
        watched: Sequence[nn.Module] = ()
        if self.bn_loss_weight > 0:
            watched = (self.teacher, student) if self.bn_models == "both" else (self.teacher,)
        # L_bn is of the global batch's statistics, not of each process's.
        reduce = sum_over_ranks if self.ranks.size > 1 else None
        statistics_of = partial(losses.BatchNormStatistics, reduce=reduce)
        # The bottleneck fires the head's layers again, so the statistics are closed before it.
        with ExitStack() as hooks:
            statistics = [hooks.enter_context(statistics_of(model)) for model in watched]
            z = self.features(x.clone())
            teacher_logits, student_logits = logits_of(self.head(z)), ask(student, x)
        batchnorm_loss = sum((each.loss() for each in statistics), teacher_logits.new_zeros(()))
        return z, teacher_logits, student_logits, batchnorm_loss

    def _nonrobust(self, z: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor]:
        """Logits of the non-robust channels alone (Eq. 4 to 7), and the fraction of channels that are."""
        if self.uniformity_loss_weight == 0:
            return None, z.new_full((), torch.nan)
        sigma = bottleneck.noise_scale(
            z,
            self.head,
            labels,
            beta=self.bottleneck_beta,
            steps=self.bottleneck_steps,
            lr=self.bottleneck_lr,
            noise=self.bottleneck_noise,
            reduction=self.bottleneck_reduction,
            rng=self.rng if self.noise_rng is None else self.noise_rng,
        )
        mask = bottleneck.nonrobust_channels(z, sigma, threshold=self.mask_threshold)
        logits = bottleneck.nonrobust_logits(z, self.head, mask)
        # A mask cannot say that its noise was NaN; the loss can, and is looked at when all steps are done.
        return _checks.marked(logits, sigma.isfinite().all()), mask.float().mean()
