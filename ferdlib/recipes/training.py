"""The loop of `ferdlib train`: attack, loss, SGD; the weights that are kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ferdlib.augment import crop_flip
from ferdlib.distributed import Ranks
from ferdlib.evaluation import PROTOCOLS, AttackResult
from ferdlib.methods import FairAverage
from ferdlib.recipes.data import AUGMENTATIONS, Images
from ferdlib.recipes.evaluate import measure
from ferdlib.recipes.options import Train
from ferdlib.synthesis.health import NonFiniteError
from ferdlib.trainer.monitor import StepLosses, end_run

EMA_DECAY = 0.98


class Training:
    """A model in training, with all that the next epoch depends on.

    Args:
        args: options, none of which is missing.
        images: trained on.
        val: held out, to choose the epoch that is kept.
        method: see `ferdlib.methods`.
        student: trained in place.
        teachers: models of the method, whose digests tell this run from others.
        milestones: epochs after which the preset's rate falls to a tenth.
        shared: draws the order of the images, the same on all processes.
        own: draws all other noise; the same generator with one process.

    Attributes:
        epoch: number of epochs that have ended.
        best: epoch and weights that are kept, and their figure.
    """

    def __init__(
        self,
        args: Train,
        images: Images,
        val: Images,
        method: Any,
        student: nn.Module,
        teachers: Mapping[str, nn.Module],
        milestones: tuple[int, ...],
        shared: torch.Generator,
        own: torch.Generator,
    ) -> None:
        self.args, self.images, self.val = args, images, val
        self.method, self.student, self.teachers = method, student, teachers
        self.shared, self.own = shared, own
        self.size, self.epochs = args.sgd.batch_size or 1, args.sgd.epochs or 1
        self.steps = len(images) // self.size
        self.device = args.run.device
        lr = args.sgd.lr or 0.0
        self.optimizer = torch.optim.SGD(
            student.parameters(),
            lr=lr,
            momentum=0.9,
            weight_decay=args.sgd.weight_decay or 0.0,
            nesterov=bool(args.sgd.nesterov),
        )
        total = self.epochs * self.steps
        self.schedule: LRScheduler
        if args.sgd.schedule == "preset":
            drops = [epoch * self.steps for epoch in milestones]
            self.schedule = MultiStepLR(self.optimizer, drops)
        elif args.sgd.schedule == "cosine":
            self.schedule = CosineAnnealingLR(self.optimizer, total)
        else:
            self.schedule = OneCycleLR(self.optimizer, max_lr=lr, total_steps=total)
        kind = args.selection.average
        if kind == "auto":
            kind = "fair" if args.objective.rule == "cfa" else "none"
        self.average: AveragedModel | FairAverage | None = None
        if kind == "ema":
            decay = get_ema_multi_avg_fn(EMA_DECAY)
            self.average = AveragedModel(student, multi_avg_fn=decay, use_buffers=True)
        elif kind == "fair":
            self.average = FairAverage(student)
        self.epoch = 0
        self.best: dict[str, Any] = {"figure": -1.0}

    def train(self) -> Iterator[dict[str, float]]:
        """Train to the last epoch; yields the figures of each."""
        method, student, ranks = self.method, self.student, Ranks.here()
        trained = ranks.parallel(student)
        while self.epoch < self.epochs:
            start, lr = time.perf_counter(), self.optimizer.param_groups[0]["lr"]
            epoch = self.epoch + 1
            try:
                mean, found = self._epoch(trained)
            except NonFiniteError as error:
                end_run(
                    error,
                    self.args.run.out if ranks.first else None,
                    epoch=epoch,
                    optimizer=self.optimizer,
                    models={"student": student},
                    owner=type(method).__name__,
                    remedy="lower --lr",
                )
            yield {
                "loss": mean,
                "held-out": found.average,
                "worst": found.worst_class,
                "train/learning_rate": lr,
                "train/seconds": time.perf_counter() - start,
                **{
                    f"held_out_class/{name}": accuracy
                    for name, accuracy in zip(
                        found.row_names, found.class_accuracy.tolist(), strict=True
                    )
                },
            }

    def _epoch(self, trained: nn.Module) -> tuple[float, AttackResult]:
        """Train through all images once; returns the mean loss, and the robustness on those held out."""
        method, student, ranks = self.method, self.student, Ranks.here()
        order = torch.randperm(len(self.images), generator=self.shared)
        ranks.reseed(self.own, self.shared)
        losses, (some, _) = StepLosses(ranks), self.images.batch(slice(0, 8), self.device)
        trained.train()
        with losses.watching(student, some):
            for index in order[: self.steps * self.size].split(self.size):
                x, y = self._augmented(ranks.part(index))
                with self._precision():
                    reference = method.reference(x)
                    x_adv = method.attack(student, x, y, reference)
                    loss = method.loss(trained, x, x_adv, y, reference).mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                if isinstance(self.average, AveragedModel):
                    self.average.update_parameters(student)
                losses.add(loss.detach(), student)
            mean = losses.mean(student, some)
            self._end_epoch()
            found = self._keep_best()
        return mean, found

    def probe(self) -> None:
        """Try two images and the end of an epoch, which complain of settings and teachers that do not fit."""
        x, y = self.images.batch(slice(0, 2), self.device)
        self.method.loss(self.student, x, self.method.attack(self.student, x, y), y)
        if self.method.needs_validation:
            self.method.validate(self.student, [(x, y)])
        self.method.end_epoch()

    def _augmented(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.images.batch(index, self.device)
        kind: str = self.args.sgd.augment
        if kind == "auto":
            kind = AUGMENTATIONS.get(self.args.images.data, "crop_flip")
        if kind != "none":
            x = crop_flip(x, flip=kind == "crop_flip", rng=self.own)
        return x, y

    def _precision(self) -> AbstractContextManager[Any]:
        if self.args.sgd.precision == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)

    def _end_epoch(self) -> None:
        ranks = Ranks.here()
        ranks.average_buffers(self.student)
        if isinstance(self.average, AveragedModel):
            ranks.average_buffers(self.average.module)
        if self.method.needs_validation:
            rows = torch.arange(len(self.val)).split(self.size)
            batches = (self.val.batch(each, self.device) for each in rows)
            self.method.validate(self.student, batches)
        self.method.sync()
        self.method.end_epoch()
        self.epoch += 1

    def _keep_best(self) -> AttackResult:
        """Attack the images held out, and keep the weights if they are the best so far."""
        model: nn.Module = self.student
        if isinstance(self.average, AveragedModel):
            model = self.average.module
        found = self._robustness(model)
        if isinstance(self.average, FairAverage):
            self.average.update(model, found.class_accuracy)
            if self.average.updates:
                model = self.average.module
                found = self._robustness(model)
        figure = found.average + found.worst_class
        if self.args.selection.select == "last" or figure > self.best["figure"]:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            self.best = {"figure": figure, "epoch": self.epoch, "weights": weights}
        return found

    def _robustness(self, model: nn.Module) -> AttackResult:
        """PGD-10; plain accuracy for a natural model."""
        quick = PROTOCOLS["quick"].without("FGSM").with_seed(self.args.run.seed)
        if self.args.objective.eps:
            quick = quick.at(eps=self.args.objective.eps)
        report = measure(model, self.val, quick, self.val.class_names)
        return report["clean" if self.args.objective.method == "natural" else "PGD-10"]

    def selected(self) -> nn.Module:
        """The student with the weights that are kept."""
        self.student.load_state_dict(self.best["weights"])
        return self.student.eval()

    def state_dict(self) -> dict[str, Any]:
        states = {name: part.state_dict() for name, part in self._parts().items()}
        return {**states, "shared": self.shared.get_state(), "epoch": self.epoch, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.keys() != self.state_dict().keys():
            raise ValueError("expected a checkpoint of this method, got another one's")
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.shared.set_state(state["shared"])
        self.epoch, self.best = state["epoch"], state["best"]

    def _parts(self) -> dict[str, Any]:
        names = ("method", "student", "optimizer", "schedule", "average")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
