"""A teacher for robust distillation: adversarial training, TRADES, or plain training for a natural one.

    python examples/train_teacher.py --data cifar10 --root data --download --method trades
    python examples/train_teacher.py --data folder --root my-images --method sat --architecture preact_resnet18

Nothing is chosen on the test images: `--val-images` are held out of the training set for the progress
that is printed, and the last epoch is what is saved and tested. `teacher.pt` is what `cifar10_ferd.py --teacher`
takes. A run that was stopped or killed goes on with the same options and `--resume auto`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ferdlib import losses
from ferdlib.attacks import pgd, utae_pgd
from ferdlib.augment import crop_flip
from ferdlib.evaluation import PROTOCOLS, Protocol, evaluate
from ferdlib.models import build_model
from ferdlib.trainer import Checkpoints
from files import write_model
from image_data import AUGMENTATIONS, Images, Source, chosen, load_splits, stratified
from long_run import FREE, Options, Stop, check, check_options, clear, found, interruptible, saved
from processes import alone


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    """Train a robust (or natural) teacher and attack it, class by class."""

    data: Source = "cifar10"
    """Images: a torchvision data set, "folder" for root/train and root/test, or scikit-learn's digits."""
    root: Path = Path("data")
    """Folder of the data."""
    download: bool = False
    """Fetch the data if they are not there."""
    architecture: str = "resnet18"
    """A name that ferdlib.models.build_model knows, such as wide_resnet_34_10 (the papers' teacher)."""
    method: Literal["sat", "trades", "natural"] = "trades"
    """sat: cross-entropy on PGD examples (Madry); trades: plus a KL term (Zhang); natural: no attack."""
    beta: float = 6.0
    """Weight of TRADES' KL term, no unit. TRADES: beta = 1/lambda."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step."""
    lr: float = 0.1
    """Initial rate of SGD (momentum 0.9, Nesterov), no unit; a cosine takes it to 0. Papers: eta."""
    weight_decay: float = 5e-4
    """L2 coefficient, no unit."""
    eps: float = 8 / 255
    """Radius of the L-infinity ball, in units of [0, 1] pixels. Papers: epsilon."""
    step_size: float = 2 / 255
    """Step of the attack, same units. Papers: alpha."""
    attack_steps: int = 10
    """Steps of the training attack. Papers: K."""
    augment: Literal["auto", "crop_flip", "crop", "none"] = "auto"
    """auto: crop and flip; crop alone where mirrored images differ (svhn); nothing for digits."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the model under autocast; losses stay in float32."""
    channels_last: bool = False
    """Memory format of model and images; faster on recent GPUs."""
    val_images: int = 1000
    """Training images held out to watch, with equal shares of the classes."""
    test_images: int | None = None
    """Test images for the final table, with equal shares of the classes; None takes all."""
    autoattack: bool = False
    """Add AutoAttack to the final table: nearly a second per robust image and core on a CPU."""
    seed: int = 0
    """Of the split, the weights and all noise."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""
    out: Path = Path("runs/teacher")
    """Folder for checkpoints, teacher.pt and report.json."""


class Training:
    """The loop, and what it must remember: model, optimizer, epoch, random state."""

    def __init__(self, args: Args, images: Images) -> None:
        torch.manual_seed(args.seed)
        self.args, self.images = args, images
        self.model = build_model(
            args.architecture, len(images.class_names), in_channels=images.pixels.shape[1]
        ).to(args.device)
        if args.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.rng = torch.Generator().manual_seed(args.seed)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=args.lr,
            momentum=0.9,
            weight_decay=args.weight_decay,
            nesterov=True,
        )
        self.steps_per_epoch = len(images) // args.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"expected at least --batch-size {args.batch_size} training images, got {len(images)}"
            )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, args.epochs * self.steps_per_epoch
        )
        self.epoch = 0
        # Of the epoch that is under way: the images that are left, and the sum of the losses.
        self.left = torch.empty(0, dtype=torch.int64)
        self.total = torch.zeros((), device=args.device)

    def epochs(self, stop: Callable[[], bool] = lambda: False) -> Iterator[float]:
        """Train to the last epoch, or until `stop` says so between steps; yields each one's mean loss."""
        while self.epoch < self.args.epochs:
            loss = self._epoch(stop)
            if loss is None:
                return
            yield loss

    def _epoch(self, stop: Callable[[], bool]) -> float | None:
        size = self.args.batch_size
        if not len(self.left):
            order = torch.randperm(len(self.images), generator=self.rng)
            self.left = order[: size * self.steps_per_epoch]
            self.total.zero_()
        while len(self.left):
            if stop():
                return None
            index, self.left = self.left[:size], self.left[size:]
            loss = self._loss(*self.images.batch(index, self.args.device)).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.total += loss.detach()
        self.epoch += 1
        mean = float(self.total) / self.steps_per_epoch
        if not mean < float("inf"):
            raise RuntimeError(f"the loss became {mean} in epoch {self.epoch}; lower --lr")
        return mean

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        """One value per image."""
        args, model = self.args, self.model
        augment = AUGMENTATIONS[args.data] if args.augment == "auto" else args.augment
        if augment != "none":
            x = crop_flip(x, flip=augment == "crop_flip", rng=self.rng)
        if args.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        ball = {"eps": args.eps, "step_size": args.step_size, "steps": args.attack_steps}
        with precision(args):
            model.train()
            if args.method == "natural":
                return losses.cross_entropy(model(x), y)
            if args.method == "sat":
                return losses.cross_entropy(model(pgd(model, x, y, **ball, rng=self.rng)), y)
            x_adv = utae_pgd(model, x, gamma=0, **ball, rng=self.rng)  # TRADES' own attack
            clean = model(x)
            robust = losses.distillation(model(x_adv), clean)
            return losses.cross_entropy(clean, y) + args.beta * robust

    def state_dict(self) -> dict[str, Any]:
        """All that goes on from here."""
        return {
            "args": settings(self.args),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": self.rng.get_state(),
            "left": self.left.clone(),
            "total": self.total,
        }

    def save_model(self, path: Path) -> None:
        write_model(
            self.model,
            path,
            architecture=self.args.architecture,
            num_classes=len(self.images.class_names),
            in_channels=self.images.pixels.shape[1],
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_options(state["args"], settings(self.args))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.rng.set_state(state["rng"])
        self.epoch, self.left = state["epoch"], state["left"]
        self.total.copy_(state["total"])


def settings(args: Args) -> dict[str, Any]:
    """The options that the weights depend on."""
    free = FREE | {"root", "download", "test_images", "autoattack", "device", "out"}
    return {name: value for name, value in asdict(args).items() if name not in free}


def checkpoints(args: Args) -> Checkpoints:
    return Checkpoints(args.out / "checkpoints", keep=args.keep_checkpoints)


def precision(args: Args) -> AbstractContextManager[Any]:
    if args.precision == "float32":
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16)


