"""The package on an accelerator: values as on the CPU, no mix of devices, and few waits for an answer.

The default is a stand-in that every machine has; `pytest --device cuda` takes a real card.
"""

import copy
from importlib import import_module

import pytest
import torch
from card import Card
from conftest import make_tiny_model
from tiny_ferd import SIZES, make_models
from tiny_methods import EVERY, K, batch, make, model, seeded
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ferdlib import _checks, attacks, augment, bottleneck, evaluation, methods, models, synthesis
from ferdlib.evaluation import PROTOCOLS, evaluate
from ferdlib.trainer import FERDConfig, FERDTrainer

# An attack asks whether its arguments are in range, and at the end whether all was finite.
PER_ATTACK = 2
# Of FERDTrainer, beside what its student steps' attacks ask; docs/performance.md has it.
PER_EPOCH = 18

X, Y = torch.rand(8, 2, 6, 6, generator=seeded()), torch.arange(8) % K
Z, W, U, V = torch.randn(4, 8, K, generator=seeded(1)).unbind()
P, M = torch.tensor([0.4, 0.3, 0.2, 0.1]), make_tiny_model(K)
COUNTS = torch.randint(1, 9, (K, K), generator=seeded(2))
MAPS, SIGMA = torch.randn(8, 3, 4, 4, generator=seeded(3)), torch.rand(8, 3, generator=seeded(4))
HEAD = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, K))
FIRST, LAST = torch.tensor([3, 1, 0, 2]), torch.tensor([5, 4, 3, 6])
START, RNG = {"random_start": None}, {"rng": seeded}

# Functions, by the arguments that they share: tensors and modules, and settings.
CALLS = [
    ("losses", "cross_entropy margin cw_margin", (Z, Y), {}),
    ("losses", "uniformity confidence_penalty", (Z,), {}),
    ("losses", "distillation decoupled_kl masked_distillation", (Z, W), {}),
    ("losses", "kl_divergence", (Z, W), {"temperature": P[Y]}),
    ("losses", "ferd_distillation_loss rslad", (Z, W, U), {}),
    ("losses", "trades", (Z, W, Y), {}),
    ("losses", "ard bat", (Z, W, U, Y), {}),
    ("losses", "iad", (Z, W, U, V, Y), {}),
    ("losses", "adaad", (Z, W, U, V), {"temperature": P[Y]}),
    ("losses", "absld", (Z, W, U), {"adv_temperature": P[Y], "clean_temperature": P[Y]}),
    ("losses", "mtard", (Z, W, U, V), {"adv_weight": P[0]}),
    ("losses", "class_temperatures", (P, P.flip(0)), {}),
    ("losses", "class_variance", (P[Y], Y), {"num_classes": K}),
    ("losses", "ferd_generator_loss", (Z, W, Y, U, P[0]), {}),
    ("attacks", "fgsm pgd cw_linf least_pgd_steps", (M, X, Y), START),
    ("attacks", "utae_pgd", (M, X), START),
    ("reweight", "margin_softmax margin_minmax lps_power kl_ball normalize cfa_margins", (P,), {}),
    ("reweight", "lps_linear lps_sigmoid lps_tanh", (P,), {"steps": 5}),
    ("reweight", "gairat", (FIRST,), {"steps": 5}),
    ("reweight", "cfa_mixing", (P,), {"beta": 6.0}),
    ("reweight", "confusion_weights", (COUNTS / COUNTS.sum(1, keepdim=True),), {}),
    ("bottleneck", "noise_scale", (MAPS, HEAD, Y), {"steps": 3, **RNG}),
    ("bottleneck", "nonrobust_channels", (MAPS, SIGMA), {}),
    ("bottleneck", "nonrobust_logits", (MAPS, HEAD, SIGMA > 0.5), {}),
    ("metrics", "confusion_matrix", (Y, Y.flip(0)), {"num_classes": K}),
    ("metrics", "class_accuracy target_entropy", (COUNTS,), {}),
    ("metrics", "average worst_class worst_fraction nsd", (P,), {}),
    ("metrics", "inheritance_ratio", (P, P.flip(0)), {}),
    (
        "stats",
        "wilson_interval simultaneous_interval worst_class_interval nsd_interval",
        (FIRST, LAST),
        {},
    ),
    ("stats", "worst_fraction_interval average_interval", (FIRST, LAST), {}),
    ("stats", "mcnemar", (FIRST, LAST), {}),
    ("stats", "holm", (P,), {}),
    ("stats", "paired_permutation", (Y > 1, Y > 2, Y, K), {"figure": "average", "draws": 20}),
    ("augment", "crop_flip", (X,), RNG),
    ("synthesis", "sample_labels", (P, 9), RNG),
    ("methods", "teacher_logits", (M, X), {}),
    ("checkpoints", "digest", (M,), {}),
    ("plots", "plot_classes", ({"a": P},), {}),
    ("plots", "plot_confusion", (COUNTS,), {}),
    ("plots", "plot_weights", (P, P), {}),
    ("plots", "plot_sweep", ([1, 2, 3, 4], {"a": P}), {"xlabel": "", "ylabel": ""}),
    ("plots", "plot_images", (X[:, :1], Y), {"num_classes": K}),
    ("plots", "plot_survival", (LAST[Y], Y), {"num_classes": K, "steps": 9}),
]
CALLS = [(module, name, *rest) for module, names, *rest in CALLS for name in names.split()]
# Classes, which the tests below use, what makes or loads models on the CPU, and plain values.
OTHERS = {"StepCounter", "autoattack", "AutoAttackResult", "MTARDBalance", "BatchNormStatistics"}
OTHERS |= {"ClassMean", "ClassWeights", "FRLWeights", "HedgeWeights", "split_at", "Crops", "rules"}
OTHERS |= {"Generator", "Inversion", "ImagePool", "Source", "Checkpoints", "write_file", "recipe"}
OTHERS |= {"build_method", "create", *(n for n in methods.__all__ if n[0].isupper())}


