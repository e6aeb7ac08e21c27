"""Sums, shares and reports of several processes are those of one."""

import time

import pytest
import torch
from ranks import on_ranks
from torch import nn

from ferdlib import _meeting, losses
from ferdlib.distributed import (
    Ranks,
    check_same,
    first_ahead,
    gather,
    share,
    sum_over_ranks,
)
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


def sentence(call, *arguments, **more):
    """The words with which a call is refused."""
    try:
        call(*arguments, **more)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "it went on"


def gathered_late(rank, size):
    """The second process comes to the meeting after the group's timeout, however that is set."""
    share(torch.utils.data.TensorDataset(images(4)))
    time.sleep(4 * rank)
    return gather(rank)


def test_a_slow_share_does_not_end_the_job():
    assert on_ranks(2, gathered_late, timeout=1) == [[0, 1]] * 2


def disagreements(rank, size):
    few = torch.utils.data.TensorDataset(images(1))
    found = [sentence(share, few), sentence(check_same, seed=0, config={"eps": rank}, teacher="a")]
    fetched = [sentence(fetch, rank, fails) for fails in (True, False)]
    return [*found, *fetched, sentence(check_same, seed=0)]


def fetch(rank, fails):
    with first_ahead():
        if rank == 0 and fails:
            raise RuntimeError("no network")


def test_all_processes_say_what_one_has_found():
    for rank, found in enumerate(on_ranks(2, disagreements)):
        assert found == [
            "share: expected `data` with a sample for each of the 2 processes, got 1",
            "check_same: expected the same config on every process, got others on rank 1 than on rank 0",
            ["no network", "rank 0: no network"][rank],
            "it went on",
            "it went on",
        ]


def one_ends(rank, size, gives_a_reason, call):
    if rank == 1:
        return _meeting.reason_to_end("the disk is full") if gives_a_reason else None
    if not gives_a_reason:
        _meeting.TIMEOUT, _meeting.BEAT = 1.0, 0.1
    return sentence(gather, 0) if call == "gather" else _meeting.reason_to_end(sentence(summed))


def summed():
    torch.distributed.all_reduce(torch.ones(1))


def test_whoever_waits_for_a_process_that_ends_hears_why():
    for call in ("gather", "a sum"):
        heard = on_ranks(2, one_ends, True, call)
        assert heard == ["rank 1: the disk is full", "the disk is full"]
    heard = on_ranks(2, one_ends, False, "gather")
    assert heard == ["rank 1: no sign of life for 0 minutes", None]


def test_one_process_needs_no_group():
    data = torch.utils.data.TensorDataset(images(4))
    assert share(data) is data
    assert gather(data) == [data]
    check_same(seed=0)
    assert _meeting.reason_to_end("a") == "a"
    one = Ranks.here()
    assert (one.rank, one.size, one.first) == (0, 1, True)
    rows = torch.arange(3.0, requires_grad=True)
    assert torch.equal(one.part(rows), rows)
    assert sum_over_ranks(rows) is rows
    assert not one.total(rows).requires_grad
