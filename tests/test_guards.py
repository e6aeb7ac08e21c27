"""Numbers that are not finite stop a run and are written down, collapse is warned of, memory is bounded."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from test_trainer import make_trainer
from tiny_ferd import Recorder

from ferdlib.synthesis import ImagePool
from ferdlib.synthesis.health import first_bad, is_finite
from ferdlib.trainer.monitor import CollapseMonitor, EpochStats


def at_call(number, function, change):
    """Wrap a function so that its result is changed at one call."""
    calls = []

    def changed(*arguments, **more):
        result = function(*arguments, **more)
        calls.append(1)
        return change(result) if len(calls) == number else result

    return changed


def nan(value):
    return value * float("nan")


class Spoilt(torch.autograd.Function):
    """The identity, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def figures(folder):
    (path,) = folder.iterdir()
    return path, json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize(
    "change", [nan, lambda loss: loss / 0, Spoilt.apply], ids=["nan", "infinity", "gradient"]
)
def test_the_students_first_bad_step_is_named(change, tmp_path):
    trainer = make_trainer(student_steps=5, diagnostics=tmp_path / "new")
    trainer.method.loss = at_call(8, trainer.method.loss, change)  # warm-up, 5 steps, 3 steps
    sentence = (
        r"^FERDTrainer: expected finite losses, gradients and logits, got NaN or infinity in epoch 3, "
        r"step 3 of the student; lower `student_lr`; '.*' has the figures$"
    )
    with pytest.raises(RuntimeError, match=sentence) as error:
        trainer.fit()
    path, found = figures(tmp_path / "new")
    assert str(path) in str(error.value)
    assert (found["part"], found["epoch"], found["step"]) == ("student", 3, 3)
    losses = found["losses"]["student"]
    assert len(losses) == 3  # the attack of the next step refused the student
    assert all(isinstance(loss, float) for loss in losses[:2])
    assert isinstance(losses[2], float) or losses[2] in ("nan", "inf")
    assert sum(found["class_probabilities"]) == pytest.approx(1, abs=1e-5)
    assert found["learning_rates"] == pytest.approx([0.1 * (1 + math.cos(2 / 3 * math.pi)) / 2])
    assert {"fc.weight", "fc.weight.grad"} <= set(found["non_finite"]["student"])
    assert found["non_finite"]["generator"] == []
    assert trainer.epoch == 2


def test_weights_that_overflow_are_the_students():
    trainer = make_trainer(student_steps=5, warmup_epochs=0)
    trainer.student_optimizer.step = at_call(
        2, trainer.student_optimizer.step, lambda _: spoil(trainer)
    )
    with pytest.raises(RuntimeError, match="epoch 1, step 3 of the student; lower `student_lr`$"):
        trainer.fit()


@pytest.mark.parametrize("value", [float("inf"), 1e30])
def test_a_last_step_that_explodes_is_the_students_and_not_the_next_generators(value):
    """Its loss and gradients were finite; 1e30 is a weight whose logits overflow."""
    trainer = make_trainer(student_steps=5, warmup_epochs=0)
    step = trainer.student_optimizer.step
    trainer.student_optimizer.step = at_call(5, step, lambda _: spoil(trainer, value))
    with pytest.raises(RuntimeError, match="epoch 1, step 5 of the student; lower `student_lr`$"):
        trainer.fit()


def test_an_attack_that_fails_at_a_student_with_huge_weights_is_not_blamed():
    def attack(student, x, y):
        if not bool(student(x).square().sum().isfinite()):
            raise ValueError("expected other images")
        return x

    trainer = make_trainer(student_steps=5, warmup_epochs=0, attack=attack)
    step = trainer.student_optimizer.step
    trainer.student_optimizer.step = at_call(2, step, lambda _: spoil(trainer, 1e30))
    with pytest.raises(RuntimeError, match="epoch 1, step 3 of the student; lower `student_lr`$"):
        trainer.fit()


def spoil(trainer, value=float("inf")):
    trainer.student.fc.weight.data[0] = value


def test_another_failure_is_not_taken_for_one():
    def broken(student, x, y):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="^out of memory$"):
        make_trainer(attack=broken).fit()


def test_a_run_whose_attack_sees_nothing_is_looked_at_after_the_epoch():
    trainer = make_trainer(student_steps=5, warmup_epochs=0, attack=lambda student, x, y: x)
    trainer.method.loss = at_call(2, trainer.method.loss, nan)
    with pytest.raises(RuntimeError, match="epoch 1, step 2 of the student"):
        trainer.fit()


@pytest.mark.parametrize("change", [nan, Spoilt.apply], ids=["loss", "gradient"])
def test_the_generators_first_bad_step_is_named(change, tmp_path):
    trainer = make_trainer(diagnostics=tmp_path)
    trainer.source.divergence = at_call(5, trainer.source.divergence, change)  # 3 steps, 2 steps
    with pytest.raises(
        RuntimeError, match=r"in epoch 2, step 2 of the generator; lower `generator_lr`"
    ):
        trainer.fit()
    _, found = figures(tmp_path)
    assert len(found["losses"]["total"]) == 3
    assert isinstance(found["losses"]["total"][0], float)
    assert {"adversarial", "batchnorm"} & found["losses"].keys() or len(found["losses"]) > 3
    assert "project.weight" in found["non_finite"]["generator"]
    assert found["non_finite"]["student"] == []