@pytest.fixture
def card(request, monkeypatch):
    kind = request.config.getoption("device")
    for module in (_checks, evaluation.attack) if kind == "card" else ():
        # The stand-in has it, as CUDA has.
        monkeypatch.setattr(module, "has_float64", lambda device: True)
    with Card(kind) as card:
        yield card


def moved(values, place):
    """Tensors and copies of modules on the device; generators are made."""

    def move(value):
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).to(place)
        if isinstance(value, torch.Tensor):
            return value.to(place)
        return value() if value is seeded else value

    return tree_map(move, values)


def agree(ours, theirs, tolerance=1e-4):
    """The same values, the ones on the card."""
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        if isinstance(a, torch.Tensor):
            near = {"atol": tolerance, "rtol": tolerance}
            torch.testing.assert_close(a.cpu(), b.cpu(), equal_nan=True, **near)


def test_the_stand_in_is_as_strict_as_a_card(card):
    here, host = torch.arange(3.0, device=card.kind), torch.arange(3.0)
    for mix in (lambda: here + host, lambda: host[here.long()], lambda: torch.stack([here, host])):
        with pytest.raises((RuntimeError, IndexError)):
            mix()
    for rng, place in ((seeded(), card.kind), (card.generator(), "cpu")):
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=place, generator=rng)
    view = here[1:]
    view += 1
    assert not card.reads
    assert here.tolist() == [0, 2, 3]
    assert float(here[here > 2].sum()) == 3
    assert sum(card.reads.values()) == 3


@pytest.mark.parametrize(("module", "name", "args", "settings"), CALLS)
def test_a_function_computes_there_what_it_computes_here(card, module, name, args, settings):
    function = getattr(import_module(f"ferdlib.{module}"), name)
    theirs = function(*moved(args, "cpu"), **moved(settings, "cpu"))
    agree(function(*moved(args, card.kind), **moved(settings, card.kind)), theirs)
    # Users whose default device is the card have everything there, too.
    with torch.device(card.kind):
        agree(function(*moved(args, card.kind), **moved(settings, card.kind)), theirs)


