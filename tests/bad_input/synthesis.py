"""Sources of images, and the pool."""

import torch
from torch import nn

from bad_input import table as t
from bad_input.table import C, K, N, X, Y, Z, any_of, bad, each, good, or_none
from ferdlib import models, synthesis

SHAPE = [
    *any_of(TypeError, "(C, H, W)", "1x8x8", 8, None),
    ((1.0, 8, 8), TypeError, "an int"),
    *any_of(ValueError, "", (8, 8), (0, 8, 8), (1, 6, 8)),
]
good(synthesis.Generator, image_shape=(1, 8, 8), latent_dim=3, width=2)
each(synthesis.Generator, image_shape=SHAPE, latent_dim=t.integer(1))
each(synthesis.Generator, num_classes=or_none(t.integer(2)))


def generator():
    return synthesis.Generator((C, 8, 8), latent_dim=3, width=2, num_classes=K).eval()


GENERATOR = generator()
GENERATE, RESET = synthesis.Generator.forward, synthesis.Generator.reset
latents = [*t.tensor(Z[:, :3], torch.int64), (Z, ValueError, "of shape (N, 3)")]
labels = [row for row in t.LABELS if row[0] is not None] + t.SHORT + t.IN_RANGE
good(GENERATE, self=lambda: GENERATOR, latents=Z[:, :3], labels=Y)
each(GENERATE, latents=latents, labels=[*labels, (None, ValueError, "conditional")])
good(RESET, self=lambda: GENERATOR)


def inversion(**settings):
    teacher = models.small_cnn(C, K, width=2).eval()
    rest = (teacher.layer2, teacher.layer3, teacher.layer4, teacher.pool, nn.Flatten(), teacher.fc)
    parts = {"teacher": teacher, "features": teacher.layer1, "head": nn.Sequential(*rest)}
    parts |= {"generator": generator(), "batch_size": 2, "generator_steps": 1, "latent_dim": 3}
    return synthesis.Inversion(**(parts | {"bottleneck_steps": 1} | settings))


SOURCE, INVERSION = synthesis.Inversion, inversion()
good(SOURCE, teacher=t.MODEL, features=t.MODEL[:4], head=t.MODEL[4:], generator=generator())
each(SOURCE, generator=t.MODULE, features=t.FUNCTION, augment=or_none(t.FUNCTION))
each(SOURCE, optimizer=t.FUNCTION, precision=t.FUNCTION)
each(SOURCE, **dict.fromkeys(("generator_steps", "latent_dim"), t.integer(1)))
each(SOURCE, **dict.fromkeys(("adversarial_from", "bottleneck_steps"), t.integer(0)))
each(SOURCE, **dict.fromkeys(("adv_loss_weight", "bn_loss_weight"), t.WEIGHT))
each(SOURCE, **dict.fromkeys(("onehot_loss_weight", "uniformity_loss_weight"), t.WEIGHT))
each(SOURCE, bottleneck_beta=t.WEIGHT)
each(SOURCE, **dict.fromkeys(("bottleneck_lr", "generator_lr", "latent_lr"), t.ABOVE_ZERO))
each(SOURCE, **dict.fromkeys(("bn_models", "bottleneck_noise", "bottleneck_reduction"), t.CHOICE))
each(SOURCE, **dict.fromkeys(("mask_threshold", "selection", "label_sampling"), t.CHOICE))
flag = any_of(TypeError, "a bool", 1, "yes", None)
each(SOURCE, **dict.fromkeys(("optimise_latents", "reset_generator"), flag))
each(SOURCE, noise_rng=any_of(TypeError, "a Generator", 0, "cpu"))

p = torch.tensor([0.4, 0.3, 0.2, 0.1])
PROBABILITIES = [
    *t.class_vector(p),
    *any_of(ValueError, "with sum 1", p * 2, t.spoilt(p, -0.4), t.spoilt(p, t.NAN)),
]
good(synthesis.sample_labels, class_probabilities=p, count=5, method="multinomial")
each(synthesis.sample_labels, class_probabilities=PROBABILITIES, count=t.integer(1))
each(synthesis.sample_labels, method=t.CHOICE)
EPOCH = SOURCE.epoch
good(EPOCH, self=lambda: INVERSION, student=t.STUDENT, class_probabilities=p)
each(EPOCH, class_probabilities=t.class_vector(p))
good(SOURCE.load_state_dict, self=lambda: INVERSION, state=INVERSION.state_dict())
each(SOURCE.load_state_dict, state=t.state(INVERSION.state_dict()))


def pool(count=N):
    filled = synthesis.ImagePool()
    if count:
        filled.add(X[:count], Y[:count], brightness=X[:count, 0, 0, 0])
    return filled


POOL = synthesis.ImagePool
good(POOL, capacity=3, dtype=torch.uint8)
dtypes = [(torch.float64, ValueError, "one of"), ("uint8", TypeError, "one of")]
each(POOL, capacity=or_none(t.integer(1)), dtype=dtypes)
good(POOL.add, self=pool, x=X, y=Y, brightness=X[:, 0, 0, 0])
each(POOL.add, y=[*t.LABELS, (Y[:-1], ValueError, "for each of 3 images")])
bad(POOL.add, ValueError, "", brightness=X[:-1, 0, 0, 0])
bad(POOL.add, ValueError, "stored shapes", x=X[:, :1])
bad(POOL.add, ValueError, "`columns` next to images and labels", labels=Y)
good(POOL.column, self=pool, name="labels")
each(POOL.column, name=t.CHOICE)
for function in (POOL.draw, POOL.sample):
    good(function, self=pool, count=2)
    each(function, count=t.integer(1))
    bad(function, RuntimeError, "an empty one", self=lambda: pool(0))
good(POOL.stored, self=pool, x=X)
each(POOL.stored, x=t.BATCH)
good(POOL.__getitem__, self=pool, index=Y)
outside = any_of(ValueError, "in 0..2", Y - 1, t.spoilt(Y, N))
each(POOL.__getitem__, index=t.LABELS + outside)
bad(POOL.__getitem__, RuntimeError, "an empty one", self=lambda: pool(0))
good(POOL.load_state_dict, self=pool, state=pool().state_dict())
each(POOL.load_state_dict, state=t.state(pool().state_dict()))
