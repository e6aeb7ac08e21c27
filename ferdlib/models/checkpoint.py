"""Models from the checkpoint files that people have: ours, RobustBench's, those of the papers' releases."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public
from ferdlib._files import read_plain
from ferdlib.models.registry import build_model

# Architectures by the names under which RobustBench and TRADES publish their weights.
PUBLISHED = {
    "Chen2024Data_WRN_34_10": "wide_resnet_34_10",
    "Zhang2019Theoretically": "wide_resnet_34_10",
    "model_cifar_wrn": "wide_resnet_34_10",
}
# Keys under which training scripts put the weights among other things.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "student")
# Prefixes that DataParallel, an outer module and torch.compile put before every name.
PREFIXES = ("module.", "model.", "_orig_mod.")
# Names that differ between public implementations of one architecture.
SYNONYMS = (("linear.", "fc."), ("shortcut.", "downsample."))
# A copy of the first stage that TRADES' network has and its forward never runs.
UNUSED = "sub_block1."
# Names that an error lists before it counts the rest.
MOST_LISTED = 6


@public
def load_robustbench(
    path: str | Path, *, name: str | None = None, num_classes: int = 10
) -> nn.Module:
    """Load a published robust teacher: RobustBench's `Chen2024Data_WRN_34_10`, or TRADES' WRN-34-10.

    It takes images in [0, 1] without normalisation, as published. Nothing is downloaded, and nothing in
    the file is executed.

    Args:
        path: the file, such as "models/cifar10/Linf/Chen2024Data_WRN_34_10.pt".
        name: "Chen2024Data_WRN_34_10", "Zhang2019Theoretically" (RobustBench's name of the TRADES
            teacher) or "model_cifar_wrn" (TRADES' own); None takes it from the file's name.
        num_classes: K of the file, 10 or 100.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        TypeError: arguments of another type.
        ValueError: an unknown name, a truncated or unreadable file, a file that holds more than weights, or
            weights of another architecture (missing and unexpected names are listed).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "Chen2024Data_WRN_34_10.pt")
        ...     torch.save(build_model("wide_resnet_34_10", 10).state_dict(), path)
        ...     load_robustbench(path).training
        False
    """
    name = _checks.path("path", path).stem if name is None else name
    _checks.choice(list(PUBLISHED), name=name)
    _checks.integer(2, num_classes=num_classes)
    return _load(path, PUBLISHED[name], num_classes, in_channels=3)


@public
def load_checkpoint(
    path: str | Path,
    *,
    architecture: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
) -> nn.Module:
    """Load a model of a known architecture from a file with its weights.

    The weights may lie under "state_dict", "model_state_dict", "model", "net" or "student", carry the
    prefixes of DataParallel or torch.compile, and call the linear layer `linear` or `fc` and the
    shortcuts `shortcut` or `downsample`. Nothing in the file is executed. A `Normalized` model's file
    gives the model inside: wrap it again.

    Args:
        path: the file.
        architecture: a name that `build_model` knows; None reads the file's own "architecture" entry.
        num_classes: K; None reads the file's own "num_classes" entry.
        in_channels: colour channels of the images; None reads the file's own "in_channels" entry, and
            takes 3 if there is none.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        TypeError: arguments of another type.
        ValueError: a truncated or unreadable file, a file that holds more than weights, an architecture or
            number of classes that neither the caller nor the file gives, or weights of another architecture
            (missing and unexpected names are listed).

    Example:
        >>> import tempfile
        >>> content = {"state_dict": build_model("small_cnn_4", 3).state_dict()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(content, Path(folder, "student.pt"))
        ...     path = Path(folder, "student.pt")
        ...     model = load_checkpoint(path, architecture="small_cnn_4", num_classes=3)
        >>> model(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 3])
    """
    return _load(path, architecture, num_classes, in_channels)


def _load(
    path: str | Path, architecture: str | None, num_classes: int | None, in_channels: int | None
) -> nn.Module:
    file = _checks.file("path", path)
    content = _read(file)
    # What the caller says goes before what the file says of itself.
    own = content if isinstance(content, Mapping) else {}
    architecture = _entry(own, "architecture", architecture, str, file)
    num_classes = _entry(own, "num_classes", num_classes, int, file)
    in_channels = _entry({"in_channels": 3, **own}, "in_channels", in_channels, int, file)
    _check_sizes(architecture, num_classes, in_channels, file)
    # Without memory at first: a fresh model would draw numbers from the global generator, only to lose them.
    with torch.device("meta"):
        model = build_model(architecture, num_classes, in_channels=in_channels)
    fresh = model.state_dict()
    weights = _renamed(_weights(content, file), fresh)
    _check_fit(weights, fresh, architecture, file)
    # Files of torch before 0.4.1 have no count of batches.
    counts = {k: torch.zeros((), device="cpu") for k in fresh if k.endswith("num_batches_tracked")}
    model.to_empty(device="cpu").load_state_dict(counts | weights)
    return model.eval()


def _read(file: Path) -> Any:
    try:
        return read_plain(file)
    except Exception as error:  # torch's type of error depends on what is wrong with the file
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise InvalidValue(
                f"expected `path` to hold weights only, got {str(file)!r}, which holds objects that would "
                f"need code to be executed; it was not loaded"
            ) from error
        raise InvalidValue(
            f"expected `path` to be a file that torch.save wrote, got {str(file)!r}, which cannot be read; "
            f"is it complete?"
        ) from error


def _entry(content: Mapping[Any, Any], name: str, given: Any, kind: type, file: Path) -> Any:
    """Return the caller's value, or the file's."""
    value = content.get(name) if given is None else given
    if given is None and not isinstance(value, kind):
        raise InvalidValue(
            f"expected `{name}`, because the file {str(file)!r} does not say it, got None"
        )
    return value


def _check_sizes(architecture: Any, num_classes: Any, in_channels: Any, file: Path) -> None:
    """Refuse sizes that the file cannot hold a number for each of, before memory is asked for them."""
    held = file.stat().st_size
    numbers = [*map(int, re.findall(r"\d{1,18}", str(architecture))), num_classes, in_channels]
    if any(isinstance(number, int) and number > held for number in numbers):
        raise InvalidValue(
            f"expected `path` to hold all weights of a {architecture} for {num_classes} classes and {in_channels} "
            f"channels, got {str(file)!r} of {held} bytes"
        )


def _weights(content: Any, file: Path) -> dict[str, Tensor]:
    """Return the state dict without wrappers and without the prefixes that all names share."""
    found = _state_dict(content)
    if found is None:
        raise InvalidValue(
            f"expected `path` to hold a state dict, plain or under one of {', '.join(WRAPPERS)}, got "
            f"{str(file)!r}, which holds none"
        )
    weights = dict(found)
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _state_dict(content: Any, wrappers: int = 3) -> Mapping[str, Tensor] | None:
    """Return the first mapping of names to tensors that lies under at most so many wrappers."""
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        return content
    # A mapping may hold itself, so the depth has an end.
    if wrappers == 0:
        return None
    inside = (_state_dict(content[key], wrappers - 1) for key in WRAPPERS if key in content)
    return next((found for found in inside if found is not None), None)


def _renamed(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the file's weights under the model's own names."""
    renamed = {}
    for key, value in weights.items():
        synonyms = [
            key.replace(a, b) for pair in SYNONYMS for a, b in (pair, pair[::-1]) if a in key
        ]
        # If the file has both names, neither stands for the other: two answers to one question.
        candidates = [key] + [name for name in synonyms if name not in weights]
        name = next((each for each in candidates if each in own), key)
        if name in own or not name.startswith(UNUSED):
            renamed[name] = value
    return renamed


def _check_fit(
    weights: dict[str, Tensor], own: dict[str, Tensor], architecture: str, file: Path
) -> None:
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in weights if k not in own]
    reshaped = [
        f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    listed = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
    if listed:
        raise InvalidValue(
            f"expected `path` to hold the weights of a {architecture}, got {str(file)!r} with other ones; "
            f"{listed}"
        )


def _some(names: list[str]) -> str:
    rest = len(names) - MOST_LISTED
    return ", ".join(names[:MOST_LISTED]) + (f" and {rest} more" if rest > 0 else "")
