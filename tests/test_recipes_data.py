"""Image data of the recipes: folders, Tiny-ImageNet's own layout, torchvision's sets, digits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.utils import save_image

from ferdlib.recipes import data
from ferdlib.recipes.options import ImageOptions


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


def test_a_folder_is_read_in_the_order_of_its_class_names(folder):
    images = data.load("folder", folder, "train")
    assert images.class_names == ("ant", "bee")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.pixels.shape == (6, 3, 4, 6)
    assert images.pixels.dtype == torch.uint8
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 10, 20, 100, 110, 120]
    x, y = images.batch(torch.tensor([4, 1]))
    torch.testing.assert_close(x[:, 0, 0, 0], torch.tensor([110 / 255, 10 / 255]))
    assert y.tolist() == [1, 0]


def test_val_serves_where_there_is_no_test_folder(folder):
    (folder / "test").rename(folder / "val")
    assert len(data.load("folder", folder, "test")) == 6


def test_folders_that_cannot_be_used(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="got nothing there"):
        data.load("folder", tmp_path / "nowhere", "train")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="at least 2 classes, got 0"):
        data.load("folder", tmp_path / "bare", "train")
    (folder / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="images in every class"):
        data.load("folder", folder, "train")
    (folder / "train" / "empty").rmdir()
    write(folder / "train" / "bee" / "9.png", grey(0, 5, 6))
    with pytest.raises(ValueError, match=r"\(4, 6\), got \(5, 6\) in .*9\.png"):
        data.load("folder", folder, "train")
    (folder / "train" / "bee" / "9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"9\.png' to be a readable image"):
        data.load("folder", folder, "train")


@pytest.mark.parametrize("sorted_by_script", [False, True])
def test_tiny_imagenet_in_its_own_layout_and_sorted(tmp_path, sorted_by_script):
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
    train = data.load("tiny-imagenet", tmp_path, "train")
    assert train.class_names == ("n01", "n02")
    assert train.labels.tolist() == [0, 1]
    val = data.load("tiny-imagenet", tmp_path, "test")
    assert val.class_names == train.class_names
    assert val.pixels[:, 0, 0, 0].tolist() == levels
    assert val.labels.tolist() == ([0, 1] if sorted_by_script else [1, 0])
    with pytest.raises(FileNotFoundError, match="--download"):
        data.load("tiny-imagenet", tmp_path / "nowhere", "train")


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "svhn"])
def test_torchvision_sets_are_asked_for_and_laid_out_alike(monkeypatch, source):
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
    images = data.load(source, Path("x"), "test", download=True)
    assert asked == [("x", False, True)]
    assert images.labels.tolist() == [3, 1]
    assert images.pixels.shape == (2, 3, 32, 32)
    assert images.pixels[1, 2, 5, 7] == pixels[1, 5, 7, 2]
    assert len(images.class_names) == (10 if source == "svhn" else 4)


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "svhn"])
def test_absent_sets_name_the_flag_that_fetches_them(tmp_path, source):
    with pytest.raises(FileNotFoundError, match=f"expected {source} under .*--download"):
        data.load(source, tmp_path, "test")


def test_digits_are_1000_and_257_and_540_by_seed():
    parts = {}
    for seed in (0, 1):
        images, test = data.load_train_test(ImageOptions(data="digits"), seed)
        train, val = data.hold_out(images, 257, seed)
        parts[seed] = [train, val, test]
        assert [len(part) for part in parts[seed]] == [1000, 257, 540]
        assert min(torch.bincount(part.labels).min() for part in parts[seed]) >= 24
        everything = torch.cat([part.pixels for part in parts[seed]])
        assert 0 <= float(everything.min()) < float(everything.max()) <= 1
    assert not torch.equal(parts[0][2].pixels, parts[1][2].pixels)
    rows = [
        sorted(map(tuple, torch.cat([p.pixels for p in parts[s]]).flatten(1).tolist()))
        for s in parts
    ]
    assert rows[0] == rows[1]  # no image is lost, none comes twice


def test_generated_images_have_a_colour_for_each_class():
    train, test = (data.load("generated", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (80, 40)
    means = [
        torch.stack([p.pixels[p.labels == c].mean((0, 2, 3)) for c in range(10)])
        for p in (train, test)
    ]
    assert torch.cdist(*means).argmin(dim=1).tolist() == list(range(10))


def test_images_that_cannot_be_held_out():
    images = data.load("generated", split="train")
    for count in (0, 9, 71):
        with pytest.raises(
            ValueError, match=f"expected --val-images in 10..70, .* got {count} of 80"
        ):
            data.hold_out(images, count, seed=0)


def test_stratified_has_equal_shares_and_follows_the_seed():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 5)
    images = data.Images(torch.zeros(75, 1, 4, 4), labels, ("a", "b", "c"))
    index = data.stratified(images, 12, seed=0)
    assert torch.bincount(labels[index]).tolist() == [4, 4, 4]
    assert len(set(index.tolist())) == 12
    assert torch.equal(index, data.stratified(images, 12, seed=0))
    assert not torch.equal(index, data.stratified(images, 12, seed=1))
    for count in (0, -1, 76):
        with pytest.raises(ValueError, match=f"expected --test-images in 1..75, got {count}"):
            data.stratified(images, count, seed=0)
    # Where a class runs out the others fill up.
    assert torch.bincount(labels[data.stratified(images, 25, seed=0)]).tolist() == [10, 10, 5]
