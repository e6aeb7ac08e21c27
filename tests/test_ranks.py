"""Several processes give what one gives: draws, BatchNorm statistics, reports."""

import pytest
import torch
from ranks import on_ranks
from torch import nn

from ferdlib import losses
from ferdlib._ranks import Shard
from ferdlib.attacks import pgd
from ferdlib.augment import crop_flip
from ferdlib.bottleneck import noise_scale
from ferdlib.distributed import sum_over_ranks
from ferdlib.evaluation import PROTOCOLS, evaluate, gather, share
from ferdlib.models import small_cnn

SIZE = 3


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def linear(x):
    weights = torch.randn(x[0].numel(), 4, generator=seeded(), dtype=x.dtype)
    return x.flatten(1) @ weights


def with_noise(name, x, y, rng):
    if name == "crop_flip":
        return crop_flip(x, padding=1, rng=rng)
    if name == "bottleneck":
        return noise_scale(x, linear, y, steps=3, rng=rng)
    eps = 0.05 + 0.01 * y if name == "radii" else 0.1
    start = "normal" if name == "normal" else "uniform"
    return pgd(linear, x, y, steps=2, eps=eps, random_start=start, rng=rng)


@pytest.mark.parametrize("name", ["uniform", "normal", "radii", "crop_flip", "bottleneck"])
def test_shards_draw_what_one_process_draws(name):
    x = torch.rand(6, 2, 4, 4, generator=seeded(), dtype=torch.float64)
    y = torch.arange(6) % 4
    whole, parts = with_noise(name, x, y, seeded()), []
    for rank in range(SIZE):
        part = slice(2 * rank, 2 * rank + 2)
        parts.append(with_noise(name, x[part], y[part], Shard(seeded(), rank, SIZE)))
    tolerance = 1e-6 if name == "bottleneck" else 1e-12  # Adam's epsilon knows the size of a batch
    assert torch.allclose(torch.cat(parts), whole, rtol=0, atol=tolerance)
    assert not torch.allclose(parts[0], parts[1])


def model() -> nn.Module:
    torch.manual_seed(0)
    net = small_cnn(1, 4, width=4).double().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(generator=seeded())
    return net


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=seeded(), dtype=torch.float64)


def statistics(rank, size):
    """Loss and gradient of a factor of the images, averaged over ranks as DistributedDataParallel does."""
    x = images(12)[rank * (12 // size) : (rank + 1) * (12 // size)]
    factor = torch.full((1, 1, 8, 8), 0.7, dtype=torch.float64, requires_grad=True)
    with losses.BatchNormStatistics(
        net := model(), reduce=sum_over_ranks if size > 1 else None
    ) as found:
        net(x * factor)
    (gradient,) = torch.autograd.grad(found.loss(), factor)
    if size > 1:
        torch.distributed.all_reduce(gradient)
    return {"loss": found.loss().detach(), "gradient": gradient / size}


@pytest.mark.parametrize("size", [2, 3])
def test_batchnorm_statistics_of_the_global_batch(size):
    expected = statistics(0, 1)
    for found in on_ranks(size, statistics):
        assert torch.allclose(found["loss"], expected["loss"], rtol=1e-10)
        assert torch.allclose(found["gradient"], expected["gradient"], rtol=1e-8, atol=1e-12)


def test_shares_of_different_sizes():
    """Two images here and five there are weighted by their number."""
    expected = statistics(0, 1)["loss"]
    for found in on_ranks(2, uneven):
        assert torch.allclose(found, expected, rtol=1e-10)


def uneven(rank, size):
    x = images(12)[:3] if rank == 0 else images(12)[3:]
    with losses.BatchNormStatistics(net := model(), reduce=sum_over_ranks) as found:
        net(x * 0.7)
    return found.loss().detach()


def report(rank, size):
    data = torch.utils.data.TensorDataset(images(25).float(), torch.arange(25) % 4)
    protocol = PROTOCOLS["fair-ard"].at(eps=0.05).without("AutoAttack")
    found = gather(evaluate(model().float(), share(data), protocol, num_classes=4, batch_size=5))
    return found.to_dict() | {"timing": {}}


def test_reports_are_exact():
    expected = report(0, 1)
    for found in on_ranks(3, report):
        assert found == expected


def test_one_process_needs_no_group():
    data = torch.utils.data.TensorDataset(images(4))
    assert share(data) is data
