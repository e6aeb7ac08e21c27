"""Every method by its name: its attack, its loss, what it leaves alone, and what a checkpoint keeps."""

import copy
import io
from collections import Counter

import pytest
import torch
from tiny_methods import (
    EVERY,
    PLAIN,
    K,
    base,
    batch,
    buffers,
    by_hand,
    ce,
    in_train_mode,
    kl,
    make,
    marked,
    model,
    same,
    seeded,
    seen,
    step,
    teachers,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ferdlib.attacks import pgd
from ferdlib.methods import METHODS, PRESETS, RULES, Method, build_method, rules
from ferdlib.models import small_cnn
from ferdlib.synthesis import Generator
from ferdlib.trainer import FERDConfig, FERDTrainer

# Settings with which a rule has an effect in the second epoch.
EARLY = {"gair": {"begin": 1}, "cfa": {"begin": 1}, "dafa": {"begin": 1}, "frl": {"slack": 0.0}}
# Their next epoch does not depend on what has been.
STATELESS = ("sat", "trades", "bat", "ard", "rslad", "adaad", "fat-ard", "faal-ard")


@pytest.mark.parametrize(("name", "preset"), [c for c in EVERY if c[0] != "bat"])
def test_attack(name, preset):
    student, (x, y) = model(0).train(), batch()
    expected = by_hand(name, preset, student, x, y, seeded(3))
    found = make(name, preset, rng=seeded(3)).attack(student, x, y)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(found, by_hand(name, preset, student, x, y, seeded(3), steps=6))


@pytest.mark.parametrize("train_mode", [False, True])
def test_adaad_climbs_the_teacher_too_in_the_mode_that_was_asked_for(train_mode):
    student, teacher, (x, y) = model(0).train(), model(10), batch()
    settings = {"loss": lambda z, _: kl(z[1], z[0]), "random_start": "normal"}
    settings["train_mode"] = train_mode

    def examples(network, guide):
        return pgd(lambda v: [network(v), guide(v)], x, y, rng=seeded(3), **settings)

    plain = copy.deepcopy(student).train(train_mode)
    expected, blind = examples(plain, teacher), examples(plain, lambda v: teacher(v).detach())
    found = make("adaad", train_mode=train_mode, rng=seeded(3)).attack(student, x, y)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(found, blind, rtol=0, atol=1e-3)
    assert (student[1].num_batches_tracked == 10) == train_mode


def equation(name, preset, student, x, x_adv, y):
    """The published loss in the first epoch, in plain torch."""
    kind, models = base(name), teachers(name)
    s, s_adv = student(x), student(x_adv.chunk(2)[0] if name == "bat" else x_adv)
    with torch.no_grad():
        t, t_adv = (models["teacher"](v) if models else None for v in (x, x_adv))
        natural = models["natural_teacher"](x) if "natural_teacher" in models else None
    scale = 1 / K if preset == "released" and kind != "iad" else 1.0
    if (name, preset) == ("fair-mtard", "released"):  # the natural teacher is never used
        natural = t_adv
    if name == "bat":
        wrong = student(x_adv.chunk(2)[1])
        uniform = torch.zeros_like(s)
        return ce(s_adv, y) + 6 * kl(s, wrong) + kl(s_adv, uniform) + kl(wrong, uniform)
    losses = {
        "sat": lambda: ce(s_adv, y),
        "trades": lambda: ce(s, y) + 6 * kl(s, s_adv),
        "ard": lambda: scale * 900 * kl(t / 30, s_adv / 30),
        "iad": lambda: kl(t, s_adv),
        "rslad": lambda: scale * (5 / 6 * kl(t, s_adv) + 1 / 6 * kl(t, s)),
        "mtard": lambda: scale * (kl(t_adv, s_adv) + kl(natural, s)) / 2,
        "adaad": lambda: scale * kl(t_adv, s_adv),
    }
    losses["absld"] = losses["rslad"]
    return losses[kind]() * (2 if name == "wat-ard" else 1)  # both its experts weigh 1 at first


def gradients(loss, student):
    return torch.autograd.grad(loss.mean(), list(student.parameters()), allow_unused=True)


@pytest.mark.parametrize(
    ("name", "preset"), [c for c in EVERY if c[0] not in ("fat-ard", "faal-ard")]
)
def test_loss_and_gradient_of_the_first_epoch(name, preset):
    student, method = model(0).train(), make(name, preset)
    x, y, x_adv, found = step(method, student, 3)
    expected = equation(name, preset, student, x, x_adv, y)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    # The reference is a value: from `reference`, or computed by the method.
    assert torch.equal(method.loss(student, x, x_adv, y, method.reference(x)), found) or (
        base(name) == "mtard"  # whose balance has moved
    )
    a, b = gradients(found, student), gradients(expected, student)
    assert all(torch.allclose(*pair, rtol=1e-7, atol=1e-10) for pair in zip(a, b, strict=True))


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_leaves_no_trace(name, preset):
    method, student, (x, y) = make(name, preset, rng=seeded(3)), marked(model(0).train()), batch()
    student[1].eval()  # a layer that its owner froze
    found = [value for value in vars(method).values() if isinstance(value, nn.Module)]
    assert isinstance(method, Method)
    assert len(found) == len(teachers(name))
    for network in found:
        marked(network).train()[4].eval()
    (flags, numbers), guides, images = seen(student), [seen(n) for n in found], x.clone()
    x_adv = method.attack(student, x, y)
    assert seen(student)[0] == flags
    assert (seen(student)[1] != numbers) == in_train_mode(name, preset)
    if in_train_mode(
        name, preset
    ):  # ten forwards of the layers that are in train mode, and of no other
        assert (student[4].num_batches_tracked, student[1].num_batches_tracked) == (10, 0)
    assert torch.equal(x, images)
    assert not x_adv.requires_grad
    student.zero_grad()
    loss = method.loss(student, x, x_adv, y)
    assert bool(loss.isfinite().all())
    loss.mean().backward()
    method.validate(student, [(x, y)])
    method.end_epoch()
    assert sum(float(p.grad.abs().sum()) for p in student.parameters() if p.requires_grad) > 1e-6
    assert guides == [seen(n) for n in found]
    assert x.grad is None


def epoch(method, student, seed, batches=(0, 1), end=True):
    """Two batches and the epoch's end: attacks and losses."""
    found = []
    for b in batches:
        method.rng = seeded(10 * seed + b)
        _, _, x_adv, loss = step(method, student, 2 * seed + b)
        found += [x_adv, loss.detach()]
    if end:
        method.validate(student, [batch(90), batch(91)])
        method.end_epoch()
    return found


def flat(state):
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_state_in_the_middle_of_an_epoch(name, preset):
    """Written after the first batch of the second epoch, read, and gone on for two epochs."""
    settings = {} if name == "frl-ard" else EARLY.get(name.partition("-")[0], {})
    settings |= {"begin": 1} if "iad" in name else {}
    method, again, fresh = (make(name, preset, **settings) for _ in range(3))
    student = model(0)
    epoch(method, student, 0)
    epoch(method, student, 1, batches=[0], end=False)
    state = method.state_dict()
    torch.save(state, file := io.BytesIO())
    kept = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again.load_state_dict(copy.deepcopy(kept))
    runs = []
    for m in (method, again, fresh):
        s = copy.deepcopy(student)
        runs.append(epoch(m, s, 1, batches=[1]) + epoch(m, s, 2) + epoch(m, s, 3))
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2]) == (name in STATELESS)
    assert flat(state) == flat(kept)  # copies, which going on has not changed


