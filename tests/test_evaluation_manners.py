"""What `evaluate` and `trust_checks` refuse, leave behind, cost and show."""

import logging
import re
import weakref
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import make_tiny_model
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from ferdlib.evaluation import AttackSpec, Protocol, evaluate, trust_checks
from ferdlib.losses import cross_entropy

K = 3
X = torch.rand(12, 2, 6, 6, generator=torch.Generator().manual_seed(0))
Y = make_tiny_model(K)(X).argmax(dim=1)  # all of them
DATA = TensorDataset(X, Y)
CUT_SHORT = DistributedSampler(DATA, 5, 0, shuffle=False, drop_last=True)
OWN = Protocol(name="own", attacks=(AttackSpec(name="own", kind="custom", eps=0.1),))


def run(**change):
    arguments = {"model": make_tiny_model(K), "data": (X, Y), "protocol": "quick"}
    arguments |= {"num_classes": K} | change
    return evaluate(**arguments)


def loader(x=X, y=Y):
    return DataLoader(TensorDataset(x, y), batch_size=5)


def outputs(function):
    """A model whose output goes through a function."""
    inner = make_tiny_model(K)
    return lambda x: function(inner(x))


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"data": (X[:0], Y[:0])}, ValueError, "data"),
        ({"data": []}, ValueError, "data"),
        ({"data": DataLoader(TensorDataset(X[:0], Y[:0]))}, ValueError, "data"),
        ({"data": [X]}, TypeError, "data"),
        ({"data": loader(X, Y.float())}, TypeError, "labels of data"),
        ({"data": loader(X, Y.int())}, TypeError, "labels of data"),
        ({"data": (X, Y[1:])}, ValueError, "labels of data"),
        ({"data": (X, Y + 1)}, ValueError, "labels of data"),
        ({"data": loader(X, Y - 1)}, ValueError, "labels of data"),
        ({"data": loader(X[:, 0], Y)}, ValueError, "data"),
        ({"data": ((255 * X).byte(), Y)}, TypeError, "data"),
        ({"data": (2 * X - 1, Y)}, ValueError, "data"),
        ({"data": (2 * X - 1, Y), "protocol": "robustbench"}, ValueError, "data"),
        ({"data": TensorDataset(X, Y, Y)}, TypeError, "data"),
        ({"data": DataLoader(TensorDataset(X, Y), sampler=[0, 1, 1])}, ValueError, "data"),
        ({"data": DataLoader(DATA, 5, drop_last=True)}, ValueError, "data"),
        ({"data": DataLoader(DATA, sampler=CUT_SHORT)}, ValueError, "data"),
        ({"data": [{"pixel_values": X, "class": Y}]}, TypeError, "data"),
        ({"protocol": AttackSpec(name="a", kind="custom", eps=0.1)}, TypeError, "protocol"),
        ({"num_classes": 4}, ValueError, r"model\(x\)"),
        ({"class_names": ["a", "b"]}, ValueError, "class_names"),
        ({"groups": 0 * Y}, ValueError, "groups"),
        ({"groups": Y[:0]}, ValueError, "groups"),
        ({"groups": Y[:11]}, ValueError, "groups"),
        ({"groups": Y[:11], "data": [(X, Y)]}, ValueError, "groups"),
        ({"groups": Y, "group_names": ["a", "b"]}, ValueError, "group_names"),
        ({"bounds": (1.0, 0.0)}, ValueError, "bounds"),
        ({"bounds": (-1.0, 1.0), "protocol": "fair-ard"}, ValueError, "bounds"),
        ({"protocol": OWN}, ValueError, "custom"),
        ({"custom": {"own": lambda model, x, y: x}}, ValueError, "custom"),
        ({"model": outputs(lambda z: (z, z))}, ValueError, r"model\(x\)"),
        ({"model": outputs(lambda z: z[:, :2])}, ValueError, r"model\(x\)"),
        ({"model": outputs(lambda z: z[:, None])}, ValueError, r"model\(x\)"),
        ({"model": outputs(lambda z: z[1:])}, ValueError, r"model\(x\)"),
        ({"model": outputs(lambda z: z * torch.nan)}, RuntimeError, r"model\(x\)"),
        ({"model": outputs(lambda z: z.argmax(1))}, ValueError, r"model\(x\)"),
    ],
)
def test_errors_name_the_argument(change, error, argument):
    with pytest.raises(error, match=rf"^evaluate: expected .*`{argument}`"):
        run(**change)


