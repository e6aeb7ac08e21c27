"""Losses, attacks, rules, bottleneck, metrics, models, augmentation: one valid call of each.

A new function is a line here: its name, and the kind of each argument.
"""

import torch
from torch import nn

from bad_input.kinds import (
    CLASSES,
    FEATURES,
    MODEL,
    MOVED,
    NAN,
    NO_TENSOR,
    SHARE,
    WEIGHT,
    C,
    K,
    Kind,
    N,
    Y,
    Z,
    anything,
    bounds,
    case,
    choice,
    class_vector,
    confusion,
    device,
    features,
    finite,
    flags,
    fractions,
    function,
    head,
    images,
    integer,
    labels,
    logits,
    module,
    number,
    optional,
    path,
    per_sample,
    quiet,
    rng,
    scalar,
    spoilt,
    start,
    state,
    values,
    word,
)
from ferdlib import augment, losses, models, reweight

# Of a batch: a NaN of one sample is a NaN of the whole.
WHOLE = {"nan": lambda result: bool(torch.as_tensor(result).isnan())}
TEMPERATURE = per_sample(2.0, open_low=True).but(nan=ValueError)

for name in ("cross_entropy", "margin"):
    case(f"losses.{name}", logits=logits(), targets=labels())
case("losses.cw_margin", logits=logits(), targets=labels(), confidence=number(50.0, 0.0))
case("losses.kl_divergence", p_logits=logits(), q_logits=logits(), temperature=TEMPERATURE)
case("losses.distillation", logits=logits(), reference_logits=logits(), temperature=TEMPERATURE)
case("losses.masked_distillation", logits=logits(), reference_logits=logits())
for name in ("uniformity", "confidence_penalty"):
    case(f"losses.{name}", logits=logits())
case(
    "losses.decoupled_kl",
    student_logits=logits(),
    teacher_logits=logits(),
    mse_weight=WEIGHT,
    cross_entropy_weight=WEIGHT,
    pair_temperature=number(100.0, 0.0, open_low=True),
)
case(
    "losses.ferd_distillation_loss",
    student_clean=logits(),
    student_adv=logits(),
    teacher_clean=logits(),
    clean_weight=WEIGHT,
    adv_weight=WEIGHT,
)
case(
    "losses.ferd_generator_loss",
    teacher_logits=logits().but(nan=lambda result: bool(result[0].isnan())),
    student_logits=logits().but(nan=lambda result: bool(result[0].isnan())),
    targets=labels(),
    nonrobust_logits=optional(logits().but(nan=lambda result: bool(result[0].isnan()))),
    batchnorm_loss=scalar(),
    adv_weight=WEIGHT,
    bn_weight=WEIGHT,
    onehot_weight=WEIGHT,
    uniformity_weight=WEIGHT,
    divergence=function(losses.distillation),
).that(empty=lambda result: bool(result[0].isnan()))  # a mean of no samples
case(
    "losses.trades",
    student_clean=logits(),
    student_adv=logits(),
    targets=labels(),
    beta=WEIGHT,
    kl_weight=WEIGHT,
)
case(
    "losses.ard",
    student_clean=logits(),
    student_adv=logits(),
    teacher_clean=logits(),
    targets=labels(),
    temperature=TEMPERATURE,
    alpha=SHARE,
    kl_weight=WEIGHT,
)
case(
    "losses.rslad",
    student_clean=logits(),
    student_adv=logits(),
    teacher_clean=logits(),
    adv_weight=SHARE,
    kl_weight=WEIGHT,
)
case(
    "losses.iad",
    student_clean=logits(),
    student_adv=logits(),
    teacher_clean=logits(),
    teacher_adv=logits(),
    targets=labels(),
    temperature=TEMPERATURE,
    alpha=SHARE,
    exponent=WEIGHT,
    kl_weight=WEIGHT,
)
case(
    "losses.adaad",
    student_clean=logits(),
    student_adv=logits(),
    teacher_clean=logits(),
    teacher_adv=logits(),
    alpha=SHARE,
    temperature=TEMPERATURE,
    kl_weight=WEIGHT,
)
case(
    "losses.absld",
    student_clean=logits(),
    student_adv=logits(),
    teacher_clean=logits(),
    adv_temperature=TEMPERATURE,
    clean_temperature=TEMPERATURE,
    adv_weight=SHARE,
    kl_weight=WEIGHT,
)
case(
    "losses.mtard",
    student_clean=logits(),
    student_adv=logits(),
    natural_clean=logits(),
    robust_adv=logits(),
    adv_weight=SHARE.also(
        scalar=(torch.tensor(0.5), finite),
        dtype=(torch.tensor(1), TypeError),
        rank=(torch.full((N,), 0.5), ValueError),
    ),
    kl_weight=WEIGHT,
)
case(
    "losses.bat",
    student_clean=logits(),
    student_last_correct=logits(),
    student_first_wrong=logits(),
    targets=labels(),
    beta=WEIGHT,
    uniform_weight=WEIGHT,
)
case(
    "losses.class_temperatures",
    temperatures=class_vector(torch.ones(K), 0.0).but(nan=ValueError),
    class_losses=class_vector(Z[0]).but(device=MOVED),
    rate=number(0.1, 0.0),
    low=number(0.5, 0.0, open_low=True),
    high=number(5.0, 0.5),
)
case(
    "losses.class_variance",
    values=values().but(**WHOLE),
    targets=labels(),
    num_classes=integer(K, 2),
    ddof=integer(1, 0),
).that(empty=lambda result: result == 0)
case("losses.BatchNormStatistics", model=module(), reduce=optional(function(lambda value: value)))
case("losses.MTARDBalance", rate=number(0.1, 0.0, 1.0), exponent=WEIGHT)
case(
    "losses.MTARDBalance.update",
    adv_loss=scalar().also(nan=(torch.tensor(NAN), ValueError)),
    clean_loss=scalar().also(nan=(torch.tensor(NAN), ValueError)),
).that(on=losses.MTARDBalance)
case("losses.MTARDBalance.load_state_dict", state=state(losses.MTARDBalance().state_dict())).that(
    on=losses.MTARDBalance, names={"state": "state|clean_weight|initial_losses|rate"}
)


