"""A timm model attacked class by class, in the units of its images.

`Normalized` puts the model's own mean and standard deviation inside, so that images are in [0, 1] and
`eps` is in pixels. Any data set or loader of images and labels may stand in for the few here, and
"fair-ard" or "ferd" for the protocol: "quick" is for a look. The weights are random, so that nothing is
downloaded; `pretrained=True` takes the published ones.

    pip install timm
    python examples/drop_in/evaluate_timm.py
"""

import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from ferdlib.evaluation import evaluate
from ferdlib.models import Normalized

CLASSES = ("red", "green", "blue")


def build(name="mobilenetv3_small_050"):
    model = timm.create_model(name, pretrained=False, num_classes=len(CLASSES))
    inputs = timm.data.resolve_model_data_config(model)
    return Normalized(model, inputs["mean"], inputs["std"])


def loader(per_class=8, size=64):
    """Noise with one bright channel."""
    labels = torch.arange(len(CLASSES)).repeat(per_class)
    images = 0.4 * torch.rand(len(labels), 3, size, size)
    images[torch.arange(len(labels)), labels] += 0.6
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def main(seed=0):
    torch.manual_seed(seed)
    model, data = build(), loader()
    report = evaluate(model, data, "quick", num_classes=len(CLASSES), class_names=CLASSES)
    print(report)
    found = report["PGD-10"]
    print(
        f"\nunder PGD-10: average {found.average:.1%}, worst class {found.worst_class:.1%} "
        f"({found.worst_name})"
    )
    return model, data, report


if __name__ == "__main__":
    main()
