"""Each trust check both ways: on a model made to fail it, and on honest ones that must not be blamed."""

from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_model
from torch import nn

from ferdlib.evaluation import (
    AttackSpec,
    Finding,
    Protocol,
    RobustnessReport,
    evaluate,
    trust_checks,
)
from ferdlib.evaluation.samples import Block
from ferdlib.evaluation.trust import FewOfEach

K = 3
SMALL = Protocol(
    name="small",
    attacks=(AttackSpec(name="PGD", kind="pgd", eps=0.03, step_size=0.01, steps=8),),
)

EVAL = "the model came in eval mode"
BOUNDS = "the images are inside the bounds"
DETERMINISTIC = "the model is deterministic"
LOGITS = "the outputs are logits"
GRADIENTS = "the gradients are not zero"
RISING = "the loss rises along the attack"
FALLING = "robust accuracy falls to zero as the radius grows"
ALL = {EVAL, BOUNDS, DETERMINISTIC, LOGITS, GRADIENTS, RISING, FALLING}


def black_box(findings):
    return next(f for f in findings if f.check.startswith("black-box Square finds nothing that"))


def doubtful(findings):
    """Those in doubt, which come first."""
    found = [f.check for f in findings if f.verdict == "doubtful"]
    assert found == [f.check for f in findings[: len(found)]]
    return set(found)


def images(n=48, size=6, dtype=torch.float32):
    return torch.rand(n, 2, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def check(model, x=None, protocol=SMALL, **settings):
    """On images that the model takes for what they are labelled."""
    x = images() if x is None else x
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        y = model(x).argmax(dim=1)
    return trust_checks(
        model, (x, y), protocol, num_classes=settings.pop("num_classes", K), **settings
    )


class Changed(nn.Module):
    """A tiny model, and what is made of its images and its logits."""

    def __init__(self, images=None, logits=None, num_classes=K):
        super().__init__()
        self.inner = make_tiny_model(num_classes)
        self.images, self.logits = images, logits
        self.eval()

    def forward(self, x):
        z = self.inner(x if self.images is None else self.images(x))
        return z if self.logits is None else self.logits(z)


def linear(num_classes, seed, size=6):
    rng = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * size * size, num_classes)).eval()
    weight = torch.randn(model[1].weight.shape, generator=rng)
    model[1].weight.data, model[1].bias.data = weight, -0.5 * weight.sum(dim=1)
    return model


def trained(adversarial):
    """A few steps on two blobs of brightness, with FGSM or without."""
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    x = (0.3 + 0.4 * y[:, None, None, None] + 0.1 * torch.randn(60, 2, 6, 6, generator=rng)).clamp(
        0, 1
    )
    model = make_tiny_model(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        x_adv = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x_adv), y), x_adv)
        moved = (x + 0.03 * gradient.sign()).clamp(0, 1) if adversarial else x
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(moved), y).backward()
        optimizer.step()
    assert (model(x).argmax(dim=1) == y).float().mean() > 0.9
    return model, x, y


@pytest.mark.parametrize(
    "model",
    [
        *(linear(k, seed) for k in (2, 3, 10) for seed in range(2)),
        *(make_tiny_model(k, seed=seed) for k in (3, 10) for seed in range(2)),
        make_tiny_model(3).double(),
    ],
)
def test_honest_models_are_not_blamed(model):
    dtype = next(model.parameters()).dtype
    num_classes = model[-1].out_features
    findings = check(model, images(dtype=dtype), num_classes=num_classes)
    assert doubtful(findings) == set()
    assert {f.check for f in findings} == ALL | {black_box(findings).check}
    assert {f.verdict for f in findings} == {"fine"}


@pytest.mark.parametrize("adversarial", [False, True], ids=["standard", "adversarial"])
def test_trained_models_are_not_blamed(adversarial):
    model, x, y = trained(adversarial)
    report = evaluate(model, (x, y), "quick", num_classes=2, trust=True)
    assert doubtful(report.findings) == set()
    assert any("PGD-10 is at least as strong as FGSM" in f.check for f in report.findings)
    assert report["clean"].average > 0.9


def test_a_softmax():
    assert LOGITS in doubtful(check(Changed(logits=lambda z: z.softmax(dim=1))))


def test_noise():
    found = check(Changed(logits=lambda z: z + 0.1 * torch.randn_like(z)))
    assert DETERMINISTIC in doubtful(found)


