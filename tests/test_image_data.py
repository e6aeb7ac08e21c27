"""The examples' reader of image data: folders, Tiny-ImageNet's own layout, torchvision's sets, digits."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.utils import save_image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def image_data(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    yield __import__("image_data")
    sys.modules.pop("image_data")


def grey(level: int, height: int = 4, width: int = 6) -> torch.Tensor:
    return torch.full((3, height, width), level / 255)


def write(path: Path, image: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(image, path)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        for c, name in enumerate(("ant", "bee")):
            for k in range(3):
                write(tmp_path / split / name / f"{k}.png", grey(100 * c + 10 * k))
    return tmp_path


def test_a_folder_is_read_in_the_order_of_its_class_names(image_data, folder):
    images = image_data.load("folder", folder, "train")
    assert images.class_names == ("ant", "bee")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.pixels.shape == (6, 3, 4, 6)
    assert images.pixels.dtype == torch.uint8
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 10, 20, 100, 110, 120]
    x, y = images.batch(torch.tensor([4, 1]))
    torch.testing.assert_close(x[:, 0, 0, 0], torch.tensor([110 / 255, 10 / 255]))
    assert y.tolist() == [1, 0]


def test_val_serves_where_there_is_no_test_folder(image_data, folder):
    (folder / "test").rename(folder / "val")
    assert len(image_data.load("folder", folder, "test")) == 6


def test_folders_that_cannot_be_used(image_data, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="got nothing there"):
        image_data.load("folder", tmp_path / "nowhere", "train")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="at least 2 classes, got 0"):
        image_data.load("folder", tmp_path / "bare", "train")
    (folder / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="images in every class"):
        image_data.load("folder", folder, "train")
    (folder / "train" / "empty").rmdir()
    write(folder / "train" / "bee" / "9.png", grey(0, 5, 6))
    with pytest.raises(ValueError, match=r"\(4, 6\), got \(5, 6\) in .*9\.png"):
        image_data.load("folder", folder, "train")
    (folder / "train" / "bee" / "9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"9\.png' to be a readable image"):
        image_data.load("folder", folder, "train")


@pytest.mark.parametrize("sorted_by_script", [False, True])
def test_tiny_imagenet_in_its_own_layout_and_sorted(image_data, tmp_path, sorted_by_script):
    base = tmp_path / "tiny-imagenet-200"
    for c, name in enumerate(("n01", "n02")):
        write(base / "train" / name / "images" / f"{name}_0.png", grey(10 * c, 64, 64))
    if sorted_by_script:
        write(base / "val" / "n01" / "val_1.png", grey(1, 64, 64))
        write(base / "val" / "n02" / "val_0.png", grey(0, 64, 64))
        levels = [1, 0]
    else:
        for k in range(2):
            write(base / "val" / "images" / f"val_{k}.png", grey(k, 64, 64))
        rows = ["val_0.png\tn02\t0\t0\t62\t62", "val_1.png\tn01\t0\t0\t62\t62"]
        (base / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
        levels = [0, 1]
    train = image_data.load("tiny-imagenet", tmp_path, "train")
    assert train.class_names == ("n01", "n02")
    assert train.labels.tolist() == [0, 1]
    val = image_data.load("tiny-imagenet", tmp_path, "test")
    assert val.class_names == train.class_names
    assert val.pixels[:, 0, 0, 0].tolist() == levels
    assert val.labels.tolist() == ([0, 1] if sorted_by_script else [1, 0])
    with pytest.raises(FileNotFoundError, match="--download"):
        image_data.load("tiny-imagenet", tmp_path / "nowhere", "train")


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "svhn"])
def test_torchvision_sets_are_asked_for_and_laid_out_alike(image_data, monkeypatch, source):
    # The files are checked by their hashes, so the sets' own attributes stand in for them.
    pixels = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
    asked = []

    def cifar(root, train, download):
        asked.append((root, train, download))
        return SimpleNamespace(data=pixels, targets=[3, 1], classes=list("abcd"))

    def svhn(root, split, download):
        asked.append((root, split == "train", download))
        return SimpleNamespace(data=pixels.transpose(0, 3, 1, 2), labels=np.array([3, 1]))

    for name, fake in (("CIFAR10", cifar), ("CIFAR100", cifar), ("SVHN", svhn)):
        monkeypatch.setattr(datasets, name, fake)
    images = image_data.load(source, Path("x"), "test", download=True)
    assert asked == [("x", False, True)]
    assert images.labels.tolist() == [3, 1]
    assert images.pixels.shape == (2, 3, 32, 32)
    assert images.pixels[1, 2, 5, 7] == pixels[1, 5, 7, 2]
    assert len(images.class_names) == (10 if source == "svhn" else 4)


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "svhn"])
def test_absent_sets_name_the_flag_that_fetches_them(image_data, tmp_path, source):
    with pytest.raises(FileNotFoundError, match=f"expected {source} under .*--download"):
        image_data.load(source, tmp_path, "test")


def test_digits_are_1257_and_540(image_data):
    train, test = (image_data.load("digits", Path(), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1257, 540)
    assert test.pixels.shape[1:] == (1, 8, 8)
    assert 0 <= float(test.pixels.min()) < float(test.pixels.max()) <= 1
    assert torch.bincount(test.labels).min() >= 52


def test_stratified_has_equal_shares_and_follows_the_seed(image_data):
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 5)
    images = image_data.Images(torch.zeros(75, 1, 4, 4), labels, ("a", "b", "c"))
    index = image_data.stratified(images, 12, seed=0)
    assert torch.bincount(labels[index]).tolist() == [4, 4, 4]
    assert len(set(index.tolist())) == 12
    assert torch.equal(index, image_data.stratified(images, 12, seed=0))
    assert not torch.equal(index, image_data.stratified(images, 12, seed=1))
    for count in (0, -1, 76):
        with pytest.raises(ValueError, match=f"1..75 images, got {count}"):
            image_data.stratified(images, count, seed=0)
    # Where a class runs out the others fill up.
    assert torch.bincount(labels[image_data.stratified(images, 25, seed=0)]).tolist() == [10, 10, 5]
