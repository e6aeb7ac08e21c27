"""`evaluate`: a model, data and a protocol to a report; block by block, attack by attack."""

from __future__ import annotations

import logging
import os
import platform
import time
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import ferdlib
from ferdlib import _checks
from ferdlib._checks import InvalidType, InvalidValue, got, public
from ferdlib._modes import borrowed
from ferdlib.attacks.ascent import Model, checked_bounds
from ferdlib.checkpoints import digest
from ferdlib.evaluation import attack, table
from ferdlib.evaluation.attack import CustomAttack, Setting
from ferdlib.evaluation.progress import Progress
from ferdlib.evaluation.protocols import Protocol, resolve_protocol
from ferdlib.evaluation.report import RobustnessReport
from ferdlib.evaluation.resume import Records, look
from ferdlib.evaluation.samples import Block, Samples, device_of
from ferdlib.evaluation.trust import FewOfEach, trust_checks
from ferdlib.models import FrozenModel
from ferdlib.models.freeze import compare as compare_copy

UNMOVED = "evaluate: %s left %d samples where they began, for their gradients are zero: it tells nothing of them"


@public
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
    batch_size: int = 128,
    early_stop: bool = True,
    fast: bool = False,
    device: torch.device | str | None = None,
    resume: str | os.PathLike[str] | None = None,
    trust: bool = False,
    progress: bool | str = False,
) -> RobustnessReport:
    """Measure class-wise robustness of a model under a protocol.

    Samples are read in their order, and each one's noise comes from its index: batch size and sharding change
    nothing but rounding. AutoAttack alone depends on its batches, whose size belongs to the protocol; each of them
    is a run of `ferdlib.attacks.autoattack`. The model runs in eval mode, is given back as it was, and is not
    moved.

    Args:
        model: any callable from images to logits `(N, K)`; normalisation lives inside it.
        data: a pair of tensors, a Dataset, or a DataLoader that does not shuffle, with images `(C, H, W)` inside
            `bounds` and int64 labels. A loader is iterated as it is. The index of a sample is its place in the
            data set (a `Subset`'s in the whole); in an iterable of batches, or in a loader with a sampler of the
            user, the running number.
        protocol: a `Protocol`, or the name of one in `PROTOCOLS`.
        num_classes: K >= 2, declared, so that an absent class keeps its place.
        class_names: K names for tables and figures; numbers if None.
        groups: int64, the group of each sample by its index. The rows of the report are then the groups, in place
            of the classes.
        group_names: their names, as many as there are groups.
        custom: attacks of kind "custom" by name, called as `attack(model, x, targets)` for images; the result is
            checked for ball and bounds. For independence of batches, their noise must be, too.
        bounds: smallest and largest pixel value; AutoAttack knows (0, 1) alone.
        batch_size: samples at a time, where `data` is not a DataLoader with its own. A batch that does not fit
            into memory is halved; AutoAttack's is not.
        early_stop: leave a sample out of an attack with `judge="any"` once it is misclassified. The report is the
            same (rounding aside), for fewer passes.
        fast: attack, and judge by, the copy that `models.freeze_for_attack` makes of the model. Its logits are the
            model's but for rounding, so single samples may fall that would not, or the other way round. They are
            compared on the first samples. The trust checks look at the model itself.
        device: of the samples; None takes that of the model's first parameter.
        resume: a folder that keeps each finished attack and block. The same call continues from it; another model
            or attack is refused, which outputs and gradients at the first samples tell.
        trust: also run `trust_checks`, on at least two samples of each class.
        progress: a bar with the running worst-case accuracies (needs tqdm), under this name if it is a string.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range; no samples, or in random order; logits of
            another shape; a folder that belongs to another evaluation; a model that `fast` cannot copy.
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
    _checks.callable_(model=model)
    protocol = resolve_protocol(protocol)
    _checks.integer(2, num_classes=num_classes)
    _checks.integer(1, batch_size=batch_size)
    num_classes, batch_size = _checks.plain(num_classes), _checks.plain(batch_size)
    names = _names("class_names", class_names, num_classes)
    low, high = checked_bounds(bounds)
    custom = {} if custom is None else custom
    _check_custom(protocol, custom)
    # On the host, where they are indexed by the samples.
    if groups is not None:
        groups = _checked_groups(groups)
        group_names = _names("group_names", group_names, int(groups.max()) + 1)
    where = device_of(model) if device is None else _checks.device(device)

    samples = Samples(data, batch_size, num_classes)
    # Found before the work, where the indices are known.
    if samples.index is not None:
        _check_covered(groups, samples.index)
    # AutoAttack's batches are the blocks, so that its noise does not depend on those of the data.
    sizes = {spec.batch_size for spec in protocol.attacks if spec.kind == "autoattack"}
    if sizes and (low, high) != (0.0, 1.0):
        raise InvalidValue(f"expected `bounds` (0, 1) for AutoAttack, got ({low:g}, {high:g})")
    size = sizes.pop() if sizes else samples.batch_size
    judged: Any = model
    if fast:
        if not isinstance(model, nn.Module):
            raise InvalidType(f"expected a `model` that can be copied for `fast`, got {got(model)}")
        with torch.inference_mode(False), _copying():
            judged = FrozenModel(model)
    setting = Setting(
        model=judged,
        num_classes=num_classes,
        bounds=(low, high),
        seed=protocol.seed,
        batch_size=min(samples.batch_size, size),
        custom=custom,
        early_stop=early_stop,
    )
    fingerprint = digest(model) if isinstance(model, nn.Module) else None
    records = None
    if resume is not None:
        header = {
            "version of ferdlib": ferdlib.__version__,
            "model": fingerprint,
            "protocol": protocol.to_dict(),
            "num_classes": num_classes,
            "bounds": [low, high],
            "batch size": size,
            "choice of `fast`": fast,
        }
        records = Records(resume, header)
    run = _Run(setting, protocol, records, where)
    # The trust checks need a few samples, and run after the report.
    few = FewOfEach(num_classes)
    bar = Progress(None if samples.index is None else len(samples.index), names, progress)
    with torch.inference_mode(False), borrowed(model), closing(bar):
        for block in samples.blocks(size):
            _checks.images((low, high), data=block.x)
            _check_covered(groups, block.index)
            if fast and not run.blocks:
                with _copying():
                    compare_copy(judged, cast(nn.Module, model), block.x.to(where))
            bar.add(block, run.block(block, bar))
            if trust:
                few.add(block)
    for name, count in setting.unmoved.items():
        if count:
            logging.getLogger("ferdlib").warning(UNMOVED, name, count)
    if not run.blocks:
        raise InvalidValue("expected `data` with at least one sample, got none")
    manifest = _manifest(model, where, fast, fingerprint)
    report = run.report(names, groups, tuple(group_names or ()), manifest)
    if not trust:
        return report
    findings = trust_checks(
        model,
        few.data(),
        protocol,
        num_classes=num_classes,
        bounds=(low, high),
        report=report,
        device=where,
    )
    return replace(report, findings=findings)


class _Run:
    """Outcomes so far, block by block."""

    def __init__(
        self, setting: Setting, protocol: Protocol, records: Records | None, device: torch.device
    ) -> None:
        self.setting, self.protocol, self.records, self.device = setting, protocol, records, device
        self.blocks = 0
        # Plain arrays that grow: small tensors of a block would stay between the large ones of the next, and keep
        # the allocator from ever giving memory back.
        self.kept: defaultdict[str, array[int]] = defaultdict(partial(array, "q"))
        self.data: dict[str, Any] = {}
        self.digest = 0
        names = ["clean", *(spec.name for spec in protocol.attacks)]
        self.stages: dict[str, tuple[str, ...]] = {}
        self.seconds = dict.fromkeys(names, 0.0)

    def block(self, block: Block, bar: Progress) -> Tensor:
        """Attack a block, or read what was found earlier; return which samples withstood everything, `(N,)`."""
        number, digest = self.blocks, block.digest()
        self.digest = (self.digest + digest) % 2**128
        self.data = {"shape": list(block.x.shape[1:]), "dtype": str(block.x.dtype)[6:]}
        here = block.to(self.device)
        if self.records is not None and number == 0:
            self.records.begin(partial(look, self.setting, self.protocol, here))
        # The label, or the class that a sample fell to under the attacks so far.
        before = block.targets
        specs = {spec.name: spec for spec in self.protocol.attacks}
        for name in self.seconds:
            bar.say(name)
            found = self.records.load(name, number, digest) if self.records is not None else None
            if found is None:
                # A resumed run keeps the seconds that the work took.
                start, spec = time.perf_counter(), specs.get(name)
                if spec is None:
                    outcome = attack.clean(self.setting, here)
                elif spec.survivors:
                    outcome = attack.on_survivors(self.setting, spec, here, before, bar.member)
                else:
                    outcome = attack.attacked(self.setting, spec, here, bar.member)
                found = outcome, time.perf_counter() - start
                if self.records is not None:
                    self.records.save(name, number, digest, *found)
            outcome, seconds = found
            self._keep(f"{name} predictions", outcome.predictions)
            self._keep(f"{name} fooled_at", outcome.fooled_at)
            self.stages.setdefault(name, outcome.stages)
            self.seconds[name] += seconds
            before = torch.where(before == block.targets, outcome.predictions, before)
        self._keep("index", block.index)
        self._keep("targets", block.targets)
        self.blocks += 1
        return before == block.targets

    def _keep(self, figure: str, values: Tensor) -> None:
        self.kept[figure].frombytes(values.numpy().tobytes())

    def report(
        self,
        class_names: tuple[str, ...],
        groups: Tensor | None,
        group_names: tuple[str, ...],
        manifest: dict[str, Any],
    ) -> RobustnessReport:
        """Put the blocks together, in the order of the index."""
        whole = {k: torch.frombuffer(v, dtype=torch.int64) for k, v in self.kept.items()}
        # Reports of one data set are in one order, however it was read.
        order = whole["index"].argsort(stable=True)
        index = whole["index"][order]

        def joined(figure: str) -> dict[str, Tensor]:
            return {name: whole[f"{name} {figure}"][order] for name in self.seconds}

        data = {"samples": len(index), **self.data, "fingerprint": f"{self.digest:032x}"}
        created = datetime.now(UTC).isoformat(timespec="seconds")
        report = RobustnessReport(
            protocol=self.protocol,
            class_names=class_names,
            index=index,
            targets=whole["targets"][order],
            predictions=joined("predictions"),
            fooled_at=joined("fooled_at"),
            stages=self.stages,
            groups=None if groups is None else groups[index],
            group_names=group_names,
            manifest={**manifest, "data": data, "bounds": list(self.setting.bounds)},
            timing={"created": created, "seconds": self.seconds},
        )
        if absent := report.absent:
            said = "evaluate: no samples of %s; left out of every figure"
            logging.getLogger("ferdlib").warning(said, table.listed(absent))
        return report


def _manifest(
    model: Model, device: torch.device, fast: bool, fingerprint: str | None
) -> dict[str, Any]:
    """Describe software, machine and model in plain values; nothing depends on how the work was cut."""
    # TF32 and autocast change logits by more than rounding, so that a reader must know of them.
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
            "fast": fast,
        },
        "model": {
            "class": type(model).__name__ if isinstance(model, nn.Module) else "callable",
            "parameters": sum(p.numel() for p in parameters),
            "fingerprint": fingerprint,
        },
    }


@contextmanager
def _copying() -> Iterator[None]:
    """Say of a model that has no copy what can be done."""
    try:
        yield
    except InvalidValue as error:
        wanted = "a `model` that can be copied for `fast`"
        raise InvalidValue(f"expected {wanted}, got {error}; leave `fast` out") from error.__cause__


def _names(argument: str, names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(map(str, range(count)))
    # There may be more groups than those of these samples.
    _checks.strings(count if argument == "class_names" else None, **{argument: names})
    if len(names) < count:
        raise InvalidValue(f"expected {count} `{argument}`, got {len(names)}")
    return tuple(map(str, names))


def _checked_groups(groups: Tensor) -> Tensor:
    _checks.labels(groups=groups)
    groups = groups.cpu()
    if len(groups) == 0 or int(groups.min()) < 0 or int(groups.max()) < 1:
        came = f"values in {groups.min()}..{groups.max()}" if len(groups) else "none"
        raise InvalidValue(f"expected at least two `groups`, from 0 on, got {came}")
    return groups


def _check_covered(groups: Tensor | None, index: Tensor) -> None:
    if groups is not None and len(index) and int(index.max()) >= len(groups):
        came = f"{len(groups)} for an index of {index.max()}"
        raise InvalidValue(f"expected `groups` for every index of `data`, got {came}")


def _check_custom(protocol: Protocol, custom: Mapping[str, CustomAttack]) -> None:
    if not isinstance(custom, Mapping):
        raise InvalidType(f"expected `custom` as attacks by name, got {got(custom)}")
    asked = sorted(spec.name for spec in protocol.attacks if spec.kind == "custom")
    if asked != sorted(custom):
        wanted = f"the protocol's attacks of kind 'custom', {asked}"
        raise InvalidValue(f"expected `custom` to hold {wanted}, got {sorted(custom)}")
