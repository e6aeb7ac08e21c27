"""`ferdlib train`: a robust model with any method and rule of `ferdlib.methods`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ferdlib.checkpoints import digest
from ferdlib.distributed import Ranks, join
from ferdlib.evaluation import PROTOCOLS, Protocol
from ferdlib.methods import build_method, recipe
from ferdlib.models import build_model
from ferdlib.recipes.data import Images, chosen, hold_out, load_train_test
from ferdlib.recipes.evaluate import check_folder, classwise, measure, save_figures
from ferdlib.recipes.models import check_model, read_model, write_model
from ferdlib.recipes.options import ModelOptions, ObjectiveOptions, Train
from ferdlib.recipes.running import Session, check_ball, command, device, flag, settings_of, written
from ferdlib.recipes.training import Training

# Options that are not given and that the method's recipe does not say.
IMAGES: dict[str, Any] = {"student": "resnet18", "val_images": 1000}
DIGITS: dict[str, Any] = {"student": "small_cnn_16", "val_images": 257, "eps": 0.1}
DIGITS |= {"epochs": 40, "batch_size": 100}
SMOKE: dict[str, Any] = {"student": "small_cnn_4", "epochs": 2, "attack_steps": 3}
SMOKE |= {"test_images": 40}
# A few images of noise.
GENERATED: dict[str, Any] = {"val_images": 20, "batch_size": 20}
# Teachers that are trained in place. One of a thousand images overfits: trained at a larger radius it is more
# robust at the smaller one, and an average of its weights is better.
TEACHER_RADIUS = 1.4
TEACHERS = ("teacher", "natural_teacher")
DISTILLED = ("ard", "iad", "rslad", "mtard", "adaad", "absld")
# Fields of the methods that have options of their own.
RESERVED = {"eps", "step_size", "steps", "rng", "num_classes", "rule"}


def run(args: Train) -> None:
    """Train the teachers that are missing, then the student, and attack it on the test images."""
    args = resolved(replace(args, run=replace(args.run, device=join(device(args.run.device)))))
    training, tested, untrained = prepare(args)
    names, out, first = training.val.class_names, args.run.out, Ranks.here().first
    with Session(args.run) as session:
        for name, each in {**untrained, "student": training}.items():
            model = fit(each, session, name)
            if first:
                architecture = str(each.args.models.student)
                path = out / f"{name}.pt"
                with session.results():
                    write_model(model, path, architecture=architecture, **training.val.sizes)
    attacks = protocol("fair-ard", args)
    attacks = attacks if args.test.autoattack else attacks.without("AutoAttack")
    report = measure(training.student, tested, attacks, names, progress=first)
    if not first:
        return
    kept = f"epoch {training.best['epoch']} of {args.sgd.epochs}"
    title = f"{name_of(args)}, {args.objective.preset}, {args.models.student}, {kept}"
    print(f"\n{title}:\n{report}\n")
    with session.results():
        report.save(out / "report.json")
        drawn = save_figures(out, {"classwise": classwise(report)})
    session.clear()
    models = ["student.pt", *(f"{name}.pt" for name in untrained)]
    print(written(out, *models, "report.json", *drawn))
    shown = {"checkpoint": out / "student.pt", "data": args.images.data, "root": args.images.root}
    again = command("evaluate", **shown, eps=args.objective.eps, seed=args.run.seed)
    print(f"evaluate it: {again}")


def name_of(args: Train) -> str:
    """Rule and method, such as "fair-ard"."""
    rule = "" if args.objective.rule == "none" else f"{args.objective.rule}-"
    return rule + args.objective.method


def known_name(args: Train) -> str:
    """Name that `ferdlib.methods` knows; natural training is adversarial training at radius 0."""
    return name_of(args).replace("natural", "sat")


def resolved(args: Train) -> Train:
    """Fill in the options that were not given, from the method's recipe, the data and --smoke."""
    known = asdict(recipe(known_name(args), args.objective.preset))
    known |= DIGITS if args.images.data == "digits" else IMAGES
    known |= GENERATED if args.images.data == "generated" else {}
    known |= SMOKE if args.smoke else {}
    if eps := args.objective.eps or known.get("eps"):
        known["step_size"] = eps / 4

    def filled(group: Any) -> Any:
        missing = [f.name for f in fields(group) if getattr(group, f.name) is None]
        return replace(group, **{name: known[name] for name in missing if name in known})

    groups = ("objective", "models", "sgd", "selection", "test")
    return replace(args, **{name: filled(getattr(args, name)) for name in groups})


