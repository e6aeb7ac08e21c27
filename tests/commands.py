"""Commands of `ferdlib` run in this process, and files for them."""

from __future__ import annotations

import pytest
import torch
from torchvision.utils import save_image

from ferdlib.__main__ import main
from ferdlib.models import small_cnn


def run(*words):
    """Run a command as a user types it."""
    main([str(word) for word in words])


def refused(*words):
    """Run a command that must end with one sentence; returns the sentence."""
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert isinstance(stop.value.code, str), "exit status 1"
    assert "\n" not in stop.value.code
    assert stop.value.code.startswith(f"ferdlib {words[0]}: ")
    return stop.value.code


def save_model(path, *, num_classes=10, in_channels=1, seed=0, **more):
    """Write the checkpoint of a small CNN, as the commands write them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small_cnn(in_channels, num_classes, width=4)
    content = {"architecture": "small_cnn_4", "state_dict": model.state_dict()}
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    torch.save(content | sizes | more, path)
    return path


def save_folder(root, train=12, test=4, size=8):
    """Write images of three classes, each bright in a channel of its own."""
    rng = torch.Generator().manual_seed(0)
    for split, count in (("train", train), ("test", test)):
        for c, name in enumerate(("ant", "bee", "cow")):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                image = torch.zeros(3, size, size)
                image[c] = 0.5 + 0.5 * torch.rand(size, size, generator=rng)
                save_image(image, root / split / name / f"{k}.png")
    return root
