"""Models from the checkpoint files that people have: ours, RobustBench's, those of the papers' releases."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ferdlib import _oldchecks as _checks
from ferdlib.models.registry import build

# By the names under which RobustBench and TRADES publish them.
PUBLISHED = {
    "Chen2024Data_WRN_34_10": "wide_resnet_34_10",
    "Zhang2019Theoretically": "wide_resnet_34_10",
    "model_cifar_wrn": "wide_resnet_34_10",
}
# Where a training script may have put the weights among other things.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "student")
# What DataParallel, an outer module and torch.compile put before every name.
PREFIXES = ("module.", "model.", "_orig_mod.")
# Public implementations of one architecture that differ in names alone.
SYNONYMS = (("linear.", "fc."), ("shortcut.", "downsample."))
# A copy of the first stage that TRADES' network has and its forward never runs.
UNUSED = "sub_block1."


def load_robustbench(
    path: str | Path, *, name: str | None = None, num_classes: int = 10
) -> nn.Module:
    """A published robust teacher from its file: RobustBench's `Chen2024Data_WRN_34_10`, or TRADES' WRN-34-10.

    Takes images in [0, 1] without normalisation, as published. Nothing is downloaded, and nothing in
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
        ValueError: an unknown name, a truncated or unreadable file, one that holds more than weights, or
            weights of another architecture (missing and unexpected names are listed).

    Example:
        >>> import tempfile
        >>> from ferdlib.models import create
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name, "Chen2024Data_WRN_34_10.pt")
        >>> torch.save(create("wide_resnet_34_10", 10).state_dict(), path)
        >>> load_robustbench(path).training
        False
        >>> folder.cleanup()
    """
    name = _checks.path("load_robustbench", "path", path).stem if name is None else name
    _checks.integer("load_robustbench", "num_classes", num_classes, low=2)
    _checks.choice("load_robustbench", "name", name, list(PUBLISHED))
    return _load("load_robustbench", path, PUBLISHED[name], num_classes, in_channels=3)


def load_checkpoint(
    path: str | Path,
    *,
    architecture: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
) -> nn.Module:
    """A model of a known architecture from a file with its weights.

    The weights may lie under "state_dict", "model_state_dict", "model", "net" or "student", carry the
    prefixes of DataParallel or torch.compile, and call the linear layer `linear` or `fc` and the
    shortcuts `shortcut` or `downsample`. Nothing in the file is executed. Of a `Normalized` model the
    weights alone are read: wrap what is returned in it again.

    Args:
        path: the file.
        architecture: a name that `create` knows; None reads the file's own "architecture" entry, which
            the example scripts write.
        num_classes: K; None reads the file's own "num_classes" entry.
        in_channels: colour channels of the images; None reads the file's own "in_channels" entry, and
            takes 3 where there is none.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        TypeError: arguments of another type.
        ValueError: a truncated or unreadable file, one that holds more than weights, one that does not
            say its architecture or number of classes where neither is given, or weights of another architecture
            (missing and unexpected names are listed).

    Example:
        >>> import tempfile
        >>> from ferdlib.models import create
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name, "student.pt")
        >>> weights = create("small_cnn_4", 3).state_dict()
        >>> torch.save({"architecture": "small_cnn_4", "num_classes": 3, "state_dict": weights}, path)
        >>> load_checkpoint(path)(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 3])
        >>> folder.cleanup()
    """
    return _load("load_checkpoint", path, architecture, num_classes, in_channels)


def _load(
    function: str,
    path: str | Path,
    architecture: str | None,
    num_classes: int | None,
    in_channels: int | None,
) -> nn.Module:
    content = _read(function, path)
    architecture = _entry(function, path, content, "architecture", architecture, str)
    num_classes = _entry(function, path, content, "num_classes", num_classes, int)
    in_channels = _entry(function, path, content, "in_channels", in_channels, int, missing=3)
    _checks.integer(function, "num_classes", num_classes, low=2)
    _checks.integer(function, "in_channels", in_channels, low=1)
    model = build(function, architecture, num_classes, in_channels)
    own = model.state_dict()
    weights = _named_as(own, _weights(function, path, content))
    _check_fit(function, path, architecture, own, weights)
    model.load_state_dict(weights, strict=False)  # what may lack was checked
    return model.eval()


def _read(function: str, path: str | Path) -> Any:
    if not _checks.path(function, "path", path).is_file():
        raise FileNotFoundError(f"{function}: expected `path` to be a file, got {str(path)!r}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise ValueError(
                f"{function}: expected `path` to hold weights only, got {str(path)!r}, which holds objects "
                f"that would need code to be executed; it was not loaded"
            ) from error
        raise ValueError(
            f"{function}: expected `path` to be a file that torch.save wrote, got {str(path)!r}, which "
            f"cannot be read; is it complete?"
        ) from error


def _entry(
    function: str,
    path: str | Path,
    content: Any,
    name: str,
    given: Any,
    kind: type,
    missing: Any = None,
) -> Any:
    """What the caller gave, or what the file says of itself."""
    if given is not None:
        return given
    found = content.get(name, missing) if isinstance(content, Mapping) else missing
    if not isinstance(found, kind):
        raise ValueError(
            f"{function}: expected `{name}`, because the file {str(path)!r} does not say it, got None"
        )
    return found


def _weights(function: str, path: str | Path, content: Any) -> dict[str, Tensor]:
    """The state dict, out of its wrappers and without the prefixes that all names share."""
    found = _state_dict(content)
    if found is None:
        raise ValueError(
            f"{function}: expected `path` to hold a state dict, plain or under one of "
            f"{', '.join(WRAPPERS)}, got {str(path)!r}, which holds none"
        )
    weights = dict(found)
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _state_dict(content: Any, wrappers: int = 3) -> Mapping[str, Tensor] | None:
    """The first mapping of names to tensors under so many wrappers; a file's mapping may hold itself."""
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        return content
    if wrappers == 0:
        return None
    inside = (_state_dict(content[key], wrappers - 1) for key in WRAPPERS if key in content)
    return next((found for found in inside if found is not None), None)


def _named_as(own: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the model's names."""
    renamed = {}
    for key, value in weights.items():
        candidates = [key] + [
            key.replace(a, b) for pair in SYNONYMS for a, b in (pair, pair[::-1]) if a in key
        ]
        # Where a file has both names, neither stands for the other.
        name = next((c for c in candidates if c in own and (c == key or c not in weights)), key)
        if name in own or not name.startswith(UNUSED):
            renamed[name] = value
    return renamed


def _check_fit(
    function: str,
    path: str | Path,
    architecture: str,
    own: dict[str, Tensor],
    weights: dict[str, Tensor],
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
        raise ValueError(
            f"{function}: expected `path` to hold the weights of a {architecture}, got {str(path)!r} "
            f"with other ones; {listed}"
        )


def _some(names: list[str], most: int = 6) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
