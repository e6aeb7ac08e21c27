"""Options of all commands, as dataclasses; nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ferdlib.trainer.config import FERDConfig

Data = Literal["digits", "cifar10", "cifar100", "svhn", "tiny-imagenet", "folder", "generated"]
Method = Literal[
    "natural", "sat", "trades", "bat", "ard", "iad", "rslad", "mtard", "adaad", "absld"
]
Rule = Literal["none", "fair", "gair", "frl", "fat", "cfa", "faal", "dafa", "wat"]
Value = None | bool | int | float | str

# Number of classes; channels, height and width in pixels. A folder's are its own.
SHAPES: dict[str, tuple[int, tuple[int, int, int]]] = {
    "digits": (10, (1, 8, 8)),
    "cifar10": (10, (3, 32, 32)),
    "cifar100": (100, (3, 32, 32)),
    "svhn": (10, (3, 32, 32)),
    "tiny-imagenet": (200, (3, 64, 64)),
    "folder": (10, (3, 32, 32)),
    "generated": (10, (3, 32, 32)),
}
# Sizes of `ferdlib distill --smoke`, whatever the preset says of them.
SMOKE: dict[str, Any] = {"epochs": 2, "warmup_epochs": 1, "batch_size": 16, "generator_width": 8}
SMOKE |= dict.fromkeys(("generator_steps", "bottleneck_steps", "student_steps"), 3)
SMOKE |= dict.fromkeys(("attack_steps", "margin_attack_steps"), 3)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Labelled images."""

    data: Data = "digits"
    """A known data set, "folder" for ROOT/train and ROOT/test with a folder per class, or generated noise."""
    root: Path = Path("data")
    """Folder of the data."""
    download: bool = False
    """Fetch the data if they are not there."""


@dataclass(frozen=True, kw_only=True)
class TestOptions:
    """The final table."""

    test_images: int | None = None
    """Number of test images, with equal shares of the classes; None takes all."""
    autoattack: bool = False
    """Add AutoAttack: nearly a second per robust image and core on a CPU."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """A run that may take days."""

    out: Path
    """Folder of all results, and of the checkpoints until these are written."""
    resume: Literal["auto"] | None = None
    """auto: continue from the newest checkpoint in --out, made with the same options, or start without one."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; there is also one after the last epoch, and where the run is stopped."""
    keep_checkpoints: int = 3
    """Number of checkpoints that stay in --out; they are deleted when the results are written."""
    max_minutes: float | None = None
    """Stop after the epoch during which this many minutes have passed."""
    tensorboard: bool = False
    """Write the figures of each epoch for TensorBoard, under OUT/tensorboard."""
    seed: int = 0
    """Seed of the split, the models and all noise."""
    device: str = "auto"
    """Device of the models; auto is CUDA where there is one."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Attack and loss; what is not given comes from the preset."""

    method: Method = "ard"
    """natural: no attack; sat, trades, bat: adversarial training; the others distil a robust teacher."""
    rule: Rule = "fair"
    """Rule that reweighs the classes: none, Fair-ARD's least PGD steps (fair), or another paper's."""
    preset: Literal["paper", "released"] = "paper"
    """Settings and schedule of the method's paper, or of its authors' code."""
    eps: float | None = None
    """Radius of the L-infinity ball, in units of [0, 1] pixels; None: 0.1 for digits, else the preset's.
    The final attacks then have 8/255. Papers: epsilon."""
    step_size: float | None = None
    """Step of the training attack, same units; None: a quarter of --eps, else the preset's. Papers: alpha."""
    attack_steps: int | None = None
    """Steps of the training attack; None: the preset's. Papers: K."""
    clip: tuple[float, float] | None = (5 / 6, 5 / 2)
    """Limits of the fair rule's weights, whose mean is 1; by default those of Fair-ARD's code.
    None is the paper's letter: a class that is always fooled takes all of the weight."""
    settings: dict[str, Value] = field(default_factory=dict)
    """Other fields of the method, by name and value, such as: temperature 5 alpha 0.9"""
    rule_settings: dict[str, Value] = field(default_factory=dict)
    """Other fields of the rule, by name and value, such as: beta 1.0"""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Student and teachers."""

    student: str | None = None
    """A name that ferdlib.models.build_model knows; None: small_cnn_16 for digits, else resnet18."""
    teacher: Path | None = None
    """Checkpoint of the robust teacher; None trains one in place, for digits and --smoke only."""
    natural_teacher: Path | None = None
    """Checkpoint of MTARD's natural teacher; None as for --teacher."""
    teacher_architecture: str | None = None
    """Architecture of the teachers, where their files do not say it and where they are trained in place."""


