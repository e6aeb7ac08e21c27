"""The trainer's loop, its parts and its checkpoints."""

from __future__ import annotations

import math
from functools import cache, partial

import pytest
import torch
from tiny_ferd import SIZES, Recorder, make_models
from tiny_ferd import make_trainer as tiny_trainer
from torch import nn

from ferdlib import losses, reweight
from ferdlib.attacks import pgd
from ferdlib.methods import FERDDistillation, Method, build_method
from ferdlib.trainer import FERDConfig

TINY = SIZES | {
    "epochs": 3,
    "warmup_epochs": 1,
    "generator_steps": 3,
    "generator_lr": 0.05,
    "bottleneck_steps": 3,
    "student_steps": 2,
}
make_trainer = partial(tiny_trainer, TINY)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [v.clone() for v in model.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(v, w) for v, w in zip(a, b, strict=True))


@pytest.mark.parametrize("preset", [FERDConfig, FERDConfig.paper, FERDConfig.released])
def test_every_preset_trains_and_leaves_the_teacher(preset):
    trainer = make_trainer(preset)
    teacher = trainer.teacher.train()
    teacher.layer2[1].eval()
    flags = [m.training for m in teacher.modules()]
    before, student, state = weights(teacher), weights(trainer.student), torch.get_rng_state()
    stats = trainer.fit()
    assert same(weights(teacher), before)
    assert [m.training for m in teacher.modules()] == flags
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(weights(trainer.student), student)
    assert [s.epoch for s in stats] == [1, 2, 3]
    assert math.isfinite(stats[-1].student_loss)
    assert stats[-1].pool_size == 36
    assert sum(stats[-1].class_probabilities) == pytest.approx(1, abs=1e-5)


@cache
def default_run():
    trainer = make_trainer()
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {"reweighting": "none"},
        {"uniformity_loss_weight": 1.0},
        {"reweighting": "margin_minmax"},
        {"reweighting": "lps_power"},
        {"reweighting": "lps_linear"},
        {"reweighting": "lps_sigmoid"},
        {"reweighting": "lps_tanh"},
        {"class_floor": 0.0, "reweight_temperature": 0.2},
        {"margin_labels": "sampled"},
        {"margin_on": "probabilities"},
        {"margin_images": "last"},
        {"margin_ema": 0.0},
        {"absent_classes": "neutral"},
        {"absent_classes": "zero"},
        {"attack_model": "teacher"},
        {"random_start": None},
        {"random_start": "uniform"},
        {"gamma": 0.0},
        {"augment": "none"},
        {"augment": "crop"},
        {"augment_synthesis": False},
        {"conditional_generator": True},
        {"adversarial_loss": "masked_kl"},
        {"adversarial_loss": "decoupled_kl"},
        {"adversarial_warmup": False},
        {"pool_dtype": "uint8"},
        {"pool_capacity": 12},
        {"precision": "bfloat16"},
        {"schedule": "constant"},
        {"schedule_warmup": False},
        {"weight_decay": 0.1},
        {"clean_weight": 1 / 6, "adv_weight": 5 / 6},
    ],
)
def test_every_field_is_read(changes):
    """Each change gives another student, or, for the reweighting, other class probabilities."""
    trainer, default = make_trainer(**changes), default_run()
    trainer.fit()
    differs = not same(weights(trainer.student), weights(default.student))
    p, q = trainer.class_probabilities, default.class_probabilities
    if changes.get("absent_classes") is None:
        assert differs or not torch.equal(p, q)
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert all(v.isfinite().all() for v in trainer.student.parameters())


def test_warmup_leaves_the_student_alone():
    trainer = make_trainer(warmup_epochs=2)
    before = weights(trainer.student)
    loop = trainer.epochs()
    stats = [next(loop), next(loop)]
    assert all(s.warmup and math.isnan(s.student_loss) for s in stats)
    assert same(weights(trainer.student), before)
    assert not next(loop).warmup


