"""FERD's settings: every choice that its paper and its release leave open or make differently.

Needs no torch, so that a command line can build its options from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, get_args

from ferdlib import _arguments
from ferdlib._arguments import InvalidValue, public

Reweighting = Literal[
    "none",
    "margin_softmax",
    "margin_minmax",
    "lps_power",
    "lps_linear",
    "lps_sigmoid",
    "lps_tanh",
]

# A preset writes out every field that is tuned among the defaults, so that it does not move with them.
PAPER: dict[str, Any] = {
    "warmup_epochs": 0,
    "optimise_latents": False,
    "reset_generator": False,
    "conditional_generator": True,
    "adversarial_loss": "kl",
    "bn_loss_weight": 5.0,
    "uniformity_loss_weight": 5.0,
    "bn_models": "both",
    "bottleneck_reduction": "sum",
    "mask_threshold": "sample",
    "attack_model": "teacher",
    "gamma": 0.5,
    "random_start": None,
    "reweighting": "margin_softmax",
    "reweight_temperature": 1.0,
    "class_floor": 0.0,
    "margin_labels": "sampled",
    "margin_images": "stored",
    "margin_ema": 0.0,
    "absent_classes": "neutral",
    "augment": "none",
    "augment_synthesis": False,
}

RELEASED: dict[str, Any] = {
    "warmup_epochs": 20,
    "optimise_latents": True,
    "reset_generator": True,
    "conditional_generator": False,
    "adversarial_loss": "decoupled_kl",
    "bn_loss_weight": 5.0,
    "uniformity_loss_weight": 5.0,
    "bn_models": "teacher",
    "bottleneck_reduction": "mean",
    "mask_threshold": "batch",
    "attack_model": "student",
    "gamma": 0.0,
    "random_start": "normal",
    "reweighting": "margin_minmax",
    "class_floor": 0.0,
    "margin_labels": "sampled",
    "margin_images": "last",
    "margin_ema": 0.0,
    "absent_classes": "zero",
    "augment": "crop_flip",
    "augment_synthesis": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FERDConfig:
    """FERD's settings, each with its symbol and its place in the paper.

    `FERDConfig.paper()` is the text to the letter, `FERDConfig.released()` what the public code computes
    (its crashes excepted). The defaults are the readings that did best where they were measured
    (docs/results.md), at the paper's CIFAR-10 sizes.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range, or fields that contradict each other.

    Example:
        >>> FERDConfig(num_classes=10, layer="layer4").epochs
        220
        >>> FERDConfig.paper(num_classes=10, layer="layer4").attack_model
        'teacher'
    """

    num_classes: int
    """K, the number of classes. Paper: C."""
    layer: str | None = None
    """The teacher's layer that the bottleneck reads, see `bottleneck.split_at`; needed for FERD's own source, and
    by no other. Paper: l, section 5.1, Table 9."""
    image_shape: tuple[int, int, int] = (3, 32, 32)
    """(C, H, W) of the synthetic images in pixels; H and W divisible by 4. Paper: 3x32x32, 3x64x64."""
    epochs: int = 220
    """All epochs, warm-up included. Paper: T, section 5.1 and Fig. 8."""
    warmup_epochs: int = 20
    """First epochs that only fill the pool. Not in the paper; the release's 220 are 20 + 200."""
    batch_size: int = 256
    """Images of a synthetic batch and of a student step. Paper: section 5.1 (512 for more classes)."""

    generator_steps: int = 200
    """Generator steps per epoch. Paper: T_g."""
    generator_lr: float = 2e-3
    """Adam's rate for the generator, betas (0.5, 0.999). Paper: eta_g."""
    generator_width: int = 64
    """Channels before the generator's last convolution. Release: ngf = 64."""
    latent_dim: int = 100
    """Size of a latent code. Release: nz."""
    latent_lr: float = 0.015
    """Adam's rate for the latent codes. Release: lr_z."""
    optimise_latents: bool = True
    """Train the codes along with the generator. Paper: Algorithm 1 trains theta_g only."""
    reset_generator: bool = False
    """Start each epoch from fresh generator weights. Paper: initialised once, Algorithm 1; release: True."""
    conditional_generator: bool = False
    """Feed the labels to the generator. Paper: g(z, y) in Algorithm 1; the release's is g(z)."""
    selection: Literal["batch", "sample", "last"] = "batch"
    """The images of an epoch that are stored, see `synthesis.Inversion`. Paper: select, undefined."""
    label_sampling: Literal["multinomial", "stratified"] = "multinomial"
    """Method of drawing labels from p. Paper: y ~ p."""

    adv_loss_weight: float = 1.0
    """Weight of L_adv. Paper: lambda_adv, Eq. 9."""
    bn_loss_weight: float = 5.0
    """Weight of L_bn. Paper: lambda_bn, Eq. 9."""
    onehot_loss_weight: float = 1.0
    """Weight of L_oh. Paper: lambda_oh, Eq. 9."""
    uniformity_loss_weight: float = 0.0
    """Weight of L_uni; 0 is no fairness-aware examples. Paper and release: lambda_uni = 5, Eq. 9."""
    adversarial_loss: Literal["kl", "masked_kl", "decoupled_kl"] = "kl"
    """Divergence of student and teacher that L_adv grows. Paper: KL(f^T, f^S), Eq. 8; release: decoupled KL."""
    adversarial_warmup: bool = True
    """Let L_adv count in warm-up, against an untrained student. Release: yes; Fast: no."""
    bn_models: Literal["teacher", "both"] = "teacher"
    """Models whose BatchNorm statistics L_bn reads. Paper: teacher and student; release: teacher."""

    bottleneck_beta: float = 0.3
    """Weight of the noise regulariser. Paper: beta, Eq. 5, no value given; Kim et al. and release: 0.3."""
    bottleneck_steps: int = 50
    """Adam steps on the noise scales. Not in the paper; Kim et al.: 200."""
    bottleneck_lr: float = 0.1
    """Adam's rate for them. Not in the paper."""
    bottleneck_noise: Literal["channel", "element"] = "channel"
    """One noise draw per channel or per element. Paper: epsilon ~ N(0, I), Eq. 4."""
    bottleneck_reduction: Literal["mean", "sum"] = "mean"
    """The regulariser over channels. Paper: the sum, Eq. 5; release: half the mean."""
    mask_threshold: Literal["sample", "batch", "channel"] = "channel"
    """The limit of Eq. 6, see `bottleneck.nonrobust_channels`. Paper: sample; release: batch."""

    student_steps: int = 400
    """Student steps per epoch. Paper: T_s."""
    student_lr: float = 0.1
    """SGD's initial rate. Paper: eta_s. The release's comments use 0.2 for CIFAR-100."""
    momentum: float = 0.9
    """SGD's momentum. Paper: section 5.1."""
    weight_decay: float = 5e-4
    """SGD's weight decay. Paper: section 5.1."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """The student's rate over epochs; cosine ends at 0. Paper: only "initial value"; release: cosine."""
    schedule_warmup: bool = True
    """Let the cosine run through the warm-up epochs too. Release: yes; Fast: no."""
    clean_weight: float = 5 / 6
    """Weight of the clean term. Paper: lambda_1, Eq. 11; RSLAD's is 1/6."""
    adv_weight: float = 1 / 6
    """Weight of the adversarial term. Paper: lambda_2, Eq. 11; RSLAD's is 5/6."""

    attack_model: Literal["student", "teacher"] = "student"
    """Model that is attacked for the student's examples. Paper: f^T, Eq. 10; release: the student."""
    gamma: float = 0.5
    """Weight of the uniform target. Paper: gamma, Eq. 10; the release computes 0."""
    eps: float = 8 / 255
    """Radius, in units of [0, 1] pixels. Paper: no value; release: 8/255."""
    step_size: float = 2 / 255
    """Step of the attacks, same units. Paper: alpha, Eq. 10, no value (A.8 gives the compared methods 2/255);
    release: 2/255."""
    attack_steps: int = 10
    """Steps of the training attack. Paper: no value (A.8 gives the compared methods 10); release: 10."""
    random_start: Literal["uniform", "normal"] | None = "normal"
    """Start of the training attack, see `attacks.pgd`. Paper: x itself; release: 0.001 N(0, 1)."""

    reweighting: Reweighting = "margin_softmax"
    """Class statistic to class probabilities, see `reweight`. Paper: softmax of -margin; A.6 has the lps_*."""
    reweight_temperature: float = 1.0
    """Temperature of margin_softmax. Paper: none."""
    class_floor: float | None = None
    """Least probability of a class under margin_softmax; None is 0.5 / K. Paper: 0."""
    margin_labels: Literal["sampled", "teacher"] = "teacher"
    """Label of the margin: the one that was drawn, or the class that the teacher sees. Paper: y_i."""
    margin_on: Literal["logits", "probabilities"] = "logits"
    """Scale of the margin, which Eq. 1 calls confidence. Release: logits."""
    margin_images: Literal["stored", "last"] = "stored"
    """The stored batch, or the last augmented iterate (release)."""
    margin_attack_steps: int = 20
    """Steps of the PGD attack on the teacher, from a uniform start. Paper: PGD-20, section 4.2."""
    margin_ema: float = 0.9
    """Share of the last epoch's class statistic that is kept. Paper: none, so p follows a single batch."""
    absent_classes: Literal["previous", "neutral", "zero"] = "previous"
    """A class without samples keeps its last statistic, takes the mean of the others, or 0 (release)."""

    augment: Literal["crop_flip", "crop", "none"] = "crop_flip"
    """Augmentation of the student's batches. Not in the paper; release: crop and flip."""
    augment_synthesis: bool = True
    """The same augmentation before the generator's losses. Not in the paper; release: yes."""
    crop_padding: int = 4
    """Zeros around an image before it is cropped, in pixels. Release: 4."""
    pool_capacity: int | None = None
    """Most images to keep; None keeps all. Paper: D grows."""
    pool_dtype: Literal["float32", "uint8"] = "float32"
    """Type of the images in memory; uint8 rounds to 1/255. Release: float32."""
    cache_teacher_logits: Literal["images", "none"] = "images"
    """Compute the teacher's logits once per stored "images", where nothing augments them. Paper: every time."""
    cache_teacher_utae: Literal["exact", "none"] = "exact"
    """Attack the teacher once per stored image, where that is exact: no augmentation, no random start.
    Paper: every time."""
    fold_batchnorm: bool = True
    """Attack copies of teacher and student with BatchNorm folded; logits differ by about 1e-6. Paper: no."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the models under autocast; losses stay in float32. Release: float32."""

    @public
    def __post_init__(self) -> None:
        _arguments.settle(self)
        named = partial(_arguments.named, self)
        choice = _arguments.choice
        _arguments.integer(2, num_classes=self.num_classes)
        _arguments.integer(1, **named("epochs", "batch_size", "generator_steps", "generator_width"))
        _arguments.integer(1, **named("latent_dim", "margin_attack_steps"))
        _arguments.integer(0, **named("warmup_epochs", "bottleneck_steps", "student_steps"))
        _arguments.integer(0, **named("attack_steps", "crop_padding"))
        _arguments.positive(**named("generator_lr", "latent_lr", "bottleneck_lr", "student_lr"))
        _arguments.divisor(reweight_temperature=self.reweight_temperature)
        _arguments.real(0, **named("adv_loss_weight", "bn_loss_weight", "onehot_loss_weight"))
        _arguments.real(0, **named("uniformity_loss_weight", "clean_weight", "adv_weight"))
        _arguments.real(0, **named("bottleneck_beta", "weight_decay", "gamma", "eps", "step_size"))
        _arguments.real(0, 1, **named("momentum", "margin_ema"))
        _arguments.instance(bool, **named("optimise_latents", "reset_generator", "fold_batchnorm"))
        _arguments.instance(bool, **named("conditional_generator", "adversarial_warmup"))
        _arguments.instance(bool, **named("schedule_warmup", "augment_synthesis"))
        choice(("batch", "sample", "last"), selection=self.selection)
        choice(("multinomial", "stratified"), label_sampling=self.label_sampling)
        choice(("kl", "masked_kl", "decoupled_kl"), adversarial_loss=self.adversarial_loss)
        choice(("teacher", "both"), bn_models=self.bn_models)
        choice(("channel", "element"), bottleneck_noise=self.bottleneck_noise)
        choice(("mean", "sum"), bottleneck_reduction=self.bottleneck_reduction)
        choice(("sample", "batch", "channel"), mask_threshold=self.mask_threshold)
        choice(("cosine", "constant"), schedule=self.schedule)
        choice(("student", "teacher"), attack_model=self.attack_model)
        choice(("uniform", "normal", None), random_start=self.random_start)
        choice(get_args(Reweighting), reweighting=self.reweighting)
        choice(("sampled", "teacher"), margin_labels=self.margin_labels)
        choice(("logits", "probabilities"), margin_on=self.margin_on)
        choice(("stored", "last"), margin_images=self.margin_images)
        choice(("previous", "neutral", "zero"), absent_classes=self.absent_classes)
        choice(("crop_flip", "crop", "none"), augment=self.augment)
        choice(("float32", "uint8"), pool_dtype=self.pool_dtype)
        choice(("images", "none"), cache_teacher_logits=self.cache_teacher_logits)
        choice(("exact", "none"), cache_teacher_utae=self.cache_teacher_utae)
        choice(("float32", "bfloat16"), precision=self.precision)
        if self.layer is not None:
            _arguments.instance(str, layer=self.layer)
        if self.pool_capacity is not None:
            _arguments.integer(1, pool_capacity=self.pool_capacity)
        self._check_shape()
        self._check_together()

    def _check_shape(self) -> None:
        shape = self.image_shape
        sides = shape if isinstance(shape, tuple) and len(shape) == 3 else (0, 0, 0)
        if not all(isinstance(s, int) and s > 0 for s in sides) or sides[1] % 4 or sides[2] % 4:
            raise InvalidValue(
                f"expected `image_shape` (C, H, W) of positive integers, H and W divisible by 4, got {shape!r}"
            )

    def _check_together(self) -> None:
        """Refuse values that contradict each other."""
        if self.warmup_epochs >= self.epochs:
            raise InvalidValue(
                f"expected `warmup_epochs` below `epochs` {self.epochs}, got {self.warmup_epochs}"
            )
        if self.margin_ema == 1:
            raise InvalidValue("expected `margin_ema` below 1, got 1: nothing would be learnt")
        floor = self.class_floor
        if floor is None:
            return
        _arguments.real(0, class_floor=floor)
        if floor >= 1 / self.num_classes:
            raise InvalidValue(
                f"expected `class_floor` below 1 / num_classes = {1 / self.num_classes:g}, got {floor:g}"
            )
        if floor and self.reweighting != "margin_softmax":
            raise InvalidValue(
                f"expected `class_floor` with reweighting 'margin_softmax' only, got {floor:g} with "
                f"{self.reweighting!r}"
            )

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the paper's text to the letter; keyword arguments replace single fields."""
        return cls(**(PAPER | overrides))

    @classmethod
    def released(cls, **overrides: Any) -> Self:
        """Return the settings of the authors' public code; keyword arguments replace single fields."""
        return cls(**(RELEASED | overrides))
