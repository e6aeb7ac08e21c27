"""From a config to FERD's parts, and the checks of what a user hands over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ferdlib import _oldchecks as _checks
from ferdlib import losses, reweight
from ferdlib._modes import borrowed
from ferdlib._ranks import Ranks
from ferdlib.augment import Crops
from ferdlib.bottleneck import split_at
from ferdlib.methods import FERDDistillation, Method
from ferdlib.synthesis import Generator, ImagePool, Inversion, Source
from ferdlib.synthesis.inversion import OptimizerFactory
from ferdlib.trainer.config import FERDConfig

Rule = Callable[[Tensor], Tensor]

DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": losses.distillation,
    "masked_kl": losses.masked_distillation,
    "decoupled_kl": losses.decoupled_kl,
}


def inversion(
    config: FERDConfig,
    teacher: nn.Module,
    generator: nn.Module,
    optimizer: OptimizerFactory,
    rng: torch.Generator,
    ranks: Ranks,
) -> Inversion:
    """FERD's source of images."""
    if config.layer is None:
        raise ValueError("FERDTrainer: expected `config.layer` for FERD's own source, got None")
    features, head = split_at(teacher, config.layer)
    return Inversion(
        teacher=teacher,
        features=features,
        head=head,
        generator=generator,
        batch_size=config.batch_size // ranks.size,
        steps=config.generator_steps,
        latent_dim=config.latent_dim,
        adv_weight=config.adv_loss_weight,
        bn_weight=config.bn_loss_weight,
        onehot_weight=config.onehot_loss_weight,
        uniformity_weight=config.uniformity_loss_weight,
        adversarial_from=0 if config.adversarial_warmup else config.warmup_epochs,
        divergence=DIVERGENCES[config.adversarial_loss],
        bn_models=config.bn_models,
        bottleneck_beta=config.bottleneck_beta,
        bottleneck_steps=config.bottleneck_steps,
        bottleneck_lr=config.bottleneck_lr,
        bottleneck_noise=config.bottleneck_noise,
        bottleneck_reduction=config.bottleneck_reduction,
        mask_threshold=config.mask_threshold,
        generator_lr=config.generator_lr,
        latent_lr=config.latent_lr,
        optimise_latents=config.optimise_latents,
        reset_generator=config.reset_generator,
        selection=config.selection,
        label_sampling=config.label_sampling,
        augment=augmentation(config, rng) if config.augment_synthesis else None,
        optimizer=optimizer,
        precision=partial(precision, config, next(teacher.parameters()).device),
        rng=rng,
        ranks=ranks,
    )


def distillation(config: FERDConfig, teacher: nn.Module, rng: torch.Generator) -> FERDDistillation:
    """FERD's method: the attack of Eq. 10 and the loss of Eq. 11."""
    return FERDDistillation(
        teacher=teacher,
        attack_model=config.attack_model,
        gamma=config.gamma,
        eps=config.eps,
        step_size=config.step_size,
        steps=config.attack_steps,
        random_start=config.random_start,
        clean_weight=config.clean_weight,
        adv_weight=config.adv_weight,
        fold_batchnorm=config.fold_batchnorm,
        rng=rng,
    )