def test_every_public_function_has_been_there():
    for module in {module for module, *_ in CALLS}:
        called = {name for other, name, *_ in CALLS if other is module}
        assert set(import_module(f"ferdlib.{module}").__all__) - called <= OTHERS


def test_models_and_pools_live_there(card):
    x, y = X.to(card.kind), Y.to(card.kind)
    network = models.Normalized(M, [0.5, 0.5], [0.2, 0.2])
    fast = models.freeze_for_attack(moved(network, card.kind))
    agree(fast(x), network(X))
    features, head = bottleneck.split_at(moved(M, card.kind), "3")
    agree(head(features(x)), M(X))
    for kind in (models.resnet18, models.mobilenet_v2, models.preact_resnet18):
        plain, image = kind(num_classes=K).eval(), X[:2, :1].repeat(1, 3, 2, 2)
        agree(moved(plain, card.kind)(image.to(card.kind)), plain(image))
    average = methods.FairAverage(moved(M, card.kind))
    assert average.update(moved(M, card.kind), P.to(card.kind) + 0.3)
    pool, again = synthesis.ImagePool(12, torch.uint8), synthesis.ImagePool(12, torch.uint8)
    for _ in range(2):
        pool.add(x, Y, column=y)
    again.load_state_dict(pool.state_dict())
    for rng in (seeded(), card.generator()):
        assert again.sample(20, rng=rng)[1].device == x.device
        crops = augment.Crops.draw(8, device=x.device, rng=rng)
        assert crops[y > 1](x[4:]).device == x.device


@pytest.mark.parametrize("name", ["pgd", "fgsm", "cw_linf", "utae_pgd", "least_pgd_steps"])
def test_no_step_of_an_attack_waits(card, name):
    network, x, y = moved((M, X, Y), card.kind)
    attack, targets = getattr(attacks, name), () if name == "utae_pgd" else (y,)
    settings = {"eps": torch.full((8,), 0.03, device=card.kind)}
    settings |= {} if name == "fgsm" else {"steps": 5, "step_size": settings["eps"] / 4}
    for rng in (None, seeded(), card.generator()):
        for start in ("normal", torch.zeros_like(x)):
            card.reads.clear()
            attack(network, x, *targets, random_start=start, rng=rng, **settings)
            assert sum(card.reads.values()) <= PER_ATTACK, card.reads
    with pytest.raises(ValueError, match=f"^{name}: expected `eps` in .* for every sample"):
        attack(network, x, *targets, **settings | {"eps": -settings["eps"]})
    with torch.autocast(card.kind, torch.bfloat16):
        x = x.to(memory_format=torch.channels_last)
        found = attack(network.to(memory_format=torch.channels_last), x, *targets, **settings)
    found = found[0] if isinstance(found, tuple) else found
    assert float((found - x).abs().max()) <= 0.03 + 1e-6
    if targets:
        with pytest.raises(ValueError, match=f"^{name}: .* on one device, got {card.kind}:0 and"):
            attack(network, x, Y)


RUNS = [(*pair, {}) for pair in EVERY] + [("frl-ard", "paper", {"remargin": True})]
RUNS += [("ferd", preset, {}) for preset in ("paper", "released")]


@pytest.mark.parametrize(("name", "preset", "settings"), RUNS)
def test_no_step_of_a_method_waits(card, name, preset, settings):
    """Two epochs beside the same on the CPU: attacks, losses, rules and what they learn on the way."""
    settings = settings | {"steps": 3} | ({"teacher": model(10)} if name == "ferd" else {})
    theirs, other = make(name, preset, **settings), model()
    ours, student = make(name, preset, **settings), moved(other, card.kind)
    for part, value in vars(ours).items():
        if isinstance(value, nn.Module):
            setattr(ours, part, moved(value, card.kind))
    for rule in (ours.rule, theirs.rule):
        # So early that they are seen.
        vars(rule).update(dict.fromkeys({"begin"} & set(vars(rule)), 1))
    for epoch in range(2):
        x, y = batch(epoch)
        place = moved((x, y), card.kind)
        ours.rng, theirs.rng = seeded(), seeded()
        card.reads.clear()
        x_adv = ours.attack(student, *place)
        # Once an epoch the fast copy is compared with its model.
        compared = name == "ferd" and ours.attack_model == "student"
        assert sum(card.reads.values()) <= PER_ATTACK + compared, card.reads
        card.reads.clear()
        loss = ours.loss(student, place[0], x_adv, place[1])
        loss.mean().backward()
        # MTARD's first losses are its unit.
        assert not card.reads or ("mtard" in name and epoch == 0), card.reads
        agree(loss, theirs.loss(other, x, theirs.attack(other, x, y), y), 1e-6)
        for method, network, pair in ((ours, student, place), (theirs, other, (x, y))):
            if method.needs_validation:
                method.validate(network, [pair])
            method.end_epoch()
    agree(ours.state_dict(), theirs.state_dict(), 1e-6)
    ours.load_state_dict(moved(ours.state_dict(), "cpu"))
    with pytest.raises(ValueError, match=f"expected `y` on {card.kind}:0, got cpu"):
        ours.attack(student, place[0], y)


