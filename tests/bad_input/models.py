"""Models."""

import torch

from bad_input import table as t
from bad_input.table import C, K, X, any_of, bad, each, good, or_none
from ferdlib import models

good(models.small_cnn, in_channels=C, num_classes=K, width=2)
good(models.wide_resnet, depth=10, width=1)
each(models.wide_resnet, depth=[*t.integer(10), (11, ValueError, "6n + 4")])
resnets = (models.resnet18, models.resnet34, models.resnet56)
for function in (*resnets, models.preact_resnet18, models.preact_resnet34, models.mobilenet_v2):
    good(function)
for function in (models.resnet56, models.preact_resnet18, models.preact_resnet34):
    each(function, shortcut=t.CHOICE)

# Sizes are refused by the function that builds the model.
builds = "build_model|small_cnn|wide_resnet"
unknown = ("resnet50", "wide_resnet_34", "wide_resnet_34_10 ", "small_cnn")
architecture = t.STRING + any_of(ValueError, "wide_resnet_DEPTH_WIDTH", *unknown)
good(models.build_model, builds, architecture="small_cnn_2")
each(models.build_model, architecture=architecture)
bad(models.build_model, ValueError, "`depth` of the form", architecture="wide_resnet_35_10")
bad(models.build_model, ValueError, "`width` >= 1", architecture="small_cnn_0")


def files():
    content = {"architecture": "small_cnn_2", "num_classes": K, "in_channels": C}
    weights = models.build_model("small_cnn_2", K, in_channels=C).state_dict()
    torch.save(content | {"state_dict": weights}, "student.pt")
    torch.save(weights, "weights.pt")
    with torch.device("meta"):
        published = models.wide_resnet(34, 10).state_dict()
    # A file holds one number of a tensor that was expanded.
    torch.save({k: torch.ones(()).expand(v.shape) for k, v in published.items()}, "published.pt")


PATH = t.PATH + any_of(FileNotFoundError, "to be a file", "none.pt", ".")
others = any_of(ValueError, "`path` to hold the weights", "small_cnn_3")
sizes = any_of(ValueError, "`path` to hold the weights", K + 1)
good(models.load_checkpoint, f"load_checkpoint|{builds}", path="student.pt")
each(models.load_checkpoint, path=[*PATH, ("weights.pt", ValueError, "`architecture`, because")])
each(models.load_checkpoint, architecture=or_none(architecture + others))
each(models.load_checkpoint, num_classes=or_none(t.integer(2) + sizes))
each(models.load_checkpoint, in_channels=or_none(t.integer(1) + sizes))
good(models.load_robustbench, path="published.pt", name="model_cifar_wrn")
each(models.load_robustbench, path=PATH, name=or_none(t.CHOICE))
bad(models.load_robustbench, ValueError, "one of", name=None)


class Branching(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


good(models.freeze_for_attack, model=t.MODEL, autocast=torch.bfloat16)
dtypes = [(torch.int8, ValueError, "one of"), ("bfloat16", TypeError, "one of")]
traced = (Branching(), ValueError, "fold_batchnorm=False")
each(models.freeze_for_attack, model=[*t.MODULE, traced], autocast=dtypes)
FROZEN = models.freeze_for_attack(t.MODEL)
good(models.FrozenModel.follow, self=lambda: FROZEN, model=t.MODEL)
each(models.FrozenModel.follow, model=[*t.MODULE, (torch.nn.Linear(2, 2), ValueError, "layers")])

channels = any_of(TypeError, "to be numbers", "text", ["a", "b"], None)
channels += any_of(ValueError, "one number per channel", [[0.5, 0.4]], [0.5], [], 0.5)
channels += [([t.NAN, t.NAN], ValueError, "finite")]
channels += [(torch.ones(C, dtype=torch.complex64), TypeError, "real")]
positive = any_of(ValueError, "positive", [0.2, 0.0], [0.2, -1.0])
good(models.Normalized, model=t.MODEL, mean=[0.5, 0.4], std=[0.2, 0.3])
each(models.Normalized, mean=channels, std=channels + positive)
NORMALIZED = models.Normalized(t.MODEL, [0.5, 0.4], [0.2, 0.3])
good(models.Normalized.forward, self=lambda: NORMALIZED, x=X)
each(models.Normalized.forward, x=[(X[:, :1], ValueError, "channels")])