@dataclass(frozen=True, kw_only=True)
class SGDOptions:
    """Stochastic gradient descent; what is not given comes from the preset."""

    epochs: int | None = None
    """Passes over the training images, with which all dates of the preset move; None: 40 for digits."""
    batch_size: int | None = None
    """Images per step; None: 100 for digits."""
    lr: float | None = None
    """Initial rate, or the largest of onecycle, no unit. Papers: eta."""
    weight_decay: float | None = None
    """L2 coefficient, no unit."""
    nesterov: bool | None = None
    """Nesterov momentum."""
    schedule: Literal["preset", "cosine", "onecycle"] = "preset"
    """Course of the rate: the preset's drops to a tenth, a cosine to 0, or up and down."""
    augment: Literal["auto", "crop_flip", "crop", "none"] = "auto"
    """auto: crop and flip; crop alone where mirrored images differ (svhn); nothing for digits."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the models under autocast; losses stay in float32."""


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """The weights that are kept."""

    val_images: int | None = None
    """Training images held out, with the classes' own shares; None: 257 for digits, else 1000."""
    select: Literal["best", "last"] = "best"
    """Epoch that is kept: the best sum of average and worst class under PGD-10 on held-out images, or the last."""
    average: Literal["auto", "none", "ema", "fair"] = "auto"
    """Average of the weights that is kept instead: ema over steps (decay 0.98), or CFA's over the epochs with
    20 % in the worst class of the images held out (fair). auto: fair for the rule cfa, else none."""
    measure: Literal["test", "val"] = "test"
    """Images of the final table: the test images, or to choose settings those held out."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train or distil a robust model with labelled images, and attack it class by class."""

    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    models: ModelOptions = field(default_factory=ModelOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    sgd: SGDOptions = field(default_factory=SGDOptions)
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    test: TestOptions = field(default_factory=TestOptions)
    run: RunOptions = field(default_factory=lambda: RunOptions(out=Path("runs/train")))
    smoke: bool = False
    """Two epochs of tiny models and short attacks, wherever nothing else is given."""


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Distil a robust student from a teacher without data (FERD), and attack both class by class."""

    ferd: FERDConfig
    teacher: Path | None = None
    """Checkpoint of the robust teacher, or a name of RobustBench: Chen2024Data_WRN_34_10 is the paper's f^T.
    A name is looked for under models/, where RobustBench puts it; --download lets it."""
    teacher_architecture: str | None = None
    """Architecture of the teacher, such as wide_resnet_34_10; not needed if the file or its name says it."""
    teacher_mean: tuple[float, float, float] | None = None
    """Mean of the channels that the teacher's inputs are normalised with, in units of [0, 1] pixels."""
    teacher_std: tuple[float, float, float] | None = None
    """Standard deviation of the same, same units."""
    student: str = "resnet18"
    """A name that ferdlib.models.build_model knows, such as mobilenet_v2. Paper: f^S."""
    preset: Literal["default", "paper", "released"] = "default"
    """Source of FERD's options that are not given: ferdlib, the paper's text to the letter, or its release."""
    channels_last: bool = False
    """Memory format of the models; faster on recent GPUs."""
    images: ImageOptions = field(default_factory=lambda: ImageOptions(data="cifar10"))
    test: TestOptions = field(default_factory=TestOptions)
    run: RunOptions = field(default_factory=lambda: RunOptions(out=Path("runs/distill")))
    smoke: bool = False
    """Two epochs of tiny sizes on generated images, with a tiny teacher unless one is given."""


def distill_defaults(argv: Sequence[str]) -> Distill:
    """Defaults of `ferdlib distill`, which its preset, its data and --smoke decide."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="default")
    early.add_argument("--data", default="cifar10")
    early.add_argument("--smoke", action="store_true")
    given, _ = early.parse_known_args(argv)
    # A wrong choice keeps the usual defaults; the real parser refuses it.
    data: Any = given.data if given.data in SHAPES else "cifar10"
    data = "generated" if given.smoke else data
    presets = {"paper": FERDConfig.paper, "released": FERDConfig.released}
    classes, shape = SHAPES[data]
    sizes = SMOKE if given.smoke else {}
    preset: Any = presets.get(given.preset, FERDConfig)
    return Distill(
        ferd=preset(num_classes=classes, layer="", image_shape=shape, **sizes),
        student="small_cnn_8" if given.smoke else "resnet18",
        images=ImageOptions(data=data),
        smoke=given.smoke,
    )


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """The model."""

    checkpoint: Path | None = None
    """File with the weights of an architecture of ferdlib.models, or of RobustBench under its name there."""
    architecture: str | None = None
    """A name that ferdlib.models.build_model knows; not needed if the file or its name says it."""
    factory: str | None = None
    """Instead of --checkpoint: package.module:function, imported from the current directory or the path and
    called without arguments for the model, from images in [0, 1] to logits."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel that the model's inputs are normalised with, in units of [0, 1] pixels."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the same, same units."""


@dataclass(frozen=True, kw_only=True)
class AnyImageOptions:
    """The images."""

    data: str = "cifar10"
    """One that ferdlib train knows, or a class of torchvision.datasets by its name, such as MNIST or GTSRB."""
    root: Path = Path("data")
    """Folder of the data."""
    download: bool = False
    """Fetch the data if they are not there."""
    split: str = "test"
    """Part of a data set of torchvision that has a choice; ImageNet's is val."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels, to which images of torchvision's data sets are resized; None leaves them."""
    num_classes: int | None = None
    """Number of classes, for data that do not say it, such as GTSRB."""


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions:
    """The attacks."""

    protocol: str = "fair-ard"
    """A published one: fair-ard, ferd, trades, robustbench or quick."""
    eps: float | None = None
    """Radius of the L-infinity ball, in units of [0, 1] pixels, steps in proportion. Papers: epsilon."""
    without: tuple[str, ...] = ()
    """Attacks of the protocol to leave out, such as AutoAttack."""
    survivors: bool = False
    """Run AutoAttack only on what withstood the attacks before it: its column is then the worst case."""
    sweep: tuple[float, ...] = ()
    """Radii, same units as --eps, for a table and a figure of PGD-20 over the radius."""
    trust: bool = False
    """Look for signs of masked gradients, too, on a few hundred of the images."""
    batch_size: int = 128
    """Images at a time; AutoAttack's are the protocol's."""
    fast: bool = False
    """Attack a copy of the model that is faster and the same but for rounding."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a model class by class under a published protocol: tables, figures, a report to compare with."""

    source: SourceOptions = field(default_factory=SourceOptions)
    images: AnyImageOptions = field(default_factory=AnyImageOptions)
    attacks: ProtocolOptions = field(default_factory=ProtocolOptions)
    test_images: int | None = None
    """Number of test images, with equal shares of the classes; None takes all."""
    against: Path | None = None
    """A report.json of the same classes to compare with, and to test the difference on the same images."""
    figure_attack: str | None = None
    """Column whose confusion matrix is drawn: an attack, clean, or "worst case"; None takes the last attack."""
    seed: int = 0
    """Seed of the noise, of the choice of --test-images and of the digits' split."""
    device: str = "auto"
    """Device of the model; auto is CUDA where there is one."""
    resume: bool = False
    """Keep finished parts under OUT/parts, and continue from those that are there."""
    out: Path = Path("runs/evaluate")
    """Folder of report.json, .md, .tex and .csv, classwise.png, confusion.png, survival.png and sweep.png."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a student as ONNX and torch.export files, check them, time them, and attack them again."""

    student: Path
    """Checkpoint with the weights, such as a student.pt of the other commands."""
    architecture: str | None = None
    """A name that ferdlib.models.build_model knows, such as resnet18; not needed if the file says it."""
    images: ImageOptions = field(default_factory=lambda: ImageOptions(data="cifar10"))
    test_images: int = 500
    """Number of test images that are attacked, with equal shares of the classes."""
    eps: float = 8 / 255
    """Radius of the L-infinity ball, in units of [0, 1] pixels. Papers: epsilon."""
    step_size: float = 2 / 255
    """Step of PGD-20, same units. Papers: alpha."""
    threads: int = 1
    """CPU threads of PyTorch and onnxruntime while latency is measured."""
    seed: int = 0
    """Seed of the choice of images, of the attack's start and of the digits' split."""
    out: Path = Path("runs/export")
    """Folder of student.onnx, student.pt2 and export.json."""


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Train a robust teacher on digits, distil a student from it without data, attack both."""

    teacher_epochs: int = 30
    """Epochs of the teacher's adversarial training."""
    epochs: int = 30
    """Epochs of the distillation, three of them warm-up."""
    ablate: bool = False
    """Distil more students: all three parts of FERD, and without one, two or all of them."""
    test: TestOptions = field(default_factory=TestOptions)
    run: RunOptions = field(default_factory=lambda: RunOptions(out=Path("runs/quickstart")))


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Train students on digits with many methods from the same teachers, and compare them over seeds."""

    methods: tuple[str, ...] = (
        *("sat", "trades", "ard", "rslad", "iad", "mtard"),
        *("fair-ard", "fair-iad", "fair-rslad", "fair-mtard"),
    )
    """Rows of the table: a method, or a rule and a method."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the split, the weights and all noise; each trains its own teachers."""
    preset: Literal["paper", "released"] = "paper"
    """Settings and schedules of the papers, or of their authors' codes."""
    eps: float = 0.2
    """Radius of the L-infinity ball, in units of [0, 1] pixels; steps are a quarter of it. Papers: epsilon.
    At 0.2 the plain students lose a class, as in the papers; at 0.1 they hardly do (chosen on held-out digits)."""
    epochs: int = 80
    """Epochs of the students; all dates of the papers' schedules move in proportion."""
    teacher_epochs: int = 40
    """Epochs of the teachers, which are trained at 1.4 times --eps."""
    student: str = "small_cnn_16"
    """Architecture of the students."""
    teacher: str = "small_cnn_40"
    """Architecture of the teachers."""
    clip: tuple[float, float] | None = (5 / 6, 5 / 2)
    """Limits of the fair rule's weights, whose mean is 1; None is the paper's letter."""
    select: Literal["best", "last"] = "best"
    """Epoch that is kept: the best under PGD-10 on the 257 held-out digits, or the last."""
    measure: Literal["test", "val"] = "test"
    """Digits of the table: the test digits, or to choose settings those held out."""
    out: Path = Path("runs/reproduce")
    """Folder of each training, and of table.md and classwise.png."""
