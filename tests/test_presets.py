"""What a trainer really does under `paper()` and `released()` at CIFAR-10 settings, number by number.

The presets' fields are pinned in test_config; here their effect is read off the running parts: optimizers,
schedule, shapes, the scale of the losses. Networks are tiny and most steps are left out.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ferdlib import losses
from ferdlib.models import wide_resnet
from ferdlib.synthesis.inversion import adam
from ferdlib.trainer import FERDConfig, FERDTrainer
from ferdlib.trainer.build import set_rates

CIFAR10 = {"num_classes": 10, "layer": "bn1"}
SHORT = {"generator_steps": 1, "bottleneck_steps": 1, "margin_attack_steps": 1, "student_steps": 0}
PRESETS = ["paper", "released"]


def make_trainer(preset: str, **changes):
    config = getattr(FERDConfig, preset)(**(CIFAR10 | SHORT | changes))
    torch.manual_seed(0)
    return FERDTrainer(wide_resnet(10, 1), wide_resnet(10, 1), config=config)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_generator_is_the_published_one_and_its_adam_too(preset):
    made = []

    def recorded(groups):
        made.append(adam(groups))
        return made[-1]

    assert make_trainer(preset).source.batch_size == 256
    trainer = make_trainer(preset, batch_size=8)
    trainer.source.optimizer = recorded
    x, y = trainer.synthesize()
    assert x.shape == (8, 3, 32, 32)
    assert y.shape == (8,)
    (optimizer,) = made
    rates = [group["lr"] for group in optimizer.param_groups]
    # The release trains the codes as well, at 0.015.
    assert rates == ([2e-3] if preset == "paper" else [2e-3, 0.015])
    assert all(group["betas"] == (0.5, 0.999) for group in optimizer.param_groups)
    if preset == "released":
        assert optimizer.param_groups[1]["params"][0].shape == (8, 100)
    # Linear 100 -> 128*8*8, BatchNorm and convolution of 128, convolution to 64, to 3; twice the code
    # and one code per class where it is conditional.
    conditional = preset == "paper"
    inputs = 200 if conditional else 100
    by_hand = (inputs + 1) * 8192 + 256 + 9 * 128 * 128 + 256 + 9 * 128 * 64 + 128 + 9 * 64 * 3 + 3
    by_hand += 10 * 100 if conditional else 0
    assert sum(p.numel() for p in trainer.generator.parameters()) == by_hand


@pytest.mark.parametrize("preset", PRESETS)
def test_the_student_has_sgd_and_a_cosine_over_all_220_epochs(preset):
    trainer = make_trainer(preset)
    (group,) = trainer.student_optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)
    rates = []
    for epoch in range(220):
        set_rates(trainer.student_optimizer, [0.1], trainer.config, epoch)
        rates.append(group["lr"])
    by_hand = [0.1 * (1 + math.cos(math.pi * e / 220)) / 2 for e in range(220)]
    assert rates == pytest.approx(by_hand)


@pytest.mark.parametrize("preset", PRESETS)
def test_warmup_is_the_releases_alone(preset):
    # 20 epochs that only fill the pool leave 200 with the student; the paper has no warm-up.
    config = getattr(FERDConfig, preset)(**CIFAR10)
    assert config.epochs - config.warmup_epochs == {"paper": 220, "released": 200}[preset]
    assert config.epochs * config.batch_size == 56_320


@pytest.mark.parametrize("preset", PRESETS)
def test_eq_9_with_its_weights(preset):
    trainer = make_trainer(preset, batch_size=8)
    trainer.synthesize()
    parts = trainer.source.metrics
    by_hand = (
        parts["adversarial"] + 5 * parts["batchnorm"] + parts["onehot"] + 5 * parts["uniformity"]
    )
    assert parts["total"] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_kl_is_summed_over_classes_and_averaged_over_images(preset):
    trainer = make_trainer(preset)
    x, y = torch.rand(6, 3, 32, 32), torch.arange(6)
    x_adv = torch.rand(6, 3, 32, 32)
    student, teacher = trainer.student.eval(), trainer.teacher.eval()
    with torch.no_grad():
        loss = trainer.method.loss(student, x, x_adv, y).mean()
        p = teacher(x).softmax(dim=1)
        clean = F.kl_div(student(x).log_softmax(dim=1), p, reduction="batchmean")
        robust = F.kl_div(student(x_adv).log_softmax(dim=1), p, reduction="batchmean")
    torch.testing.assert_close(loss, 5 / 6 * clean + 1 / 6 * robust)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_attack_of_each(preset):
    trainer = make_trainer(preset, fold_batchnorm=False)
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    seen = []
    student = trainer.student.eval()

    def watched(model):
        return model.register_forward_pre_hook(lambda m, inputs: seen.append(m))

    handles = [watched(trainer.teacher), watched(student)]
    x_adv = trainer.method.attack(student, x, y)
    for handle in handles:
        handle.remove()
    attacked = {"paper": trainer.teacher, "released": student}[preset]
    # Ten passes of the attack; the teacher's clean prediction is the reference of both.
    assert seen.count(attacked) == 10 + (attacked is trainer.teacher)
    assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6
    gamma = {"paper": 0.5, "released": 0.0}[preset]
    assert trainer.method.gamma == gamma
    if preset == "paper":  # from x itself: the same twice
        assert torch.equal(x_adv, trainer.method.attack(student, x, y))


def test_released_probabilities_cannot_exceed_4_to_1():
    # Fig. 4 of the paper shows 0.314, which the released rule cannot give: at most 0.2 / (0.2 + 9 * 0.05).
    margins = torch.tensor([-9.0] + [5.0] * 9)
    released = make_trainer("released")._probabilities.rule(margins)
    assert float(released.max()) == pytest.approx(0.2 / 0.65)
    paper = make_trainer("paper")._probabilities.rule(margins)
    assert float(paper.max()) == pytest.approx(1 / (1 + 9 * math.exp(-14)))


@pytest.mark.parametrize("preset", PRESETS)
def test_margins_are_those_of_pgd_20_on_the_teacher(preset, monkeypatch):
    from ferdlib.trainer import class_probabilities

    calls = []
    real = class_probabilities.pgd

    def spied(model, x, y, **settings):
        calls.append((model, settings))
        return real(model, x, y, **settings)

    trainer = make_trainer(preset, margin_attack_steps=20, fold_batchnorm=False)
    trainer._batch = (torch.rand(2, 3, 32, 32), torch.arange(2))
    trainer.source.last_images = trainer._batch[0]
    monkeypatch.setattr(class_probabilities, "pgd", spied)
    trainer.update_class_probabilities()
    ((model, settings),) = calls
    assert model is trainer.teacher
    assert {k: settings[k] for k in ("eps", "step_size", "steps")} == {
        "eps": 8 / 255,
        "step_size": 2 / 255,
        "steps": 20,
    }
    start = settings["random_start"]  # uniform in the ball
    assert 7.9 / 255 < float(start.abs().max()) <= 8 / 255
    assert float(start.std()) == pytest.approx(8 / 255 / math.sqrt(3), rel=0.05)
    x_adv = real(model, trainer._batch[0], trainer._batch[1], steps=20)
    assert losses.margin(model(x_adv), trainer._batch[1]).shape == (2,)
