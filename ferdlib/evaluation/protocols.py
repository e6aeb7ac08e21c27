"""Evaluation protocols: named, frozen lists of attacks that say everything a number depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from ferdlib import _checks
from ferdlib._checks import InvalidType, InvalidValue, got, public
from ferdlib.attacks.autoattack import VERSIONS

# Settings of each kind beside a name and a radius.
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "pgd": ("step_size", "steps", "start", "restarts", "judge"),
    "cw": ("step_size", "steps", "start", "restarts", "judge", "confidence"),
    "autoattack": ("version", "batch_size", "survivors"),
    "custom": (),
}
STARTS = {"uniform": "uniform start", "normal": "start of 0.001 N(0, 1)", None: "no start"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackSpec:
    r"""One attack of a protocol, with all its settings.

    Attributes:
        name: heading of its column, unique in the protocol.
        kind: "pgd" ascends the cross-entropy, "cw" the Carlini-Wagner margin (`losses.cw_margin`);
            "autoattack" is the official one; "custom" is a function that is given to `evaluate`.
        eps: radius of the L-infinity ball, in units of the images.
        step_size: step of "pgd" and "cw", same units.
        steps: number of steps; FGSM is "pgd" with one step of `eps`.
        start: of the steps: "uniform" in the ball, "normal" for 0.001 * N(0, 1), None for the image. Each sample
            has noise of its own, from the protocol's seed, the restart and the sample's index, so that batches
            and order do not matter.
        restarts: number of starts; a sample must withstand all of them.
        judge: "last" asks for the last iterate alone, as the papers do; "any" counts a sample as fooled if any
            of x^(0)..x^(K) is misclassified.
        confidence: $\kappa$ of "cw".
        version: of AutoAttack, "standard", "plus" or "rand".
        batch_size: of AutoAttack, whose noise depends on it.
        survivors: of AutoAttack: attack only what is classified correctly and withstood every attack before it
            in the protocol. Its column is then the worst case over the protocol up to it.

    A setting that the kind does not have is refused: it would suggest an attack that was not run.

    Example:
        >>> AttackSpec(name="PGD-50", kind="pgd", eps=8 / 255, step_size=1 / 255, steps=50, restarts=5).judge
        'last'
    """

    name: str
    kind: Literal["pgd", "cw", "autoattack", "custom"]
    eps: float
    step_size: float | None = None
    steps: int | None = None
    start: Literal["uniform", "normal"] | None = "uniform"
    restarts: int = 1
    judge: Literal["last", "any"] = "last"
    confidence: float = 50.0
    version: Literal["standard", "plus", "rand"] = "standard"
    batch_size: int = 250
    survivors: bool = False

    @public
    def __post_init__(self) -> None:
        _checks.settle(self)
        _check_name(self.name)
        if self.name in ("clean", "worst case"):
            wanted = "another `name` than those that every report has"
            raise InvalidValue(f"expected {wanted}, got {self.name!r}")
        _checks.choice(tuple(SETTINGS), kind=self.kind)
        _checks.real(0, eps=self.eps, confidence=self.confidence)
        if self.kind == "autoattack":
            _checks.positive(eps=self.eps)
        if self.iterated:
            _checks.real(0, step_size=self.step_size)
            _checks.integer(1, steps=self.steps)
        _checks.choice(tuple(STARTS), start=self.start)
        _checks.choice(("last", "any"), judge=self.judge)
        _checks.choice(tuple(VERSIONS), version=self.version)
        _checks.choice((False, True), survivors=self.survivors)
        _checks.integer(1, restarts=self.restarts, batch_size=self.batch_size)
        for setting in fields(self):
            value = getattr(self, setting.name)
            known = setting.name in ("name", "kind", "eps", *SETTINGS[self.kind])
            if not known and value != setting.default:
                wanted = f"no `{setting.name}` for kind {self.kind!r}"
                raise InvalidValue(f"expected {wanted}, got {value!r}")

    @property
    def iterated(self) -> bool:
        """True for an ascent of this library, step by step."""
        return self.kind in ("pgd", "cw")

    def __str__(self) -> str:
        if self.kind == "autoattack":
            details = [f"AutoAttack {self.version}, batches of {self.batch_size}"]
            details += ["on what withstood all before"] * self.survivors
        elif self.kind == "custom":
            details = ["a function of the user"]
        else:
            loss = (
                "cross-entropy"
                if self.kind == "pgd"
                else f"CW margin, confidence {self.confidence:g}"
            )
            plural = "s" if self.steps != 1 else ""
            details = [loss, f"{self.steps} step{plural} of {_pixels(self.step_size or 0.0)}"]
            details += [STARTS[self.start]]
            details += [f"{self.restarts} restarts"] * (self.restarts > 1)
            details += ["any iterate"] * (self.judge == "any")
        return f"{self.name}: eps {_pixels(self.eps)}, {', '.join(details)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """A named list of attacks and the seed of their noise: everything that a reader needs to repeat a number.

    Attributes:
        name: of the protocol.
        attacks: at least one, from weak to strong: the first that fools a sample is its winner.
        seed: of all noise, >= 0.

    Example:
        >>> mine = PROTOCOLS["fair-ard"].at(eps=4 / 255).without("AutoAttack")
        >>> [attack.name for attack in mine.attacks]
        ['FGSM', 'PGD-20', 'CW-inf']
        >>> mine.name
        'fair-ard, eps 4/255, without AutoAttack'
    """

    name: str
    attacks: tuple[AttackSpec, ...]
    seed: int = 0

    @public
    def __post_init__(self) -> None:
        _checks.settle(self)
        _check_name(self.name)
        attacks = self.attacks
        if not isinstance(attacks, tuple) or not all(isinstance(a, AttackSpec) for a in attacks):
            raise InvalidType(f"expected `attacks` to be a tuple of AttackSpec, got {got(attacks)}")
        names = [attack.name for attack in attacks]
        if not names or len(set(names)) < len(names):
            raise InvalidValue(f"expected `attacks` of different names, got {names}")
        # AutoAttack's batches are the blocks of an evaluation, of which there is one size.
        sizes = {attack.batch_size for attack in attacks if attack.kind == "autoattack"}
        if len(sizes) > 1:
            came = sorted(sizes)
            raise InvalidValue(f"expected one `batch_size` for all AutoAttacks, got {came}")
        _checks.integer(0, seed=self.seed)

    @public
    def at(self, *, eps: float) -> Protocol:
        """The same attacks at another radius, their steps in proportion."""
        _checks.positive(eps=eps)
        attacks = []
        for attack in self.attacks:
            step = attack.step_size
            if step is not None:
                if attack.eps == 0:
                    came = f"0 in {attack.name!r}"
                    raise InvalidValue(f"expected attacks with an `eps` to scale, got {came}")
                step = step / attack.eps * eps
            attacks.append(replace(attack, eps=eps, step_size=step))
        return replace(self, name=f"{self.name}, eps {_pixels(eps)}", attacks=tuple(attacks))

    @public
    def without(self, *names: str) -> Protocol:
        """The same without some attacks."""
        for name in names:
            _checks.choice([a.name for a in self.attacks], names=name)
        left = tuple(attack for attack in self.attacks if attack.name not in names)
        name = ", ".join([self.name, *(f"without {name}" for name in names)])
        return replace(self, name=name, attacks=left)

    @public
    def on_survivors(self) -> Protocol:
        """The same with AutoAttack only on what withstood the attacks before it."""
        if not any(attack.kind == "autoattack" for attack in self.attacks):
            raise InvalidValue(f"expected a protocol with an AutoAttack, got {self.name!r}")
        attacks = tuple(replace(a, survivors=a.kind == "autoattack") for a in self.attacks)
        return replace(self, name=f"{self.name}, AutoAttack on survivors", attacks=attacks)

    @public
    def with_seed(self, seed: int) -> Protocol:
        """The same with other noise."""
        return replace(self, seed=seed)

    def __str__(self) -> str:
        return "\n  ".join([f"{self.name} (seed {self.seed})", *map(str, self.attacks)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        attacks = [asdict(attack) for attack in self.attacks]
        return {"name": self.name, "seed": self.seed, "attacks": attacks}

    @staticmethod
    @public
    def from_dict(content: Mapping[str, Any]) -> Protocol:
        """Read what `to_dict` gave; TypeError or ValueError for something else."""
        _checks.keys(("name", "seed", "attacks"), content=content)
        # An older report may lack a setting, which then has its default; one that is unknown may matter.
        known = {field.name for field in fields(AttackSpec)}
        for entry in content["attacks"]:
            if not isinstance(entry, Mapping):
                raise InvalidType(f"expected `content['attacks']` to be of dicts, got {got(entry)}")
            if more := sorted(entry.keys() - known):
                settings = f"the settings {sorted(known)} of an attack"
                raise InvalidValue(f"expected {settings}, got also {more}")
        attacks = tuple(AttackSpec(**entry) for entry in content["attacks"])
        return Protocol(name=content["name"], attacks=attacks, seed=content["seed"])


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name.strip():
        raise InvalidType(f"expected `name` to be a word, got {got(name)}")


def _pixels(value: float) -> str:
    """Write a radius as its author would: 8/255, or 0.031."""
    whole = round(value * 255)
    return f"{whole}/255" if whole and abs(value * 255 - whole) < 1e-9 else f"{value:g}"


_FGSM = AttackSpec(name="FGSM", kind="pgd", eps=8 / 255, step_size=8 / 255, steps=1, start=None)
_PGD = AttackSpec(name="PGD-20", kind="pgd", eps=8 / 255, step_size=2 / 255, steps=20)
_CW = AttackSpec(name="CW-inf", kind="cw", eps=8 / 255, step_size=2 / 255, steps=20)
_AUTOATTACK = AttackSpec(name="AutoAttack", kind="autoattack", eps=8 / 255)
PROTOCOLS: Mapping[str, Protocol] = {
    name: Protocol(name=name, attacks=attacks)
    for name, attacks in {
        "fair-ard": (replace(_FGSM, start="normal"), _PGD, _CW, _AUTOATTACK),
        "ferd": (_FGSM, _PGD, _CW, _AUTOATTACK),
        "trades": (replace(_PGD, eps=0.031, step_size=0.003),),
        "robustbench": (_AUTOATTACK,),
        "quick": (_FGSM, replace(_PGD, name="PGD-10", steps=10)),
    }.items()
}
"""The protocols that `evaluate` knows by name.

- `"fair-ard"`: Fair-ARD's evaluation code: FGSM from a start of 0.001 N(0, 1), PGD-20 and CW-inf with steps of
  2/255, all at 8/255; and the official AutoAttack, where that code ran another one.
- `"ferd"`: FERD section 5.1, which names the attacks FGSM, PGD, CW-inf and AutoAttack and not their settings:
  textbook FGSM, the rest as in `"fair-ard"`.
- `"trades"`: TRADES' evaluation: PGD-20 at 0.031 with steps of 0.003.
- `"robustbench"`: AutoAttack at 8/255, the leaderboard's number, class by class.
- `"quick"`: FGSM and PGD-10, for a look during training; not for publication.
"""


def resolve_protocol(protocol: object) -> Protocol:
    """Return a protocol, or the one of that name."""
    if isinstance(protocol, str):
        _checks.choice(tuple(PROTOCOLS), protocol=protocol)
        return PROTOCOLS[protocol]
    if not isinstance(protocol, Protocol):
        wanted = "a Protocol or the name of one"
        raise InvalidType(f"expected `protocol` as {wanted}, got {got(protocol)}")
    return protocol
