"""Signs that a robust accuracy is too good: masked gradients, weak attacks, a model in the wrong state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ferdlib import _oldchecks as _checks
from ferdlib._modes import borrowed
from ferdlib.attacks.ascent import Ascent, Model, checked_bounds
from ferdlib.attacks.autoattack import square
from ferdlib.evaluation.batches import Batches
from ferdlib.evaluation.data import Block, Stream, device_of
from ferdlib.evaluation.outcome import Setting, attacked
from ferdlib.evaluation.paired import mcnemar
from ferdlib.evaluation.protocols import AttackSpec, Protocol, resolve_protocol
from ferdlib.losses import cross_entropy

if TYPE_CHECKING:
    from ferdlib.evaluation.report import RobustnessReport

SAMPLES = 256  # of all classes together, and at least two of each
QUERIES = 500  # of the black-box attack, where the report has none
SQUARE_SHARE = 0.002  # that is AutoAttack's own limit for its warning
ZERO_SHARE = 0.05
LEVEL = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One trust check and its evidence.

    Attributes:
        check: what should hold.
        verdict: "fine", "doubtful" (the robustness may be overestimated), or "not checked".
        evidence: the numbers, in a sentence.

    Example:
        >>> print(Finding(check="the model is deterministic", verdict="fine", evidence="two passes agree"))
        fine: the model is deterministic (two passes agree)
    """

    check: str
    verdict: Literal["fine", "doubtful", "not checked"]
    evidence: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.check} ({self.evidence})"


