"""What `ard.py` trains: options that were not given, data, teachers, and a run at its start or continued."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ferdlib import methods
from ferdlib.evaluation import PROTOCOLS
from ferdlib.methods import METHODS, MTARD, Adversarial, Distilled, Fair, FairAverage, recipe
from ferdlib.models import build_model
from ferdlib.trainer import Checkpoints
from image_data import Images, chosen, load_splits, stratified
from long_run import FREE, check, check_options, found
from model_sources import check_model, read_model
from processes import count

if TYPE_CHECKING:
    from ard import Args

# What the options are that are not given and that the method's recipe does not say.
IMAGES: dict[str, Any] = {"student": "resnet18", "teacher_epochs": 100, "val_images": 1000}
DIGITS: dict[str, Any] = {"student": "small_cnn_16", "epochs": 40, "teacher_epochs": 40}
DIGITS |= {"batch_size": 100, "val_images": 257, "eps": 0.1}
SMOKE: dict[str, Any] = {"student": "small_cnn_4", "epochs": 2, "teacher_epochs": 2}
SMOKE |= {"attack_steps": 3, "test_images": 100}
DIGITS_TEACHER, SMOKE_TEACHER = "small_cnn_40", "small_cnn_8"
# A teacher of a thousand images overfits: trained at a larger radius it is more robust at the smaller one.
DIGITS_TEACHER_RADIUS = 1.4
# Fields of the methods that have options of their own, or that are set here.
RESERVED = {"eps", "step_size", "steps", "beta", "clip", "rng", "num_classes"}


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is looked at meanwhile."""

    train: Images
    val: Images

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "num_classes": len(self.train.class_names),
            "in_channels": self.train.pixels.shape[1],
        }


@dataclass
class Run:
    """All that the next step depends on, beside the data; `best` is the epoch that is kept.

    Of the epoch that is under way, `left` are the images to come and `total` is the sum of the losses. `rng`
    orders the images, `noise` is for all else: the same generator, but one for each of several processes.
    """

    args: Args
    method: Adversarial
    student: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    rng: torch.Generator
    noise: torch.Generator
    average: FairAverage | None
    epoch: int = 0
    best: dict[str, Any] = field(default_factory=lambda: {"figure": -1.0})
    left: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def _parts(self) -> dict[str, Any]:
        names = ("method", "student", "optimizer", "schedule", "average")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def state_dict(self) -> dict[str, Any]:
        states = {name: part.state_dict() for name, part in self._parts().items()}
        own = {"rng": self.rng.get_state(), "epoch": self.epoch, "best": self.best}
        return {**states, **own, "left": self.left.clone(), "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.rng.set_state(state["rng"])
        self.epoch, self.best = state["epoch"], state["best"]
        self.left, self.total = state["left"], state["total"].to(self.args.device)


@dataclass(frozen=True)
class Work:
    """What the options ask for, checked; some teachers may have to be trained first."""

    data: Data
    tested: Dataset[Any]
    teachers: dict[str, nn.Module]
    untrained: dict[str, Run]


def resolved(args: Args) -> Args:
    """With the options that were not given, from the method's recipe, the data and --smoke."""
    known = asdict(recipe(args.method, args.preset))
    known |= DIGITS if args.data == "digits" else IMAGES
    known |= SMOKE if args.smoke else {}
    eps = known.get("eps") if args.eps is None else args.eps
    if eps is not None:
        factor = DIGITS_TEACHER_RADIUS if args.data == "digits" else 1.0
        known |= {"eps": eps, "step_size": eps / 4, "teacher_eps": factor * eps}
    return replace(args, **{name: known[name] for name in known if getattr(args, name, 0) is None})


def begin(args: Args, data: Data, teachers: Mapping[str, nn.Module]) -> Run:
    """A student at its start; dates of the recipe and of the method move with the number of epochs."""
    paper, kind = recipe(args.method, args.preset), METHODS[args.method]
    if taken := sorted(RESERVED & args.settings.keys()):
        raise ValueError(f"expected --settings without {', '.join(taken)}, which other options say")

    def moved(epoch: int) -> int:
        return max(1, round(epoch * args.epochs / paper.epochs))

    given = {"eps": args.eps, "step_size": args.step_size}
    given |= {"steps": args.attack_steps, "beta": args.beta}
    settings = {name: value for name, value in given.items() if value is not None}
    if issubclass(kind, Fair):
        settings["clip"] = args.clip
    if hasattr(kind, "begin"):
        settings["begin"] = moved(kind.begin)
    if hasattr(kind, "rate_drops"):
        settings["rate_drops"] = tuple(map(moved, kind.rate_drops))

    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    noise = rng if count() == 1 else torch.Generator()
    student = build_model(args.student, **data.sizes)
    for model in (student, *teachers.values()):
        model.to(args.device, memory_format=torch.channels_last)  # faster convolutions
    method = methods.create(
        args.method,
        data.sizes["num_classes"],
        preset=args.preset,
        rng=noise,
        **teachers,
        **(settings | args.settings),
    )
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=args.lr,
        momentum=paper.momentum,
        weight_decay=args.weight_decay,
        nesterov=paper.nesterov,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [*map(moved, paper.milestones)])
    averaged = args.method == "cfa-ard" if args.fair_average is None else args.fair_average
    average = FairAverage(student) if averaged else None
    total = torch.zeros((), device=args.device)
    return Run(args, method, student, optimizer, schedule, rng, noise, average, total=total)


