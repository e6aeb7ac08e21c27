"""Synthesis, methods, trainer, plots: one valid call of each.

A new function is a line here: its name, and the kind of each argument.
"""

import typing
from dataclasses import fields

import torch
from torch import nn

from bad_input.kinds import (
    CLASSES,
    INF,
    MODEL,
    MOVED,
    NAN,
    NO_TENSOR,
    SHARE,
    STUDENT,
    TEACHER,
    WEIGHT,
    C,
    K,
    Kind,
    N,
    X,
    Y,
    Z,
    anything,
    bounds,
    by_name,
    case,
    choice,
    class_vector,
    confusion,
    device,
    features,
    fractions,
    function,
    images,
    integer,
    labels,
    logits,
    module,
    names,
    nothing,
    number,
    optional,
    path,
    quiet,
    rng,
    spoilt,
    state,
    unchecked,
    values,
    word,
)
from ferdlib import losses, methods, models, reweight, synthesis, trainer
from ferdlib.methods import METHODS

ON_HOST = "samples are read on the host"
SHAPE = {
    "text": ("1x8x8", TypeError),
    "number": (8, TypeError),
    "none": (None, TypeError),
    "floats": ((1.0, 8, 8), TypeError),
    "length": ((8, 8), ValueError),
    "below": ((0, 8, 8), ValueError),
    "quarters": ((1, 6, 8), ValueError),
}
PROBABILITIES = class_vector(torch.tensor([0.4, 0.3, 0.2, 0.1]), 0.0, 1.0).but(nan=ValueError)
case(
    "synthesis.Generator",
    image_shape=Kind((1, 8, 8), SHAPE),
    latent_dim=integer(3, 1),
    width=integer(2, 1),
    num_classes=optional(CLASSES),
)


def generator():
    shape = (C, 8, 8)
    return synthesis.Generator(shape, latent_dim=3, width=2, num_classes=K).eval()


case(
    "synthesis.Generator.forward",
    latents=logits(Z[:, :3]).but(width=ValueError, nan=lambda x: bool(x[0].isnan().any())),
    labels=labels().but(none=ValueError),
).that(on=generator)
case("synthesis.Generator.reset", rng=rng()).that(on=generator)


def inversion(**settings):
    teacher = models.small_cnn(C, K, width=2).eval()
    parts = {"teacher": teacher, "features": teacher.layer1, "head": after_first(teacher)}
    parts |= {"generator": generator(), "batch_size": 2, "steps": 1, "latent_dim": 3}
    return synthesis.Inversion(**(parts | {"bottleneck_steps": 1} | settings))


def after_first(teacher):
    rest = (teacher.layer2, teacher.layer3, teacher.layer4, teacher.pool, nn.Flatten(), teacher.fc)
    return nn.Sequential(*rest)


case(
    "synthesis.Inversion",
    teacher=module(),
    features=function(MODEL[:4]),
    head=function(MODEL[4:]),
    generator=module(generator()),
    batch_size=integer(2, 1),
    steps=integer(1, 1),
    latent_dim=integer(3, 1),
    adv_weight=WEIGHT,
    bn_weight=WEIGHT,
    onehot_weight=WEIGHT,
    uniformity_weight=WEIGHT,
    adversarial_from=integer(0, 0),
    divergence=function(losses.distillation),
    bn_models=choice("teacher"),
    bottleneck_beta=WEIGHT,
    bottleneck_steps=integer(1, 0),
    bottleneck_lr=number(0.1, 0.0, open_low=True),
    bottleneck_noise=choice("channel"),
    bottleneck_reduction=choice("mean"),
    mask_threshold=choice("channel"),
    generator_lr=number(0.1, 0.0, open_low=True),
    latent_lr=number(0.1, 0.0, open_low=True),
    selection=choice("batch"),
    label_sampling=choice("multinomial"),
    augment=optional(function(quiet)),
    optimizer=function(quiet),
    precision=function(quiet),
    rng=rng(),
)
case("synthesis.Inversion.epoch", student=module(), class_probabilities=PROBABILITIES).that(
    call=lambda **given: next(inversion().epoch(**given)), says=r"Inversion\.epoch|sample_labels"
)
case("synthesis.Inversion.load_state_dict", state=state(inversion().state_dict())).that(
    on=inversion
)
case(
    "synthesis.ImagePool",
    capacity=optional(integer(3, 1)),
    dtype=Kind(torch.uint8, {"unknown": (torch.float64, ValueError)} | NO_TENSOR),
)


