"""Parts of the trainer from a config, and checks of the parts and states that a user hands over."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ferdlib
from ferdlib import _checks, losses, reweight
from ferdlib._checks import InvalidType, InvalidValue, got
from ferdlib._modes import lent
from ferdlib.augment import Crops
from ferdlib.checkpoints import digest
from ferdlib.distributed import Ranks, check_same
from ferdlib.methods import FERDDistillation, Method
from ferdlib.methods.rules import Uniform
from ferdlib.synthesis import Generator, ImagePool, Inversion, Source
from ferdlib.synthesis.inversion import Batch, OptimizerFactory
from ferdlib.trainer.class_probabilities import Rule
from ferdlib.trainer.config import FERDConfig
from ferdlib.trainer.teacher import Split, parts

LOG = logging.getLogger("ferdlib")

Augmentation = Callable[[Tensor], Tensor]

DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": losses.distillation,
    "masked_kl": losses.masked_distillation,
    "decoupled_kl": losses.decoupled_kl,
}


def shared_settings(config: FERDConfig, kind: type) -> dict[str, Any]:
    """Settings of the config for the fields that a part has by the same name."""
    names = FERDConfig.__dataclass_fields__
    return {f.name: getattr(config, f.name) for f in fields(kind) if f.name in names}


def inversion(
    config: FERDConfig,
    teacher: nn.Module,
    split: Split | None,
    generator: nn.Module,
    optimizer: OptimizerFactory,
    rng: torch.Generator,
    own: torch.Generator,
    ranks: Ranks,
) -> Inversion:
    """Build FERD's source; `rng` is in the same state on all processes, `own` is each one's."""
    features, head = parts(config, teacher, split)
    # Two names mean a choice in the config and what carries it out in the source.
    settings = shared_settings(config, Inversion) | {
        "augment": augmentation(config, rng, ranks) if config.augment_synthesis else None,
        "precision": partial(precision, config, next(teacher.parameters()).device),
    }
    return Inversion(
        **settings,
        teacher=teacher,
        features=features,
        head=head,
        generator=generator,
        adversarial_from=0 if config.adversarial_warmup else config.warmup_epochs,
        divergence=DIVERGENCES[config.adversarial_loss],
        optimizer=optimizer,
        rng=rng,
        noise_rng=own,
        ranks=ranks,
    )


def distillation(config: FERDConfig, teacher: nn.Module, rng: torch.Generator) -> FERDDistillation:
    """Build FERD's method: the attack of Eq. 10 and the loss of Eq. 11."""
    settings = shared_settings(config, FERDDistillation)
    return FERDDistillation(**settings, teacher=teacher, steps=config.attack_steps, rng=rng)


def keeps_examples(config: FERDConfig, method: Method) -> bool:
    """True if the method's examples of a stored image are the same at every step, and shall be kept."""
    return (
        config.cache_teacher_utae == "exact"
        and config.augment == "none"
        and isinstance(method, FERDDistillation)
        and method.attack_model == "teacher"
        and method.random_start is None
        # Another rule watches the attack, or changes its radius from epoch to epoch.
        and isinstance(method.rule, Uniform)
    )


def fresh_generator(config: FERDConfig, device: torch.device, rng: torch.Generator) -> nn.Module:
    """Build a generator whose weights come from `rng` alone: torch's initialisers read the global state."""
    # On no device at first: the layers' own initialisation would be thrown away.
    with torch.device("meta"):
        generator = Generator(
            config.image_shape,
            latent_dim=config.latent_dim,
            width=config.generator_width,
            num_classes=config.num_classes if config.conditional_generator else None,
        )
    generator.float().to_empty(device=device)
    generator.reset(rng)
    return generator


def pool(config: FERDConfig, ranks: Ranks) -> ImagePool:
    """Build the pool of this process's share of the images."""
    capacity = config.pool_capacity
    if capacity is not None:
        capacity = ranks.share("config.pool_capacity", capacity)
    return ImagePool(capacity, getattr(torch, config.pool_dtype))


def augmentation(config: FERDConfig, rng: torch.Generator, ranks: Ranks) -> Augmentation | None:
    """Build the augmentation of a batch, drawn for the global one; None if there is none."""
    if config.augment == "none":
        return None
    settings: dict[str, Any] = {"padding": config.crop_padding, "rng": rng}
    settings["flip"] = config.augment == "crop_flip"

    def augment(x: Tensor) -> Tensor:
        drawn = Crops.draw(len(x) * ranks.size, device=x.device, **settings)
        # Drawn for all processes, of which each takes its rows.
        part: dict[str, Any] = {
            name: ranks.part(getattr(drawn, name)) for name in ("top", "left", "mirrored")
        }
        return replace(drawn, **part)(x)

    return augment


def uniform(config: FERDConfig) -> Tensor:
    """Build equal class probabilities."""
    k = config.num_classes
    return torch.full((k,), 1 / k, dtype=torch.float32, device="cpu")


def rule(config: FERDConfig) -> Rule | None:
    """Map from class statistics to probabilities, up to normalisation."""
    steps = config.margin_attack_steps
    # By default no class falls below half of its share under equal probabilities.
    floor = 0.5 / config.num_classes if config.class_floor is None else config.class_floor
    temperature = config.reweight_temperature
    rules: dict[str, Rule | None] = {
        "none": None,
        "margin_softmax": partial(reweight.margin_softmax, temperature=temperature, floor=floor),
        "margin_minmax": reweight.margin_minmax,
        "lps_power": reweight.lps_power,
        "lps_linear": partial(reweight.lps_linear, steps=steps),
        "lps_sigmoid": partial(reweight.lps_sigmoid, steps=steps),
        "lps_tanh": partial(reweight.lps_tanh, steps=steps),
    }
    return rules[config.reweighting]