def teacher_args(args: Args, name: str) -> Args:
    """How a teacher is trained in place: adversarially, the natural one at radius 0."""
    usual = DIGITS_TEACHER if args.data == "digits" else args.student
    usual = SMOKE_TEACHER if args.smoke else usual
    changes: dict[str, Any] = {"student": args.teacher_architecture or usual}
    changes |= {"method": "sat", "preset": "paper", "epochs": args.teacher_epochs}
    changes |= {"eps": args.teacher_eps, "settings": {}, "fair_average": False}
    changes |= dict.fromkeys(("step_size", "beta", "lr", "weight_decay"))
    if name == "natural_teacher":
        changes |= {"eps": 0.0, "attack_steps": 0}
    return resolved(replace(args, **changes))


def prepare(args: Args) -> Work:
    """Everything that can be wrong with the input is found here, before anything is written."""
    check(args)
    images, test = load_splits(args.data, args.root, download=args.download)
    held_out = stratified(images, args.val_images, args.seed)
    kept = torch.ones(len(images), dtype=torch.bool)
    kept[held_out] = False
    data = Data(images.part(kept.nonzero().flatten()), images.part(held_out))
    if args.batch_size % count():
        raise ValueError(
            f"expected --batch-size to be a multiple of the {count()} processes, got {args.batch_size}"
        )
    if not 1 <= args.batch_size <= len(data.train):
        raise ValueError(
            f"expected --batch-size in 1..{len(data.train)}, the images that --val-images leaves, got "
            f"{args.batch_size}"
        )
    if min(args.epochs, args.teacher_epochs) < 1:
        raise ValueError("expected --epochs and --teacher-epochs of at least 1, got less")
    protocol = PROTOCOLS["quick"].with_seed(args.seed)
    if args.eps is not None:
        protocol.at(eps=args.eps)  # refuses a radius of 0
    tested = chosen(test, args.test_images, args.seed)
    teachers, untrained = find_teachers(args, data)
    run = begin(args, data, teachers | {name: other.student for name, other in untrained.items()})
    probe(run, data)
    resume(run, "student", digests(teachers))
    return Work(data, tested, teachers, untrained)


def probe(run: Run, data: Data) -> None:
    """Two images and the end of an epoch, which complain of settings and teachers that do not fit."""
    x, y = data.train.batch(slice(0, 2), run.args.device)
    run.method.loss(run.student, x, run.method.attack(run.student, x, y), y)
    if hasattr(run.method, "validate"):
        run.method.validate(run.student, [(x, y)])
    run.method.end_epoch()


def find_teachers(args: Args, data: Data) -> tuple[dict[str, nn.Module], dict[str, Run]]:
    """Those that the method wants: read, or to be trained, or trained to the end or a part of it."""
    teachers, untrained = {}, {}
    kind = METHODS[args.method]
    wanted = {"teacher": issubclass(kind, Distilled), "natural_teacher": issubclass(kind, MTARD)}
    for name, is_wanted in wanted.items():
        given = getattr(args, name)
        if given is not None and not is_wanted:
            raise ValueError(f"expected no --{name.replace('_', '-')} for {args.method}, got one")
        if given is not None:
            architecture = args.teacher_architecture
            teachers[name] = read_model(given, architecture=architecture, **data.sizes)
            check_model(teachers[name], data.train.batch(slice(0, 2))[0], data.sizes["num_classes"])
        elif is_wanted:
            untrained[name] = begin(teacher_args(args, name), data, {})
            resume(untrained[name], name, {})
    return teachers, untrained


def checkpoints(args: Args, name: str) -> Checkpoints:
    """Of the student, or of a teacher that is trained in place."""
    return Checkpoints(args.out / "checkpoints" / name, keep=args.keep_checkpoints)


def state_of(run: Run, teachers: Mapping[str, str]) -> dict[str, Any]:
    """All that `resume` needs; of the teachers, the `digests`."""
    return {"args": options(run.args), "teachers": dict(teachers), "run": run.state_dict()}


def resume(run: Run, name: str, teachers: Mapping[str, str]) -> None:
    """Continue a run from its newest checkpoint, if --resume says so and there is one.

    Raises:
        ValueError: a checkpoint that is damaged, or was made otherwise.
    """
    keys = {"args", "teachers", "run"}
    state = found(checkpoints(run.args, name), run.args.resume, keys)
    if state is not None:
        check_options(state["args"] | state["teachers"], options(run.args) | {**teachers})
        if count() > 1 and len(state["run"]["left"]) and state["run"]["total"]:
            raise ValueError(
                "expected a checkpoint between two epochs, from which several processes can go on, got one within "
                f"epoch {state['run']['epoch'] + 1}; finish that with one process"
            )
        run.load_state_dict(state["run"])


def options(args: Args) -> dict[str, Any]:
    """Those that the weights depend on, beside the teachers."""
    free = {"root", "download", "teacher", "natural_teacher", "teacher_architecture", "test_images"}
    free |= FREE | {"autoattack", "tensorboard", "device", "out"}
    return {name: value for name, value in asdict(args).items() if name not in free}


def digests(teachers: Mapping[str, nn.Module]) -> dict[str, str]:
    """What tells their weights from others."""
    found = {name: hashlib.sha256() for name in teachers}
    for name, model in teachers.items():
        for value in model.state_dict().values():
            found[name].update(value.cpu().numpy().tobytes())
    return {name: state.hexdigest() for name, state in found.items()}
