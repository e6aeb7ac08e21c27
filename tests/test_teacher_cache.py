"""What the trainer computes once: the same numbers as computing it every time, and less work."""

import copy

import pytest
import torch
from tiny_ferd import SIZES, make_models
from tiny_ferd import make_trainer as tiny_trainer

from ferdlib.attacks import utae_pgd
from ferdlib.methods import FERDDistillation, build_method, rules
from ferdlib.models import FrozenModel
from ferdlib.trainer import FERDConfig, FERDTrainer

TINY = SIZES | {
    "epochs": 3,
    "generator_steps": 2,
    "bottleneck_steps": 1,
    "student_steps": 4,
    "attack_steps": 3,
}
OFF = {"cache_teacher_logits": "none", "cache_teacher_utae": "none", "fold_batchnorm": False}


def make_trainer(preset="paper", **changes):
    return tiny_trainer(TINY | {"warmup_epochs": 0}, getattr(FERDConfig, preset), **changes)


def student_losses(trainer):
    """Every step's, and the images that went through the teacher meanwhile."""
    found, passed, plain = [], [], trainer.distill_step

    def watched():
        asked = trainer.method.teacher
        hook = asked.register_forward_pre_hook(lambda _, args: passed.append(len(args[0])))
        found.append(plain())
        hook.remove()
        return found[-1]

    trainer.distill_step = watched
    trainer.fit()
    return torch.stack(found), sum(passed)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("capacity", [None, 20])
def test_paper_steps_ask_the_teacher_nothing(dtype, capacity):
    settings = {"pool_dtype": dtype, "pool_capacity": capacity}
    expected, before = student_losses(make_trainer(**settings, **OFF))
    found, after = student_losses(make_trainer(**settings, fold_batchnorm=False))
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert (before, after) == (12 * 12 * (1 + 3), 0)  # steps, images, passes


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_columns_belong_to_their_images(dtype):
    """Also after the oldest images gave way."""
    trainer = make_trainer(pool_capacity=20, pool_dtype=dtype, fold_batchnorm=False)
    trainer.fit()
    assert len(trainer.pool) == 20
    x, _ = trainer.pool[torch.arange(20)]
    teacher = trainer.teacher.eval()
    assert torch.allclose(trainer.pool.column("logits"), teacher(x), atol=1e-5)
    settings = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 3, "random_start": None}
    expected = utae_pgd(teacher, x, gamma=0.5, **settings)
    assert torch.allclose(trainer.pool.column("examples"), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("preset", "changes", "kept"),
    [
        ("paper", {}, {"logits", "examples"}),
        ("paper", {"random_start": "normal"}, {"logits"}),
        ("paper", {"attack_model": "student"}, {"logits"}),
        ("paper", {"augment": "crop"}, set()),
        ("paper", {"rule": True}, {"logits"}),
        ("paper", {"attack": lambda student, x, y: x}, {"logits"}),
        ("paper", OFF, set()),
        ("released", {}, set()),
        ("released", {"augment": "none"}, {"logits"}),
    ],
)
def test_what_is_kept(preset, changes, kept):
    changes = dict(changes)
    if changes.pop("rule", False):  # it watches the attack, so it must see every one
        teacher, _ = make_models()
        settings = {"attack_model": "teacher", "random_start": None, "rule": rules.LPS()}
        changes["method"] = FERDDistillation(teacher=teacher, num_classes=3, **settings)
    trainer = make_trainer(preset, **changes)
    trainer.synthesize()
    assert set(trainer.pool.columns) - {"images", "labels"} == kept
    assert torch.isfinite(trainer.distill_step())


def test_resuming_with_columns_equals_not_stopping():
    whole, first, second = make_trainer(), make_trainer(), make_trainer()
    whole.fit()
    next(first.epochs())
    second.load_state_dict(first.state_dict())
    second.fit()
    for a, b in zip(
        whole.student.state_dict().values(), second.student.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_other_methods_share_the_logits():
    teacher, student = make_models()
    method = build_method("rslad", 3, teacher=teacher, steps=2)
    config = FERDConfig(**TINY, warmup_epochs=0, augment="none")
    found, after = student_losses(FERDTrainer(teacher, student, config=config, method=method))
    teacher, student = make_models()
    method = build_method("rslad", 3, teacher=teacher, steps=2)
    config = FERDConfig(**TINY, warmup_epochs=0, augment="none", cache_teacher_logits="none")
    expected, before = student_losses(FERDTrainer(teacher, student, config=config, method=method))
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert (before, after) == (12 * 12, 0)


def test_the_fast_copies_follow():
    """Weights that are loaded after the trainer was made, and the student's, which change at every step."""
    trainer = make_trainer("released")
    other = copy.deepcopy(trainer.teacher)
    with torch.no_grad():
        other.fc.weight.mul_(-1)
    trainer.teacher.load_state_dict(other.state_dict())
    trainer.fit()
    x = torch.rand(4, 1, 8, 8)
    assert torch.allclose(trainer._fast_teacher(x), other.eval()(x), atol=1e-5)
    method = trainer.method
    method.attack(trainer.student, x, torch.zeros(4, dtype=torch.int64))
    attacked = method._student.copy
    assert isinstance(attacked, FrozenModel)
    assert len(attacked.folded) == 4
    assert torch.allclose(attacked(x), trainer.student.eval()(x), atol=1e-5)


def test_a_student_that_cannot_be_traced_is_attacked_itself(caplog):
    class Branching(type(make_models()[1])):
        def forward(self, x):
            return super().forward(x if x.sum() > -1 else -x)

    teacher, student = make_models()
    student.__class__ = Branching
    config = FERDConfig(**TINY, warmup_epochs=0, augment="none")
    trainer = FERDTrainer(teacher, student, config=config)
    with caplog.at_level("INFO", logger="ferdlib"):
        trainer.fit()
    assert trainer.method._student.copy is None
    assert caplog.text.count("it is attacked as it is") == 1
