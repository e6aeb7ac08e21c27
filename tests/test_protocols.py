"""Protocols: what the named ones do, written out from the papers' codes, and how they are changed."""

import json
from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from ferdlib.evaluation import PROTOCOLS, AttackSpec, Protocol

PIXEL = 1 / 255
FGSM = {"kind": "pgd", "eps": 8 * PIXEL, "step_size": 8 * PIXEL, "steps": 1}
PGD_20 = {"kind": "pgd", "eps": 8 * PIXEL, "step_size": 2 * PIXEL, "steps": 20, "start": "uniform"}
CW = {**PGD_20, "kind": "cw", "confidence": 50.0}
AUTOATTACK = {"kind": "autoattack", "eps": 8 * PIXEL, "version": "standard", "batch_size": 250}

# Fair-ARD's eval.py; FERD's names with the textbook's FGSM; TRADES' pgd_attack_cifar10.py.
WRITTEN_OUT = {
    "fair-ard": {
        "FGSM": {**FGSM, "start": "normal"},
        "PGD-20": PGD_20,
        "CW-inf": CW,
        "AutoAttack": AUTOATTACK,
    },
    "ferd": {
        "FGSM": {**FGSM, "start": None},
        "PGD-20": PGD_20,
        "CW-inf": CW,
        "AutoAttack": AUTOATTACK,
    },
    "trades": {
        "PGD-20": {"kind": "pgd", "eps": 0.031, "step_size": 0.003, "steps": 20, "start": "uniform"}
    },
    "robustbench": {"AutoAttack": AUTOATTACK},
    "quick": {
        "FGSM": {**FGSM, "start": None},
        "PGD-10": {**PGD_20, "steps": 10},
    },
}


def test_the_named_protocols_are_pinned():
    assert list(PROTOCOLS) == list(WRITTEN_OUT)
    for name, attacks in WRITTEN_OUT.items():
        protocol = PROTOCOLS[name]
        assert (protocol.name, protocol.seed) == (name, 0)
        assert [attack.name for attack in protocol.attacks] == list(attacks)
        for attack in protocol.attacks:
            wanted = {"name": attack.name, "step_size": None, "steps": None, "start": "uniform"}
            wanted |= {"restarts": 1, "judge": "last", "confidence": 50.0}
            wanted |= {"version": "standard", "batch_size": 250, "survivors": False}
            wanted |= attacks[attack.name]
            assert asdict(attack) == wanted


def test_protocols_are_values():
    one, two = PROTOCOLS["quick"], Protocol.from_dict(PROTOCOLS["quick"].to_dict())
    assert one == two
    assert hash(one) == hash(two)
    assert len({*PROTOCOLS.values(), two}) == 5
    assert len({attack for p in PROTOCOLS.values() for attack in p.attacks}) == 7
    for value, name in ((one, "seed"), (one.attacks[0], "eps")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, 1)


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_there_and_back_in_plain_values(name):

    protocol = PROTOCOLS[name].with_seed(7).at(eps=0.02)
    content = json.loads(json.dumps(protocol.to_dict()))
    assert Protocol.from_dict(content) == protocol
    assert content["seed"] == 7


def test_another_radius_keeps_the_proportions():
    half = PROTOCOLS["fair-ard"].at(eps=4 / 255)
    assert half.name == "fair-ard, eps 4/255"
    steps = {
        a.name: (a.eps * 255, a.step_size and a.step_size * 255, a.steps) for a in half.attacks
    }
    assert steps == {
        "FGSM": (pytest.approx(4), pytest.approx(4), 1),
        "PGD-20": (pytest.approx(4), pytest.approx(1), 20),
        "CW-inf": (pytest.approx(4), pytest.approx(1), 20),
        "AutoAttack": (pytest.approx(4), None, None),
    }
    assert PROTOCOLS["trades"].at(eps=0.062).attacks[0].step_size == pytest.approx(0.006)
    assert PROTOCOLS["quick"].at(eps=8 / 255).attacks == PROTOCOLS["quick"].attacks


def test_fewer_attacks_and_another_seed():
    protocol = PROTOCOLS["fair-ard"]
    fewer = protocol.without("AutoAttack", "FGSM")
    assert fewer.attacks == protocol.attacks[1:3]
    assert fewer.name == "fair-ard, without AutoAttack, without FGSM"
    other = protocol.with_seed(3)
    assert (other.seed, other.attacks, other.name) == (3, protocol.attacks, "fair-ard")
    assert PROTOCOLS["fair-ard"].seed == 0


