"""Labelled images for the examples: torchvision's data sets, any folder of images, scikit-learn's digits.

`load` decodes everything once into one tensor; 60,000 CIFAR images are 184 MB of it. `load_any` knows the
other classification data sets of torchvision too, and reads these image by image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from processes import first_ahead

Source = Literal["cifar10", "cifar100", "svhn", "tiny-imagenet", "folder", "digits"]
Split = Literal["train", "test"]

# Number of classes, channels, height and width; a folder's are its own.
SHAPES: dict[str, tuple[int, tuple[int, int, int]]] = {
    "cifar10": (10, (3, 32, 32)),
    "cifar100": (100, (3, 32, 32)),
    "svhn": (10, (3, 32, 32)),
    "tiny-imagenet": (200, (3, 64, 64)),
    "folder": (10, (3, 32, 32)),
    "digits": (10, (1, 8, 8)),
}
# What may be done to an image without changing its class.
AUGMENTATIONS = {
    "cifar10": "crop_flip",
    "cifar100": "crop_flip",
    "svhn": "crop",
    "tiny-imagenet": "crop_flip",
    "folder": "crop_flip",
    "digits": "none",
}
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


@dataclass(frozen=True)
class Images(Dataset[tuple[Tensor, int]]):
    """Pixels `(N, C, H, W)`, uint8 or float in [0, 1]; int64 labels `(N,)`; the classes' names."""

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, k: int) -> tuple[Tensor, int]:
        x, labels = self.batch(slice(k, k + 1))
        return x[0], int(labels)

    def batch(
        self, index: Tensor | slice, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Images as floats in [0, 1] and their labels, on a device."""
        pixels = self.pixels[index].to(device)
        x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return x, self.labels[index].to(device)

    def part(self, index: Tensor) -> Images:
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])


class Streamed(Dataset[tuple[Tensor, int]]):
    """Images of a torchvision data set, read when they are asked for, as floats in [0, 1] of one size."""

    def __init__(self, data: Any, class_names: tuple[str, ...]) -> None:
        self.data, self.class_names = data, class_names
        self.shape = data[0][0].shape

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, k: int) -> tuple[Tensor, int]:
        x, label = self.data[k]
        if x.shape != self.shape:
            raise ValueError(
                f"expected all images of the shape of the first, {tuple(self.shape)}, got "
                f"{tuple(x.shape)} of image {k}; --image-size gives them one size"
            )
        return x, int(label)

    @cached_property
    def labels(self) -> Tensor:
        """Of all images, int64 `(N,)`."""
        for name in ("targets", "labels", "_labels"):
            found = torch.as_tensor(getattr(self.data, name, ()))
            if found.shape == (len(self),):
                return found.long()
        return torch.tensor([self[k][1] for k in range(len(self))])


def load(source: Source, root: Path, split: Split, *, download: bool = False) -> Images:
    """The whole of a data set's split.

    "folder" wants `root/train/CLASS/*` and `root/test/CLASS/*` (or `val`), all images of one size.
    "tiny-imagenet" is the folder `tiny-imagenet-200` of the original archive. "digits" has no files; its
    540 test images are those of seed 0.

    Raises:
        FileNotFoundError: the data are not there.
        ValueError: a folder without classes or images, or images of different sizes.
    """
    if source == "digits":
        return _digits(split)
    if source == "folder":
        folders = [root / name for name in ((split,) if split == "train" else ("test", "val"))]
        folder = next((f for f in folders if f.is_dir()), folders[0])
        return _folder(folder)
    if source == "tiny-imagenet":
        with first_ahead(download):
            return _tiny_imagenet(root, split, download)
    with first_ahead(download):
        return _torchvision(source, root, split, download)


def load_splits(source: Source, root: Path, *, download: bool = False) -> tuple[Images, Images]:
    """For training and for the test, of the same classes.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    train = load(source, root, "train", download=download)
    test = load(source, root, "test", download=download)
    if test.class_names != train.class_names:
        raise ValueError(
            f"expected the same classes for training and test, got {len(train.class_names)} and "
            f"{len(test.class_names)}, or others"
        )
    return train, test


def load_any(
    data: str,
    root: Path,
    *,
    download: bool = False,
    split: str = "test",
    image_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
) -> Images | Streamed:
    """The test images of a `Source`, or of a class of `torchvision.datasets` by its name.

    Of the latter, a class that knows `train` is asked for the others, one that knows `split` for that one.

    Raises:
        ValueError: no such data set, one without single images and labels, or another number of classes.
        FileNotFoundError: the data are not there.
    """
    images: Images | Streamed
    if data not in SHAPES:
        with first_ahead(download):
            images = _streamed(data, root, download, split, image_size, num_classes)
    elif image_size is None:
        images = load(cast(Source, data), root, "test", download=download)
    else:
        raise ValueError(f"expected no --image-size for --data {data}, got {image_size}")
    if num_classes not in (None, len(images.class_names)):
        raise ValueError(
            f"expected --num-classes to be {len(images.class_names)}, those of {data}, got {num_classes}"
        )
    return images


def chosen(images: Images | Streamed, count: int | None, seed: int) -> Dataset[tuple[Tensor, int]]:
    """All images, or so many with equal shares of the classes, which keep their index."""
    if count is None:
        return images
    return Subset(images, stratified(images, count, seed).tolist())


def stratified(images: Images | Streamed, count: int, seed: int) -> Tensor:
    """Indices of `count` images with equal shares of the classes, up to one, drawn by seed.

    Raises:
        ValueError: a count that is not in 1..N.
    """
    if not 1 <= count <= len(images):
        raise ValueError(f"expected to choose 1..{len(images)} images, got {count}")
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=rng)
    labels = images.labels[order]
    rank = torch.empty_like(labels)
    for c in labels.unique():
        members = labels == c
        rank[members] = torch.arange(int(members.sum()))
    return order[rank.argsort(stable=True)[:count]].sort().values


