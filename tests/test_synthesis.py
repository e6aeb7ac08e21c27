"""Generator, image pool, label draws and FERD's inversion."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from ferdlib import losses
from ferdlib.bottleneck import noise_scale, nonrobust_channels, nonrobust_logits, split_at
from ferdlib.models import small_cnn
from ferdlib.synthesis import Generator, ImagePool, Inversion, Source, sample_labels


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_inversion(**changes: object) -> tuple[Inversion, nn.Module]:
    """A tiny inversion on a teacher that remembers digits' statistics, and a student."""
    torch.manual_seed(3)
    teacher, student = small_cnn(1, 3, width=4), small_cnn(1, 3, width=2)
    digits = torch.tensor(load_digits().images[:64], dtype=torch.float32)[:, None] / 16
    with torch.no_grad():
        teacher.fc.weight.mul_(10)
        for _ in range(30):
            teacher(digits)
    features, head = split_at(teacher.eval(), "layer4")
    settings: dict[str, object] = {
        "teacher": teacher,
        "features": features,
        "head": head,
        "generator": Generator((1, 8, 8), latent_dim=5, width=4),
        "latent_dim": 5,
        "batch_size": 6,
        "generator_steps": 4,
        "bottleneck_steps": 30,
        "rng": seeded(),
    }
    return Inversion(**(settings | changes)), student  # type: ignore[arg-type]


UNIFORM = torch.full((3,), 1 / 3)


def test_generator_of_the_lineage_has_its_published_size():
    # 100*8192+8192 (linear), 3 BatchNorms (128, 128, 64), 128*128*9, 128*64*9, 64*3*9+3.
    by_hand = 100 * 8192 + 8192 + 2 * (128 + 128 + 64) + 128 * 128 * 9 + 128 * 64 * 9 + 64 * 27 + 3
    generator = Generator((3, 32, 32))
    assert sum(p.numel() for p in generator.parameters()) == by_hand
    assert round(by_hand / 1e6, 2) == 1.05


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 16), (2, 4, 12)])
def test_generator_makes_images_in_the_unit_interval(shape):
    images = Generator(shape, latent_dim=7, width=3)(torch.randn(5, 7))
    assert images.shape == (5, *shape)
    assert 0 <= images.min() < images.max() <= 1


def test_conditional_generator_reads_its_labels():
    generator = Generator((1, 8, 8), latent_dim=4, width=3, num_classes=3).eval()
    z = torch.randn(2, 4)
    zero, one = (generator(z, torch.full((2,), label)) for label in (0, 1))
    assert not torch.allclose(zero, one)
    with pytest.raises(ValueError, match="Generator: expected `labels`"):
        generator(z)