def test_many_absent_classes_are_one_line(caplog):
    names = [f"c{k}" for k in range(1000)]

    def model(x):
        return nn.functional.pad(make_tiny_model(K)(x), (0, 1000 - K))

    with caplog.at_level(logging.WARNING, logger="ferdlib"):
        report = run(model=model, num_classes=1000, class_names=names)
    listed = ", ".join(names[K : K + 10]) + f" and {1000 - K - 10} more"
    assert caplog.messages == [f"evaluate: no samples of {listed}; left out of every figure"]
    assert f"left out of every figure: {listed}\n" in f"{report}\n"


def test_groups_that_are_too_short_are_found_before_the_work():
    calls = []
    with pytest.raises(ValueError, match="`groups` for every index of `data`, got 11 for an index"):
        run(model=calls.append, groups=Y[:11], batch_size=4)
    assert calls == []


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda x: x + 0.2, "within `eps` 0.1, got a change of 0.2"),
        (lambda x: x * torch.nan, "within `eps` 0.1, got a change of nan"),
        (lambda x: x.add_(0.2), "within `eps` 0.1, got a change of 0.2"),
        (lambda x: x + 0.1001, r"within `eps` 0\.1, got a change of 0\.1001"),
        (lambda x: (x + 0.05).clamp(max=1 + 2e-7), r"from 0\.\d+ to 1\.0000002; clamp them to"),
        (lambda x: x - 0.05, "inside bounds 0 to 1, got values from"),
        (lambda x: x[1:], r"of shape \(12, 2, 6, 6\), got a float32 tensor"),
        (lambda x: None, r"of shape \(12, 2, 6, 6\), got NoneType"),
    ],
)
def test_a_custom_attack_is_not_taken_at_its_word(found, message):
    images = X.clone()
    attack = {"own": lambda model, x, y: found(x)}
    with pytest.raises(ValueError, match=rf"^evaluate: expected the attack 'own' to .*{message}"):
        run(protocol=OWN, custom=attack, data=[(images, Y)])
    assert torch.equal(images, X)


def test_a_custom_attack_is_judged_by_what_it_returns():
    """The labels' images are brought to what the model takes for another class."""
    model = make_tiny_model(K)

    def attack(given, x, targets):
        assert given is model
        assert not any(m.training for m in given.modules())
        assert torch.is_grad_enabled()
        return (x + 0.1 * torch.linspace(-1, 1, 6)).clamp(0, 1)

    with torch.no_grad():
        report = run(model=model.train(), protocol=OWN, custom={"own": attack}, batch_size=5)
        expected = model.eval()((X + 0.1 * torch.linspace(-1, 1, 6)).clamp(0, 1)).argmax(dim=1)
    assert torch.equal(report.predictions["own"], expected)
    assert not torch.equal(report.predictions["own"], report.predictions["clean"])


def test_what_a_custom_attack_does_to_the_model_changes_nothing_else():
    def released(model, x, y):
        model.train().requires_grad_()
        cross_entropy(model(x), y).sum().backward()
        return x

    model = make_tiny_model(K).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        report = run(model=model, protocol=OWN, custom={"own": released}, batch_size=5)
    assert torch.equal(report.predictions["own"], Y)
    assert torch.equal(report.predictions["clean"], Y)
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_may_write_to_its_input_and_name_its_logits():
    class Output(NamedTuple):
        logits: torch.Tensor
        loss: None = None

    net, images, custom = make_tiny_model(K), X.clone(), {"own": lambda model, x, y: x}
    report = run(model=lambda x: net(2 * x - 1), trust=True)
    for model in (lambda x: net(x.mul_(2).sub_(1)), lambda x: Output(net(2 * x - 1))):
        assert run(model=model, data=(images, Y), trust=True) == report
        assert torch.equal(images, X)
        run(model=model, data=(images, Y), protocol=OWN, custom=custom)
        assert torch.equal(images, X)


@pytest.mark.parametrize("default", ["device", "dtype"])
def test_torchs_defaults_change_nothing(default):
    net = make_tiny_model(K)
    settings = {
        "model": net,
        "class_names": np.array(["a", "b", "c"]),
        "num_classes": Y.numpy().max() + 1,
    }
    report = run(**settings)
    old = torch.get_default_dtype()
    try:
        torch.set_default_device("meta") if default == "device" else None
        torch.set_default_dtype(torch.float64 if default == "dtype" else old)
        again = run(**settings, data=DATA)
        shown = str(again), again.to_csv(), again["clean"].confusion.tolist()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(old)
    assert again == report
    assert shown[1:] == (report.to_csv(), report["clean"].confusion.tolist())


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"data": []}, ValueError, "data"),
        ({"data": (X, Y + 1)}, ValueError, "labels of data"),
        ({"model": outputs(lambda z: (z, z))}, ValueError, r"model\(x\)"),
        ({"model": outputs(lambda z: z * torch.nan)}, RuntimeError, r"model\(x\)"),
    ],
)
def test_trust_checks_name_the_argument(change, error, argument):
    arguments = {"model": make_tiny_model(K), "data": (X, Y), "protocol": "quick"}
    with pytest.raises(error, match=rf"^trust_checks: expected .*`{argument}`"):
        trust_checks(**(arguments | {"num_classes": K} | change))


