"""Labelled images for the examples: torchvision's data sets, any folder of images, scikit-learn's digits.

Everything is decoded once into one tensor; 60,000 CIFAR images are 184 MB of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

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
class Images:
    """Pixels `(N, C, H, W)`, uint8 or float in [0, 1]; int64 labels `(N,)`; the classes' names."""

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, index: Tensor | slice, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Images as floats in [0, 1] and their labels, on a device."""
        pixels = self.pixels[index].to(device)
        x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return x, self.labels[index].to(device)

    def part(self, index: Tensor) -> Images:
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])


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
        return _tiny_imagenet(root, split, download)
    return _torchvision(source, root, split, download)


def stratified(images: Images, count: int, seed: int) -> Tensor:
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
