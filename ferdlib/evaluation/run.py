"""`evaluate`: a model, data and a protocol to a report; block by block, attack by attack."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import ferdlib
from ferdlib import _oldchecks as _checks
from ferdlib._modes import borrowed
from ferdlib.attacks.ascent import Model, checked_bounds
from ferdlib.evaluation.batches import SIZES, Batches
from ferdlib.evaluation.data import Block, Stream, device_of
from ferdlib.evaluation.outcome import (
    CustomAttack,
    Outcome,
    Setting,
    attacked,
    clean,
    on_survivors,
)
from ferdlib.evaluation.progress import Progress
from ferdlib.evaluation.protocols import Protocol, resolve_protocol
from ferdlib.evaluation.report import RobustnessReport
from ferdlib.evaluation.resume import Records, fingerprint
from ferdlib.evaluation.trust import Sample, trust_checks
from ferdlib.models import freeze_for_attack

PROBE = 8  # samples whose logits tell one model from another


def evaluate(
    model: Model,
    data: DataLoader[Any] | Dataset[Any] | tuple[Tensor, Tensor],
    protocol: Protocol | str = "fair-ard",
    *,
    num_classes: int,
    class_names: Sequence[str] | None = None,
    groups: Tensor | None = None,
    group_names: Sequence[str] | None = None,
    custom: Mapping[str, CustomAttack] | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int | Literal["auto"] = 128,
    early_stop: bool = True,
    fast: bool = False,
    device: torch.device | str | None = None,
    resume: str | os.PathLike[str] | None = None,
    trust: bool = False,
    progress: bool | str = False,
) -> RobustnessReport:
    """Class-wise robustness of a model under a protocol.

    Samples are streamed in the order of the data set, whatever order a loader has, and each one's noise comes
    from its index: batch size, shuffling and sharding change nothing but rounding. AutoAttack alone depends on
    its batches, whose size belongs to the protocol; each of them is a run of `ferdlib.attacks.autoattack`. The
    model runs in eval mode, is given back as it was, and is not moved.

    Args:
        model: any callable from images to logits `(N, K)`; normalisation lives inside it.
        data: a DataLoader, a Dataset or a pair of tensors with images `(C, H, W)` inside `bounds` and int64
            labels.
        protocol: a `Protocol`, or the name of one in `PROTOCOLS`.
        num_classes: K >= 2, declared, so that an absent class keeps its place.
        class_names: K names for tables and figures; numbers if None.
        groups: int64, the group of each sample by its index in the data set. The rows of the report are then
            the groups, in place of the classes.
        group_names: their names, as many as there are groups.
        custom: attacks of kind "custom" by name, called as `attack(model, x, targets)` for images; what they
            return is checked for ball and bounds. For independence of batches, their noise must be, too.
        bounds: smallest and largest pixel value; AutoAttack knows (0, 1) alone.
        batch_size: samples at a time, where `data` is not a DataLoader with its own. "auto", whatever `data`
            is, times 16, 32, ..., 1024 of the first images and takes the fastest. A batch that does not fit
            into memory is halved; AutoAttack's is not.
        early_stop: leave a sample out of an attack with `judge="any"` once it is misclassified. The report is
            the same (rounding aside), for fewer passes.
        fast: attack, and judge by, the copy that `models.freeze_for_attack` makes of the model. Its logits are
            the model's but for rounding, so single samples may fall that would not, or the other way round. The
            trust checks look at the model itself.
        device: where the samples go; None takes that of the model's first parameter.
        resume: a folder that keeps each finished attack and block. The same call continues from it.
        trust: also run `trust_checks`, on at least two samples of each class.
        progress: a bar with the running worst-case accuracies (needs tqdm), under this name if it is a string.

    Returns:
        A `RobustnessReport`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range; no samples; labels beyond `num_classes`;
            images outside the bounds; logits of another shape; a folder that belongs to another evaluation; a
            model that `fast` cannot copy.
        RuntimeError: NaN in the model's logits, or in the gradients of an attack.
        OSError: a folder that cannot be written.

    Example:
        >>> def model(x):  # class 1 while the first pixel is above 0.45
        ...     return torch.stack([torch.full((len(x),), 0.45), x[:, 0, 0, 0]], dim=1)
        >>> x = torch.tensor([0.5, 0.9, 0.1, 0.2]).reshape(4, 1, 1, 1)
        >>> report = evaluate(model, (x, torch.tensor([1, 1, 0, 0])), "quick", num_classes=2)
        >>> report["PGD-10"].class_accuracy  # 8/255 is not enough to carry 0.5 below 0.45
        tensor([1., 1.], dtype=torch.float64)
        >>> from ferdlib.evaluation import PROTOCOLS
        >>> strong = PROTOCOLS["quick"].at(eps=0.1)
        >>> evaluate(model, (x, torch.tensor([1, 1, 0, 0])), strong, num_classes=2).winners
        ('FGSM', '', '', '')
    """
    function = "evaluate"
    _checks.callable_(function, "model", model)
    protocol = resolve_protocol(function, protocol)
    _checks.integer(function, "num_classes", num_classes, low=2)
    most, search = _checked_batch_size(function, batch_size)
    names = _names(function, "class_names", class_names, num_classes)
    low, high = checked_bounds(bounds)
    custom = _checked_custom(function, protocol, custom)
    sizes = {attack.batch_size for attack in protocol.attacks if attack.kind == "autoattack"}
    if sizes and (low, high) != (0.0, 1.0):
        raise ValueError(
            f"{function}: expected `bounds` (0, 1) for AutoAttack, got ({low:g}, {high:g})"
        )
    if groups is not None:
        groups, group_names = _checked_groups(function, groups, group_names)

    where = _checks.device(function, device) if device is not None else device_of(model)
    stream = Stream(function, data, most)
    _covered(function, groups, stream.last_index)
    at_once = most if search else stream.batch_size
    size = sizes.pop() if sizes else at_once
    setting = Setting(
        function=function,
        model=_copy(function, model) if fast else model,
        num_classes=num_classes,
        bounds=(low, high),
        seed=protocol.seed,
        batches=Batches(function, min(at_once, size), search=search),
        custom=custom,
        early_stop=early_stop,
    )
    records = None
    if resume is not None:
        header = {
            "model": fingerprint(model),
            "protocol": protocol.to_dict(),
            "num_classes": num_classes,
            "bounds": [low, high],
            "batch size": size,
            "choice of `fast`": fast,
        }
        records = Records(function, resume, header)
    run = _Run(setting, model, protocol, records, where)
    sample = Sample(num_classes) if trust else None
    with (
        torch.inference_mode(False),
        borrowed(model),
        Progress(function, stream.samples, names, progress) as bar,
    ):
        for block in stream.blocks(size):
            _checks.labels(
                function, block.targets.cpu(), num_classes=num_classes, argument="labels of data"
            )
            _checks.images(function, block.x, argument="data", bounds=(low, high))
            _covered(function, groups, int(block.index.max()))
            bar.add(block, run.block(block, bar))
            if sample is not None:
                sample.add(block)
    if not run.blocks:
        raise ValueError(f"{function}: expected `data` with at least one sample, got none")
    report = run.report(names, groups, tuple(group_names or ()))
    if sample is None:
        return report
    findings = trust_checks(
        model,
        sample.data(),
        protocol,
        num_classes=num_classes,
        bounds=(low, high),
        report=report,
        device=where,
    )
    return replace(report, findings=findings)


class _Run:
    """The outcomes so far, and what is to be said of where they come from."""

    def __init__(
        self,
        setting: Setting,
        model: Model,
        protocol: Protocol,
        records: Records | None,
        device: torch.device,
    ) -> None:
        self.setting, self.model, self.protocol = setting, model, protocol
        self.records, self.device = records, device
        self.blocks: list[Block] = []
        self.digest = 0
        names = ["clean", *(attack.name for attack in protocol.attacks)]
        self.outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
        self.seconds = dict.fromkeys(names, 0.0)

    def block(self, block: Block, bar: Progress) -> Tensor:
        """Attack a block, or take what was found earlier; which samples withstood everything, `(N,)`."""
        number, digest = len(self.blocks), block.digest()
        self.digest = (self.digest + digest) % 2**128
        self.image = {"shape": list(block.x.shape[1:]), "dtype": str(block.x.dtype)[6:]}
        here = block.to(self.device)
        if self.records is not None and number == 0:
            self.records.begin(self.setting.logits(here.x[:PROBE]))
        targets = block.targets.cpu()
        before = targets  # the label, or the class that a sample fell to
        specs = {attack.name: attack for attack in self.protocol.attacks}
        for name, outcomes in self.outcomes.items():
            bar.say(name)
            found = self.records.load(name, number, digest) if self.records is not None else None
            if found is None:
                self.setting.settle(here.x)
                start = time.perf_counter()
                if name == "clean":
                    outcome = clean(self.setting, here)
                elif specs[name].survivors:
                    outcome = on_survivors(self.setting, specs[name], here, before, bar.member)
                else:
                    outcome = attacked(self.setting, specs[name], here, bar.member)
                found = outcome, time.perf_counter() - start
                if self.records is not None:
                    self.records.save(name, number, digest, *found)
            outcomes.append(found[0])
            self.seconds[name] += found[1]
            before = torch.where(before == targets, found[0].predictions, before)
        # The pixels are done with, of which a slice would hold all: what is said of each sample stays.
        self.blocks.append(Block(block.index, torch.empty(0), targets))
        return before == targets

    def report(
        self, names: tuple[str, ...], groups: Tensor | None, group_names: tuple[str, ...]
    ) -> RobustnessReport:
        index = torch.cat([block.index for block in self.blocks])
        if groups is not None:
            groups = groups[index]
        targets = torch.cat([block.targets for block in self.blocks])
        report = RobustnessReport(
            protocol=self.protocol,
            class_names=names,
            index=index,
            targets=targets,
            predictions={
                name: torch.cat([o.predictions for o in found])
                for name, found in self.outcomes.items()
            },
            fooled_at={
                name: torch.cat([o.fooled_at for o in found])
                for name, found in self.outcomes.items()
            },
            stages={name: found[0].stages for name, found in self.outcomes.items()},
            groups=groups,
            group_names=group_names,
            manifest=self.manifest(len(index)),
            timing={
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": self.seconds,
            },
        )
        for row, count in zip(report.row_names, report["clean"].totals.tolist(), strict=True):
            if count == 0:
                logging.getLogger("ferdlib").warning(
                    "%s: no samples of %r; it is left out of every figure",
                    self.setting.function,
                    row,
                )
        return report

    def manifest(self, samples: int) -> dict[str, Any]:
        """Plain values only; nothing in it depends on how the work was cut."""
        model, device = self.model, self.device
        cuda = device.type == "cuda"
        parameters = model.parameters() if isinstance(model, nn.Module) else ()
        autocast = torch.is_autocast_enabled(device.type)
        return {
            "versions": {
                "ferdlib": ferdlib.__version__,
                "torch": str(torch.__version__),
                "pyautoattack": metadata.version("pyautoattack"),
                "python": platform.python_version(),
            },
            "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
            "precision": {
                "tf32": bool(cuda and torch.backends.cuda.matmul.allow_tf32),
                "autocast": str(torch.get_autocast_dtype(device.type))[6:] if autocast else None,
                "fast": self.setting.model is not model,
            },
            "model": {
                "class": type(model).__name__ if isinstance(model, nn.Module) else "callable",
                "parameters": sum(p.numel() for p in parameters),
                "fingerprint": fingerprint(model),
            },
            "data": {"samples": samples, **self.image, "fingerprint": f"{self.digest:032x}"},
            "bounds": list(self.setting.bounds),
        }


def _checked_batch_size(function: str, value: int | str) -> tuple[int, bool]:
    """The number, or the largest that "auto" can find; and whether it is to be found."""
    if isinstance(value, str):
        _checks.choice(function, "batch_size", value, ("auto",))
        return SIZES[-1], True
    return _checks.integer(function, "batch_size", value, low=1), False


def _copy(function: str, model: Model) -> Model:
    """What is attacked in place of the model."""
    try:
        with torch.inference_mode(False):
            return freeze_for_attack(model)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{function}: expected a `model` that can be copied for `fast`, got {error}"
        ) from error


def _names(
    function: str, argument: str, names: Sequence[str] | None, count: int
) -> tuple[str, ...]:
    if names is None:
        return tuple(map(str, range(count)))
    _checks.strings(function, argument, names)
    if len(names) < count or (argument == "class_names" and len(names) != count):
        raise ValueError(f"{function}: expected {count} `{argument}`, got {len(names)}")
    return tuple(names)


def _checked_groups(
    function: str, groups: Tensor, names: Sequence[str] | None
) -> tuple[Tensor, tuple[str, ...]]:
    groups = _checks.labels(
        function, _checks.tensor(function, "groups", groups).cpu(), argument="groups"
    )
    if len(groups) == 0 or int(groups.min()) < 0 or int(groups.max()) < 1:
        came = f"values in {groups.min()}..{groups.max()}" if len(groups) else "none"
        raise ValueError(f"{function}: expected at least two `groups`, from 0 on, got {came}")
    return groups, _names(function, "group_names", names, int(groups.max()) + 1)


def _covered(function: str, groups: Tensor | None, index: int | None) -> None:
    if groups is not None and index is not None and index >= len(groups):
        raise ValueError(
            f"{function}: expected `groups` for every index of `data`, got {len(groups)} for an index "
            f"of {index}"
        )


def _checked_custom(
    function: str, protocol: Protocol, custom: Mapping[str, CustomAttack] | None
) -> Mapping[str, CustomAttack]:
    asked = {attack.name for attack in protocol.attacks if attack.kind == "custom"}
    given = {} if custom is None else custom
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{function}: expected `custom` as attacks by name, got {_checks.got(given)}"
        )
    if asked != set(given):
        raise ValueError(
            f"{function}: expected `custom` to hold the protocol's attacks of kind 'custom', "
            f"{sorted(asked)}, got {sorted(given)}"
        )
    return given