def test_an_absent_class_is_left_out_with_a_word(caplog):
    few = Y < 2
    assert (Y == 2).any()
    with caplog.at_level(logging.WARNING, logger="ferdlib"):
        report = run(data=(X[few], Y[few]), class_names=["a", "b", "gone"], trust=True)
    assert caplog.messages == ["evaluate: no samples of gone; left out of every figure"]
    found = report["PGD-10"]
    assert found.class_accuracy[2].isnan()
    assert found.average == pytest.approx(float(found.class_accuracy[:2].mean()))
    for text in (str(report), report.to_markdown()):
        assert "no samples, left out of every figure: gone" in text


@pytest.fixture
def mixed():
    """Half in train mode, a frozen BatchNorm, a frozen parameter, gradients here and there."""
    model = make_tiny_model(K).train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    return model


def state(model):
    return {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "random": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
    }


def work(model):
    """Everything that draws: a loader with its own generator, the starts, trust checks with Square."""
    data = DataLoader(TensorDataset(X, Y), batch_size=5, generator=torch.Generator())
    return evaluate(model, data, "quick", num_classes=K, trust=True)


class Iterated(IterableDataset):
    def __iter__(self):
        return zip(X, Y, strict=True)


def test_no_trace(mixed):
    before, images = state(mixed), X.clone()
    work(mixed)
    trust_checks(mixed, TensorDataset(X, Y), "quick", num_classes=K)
    stream = DataLoader(Iterated(), batch_size=5, generator=torch.Generator())
    evaluate(mixed, stream, "quick", num_classes=K)
    assert state(mixed) == before
    assert torch.equal(X, images)


class Failing(nn.Module):
    def __init__(self, model, at):
        super().__init__()
        self.model, self.left = model, at

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError
        return self.model(x)


@pytest.mark.parametrize("at", [1, 2, 10, 50, 300])  # clean, FGSM, PGD, trust checks, Square
def test_no_trace_after_an_exception(mixed, at):
    before = state(mixed)
    with pytest.raises(ZeroDivisionError):
        work(Failing(mixed, at))
    assert state(mixed) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_surroundings_without_gradients(mode):
    expected, model = run(trust=True), make_tiny_model(K)
    with mode():
        x, y = X.clone(), Y.clone()
        assert run(model=model, data=(x, y), trust=True) == expected
        assert run(model=model, data=[(x, y)], trust=True) == expected
        checked = trust_checks(model, [(x, y)], "quick", num_classes=K)
    assert set(checked) <= set(expected.findings)


def test_what_it_costs():
    """Clean 1, FGSM 1 step and its end, PGD-10 10 steps and theirs: 14 passes for each batch."""
    calls, model = [], make_tiny_model(K)
    run(model=lambda x: (calls.append(len(x)), model(x))[1], batch_size=5)
    assert calls == [5] * 14 + [5] * 14 + [2] * 14


def test_samples_that_are_done_with_are_let_go():
    alive = []

    def stream():
        for k in range(60):
            array = np.full((4, 2, 6, 6), k / 60, dtype=np.float32)
            alive.append(weakref.ref(array))
            yield torch.from_numpy(array), torch.arange(4) % K
            assert sum(ref() is not None for ref in alive) <= 3

    report = run(data=stream(), batch_size=4)
    assert len(report) == 240


def test_progress_is_shown_on_request(capfd):
    report = run()
    assert capfd.readouterr() == ("", "")
    assert run(progress=True) == report
    out, err = capfd.readouterr()
    assert out == ""
    found = report["worst case"]
    last = re.split(r"[\r\n]+", err.strip())[-1]
    assert last.startswith("evaluate: 100%")
    assert "12/12" in last
    worst = f"worst class {100 * found.worst_class:.1f} % ({found.worst_name})"
    assert f"worst case {100 * found.average:.1f} %, {worst}" in last
    run(progress="the student")
    assert "the student: 100%" in capfd.readouterr().err