def protocol(name: str, args: Train) -> Protocol:
    """A published protocol at --eps, or else at its own radius."""
    found = PROTOCOLS[name].with_seed(args.run.seed)
    return found if args.objective.eps is None else found.at(eps=args.objective.eps)


def prepare(args: Train) -> tuple[Training, Dataset[Any], dict[str, Training]]:
    """Find everything that can be wrong with the input, before anything is written.

    Returns:
        The student's training at its start, the images of the final table, and the trainings of teachers without
        a file, whose models the student's method holds.
    """
    seed, size, epochs = args.run.seed, args.sgd.batch_size or 0, args.sgd.epochs or 0
    check_ball(eps=args.objective.eps, step_size=args.objective.step_size)
    images, test = load_train_test(args.images, seed)
    train, val = hold_out(images, args.selection.val_images or 0, seed)
    if size % Ranks.here().size:
        raise ValueError(
            f"expected --batch-size to be a multiple of the {Ranks.here().size} processes, got {size}"
        )
    if not 1 <= size <= len(train):
        raise ValueError(
            f"expected --batch-size in 1..{len(train)}, the images that --val-images leaves, got {size}"
        )
    if epochs < 1:
        raise ValueError(f"expected --epochs of at least 1, got {epochs}")
    rate, decay = args.sgd.lr, args.sgd.weight_decay
    if not 0 < (1.0 if rate is None else rate) < math.inf:
        raise ValueError(f"expected --lr above 0, got {rate}")
    if not 0 <= (decay or 0.0) < math.inf:
        raise ValueError(f"expected --weight-decay of at least 0, got {decay}")
    protocol("quick", args)
    check_folder(args.run.out)
    measured = test if args.selection.measure == "test" else val
    tested = chosen(measured, args.test.test_images, seed)
    teachers, untrained = find_teachers(args, train, val)
    teachers |= {name: other.student for name, other in untrained.items()}
    begin(args, train, val, teachers).probe()
    return begin(args, train, val, teachers), tested, untrained


def wanted_teachers(method: str) -> tuple[str, ...]:
    """Teachers of a method."""
    return TEACHERS if method == "mtard" else TEACHERS[:1] if method in DISTILLED else ()


def find_teachers(
    args: Train, train: Images, val: Images
) -> tuple[dict[str, nn.Module], dict[str, Training]]:
    """Read the teachers that the method wants, or begin to train them in place."""
    teachers, untrained = {}, {}
    method, architecture = args.objective.method, args.models.teacher_architecture
    for name in TEACHERS:
        file, wanted = getattr(args.models, name), name in wanted_teachers(method)
        if file is not None and not wanted:
            raise ValueError(f"expected no {flag(name)} for {method}, got one")
        if file is not None:
            teachers[name] = read_model(file, architecture=architecture, **train.sizes)
            check_model(teachers[name], train.batch(slice(0, 2))[0], len(train.class_names))
        elif wanted and not (args.smoke or args.images.data == "digits"):
            other = "natural" if name == "natural_teacher" else "trades"
            raise ValueError(
                f"expected {flag(name)} FILE for {method}, got none; ferdlib train --method {other} --rule none "
                f"--data {args.images.data} makes one"
            )
        elif wanted:
            untrained[name] = begin(teacher_args(args, name), train, val, {})
    return teachers, untrained