def sgd(config: FERDConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the student's optimizer."""
    return torch.optim.SGD(
        parameters,
        lr=config.student_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def set_rates(
    optimizer: torch.optim.Optimizer, initial: list[float], config: FERDConfig, epoch: int
) -> None:
    """Set the groups' rates of an epoch: a cosine from their `initial` ones to 0."""
    if config.schedule == "constant":
        # The rates are the caller's business.
        return
    start = 0 if config.schedule_warmup else config.warmup_epochs
    done = max(0, epoch - start) / (config.epochs - start)
    for group, rate in zip(optimizer.param_groups, initial, strict=True):
        group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2


def precision(config: FERDConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Make a fresh context for forwards."""
    if config.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def adopt(part: object, device: torch.device, rng: torch.Generator) -> None:
    """Move the modules of a source or method to the device, and give it a generator if it has none."""
    # A part with slots keeps its modules to itself.
    for value in getattr(part, "__dict__", {}).values():
        if isinstance(value, nn.Module):
            value.to(device)
    if getattr(part, "rng", rng) is None:
        part.rng = rng  # type: ignore[attr-defined]


def check_models(teacher: Any, student: Any, config: Any) -> None:
    """Refuse models or a config of another type, and models that share weights."""
    _checks.module(teacher=teacher, student=student)
    _checks.instance(FERDConfig, config=config)
    if not {id(p) for p in teacher.parameters()}.isdisjoint(id(p) for p in student.parameters()):
        raise InvalidValue(
            "expected `teacher` and `student` without common parameters, got models that share some; the "
            "student is trained in place, so copy it first"
        )


def check_parts(*, generator: Any, source: Any, method: Any) -> None:
    """Refuse a replaced part, where one is given, that the trainer cannot use."""
    if generator is not None:
        _checks.module(generator=generator)
    for name, part, kind in (("source", source, Source), ("method", method, Method)):
        if part is not None and not isinstance(part, kind):
            raise InvalidType(
                f"expected `{name}` with the methods of a {kind.__name__}, got {got(part)}"
            )


def check_functions(**given: Any) -> None:
    """Refuse a replaced function, where one is given, that cannot be called."""
    _checks.callable_(**{name: part for name, part in given.items() if part is not None})


def check_together(config: FERDConfig, source: Source, method: Method, validation: object) -> None:
    """Refuse a source or a method that lacks what the config or the caller asks of it."""
    if config.margin_images == "last" and not hasattr(source, "last_images"):
        raise InvalidValue(
            f"expected `source` with `last_images` for margin_images='last', got {got(source)}"
        )
    name, wanted = type(method).__name__, getattr(method, "needs_validation", False)
    if wanted and validation is None:
        raise InvalidValue(
            f"expected `validation` batches for {name}, which learns from them, got None"
        )
    if not wanted and validation is not None:
        raise InvalidValue(f"expected no `validation` for {name}, which does not use it, got one")


def lending(batches: Iterable[Any], *models: nn.Module) -> Iterator[Any]:
    """Batches of a source that has the models only while it makes one."""
    maker = iter(batches)
    while True:
        with lent(*models):
            batch = next(maker, None)
        if batch is None:
            return
        yield batch


def examples(x_adv: Any, x: Tensor) -> Tensor:
    """Result of an attack of the user, without its graph."""
    if not isinstance(x_adv, Tensor) or x_adv.shape[1:] != x.shape[1:]:
        raise InvalidValue(
            f"expected `attack` to return images of shape {tuple(x.shape)}, got {got(x_adv)}"
        )
    return x_adv.detach().to(x)


def check_one_run(
    teacher: nn.Module, student: nn.Module, *, config: FERDConfig, seed: int, parts: list[str]
) -> None:
    """Refuse, on every process alike, what is not the same on all: they would train on without a word."""
    shapes = [(name, tuple(value.shape)) for name, value in student.state_dict().items()]
    check_same(
        **{"version of ferdlib": ferdlib.__version__, "`teacher`": digest(teacher)},
        **{"architecture of `student`": shapes, "`config`": config, "`seed`": seed},
        **{"kinds of parts": parts},
    )


def in_step(batches: Iterator[Batch], ranks: Ranks) -> Iterator[Batch]:
    """Yield a source's batches as long as every process has one of the same size; watch that they differ."""
    warned = False
    while True:
        batch = next(batches, None)
        # Number of images, 0 at the end, and their sum, of each process.
        found = torch.zeros(ranks.size, 2, dtype=torch.float64, device="cpu")
        if batch is not None:
            found[ranks.rank, 0], found[ranks.rank, 1] = len(batch[0]), float(batch[0].sum())
        sizes, sums = ranks.total(found).unbind(dim=1)
        if len(sizes.unique()) > 1:
            came = f"{sizes.int().tolist()} of them"
            raise InvalidValue(
                f"expected `source` to yield equally many images on every process, got {came}"
            )
        if batch is None:
            return
        if len(sums.unique()) < ranks.size and not warned:
            warned = True
            LOG.warning(
                "FERDTrainer: `source` yields the same images on several processes; seed its generator by "
                "`Ranks.here().rank`, or leave its `rng` None"
            )
        yield batch
