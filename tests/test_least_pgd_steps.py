"""What `least_pgd_steps` counts, on models whose predictions are scripted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ferdlib import losses
from ferdlib.attacks import StepCounter, cw_linf, least_pgd_steps, pgd, utae_pgd

COUNTS = ("first", "correct")
IMAGES = torch.rand(40, 2, 6, 5, generator=torch.Generator().manual_seed(0))


class Scripted(nn.Module):
    """Answers by a table `correct[sample][step]`: class 1 where true, class 0 where false."""

    def __init__(self, correct):
        super().__init__()
        self.correct, self.calls = torch.tensor(correct), 0

    def forward(self, x):
        answer = self.correct[:, self.calls].long()
        self.calls += 1
        return 5 * torch.eye(3)[answer] + x.mean((1, 2, 3))[:, None]


def counted(correct, count):
    model = Scripted(correct)
    n, steps = model.correct.shape
    x, y = torch.full((n, 1, 2, 2), 0.5), torch.ones(n, dtype=torch.int64)
    _, lps = least_pgd_steps(model, x, y, steps=steps, count=count)
    assert model.calls == steps  # x^(K) is not evaluated
    assert lps.dtype == torch.int64
    return lps.tolist()


PATHS = {  # the answers at x^(0)..x^(4): the first wrong one, how many correct
    "never fooled": ([1, 1, 1, 1, 1], 5, 5),
    "start wrong": ([0, 0, 0, 0, 0], 0, 0),
    "crosses at 3": ([1, 1, 1, 0, 0], 3, 3),
    "last seen iterate": ([1, 1, 1, 1, 0], 4, 4),
    "crosses back": ([1, 0, 1, 1, 0], 1, 3),
    "start wrong, then back": ([0, 1, 1, 1, 1], 0, 4),
}


@pytest.mark.parametrize("count", COUNTS)
def test_paths_in_one_batch(count):
    paths = [[bool(answer) for answer in path] for path, _, _ in PATHS.values()]
    expected = [numbers[COUNTS.index(count)] for _, *numbers in PATHS.values()]
    assert counted(paths, count) == expected


@given(
    st.integers(1, 6).flatmap(
        lambda k: st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=1, max_size=5)
    )
)
@settings(max_examples=40, deadline=None)
def test_any_path(paths):
    assert counted(paths, "first") == [(*path, False).index(False) for path in paths]
    assert counted(paths, "correct") == [sum(path) for path in paths]


def above(threshold):
    """Class 1 while the pixel is above the threshold."""
    return lambda x: torch.stack([torch.full((len(x),), threshold), x[:, 0, 0, 0]], dim=1)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.43, 4), (0.45, 3), (0.41, 5), (0.39, 6), (0.51, 0)]
)
def test_a_known_crossing(threshold, expected, count):
    # 0.50, 0.48, 0.46, 0.44, 0.42, 0.40 are looked at, and 0.40 is where the ball ends.
    arguments = {"eps": 0.1, "step_size": 0.02, "steps": 6, "random_start": None}
    x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([1])
    x_adv, lps = least_pgd_steps(above(threshold), x, y, count=count, **arguments)
    assert lps.tolist() == [expected]
    assert x_adv.item() == pytest.approx(0.4)


def test_labels_decide_when_the_attack_is_on_teacher_logits(tiny_model):
    teacher, x = tiny_model(seed=1), IMAGES[:6]
    paths = [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], *2 * [[1, 0, 0, 1]]]
    paths = [[bool(answer) for answer in path] for path in paths]
    reference, arguments = teacher(x).detach()[:, :3], {"loss": losses.distillation, "steps": 4}
    labels = torch.ones(6, dtype=torch.int64)
    _, lps = least_pgd_steps(Scripted(paths), x, reference, labels=labels, **arguments)
    assert lps.tolist() == [4, 0, 2, 1, 1, 1]
    labels = torch.zeros(6, dtype=torch.int64)
    _, lps = least_pgd_steps(Scripted(paths), x, reference, labels=labels, **arguments)
    assert lps.tolist() == [0, 4, 0, 0, 0, 0]
    labels = torch.tensor([2] * 6)
    model = tiny_model()
    x_adv, _ = least_pgd_steps(
        model, x, teacher(x), labels=labels, loss=losses.distillation, random_start=None
    )
    on_logits = pgd(model, x, teacher(x), loss=losses.distillation, random_start=None)
    assert torch.equal(x_adv, on_logits)


def test_on_step_sees_the_iterates_before_each_update(tiny_model):
    model, y = tiny_model(), torch.arange(4)
    x = IMAGES[:4]
    arguments = {"eps": 0.1, "step_size": 0.03, "random_start": 0.05 * (x - 0.5)}
    seen = []

    def on_step(step, x_adv, logits):
        assert not x_adv.requires_grad
        assert not logits.requires_grad
        seen.append((step, x_adv.clone(), logits))

    x_adv, lps = least_pgd_steps(model, x, y, steps=5, on_step=on_step, **arguments)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
    for step, iterate, logits in seen:
        assert torch.equal(iterate, pgd(model, x, y, steps=step, **arguments))
        assert torch.equal(logits, model(iterate))
    assert torch.equal(x_adv, pgd(model, x, y, steps=5, **arguments))
    correct = torch.stack([logits.argmax(dim=1) == y for _, _, logits in seen])
    assert lps.tolist() == correct.cumprod(dim=0).sum(dim=0).tolist()


@pytest.mark.parametrize("count", COUNTS)
def test_the_images_are_those_of_pgd(tiny_model, count):
    model, y = tiny_model(), torch.arange(4)
    x = IMAGES[:4]
    x_adv, _ = least_pgd_steps(model, x, y, count=count, rng=torch.Generator().manual_seed(7))
    assert torch.equal(x_adv, pgd(model, x, y, rng=torch.Generator().manual_seed(7)))


def test_the_counts_work_inside_inference_mode():
    with torch.inference_mode():
        x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([1])
        arguments = {"eps": 0.1, "step_size": 0.02, "steps": 6, "random_start": None}
        _, lps = least_pgd_steps(above(0.43), x, y, **arguments)
        assert lps.tolist() == [4]


def test_an_output_without_logits_is_named():
    x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([1])
    arguments = {"loss": lambda output, y: losses.cross_entropy(output["z"], y)}
    with pytest.raises(TypeError, match=r"^least_pgd_steps: .*`model\(x\)`"):
        least_pgd_steps(lambda x: {"z": above(0.4)(x)}, x, y, **arguments)
    with pytest.raises(TypeError, match=r"^StepCounter: .*`model\(x\)`"):
        pgd(lambda x: {"z": above(0.4)(x)}, x, y, on_step=StepCounter(y, 10), **arguments)


COUNTED = {  # attacks of four steps on labels, another model's logits, and two models at once
    "pgd": lambda m, x, y, **k: pgd(m, x, y, steps=4, **k),
    "cw_linf": lambda m, x, y, **k: cw_linf(m, x, y, steps=4, **k),
    "utae_pgd": lambda m, x, y, **k: utae_pgd(m, x, m(x).roll(1, 1), steps=4, **k),
    "a pair": lambda m, x, y, **k: pgd(
        lambda x: (m(x), m(x).roll(1, 1)),
        x,
        y,
        loss=lambda z, _: losses.distillation(*z),
        steps=4,
        **k,
    ),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("attack", list(COUNTED))
def test_a_counter_counts_any_attack(tiny_model, attack, count):
    model = tiny_model()
    x = IMAGES
    y, path = model(x).argmax(dim=1), []
    arguments = {"eps": 0.1, "step_size": 0.03, "random_start": 0.01 * (x - 0.5)}
    COUNTED[attack](model, x, y, on_step=lambda _, adv, __: path.append(adv), **arguments)
    correct = torch.stack([model(adv).argmax(dim=1) == y for adv in path])
    expected = (correct.cumprod(dim=0) if count == "first" else correct.long()).sum(dim=0)
    counter = StepCounter(y, 4, count=count)
    COUNTED[attack](model, x, y, on_step=counter, **arguments)
    assert counter.counts.dtype == torch.int64
    assert torch.equal(counter.counts, expected)
    assert len(set(expected.tolist())) > 2


def test_a_counter_follows_the_samples_that_an_early_stop_leaves(tiny_model):
    model = tiny_model()
    x = IMAGES
    y = model(x).argmax(dim=1)
    arguments = {"eps": 0.1, "step_size": 0.01, "steps": 6, "random_start": None}
    _, expected = least_pgd_steps(model, x, y, **arguments)
    counter = StepCounter(y, 6)
    pgd(model, x, y, on_step=counter, early_stop=True, **arguments)
    assert torch.equal(counter.counts, expected)
    assert len(set(expected.tolist())) > 2
    for counter in (StepCounter(y, 6, count="correct"), StepCounter(y.roll(1), 6)):
        with pytest.raises(ValueError, match=r"^StepCounter: expected `model\(x\)` of 40 samples"):
            pgd(model, x, y, on_step=counter, early_stop=True, **arguments)


def test_a_counter_ignores_what_is_behind_its_steps():
    counter = StepCounter(torch.tensor([0, 0]), 1)
    counter(0, None, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    counter(1, None, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert counter.counts.tolist() == [1, 0]
