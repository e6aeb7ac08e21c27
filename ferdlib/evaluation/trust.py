"""Signs that a robust accuracy is too good: masked gradients, weak attacks, a model in the wrong state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public
from ferdlib._modes import ask, borrowed, modules_behind
from ferdlib.attacks import pgd
from ferdlib.attacks.ascent import Model, checked_bounds
from ferdlib.attacks.autoattack import square
from ferdlib.attacks.lifted import lifted, of_cross_entropy
from ferdlib.evaluation.attack import Setting, attacked
from ferdlib.evaluation.protocols import AttackSpec, Protocol, resolve_protocol
from ferdlib.evaluation.report import Finding, RobustnessReport
from ferdlib.evaluation.samples import Block, Samples, device_of
from ferdlib.losses import cross_entropy
from ferdlib.stats import mcnemar

# Samples of all classes together; at least two are taken of each.
SAMPLES = 256
# Queries of the black-box attack, where the report has none.
QUERIES = 500
# Share of samples that Square may find after the others: AutoAttack's own limit for its warning.
SQUARE_SHARE = 0.002
ZERO_SHARE = 0.05
LEVEL = 0.05


class FewOfEach:
    """The first few samples of each class, as they pass by."""

    def __init__(self, num_classes: int) -> None:
        self.room = [max(2, SAMPLES // num_classes)] * num_classes
        self.blocks: list[Block] = []

    def add(self, block: Block) -> None:
        """Keep those that there is room for."""
        chosen = []
        for i, label in enumerate(block.targets.tolist()):
            if self.room[label] > 0:
                self.room[label] -= 1
                chosen.append(i)
        # Indexed, so that the pixels of the others are let go.
        if chosen:
            self.blocks.append(block[torch.tensor(chosen, device="cpu")])

    def data(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        whole = Block.joined(self.blocks)
        return whole.x, whole.targets


@public
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

    The model came in eval mode, is deterministic and gives logits; its input gradients are not zero; the loss
    rises along the attack; robust accuracy falls to zero as the radius grows; black-box Square finds nothing that
    PGD and CW missed. In a report no weaker attack beats a stronger one, and Square finds nothing after the
    gradient attacks. Images outside the bounds are not attacked. None of these proves robustness.

    Args:
        model: any callable from images to logits `(N, K)`.
        data: a few hundred samples, as for `evaluate`; the first 256 or so, of all classes, are used.
        protocol: whose radius, steps and step size PGD takes; those of its first attack with several steps.
        report: of `evaluate` on this model, for the checks that compare attacks.
        num_classes, bounds, batch_size, device: as for `evaluate`.

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
    _checks.callable_(model=model)
    protocol = resolve_protocol(protocol)
    _checks.integer(2, num_classes=num_classes)
    _checks.integer(1, batch_size=batch_size)
    low, high = checked_bounds(bounds)
    if report is not None:
        _checks.instance(RobustnessReport, report=report)
    where = device_of(model) if device is None else _checks.device(device)
    few = FewOfEach(num_classes)
    # Before the model is borrowed, which puts it into eval mode.
    findings = [_eval_mode(model)]
    with torch.inference_mode(False), borrowed(model):
        for block in Samples(data, batch_size, num_classes).blocks(batch_size):
            few.add(block)
        if not few.blocks:
            raise InvalidValue("expected `data` with at least one sample, got none")
        x, y = few.data()
        if not bool(x.isfinite().all()):
            raise InvalidValue("expected finite images `data`, got NaN or infinity")
        block = Block(torch.arange(len(x), device="cpu"), x, y).to(where)
        setting = Setting(model, num_classes, (low, high), protocol.seed, batch_size)
        findings += _of_model(setting, block, _pgd_of(protocol, high - low), report)
    if report is not None:
        findings += _of_report(report)
    # The doubtful ones first: in this order the verdicts are sorted by the alphabet.
    return tuple(sorted(findings, key=lambda finding: finding.verdict))


def _finding(check: str, fine: bool | None, evidence: str) -> Finding:
    """A finding, of what was not checked if `fine` is None."""
    if fine is None:
        return Finding(check=check, verdict="not checked", evidence=evidence)
    return Finding(check=check, verdict="fine" if fine else "doubtful", evidence=evidence)


def _eval_mode(model: object) -> Finding:
    fine, evidence, roots = (
        None,
        "no module is to be seen behind the callable",
        modules_behind(model),
    )
    if roots:
        named = (each for root in roots for each in root.named_modules())
        training = [name or "the model" for name, m in named if getattr(m, "training", False)]
        fine, evidence = not training, "no module was in train mode"
        if training:
            evidence = f"{len(training)} modules were in train mode, {training[0]!r} first; run in eval mode"
    return _finding("the model came in eval mode", fine, evidence)


def _pgd_of(protocol: Protocol, width: float) -> AttackSpec:
    """PGD as the protocol has it, or with its radius."""
    for spec in protocol.attacks:
        if spec.kind == "pgd" and (spec.steps or 0) > 1:
            return spec
    eps = max(spec.eps for spec in protocol.attacks)
    return AttackSpec(name="PGD-20", kind="pgd", eps=eps, step_size=min(eps, width) / 4, steps=20)


def _of_model(
    setting: Setting, block: Block, attack: AttackSpec, report: RobustnessReport | None
) -> Iterator[Finding]:
    x, (low, high) = block.x, setting.bounds
    inside = bool(((x >= low) & (x <= high)).all())
    least, most = _checks.shown(float(x.min()), low), _checks.shown(float(x.max()), high)
    evidence = f"values from {least} to {most}, bounds {low:g} to {high:g}"
    evidence += "" if inside else "; put normalisation inside the model"
    yield _finding("the images are inside the bounds", inside, evidence)
    once, twice = (
        torch.cat(setting.over(block, lambda batch: setting.logits(batch.x).float()))
        for _ in range(2)
    )
    apart = float((once - twice).abs().max())
    same = apart <= 1e-5 * (1 + float(once.abs().max()))
    evidence = f"logits of two passes over {len(block)} images differ by at most {apart:.1g}"
    yield _finding("the model is deterministic", same, evidence)
    # A sum of 1 alone can happen to logits; in [0, 1] as well it is a softmax.
    positive = bool(((once >= 0) & (once <= 1)).all())
    softmax = positive and bool(((once.sum(dim=1) - 1).abs() < 1e-4).all())
    evidence = f"values in [{once.min():.3g}, {once.max():.3g}]"
    if softmax:
        evidence = "all are in [0, 1] and sum to 1 per sample: a softmax is inside"
    yield _finding("the outputs are logits", not softmax, evidence)
    if not inside:
        yield _finding("the attacks work", None, "images outside the bounds cannot be attacked")
        return
    gradients = _gradients(setting, block)
    if gradients is None:
        evidence = "the logits have none: are they detached?"
        yield _finding("the gradients are not zero", False, evidence)
        yield _finding("the attacks work", None, "without gradients there is no attack")
        return
    yield gradients
    yield _rising(setting, block, attack)
    yield _falling(setting, block, attack)
    has_square = report is not None and any(m.endswith("/square") for m in _members(report))
    if not has_square and setting.bounds == (0.0, 1.0) and attack.eps > 0:
        yield _black_box(setting, block, attack)


def _gradients(setting: Setting, block: Block) -> Finding | None:
    """Share of images whose gradient is zero, so that it gives an attack no direction; None without gradients."""

    def zero(batch: Block) -> Tensor | None:
        leaf = batch.x.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = setting.shaped(ask(setting.model, leaf), len(batch))
            # As an attack does, to which a confident sample's gradient is not lost by rounding.
            seen = lifted(logits, batch.targets, of_cross_entropy)
            loss = cross_entropy(seen, batch.targets).sum()
            # A model that detaches its logits has no gradient to look at.
            if not loss.requires_grad:
                return None
            (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        return None if gradient is None else (gradient == 0).flatten(1).all(dim=1).cpu()

    found = setting.over(block, zero)
    parts = [part for part in found if part is not None]
    if len(parts) < len(found):
        return None
    # By class, because a share of all samples would hide a single class.
    y = block.targets.cpu()[torch.cat(parts)]
    counts = torch.bincount(block.targets.cpu(), minlength=setting.num_classes)
    share = torch.bincount(y, minlength=setting.num_classes) / counts
    worst = int(share.nan_to_num(nan=-1.0).argmax())
    evidence = (
        f"zero for {len(y)} of {len(block)} images; most in class {worst}, {share[worst]:.0%}"
    )
    return _finding("the gradients are not zero", float(share[worst]) <= ZERO_SHARE, evidence)


def _rising(setting: Setting, block: Block, attack: AttackSpec) -> Finding:
    """Mean loss along the attack's iterates."""
    steps = attack.steps or 0
    rng = torch.Generator().manual_seed(setting.seed)

    def along(batch: Block) -> Tensor:
        sums = torch.zeros(steps, device=batch.x.device)

        def watch(step: int, _: Tensor, logits: Any) -> None:
            sums[step] = cross_entropy(logits, batch.targets).sum()

        pgd(
            setting.model,
            batch.x,
            batch.targets,
            eps=attack.eps,
            step_size=attack.step_size or 0.0,
            steps=steps,
            bounds=setting.bounds,
            rng=rng,
            on_step=watch,
        )
        return sums

    loss = (torch.stack(setting.over(block, along)).sum(dim=0) / len(block)).tolist()
    shown = sorted({0, steps // 4, steps // 2, steps - 1})
    values = ", ".join(f"{loss[t]:.3g} at x^({t})" for t in shown)
    # One percent of slack: near a maximum the steps go back and forth.
    rises = loss[-1] > loss[0] and all(loss[t] <= loss[-1] * 1.01 + 1e-6 for t in shown)
    return _finding("the loss rises along the attack", rises, f"mean cross-entropy {values}")


def _falling(setting: Setting, block: Block, attack: AttackSpec) -> Finding:
    """Robust accuracy at growing radii, up to one at which every image can become any other."""
    # A little less than the whole width, of which an attack would warn.
    width = (setting.bounds[1] - setting.bounds[0]) * (1 - 1e-9)
    radii = sorted({min(width, factor * attack.eps) for factor in (1, 2, 4, 8)} | {width})
    accuracies = []
    # Any iterate counts, so that steps too large for the last one do not look like robustness.
    for eps in radii:
        spec = replace(attack, eps=eps, step_size=eps / 4, start="uniform", restarts=1, judge="any")
        found = attacked(setting, spec, block).predictions
        accuracies.append(float((found == block.targets.cpu()).double().mean()))
    falls = all(b <= a + 0.01 for a, b in pairwise(accuracies)) and accuracies[-1] <= 0.01
    evidence = ", ".join(f"{a:.1%} at {eps:.3g}" for a, eps in zip(accuracies, radii, strict=True))
    return _finding("robust accuracy falls to zero as the radius grows", falls, evidence)


def _black_box(setting: Setting, block: Block, attack: AttackSpec) -> Finding:
    """Square with few queries on what PGD and CW left; it climbs the margin, as CW does."""
    # Both attacks look at every sample, and only what withstood both is worth the queries.
    left = torch.ones(len(block), dtype=torch.bool, device="cpu")
    for spec in (attack, replace(attack, kind="cw")):
        left &= attacked(setting, spec, block).predictions == block.targets.cpu()
    rest, found = block[left.nonzero().squeeze(1)], 0
    if len(rest):
        x, y, model = rest.x, rest.targets, setting.model
        robust = square(model, x, y, eps=attack.eps, queries=QUERIES, seed=setting.seed)
        found = len(rest) - int(robust.sum())
    return _finding(
        "black-box Square finds nothing that gradients missed",
        _few(found, len(block)),
        f"{QUERIES} queries fooled {found} of the {len(rest)} images that PGD and CW left",
    )


def _members(report: RobustnessReport) -> list[str]:
    return [member for spec in report.protocol.attacks for member in report.members(spec.name)]


def _few(found: int, samples: int) -> bool:
    return found < max(2, math.ceil(SQUARE_SHARE * samples))


def _of_report(report: RobustnessReport) -> Iterator[Finding]:
    specs = report.protocol.attacks
    for weak, strong in product(specs, specs):
        if _weaker(weak, strong):
            yield _ordered(report, weak.name, strong.name)
    for name in (spec.name for spec in specs if spec.kind == "autoattack"):
        stages = report.stages[name]
        if "square" not in stages:
            continue
        by_square = report.targets[report.fooled_at[name] == stages.index("square")]
        by_class = torch.bincount(by_square, minlength=report.num_classes)
        most = int(by_class.argmax())
        yield _finding(
            f"{name}'s black-box Square finds nothing that its gradient attacks missed",
            _few(len(by_square), len(report)),
            f"it fooled {len(by_square)} of {len(report)} images after them; most in class "
            f"{report.class_names[most]}, {int(by_class[most])}",
        )


def _weaker(weak: AttackSpec, strong: AttackSpec) -> bool:
    """True if the second attack does all that the first does, and more."""
    if not weak.iterated or weak.eps > strong.eps:
        return False
    if strong.kind == "autoattack":
        # On survivors it cannot lose.
        return not strong.survivors
    mine, theirs = (weak.steps or 0, weak.restarts), (strong.steps or 0, strong.restarts)
    no_less = all(b >= a for a, b in zip(mine, theirs, strict=True))
    # Attacks that differ in kind are not ordered.
    return strong.kind == weak.kind and no_less and mine != theirs


def _ordered(report: RobustnessReport, weak: str, strong: str) -> Finding:
    one, two = report[weak], report[strong]
    only_weak = (~one.robust & two.robust).sum().reshape(1)
    only_strong = (one.robust & ~two.robust).sum().reshape(1)
    # Noise alone lets a weaker attack win by a few samples.
    p = float(mcnemar(only_weak, only_strong))
    doubtful = bool(only_weak > only_strong) and p < LEVEL
    return _finding(
        f"{strong} is at least as strong as {weak}",
        not doubtful,
        f"average {two.average:.2%} against {one.average:.2%}; {int(only_weak)} images fooled by {weak} alone, "
        f"{int(only_strong)} by {strong} alone, p {p:.2g}",
    )