@pytest.mark.parametrize("rule", ["margin_softmax", "lps_power"])
def test_the_teachers_logits_are_looked_at(rule):
    trainer = make_trainer(reweighting=rule, margin_labels="sampled", fold_batchnorm=False)
    trainer.synthesize()
    trainer.teacher.fc.bias.data[0] = float("inf")
    with pytest.raises(
        RuntimeError, match=r"^FERDTrainer.update_class_probabilities: .* `teacher`"
    ):
        trainer.update_class_probabilities()
    whole = make_trainer(reweighting=rule, source=Recorder(1), fold_batchnorm=False)
    whole.teacher.fc.bias.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="epoch 1, step 1 of the margins; check the teacher"):
        whole.fit()


def test_a_file_that_cannot_be_written_does_not_hide_the_reason(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    trainer = make_trainer(diagnostics=tmp_path / "file")
    trainer.method.loss = lambda student, x, *_: nan(student(x)).sum(1)
    with pytest.raises(RuntimeError, match="of the student; lower `student_lr`$"):
        trainer.fit()
    assert "expected to write" in caplog.text


def test_health_is_the_loss_and_every_gradient():
    one, bad = torch.ones(2), torch.tensor([1.0, float("inf")])
    assert bool(is_finite(torch.tensor(1.0), [one, None]))
    assert not bool(is_finite(torch.tensor(1.0), [one, bad]))
    assert not bool(is_finite(torch.tensor(float("nan")), [one]))
    assert bool(is_finite(torch.tensor(1.0), []))
    healthy, ill = torch.tensor(True), torch.tensor(False)
    assert first_bad([]) is None
    assert first_bad([healthy] * 3) is None
    assert first_bad([healthy, ill, healthy, ill]) == 2


def stats(**changes):
    values = {
        "epoch": 5,
        "warmup": False,
        "student_loss": 1.0,
        "learning_rate": 0.1,
        "class_probabilities": (0.5, 0.5),
        "label_agreement": 0.9,
        "diversity": 0.2,
        "class_counts": (3, 3),
        "pool_size": 6,
        "synthesis": {},
        "seconds": 1.0,
    }
    return EpochStats(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"diversity": 0.09},
            "a diversity of 0.09, below half of the largest so far, 0.2; set `reset_gen",
        ),
        (
            {"label_agreement": 0.19},
            "the label of 19% of the images of epoch 5, less than 20%; raise",
        ),
        (
            {"class_counts": (6, 0)},
            "no image of 1 of 2 classes, the first of which is 1; raise `class_floor`",
        ),
    ],
)
def test_a_sign_of_collapse_is_logged_once_with_its_remedy(changes, words, caplog):
    monitor = CollapseMonitor()
    monitor.watch(stats())
    monitor.watch(stats(warmup=True, **changes))
    assert not caplog.records
    for _ in range(3):
        monitor.watch(stats(**changes))
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("ferdlib", logging.WARNING)
    assert words in record.getMessage()
    monitor.watch(stats())
    monitor.watch(stats(**changes))
    assert len(caplog.records) == 2


def test_the_limits_themselves_are_no_sign(caplog):
    monitor = CollapseMonitor()
    monitor.watch(stats())
    monitor.watch(stats(diversity=0.1, label_agreement=0.2, class_counts=(1, 5)))
    assert not caplog.records


def test_collapsed_images_are_noticed_in_a_run(caplog):
    class Collapsing(Recorder):
        def epoch(self, student, class_probabilities):
            for x, y in super().epoch(student, class_probabilities):
                yield (x if self.done == 0 else x * 0.1), y.clamp(max=1)

    found = make_trainer(source=Collapsing(1)).fit()
    assert found[-1].class_counts == (6, 12, 0)
    assert sum(found[-1].class_counts) == found[-1].pool_size
    messages = " ".join(r.getMessage() for r in caplog.records)
    assert "below half of the largest" in messages
    assert "no image of 1 of 3 classes, the first of which is 2" in messages


def held(pool):
    """Bytes that all columns take, what is reserved included."""
    return sum(c.untyped_storage().nbytes() for c in pool._columns.values())


def bound(config, capacity):
    """Bytes of so many images with their labels and all that may be kept beside them."""
    pixels = math.prod(config.image_shape)
    image = pixels * (1 if config.pool_dtype == "uint8" else 4) + 8
    logits = 4 * config.num_classes
    return capacity * (image + logits + 4 * pixels)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"augment": "none", "random_start": None, "attack_model": "teacher"},
    ],
)
def test_a_capacity_bounds_the_memory_of_every_column(changes, dtype):
    trainer = make_trainer(pool_capacity=30, pool_dtype=dtype, epochs=6, **changes)
    for _ in trainer.epochs():
        assert held(trainer.pool) <= bound(trainer.config, 30)
    assert len(trainer.pool) == 30
    free = make_trainer(pool_dtype=dtype, epochs=6, **changes)
    free.fit()
    assert held(free.pool) > held(trainer.pool)


def test_a_capacity_bounds_the_memory_exactly():
    pool = ImagePool(capacity=10, dtype=torch.uint8)
    for count in (3, 4, 25, 1, 10):
        pool.add(
            torch.rand(count, 1, 4, 4),
            torch.zeros(count, dtype=torch.int64),
            z=torch.rand(count, 5),
        )
        assert held(pool) <= 10 * (16 + 8 + 20)
    assert held(pool) == 10 * (16 + 8 + 20)
    other = ImagePool(capacity=10, dtype=torch.uint8)
    other.load_state_dict(pool.state_dict())
    assert held(other) == held(pool)