def pool():
    filled = synthesis.ImagePool()
    filled.add(X, Y)
    return filled


case(
    "synthesis.ImagePool.add",
    x=images(),
    y=labels().without("above", "below").but(device=MOVED),
    brightness=values().but(dtype=anything, nan=anything, device=MOVED),
).that(on=synthesis.ImagePool, empty=anything)
case("synthesis.ImagePool.column", name=choice("labels")).that(on=pool)
for name in ("draw", "sample"):
    case(f"synthesis.ImagePool.{name}", count=integer(2, 1), rng=rng()).that(on=pool)
case("synthesis.ImagePool.stored", x=features()).that(on=pool)
case("synthesis.ImagePool.__getitem__", index=labels(N)).that(on=pool)
case(
    "synthesis.ImagePool.load_state_dict",
    state=state(pool().state_dict()),
    device=optional(device()),
).that(on=pool)
case(
    "synthesis.sample_labels",
    class_probabilities=PROBABILITIES,
    count=integer(5, 1),
    method=choice("multinomial"),
    rng=rng(),
)

BALL = {"eps": number(0.1, 0.0), "step_size": number(0.05, 0.0), "steps": integer(2, 0)}
BALL |= {"random_start": optional(choice("uniform")), "rng": rng()}
DROPS = {"number": (3, TypeError), "text": ("3", TypeError), "inner": (("3",), TypeError)}
SETTINGS = BALL | {
    "num_classes": CLASSES,
    "teacher": module(),
    "natural_teacher": module(TEACHER),
    "temperature": number(2.0, 0.0, open_low=True),
    "alpha": SHARE,
    "exponent": WEIGHT,
    "adv_weight": SHARE,
    "rate": SHARE,
    "rate_drops": Kind((2, 3), DROPS),
    "clean_target": choice("natural"),
    "beta": WEIGHT,
    "uniform_weight": WEIGHT,
    "count": choice("first"),
    "clip": optional(bounds()),
    "shift": number(-1.0),
    "begin": integer(1, 1),
    "slack": WEIGHT,
    "variance_weight": WEIGHT,
    "margin_base": WEIGHT,
    "mixing_base": WEIGHT,
    "radius": WEIGHT,
    "strength": WEIGHT,
    "hedge_rate": WEIGHT,
}
SWITCH = Kind(False, {"text": ("yes", TypeError), "number": (1, TypeError)})
SWITCHES = dict.fromkeys(("train_mode", "kl_mean", "remargin", "fold_batchnorm"), SWITCH)
OWN_SETTINGS = {
    # Epochs before something begins, where 0 is none of them.
    **{name: {"begin": integer(1, 0)} for name in ("IAD", "GAIRARD", "CFAARD", "FairIAD")},
    "ABSLD": {"rate": WEIGHT},
}


def settings_of(kind):
    own = SETTINGS | SWITCHES | OWN_SETTINGS.get(kind.__name__, {})
    return {f.name: own[f.name] for f in fields(kind) if f.init}


BATCH = {"student": function(STUDENT), "x": images(), "y": labels()}
ANY = r"[\w.]+"  # a method is composed of public functions, and the one that refuses says so
NO_LABELS = ("RSLAD", "MTARD", "AdaAD")  # whose losses do not look at them


def loss_arguments(name):
    """What a student makes of images is its own business."""
    y = labels().but(device="brought along by some losses, refused by others")
    pair = torch.cat([X, X]) if name == "BAT" else X
    return {
        "student": Kind(STUDENT),
        "x": Kind(X, cut=X[:0]),
        "x_adv": Kind(pair, cut=X[:0]),
        "y": Kind(Y, cut=Y[:0]) if name in NO_LABELS else y,
    }