def _streamed(
    name: str,
    root: Path,
    download: bool,
    split: str,
    image_size: tuple[int, int] | None,
    num_classes: int | None,
) -> Streamed:
    from torchvision import datasets, transforms

    kind = getattr(datasets, name, None) if name in datasets.__all__ else None
    if not inspect.isclass(kind):
        raise ValueError(
            f"expected --data to be one of {', '.join(SHAPES)} or a class of torchvision.datasets, such "
            f"as MNIST, got {name!r}"
        )
    known: set[str] = set()
    for base in kind.__mro__:
        parameters = inspect.signature(base.__init__).parameters
        known |= parameters.keys()
        if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            break  # EMNIST and others hand on what they do not name themselves
    resize = [] if image_size is None else [transforms.Resize(image_size)]
    options = {
        "root": str(root),
        "train": False,
        "split": split,
        "download": download,
        "transform": transforms.Compose([*resize, transforms.ToTensor()]),
    }
    try:
        data = kind(**{option: value for option, value in options.items() if option in known})
        x, label = data[0]
    except (RuntimeError, OSError) as error:
        hint = "; --download fetches it" if "download" in known and not download else ""
        raise FileNotFoundError(
            f"expected {name} under {str(root)!r}, got {error}{hint}"
        ) from error
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected {name} to have images with one label each in its split {split!r}, got {error}"
        ) from error
    if not (isinstance(x, Tensor) and isinstance(label, Integral)):
        raise ValueError(f"expected images with one label each, got those of {name}")
    # ImageNet has a tuple of synonyms for each.
    classes = [c if isinstance(c, str) else c[0] for c in getattr(data, "classes", None) or ()]
    names = tuple(classes or map(str, range(num_classes or 0)))
    if len(names) < 2:
        raise ValueError(
            f"expected --num-classes, because {name} does not say it, got {num_classes}"
        )
    return Streamed(data, names)


def _torchvision(source: str, root: Path, split: Split, download: bool) -> Images:
    from torchvision import datasets

    try:
        if source == "svhn":
            data: Any = datasets.SVHN(str(root), split=split, download=download)
            pixels, labels = torch.from_numpy(data.data), data.labels
            names = tuple(str(k) for k in range(10))
        else:
            kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[source]
            data = kind(str(root), train=split == "train", download=download)
            pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
            labels, names = data.targets, tuple(data.classes)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"expected {source} under {str(root)!r}, got none or another version of it; "
            f"--download fetches it"
        ) from error
    return Images(pixels, torch.as_tensor(labels, dtype=torch.int64), names)


def _digits(split: Split) -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=540, random_state=0, stratify=labels
    )
    names = tuple(str(k) for k in range(10))
    return Images(pixels, labels, names).part(torch.tensor(train if split == "train" else test))


def _tiny_imagenet(root: Path, split: Split, download: bool) -> Images:
    base = root / "tiny-imagenet-200"
    if download and not base.is_dir():
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(TINY_IMAGENET, str(root), md5=TINY_IMAGENET_MD5)
    if not base.is_dir():
        raise FileNotFoundError(f"expected {str(base)!r}, got nothing there; --download fetches it")
    if split == "train":
        return _folder(base / "train")
    annotations = base / "val" / "val_annotations.txt"
    if not annotations.is_file():  # sorted into class folders, as many scripts leave it
        return _folder(base / "val")
    names = tuple(sorted(f.name for f in (base / "train").iterdir() if f.is_dir()))
    rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines()]
    files = [(str(base / "val" / "images" / file), names.index(name)) for file, name in rows]
    return _decoded(files, names)


def _folder(folder: Path) -> Images:
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected a folder {str(folder)!r} of class folders, got nothing there"
        )
    names = sorted(f.name for f in folder.iterdir() if f.is_dir())
    if len(names) < 2:
        raise ValueError(
            f"expected {str(folder)!r} to hold a folder for each of at least 2 classes, got {len(names)}"
        )
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise ValueError(
            f"expected images in every class of {str(folder)!r}, got {error}"
        ) from error
    return _decoded(found.samples, tuple(found.classes))


def _decoded(files: list[tuple[str, int]], names: tuple[str, ...]) -> Images:
    """All images as one uint8 tensor."""
    read = _reader()
    first = read(files[0][0])
    pixels = torch.empty(len(files), *first.shape, dtype=torch.uint8)
    for k, (file, _) in enumerate(files):
        image = read(file)
        if image.shape != first.shape:
            raise ValueError(
                f"expected all images of the size of the first, {tuple(first.shape[1:])}, got "
                f"{tuple(image.shape[1:])} in {file!r}"
            )
        pixels[k] = image
    return Images(pixels, torch.tensor([label for _, label in files]), names)


def _reader() -> Callable[[str], Tensor]:
    from torchvision.datasets.folder import pil_loader
    from torchvision.transforms.functional import pil_to_tensor

    def read(file: str) -> Tensor:
        try:
            return pil_to_tensor(pil_loader(file))
        except OSError as error:
            raise ValueError(f"expected {file!r} to be a readable image, got {error}") from error

    return read