def test_protocols_can_be_read():
    lines = str(PROTOCOLS["fair-ard"].at(eps=4 / 255).with_seed(2)).splitlines()
    assert lines == [
        "fair-ard, eps 4/255 (seed 2)",
        "  FGSM: eps 4/255, cross-entropy, 1 step of 4/255, start of 0.001 N(0, 1)",
        "  PGD-20: eps 4/255, cross-entropy, 20 steps of 1/255, uniform start",
        "  CW-inf: eps 4/255, CW margin, confidence 50, 20 steps of 1/255, uniform start",
        "  AutoAttack: eps 4/255, AutoAttack standard, batches of 250",
    ]
    assert "eps 0.031, cross-entropy, 20 steps of 0.003" in str(PROTOCOLS["trades"])
    many = AttackSpec(name="a", **{**PGD_20, "restarts": 5, "judge": "any", "start": None})
    assert str(many).endswith("20 steps of 2/255, no start, 5 restarts, any iterate")


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"name": ""}, TypeError, "name"),
        ({"name": "clean"}, ValueError, "name"),
        ({"name": "worst case"}, ValueError, "name"),
        ({"step_size": None}, TypeError, "step_size"),
        ({"steps": 0}, ValueError, "steps"),
        ({"confidence": 1.0}, ValueError, "confidence"),
        ({"version": "rand"}, ValueError, "version"),
        ({"batch_size": 1}, ValueError, "batch_size"),
        ({"survivors": True}, ValueError, "survivors"),
        ({"kind": "cw", "confidence": -1.0}, ValueError, "confidence"),
    ],
)
def test_errors_name_the_setting(change, error, argument):
    with pytest.raises(error, match=f"^AttackSpec: expected .*`{argument}`"):
        AttackSpec(**({"name": "PGD", **PGD_20} | change))


@pytest.mark.parametrize("kind", ["autoattack", "custom"])
@pytest.mark.parametrize(
    "change",
    [{"step_size": 0.1}, {"steps": 5}, {"start": None}, {"restarts": 2}, {"judge": "any"}],
    ids=lambda change: next(iter(change)),
)
def test_settings_that_would_do_nothing_are_refused(kind, change):
    (name,) = change
    with pytest.raises(ValueError, match=f"^AttackSpec: expected no `{name}` for kind '{kind}'"):
        AttackSpec(name="a", kind=kind, eps=0.1, **change)


def test_autoattack_needs_a_radius():
    with pytest.raises(ValueError, match="^AttackSpec: expected `eps`"):
        AttackSpec(name="a", kind="autoattack", eps=0.0)
    assert AttackSpec(**{"name": "a", **PGD_20, "eps": 0}).eps == 0
    for version in ("standard", "plus", "rand"):
        assert AttackSpec(name="a", kind="autoattack", eps=0.1, version=version).version == version


def test_autoattacks_share_their_batches():
    """They are the blocks of the evaluation."""
    attacks = tuple(
        AttackSpec(name=f"AA {n}", kind="autoattack", eps=0.1, batch_size=n) for n in (100, 250)
    )
    with pytest.raises(ValueError, match="^Protocol: expected one `batch_size`.* got .100, 250"):
        replace(PROTOCOLS["quick"], attacks=attacks)


def test_errors_of_changes():
    quick = PROTOCOLS["quick"]
    with pytest.raises(ValueError, match="^Protocol.at: expected `eps`"):
        quick.at(eps=0.0)
    still = replace(quick, attacks=(AttackSpec(**{"name": "a", **PGD_20, "eps": 0.0}),))
    with pytest.raises(ValueError, match="^Protocol.at: expected attacks with an `eps` to scale"):
        still.at(eps=0.1)
    with pytest.raises(ValueError, match="^Protocol.without: expected `names` to be one of 'FGSM'"):
        quick.without("PGD-20")
    with pytest.raises(ValueError, match="^Protocol: expected `attacks`"):
        quick.without("FGSM", "PGD-10")
    content = quick.to_dict()
    content["attacks"][0]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"^Protocol.from_dict: .* got also \['momentum'\]"):
        Protocol.from_dict(content)
