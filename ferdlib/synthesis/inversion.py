"""FERD's source: a generator that is trained, every epoch, to invert the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ferdlib import _oldchecks as _checks
from ferdlib import bottleneck, losses
from ferdlib._modes import borrowed
from ferdlib._ranks import Ranks, drawn, source
from ferdlib.bottleneck import Part
from ferdlib.distributed import sum_over_ranks
from ferdlib.synthesis.health import NonFiniteError, first_bad, is_finite
from ferdlib.synthesis.source import sample_labels

Batch = tuple[Tensor, Tensor]
OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

# What its numbers are beside at least 0.
LIMITS: dict[str, dict[str, Any]] = {
    **{name: {"low": 1} for name in ("batch_size", "steps", "latent_dim")},
    **{name: {"open_low": True} for name in ("bottleneck_lr", "generator_lr", "latent_lr")},
}


def adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The lineage's optimizer of generator and latent codes."""
    return torch.optim.Adam(groups, betas=(0.5, 0.999))


@dataclass(kw_only=True)
class Inversion:
    r"""Fairness-aware examples by inverting a teacher (FERD section 4.3, Algorithm 1, lines 6-11).

    Each epoch draws latent codes and labels, trains the generator for `steps` steps on
    `losses.ferd_generator_loss`, and yields one batch. One teacher pass per step gives BatchNorm
    statistics, features and logits; the bottleneck runs the head alone. Teacher and student are frozen
    and in eval mode meanwhile, and given back as they were.

    Attributes:
        teacher: the model that is inverted, with BatchNorm layers if `bn_weight` is positive.
        features, head: its two parts, `bottleneck.split_at(teacher, layer)`.
        generator: codes to images, called with the labels too if it has an `embedding`; one without a
            method `reset(rng)` is never reset.
        batch_size, steps: images per epoch, and generator steps.
        latent_dim: size of a latent code.
        adv_weight, bn_weight, onehot_weight, uniformity_weight: the $\lambda$ of Eq. 9. Without
            `uniformity_weight` the bottleneck is not run.
        adversarial_from: the first epoch with $L_{adv}$.
        divergence: what $L_{adv}$ grows, see `losses.ferd_generator_loss`.
        bn_models: whose statistics $L_{bn}$ reads, "teacher" or "both".
        bottleneck_beta, bottleneck_steps, bottleneck_lr, bottleneck_noise, bottleneck_reduction: see
            `bottleneck.noise_scale`.
        mask_threshold: see `bottleneck.nonrobust_channels`.
        generator_lr, latent_lr: learning rates of the two groups given to `optimizer`.
        optimise_latents: whether the codes are trained too.
        reset_generator: whether every epoch starts from fresh weights. With hundreds of steps an epoch
            that keeps images diverse; with tens it costs the images their quality.
        selection: keep the "batch" of the lowest loss, each "sample" at its lowest cross-entropy plus
            uniformity loss, or the "last" batch.
        label_sampling: see `sample_labels`.
        augment: applied to the images before teacher and student; what is kept is not augmented.
        optimizer: makes the epoch's optimizer from parameter groups.
        precision: called for a context around the forwards, for autocast.
        rng: source of all randomness; None takes torch's default generator.
        ranks: the processes that share an epoch's images, each of which makes `batch_size` of them.
        metrics: the last step's unweighted losses, their `total`, and the `nonrobust_fraction` (nan
            without the bottleneck).
        last_images: the last step's images, augmented.
        epochs_done: how many epochs have been made.

    Raises:
        TypeError, ValueError: a setting of another type, name or range.

    Example:
        >>> from ferdlib.models import small_cnn
        >>> from ferdlib.synthesis import Generator
        >>> teacher, student = small_cnn(1, 3, width=4), small_cnn(1, 3, width=2)
        >>> features, head = bottleneck.split_at(teacher, "layer4")
        >>> source = Inversion(
        ...     teacher=teacher, features=features, head=head, generator=Generator((1, 8, 8), width=4),
        ...     batch_size=6, steps=2, bottleneck_steps=2)
        >>> x, y = next(source.epoch(student, torch.full((3,), 1 / 3)))
        >>> x.shape, y.shape
        (torch.Size([6, 1, 8, 8]), torch.Size([6]))
    """

    teacher: nn.Module
    features: Part
    head: Part
    generator: nn.Module
    batch_size: int = 256
    steps: int = 200
    latent_dim: int = 100
    adv_weight: float = 1.0
    bn_weight: float = 5.0
    onehot_weight: float = 1.0
    uniformity_weight: float = 5.0
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
    selection: Literal["batch", "sample", "last"] = "batch"
    label_sampling: Literal["multinomial", "stratified"] = "multinomial"
    augment: Callable[[Tensor], Tensor] | None = None
    optimizer: OptimizerFactory = adam
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    rng: torch.Generator | None = None
    ranks: Ranks = field(default_factory=Ranks)
    metrics: dict[str, float] = field(default_factory=dict, init=False)
    last_images: Tensor | None = field(default=None, init=False)
    epochs_done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        _checks.settings("Inversion", self, **LIMITS)
        self._parallel = self.ranks.parallel(self.generator)

    def epoch(self, student: nn.Module, class_probabilities: Tensor) -> Iterator[Batch]:
        """Yields the epoch's batch: images `(N, C, H, W)` in [0, 1] and the labels they were made for.

        Args:
            student: the other side of $L_{adv}$.
            class_probabilities: p, `(K,)` with sum 1.

        Raises:
            RuntimeError: the generator's loss or a gradient became NaN or infinite; found when all steps are
                done, so that no step waits for an answer.
        """
        _checks.module("Inversion.epoch", "student", student)
        with borrowed(self.teacher, student, self.features, self.head), torch.enable_grad():
            batch = self._invert(student, class_probabilities)
        self.epochs_done += 1
        yield batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(),
            "epochs_done": self.epochs_done,
            "metrics": dict(self.metrics),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _checks.mapping("Inversion.load_state_dict", "state", state, self.state_dict())
        self.generator.load_state_dict(state["generator"])
        self.epochs_done, self.metrics = state["epochs_done"], dict(state["metrics"])

    def _invert(self, student: nn.Module, class_probabilities: Tensor) -> Batch:
        device = next(self.generator.parameters()).device
        home = device if self.rng is None else self.rng.device

        def normal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
            return torch.randn(shape, generator=generator, device=home)

        latents = drawn(normal, (self.batch_size, self.latent_dim), self.rng).to(device)
        latents.requires_grad_(self.optimise_latents)
        labels = sample_labels(
            class_probabilities, self.batch_size, method=self.label_sampling, rng=self.rng
        ).to(device)
        reset = getattr(self.generator, "reset", None)
        if self.reset_generator and callable(reset):
            reset(source(self.rng))
        weights = list(self.generator.parameters())
        groups: list[dict[str, Any]] = [{"params": weights, "lr": self.generator_lr}]
        if self.optimise_latents:
            groups.append({"params": [latents], "lr": self.latent_lr})
        optimizer = self.optimizer(groups)
        trained = [p for group in groups for p in group["params"]]
        best, best_score = torch.empty(0), torch.full((), torch.inf, device=device)
        was_training = self.generator.training
        self.generator.train()
        totals, healthy = [], []
        for step in range(self.steps):
            images, total, per_sample, parts, fraction = self._step(student, latents, labels)
            score = per_sample if self.selection == "sample" else self.ranks.mean(total)
            # Chosen on the device: reading the loss here would stall an accelerator at every step.
            better = (score < best_score) | (self.selection == "last" or step == 0)
            kept = better.reshape(-1, 1, 1, 1)
            best = torch.where(kept, images, best) if step else images
            best_score = torch.where(better, score, best_score)
            for parameter in trained:
                parameter.grad = None
            # Not autograd.grad: DistributedDataParallel would not see it.
            total.backward(inputs=trained)
            gradients = [p.grad for p in trained]
            if latents.grad is not None:
                latents.grad /= self.ranks.size  # a process's own codes share in a mean over all
            totals.append(total.detach())
            healthy.append(is_finite(total, gradients))
            optimizer.step()
        for parameter in weights:
            parameter.grad = None
        self.generator.train(was_training)
        parts |= {"total": total, "nonrobust_fraction": fraction}
        means = self.ranks.mean(torch.stack([part.detach().double() for part in parts.values()]))
        self.metrics = dict(zip(parts, means.tolist(), strict=True))
        healthy[-1] = healthy[-1] & best_score.isfinite().all()
        healthy = list(self.ranks.everywhere(torch.stack(healthy)))
        if (bad := first_bad(healthy)) is not None:
            raise NonFiniteError(
                f"Inversion.epoch: expected a finite generator loss and finite gradients, got {self.metrics} "
                f"at the end, the first from step {bad} of epoch {self.epochs_done + 1}; lower "
                f"`generator_lr` or the loss weights",
                part="generator",
                step=bad,
                losses={**self.metrics, "total": torch.stack(totals).tolist()},
            )
        return best.detach(), labels

    def _step(
        self, student: nn.Module, latents: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor]:
        """One evaluation of Eq. 9: images, total, per-sample score, parts, non-robust fraction."""
        with self.precision():
            conditional = getattr(self.generator, "embedding", None) is not None
            images = self._parallel(latents, labels) if conditional else self._parallel(latents)
            images = images.float()
            x = images if self.augment is None else self.augment(images)
            self.last_images = x.detach()
            watched: Sequence[nn.Module] = ()
            if self.bn_weight > 0:
                watched = (self.teacher, student) if self.bn_models == "both" else (self.teacher,)
            reduce = sum_over_ranks if self.ranks.size > 1 else None
            statistics_of = partial(losses.BatchNormStatistics, reduce=reduce)
            with ExitStack() as hooks:
                statistics = [hooks.enter_context(statistics_of(m)) for m in watched]
                z = self.features(x)
                teacher_logits, student_logits = self.head(z), student(x)
            batchnorm_loss = sum((each.loss() for each in statistics), teacher_logits.new_zeros(()))
            nonrobust, fraction = None, teacher_logits.new_full((), torch.nan)
            if self.uniformity_weight > 0:
                sigma = bottleneck.noise_scale(
                    z,
                    self.head,
                    labels,
                    beta=self.bottleneck_beta,
                    steps=self.bottleneck_steps,
                    lr=self.bottleneck_lr,
                    noise=self.bottleneck_noise,
                    reduction=self.bottleneck_reduction,
                    rng=self.rng,
                )
                mask = bottleneck.nonrobust_channels(z, sigma, threshold=self.mask_threshold)
                nonrobust = bottleneck.nonrobust_logits(z, self.head, mask)
                fraction = mask.float().mean()
            adversarial = self.adv_weight if self.epochs_done >= self.adversarial_from else 0.0
            total, parts = losses.ferd_generator_loss(
                teacher_logits,
                student_logits,
                labels,
                nonrobust,
                batchnorm_loss,
                adv_weight=adversarial,
                bn_weight=self.bn_weight,
                onehot_weight=self.onehot_weight,
                uniformity_weight=self.uniformity_weight,
                divergence=self.divergence,
            )
            per_sample = self.onehot_weight * losses.cross_entropy(teacher_logits, labels)
            if nonrobust is not None:
                per_sample = per_sample + self.uniformity_weight * losses.uniformity(nonrobust)
        return images.detach(), total, per_sample.detach(), parts, fraction
