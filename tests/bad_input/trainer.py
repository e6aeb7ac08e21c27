"""Trainer and config."""

import dataclasses

from bad_input import table as t
from bad_input.synthesis import SHAPE
from bad_input.table import any_of, bad, each, good, or_none
from ferdlib import models, trainer

CONFIG = trainer.FERDConfig
good(CONFIG, num_classes=3, layer="layer4")
FROM_ZERO = ("warmup_epochs", "bottleneck_steps", "attack_steps", "crop_padding", "student_steps")
ABOVE_ZERO = ("generator_lr", "latent_lr", "bottleneck_lr", "student_lr", "reweight_temperature")


def rows(field: dataclasses.Field):
    """Return the rows of a field of the config, by the type of its default."""
    if field.name in ABOVE_ZERO:
        return t.ABOVE_ZERO
    if isinstance(field.default, bool):
        return any_of(TypeError, "a bool", 1, "yes", None)
    if isinstance(field.default, int):
        return t.integer(int(field.name not in FROM_ZERO))
    if isinstance(field.default, float):
        return t.SHARE if field.name in ("momentum", "margin_ema") else t.WEIGHT
    return or_none(t.CHOICE) if field.name == "random_start" else t.CHOICE


each(CONFIG, **{f.name: rows(f) for f in dataclasses.fields(CONFIG) if f.name != "num_classes"})
each(CONFIG, layer=or_none(t.STRING), pool_capacity=or_none(t.integer(1)))
each(CONFIG, image_shape=[(value, ValueError, "") for value, *_ in SHAPE])
each(CONFIG, class_floor=[*or_none(t.WEIGHT), (1 / 3, ValueError, "below 1 / num_classes")])
floor = {"class_floor": 0.1, "reweighting": "lps_power"}
bad(CONFIG, ValueError, "with reweighting 'margin_softmax' only", **floor)
bad(CONFIG, ValueError, "below `epochs` 220", warmup_epochs=220)
bad(CONFIG, ValueError, "nothing would be learnt", margin_ema=1.0)

TINY = CONFIG(
    num_classes=3,
    layer="layer4",
    image_shape=(1, 8, 8),
    epochs=1,
    warmup_epochs=0,
    batch_size=4,
    generator_width=4,
    generator_steps=1,
    student_steps=1,
)


def net(width=1, classes=3):
    return models.small_cnn(1, classes, width=width)


TRAINER = trainer.FERDTrainer
TRAINED = TRAINER(net(2), net(), config=TINY)
part = any_of(TypeError, "with the methods of a", "text", 7)
good(TRAINER, teacher=net(2), student=net(), config=TINY)
each(TRAINER, generator=or_none(t.MODULE), config=any_of(TypeError, "a FERDConfig", None, {}))
each(TRAINER, source=part, method=part, diagnostics=or_none(t.PATH))
optional = ("attack", "reweight", "student_optimizer", "generator_optimizer")
each(TRAINER, **dict.fromkeys(optional, or_none(t.FUNCTION)))
each(TRAINER, validation=[([(t.X, t.Y)], ValueError, "no `validation` for FERDDistillation")])
bad(TRAINER, ValueError, "without common parameters", teacher=(shared := net()), student=shared)
bad(TRAINER, ValueError, "to return logits of shape (N, 3)", student=net(classes=4))
bad(TRAINER, ValueError, "call student.float()", student=net().double())
uncut = dataclasses.replace(TINY, layer=None, uniformity_loss_weight=1.0)
bad(TRAINER, ValueError, "got None", config=uncut)
each(TRAINER, split=any_of(TypeError, "a pair", "layer4", (len,)))
good(TRAINER.load_state_dict, self=lambda: TRAINED, state=TRAINED.state_dict())
each(TRAINER.load_state_dict, state=any_of(ValueError, "something else", "text", None, {}))