def teacher_args(args: Train, name: str) -> Train:
    """Options of a teacher that is trained in place: adversarial training (Madry et al. 2018), or natural."""
    eps = TEACHER_RADIUS * (args.objective.eps or 8 / 255)
    robust: dict[str, Any] = {"method": "sat", "eps": eps, "step_size": eps / 4, "attack_steps": 7}
    architecture, epochs = ("small_cnn_8", 2) if args.smoke else ("small_cnn_40", 30)
    rates: dict[str, Any] = {"lr": 0.1, "weight_decay": 5e-4, "nesterov": True}
    return replace(
        args,
        objective=ObjectiveOptions(
            rule="none", **(robust if name == "teacher" else {"method": "natural"})
        ),
        models=ModelOptions(student=args.models.teacher_architecture or architecture),
        sgd=replace(args.sgd, epochs=epochs, schedule="onecycle", **rates),
        selection=replace(args.selection, select="last", average="ema"),
    )


def begin(args: Train, train: Images, val: Images, teachers: Mapping[str, nn.Module]) -> Training:
    """Build student and method; the method's dates move with the number of epochs."""
    ours = args.objective
    if taken := sorted(RESERVED & {*ours.settings, *ours.rule_settings}):
        raise ValueError(f"expected --settings without {', '.join(taken)}, which other options say")
    torch.manual_seed(args.run.seed)
    shared = torch.Generator().manual_seed(args.run.seed)
    own = shared if Ranks.here().size == 1 else torch.Generator()
    student = build_model(str(args.models.student), **train.sizes)
    for model in (student, *teachers.values()):
        # Convolutions are faster so.
        model.to(args.run.device).to(memory_format=torch.channels_last)
    ball = {"eps": ours.eps, "step_size": ours.step_size, "steps": ours.attack_steps}
    ball = {"eps": 0.0, "step_size": 0.0, "steps": 0} if ours.method == "natural" else ball
    settings: dict[str, Any] = {name: value for name, value in ball.items() if value is not None}
    paper = recipe(known_name(args), ours.preset)
    method: Any = build_method(
        known_name(args),
        train.sizes["num_classes"],
        preset=ours.preset,
        rng=own,
        **{**teachers, **settings, **ours.settings},
    )
    changes = {**ours.rule_settings, **({"clip": ours.clip} if ours.rule == "fair" else {})}
    if unknown := sorted(changes.keys() - {f.name for f in fields(method.rule) if f.init}):
        raise ValueError(
            f"expected --rule-settings of the rule {ours.rule!r}, got {', '.join(unknown)}"
        )
    method.rule = replace(method.rule, **changes)
    method.rule.bind(train.sizes["num_classes"])
    for part, own_settings in ((method, ours.settings), (method.rule, ours.rule_settings)):
        for name in {"begin", "rate_drops"} - own_settings.keys():
            dates = getattr(part, name, None)
            if isinstance(dates, int):
                part.begin = moved(dates, args, paper.epochs)
            elif dates is not None:
                part.rate_drops = tuple(moved(each, args, paper.epochs) for each in dates)
    milestones = tuple(moved(each, args, paper.epochs) for each in paper.milestones)
    return Training(args, train, val, method, student, teachers, milestones, shared, own)


def moved(epoch: int, args: Train, total: int) -> int:
    """Move a date of a recipe of `total` epochs with the number of epochs."""
    return max(1, round(epoch * (args.sgd.epochs or 0) / total))


def fit(training: Training, session: Session, name: str) -> nn.Module:
    """Continue a training or start it, and return the model with the weights that are kept."""
    digests = {teacher: digest(model) for teacher, model in training.teachers.items()}
    settings = settings_of(training.args) | digests
    # Another folder of images of the same sizes is another training.
    settings |= {"root": f"{training.images.digest()} {training.val.digest()}"}
    session.resume(training, name, settings)
    session.finish(
        training,
        name,
        settings,
        title=name_of(training.args) if name == "student" else name.replace("_", " "),
        epochs=training.train(),
        total=training.args.sgd.epochs or 0,
        figures=dict,
    )
    return training.selected()
