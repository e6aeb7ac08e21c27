"""Models from the checkpoint files that people have: ours, RobustBench's, those of the papers' releases."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ferdlib import _checks
from ferdlib._checks import InvalidValue, public
from ferdlib._files import read_plain
from ferdlib.models import weights
from ferdlib.models.normalized import Normalized
from ferdlib.models.preact import shortcut_of
from ferdlib.models.registry import build_model

# Architectures by the names under which RobustBench and TRADES publish their weights.
PUBLISHED = {
    "Chen2024Data_WRN_34_10": "wide_resnet_34_10",
    "Zhang2019Theoretically": "wide_resnet_34_10",
    "model_cifar_wrn": "wide_resnet_34_10",
}
# Files that people have and torch.load does not read, by the ends of their names.
OTHER_KINDS = {".safetensors": "safetensors", ".onnx": "ONNX", ".pt2": "torch.export"}
# Variants that other names tell apart: a file of one is the weights of the other as well.
OTHER_NAMES = {"resnet56": "resnet56_padding_shortcut"}
# Variants that no name and no shape tells apart.
SAME_NAMES = {
    "preact_resnet18": "preact_resnet18_input_shortcut",
    "preact_resnet34": "preact_resnet34_input_shortcut",
    "preact_resnet18_input_shortcut": "preact_resnet18",
    "preact_resnet34_input_shortcut": "preact_resnet34",
}

LOG = logging.getLogger("ferdlib")
ANOTHER = (
    "%s: its BatchNorm statistics are those of a %s, which is another function than a %s of the same names and "
    "shapes; load it as what it is"
)
TWO_EXIST = (
    "%s: two public networks have the names and shapes of a %s; if the clean accuracy is lower than it should "
    "be, the shortcuts take the input, as in Fast Adversarial Training's release: load it as %s"
)
FIRST_MODULE = (
    "%s: the names begin with %r, so another module came first; if it normalised the images, wrap the model in "
    "models.Normalized"
)
NAMED = re.compile(r"GLOBAL ([\w.]+)|<class '([\w.]+)'>")


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

    The weights may lie under any wrapper and prefix, and call the linear layer `linear` or `fc` and the
    shortcuts `shortcut` or `downsample`. Of several networks that fit, the one under the most usual name is
    loaded, such as "state_dict" before "state_dict_ema" and "student" before "teacher". Nothing in the file
    is executed.

    A mean and a standard deviation beside the weights (`mean` and `std`, or RobustBench's `mu` and `sigma`)
    give a `Normalized` model. A `Normalized` model's own file does not hold them: wrap what comes again.
    Names and shapes do not say everything. Where two public networks share them, a warning is logged, unless
    the BatchNorm statistics are those of the one that is asked for.

    Args:
        path: the file.
        architecture: a name that `build_model` knows; None reads the file's own "architecture" entry.
        num_classes: K; None reads the file's own "num_classes" entry.
        in_channels: colour channels of the images; None reads the file's own "in_channels" entry, and
            takes 3 if there is none.

    Returns:
        The model in eval mode, on the CPU, for images in [0, 1] if the file says how to normalise them.

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
    model, network = _fitted(content, architecture, num_classes, in_channels, file)
    if network.problems and architecture in OTHER_NAMES:
        other = _fitted(content, OTHER_NAMES[architecture], num_classes, in_channels, file)
        model, network = (model, network) if other[1].problems else other
    inside = None
    if not network.problems:
        inside = weights.normalisation(content, network, in_channels, str(file))
    _check_fit(network, architecture, in_channels, file)
    if architecture in SAME_NAMES and own.get("architecture") != architecture:
        _warn_of_two(architecture, network, file)
    if inside is None and re.search(r"(^|\.)0*[1-9]\d*\.", network.prefix):
        LOG.warning(FIRST_MODULE, file, network.prefix)
    # Files of torch before 0.4.1 have no count of batches.
    fresh = model.state_dict()
    counts = {k: torch.zeros((), device="cpu") for k in fresh if k.endswith("num_batches_tracked")}
    model.to_empty(device="cpu").load_state_dict(counts | network.weights)
    return (model if inside is None else Normalized(model, *inside).cpu()).eval()


def _warn_of_two(architecture: str, network: weights.Network, file: Path) -> None:
    asked = "input" if architecture.endswith("_input_shortcut") else "activation"
    found = shortcut_of(network.weights)
    if found not in (None, asked):
        LOG.warning(ANOTHER, file, SAME_NAMES[architecture], architecture)
    # Who asks for the rarer one knows that there are two.
    elif found is None and asked == "activation":
        LOG.warning(TWO_EXIST, file, architecture, SAME_NAMES[architecture])


def _fitted(
    content: Any, architecture: str, num_classes: int, in_channels: int, file: Path
) -> tuple[nn.Module, weights.Network]:
    # Without memory at first: a fresh model would draw numbers from the global generator, only to lose them.
    with torch.device("meta"):
        model = build_model(architecture, num_classes, in_channels=in_channels)
    own = model.state_dict()
    return model, weights.find(content, own, architecture=architecture, file=str(file))


def _check_fit(network: weights.Network, architecture: str, channels: int, file: Path) -> None:
    left = [name.removeprefix(network.prefix) for name in network.rest]
    unexpected = weights.listed({"unexpected": left})
    problems = "; ".join(each for each in (network.problems, unexpected) if each)
    if not problems:
        return
    # Few numbers beside a whole network most likely belong to a first layer.
    small = left and all(value.numel() <= channels for value in network.rest.values())
    remedy = (
        "; if these normalise the images, save the network alone and wrap it in models.Normalized"
    )
    raise InvalidValue(
        f"expected `path` to hold the weights of a {architecture}, got {str(file)!r} with other ones; "
        f"{problems}{remedy if small and not network.problems else ''}"
    )


def _read(file: Path) -> Any:
    try:
        return read_plain(file)
    except Exception as error:  # torch's type of error depends on what is wrong with the file
        # Torch names what it refuses as "GLOBAL a.b" or as "<class 'a.b'>", one at a time.
        if isinstance(error, pickle.UnpicklingError) and (
            named := [*map("".join, NAMED.findall(str(error)))]
        ):
            objects = _objects(file) or named[:1]
            raise InvalidValue(
                f"expected `path` to hold weights only, got {str(file)!r}, which also holds objects that would "
                f"need code to be executed ({weights.some(objects)}); it was not loaded; {_remedy(objects)}"
            ) from error
        if "TorchScript" in str(error):
            raise InvalidValue(
                f"expected `path` to hold weights only, got {str(file)!r}, a TorchScript program; save the "
                f"state_dict() of what torch.jit.load makes of it"
            ) from error
        kind = OTHER_KINDS.get(file.suffix.lower())
        raise InvalidValue(
            f"expected `path` to be a file that torch.save wrote, got {str(file)!r}, "
            + (
                f"a file of {kind}; torch.save its state dict"
                if kind
                else "which cannot be read; is it complete?"
            )
        ) from error


def _objects(file: Path) -> list[str]:
    """All objects that a file would run code for; none if it is no archive, or names them by no plain name."""
    # Files of torch before 1.6 are no archives, and torch cannot list what they need.
    if not zipfile.is_zipfile(file):
        return []
    needed = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    objects = sorted(name for name in needed if re.fullmatch(r"[\w.]+", name))
    # Allowed alone, a dtype is refused for its class, which the file does not name.
    return objects + ["numpy.dtypes.Float64DType"] * ("numpy.dtype" in objects)


def _remedy(objects: list[str]) -> str:
    if any(name.startswith("torch.nn.modules.") for name in objects):
        return "save the model's state_dict() where its code is"
    return (
        "save the weights alone or, if you trust the file, load it under "
        f"torch.serialization.safe_globals([{', '.join(objects)}])"
    )


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
