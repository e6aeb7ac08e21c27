"""A borrowed model comes back with its own flags."""

import copy
import threading
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn

from ferdlib._modes import ask, borrowed, lent, modules_behind
from ferdlib.attacks import pgd
from ferdlib.losses import cross_entropy


def seeded():
    return torch.Generator().manual_seed(0)


def mixed():
    """Train and eval modules, frozen and trainable parameters, side by side."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()), nn.Linear(4, 2)
    )
    model[1][0].eval()
    model[1][1].eval()
    model[0].weight.requires_grad_(False)
    model[1][0].bias.requires_grad_(False)
    return model


def state(*models):
    flags = [m.training for model in models for m in model.modules()]
    return flags, [p.requires_grad for model in models for p in model.parameters()]


def test_the_model_of_these_tests_is_mixed():
    flags, gradients = state(mixed())
    assert set(flags) == set(gradients) == {True, False}


@pytest.mark.parametrize("training", [True, False, None])
@pytest.mark.parametrize("freeze", [True, False])
def test_flags_inside_and_after(training, freeze):
    model, other = mixed(), mixed().eval()
    before = flags, gradients = state(model, other)
    # A model that trains already keeps the layers that its owner froze.
    wanted = {None: flags, False: [False] * len(flags), True: [*state(model)[0], *[True] * 6]}
    with borrowed(model, other, training=training, freeze=freeze):
        inside = state(model, other)
        assert inside[0] == wanted[training]
        assert inside[1] == ([False] * len(gradients) if freeze else gradients)
        model.train()  # a change of the block is undone all the same
    assert state(model, other) == before


def test_an_exception_passes_and_the_model_is_given_back():
    model = mixed()
    before = state(model)
    with pytest.raises(ZeroDivisionError), borrowed(model):
        raise ZeroDivisionError
    assert state(model) == before


def test_nested_blocks_undo_one_layer_each():
    model = mixed()
    before = state(model)
    with borrowed(model, freeze=False):
        outer = state(model)
        with borrowed(model, training=True):
            assert set(state(model)[0]) == {True}
            assert set(state(model)[1]) == {False}
        assert state(model) == outer
    assert state(model) == before


def test_shared_modules_and_parameters():
    shared = nn.Linear(3, 3)
    shared.bias.requires_grad_(False)
    tied = nn.Linear(3, 3)
    tied.weight = shared.weight
    first, second = nn.Sequential(shared, shared), nn.Sequential(tied, shared).eval()
    shared.train()
    before = state(first, second)
    with borrowed(first, second, first):
        assert not any(state(first, second)[0])
        assert not any(state(first, second)[1])
    assert state(first, second) == before
    assert shared.training
    assert not tied.training


NORM = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))
X, Y = torch.rand(6, 1, 2, 2), torch.tensor([0, 1] * 3)


class Holder:
    def __init__(self):
        self.net = NORM

    def predict(self, x):
        return self.net(x)

    __call__ = predict


def named(x):
    return NORM(x)


def closures():
    net, holder, several = NORM, Holder(), [NORM]
    return {
        "closure": lambda x: net(x),
        "attribute of what it closes over": lambda x: holder.net(x),
        "list": lambda x: several[0](x),
        "default": lambda x, net=net: net(x),
        "function of a function": lambda x: named(x) / 2,
    }


CALLABLES = closures() | {
    "global": named,
    "bound method": NORM.forward,
    "method of a holder": Holder().predict,
    "object": Holder(),
    "partial": partial(lambda net, x: net(x), NORM),
    "compiled": torch.compile(named, backend="eager"),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile reads it
@pytest.mark.parametrize("model", CALLABLES.values(), ids=CALLABLES)
def test_an_attack_finds_the_module_behind_a_callable(model):
    assert modules_behind(model) == [NORM]
    seen = NORM.train()[1].num_batches_tracked.clone()
    pgd(model, X, Y, steps=3)
    assert NORM[1].num_batches_tracked == seen
    assert all(m.training for m in NORM.modules())
    pgd(model, X, Y, steps=3, train_mode=True)
    assert NORM[1].num_batches_tracked == seen + 3


def test_train_mode_switches_none_of_several_models():
    seen = NORM.train()[1].num_batches_tracked + 3
    other = copy.deepcopy(NORM).eval()
    pgd(lambda x: NORM(x) + other(x), X, Y, steps=3, train_mode=True)
    assert NORM[1].num_batches_tracked == seen == other[1].num_batches_tracked + 3


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_is_no_module_is_ignored():
    model = mixed()
    before = state(model)
    frozen = torch.jit.freeze(torch.jit.script(nn.ReLU().eval()))  # has no `training`
    with borrowed(lambda x: x, None, 3, nn.Linear, frozen, model):
        assert not model.training
    assert state(model) == before
    with borrowed():
        pass


def test_what_code_of_others_does_to_a_model_is_undone():
    model = mixed().train()
    model[0].bias.grad = torch.ones(4)
    before, values = state(model), {k: v.clone() for k, v in model.state_dict().items()}
    buffers = [id(b) for b in model.buffers()]
    with torch.no_grad(), lent(model):
        model.train().requires_grad_()
        model(torch.randn(5, 3)).sum().backward()
        model.zero_grad(set_to_none=False)
        model.eval()
    assert state(model) == before
    assert [id(b) for b in model.buffers()] == buffers
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert model[0].bias.grad.tolist() == [1] * 4
    assert model[2].weight.grad is None


def test_a_thread_waits_until_another_one_has_given_the_model_back():
    model, order = mixed().train(), []
    wrapper, before = nn.Sequential(model), state(model)
    inside, leave = threading.Event(), threading.Event()

    def first():
        with borrowed(wrapper):
            inside.set()
            leave.wait(30)
            order.append(("first leaves", any(m.training for m in model.modules())))

    def second():
        with borrowed(model, training=None, freeze=False):
            order.append(("second enters", state(model) == before))

    threads = [threading.Thread(target=each) for each in (first, second)]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    with borrowed(mixed()):  # another model is free
        threads[1].join(0.2)
        assert order == []
    leave.set()
    for thread in threads:
        thread.join(30)
    assert order == [("first leaves", False), ("second enters", True)]
    assert state(model) == before


def test_logits_are_found_in_what_a_model_returns_for_a_copy_of_the_images():
    class Output(NamedTuple):
        logits: torch.Tensor
        aux_logits: torch.Tensor | None = None

    def model(x):
        return x.mul_(2).flatten(1)

    x = X.clone()
    for wrapped in (model, lambda x: Output(model(x)), lambda x: {"logits": model(x), "loss": 1}):
        assert torch.equal(ask(wrapped, x), 2 * X.flatten(1))
        assert torch.equal(pgd(wrapped, x, Y, rng=seeded()), pgd(model, x, Y, rng=seeded()))
        assert torch.equal(cross_entropy(wrapped(X.clone()), Y), cross_entropy(2 * X.flatten(1), Y))
    assert torch.equal(x, X)


def test_a_graph_built_before_the_block_still_reaches_the_weights():
    student, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 3)
    student(x).sum().backward()
    expected = [p.grad.clone() for p in student.parameters()]
    student.zero_grad(set_to_none=True)
    loss = student(x).sum()
    with borrowed(student):
        x_adv = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(student(x_adv).sum(), x_adv)
        assert gradient.abs().sum() > 0
    assert all(p.grad is None for p in student.parameters())
    loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(student.parameters(), expected, strict=True))