def test_train_mode():
    model = make_tiny_model(K)
    model[4].train()
    findings = trust_checks(model, (images(), torch.arange(48) % K), SMALL, num_classes=K)
    assert EVAL in doubtful(findings)
    assert "1 modules were in train mode, '4' first" in findings[0].evidence
    assert [m.training for m in model].count(True) == 1
    assert EVAL in doubtful(check(lambda x: model(x)))
    hidden = {"net": model.eval()}
    (modes,) = (f for f in check(lambda x: hidden["net"](x)) if f.check == EVAL)
    assert modes.verdict == "not checked"


def test_images_outside_the_bounds():
    findings = check(make_tiny_model(K), 2 * images() - 1)
    assert doubtful(findings) == {BOUNDS}
    assert "put normalisation inside the model" in findings[0].evidence
    assert [f.check for f in findings if f.verdict == "not checked"] == ["the attacks work"]
    inside = check(make_tiny_model(K), 2 * images() - 1, bounds=(-1.0, 1.0))
    assert BOUNDS not in doubtful(inside)
    assert not any("Square" in f.check for f in inside)  # which knows only (0, 1)


def stairs(x):
    return (16 * x).round() / 16


def test_zero_gradients():
    found = check(Changed(images=stairs))
    assert {GRADIENTS, RISING, FALLING} <= doubtful(found)
    assert black_box(found).verdict == "doubtful"
    assert "zero for 48 of 48 images" in next(f for f in found if f.check == GRADIENTS).evidence


def test_gradients_of_one_class_are_zero():
    """Rounded logits where class 1 wins, two images of 48, which a share of all of them would hide."""

    def rounded(z):
        wins = z.argmax(dim=1, keepdim=True) == 1
        return torch.where(wins, z.detach().round() + 0 * z, z)

    model, x = Changed(logits=rounded), images(200)
    with torch.no_grad():
        classes = model(x).argmax(dim=1)
    x = torch.cat([x[classes == 1][:2], x[classes != 1][:46]])
    findings = check(model, x)
    assert GRADIENTS in doubtful(findings)
    evidence = next(f for f in findings if f.check == GRADIENTS).evidence
    assert evidence == "zero for 2 of 48 images; most in class 1, 100%"


def test_no_gradients_at_all():
    for model in (Changed(logits=torch.Tensor.detach), lambda x: make_tiny_model(K)(x.detach())):
        findings = check(model)
        assert doubtful(findings) == {GRADIENTS}
        assert "the attacks work" in {f.check for f in findings if f.verdict == "not checked"}


class Decoy(Changed):
    """Quantised, with a gradient that leads the wrong way."""

    def forward(self, x):
        away = self.inner(x)
        return self.inner(stairs(x)).detach() - (away - away.detach())


def test_masked_gradients():
    """PGD is led astray: its loss does not rise, no radius helps it, and Square does better."""
    found = check(Decoy())
    assert doubtful(found) == {RISING, FALLING, black_box(found).check}
    fine = check(Changed())
    assert black_box(fine).verdict == "fine"


def test_a_radius_that_changes_nothing():
    """Whatever the image, class 0; robust accuracy never rises, and never falls either."""
    found = check(Changed(logits=lambda z: z - z.detach() + torch.tensor([1.0, 0, 0])))
    assert FALLING in doubtful(found)
    evidence = next(f for f in found if f.check == FALLING).evidence
    assert evidence.count("100.0% at") == 5
    assert evidence.endswith("100.0% at 1")


def test_square_is_left_to_the_report_that_has_it():
    x, model = images(6), Changed()
    y = model(x).argmax(dim=1).detach()
    both = Protocol(
        name="both", attacks=(*SMALL.attacks, AttackSpec(name="AA", kind="autoattack", eps=0.9))
    )
    findings = evaluate(model, (x, y), both, num_classes=K, trust=True).findings
    checks = {f.check for f in findings}
    assert not any(check.startswith("black-box") for check in checks)
    assert "AA is at least as strong as PGD" in checks
    assert "AA's black-box Square finds nothing that its gradient attacks missed" in checks


def test_an_attack_of_ones_own_named_square_is_not_autoattacks():
    x, model = images(6), Changed()
    own = Protocol(name="own", attacks=(AttackSpec(name="square", kind="custom", eps=0.9),))
    report = evaluate(
        model,
        (x, torch.arange(6) % K),
        own,
        num_classes=K,
        custom={"square": lambda m, x, y: x},
        trust=True,
    )
    assert black_box(report.findings).verdict == "fine"