def prepare(args: Args) -> tuple[Training, Images, Dataset[Any]]:
    """Everything that can be wrong with the input is found here, before anything is written."""
    check(args)
    images, test = load_splits(args.data, args.root, download=args.download)
    if not 0 < args.val_images < len(images):
        raise ValueError(
            f"expected --val-images in 1..{len(images) - 1}, got {args.val_images} of {len(images)} images"
        )
    protocol("quick", args)  # refuses a radius of 0
    tested = chosen(test, args.test_images, args.seed)
    held_out = stratified(images, args.val_images, args.seed)
    kept = torch.ones(len(images), dtype=torch.bool)
    kept[held_out] = False
    training = Training(args, images.part(kept.nonzero().flatten()))
    state = found(checkpoints(args), args.resume, set(training.state_dict()))
    if state is not None:
        training.load_state_dict(state)
    return training, images.part(held_out), tested


def protocol(name: str, args: Args) -> Protocol:
    """One of the library's at the radius of the training."""
    return PROTOCOLS[name].at(eps=args.eps).with_seed(args.seed)


def accuracies(training: Training, held_out: Images) -> str:
    """Clean and PGD-10 accuracy on the images held out, in words."""
    report = evaluate(
        training.model,
        held_out,
        protocol("quick", training.args).without("FGSM"),
        num_classes=len(held_out.class_names),
    )
    return ", ".join(f"{name} {100 * report[name].average:.1f}" for name in ("clean", "PGD-10"))


def train(training: Training, held_out: Images, stop: Stop) -> None:
    """To the last epoch, or until it is stopped, with a checkpoint then."""
    args = training.args
    losses_of_epochs = saved(
        training,
        training.epochs,
        training.state_dict,
        checkpoints=checkpoints(args),
        every=args.checkpoint_every,
        stop=stop,
    )
    with tqdm(total=args.epochs, initial=training.epoch, unit="epoch", desc=args.method) as bar:
        for loss in losses_of_epochs:
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, held out: {accuracies(training, held_out)}")


def main(args: Args) -> None:
    alone("train_teacher")
    try:
        training, held_out, tested = prepare(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"train_teacher: {error}")
    with Stop(args.max_minutes) as stop:
        try:
            train(training, held_out, stop)
        except (RuntimeError, OSError) as error:  # losses that became NaN, a full disk
            sys.exit(f"train_teacher: {error}")
    if training.epoch < args.epochs or stop():
        stop.leave(f"after epoch {training.epoch} of {args.epochs}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    training.save_model(args.out / "teacher.pt")
    published = protocol("fair-ard", args)
    report = evaluate(
        training.model,
        tested,
        published if args.autoattack else published.without("AutoAttack"),
        num_classes=len(held_out.class_names),
        class_names=held_out.class_names,
        progress=True,
    )
    print(f"\n{args.architecture}, {args.method}:\n{report}\n")
    report.save(args.out / "report.json")
    clear(args.out / "checkpoints")
    print(f"written to {args.out}/: teacher.pt, report.json")


if __name__ == "__main__":
    with interruptible():
        main(tyro.cli(Args))