class Sample:
    """The first few samples of each class, as they pass by."""

    def __init__(self, num_classes: int) -> None:
        self.room = [max(2, SAMPLES // num_classes)] * num_classes
        self.blocks: list[Block] = []

    def add(self, block: Block) -> None:
        chosen = []
        for i, label in enumerate(block.targets.tolist()):
            if self.room[label] > 0:
                self.room[label] -= 1
                chosen.append(i)
        if chosen:
            self.blocks.append(block[torch.tensor(chosen)])

    def data(self) -> tuple[Tensor, Tensor]:
        return torch.cat([b.x for b in self.blocks]), torch.cat([b.targets for b in self.blocks])


def trust_checks(
    model: Model,
    data: Any,
    protocol: Protocol | str = "fair-ard",
    *,
    num_classes: int,
    bounds: tuple[float, float] = (0.0, 1.0),
    report: RobustnessReport | None = None,
    batch_size: int = 128,
    device: torch.device | str | None = None,
) -> tuple[Finding, ...]:
    """Look for the usual reasons why a robust accuracy is too good to be true.

    On the model: it came in eval mode; it is deterministic; its outputs are logits; its input gradients are
    not zero; the loss rises along the attack; robust accuracy falls to zero as the radius grows; black-box
    Square finds nothing that PGD and CW missed. On a report: no weaker attack beats a stronger one,
    AutoAttack is not above PGD, Square finds nothing after the gradient attacks. And on the images: they are
    inside the bounds, without which the checks with attacks are left out. None of these proves robustness.

    Args:
        model: any callable from images to logits `(N, K)`.
        data: a few hundred samples, as for `evaluate`; the first 256 or so, of all classes, are used.
        protocol: whose radius, steps and step size PGD takes; those of its first attack with several steps.
        num_classes: K >= 2.
        bounds: smallest and largest pixel value.
        report: of `evaluate` on this model, for the checks that compare attacks.
        batch_size: samples at a time, where `data` is not a DataLoader.
        device: where the samples go; None takes that of the model's first parameter.

    Returns:
        The findings, the doubtful ones first.

    Raises:
        TypeError, ValueError: as `evaluate`, images outside the bounds excepted, which are a finding.

    Example:
        >>> def model(x):  # softmax where logits are expected
        ...     z = torch.stack([torch.full((len(x),), 0.45), x[:, 0, 0, 0]], dim=1)
        ...     return z.softmax(dim=1)
        >>> data = torch.rand(8, 1, 2, 2), torch.tensor([0, 1] * 4)
        >>> for finding in trust_checks(model, data, "quick", num_classes=2):
        ...     if finding.verdict == "doubtful" and "logits" in finding.check:
        ...         print(finding)
        doubtful: the outputs are logits (all are in [0, 1] and sum to 1 per sample: a softmax is inside)
    """
    function = "trust_checks"
    _checks.callable_(function, "model", model)
    protocol = resolve_protocol(function, protocol)
    _checks.integer(function, "num_classes", num_classes, low=2)
    low, high = checked_bounds(bounds)
    _checks.integer(function, "batch_size", batch_size, low=1)
    from ferdlib.evaluation.report import RobustnessReport  # which has findings itself

    if report is not None and not isinstance(report, RobustnessReport):
        raise TypeError(
            f"{function}: expected `report` to be a RobustnessReport, got {_checks.got(report)}"
        )
    sample = Sample(num_classes)
    findings = [_eval_mode(model)]
    with torch.inference_mode(False), borrowed(model):
        for block in Stream(function, data, batch_size).blocks(batch_size):
            _checks.labels(
                function, block.targets.cpu(), num_classes=num_classes, argument="labels of data"
            )
            sample.add(block)
        if not sample.blocks:
            raise ValueError(f"{function}: expected `data` with at least one sample, got none")
        x, y = sample.data()
        if not bool(x.isfinite().all()):
            raise ValueError(f"{function}: expected finite images `data`, got NaN or infinity")
        where = _checks.device(function, device) if device is not None else device_of(model)
        block = Block(torch.arange(len(x)), x, y).to(where)
        batches = Batches(function, batch_size)
        setting = Setting(function, model, num_classes, (low, high), protocol.seed, batches, {})
        findings += list(_of_model(setting, block, _pgd_of(protocol, high - low), report))
    if report is not None:
        findings += list(_of_report(report))
    order = {"doubtful": 0, "fine": 1, "not checked": 2}
    return tuple(sorted(findings, key=lambda finding: order[finding.verdict]))


def _finding(check: str, fine: bool, evidence: str) -> Finding:
    return Finding(check=check, verdict="fine" if fine else "doubtful", evidence=evidence)


def _eval_mode(model: object) -> Finding:
    check = "the model came in eval mode"
    if not isinstance(model, nn.Module):
        return Finding(check=check, verdict="not checked", evidence="it is a plain callable")
    training = [name or "the model" for name, m in model.named_modules() if m.training]
    if not training:
        return _finding(check, True, "no module was in train mode")
    return _finding(
        check,
        False,
        f"{len(training)} modules were in train mode, {training[0]!r} first; run in eval mode",
    )


def _pgd_of(protocol: Protocol, width: float) -> AttackSpec:
    """PGD as the protocol has it, or with its radius."""
    several = [a for a in protocol.attacks if a.kind == "pgd" and (a.steps or 0) > 1]
    if several:
        return several[0]
    eps = max(attack.eps for attack in protocol.attacks)
    return AttackSpec(name="PGD-20", kind="pgd", eps=eps, step_size=min(eps, width) / 4, steps=20)


def _of_model(
    setting: Setting, block: Block, pgd: AttackSpec, report: RobustnessReport | None
) -> Iterator[Finding]:
    x, (low, high) = block.x, setting.bounds
    inside = bool(((x >= low) & (x <= high)).all())
    yield _finding(
        "the images are inside the bounds",
        inside,
        f"values in [{x.min():g}, {x.max():g}], bounds [{low:g}, {high:g}]"
        + ("" if inside else "; put normalisation inside the model"),
    )
    once, twice = (_logits(setting, block) for _ in range(2))
    apart = float((once - twice).abs().max())
    yield _finding(
        "the model is deterministic",
        apart <= 1e-5 * (1 + float(once.abs().max())),
        f"logits of two passes over {len(block)} images differ by at most {apart:.1g}",
    )
    softmax = bool(((once >= 0) & (once <= 1)).all()) and bool(
        ((once.sum(dim=1) - 1).abs() < 1e-4).all()
    )
    yield _finding(
        "the outputs are logits",
        not softmax,
        "all are in [0, 1] and sum to 1 per sample: a softmax is inside"
        if softmax
        else f"values in [{once.min():.3g}, {once.max():.3g}]",
    )
    if not inside:
        evidence = "images outside the bounds cannot be attacked"
        yield Finding(check="the attacks work", verdict="not checked", evidence=evidence)
        return
    gradients = _gradients(setting, block)
    if gradients is None:
        yield _finding(
            "the gradients are not zero", False, "the logits have none: are they detached?"
        )
        evidence = "without gradients there is no attack"
        yield Finding(check="the attacks work", verdict="not checked", evidence=evidence)
        return
    yield gradients
    yield _rising(setting, block, pgd)
    yield _falling(setting, block, pgd)
    has_square = report is not None and any("square" in s for s in report.stages.values())
    if not has_square and setting.bounds == (0.0, 1.0) and pgd.eps > 0:
        yield _black_box(setting, block, pgd)


def _logits(setting: Setting, block: Block) -> Tensor:
    parts = setting.batches.over(block, lambda batch: setting.logits(batch.x).float())
    return torch.cat(parts)


def _gradients(setting: Setting, block: Block) -> Finding | None:
    """Samples whose gradient gives an attack no direction; None if the model cannot be differentiated."""

    def zero(batch: Block) -> Tensor | None:
        leaf = batch.x.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = setting.shaped(setting.model(leaf), len(batch))
            loss = cross_entropy(logits, batch.targets).sum()
            if not loss.requires_grad:
                return None
            (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        return None if gradient is None else (gradient == 0).flatten(1).all(dim=1)

    found = setting.batches.over(block, zero)
    parts = [part for part in found if part is not None]
    if len(parts) < len(found):
        return None
    none = torch.cat(parts).cpu()
    y = block.targets.cpu()
    counts = torch.bincount(y, minlength=setting.num_classes)
    share = torch.bincount(y[none], minlength=setting.num_classes) / counts
    worst = int(share.nan_to_num(nan=-1.0).argmax())
    return _finding(
        "the gradients are not zero",
        float(share.nan_to_num(nan=0.0).max()) <= ZERO_SHARE,
        f"zero for {int(none.sum())} of {len(none)} images; most in class {worst}, {share[worst]:.0%}",
    )


def _rising(setting: Setting, block: Block, pgd: AttackSpec) -> Finding:
    """The mean loss along the attack's iterates."""
    steps = pgd.steps or 0
    rng = torch.Generator().manual_seed(setting.seed)

    def along(batch: Block) -> Tensor:
        sums = torch.zeros(steps, device=batch.x.device)

        def watch(step: int, _: Tensor, logits: Any) -> None:
            sums[step] = cross_entropy(logits, batch.targets).sum()

        step_size = pgd.step_size or 0.0
        bounds = setting.bounds
        ascent = Ascent(
            setting.model, batch.x, pgd.eps, step_size, steps, "uniform", bounds, rng=rng
        )
        ascent.run(cross_entropy, batch.targets, on_step=watch)
        return sums

    sums = torch.stack(setting.batches.over(block, along)).sum(dim=0)
    loss = (sums / len(block)).tolist()
    shown = sorted({0, steps // 4, steps // 2, steps - 1})
    values = ", ".join(f"{loss[t]:.3g} at x^({t})" for t in shown)
    return _finding(
        "the loss rises along the attack",
        all(loss[t] <= loss[steps - 1] * 1.01 + 1e-6 for t in shown) and loss[-1] > loss[0],
        f"mean cross-entropy {values}",
    )


def _falling(setting: Setting, block: Block, pgd: AttackSpec) -> Finding:
    """Robust accuracy at growing radii, up to one at which every image can become any other."""
    width = setting.bounds[1] - setting.bounds[0]
    radii = sorted({min(width, factor * pgd.eps) for factor in (1, 2, 4, 8)} | {width})
    accuracies = []
    for eps in radii:
        spec = AttackSpec(
            name="PGD", kind="pgd", eps=eps, step_size=eps / 4, steps=pgd.steps, judge="any"
        )
        found = attacked(setting, spec, block).predictions
        accuracies.append(float((found == block.targets.cpu()).double().mean()))
    values = ", ".join(f"{a:.1%} at {eps:.3g}" for a, eps in zip(accuracies, radii, strict=True))
    slack = 0.01
    falls = all(b <= a + slack for a, b in pairwise(accuracies))
    return _finding(
        "robust accuracy falls to zero as the radius grows",
        falls and accuracies[-1] <= slack,
        values,
    )


def _black_box(setting: Setting, block: Block, pgd: AttackSpec) -> Finding:
    """Square with few queries on what PGD and CW left; it climbs the margin, as CW does."""
    left = torch.ones(len(block), dtype=torch.bool)
    for spec in (pgd, replace(pgd, kind="cw")):
        left &= attacked(setting, spec, block).predictions == block.targets.cpu()
    at = left.nonzero().squeeze(1).to(block.x.device)
    found = 0
    if len(at):
        robust = square(
            setting.model,
            block.x[at],
            block.targets[at],
            eps=pgd.eps,
            queries=QUERIES,
            seed=setting.seed,
        )
        found = len(at) - int(robust.sum())
    return _finding(
        "black-box Square finds nothing that gradients missed",
        found < max(2, math.ceil(SQUARE_SHARE * len(block))),
        f"{QUERIES} queries fooled {found} of the {len(at)} images that PGD and CW left",
    )


def _of_report(report: RobustnessReport) -> Iterator[Finding]:
    robust = {name: report[name].robust for name in report.predictions}
    specs = {attack.name: attack for attack in report.protocol.attacks}
    for weak in specs.values():
        for strong in specs.values():
            if _weaker(weak, strong):
                yield _ordered(report, robust, weak.name, strong.name)
    for spec in specs.values():
        if spec.kind == "autoattack" and "square" in report.stages[spec.name]:
            stage = report.stages[spec.name].index("square")
            found = report.fooled_at[spec.name] == stage
            by_class = torch.bincount(report.targets[found], minlength=report.num_classes)
            most = int(by_class.argmax())
            yield _finding(
                f"{spec.name}'s black-box Square finds nothing that its gradient attacks missed",
                int(found.sum()) < max(2, math.ceil(SQUARE_SHARE * len(report))),
                f"it fooled {int(found.sum())} of {len(report)} images after them; most in class "
                f"{report.class_names[most]}, {int(by_class[most])}",
            )


def _weaker(weak: AttackSpec, strong: AttackSpec) -> bool:
    """Whether the second attack does all that the first does, and more."""
    if strong.kind == "autoattack":  # on survivors it cannot lose
        return weak.iterated and weak.eps <= strong.eps and not strong.survivors
    if not (weak.iterated and strong.kind == weak.kind and weak.eps <= strong.eps):
        return False
    more = (strong.steps or 0) > (weak.steps or 0) or strong.restarts > weak.restarts
    return more and (strong.steps or 0) >= (weak.steps or 0) and strong.restarts >= weak.restarts


def _ordered(
    report: RobustnessReport, robust: dict[str, Tensor], weak: str, strong: str
) -> Finding:
    only_weak = (~robust[weak] & robust[strong]).sum().reshape(1)
    only_strong = (robust[weak] & ~robust[strong]).sum().reshape(1)
    p = float(mcnemar(only_weak, only_strong))
    doubtful = bool(only_weak > only_strong) and p < LEVEL
    return _finding(
        f"{strong} is at least as strong as {weak}",
        not doubtful,
        f"average {report[strong].average:.2%} against {report[weak].average:.2%}; {int(only_weak)} images "
        f"fooled by {weak} alone, {int(only_strong)} by {strong} alone, p {p:.2g}",
    )