ASCENT = {
    "model": function(MODEL),
    "x": images(),
    "targets": labels(),
    "loss": function(losses.cross_entropy),
    "eps": per_sample(0.1),
    "step_size": per_sample(0.05),
    "steps": integer(2, 0).also(start=(0, finite)),
    "random_start": start(),
    "bounds": bounds(),
    "rng": rng(),
    "on_step": optional(function(quiet)),
}


def ascent(*without, **other):
    return {k: v for k, v in ASCENT.items() if k not in without} | other


case("attacks.pgd", **ascent())
case("attacks.fgsm", **ascent("step_size", "steps"))
case("attacks.cw_linf", **ascent("loss", confidence=number(50.0, 0.0)))
case(
    "attacks.utae_pgd",
    **ascent(
        "loss",
        "targets",
        # Its NaN reaches the loss at the first step.
        reference_logits=optional(logits().but(nan=RuntimeError)),
        gamma=WEIGHT,
    ),
).that(names={"reference_logits": "reference_logits|model"})
case(
    "attacks.least_pgd_steps",
    **ascent(steps=integer(2, 1), labels=optional(labels()), count=choice("first")),
)
case(
    "attacks.autoattack",
    model=function(MODEL),
    x=images(),
    targets=labels(),
    num_classes=integer(K, 2),
    eps=number(0.9, 0.0, open_low=True),
    version=choice("rand"),
    batch_size=integer(2, 1),
    seed=integer(0, 0),
    on_batch=optional(function(quiet)),
).that(empty=lambda result: len(result.x_adv) == 0)

MARGINS = class_vector(Z[0])
KAPPA = class_vector(torch.tensor([0.5, 1.0, 2.0, 1.5]), 0.0, 2.0)
case(
    "reweight.margin_softmax",
    class_margins=MARGINS,
    temperature=number(1.0, 0.0, open_low=True),
    floor=number(0.1, 0.0, 1 / K, open_high=True),
)
case(
    "reweight.margin_minmax",
    class_margins=MARGINS,
    low=number(0.05, 0.0),
    high=number(0.2, 0.05, open_low=True),
)
case("reweight.lps_power", kappa=KAPPA.without("above"), beta=WEIGHT, guard=number(1e-5, 0.0))
case("reweight.lps_linear", kappa=KAPPA, steps=integer(2, 1))
for name in ("lps_sigmoid", "lps_tanh"):
    case(f"reweight.{name}", kappa=KAPPA, steps=integer(2, 1), shift=number(0.0))