def test_the_rate_follows_a_cosine_from_the_initial_rate():
    rates = [s.learning_rate for s in make_trainer(epochs=4, warmup_epochs=1).fit()]
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)])
    late = make_trainer(epochs=4, warmup_epochs=1, schedule_warmup=False).fit()
    by_hand = [0.1] + [0.1 * (1 + math.cos(math.pi * e / 3)) / 2 for e in range(3)]
    assert [s.learning_rate for s in late] == pytest.approx(by_hand)


def test_same_seed_same_student_and_another_seed_another():
    first, second, third = make_trainer(seed=1), make_trainer(seed=1), make_trainer(seed=2)
    for trainer in (first, second, third):
        torch.manual_seed(torch.randint(1000, ()).item())
        trainer.fit()
    assert same(weights(first.student), weights(second.student))
    assert not same(weights(first.student), weights(third.student))


def test_the_public_steps_are_the_epoch():
    by_hand, whole = (
        make_trainer(warmup_epochs=0, epochs=1),
        make_trainer(warmup_epochs=0, epochs=1),
    )
    x, y = by_hand.synthesize()
    assert x.shape == (12, 1, 8, 8)
    p = by_hand.update_class_probabilities()
    losses_ = [by_hand.distill_step() for _ in range(2)]
    (stats,) = whole.fit()
    assert same(weights(by_hand.student), weights(whole.student))
    assert stats.class_probabilities == pytest.approx(p.tolist())
    assert stats.student_loss == pytest.approx(torch.stack(losses_).mean().item())
    assert torch.equal(by_hand.pool.labels, y)


def test_class_probabilities_are_the_formula():
    trainer = make_trainer(class_floor=0.0, margin_labels="sampled", batch_size=30)
    x, y = trainer.synthesize()
    state = trainer._rng.get_state()
    p = trainer.update_class_probabilities()
    rng = torch.Generator()
    rng.set_state(state)
    x_adv = pgd(trainer.teacher, x, y, steps=2, rng=rng)
    with torch.no_grad():
        m = losses.margin(trainer.teacher.eval()(x_adv), y)
    d = torch.stack([-m[y == c].mean() for c in range(3)])
    torch.testing.assert_close(p, d.softmax(dim=0), rtol=1e-5, atol=1e-6)


def test_an_absent_class_keeps_its_last_statistic():
    trainer = make_trainer(class_floor=0.0, margin_labels="sampled")
    x, _ = trainer.synthesize()
    trainer._batch = (x, torch.arange(12) % 3)
    trainer.update_class_probabilities()
    last = trainer._probabilities.statistic.clone()
    trainer._batch = (x, torch.arange(12) % 2)
    trainer.update_class_probabilities()
    assert trainer._probabilities.statistic[2] == last[2]
    assert trainer._probabilities.statistic[0] != last[0]


def test_another_source_trains_after_each_of_its_batches():
    trainer = make_trainer(source=Recorder(3), epochs=2, warmup_epochs=1, layer=None)
    stats = trainer.fit()
    assert trainer.generator is None
    assert stats[-1].pool_size == 36
    assert stats[-1].synthesis == {"note": 1.0}


class Meddler(Recorder):
    """Source, method and attack that leave the models in another state than they came in."""

    def epoch(self, student, class_probabilities):
        for batch in super().epoch(student, class_probabilities):
            student(batch[0])
            student.train(not student.training)
            yield batch

    def attack(self, student, x, y):
        student.train()(x)
        losses.cross_entropy(student(x), y).sum().backward()
        student.eval().requires_grad_(False)
        y.fill_(0)
        return x.mul_(1).requires_grad_()


class MeddlingMethod(FERDDistillation):
    def attack(self, student, x, y, reference=None):
        x_adv = super().attack(student, x, y, reference)
        student.eval()
        return x_adv