for method in [methods.Adversarial, methods.Distilled, *METHODS.values()]:
    name = method.__name__

    def make(method=method):
        return method(**{name: kind.valid for name, kind in settings_of(method).items()})

    case(f"methods.{name}", **settings_of(method)).that(says=f"{name}|MTARDBalance")
    case(f"methods.{name}.attack", **BATCH).that(on=make, says=ANY)
    case(f"methods.{name}.load_state_dict", state=state(make().state_dict())).that(on=make)
    if method in METHODS.values():
        case(f"methods.{name}.loss", **loss_arguments(name)).that(
            on=make,
            says=ANY,
            names={"y": "y|targets|adv_loss"},
            empty=ValueError if "MTARD" in name else nothing,  # whose balance starts there
        )
    if hasattr(method, "validate"):
        batches = Kind([(X, Y)], {"number": (7, TypeError), "none": (None, TypeError)})
        batches = batches.also(**labels().of(lambda y: [(X, y)], "labels "))
        case(f"methods.{name}.validate", student=function(STUDENT), batches=batches).that(
            on=make, says=ANY, names={"batches": "batches|targets|y"}
        )
case(
    "methods.FERDDistillation",
    teacher=module(),
    attack_model=choice("student"),
    gamma=WEIGHT,
    clean_weight=WEIGHT,
    adv_weight=WEIGHT,
    **BALL,
)


def ferd():
    return methods.FERDDistillation(teacher=MODEL, steps=1)


case("methods.FERDDistillation.attack", **BATCH | {"y": Kind(Y)}).that(on=ferd, says=ANY)
case("methods.FairAverage", model=module(), decay=SHARE, threshold=SHARE)


def averaged():
    return methods.FairAverage(MODEL)


case(
    "methods.FairAverage.update",
    model=module().also(other=(nn.Linear(2, 2), ValueError)),
    class_accuracy=fractions(),
).that(on=averaged)
case("methods.FairAverage.load_state_dict", state=state(averaged().state_dict())).that(on=averaged)
case("methods.FrozenTeacher", model=module())
case("methods.FrozenTeacher.__call__", x=Kind(X, NO_TENSOR)).that(
    on=lambda: methods.FrozenTeacher(MODEL)
)
case("methods.FrozenTeacher.remember", x=Kind(X, NO_TENSOR), logits=Kind(Z, NO_TENSOR)).that(
    on=lambda: methods.FrozenTeacher(MODEL)
)
case(
    "methods.create",
    name=choice("ard"),
    num_classes=CLASSES,
    teacher=module().but(none=ValueError),
    natural_teacher=Kind(None, {"text": ("text", TypeError), "unasked": (MODEL, ValueError)}),
    preset=choice("paper"),
    eps=number(0.1, 0.0),
).that(says="create|ARD")
case("methods.recipe", name=choice("ard"), preset=choice("paper"))

AX = Kind(None, {"text": ("ax", TypeError), "number": (7, TypeError)})
NAMES = optional(names())
ENDS = torch.stack([torch.zeros(K), torch.ones(K)], dim=1)
INTERVALS = Kind(
    {"a": ENDS},
    {
        "no mapping": (ENDS, TypeError),
        "unknown": ({"b": ENDS}, ValueError),
        "dtype": ({"a": ENDS.long()}, TypeError),
        "rank": ({"a": ENDS[0]}, ValueError),
        "length": ({"a": ENDS[:-1]}, ValueError),
        "around": ({"a": ENDS / 10}, ValueError),
        "nan": ({"a": ENDS * NAN}, anything),
    },
)
case(
    "plots.plot_classes",
    accuracies=by_name(fractions()),
    intervals=optional(INTERVALS),
    kind=choice("bars"),
    class_names=NAMES,
    ax=AX,
)
case(
    "plots.plot_weights",
    weights=class_vector(torch.ones(K), 0.0),
    accuracy=fractions().but(device=ON_HOST),
    class_names=NAMES,
    ax=AX,
)
case(
    "plots.plot_confusion",
    confusion=confusion(),
    class_names=NAMES,
    normalize=Kind(True, {"text": ("row", TypeError), "number": (1, TypeError)}),
    ax=AX,
)
case(
    "plots.plot_sweep",
    values=Kind(
        [0.1, 0.2, 0.3],
        {
            "number": (0.1, TypeError),
            "text": ("0.1", TypeError),
            "inner": (["0.1", 0.2, 0.3], TypeError),
            "nan": ([NAN, 0.2, 0.3], ValueError),
            "length": ([0.1, 0.2], ValueError),
            "empty": ([], ValueError),
        },
    ),
    figures=by_name(values().but(nan=anything).also(inf=(spoilt(Z[:, 0], INF), ValueError))),
    xlabel=Kind("gamma"),
    ylabel=Kind("accuracy"),
    ax=AX,
).that(names={"values": "values|figures"})
case(
    "plots.plot_survival",
    fooled_at=labels(4).but(device=ON_HOST),
    targets=labels().but(device=ON_HOST),
    num_classes=CLASSES,
    steps=integer(2, 1),
    class_names=NAMES,
    ax=AX,
).that(empty=anything)
case(
    "plots.plot_images",
    x=images(X[:, :1]).also(channels=(X, ValueError)),
    labels=labels().but(device=ON_HOST),
    num_classes=CLASSES,
    per_class=integer(2, 1),
    class_names=NAMES,
    ax=AX,
).that(empty=anything)