case(
    "reweight.gairat",
    steps_withstood=values(torch.tensor([0.0, 1.0, 2.0])).also(
        dtype=(Y.int(), TypeError),
        counts=(Y, finite),
        below=(Y - 1, ValueError),
        above=(Y + 1, ValueError),
    ),
    steps=integer(2, 1),
    shift=number(-1.0),
).that(empty=ValueError)
case("reweight.cfa_margins", robust_accuracy=fractions(), base=WEIGHT)
case("reweight.cfa_mixing", robust_accuracy=fractions(), beta=WEIGHT, base=WEIGHT)
case("reweight.kl_ball", scores=MARGINS, radius=number(0.5, 0.0))
P = torch.full((K, K), 0.1) + 0.6 * torch.eye(K)
case(
    "reweight.confusion_weights",
    confusion_probabilities=Kind(
        P,
        {
            "text": ("text", TypeError),
            "none": (None, TypeError),
            "dtype": (P.long(), TypeError),
            "rank": (P[0], ValueError),
            "square": (P[:, :-1], ValueError),
            "empty": (P[:0, :0], ValueError),
            "below": (P - 0.2 * torch.eye(K).roll(1, 1), ValueError),
            "sum": (2 * P, ValueError),
            "nan": (spoilt(P, NAN), ValueError),
            "nan row": (torch.where(torch.arange(K)[:, None] == 0, NAN, P), finite),
        },
    ),
    strength=WEIGHT,
)
case(
    "reweight.normalize",
    w=class_vector(torch.arange(1.0, K + 1), 0.0).but(nan=ValueError, one_class=finite),
    to=choice("mean"),
    clip=optional(bounds()).also(below=((-1.0, 1.0), ValueError)),
)


def class_mean():
    return reweight.ClassMean(K)


def class_weights():
    return reweight.ClassWeights(K, reweight.lps_power)


VALUES = values(torch.tensor([1.0, 2.0, 3.0])).but(dtype=anything, nan=anything)
# The values say where; what is summed is found there when it is read.
UPDATE = {"values": VALUES, "targets": labels().but(device=MOVED)}
case("reweight.ClassMean", num_classes=integer(K, 2))
case("reweight.ClassWeights", num_classes=integer(K, 2), rule=function(reweight.lps_power))
case("reweight.ClassWeights.__call__", **UPDATE).that(on=class_weights)
for name, make in {"ClassMean": class_mean, "ClassWeights": class_weights}.items():
    case(f"reweight.{name}.update", **UPDATE).that(on=make, empty=anything)
    case(f"reweight.{name}.load_state_dict", state=state(make().state_dict())).that(on=make)
    other = Kind(class_mean(), NO_TENSOR | {"length": (reweight.ClassMean(K + 1), ValueError)})
    case(f"reweight.{name}.merge", other=other).that(on=make)
case(
    "reweight.FRLWeights",
    num_classes=integer(K, 2),
    clean_slack=WEIGHT,
    boundary_slack=WEIGHT,
    rate=WEIGHT,
    limit=SHARE,
    margin_rate=WEIGHT,
)
case(
    "reweight.FRLWeights.update",
    clean_accuracy=fractions().but(length=ValueError),
    robust_accuracy=fractions().but(device=MOVED),
).that(on=lambda: reweight.FRLWeights(K))
case("reweight.HedgeWeights", num_classes=integer(K, 2), rate=WEIGHT)
case(
    "reweight.HedgeWeights.update",
    class_losses=class_vector(Z[0]).but(length=ValueError),
    average_loss=number(1.0),
).that(on=lambda: reweight.HedgeWeights(K))
for kind in (reweight.FRLWeights, reweight.HedgeWeights):
    case(f"reweight.{kind.__name__}.load_state_dict", state=state(kind(K).state_dict())).that(
        on=lambda kind=kind: kind(K)
    )

case(
    "bottleneck.split_at",
    model=module(),
    layer_name=word("3").also(unknown=("layer9", ValueError)),
)
case(
    "bottleneck.noise_scale",
    features=features().also(
        # Found by the objective: values are not read before.
        nan=(spoilt(FEATURES, NAN), RuntimeError),
        positions=(FEATURES[:, :, :1, :1], ValueError),
    ),
    head=function(head),
    targets=labels(),
    beta=WEIGHT,
    steps=integer(2, 0),
    lr=number(0.1, 0.0, open_low=True),
    noise=choice("channel"),
    reduction=choice("mean"),
    rng=rng(),
).that(empty=ValueError)
case(
    "bottleneck.nonrobust_channels",
    features=features().also(
        nan=(spoilt(FEATURES, NAN), "not read, which would stall an accelerator at each step"),
        positions=(FEATURES[:, :, :1, :1], ValueError),
    ),
    sigma=logits(torch.ones(N, C))
    .without("one_class", "width")
    .but(device=MOVED, nan="not read, which would stall an accelerator at each step"),
    threshold=choice("sample"),
).that(empty=ValueError)
case(
    "bottleneck.nonrobust_logits",
    features=features().also(nan=(spoilt(FEATURES, NAN), lambda z: bool(z[0].isnan().any()))),
    head=function(head),
    mask=flags(torch.ones(N, C).bool()),
)

