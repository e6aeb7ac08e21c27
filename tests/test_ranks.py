"""Sums, shares and reports of several processes are those of one."""

import pytest
import torch
from ranks import on_ranks
from torch import nn

from ferdlib import losses
from ferdlib.distributed import Ranks, gather, share, sum_over_ranks
from ferdlib.evaluation import PROTOCOLS, evaluate, merge
from ferdlib.models import small_cnn


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


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


def uneven(rank, size):
    """Loss of two shares of different size, which are weighted by their number of images."""
    x = images(12)[:3] if rank == 0 else images(12)[3:]
    with losses.BatchNormStatistics(net := model(), reduce=sum_over_ranks) as found:
        net(x * 0.7)
    return found.loss().detach()


def report(rank, size):
    data = torch.utils.data.TensorDataset(images(25).float(), torch.arange(25) % 4)
    protocol = PROTOCOLS["fair-ard"].at(eps=0.05).without("AutoAttack")
    own = evaluate(model().float(), share(data), protocol, num_classes=4, batch_size=5)
    return merge(gather(own)).to_dict() | {"timing": {}}


def everything(rank, size):
    ranks = Ranks.here()
    rows = torch.arange(4) + 10 * rank
    flags = torch.tensor([True, rank == 0])
    found = {
        "ranks": [ranks.rank, ranks.size, ranks.first],
        "gathered": ranks.gathered(rows),
        "part": ranks.part(ranks.gathered(rows)),
        "total": ranks.total(rows),
        "flags": ranks.everywhere(flags),
        "any": [ranks.anywhere(rank == 1), ranks.anywhere(False)],
        "statistics": statistics(rank, size),
        "uneven": uneven(rank, size) if size == 2 else None,
    }
    return found | {"report": report(rank, size)}


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_agree_with_one(size):
    alone = statistics(0, 1)
    expected = report(0, 1)
    rows = torch.stack([torch.arange(4) + 10 * rank for rank in range(size)], dim=1)
    for rank, found in enumerate(on_ranks(size, everything)):
        assert found["ranks"] == [rank, size, rank == 0]
        assert torch.equal(found["gathered"], rows.flatten())
        assert torch.equal(found["part"], rows[:, rank])
        assert torch.equal(found["total"], rows.sum(dim=1))
        assert found["flags"].tolist() == [True, False]
        assert found["any"] == [True, False]
        assert torch.allclose(found["statistics"]["loss"], alone["loss"], rtol=1e-10)
        gradient = found["statistics"]["gradient"]
        assert torch.allclose(gradient, alone["gradient"], rtol=1e-8, atol=1e-12)
        if size == 2:
            assert torch.allclose(found["uneven"], alone["loss"], rtol=1e-10)
        assert found["report"] == expected


def test_one_process_needs_no_group():
    data = torch.utils.data.TensorDataset(images(4))
    assert share(data) is data
    assert gather(data) == [data]
    one = Ranks.here()
    assert (one.rank, one.size, one.first) == (0, 1, True)
    rows = torch.arange(3.0, requires_grad=True)
    assert torch.equal(one.part(rows), rows)
    assert sum_over_ranks(rows) is rows
    assert not one.total(rows).requires_grad
