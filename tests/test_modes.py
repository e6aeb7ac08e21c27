"""A borrowed model comes back with its own flags."""

import pytest
import torch
from torch import nn

from ferdlib._modes import borrowed


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
    with borrowed(model, other, training=training, freeze=freeze):
        inside = state(model, other)
        assert inside[0] == (flags if training is None else [training] * len(flags))
        assert inside[1] == ([False] * len(gradients) if freeze else gradients)
        model.train()  # a change of the block is undone all the same
    assert state(model, other) == before


def test_defaults_are_eval_and_frozen():
    model = mixed()
    with borrowed(model):
        flags, gradients = state(model)
        assert not any(flags)
        assert not any(gradients)


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


def test_what_is_no_module_is_ignored():
    model = mixed()
    before = state(model)
    with borrowed(lambda x: x, None, 3, model):
        assert not model.training
    assert state(model) == before
    with borrowed():
        pass


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


def test_no_weight_gradient_is_built_inside_the_block():
    model = nn.Linear(3, 2)
    with borrowed(model):
        assert not model(torch.randn(4, 3)).requires_grad
    assert model(torch.randn(4, 3)).requires_grad