def test_reset_draws_by_the_rule_from_the_generator_alone():
    generator = Generator((3, 32, 32))
    before = torch.get_rng_state()
    generator.reset(seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    linear = generator.project
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert linear.weight.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert not linear.bias.any()
    norm = next(m for m in generator.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.weight.mean().item() == pytest.approx(1.0, abs=0.01)
    first = linear.weight.clone()
    generator.reset(seeded(1))
    assert torch.equal(linear.weight, first)


@pytest.mark.parametrize("count", [7, 4000])
def test_stratified_labels_are_shares_rounded_up_or_down(count):
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    counts = torch.bincount(sample_labels(p, count, method="stratified", rng=seeded()), minlength=4)
    assert ((counts - count * p).abs() < 1).all()
    assert counts.sum() == count


def test_multinomial_labels_follow_the_probabilities():
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    counts = torch.bincount(sample_labels(p, 20_000, rng=seeded()), minlength=4) / 20_000
    assert torch.allclose(counts, p, atol=0.015)
    assert counts[1] == 0


def test_pool_gives_back_what_was_added():
    pool = ImagePool()
    x, y = torch.rand(5, 1, 4, 4), torch.arange(5)
    pool.add(x[:2], y[:2])
    pool.add(x[2:], y[2:])
    drawn, labels = pool.sample(5, rng=seeded())
    assert torch.equal(labels.sort().values, y)
    assert torch.equal(drawn, x[labels])


def test_pool_repeats_images_only_when_it_must():
    pool = ImagePool()
    pool.add(torch.rand(3, 1, 4, 4), torch.arange(3))
    assert len(pool.sample(3)[1].unique()) == 3
    assert len(pool.sample(8)[1]) == 8


def test_pool_with_capacity_keeps_the_newest():
    pool = ImagePool(capacity=4)
    for k in range(7):
        pool.add(torch.full((1, 1, 2, 2), k / 10), torch.tensor([k]))
    assert sorted(pool.labels.tolist()) == [3, 4, 5, 6]
    pool.add(torch.rand(9, 1, 2, 2), torch.arange(9))
    assert len(pool) == 4
    assert sorted(pool.labels.tolist()) == [5, 6, 7, 8]


def test_uint8_pool_rounds_and_does_not_truncate():
    pool = ImagePool(dtype=torch.uint8)
    pool.add(torch.tensor([0.0, 0.6 / 255, 1.4 / 255, 1.0]).reshape(4, 1, 1, 1), torch.arange(4))
    x, y = pool.sample(4, rng=seeded())
    back = (x.flatten() * 255)[y.argsort()]
    assert back.tolist() == pytest.approx([0.0, 1.0, 1.0, 255.0])


def test_pool_state_dict_round_trip():
    pool, other = ImagePool(), ImagePool()
    pool.add(torch.rand(5, 1, 2, 2), torch.arange(5))
    other.load_state_dict(pool.state_dict())
    assert torch.equal(pool.sample(3, rng=seeded())[0], other.sample(3, rng=seeded())[0])
    other.add(torch.rand(2, 1, 2, 2), torch.arange(2))
    assert (len(pool), len(other)) == (5, 7)


def test_pool_errors_leave_it_as_it_was():
    pool = ImagePool()
    with pytest.raises(RuntimeError, match="^ImagePool.sample: .* empty"):
        pool.sample(1)
    pool.add(torch.rand(2, 1, 4, 4), torch.arange(2))
    for x, y, kind in [
        (torch.rand(2, 3, 4, 4), torch.arange(2), ValueError),
        (torch.rand(2, 1, 4, 4) + 1, torch.arange(2), ValueError),
        (torch.rand(2, 1, 4, 4), torch.arange(3), ValueError),
        (torch.rand(2, 1, 4, 4), torch.rand(2), TypeError),
    ]:
        with pytest.raises(kind, match="^ImagePool.add: expected"):
            pool.add(x, y)
    assert len(pool) == 2


@pytest.mark.parametrize(
    ("alone", "part"),
    [({"onehot_loss_weight": 0.0}, "batchnorm"), ({"bn_loss_weight": 0.0}, "onehot")],
)
def test_inversion_lowers_what_it_is_asked_to(alone, part):
    settings = {"generator_lr": 0.01, "uniformity_loss_weight": 0.0, "adv_loss_weight": 0.0} | alone
    short, student = make_inversion(generator_steps=1, **settings)
    long, _ = make_inversion(generator_steps=150, **settings)
    next(short.epoch(student, UNIFORM))
    next(long.epoch(student, UNIFORM))
    assert long.metrics[part] < 0.75 * short.metrics[part]


def test_inversion_is_the_plain_algorithm():
    """The shared teacher pass against separate ones; a large rate, so that the last batch is not the best."""
    source, student = make_inversion(generator_steps=6, generator_lr=3.0, reset_generator=True)
    x, y = next(source.epoch(student, UNIFORM))

    plain, student = make_inversion()
    rng, teacher, generator = seeded(), plain.teacher.eval(), plain.generator
    student.eval()
    z = torch.randn(6, 5, generator=rng).requires_grad_()
    labels = sample_labels(UNIFORM, 6, rng=rng)
    generator.reset(rng)
    optimizer = torch.optim.Adam(
        [{"params": generator.parameters(), "lr": 3.0}, {"params": [z], "lr": 0.015}],
        betas=(0.5, 0.999),
    )
    kept, totals = [], []
    for _ in range(6):
        images = generator(z)
        with losses.BatchNormStatistics(teacher) as statistics:
            logits = teacher(images)
        features = plain.features(images)
        sigma = noise_scale(features, plain.head, labels, steps=30, rng=rng)
        mask = nonrobust_channels(features, sigma, threshold="channel")
        total, _ = losses.ferd_generator_loss(
            logits,
            student(images),
            labels,
            nonrobust_logits(features, plain.head, mask),
            statistics.loss(),
        )
        kept.append(images.detach())
        totals.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert torch.equal(labels, y)
    best = totals.index(min(totals))
    assert best < 5
    # Rounding differs between the two passes, and the large rate amplifies it.
    torch.testing.assert_close(x, kept[best], rtol=0, atol=5e-3)


def test_inversion_leaves_teacher_and_student_as_they_were():
    source, student = make_inversion()
    student.train()
    student.layer2[1].eval()
    models = (source.teacher, student)
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    flags = [[s.training for s in m.modules()] for m in models]
    next(source.epoch(student, UNIFORM))
    for model, state, flag in zip(models, states, flags, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert [s.training for s in model.modules()] == flag
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for model in models for m in model.modules())


def test_inversion_uses_its_own_randomness_only():
    before = torch.get_rng_state()
    first, student = make_inversion()
    torch.set_rng_state(before)
    x, _ = next(first.epoch(student, UNIFORM))
    assert torch.equal(torch.get_rng_state(), before)
    second, student = make_inversion()
    assert torch.equal(next(second.epoch(student, UNIFORM))[0], x)


@pytest.mark.parametrize(
    "changes",
    [
        {"selection": "sample", "generator_lr": 1.0},
        {"selection": "batch", "generator_lr": 1.0},
        {"optimise_latents": False},
        {"reset_generator": True},
        {"label_sampling": "stratified"},
        {"bn_models": "both"},
        {"bn_loss_weight": 0.0},
        {"uniformity_loss_weight": 0.0},
        {"adv_loss_weight": 0.0},
        {"divergence": losses.masked_distillation},
        {"divergence": losses.decoupled_kl},
        {"mask_threshold": "sample"},
        {"mask_threshold": "batch"},
        {"bottleneck_noise": "element"},
        {"bottleneck_reduction": "sum"},
        {"adversarial_from": 1},
        {"rng": None},
        {"generator": Generator((1, 8, 8), latent_dim=5, width=4, num_classes=3)},
    ],
)
def test_every_option_runs_and_matters(changes):
    source, student = make_inversion(**({"selection": "last"} | changes))
    torch.manual_seed(7)
    x, y = next(source.epoch(student, UNIFORM))
    assert x.shape == (6, 1, 8, 8)
    assert 0 <= x.min() < x.max() <= 1
    assert y.shape == (6,)
    default, student = make_inversion(selection="last")
    assert not torch.equal(next(default.epoch(student, UNIFORM))[0], x)


def test_nonrobust_fraction_is_reported():
    source, student = make_inversion()
    next(source.epoch(student, UNIFORM))
    assert 0 <= source.metrics["nonrobust_fraction"] <= 1
    without, student = make_inversion(uniformity_loss_weight=0.0)
    next(without.epoch(student, UNIFORM))
    assert torch.tensor(without.metrics["nonrobust_fraction"]).isnan()


def test_a_diverged_inversion_says_so():
    source, student = make_inversion()
    with torch.no_grad():
        source.generator.project.weight.fill_(torch.inf)
    with pytest.raises(RuntimeError, match=r"^(Inversion\.epoch|noise_scale): expected a finite"):
        next(source.epoch(student, UNIFORM))


def test_inversion_is_a_source_and_resumes():
    source, student = make_inversion(reset_generator=False)
    assert isinstance(source, Source)
    next(source.epoch(student, UNIFORM))
    other, _ = make_inversion(reset_generator=False)
    other.load_state_dict(source.state_dict())
    other.rng.set_state(source.rng.get_state())
    assert torch.equal(
        next(source.epoch(student, UNIFORM))[0], next(other.epoch(student, UNIFORM))[0]
    )