def test_parts_of_the_user_leave_the_student_as_it_was():
    """The BatchNorm of its own layers sees two batches a step, that of a frozen one none."""
    plain = {"attack": lambda student, x, y: x}
    meddling = {"attack": Meddler(3).attack, "source": Meddler(3)}
    method = {"method": MeddlingMethod(teacher=make_models()[0], steps=1, random_start=None)}
    method["method"].eps = 0.0
    found = []
    for parts in (plain, meddling, method):
        torch.manual_seed(0)
        trainer = make_trainer(**{"source": Recorder(3), "layer": None, "epochs": 2, **parts})
        trainer.student.train().layer1.eval()
        assert trainer.fit()[-1].pool_size == 36
        found.append(weights(trainer.student))
        assert [m.training for m in trainer.student.children()][:2] == [False, True]
        assert all(p.requires_grad for p in trainer.student.parameters())
    assert trainer.student.layer2[1].num_batches_tracked == 12
    assert trainer.student.layer1[1].num_batches_tracked == 0
    assert same(found[0], found[1])


def test_what_an_attack_of_the_user_returns_is_checked():
    with pytest.raises(
        ValueError, match="^FERDTrainer.distill_step: expected `attack` to return images"
    ):
        make_trainer(attack=lambda student, x, y: (x, y), warmup_epochs=0).fit()


def test_synthesize_goes_on_with_the_epoch_of_the_source():
    """And runs what comes after each of its batches, before the next one."""
    done = []

    class Two(Recorder):
        def epoch(self, student, class_probabilities):
            for k in range(2):
                yield torch.full((6, 1, 8, 8), 0.1 * len(done)), torch.arange(6) % 3
                done.append(k)

    trainer = make_trainer(source=Two(2))
    for expected in ([], [0], [0, 1], [0, 1, 0]):
        x, _ = trainer.synthesize()
        assert done == expected
        assert float(x.max()) == pytest.approx(0.1 * len(expected))
    assert len(trainer.pool) == 24


def test_a_source_without_batches_is_named():
    trainer = make_trainer(source=Recorder(0))
    for call, name in ((trainer.fit, "epochs"), (trainer.synthesize, "synthesize")):
        with pytest.raises(RuntimeError, match=rf"^FERDTrainer.{name}: expected `source` to yield"):
            call()


def test_margins_of_the_last_images_are_read_from_any_source_that_has_them():
    source = Recorder(1)
    with pytest.raises(ValueError, match="^FERDTrainer: expected `source` with `last_images`"):
        make_trainer(source=source, margin_images="last")
    source.last_images = torch.rand(6, 1, 8, 8)
    trainer = make_trainer(margin_images="last", source=source)
    seen = []
    trainer._probabilities.update = lambda p, x, y: seen.append(x) or p
    trainer.fit()
    assert all(x is source.last_images for x in seen)
    assert len(seen) == 3


class Plain:
    """A method on labels, written by a user, with a module of its own."""

    def __init__(self, calls):
        self.calls, self.projection, self.rng = calls, nn.Linear(2, 2), None

    def reference(self, x):
        self.calls.append("reference")
        return torch.ones(len(x), 3)

    def attack(self, student, x, y, reference=None):
        self.calls.append("attack")
        assert torch.equal(reference, torch.ones(len(x), 3))
        return x

    def loss(self, student, x, x_adv, y, reference=None):
        self.calls.append("loss")
        assert student.training
        assert torch.equal(reference, torch.ones(len(x), 3))
        return losses.cross_entropy(student(x_adv), y)

    def end_epoch(self):
        self.calls.append("end")

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(("augment", "first"), [("crop", []), ("none", ["reference"])])
def test_the_reference_of_another_method_travels_to_its_attack_and_loss(augment, first):
    """Computed at each step, or once for the images of an epoch, also of the warm-up, when they are stored."""
    calls = []
    assert isinstance(Plain(calls), Method)
    make_trainer(method=Plain(calls), epochs=2, warmup_epochs=1, augment=augment).fit()
    step = ["reference"] * (augment == "crop") + ["attack", "loss"]
    assert calls == [*first, *first, *step, *step, "end"]  # the warm-up is not the method's epoch


