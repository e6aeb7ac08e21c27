"""Crop and flip against slicing."""

import pytest
import torch
import torch.nn.functional as F

from ferdlib.augment import Crops, crop_flip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def crops(image, padding, flip):
    """Every image that crop and flip can make of one `(C, H, W)`, keyed by (row, column, mirror)."""
    _, height, width = image.shape
    padded = F.pad(image, [padding] * 4)
    made = {}
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            crop = padded[:, row : row + height, column : column + width]
            made[row, column, False] = crop
            if flip:
                made[row, column, True] = crop.flip(2)
    return made


def parameters(x, out, padding, flip=True):
    """Which crop each row is; an empty place means that it is none of its own image."""
    found = []
    for image, row in zip(x, out, strict=True):
        candidates = crops(image, padding, flip).items()
        found.append([key for key, crop in candidates if torch.equal(crop, row)])
    assert all(len(keys) == 1 for keys in found)
    return [keys[0] for keys in found]


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("flip", [True, False])
def test_each_row_is_one_crop_of_its_own_image(padding, flip):
    x = torch.rand(40, 3, 6, 5, generator=seeded())
    out = crop_flip(x, padding=padding, flip=flip, rng=seeded(1))
    assert out.shape == x.shape
    keys = parameters(x, out, padding, flip)
    assert len(set(keys)) > 1 or (padding == 0 and not flip)
    if not flip:
        assert not any(mirror for _, _, mirror in keys)


def test_the_default_is_padding_4_with_flip():
    x = torch.rand(60, 1, 9, 8, generator=seeded())
    keys = parameters(x, crop_flip(x, rng=seeded(1)), 4)
    assert {0, 8} <= {row for row, _, _ in keys}
    assert {mirror for _, _, mirror in keys} == {True, False}


def test_offsets_and_flips_are_uniform_and_independent():
    x = torch.rand(1, 1, 5, 4, generator=seeded()).expand(3600, -1, -1, -1)
    keys = parameters(x, crop_flip(x, padding=1, rng=seeded(1)), 1)
    counts = [keys.count(key) for key in crops(x[0], 1, True)]
    assert len(counts) == 18
    # 200 expected of each, with a standard deviation of 14.
    assert min(counts) > 140
    assert max(counts) < 260


def test_no_padding_and_no_flip_is_the_identity():
    x = torch.rand(4, 2, 3, 5)
    assert torch.equal(crop_flip(x, padding=0, flip=False), x)


def test_images_lie_in_memory_as_they_came():
    x = torch.rand(4, 3, 6, 5)
    assert crop_flip(x).is_contiguous()
    assert crop_flip(x.mT).is_contiguous()
    strided = x.to(memory_format=torch.channels_last)
    assert crop_flip(strided, rng=seeded()).stride() == strided.stride()
    assert torch.equal(crop_flip(strided, rng=seeded()), crop_flip(x, rng=seeded()))


def test_gradient_counts_the_visible_pixels():
    x = (torch.rand(30, 2, 4, 5, generator=seeded()) + 1).requires_grad_()
    out = crop_flip(x, padding=2, rng=seeded(1))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert set(gradient.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(gradient.sum(dim=(1, 2, 3)), (out != 0).sum(dim=(1, 2, 3)).float())
    assert not torch.equal(gradient, torch.ones_like(gradient))


def test_randomness_comes_from_rng_alone():
    x, before = torch.rand(20, 1, 8, 8), torch.get_rng_state()
    first, again = crop_flip(x, rng=seeded(3)), crop_flip(x, rng=seeded(3))
    assert torch.equal(first, again)
    assert not torch.equal(first, crop_flip(x, rng=seeded(4)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    default = crop_flip(x)
    assert not torch.equal(default, crop_flip(x))  # the default generator advances
    torch.manual_seed(5)
    assert torch.equal(crop_flip(x), default)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_crop_flip_keeps_dtype_and_leaves_its_input(dtype):
    x = torch.rand(2, 3, 5, 7).to(dtype)
    before = x.clone()
    out = crop_flip(x, padding=9)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    assert torch.equal(x, before)


def test_crops_of_a_batch_are_applied_in_parts():
    x = torch.rand(6, 2, 5, 4, generator=seeded())
    crops = Crops.draw(6, padding=2, rng=seeded(1))
    assert torch.equal(crops(x), crop_flip(x, padding=2, rng=seeded(1)))
    for rows in (slice(1, None, 3), torch.tensor([4, 0])):
        assert torch.equal(crops[rows](x[rows]), crops(x)[rows])
