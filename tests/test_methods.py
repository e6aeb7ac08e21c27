"""Every method by its name: its attack, its loss, what it leaves alone, and what a checkpoint keeps."""

import copy
import io
from collections import Counter

import pytest
import torch
from tiny_methods import (
    EVERY,
    NAMES,
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
    model,
    same,
    seeded,
    teachers,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ferdlib.attacks import pgd
from ferdlib.methods import Method, build_method
from ferdlib.models import small_cnn
from ferdlib.trainer import FERDConfig, FERDTrainer

# Methods that switch something on after some epochs, here after the first or second.
EARLY = {name: {"begin": 1} for name in ("iad", "fair-iad", "gair-ard", "cfa-ard")}
EARLY["dafa-ard"] = {"begin": 2}
# Their next epoch does not depend on what has been.
STATELESS = ("sat", "trades", "bat", "ard", "rslad", "adaad", "fat-ard", "faal-ard")


@pytest.mark.parametrize(("name", "preset"), [c for c in EVERY if c[0] != "bat"])
def test_attack(name, preset):
    student, (x, y) = model(0).train(), batch()
    expected = by_hand(name, preset, student, x, y, seeded(3))
    found = make(name, preset, rng=seeded(3)).attack(student, x, y)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(found, by_hand(name, preset, student, x, y, seeded(3), steps=9))


def test_adaad_climbs_the_teacher_too():
    student, teacher, (x, y) = model(0), model(10), batch()
    blind = pgd(
        lambda v: torch.stack([student(v), teacher(v).detach()]),
        x,
        y,
        loss=lambda z, _: kl(z[1], z[0]),
        random_start="normal",
        rng=seeded(3),
    )
    found = make("adaad", rng=seeded(3)).attack(student, x, y)
    assert not torch.allclose(found, blind, rtol=0, atol=1e-3)


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
        "absld": lambda: scale * (5 / 6 * kl(t, s_adv) + 1 / 6 * kl(t, s)),
    }
    plain = losses[kind]()
    return 2 * plain if name == "wat-ard" else plain  # both its experts weigh 1 at first


def gradients(loss, student):
    return torch.autograd.grad(loss.mean(), list(student.parameters()), allow_unused=True)


@pytest.mark.parametrize(
    ("name", "preset"), [c for c in EVERY if c[0] not in ("fat-ard", "faal-ard")]
)
def test_loss_and_gradient_of_the_first_epoch(name, preset):
    student, (x, y) = model(0).train(), batch()
    method = make(name, preset, rng=seeded(3))
    x_adv = method.attack(student, x, y)
    found, expected = (
        method.loss(student, x, x_adv, y),
        equation(name, preset, student, x, x_adv, y),
    )
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    # Through both arguments of TRADES' divergence, too.
    pairs = zip(gradients(found, student), gradients(expected, student), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-10) for a, b in pairs)


def test_trades_gradient_has_two_sides():
    student, (x, y) = model(0), batch()
    method = make("trades", rng=seeded(3))
    x_adv = method.attack(student, x, y)
    s, s_adv = student(x), student(x_adv)
    one_sided = gradients(ce(s, y) + 6 * kl(s.detach(), s_adv), student)
    both = gradients(method.loss(student, x, x_adv, y), student)
    assert not torch.allclose(one_sided[0], both[0], rtol=1e-3)


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_leaves_no_trace(name, preset):
    method = make(name, preset, rng=seeded(3))
    assert isinstance(method, Method)
    student, (x, y) = model(0).train(), batch()
    student[1].eval()  # a layer that its owner froze
    found = {key: value for key, value in vars(method).items() if isinstance(value, nn.Module)}
    assert len(found) == len(teachers(name))
    for network in (student, *found.values()):
        network[0].bias.requires_grad_(False)
        for p in network.parameters():
            p.grad = torch.ones_like(p)
    for network in found.values():
        network.train()[4].eval()

    def seen(network):
        flags = [m.training for m in network.modules()]
        flags += [p.requires_grad for p in network.parameters()]
        return flags, [p.grad.clone() for p in network.parameters()], buffers(network)

    before, images = [seen(n) for n in (student, *found.values())], x.clone()
    x_adv = method.attack(student, x, y)
    after = [seen(n) for n in (student, *found.values())]
    for k, (a, b) in enumerate(zip(before, after, strict=True)):
        assert a[0] == b[0]
        assert same(a[1], b[1])
        assert same(a[2], b[2]) == (k > 0 or not in_train_mode(name, preset))
    if in_train_mode(
        name, preset
    ):  # ten forwards of the layers that are in train mode, and of no other
        assert student[4].num_batches_tracked == 10
        assert student[1].num_batches_tracked == 0
    assert torch.equal(x, images)
    assert not x_adv.requires_grad
    loss = method.loss(student, x, x_adv, y)
    assert loss.shape == (len(x),)
    assert bool(loss.isfinite().all())
    student.zero_grad()
    loss.mean().backward()
    method.validate(student, [(x, y)])
    method.end_epoch()
    trained = [p for p in student.parameters() if p.requires_grad]
    assert sum(float(p.grad.abs().sum()) for p in trained) > 1e-6
    for a, network in zip(before[1:], found.values(), strict=True):
        b = seen(network)
        assert a[0] == b[0]
        assert same(a[1], b[1])
        assert same(a[2], b[2])
    assert x.grad is None


