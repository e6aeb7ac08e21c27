"""AutoAttack through `evaluate`: the official flags, batch by batch and member by member."""

import sys
from itertools import pairwise

import pytest
import torch
from pyautoattack import AutoAttack
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ferdlib.attacks import autoattack
from ferdlib.evaluation import AttackSpec, Protocol, evaluate


@pytest.fixture(autouse=True)
def tracing():
    """The official suite stops tracing; keep that from the debugger and the coverage."""
    trace = sys.gettrace()
    yield
    sys.settrace(trace)


class Stairs(nn.Module):
    """A linear model of quantised images: its zero gradients leave work for the later attacks."""

    def __init__(self, num_classes):
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.linear = nn.Linear(16, num_classes)
        self.linear.weight.data = torch.randn(num_classes, 16, generator=rng)
        self.linear.bias.data = -0.5 * self.linear.weight.data.sum(dim=1)

    def forward(self, x):
        return self.linear(((8 * x).round() / 8).flatten(1))


def problem(num_classes, n):
    """Images of which the model calls all but the first right."""
    model = Stairs(num_classes)
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(dim=1).detach()
    y[0] = (y[0] + 1) % num_classes
    return model, x, y


def protocol(**settings):
    return Protocol(
        name="test", attacks=(AttackSpec(name="AA", kind="autoattack", **settings),), seed=3
    )


def test_it_is_the_official_evaluation_of_each_batch():
    model, x, y = problem(200, 4)
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    report = evaluate(model, loader, protocol(eps=0.06, batch_size=2), num_classes=200)

    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    ours = [
        autoattack(model, *batch, num_classes=200, eps=0.06, batch_size=2, seed=3)
        for batch in batches
    ]
    flags = {name: torch.cat([o.per_attack[name] for o in ours]) for name in ours[0].per_attack}
    assert report.stages["AA"] == tuple(flags)
    assert report.members("AA") == ("AA/apgd-ce", "AA/apgd-t", "AA/fab-t", "AA/square")
    for member in report.members("AA"):
        assert torch.equal(report[member].robust, flags[member.removeprefix("AA/")])
    assert torch.equal(report["AA"].robust, flags["square"])
    assert torch.equal(report.predictions["AA"], torch.cat([o.predictions for o in ours]))
    for i, winner in enumerate(report.winners):
        first = next((name for name, robust in flags.items() if not robust[i]), "")
        assert winner == (first if first in ("", "clean") else f"AA/{first}")
    share = torch.stack(list(flags.values())).double()
    present = y.unique()
    by_hand = torch.stack([share[:, y == k].mean(dim=1) for k in present])
    assert torch.equal(report.survival("AA")[present], by_hand)

    suite = AutoAttack(model, eps=0.06, version="standard", seed=3)
    official = [suite.run_standard_evaluation(*batch, batch_size=2)[1] for batch in batches]
    assert torch.equal(report.predictions["AA"], torch.cat(official))

    assert all((later <= earlier).all() for earlier, later in pairwise(flags.values()))
    assert sum(int((b < a).any()) for a, b in pairwise(flags.values())) >= 2
    assert flags["clean"].tolist() == [False, True, True, True]


MEMBERS = {2: ("apgd-ce", "fab-t", "square"), 3: ("apgd-ce", "fab-t", "square")}
MEMBERS[4] = ("apgd-ce", "apgd-t", "fab-t", "square")


@pytest.mark.parametrize("num_classes", list(MEMBERS))
def test_few_classes(num_classes, capfd):
    model, x, y = problem(num_classes, 2)
    x = (8 * x).round() / 8  # 0.01 does not lead to the next of the eight stairs
    report = evaluate(
        model, (x, y), protocol(eps=0.01), num_classes=num_classes, progress=num_classes == 4
    )
    assert report.members("AA") == tuple(f"AA/{name}" for name in MEMBERS[num_classes])
    assert report["AA"].robust.tolist() == [False, True]
    assert report.winners == ("clean", "")
    out, err = capfd.readouterr()
    assert out == ""
    assert ("square, 1 of 2 left" in err) == (num_classes == 4)


@pytest.mark.parametrize(("batch_size", "first"), [(128, [4, 4, 4]), (3, [3, 1, 3, 3, 1, 1])])
def test_the_batch_size_of_the_attack_is_its_own(batch_size, first):
    """Blocks of AutoAttack's size, whatever that of the data is; plain attacks take the smaller one."""
    model, x, y = problem(10, 6)
    seen = []

    def watched(x):
        seen.append(len(x))
        return model(x)

    attacks = (
        AttackSpec(name="PGD", kind="pgd", eps=0.9, step_size=0.9, steps=1),
        AttackSpec(name="AA", kind="autoattack", eps=0.9, batch_size=4),
    )
    both = Protocol(name="both", attacks=attacks)
    evaluate(watched, (x, y), both, num_classes=10, batch_size=batch_size)
    assert seen[: len(first)] == first  # clean, then the step and the last iterate of PGD
    assert seen[len(first)] == max(seen) == 4  # AutoAttack's own clean pass


def test_weights_and_random_state_stay():
    model, x, y = problem(4, 2)
    before = torch.get_rng_state()
    evaluate(model, (x, y), protocol(eps=0.9), num_classes=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
