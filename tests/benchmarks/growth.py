"""How the time of an attack grows with what it is given."""

from __future__ import annotations

from functools import partial

import torch

from ferdlib.attacks import pgd
from ferdlib.models import build_model

from .harness import Competitor, Group, Prepared, Settings

BASE = {"images": 32, "classes": 10, "steps": 5, "size": 32, "model": "resnet18"}
CHANGES = (
    {},
    *({"images": n} for n in (8, 128)),
    *({"classes": k} for k in (100, 1000)),
    *({"steps": t} for t in (10, 20)),
    *({"size": s} for s in (16, 64)),
    *({"model": m} for m in ("mobilenet_v2", "wide_resnet_16_4", "wide_resnet_28_4")),
)


def competitor(settings: Settings, case: dict[str, int | str]) -> Competitor:
    images, classes, steps, size = (int(case[k]) for k in ("images", "classes", "steps", "size"))
    model = settings.place(build_model(str(case["model"]), classes)).eval()
    x = settings.place(torch.rand(images, 3, size, size))
    y = torch.randint(classes, (images,)).to(settings.device)
    return partial(pgd, model, x, y, steps=steps)


def prepare(settings: Settings) -> Prepared:
    torch.manual_seed(settings.seed)
    competitors = {}
    for change in CHANGES:
        name = ", ".join(f"{value} {key}" for key, value in change.items()) or "base"
        competitors[name] = competitor(settings, BASE | change)
    return Prepared(competitors=competitors, note=f"At the base size: {describe()}.")


def describe() -> str:
    return ", ".join(f"{value} {key}" for key, value in BASE.items() if key != "model") + (
        f", {BASE['model']}"
    )


GROUP = Group(
    about="PGD where one thing at a time is changed. A size is the side of the images in pixels.",
    goals=(),
    prepare=prepare,
)