def test_a_state_is_loaded_whole_or_not_at_all():
    """The part that does not fit is the last one, behind others that do."""
    methods = [make("absld", rule=rules.LPS()) for _ in range(2)]
    epoch(methods[0], model(0), 0)
    state, before = methods[0].state_dict(), flat(methods[1].state_dict())
    assert flat(state) != before
    broken = [state | {"clean_losses": {"sums": torch.zeros(K)}}, state | {"epoch": -1}]
    broken.append(state | {"rule": state["rule"] | {"class_weights": {}}})
    for each in broken:
        with pytest.raises(ValueError, match="expected"):
            methods[1].load_state_dict(each)
        assert flat(methods[1].state_dict()) == before
    methods[1].load_state_dict(state)
    assert flat(methods[1].state_dict()) == flat(state)


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_work_of_a_step(name, preset):
    """Forwards, so that counting steps is free, and no loop over samples."""
    student, forwards, operations = model(0), Counter(), []
    method = make(name, preset, random_start=None)
    models = [student, *([] if name in PLAIN else [method.teacher])]
    for network in models:
        network.register_forward_pre_hook(lambda network, _: forwards.update([network]))
    for n in (9, 63):
        x, y = batch(n=n)
        forwards.clear()
        with Operations() as counter:
            reference = method.reference(x)
            x_adv = method.attack(student, x, y, reference)
            # TRADES' reference is one forward more; BAT looks at the last iterate too.
            steps = 7 if (name, preset) == ("sat", "paper") else 10
            assert forwards[student] == {"trades": 11, "bat": 12}.get(name, steps)
            method.loss(student, x, x_adv, y, reference)
        operations.append(counter.count)
        clean = {"trades": 1, "bat": 1, "rslad": 1, "mtard": 1, "absld": 1}.get(base(name), 0)
        # Two sides of a boundary in BAT; S(x) only where the loss has it, so not in IAD before `begin`.
        in_attack = {"trades": 11, "bat": 13}.get(name, steps)
        assert forwards[student] == in_attack + 1 + clean
        if name not in PLAIN:
            # The clean logits once for attack and loss, or the adversarial ones; AdaAD asks at every step.
            assert forwards[method.teacher] == (11 if name == "adaad" else 1)
    assert abs(operations[0] - operations[1]) < 54  # samples; MTARD looks at its first losses