def epoch(method, student, seed, batches=(0, 1), end=True):
    """Two batches and the epoch's end: attacks and losses."""
    seen = []
    for b in batches:
        x, y = batch(2 * seed + b)
        method.rng = seeded(10 * seed + b)
        x_adv = method.attack(student, x, y)
        loss = method.loss(student, x, x_adv, y)
        seen += [x_adv, loss.detach()]
    if end:
        method.validate(student, [batch(90), batch(91)])
        method.end_epoch()
    return seen


def flat(state):
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_state_in_the_middle_of_an_epoch(name, preset):
    """Written after the first batch of the second epoch, read, and gone on for two epochs."""
    settings = EARLY.get(name, {})
    method, student = make(name, preset, **settings), model(0)
    epoch(method, student, 0)
    epoch(method, student, 1, batches=[0], end=False)
    state = method.state_dict()
    torch.save(state, file := io.BytesIO())
    kept = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again, fresh = make(name, preset, **settings), make(name, preset, **settings)
    again.load_state_dict(copy.deepcopy(kept))
    runs = []
    for m in (method, again, fresh):
        s = copy.deepcopy(student)
        runs.append(epoch(m, s, 1, batches=[1]) + epoch(m, s, 2) + epoch(m, s, 3))
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2]) == (name in STATELESS)
    assert flat(state) == flat(kept)  # copies, which going on has not changed


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

    def count(network, _):
        forwards[network] += 1

    student.register_forward_pre_hook(count)
    if name not in PLAIN:
        method.teacher.register_forward_pre_hook(count)
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
        if base(name) in ("ard", "rslad", "absld"):  # attack and loss share the clean logits
            assert forwards[method.teacher] == 1
    assert abs(operations[0] - operations[1]) < 54  # samples; MTARD looks at its first losses


TINY = {
    "num_classes": 3,
    "layer": "layer4",
    "image_shape": (1, 8, 8),
    "epochs": 3,
    "warmup_epochs": 1,
    "batch_size": 9,
    "generator_steps": 1,
    "generator_width": 4,
    "latent_dim": 5,
    "bottleneck_steps": 1,
    "student_steps": 2,
    "margin_attack_steps": 1,
    "augment": "none",
}


def make_trainer(name):
    torch.manual_seed(2)
    teacher, natural, student = (small_cnn(1, 3, width=w) for w in (4, 4, 2))
    given = {"teacher": teacher, "natural_teacher": natural}
    given = {key: given[key] for key in teachers(name)}
    method = build_method(name, 3, eps=0.1, step_size=0.05, steps=3, **given)
    x = torch.rand(18, 1, 8, 8)
    validation = [(x[:9], torch.arange(9) % 3), (x[9:], torch.arange(9) % 3)]
    held_out = {"validation": validation} if method.needs_validation else {}
    config = FERDConfig(**TINY)
    return FERDTrainer(teacher, student, config=config, method=method, **held_out), given


@pytest.mark.parametrize("name", NAMES)
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
    found = [list(t.student.state_dict().values()) for t in (trainer, again)]
    assert same(*found)
    # The method was given no generator: the noise is the trainer's all the same
    assert torch.equal(torch.get_rng_state(), global_state)
    if name == "wat-ard":
        assert trainer.method.rule.hedge.average_weight != 1.0
    if name == "fair-rslad":
        assert not torch.equal(trainer.method.rule.class_weights.weights, torch.ones(3).double())