PRESETS = {"default": FERDConfig, "paper": FERDConfig.paper, "released": FERDConfig.released}
SMALL = SIZES | {"epochs": 3, "warmup_epochs": 1, "generator_steps": 2, "student_steps": 2}
SMALL |= {"bottleneck_steps": 2, "uniformity_loss_weight": 1.0}


def trained(card, preset, place=None, **changes):
    """A trainer after its warm-up and an epoch, and the reads of the second one."""
    teacher, student = moved(make_models(), place or card.kind)
    trainer = FERDTrainer(teacher, student, config=PRESETS[preset](**(SMALL | changes)))
    epochs = trainer.epochs()
    next(epochs)
    card.reads.clear()
    stats = next(epochs)
    return trainer, stats, card.reads.copy()


@pytest.mark.parametrize("preset", PRESETS)
def test_no_step_of_the_trainer_waits(card, preset):
    trainer, stats, reads = trained(card, preset)
    same = trained(card, preset, "cpu")[1]
    assert stats.synthesis == pytest.approx(same.synthesis, rel=1e-2)
    assert stats.class_probabilities == pytest.approx(same.class_probabilities, rel=1e-2)
    # A step attacks a student that has moved.
    per_step = PER_ATTACK if trainer.config.attack_model == "student" else 0
    assert sum(reads.values()) <= PER_EPOCH + 2 * per_step, reads
    names = "generator_steps", "bottleneck_steps", "student_steps", "attack_steps"
    more = trained(card, preset, margin_attack_steps=5, **dict.fromkeys(names, 5))[2] - reads
    assert sum(more.values()) <= 3 * per_step, more
    trainer.load_state_dict(moved(trainer.state_dict(), "cpu"))
    assert next(trainer.epochs()).epoch == 3


def test_the_trainer_runs_under_autocast_in_another_layout_and_with_a_rule(card):
    teacher, student = moved(make_models(), card.kind)
    student.to(memory_format=torch.channels_last)
    config = FERDConfig(**(SMALL | {"precision": "bfloat16", "pool_dtype": "uint8", "epochs": 2}))
    rule = methods.rules.LPS()
    with torch.device(card.kind):
        method = methods.FERDDistillation(teacher=teacher, num_classes=3, steps=2, rule=rule)
        trainer = FERDTrainer(teacher, student, config=config, method=method)
        assert trainer.fit()[-1].pool_size == 24
    assert trainer.pool.labels.device.type == card.kind


@pytest.mark.parametrize("name", [n for n in PROTOCOLS if n != "robustbench"])
def test_evaluate_finds_there_what_it_finds_here(card, name):
    protocol = PROTOCOLS[name]
    gone = [attack.name for attack in protocol.attacks if attack.kind == "autoattack"]
    protocol, settings = protocol.without(*gone).at(eps=0.02), {"num_classes": K, "batch_size": 5}
    theirs = evaluate(M, (X, Y), protocol, **settings)
    for fast in (False, True):
        ours = evaluate(moved(M, card.kind), (X, Y), protocol, fast=fast, **settings)
        agree(ours.predictions, theirs.predictions)
