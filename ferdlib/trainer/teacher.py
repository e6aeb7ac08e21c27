"""Demands of FERD on its teacher: parts for the bottleneck, BatchNorm, logits of the config's classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ferdlib import _checks
from ferdlib._checks import InvalidType, InvalidValue, got
from ferdlib._modes import ask, borrowed
from ferdlib.bottleneck import Part, split_at
from ferdlib.models.likeness import difference
from ferdlib.models.tracing import check_layer
from ferdlib.trainer.config import FERDConfig

# Features and head of the teacher.
Split = tuple[Part, Part]


def parts(config: FERDConfig, teacher: nn.Module, split: Split | None) -> Split:
    """Cut the teacher where the bottleneck reads it; a teacher without one stays whole, and is not traced."""
    if split is not None:
        if not isinstance(split, tuple) or len(split) != 2:
            raise InvalidType(f"expected `split` as a pair (features, head), got {got(split)}")
        _checks.callable_(**{"split[0]": split[0], "split[1]": split[1]})
    if config.uniformity_loss_weight == 0:
        if split is not None:
            raise InvalidValue("expected no `split` with `uniformity_loss_weight` 0, got one")
        # A name that is not used may still be wrong.
        if config.layer is not None:
            check_layer(teacher, config.layer)
        return nn.Identity(), teacher
    if split is None and config.layer is None:
        raise InvalidValue("expected `config.layer` or `split` for the bottleneck, got None")
    features, head = split or split_at(teacher, config.layer or "")
    # Two images whose pixels all differ.
    shape, device = (2, *config.image_shape), next(teacher.parameters()).device
    x = torch.linspace(0, 1, math.prod(shape), dtype=torch.float32, device=device).reshape(shape)
    with torch.no_grad(), borrowed(features, head, teacher):
        z = features(x)
        _check_features(z, x, "split" if split else "config.layer")
        found = difference(teacher, lambda x: head(features(x)), x, torch.preserve_format)
    if found:
        raise InvalidValue(f"expected `head(features(x))` to be the teacher's logits, got {found}")
    return features, head


def _check_features(z: Tensor, x: Tensor, source: str) -> None:
    """Refuse features whose channels are not axis 1."""
    wanted, came = f"expected features `(N, C, H, W)` of `{source}`", tuple(z.shape)
    if z.ndim == 3:
        remedy = "pass a `split` of features `z.transpose(1, 2)[..., None]`, which its head undoes"
        raise InvalidValue(f"{wanted}, got tokens (N, L, D) {came}; {remedy}")
    # Positions have the sides of the image, up to a common factor.
    (height, width), sides = x.shape[2:], z.shape
    last = z.ndim == 4 and sides[1] * width == sides[2] * height
    if last and sides[2] * width != sides[3] * height:
        remedy = "pass a `split` of features `z.permute(0, 3, 1, 2)`, which its head undoes"
        raise InvalidValue(f"{wanted}, got channels-last (N, H, W, C) {came}; {remedy}")


def check_fit(
    teacher: nn.Module, student: nn.Module, config: FERDConfig, device: torch.device
) -> None:
    """Refuse models whose logits or BatchNorm layers do not fit the config."""
    read = {"teacher": teacher} | ({"student": student} if config.bn_models == "both" else {})
    for name, model in read.items() if config.bn_loss_weight > 0 else ():
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        if not norms or any(norm.running_mean is None for norm in norms):
            came = f"{config.bn_loss_weight:g} for a {name} without BatchNorm statistics"
            raise InvalidValue(f"expected `config.bn_loss_weight` 0, got {came}")
    image = torch.zeros(1, *config.image_shape, dtype=torch.float32, device=device)
    with torch.no_grad(), borrowed(teacher, student):
        for name, model in (("teacher", teacher), ("student", student)):
            try:
                logits = ask(model, image)
            except RuntimeError as error:
                wanted = f"`{name}` to take float32 images of shape {config.image_shape}"
                came = (
                    f"{' '.join(str(error).split())}; call {name}.float() if it is of another dtype"
                )
                raise InvalidValue(f"expected {wanted}, got {came}") from error
            if not isinstance(logits, Tensor) or logits.shape != (1, config.num_classes):
                raise InvalidValue(
                    f"expected `{name}` to return logits of shape (N, {config.num_classes}), got "
                    f"{got(logits)} for one image"
                )