def sgd(config: FERDConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The student's optimizer."""
    return torch.optim.SGD(
        parameters,
        lr=config.student_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def set_rates(
    optimizer: torch.optim.Optimizer, initial: list[float], config: FERDConfig, epoch: int
) -> None:
    """The groups' rates of an epoch: a cosine from their `initial` ones to 0."""
    start = 0 if config.schedule_warmup else config.warmup_epochs
    done = max(0, epoch - start) / (config.epochs - start)
    for group, rate in zip(optimizer.param_groups, initial, strict=True):
        group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2


def precision(config: FERDConfig, device: torch.device) -> AbstractContextManager[Any]:
    """A fresh context for forwards."""
    if config.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def rule(config: FERDConfig) -> Rule | None:
    """The config's map from class statistics to probabilities, up to normalisation."""
    steps = config.margin_attack_steps
    floor = 0.5 / config.num_classes if config.class_floor is None else config.class_floor
    rules: dict[str, Rule | None] = {
        "none": None,
        "margin_softmax": partial(
            reweight.margin_softmax, temperature=config.reweight_temperature, floor=floor
        ),
        "margin_minmax": reweight.margin_minmax,
        "lps_power": reweight.lps_power,
        "lps_linear": partial(reweight.lps_linear, steps=steps),
        "lps_sigmoid": partial(reweight.lps_sigmoid, steps=steps),
        "lps_tanh": partial(reweight.lps_tanh, steps=steps),
    }
    return rules[config.reweighting]


def pool(config: FERDConfig, ranks: Ranks) -> ImagePool:
    """This process's share of the images."""
    capacity = config.pool_capacity
    if capacity is not None:
        capacity = ranks.share("FERDTrainer", "config.pool_capacity", capacity)
    return ImagePool(capacity, getattr(torch, config.pool_dtype))


def crops(config: FERDConfig, rng: torch.Generator) -> Callable[..., Crops] | None:
    """What draws the augmentation of a batch."""
    if config.augment == "none":
        return None
    flip = config.augment == "crop_flip"
    return partial(Crops.draw, padding=config.crop_padding, flip=flip, rng=rng)


def augmentation(config: FERDConfig, rng: torch.Generator) -> Callable[[Tensor], Tensor] | None:
    draw = crops(config, rng)
    return None if draw is None else lambda x: draw(len(x), device=x.device)(x)


def fresh_generator(config: FERDConfig, device: torch.device, rng: torch.Generator) -> nn.Module:
    """A generator whose weights come from `rng` alone: torch's initialisers would read the global state."""
    with torch.device("meta"):
        generator = Generator(
            config.image_shape,
            latent_dim=config.latent_dim,
            width=config.generator_width,
            num_classes=config.num_classes if config.conditional_generator else None,
        )
    generator.to_empty(device=device)
    generator.reset(rng)
    return generator


def check_models(teacher: Any, student: Any, config: Any) -> None:
    _checks.module("FERDTrainer", "teacher", teacher)
    _checks.module("FERDTrainer", "student", student)
    if not isinstance(config, FERDConfig):
        raise TypeError(
            f"FERDTrainer: expected `config` to be a FERDConfig, got {_checks.got(config)}"
        )
    if not {id(p) for p in teacher.parameters()}.isdisjoint(id(p) for p in student.parameters()):
        raise ValueError(
            "FERDTrainer: expected `teacher` and `student` without common parameters, got models that "
            "share some; the student is trained in place, so copy it first"
        )


def check_given(*, generator: object, source: object, method: object, **functions: object) -> None:
    """What replaces a part of the trainer, where it is given."""
    if generator is not None:
        _checks.module("FERDTrainer", "generator", generator)
    for name, part, kind in (("source", source, Source), ("method", method, Method)):
        if part is not None and not isinstance(part, kind):
            raise TypeError(
                f"FERDTrainer: expected `{name}` with the methods of a {kind.__name__}, got {_checks.got(part)}"
            )
    for name, function in functions.items():
        if function is not None:
            _checks.callable_("FERDTrainer", name, function)


def check_method(method: Method, validation: object) -> None:
    if getattr(method, "needs_validation", False) != (validation is not None):
        expected, came = ("none", "some") if validation is not None else ("batches", "none")
        raise ValueError(
            f"FERDTrainer: expected `validation` to be {expected} for the method "
            f"{type(method).__name__}, got {came}"
        )


def check_logits(
    teacher: nn.Module, student: nn.Module, config: FERDConfig, device: torch.device
) -> None:
    image = torch.zeros(1, *config.image_shape, device=device)
    with torch.no_grad(), borrowed(teacher, student):
        for name, model in (("teacher", teacher), ("student", student)):
            logits = model(image)
            if not isinstance(logits, Tensor) or logits.shape != (1, config.num_classes):
                raise ValueError(
                    f"FERDTrainer: expected `{name}` to return logits of shape "
                    f"(N, {config.num_classes}), got {_checks.got(logits)} for one image"
                )