LEAST = {"num_classes": 2, "warmup_epochs": 0, "bottleneck_steps": 0, "attack_steps": 0}
LEAST |= {"crop_padding": 0, "student_steps": 0}
NEEDED = {"num_classes": 3, "layer": "layer4", "class_floor": 0.01, "pool_capacity": 9}


def config_kind(name, hint, default):
    """What a field of the config is, by its annotation."""
    alternatives = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
    if name == "image_shape":
        return Kind(default, {key: (value, ValueError) for key, (value, _) in SHAPE.items()})
    if typing.get_origin(alternatives[0]) is typing.Literal:
        kind = choice(default)
    elif bool in alternatives:
        kind = Kind(default, {"text": ("yes", TypeError), "number": (1, TypeError)})
    elif str in alternatives:
        kind = word(default)
    elif int in alternatives:
        kind = integer(default, LEAST.get(name, 1))
    else:
        high = 1.0 if name in ("momentum", "margin_ema") else INF
        kind = number(default, 0.0, high, open_low=name.endswith(("_lr", "temperature")))
    return optional(kind) if type(None) in alternatives else kind


HINTS = typing.get_type_hints(trainer.FERDConfig)
case(
    "trainer.FERDConfig",
    **{
        f.name: config_kind(f.name, HINTS[f.name], NEEDED.get(f.name, f.default))
        for f in fields(trainer.FERDConfig)
    },
)
TINY = trainer.FERDConfig(
    num_classes=3,
    layer="layer4",
    image_shape=(1, 8, 8),
    epochs=1,
    warmup_epochs=0,
    batch_size=4,
    generator_width=4,
    generator_steps=1,
    student_steps=1,
)


def ferd_trainer(**given):
    parts = {"teacher": models.small_cnn(1, 3, width=2), "student": models.small_cnn(1, 3, width=1)}
    return trainer.FERDTrainer(**(parts | {"config": TINY} | given))


case(
    "trainer.FERDTrainer",
    teacher=module(models.small_cnn(1, 3, width=2)),
    student=module(models.small_cnn(1, 3, width=1)),
    generator=optional(module(synthesis.Generator((1, 8, 8), width=2))),
    config=Kind(TINY, {"none": (None, TypeError), "mapping": ({}, TypeError)}),
    source=Kind(None, {"text": ("text", TypeError)}),
    method=Kind(None, {"text": ("text", TypeError)}),
    attack=optional(function(quiet)),
    validation=Kind(None, {"unasked": ([(X, Y)], ValueError)}),
    reweight=optional(function(reweight.margin_softmax)),
    student_optimizer=optional(function(torch.optim.Adam)),
    generator_optimizer=optional(function(torch.optim.Adam)),
    seed=integer(0, 0),
    diagnostics=optional(path("diagnostics")),
    device=optional(device()),
)
case(
    "trainer.FERDTrainer.load_state_dict",
    state=unchecked(
        state(ferd_trainer().state_dict()), "text", "none", "empty", "one more", "shape"
    ),
).that(on=ferd_trainer)
case("trainer.FERDTrainer.epochs", stop=optional(function(lambda: True))).that(
    call=lambda stop: list(ferd_trainer().epochs(stop=stop))
)
case("trainer.Checkpoints", folder=path("runs"), keep=integer(3, 1))
case(
    "trainer.Checkpoints.save",
    state=unchecked(
        Kind(
            {"epoch": 1},
            {
                "text": ("text", TypeError),
                "none": (None, TypeError),
                "inner": ({"epoch": quiet}, TypeError),
            },
        ),
        "inner",
    ),
    step=integer(1, 0),
).that(on=lambda: trainer.Checkpoints("runs"))
case(
    "trainer.Checkpoints.read",
    path=path("saved/checkpoint-0000000001.pt").also(missing=("none.pt", FileNotFoundError)),
)