def test_modules_and_generators_of_parts_are_the_trainers():
    method, source = Plain([]), Recorder(1)
    source.net, source.rng = nn.Linear(2, 2), torch.Generator()
    own = source.rng
    trainer = make_trainer(method=method, source=source, device="meta", fold_batchnorm=False)
    for module in (trainer.student, trainer.teacher, method.projection, source.net):
        assert next(module.parameters()).device.type == "meta"
    assert type(method.rng) is torch.Generator
    assert source.rng is own


def test_concentrated_probabilities_are_warned_of(caplog):
    trainer = make_trainer(reweight=lambda margins: torch.tensor([0.01, 0.98, 0.01]))
    trainer.synthesize()
    trainer.update_class_probabilities()
    assert "class 1 has probability 0.98" in caplog.text


def test_rule_and_optimizers_can_be_replaced():
    margins_seen, groups_seen = [], []

    def rule(margins):
        margins_seen.append(margins)
        return reweight.margin_softmax(margins)

    def student_optimizer(parameters):
        return torch.optim.Adam(parameters, lr=0.01)

    def generator_optimizer(groups):
        groups_seen.append(len(groups))
        return torch.optim.SGD(groups)

    trainer = make_trainer(
        reweight=rule, student_optimizer=student_optimizer, generator_optimizer=generator_optimizer
    )
    stats = trainer.fit()
    assert stats[0].learning_rate == 0.01
    assert groups_seen == [2, 2, 2]
    assert [len(m) for m in margins_seen] == [3, 3, 3]


def test_a_student_keeps_its_frozen_layers():
    trainer = make_trainer()
    frozen = trainer.student.train().layer1[1].eval()
    mean, other = frozen.running_mean.clone(), trainer.student.layer2[1].running_mean.clone()
    trainer.fit()
    assert torch.equal(frozen.running_mean, mean)
    assert not torch.equal(trainer.student.layer2[1].running_mean, other)
    assert trainer.student.training
    assert not frozen.training


def test_the_ferd_method_is_eq_10_and_11():
    teacher, student = make_models()
    method = FERDDistillation(teacher=teacher, rng=torch.Generator().manual_seed(0))
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    x_adv = method.attack(student, x, y)
    student.eval()
    t, clean, adv = teacher.eval()(x), student(x), student(x_adv)
    kl = [
        torch.nn.functional.kl_div(z.log_softmax(1), t.softmax(1), reduction="none").sum(1)
        for z in (clean, adv)
    ]
    torch.testing.assert_close(method.loss(student, x, x_adv, y), 5 / 6 * kl[0] + 1 / 6 * kl[1])
    assert 0 < (x_adv - x).abs().max() <= 8 / 255 + 1e-6


def test_parts_that_do_not_fit_together_are_refused():
    teacher, _ = make_models()
    for name, given, words in (
        ("frl-ard", {}, "`validation` batches for ARD, which learns from them, got None"),
        ("ard", {"validation": []}, "no `validation` for ARD, which does not use it, got one"),
    ):
        with pytest.raises(ValueError, match=f"^FERDTrainer: expected {words}$"):
            make_trainer(method=build_method(name, 3, teacher=teacher), **given)
    with pytest.raises(ValueError, match=r"^split_at: expected `layer_name` .* 'layer9'"):
        make_trainer(layer="layer9", uniformity_loss_weight=1.0)
    with pytest.raises(ValueError, match=r"^FERDTrainer: expected `layer_name` .* 'layer9'"):
        make_trainer(layer="layer9")  # which nothing reads


def test_the_wrong_moment_gets_one_clear_sentence():
    trainer = make_trainer()
    with pytest.raises(
        RuntimeError, match="^FERDTrainer.update_class_probabilities: .* synthesize"
    ):
        trainer.update_class_probabilities()
    with pytest.raises(RuntimeError, match="^ImagePool.draw: .* empty"):
        trainer.distill_step()


def test_a_diverging_student_stops_the_run():
    def broken(student, x, y):
        return x * float("nan")

    with pytest.raises(RuntimeError, match="^FERDTrainer: expected finite losses.* of the student"):
        make_trainer(attack=broken).fit()