def outcomes(n, **fooled):
    """A report of n samples of one class in two; of each attack the samples that it fooled."""
    kinds = {"AA": {"kind": "autoattack"}, "CW": {"kind": "cw", "step_size": 0.1, "steps": 9}}
    attacks = []
    for k, name in enumerate(fooled):
        settings = kinds.get(name, {"kind": "pgd", "step_size": 0.1, "steps": 1 + 2 * k})
        attacks.append(AttackSpec(name=name, eps=0.1, **settings))
    stages = {a.name: tuple(f"x{t}" for t in range((a.steps or 0) + 1)) for a in attacks}
    stages |= {"AA": ("clean", "apgd-ce", "apgd-t", "fab-t", "square"), "clean": ("clean",)}
    y = torch.arange(n) % 2
    wrong = {"clean": torch.zeros(n, dtype=torch.bool)}
    for name, which in fooled.items():
        wrong[name] = torch.zeros(n, dtype=torch.bool)
        wrong[name][list(which)] = True
    return RobustnessReport(
        protocol=Protocol(name="by hand", attacks=tuple(attacks)),
        class_names=("0", "1"),
        index=torch.arange(n),
        targets=y,
        predictions={name: torch.where(w, 1 - y, y) for name, w in wrong.items()},
        fooled_at={name: torch.where(w, 1, len(stages[name])) for name, w in wrong.items()},
        stages={name: stages[name] for name in wrong},
    )


def of_report(made):
    """The findings on the report alone, by check."""
    x = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def model(x):
        return torch.stack([0 * x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], dim=1)

    findings = trust_checks(model, (x, torch.arange(4) % 2), SMALL, num_classes=2, report=made)
    found = {f.check: f for f in findings if f.check not in ALL}
    return {c: f for c, f in found.items() if not c.startswith("black-box")}


def test_a_stronger_attack_that_is_beaten():
    """Six samples that only the weaker one fools are p = 2 / 2**6 = 0.031, five are 0.0625."""
    order = "PGD is at least as strong as FGSM"
    enough = of_report(outcomes(100, FGSM=range(6), PGD=[]))
    assert list(enough) == [order]
    assert enough[order].verdict == "doubtful"
    assert "average 100.00% against 94.00%; 6 images fooled by FGSM alone" in enough[order].evidence
    assert "p 0.031" in enough[order].evidence
    assert of_report(outcomes(100, FGSM=range(5), PGD=[]))[order].verdict == "fine"
    assert of_report(outcomes(100, FGSM=[], PGD=range(60)))[order].verdict == "fine"
    # 10 against 30 on other samples: each of them alone, and yet the stronger is stronger.
    assert of_report(outcomes(100, FGSM=range(10), PGD=range(20, 50)))[order].verdict == "fine"


def test_autoattack_above_pgd():
    made = outcomes(100, PGD=range(40), CW=range(20), AA=range(20))
    found = of_report(made)
    assert found["AA is at least as strong as PGD"].verdict == "doubtful"
    assert found["AA is at least as strong as CW"].verdict == "fine"
    assert not any(check.startswith(("PGD is", "CW is")) for check in found)  # not to be compared
    # At a smaller radius AutoAttack may well be weaker.
    attacks = [replace(a, eps=0.05) if a.kind == "autoattack" else a for a in made.protocol.attacks]
    smaller = replace(made, protocol=replace(made.protocol, attacks=tuple(attacks)))
    assert not any("strong" in check for check in of_report(smaller))


def test_square_finds_samples_after_the_gradient_attacks():
    check = "AA's black-box Square finds nothing that its gradient attacks missed"
    made = outcomes(1000, AA=range(300))
    assert of_report(made)[check].verdict == "fine"
    by_square = made.fooled_at["AA"].clone()
    by_square[0] = made.stages["AA"].index("square")
    one = replace(made, fooled_at={**made.fooled_at, "AA": by_square})
    assert of_report(one)[check].verdict == "fine"  # AutoAttack's own limit is 2 of 1000
    by_square[[3, 5]] = made.stages["AA"].index("square")
    finding = of_report(replace(made, fooled_at={**made.fooled_at, "AA": by_square}))[check]
    assert finding.verdict == "doubtful"
    assert finding.evidence == "it fooled 3 of 1000 images after them; most in class 1, 2"


def test_the_sample_has_some_of_every_class():
    sample = FewOfEach(200)
    targets = torch.arange(2000) // 10
    x = torch.arange(2000.0).reshape(-1, 1, 1, 1)
    for k in range(0, 2000, 64):
        part = slice(k, k + 64)
        sample.add(Block(torch.arange(2000)[part], x[part], targets[part]))
    chosen, labels = sample.data()
    assert torch.bincount(labels).tolist() == [2] * 200
    assert chosen.flatten()[:4].tolist() == [0, 1, 10, 11]


def test_findings_can_be_read():
    finding = Finding(check="the sun shines", verdict="fine", evidence="it is day")
    assert str(finding) == "fine: the sun shines (it is day)"
