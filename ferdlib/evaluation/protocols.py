"""Evaluation protocols: named, frozen lists of attacks that say everything a number depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from ferdlib import _oldchecks as _checks
from ferdlib.attacks.autoattack import VERSIONS

Kind = Literal["pgd", "cw", "autoattack", "custom"]
# What each kind has beside a name and a radius.
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "pgd": ("step_size", "steps", "start", "restarts", "judge"),
    "cw": ("step_size", "steps", "start", "restarts", "judge", "confidence"),
    "autoattack": ("version", "batch_size", "survivors"),
    "custom": (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackSpec:
    r"""One attack of a protocol, with all its settings.

    Attributes:
        name: heading of its column, unique in the protocol.
        kind: "pgd" ascends the cross-entropy, "cw" the Carlini-Wagner margin (`losses.cw_margin`);
            "autoattack" is the official one; "custom" is a function that is given to `evaluate`.
        eps: radius of the L-infinity ball, in units of the images.
        step_size: step of "pgd" and "cw", same units.
        steps: how many steps; FGSM is "pgd" with one step of `eps`.
        start: where the steps begin: "uniform" in the ball, "normal" for 0.001 * N(0, 1), None for the
            image. Each sample has noise of its own, from the protocol's seed, the restart and the sample's
            index, so that batches and order do not matter.
        restarts: how many starts; a sample must withstand all of them.
        judge: "last" asks for the last iterate alone, as the papers do; "any" counts a sample as fooled if
            any of x^(0)..x^(K) is misclassified.
        confidence: $\kappa$ of "cw".
        version: of AutoAttack, "standard", "plus" or "rand".
        batch_size: of AutoAttack, whose noise depends on it.
        survivors: of AutoAttack: attack only what is classified correctly and withstood every attack before
            it in the protocol. Its column is then the worst case over the protocol up to it.

    Raises:
        TypeError, ValueError: on a setting of the wrong type or out of range, or one that the kind does not have.

    Example:
        >>> AttackSpec(name="PGD-50", kind="pgd", eps=8 / 255, step_size=1 / 255, steps=50, restarts=5).judge
        'last'
    """

    name: str
    kind: Kind
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

    def __post_init__(self) -> None:
        function = "AttackSpec"
        _checked_name(function, self.name)
        if self.name in ("clean", "worst case"):
            raise ValueError(
                f"{function}: expected another `name` than those that every report has, got {self.name!r}"
            )
        _checks.choice(function, "kind", self.kind, ("pgd", "cw", "autoattack", "custom"))
        _checks.number(function, "eps", self.eps, low=0.0, open_low=self.kind == "autoattack")
        if self.iterated:
            _checks.number(function, "step_size", self.step_size, low=0.0)
            _checks.integer(function, "steps", self.steps, low=1)
        _checks.choice(function, "start", self.start, ("uniform", "normal", None))
        _checks.integer(function, "restarts", self.restarts, low=1)
        _checks.choice(function, "judge", self.judge, ("last", "any"))
        _checks.number(function, "confidence", self.confidence, low=0.0)
        _checks.choice(function, "version", self.version, tuple(VERSIONS))
        _checks.integer(function, "batch_size", self.batch_size, low=1)
        _checks.choice(function, "survivors", self.survivors, (False, True))
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name not in ("name", "kind", "eps", *SETTINGS[self.kind]) and (
                value != setting.default
            ):
                raise ValueError(
                    f"{function}: expected no `{setting.name}` for kind {self.kind!r}, got {value!r}"
                )

    @property
    def iterated(self) -> bool:
        """Whether it is an ascent of this library, step by step."""
        return self.kind in ("pgd", "cw")

    def __str__(self) -> str:
        if self.kind == "autoattack":
            detail = f"AutoAttack {self.version}, batches of {self.batch_size}"
            detail += ", on what withstood all before" if self.survivors else ""
        elif self.kind == "custom":
            detail = "a function of the user"
        else:
            loss = "cross-entropy" if self.kind == "pgd" else f"CW margin, κ {self.confidence:g}"
            plural = "s" if self.steps != 1 else ""
            begin = {
                "uniform": "uniform start",
                "normal": "start of 0.001 N(0, 1)",
                None: "no start",
            }
            detail = f"{loss}, {self.steps} step{plural} of {_pixels(self.step_size or 0.0)}"
            detail += f", {begin[self.start]}"
            detail += f", {self.restarts} restarts" if self.restarts > 1 else ""
            detail += ", any iterate" if self.judge == "any" else ""
        return f"{self.name}: eps {_pixels(self.eps)}, {detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """A named list of attacks and the seed of their noise: what a reader needs to repeat a number.

    Attributes:
        name: of the protocol.
        attacks: at least one, from weak to strong: the first that fools a sample is its winner.
        seed: of all noise, >= 0.

    Raises:
        TypeError, ValueError: no attacks, two of one name, or settings of the wrong type.

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

    def __post_init__(self) -> None:
        function = "Protocol"
        _checked_name(function, self.name)
        attacks = self.attacks
        if not isinstance(attacks, tuple) or not all(isinstance(a, AttackSpec) for a in attacks):
            raise TypeError(
                f"{function}: expected `attacks` to be a tuple of AttackSpec, got {_checks.got(attacks)}"
            )
        names = [attack.name for attack in attacks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{function}: expected `attacks` of different names, got {names}")
        sizes = {attack.batch_size for attack in attacks if attack.kind == "autoattack"}
        if len(sizes) > 1:
            raise ValueError(
                f"{function}: expected one `batch_size` for all AutoAttacks, got {sorted(sizes)}"
            )
        _checks.integer(function, "seed", self.seed, low=0)

    def at(self, *, eps: float) -> Protocol:
        """The same attacks at another radius, their steps in proportion."""
        _checks.number("Protocol.at", "eps", eps, low=0.0, open_low=True)

        def scaled(attack: AttackSpec) -> AttackSpec:
            if attack.step_size is None:
                return replace(attack, eps=eps)
            if attack.eps == 0:
                raise ValueError(
                    f"Protocol.at: expected attacks with an `eps` to scale, got 0 in {attack.name!r}"
                )
            return replace(attack, eps=eps, step_size=attack.step_size / attack.eps * eps)

        attacks = tuple(scaled(attack) for attack in self.attacks)
        return replace(self, name=f"{self.name}, eps {_pixels(eps)}", attacks=attacks)

    def without(self, *names: str) -> Protocol:
        """The same without some attacks."""
        for name in names:
            _checks.choice("Protocol.without", "names", name, [a.name for a in self.attacks])
        return replace(
            self,
            name=", ".join([self.name, *(f"without {name}" for name in names)]),
            attacks=tuple(attack for attack in self.attacks if attack.name not in names),
        )

    def on_survivors(self) -> Protocol:
        """The same with AutoAttack only on what withstood the attacks before it."""
        if not any(attack.kind == "autoattack" for attack in self.attacks):
            raise ValueError(
                f"Protocol.on_survivors: expected a protocol with an AutoAttack, got {self.name!r}"
            )
        return replace(
            self,
            name=f"{self.name}, AutoAttack on survivors",
            attacks=tuple(
                replace(attack, survivors=True) if attack.kind == "autoattack" else attack
                for attack in self.attacks
            ),
        )

    def with_seed(self, seed: int) -> Protocol:
        """The same with other noise."""
        return replace(self, seed=seed)

    def __str__(self) -> str:
        lines = [f"{self.name} (seed {self.seed})", *(f"  {attack}" for attack in self.attacks)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "seed": self.seed,
            "attacks": [asdict(attack) for attack in self.attacks],
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Protocol:
        """What `to_dict` gave.

        Raises:
            TypeError, ValueError: something else.
        """
        function = "Protocol.from_dict"
        _checks.mapping(function, "content", content, ("name", "seed", "attacks"))
        known = {field.name for field in fields(AttackSpec)}
        attacks = []
        for entry in content["attacks"]:
            if not isinstance(entry, Mapping):
                raise TypeError(
                    f"{function}: expected `content['attacks']` to be of dicts, got {_checks.got(entry)}"
                )
            if entry.keys() - known:
                raise ValueError(
                    f"{function}: expected the settings {sorted(known)} of an attack, got also "
                    f"{sorted(entry.keys() - known)}"
                )
            attacks.append(AttackSpec(**entry))
        return Protocol(name=content["name"], attacks=tuple(attacks), seed=content["seed"])


def _checked_name(function: str, name: object) -> None:
    if not isinstance(name, str) or not name.strip():
        raise TypeError(f"{function}: expected `name` to be a word, got {_checks.got(name)}")


def _pixels(value: float) -> str:
    """A radius as its author would write it: 8/255, or 0.031."""
    whole = round(value * 255)
    return f"{whole}/255" if whole and abs(value * 255 - whole) < 1e-9 else f"{value:g}"


_FGSM = AttackSpec(name="FGSM", kind="pgd", eps=8 / 255, step_size=8 / 255, steps=1, start="normal")
_PGD = AttackSpec(name="PGD-20", kind="pgd", eps=8 / 255, step_size=2 / 255, steps=20)
_CW = AttackSpec(name="CW-inf", kind="cw", eps=8 / 255, step_size=2 / 255, steps=20)
_AUTOATTACK = AttackSpec(name="AutoAttack", kind="autoattack", eps=8 / 255)

PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="fair-ard", attacks=(_FGSM, _PGD, _CW, _AUTOATTACK)),
        Protocol(
            name="ferd",
            attacks=(replace(_FGSM, start=None), _PGD, _CW, _AUTOATTACK),
        ),
        Protocol(
            name="trades",
            attacks=(replace(_PGD, eps=0.031, step_size=0.003),),
        ),
        Protocol(name="robustbench", attacks=(_AUTOATTACK,)),
        Protocol(
            name="quick",
            attacks=(replace(_FGSM, start=None), replace(_PGD, name="PGD-10", steps=10)),
        ),
    )
}
"""The protocols that `evaluate` knows by name.

- `"fair-ard"`: Fair-ARD's evaluation code: FGSM from a start of 0.001 N(0, 1), PGD-20 and CW-inf with steps of
  2/255, all at 8/255; and the official AutoAttack, where that code ran another one.
- `"ferd"`: FERD section 5.1, which names the attacks FGSM, PGD-20, CW-inf and AutoAttack and not their settings:
  textbook FGSM, the rest as in `"fair-ard"`.
- `"trades"`: TRADES' evaluation: PGD-20 at 0.031 with steps of 0.003.
- `"robustbench"`: AutoAttack at 8/255, the leaderboard's number, class by class.
- `"quick"`: FGSM and PGD-10, for a look during training; not for publication.
"""


def resolve_protocol(function: str, protocol: object) -> Protocol:
    """A protocol, or the one of that name."""
    if isinstance(protocol, str):
        _checks.choice(function, "protocol", protocol, tuple(PROTOCOLS))
        return PROTOCOLS[protocol]
    if not isinstance(protocol, Protocol):
        raise TypeError(
            f"{function}: expected `protocol` to be a Protocol or the name of one, got "
            f"{_checks.got(protocol)}"
        )
    return protocol
