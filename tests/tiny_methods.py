"""What the tests of the methods share: tiny models and images, and the published attacks by hand."""

import copy
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from conftest import make_tiny_model

from ferdlib.attacks import pgd
from ferdlib.methods import METHODS, PRESETS, RULES, build_method

K = 4
# Methods on labelled images, Fair-ARD's four, and the rules on ARD that Fair-ARD compares itself with.
NAMES = [name for name in METHODS if name != "ferd"]
NAMES += ["fair-ard", "fair-iad", "fair-rslad", "fair-mtard"]
NAMES += [f"{rule}-ard" for rule in RULES if rule != "fair"]
EVERY = [(name, preset) for name in NAMES for preset in PRESETS[name]]
PLAIN = ("sat", "trades", "bat")


def model(seed=0):
    return make_tiny_model(K, seed=seed).double()


LABELLER = model()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(seed=0, n=9):
    """Images of differing contrast, with the labels that the first model gives them but for some."""
    rng = seeded(seed)
    scale = torch.rand(n, 2, 1, 1, generator=rng, dtype=torch.float64)
    x = scale * torch.rand(n, 2, 6, 5, generator=rng, dtype=torch.float64) ** 2
    y = LABELLER(x).argmax(1)
    return x, torch.where(torch.arange(n) % 4 == 3, (y + 1) % K, y)


def base(name):
    """Name of the method without its rule."""
    return name.rpartition("-")[2]


def teachers(name):
    """The teachers that a method wants."""
    wanted = ("teacher",) if base(name) not in PLAIN else ()
    wanted += ("natural_teacher",) if "mtard" in name else ()
    return {argument: model(seed) for seed, argument in enumerate(wanted, 10)}


def make(name, preset="paper", **settings):
    return build_method(name, K, preset=preset, **(teachers(name) | settings))


def step(method, student, seed, images=batch):
    """A batch, its attack and its loss."""
    x, y = images(seed)
    method.rng = seeded(seed)
    x_adv = method.attack(student, x, y)
    return x, y, x_adv, method.loss(student, x, x_adv, y)


def kl(p_logits, q_logits):
    log_q, log_p = q_logits.log_softmax(1), p_logits.log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def ce(z, y):
    return F.cross_entropy(z, y, reduction="none")


def by_class(values, y):
    """Class means in NumPy, nan for an absent class."""
    values, y = np.asarray(values, dtype=float), y.numpy()
    return np.array([values[y == c].mean() if (y == c).any() else np.nan for c in range(K)])


def in_train_mode(name, preset):
    return preset == "released" and base(name) in ("sat", "ard", "iad")


def buffers(model):
    return [b.clone() for b in model.buffers()]


def marked(network):
    """The network with a frozen bias, and gradients in the making."""
    network[0].bias.requires_grad_(False)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    return network


def seen(network):
    """Flags and gradients of a network, and its buffers."""
    flags = [m.training for m in network.modules()]
    flags += [(p.requires_grad, p.grad.tolist()) for p in network.parameters()]
    return flags, [b.tolist() for b in network.buffers()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(v, w) for v, w in zip(a, b, strict=True))


def both(student, teacher, x):
    return torch.stack([student(x), teacher(x)])


def by_hand(name, preset, student, x, y, rng, **changes):
    """The published attack, on a copy of the student in its mode."""
    kind = base(name)
    student = copy.deepcopy(student).train(in_train_mode(name, preset))
    settings = {
        "loss": ce,
        "random_start": "uniform" if kind in ("sat", "ard", "iad") else "normal",
        "eps": 0.031 if kind in ("trades", "bat") else 8 / 255,
        "step_size": 0.007 if kind in ("trades", "bat") else 2 / 255,
        "steps": 7 if (name, preset) == ("sat", "paper") else 10,
        "train_mode": in_train_mode(name, preset),
        "rng": rng,
    }
    attacked, targets = student, y
    if kind in ("trades", "bat", "rslad", "absld"):
        reference = student if kind in ("trades", "bat") else teachers(name)["teacher"]
        targets, settings["loss"] = reference(x).detach(), lambda z, t: kl(t, z)
    if kind == "adaad":
        attacked = partial(both, student, teachers(name)["teacher"])
        settings["loss"] = lambda z, _: kl(z[1], z[0])
    return pgd(attacked, x, targets, **(settings | changes))


def recorded_steps(name, preset, student, x, y, rng, labels, **changes):
    """The attack by hand, and of its first ten iterates: how many until one is wrong, how many are right."""
    correct = []

    def record(step, _, logits):
        correct.append((logits.argmax(1) == labels).numpy())

    x_adv = by_hand(name, preset, student, x, y, rng, on_step=record, **changes)
    correct = np.stack(correct)
    assert len(correct) == 10
    first = np.where(correct.all(axis=0), 10, (~correct).argmax(axis=0))
    return x_adv, first, correct.sum(axis=0)