case(
    "metrics.confusion_matrix",
    predictions=labels().but(device="labels are counted on the host"),
    targets=labels().but(device="labels are counted on the host"),
    num_classes=integer(K, 2),
).that(empty=lambda matrix: int(matrix.sum()) == 0)
for name in ("class_accuracy", "target_entropy"):
    case(f"metrics.{name}", confusion=confusion())
for name in ("average", "worst_class"):
    case(f"metrics.{name}", acc=fractions()).that(check=finite)
case("metrics.worst_fraction", acc=fractions(), fraction=number(0.5, 0.0, 1.0, open_low=True))
case("metrics.nsd", acc=fractions(), ddof=integer(0, 0))
case(
    "metrics.inheritance_ratio",
    student=fractions(),
    teacher=fractions().but(device="their values are read before, of which meta has none"),
)

CHANNELS = integer(C, 1)
case("models.small_cnn", in_channels=CHANNELS, num_classes=CLASSES, width=integer(2, 1))
case(
    "models.wide_resnet",
    depth=integer(10, 10).also(form=(11, ValueError)),
    width=integer(1, 1),
    num_classes=CLASSES,
    in_channels=CHANNELS,
)
for name in ("resnet18", "resnet34", "resnet56", "preact_resnet18", "preact_resnet34"):
    case(f"models.{name}", num_classes=CLASSES, in_channels=CHANNELS)
case("models.mobilenet_v2", num_classes=CLASSES, in_channels=CHANNELS)
ARCHITECTURE = word("small_cnn_2").also(unknown=("resnet50", ValueError))
case(
    "models.build_model", architecture=ARCHITECTURE, num_classes=CLASSES, in_channels=CHANNELS
).that(says="build_model|small_cnn")
FILE = path("student.pt").also(missing=("none.pt", FileNotFoundError))
case(
    "models.load_checkpoint",
    path=FILE,
    architecture=optional(ARCHITECTURE),
    num_classes=optional(CLASSES),
    in_channels=optional(CHANNELS),
)
case(
    "models.load_robustbench",
    path=FILE,
    name=choice("Chen2024Data_WRN_34_10").but(none=ValueError),
    num_classes=CLASSES,
).that(check="a file of 185 MB; tests/test_checkpoints.py has one")
FLOATS = {"unknown": (torch.float64, ValueError), "text": ("bfloat16", TypeError)}
case("models.freeze_for_attack", model=module(), autocast=Kind(None, FLOATS))
case(
    "models.FrozenModel.follow",
    model=module().also(other=(nn.Linear(2, 2), ValueError)),
).that(on=lambda: models.freeze_for_attack(MODEL))


def per_channel(valid):
    cells = {
        "text": ("text", TypeError),
        "texts": (["a", "b"], TypeError),
        "none": (None, TypeError),
        "rank": ([valid], ValueError),
        "length": (valid[:-1], ValueError),
        "empty": ([], ValueError),
        "nan": ([NAN, NAN], ValueError),
        "complex": (torch.ones(C, dtype=torch.complex64), TypeError),
    }
    return Kind(valid, cells)


case(
    "models.Normalized",
    model=module(),
    mean=per_channel([0.5, 0.4]),
    std=per_channel([0.2, 0.3]).also(below=([0.2, 0.0], ValueError)),
)

case(
    "augment.crop_flip",
    x=images().but(nan=anything, inf=anything, above=anything, below=anything),
    padding=integer(1, 0),
    rng=rng(),
)
case(
    "augment.Crops",
    top=labels(3),
    left=labels(3),
    mirrored=flags(),
    padding=integer(1, 0),
).that(empty=anything)
case("augment.Crops.draw", n=integer(N, 0), padding=integer(1, 0), rng=rng(), device=device())
case("augment.Crops.count", padding=integer(1, 0))
case("augment.Crops.__call__", x=features().but(length=ValueError, device=ValueError)).that(
    on=lambda: augment.Crops.draw(N, padding=1), empty=ValueError
)
