"""Labelled images: torchvision's data sets, any folder of images, scikit-learn's digits, generated noise.

`load` decodes everything once into one tensor; 60,000 CIFAR images are 184 MB of it. `load_any` knows the
other classification data sets of torchvision too, and reads these image by image.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ferdlib.distributed import first_ahead
from ferdlib.recipes.options import SHAPES, ImageOptions

Split = Literal["train", "test"]

# Changes to an image that keep its class; crop and flip elsewhere.
AUGMENTATIONS = {"svhn": "crop", "digits": "none", "generated": "none"}
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

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of a model for these images, as `models.build_model` takes them."""
        return {"num_classes": len(self.class_names), "in_channels": self.pixels.shape[1]}

    def batch(
        self, index: Tensor | slice, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Images as floats in [0, 1] and their labels, on a device."""
        pixels = self.pixels[index].to(device)
        x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return x, self.labels[index].to(device)

    def digest(self) -> str:
        """SHA-256 of names, labels and pixels, in hexadecimal."""
        found = hashlib.sha256(repr((self.class_names, self.pixels.shape)).encode())
        for values in (self.labels, self.pixels):
            found.update(values.contiguous().numpy().data)
        return found.hexdigest()

    def part(self, index: Tensor) -> Images:
        """Some of the images, in this order."""
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])


class Streamed(Dataset[tuple[Tensor, int]]):
    """Images of a torchvision data set, read on demand, as floats in [0, 1] of one size."""

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
        """Labels of all images, int64 `(N,)`."""
        for name in ("targets", "labels", "_labels"):
            found = torch.as_tensor(getattr(self.data, name, ()))
            if found.shape == (len(self),):
                return found.long()
        return torch.tensor([self[k][1] for k in range(len(self))])


def load(
    data: str,
    root: Path = Path("data"),
    split: Split = "test",
    *,
    download: bool = False,
    seed: int = 0,
) -> Images:
    """Load a whole split of a data set.

    "folder" wants `root/train/CLASS/*` and `root/test/CLASS/*` (or `val`), all images of one size.
    "tiny-imagenet" is the folder `tiny-imagenet-200` of the original archive. The 540 test images of "digits"
    are drawn by seed.
    """
    if seed < 0:
        raise ValueError(f"expected --seed of at least 0, got {seed}")
    if data == "digits":
        return _digits(split, seed)
    if data == "generated":
        return generated(split)
    if data == "folder":
        folders = [root / name for name in ((split,) if split == "train" else ("test", "val"))]
        return _folder(next((f for f in folders if f.is_dir()), folders[0]))
    with first_ahead(download):
        if data == "tiny-imagenet":
            return _tiny_imagenet(root, split, download)
        return _torchvision(data, root, split, download)


def load_train_test(options: ImageOptions, seed: int = 0) -> tuple[Images, Images]:
    """Load both splits."""
    train, test = (
        load(options.data, options.root, split, download=options.download, seed=seed)
        for split in ("train", "test")
    )
    if test.class_names != train.class_names:
        raise ValueError(
            f"expected the same classes for training and test, got {len(train.class_names)} and "
            f"{len(test.class_names)}, or others"
        )
    return train, test


def hold_out(images: Images, count: int, seed: int) -> tuple[Images, Images]:
    """Split training images into those that are trained on and `count` that are not, by seed."""
    from sklearn.model_selection import train_test_split

    classes = len(images.class_names)
    if not classes <= count <= len(images) - classes:
        raise ValueError(
            f"expected --val-images in {classes}..{len(images) - classes}, one of each class at least on both "
            f"sides, got {count} of {len(images)}"
        )
    train, val = train_test_split(
        range(len(images)), test_size=count, random_state=seed, stratify=images.labels
    )
    return images.part(torch.tensor(train)), images.part(torch.tensor(val))


def load_any(
    data: str,
    root: Path,
    *,
    download: bool = False,
    split: str = "test",
    image_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> Images | Streamed:
    """Load the test images of `load`, or those of a class of `torchvision.datasets` by its name.

    Of the latter, a class that knows `train` is asked for the others, one that knows `split` for that one.
    """
    images: Images | Streamed
    if data not in SHAPES:
        with first_ahead(download):
            images = _streamed(data, root, download, split, image_size, num_classes)
    elif image_size is None:
        images = load(data, root, "test", download=download, seed=seed)
    else:
        raise ValueError(f"expected no --image-size for --data {data}, got {image_size}")
    if num_classes not in (None, len(images.class_names)):
        raise ValueError(
            f"expected --num-classes to be {len(images.class_names)}, those of {data}, got {num_classes}"
        )
    return images


def chosen(images: Images | Streamed, count: int | None, seed: int) -> Dataset[tuple[Tensor, int]]:
    """All images, or `count` of them with equal shares of the classes; they keep their index."""
    return images if count is None else Subset(images, stratified(images, count, seed).tolist())


def stratified(images: Images | Streamed, count: int, seed: int) -> Tensor:
    """Draw the indices of `count` images with equal shares of the classes, up to one, by seed."""
    if not 1 <= count <= len(images):
        raise ValueError(f"expected --test-images in 1..{len(images)}, got {count}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    labels = images.labels[order]
    # Number of images of the same class before each: the first of every class come first.
    turn = torch.empty_like(labels)
    for c in labels.unique():
        members = labels == c
        turn[members] = torch.arange(int(members.sum()))
    return order[turn.argsort(stable=True)[:count]].sort().values


def generated(
    split: Split, num_classes: int = 10, shape: tuple[int, int, int] = (3, 32, 32)
) -> Images:
    """Noise in a colour of its own for every class, 8 images per class to train and 4 to test."""
    rng = torch.Generator().manual_seed(0)
    colours = torch.rand(num_classes, shape[0], 1, 1, generator=rng)
    labels = torch.arange(num_classes).repeat_interleave(8 if split == "train" else 4)
    rng.manual_seed(1 if split == "train" else 2)
    noise = torch.rand(len(labels), *shape, generator=rng)
    names = tuple(f"class{c:03d}" for c in range(num_classes))
    return Images(0.7 * colours[labels] + 0.3 * noise, labels, names)


def _digits(split: Split, seed: int) -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=540, random_state=seed, stratify=labels
    )
    names = tuple(map(str, range(10)))
    return Images(pixels, labels, names).part(torch.tensor(train if split == "train" else test))


def _torchvision(data: str, root: Path, split: Split, download: bool) -> Images:
    from torchvision import datasets

    try:
        if data == "svhn":
            found: Any = datasets.SVHN(str(root), split=split, download=download)
            pixels, labels = torch.from_numpy(found.data), found.labels
            names = tuple(map(str, range(10)))
        else:
            kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[data]
            found = kind(str(root), train=split == "train", download=download)
            pixels = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
            labels, names = found.targets, tuple(found.classes)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"expected {data} under {str(root)!r}, got none or another version of it; --download fetches it"
        ) from error
    return Images(pixels, torch.as_tensor(labels, dtype=torch.int64), names)


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
        parameters = inspect.signature(vars(base).get("__init__", object.__init__)).parameters
        known |= parameters.keys()
        # EMNIST and others hand on what they do not name themselves.
        if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            break
    resize = [] if image_size is None else [transforms.Resize(image_size)]
    options: dict[str, Any] = {
        "root": str(root),
        "train": False,
        "split": split,
        "download": download,
        "transform": transforms.Compose([*resize, transforms.ToTensor()]),
    }
    try:
        data: Any = kind(**{name: value for name, value in options.items() if name in known})
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
    # ImageNet has a tuple of synonyms for each class.
    classes = [c if isinstance(c, str) else c[0] for c in getattr(data, "classes", None) or ()]
    names = tuple(classes or map(str, range(num_classes or 0)))
    if len(names) < 2:
        raise ValueError(
            f"expected --num-classes, because {name} does not say it, got {num_classes}"
        )
    return Streamed(data, names)


def _tiny_imagenet(root: Path, split: Split, download: bool) -> Images:
    base = root / "tiny-imagenet-200"
    if download and not base.is_dir():
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(TINY_IMAGENET, str(root), md5=TINY_IMAGENET_MD5)
    if not base.is_dir():
        raise FileNotFoundError(f"expected {str(base)!r}, got nothing there; --download fetches it")
    annotations = base / "val" / "val_annotations.txt"
    if split == "train":
        return _folder(base / "train")
    # Many scripts sort the validation images into class folders.
    if not annotations.is_file():
        return _folder(base / "val")
    names = tuple(sorted(f.name for f in (base / "train").iterdir() if f.is_dir()))
    rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines()]
    return _decoded(
        [(str(base / "val" / "images" / file), names.index(name)) for file, name in rows], names
    )


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
    """Decode all images into one uint8 tensor."""
    from torchvision.datasets.folder import pil_loader
    from torchvision.transforms.functional import pil_to_tensor

    pixels = torch.empty(0)
    for k, (file, _) in enumerate(files):
        try:
            image = pil_to_tensor(pil_loader(file))
        except OSError as error:
            raise ValueError(f"expected {file!r} to be a readable image, got {error}") from error
        if k == 0:
            pixels = torch.empty(len(files), *image.shape, dtype=torch.uint8)
        if image.shape != pixels.shape[1:]:
            raise ValueError(
                f"expected all images of the size of the first, {tuple(pixels.shape[2:])}, got "
                f"{tuple(image.shape[1:])} in {file!r}"
            )
        pixels[k] = image
    return Images(pixels, torch.tensor([label for _, label in files]), names)
