"""FERD with a teacher from timm and one from torchvision, both trained on normalised images.

`Normalized` puts mean and standard deviation inside the model, so that images are in [0, 1] and `eps`
is in pixels. The layer is named for `split_at`, which cuts any model that torch.fx can trace. The
weights are random here, so that nothing is downloaded; a real teacher is a robust one.

    pip install timm
    python examples/drop_in/foreign_teachers.py
"""

import timm
import torch
import torchvision

from ferdlib.models import Normalized, small_cnn
from ferdlib.trainer import FERDConfig, FERDTrainer

# Layers are named as in `named_modules()` of the wrapped model. Nets made for 224x224 images shrink
# 32x32 ones to a single position in their last stage, and the bottleneck needs two: cut before it.


def from_timm():
    model = timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=10)
    inputs = timm.data.resolve_model_data_config(model)
    return Normalized(model, inputs["mean"], inputs["std"]), "model.blocks.3"


def from_torchvision():
    model = torchvision.models.resnet18(weights=None, num_classes=10)
    inputs = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    return Normalized(model, inputs.mean, inputs.std), "model.layer3"


def distil(teacher, layer, seed=0):
    """One epoch of FERD at tiny sizes."""
    config = FERDConfig(
        num_classes=10,
        layer=layer,
        image_shape=(3, 32, 32),
        epochs=1,
        warmup_epochs=0,
        batch_size=16,
        generator_steps=2,
        generator_width=8,
        uniformity_loss_weight=0.1,  # fairness-aware examples, which read the layer
        bottleneck_steps=5,
        student_steps=2,
        margin_attack_steps=5,
    )
    student = small_cnn(3, 10, width=4)
    trainer = FERDTrainer(teacher.eval(), student, config=config, seed=seed)
    (stats,) = trainer.fit()
    return trainer, stats


def main(seed=0):
    torch.manual_seed(seed)
    found = {}
    for name, make in {"timm": from_timm, "torchvision": from_torchvision}.items():
        teacher, layer = make()
        trainer, stats = distil(teacher, layer, seed)
        print(
            f"{name} {type(teacher.model).__name__}, cut at {layer}: {stats.pool_size} images of "
            f"32x32, student loss {stats.student_loss:.4f}, non-robust channels "
            f"{stats.synthesis['nonrobust_fraction']:.0%}"
        )
        found[name] = trainer, stats
    return found


if __name__ == "__main__":
    main()