def synthetic(seed):
    """Images of a generator, and the labels that it was asked for."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        generator = Generator((2, 8, 4), latent_dim=3, width=4, num_classes=K).double()
        y = torch.randint(K, (9,))
        return generator(torch.randn(9, 3).double(), y), y


@pytest.mark.parametrize("images", [batch, synthetic])
@pytest.mark.parametrize("name", PRESETS)
def test_every_pair_trains_and_the_rule_has_an_effect(name, images):
    prefix, _, kind = name.rpartition("-")
    settings = {"steps": 3, "begin": 1} if kind == "iad" else {"steps": 3}
    found = []
    for rule in (RULES[prefix](**EARLY.get(prefix, {})) if prefix else None, rules.Uniform()):
        method, student = make(kind, rule=rule, **settings), model(0)
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-6)
        for k in range(2):
            for seed in (2 * k, 2 * k + 1):
                *_, loss = step(method, student, seed, images)
                assert loss.shape == (9,)
                assert bool(loss.isfinite().all())
                optimizer.zero_grad()
                loss.mean().backward()
                optimizer.step()
            method.validate(student, [images(90), images(91)])
            method.sync()
            method.end_epoch()
        found.append(loss)
        assert method.epoch == method.rule.epoch == 2
    assert torch.allclose(*found, rtol=1e-3) == (not prefix)


def test_a_rule_has_one_method():
    rule = rules.LPS()
    method = make("sat", rule=rule)
    with pytest.raises(RuntimeError, match=r"^LPS\.bind: expected a rule of its own for each"):
        make("trades", rule=rule)
    assert method.rule is rule
    assert make("sat").rule is not make("sat").rule


TINY = {
    **{"num_classes": 3, "layer": "layer4", "image_shape": (1, 8, 8), "augment": "none"},
    **{"epochs": 3, "warmup_epochs": 1, "batch_size": 9, "student_steps": 2, "latent_dim": 5},
    **{"generator_steps": 1, "generator_width": 4, "bottleneck_steps": 1, "margin_attack_steps": 1},
}


def make_trainer(name):
    torch.manual_seed(2)
    teacher, natural, student = (small_cnn(1, 3, width=w) for w in (4, 4, 2))
    given = {"teacher": teacher, "natural_teacher": natural}
    given = {key: given[key] for key in teachers(name)}
    method = build_method(name, 3, eps=0.1, step_size=0.05, steps=3, **given)
    x = torch.rand(18, 1, 8, 8)
    held_out = [(x[:9], torch.arange(9) % 3), (x[9:], torch.arange(9) % 3)]
    config = FERDConfig(**TINY)
    validation = {"validation": held_out} if method.needs_validation else {}
    return FERDTrainer(teacher, student, config=config, method=method, **validation), given


@pytest.mark.parametrize("name", [*METHODS, "wat-ard", "frl-trades", "fair-rslad", "fair-ferd"])
def test_in_the_trainer(name):
    trainer, given = make_trainer(name)
    global_state = torch.get_rng_state()
    before = [buffers(m) for m in given.values()]
    stats, state = [], None
    for s in trainer.epochs():
        stats.append(s)
        state = trainer.state_dict() if s.epoch == 2 else state
    assert [s.student_loss > 0 for s in stats] == [False, True, True]  # the first is warm-up
    assert trainer.method.epoch == 2
    assert all(same(b, buffers(m)) for b, m in zip(before, given.values(), strict=True))
    again, _ = make_trainer(name)
    again.load_state_dict(state)
    again.fit()
    assert same(*(list(t.student.state_dict().values()) for t in (trainer, again)))
    # The method was given no generator: the noise is the trainer's all the same.
    assert torch.equal(torch.get_rng_state(), global_state)
    if name == "wat-ard":
        assert trainer.method.rule.hedge.average_weight != 1.0
    if name == "fair-rslad":
        assert float(trainer.method.rule.class_weights.weights.std()) > 0
