"""Training over several gloo processes: the numbers of one process, wherever the noise is the global batch's."""

import copy
import functools
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from tiny_ferd import SIZES, make_double_models
from torch import nn

from ferdlib.distributed import Ranks
from ferdlib.methods import build_method
from ferdlib.trainer import FERDConfig, FERDTrainer

ROOT = Path(__file__).parents[1]
TINY = SIZES | {
    "epochs": 3,
    "warmup_epochs": 0,
    "generator_steps": 4,
    "generator_lr": 0.01,
    "bottleneck_steps": 3,
    "student_steps": 2,
}
# The bottleneck draws its noise on each process, so it is left out where numbers shall be equal.
EXACT = {"uniformity_loss_weight": 0.0}


class StillNorm(nn.BatchNorm2d):
    """BatchNorm in eval mode for good: only SyncBatchNorm, on CUDA, knows the statistics of a whole batch."""

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        self.training = False
        return super().forward(x)


def still(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                layer = StillNorm(child.num_features).double()
                layer.load_state_dict(child.state_dict())
                setattr(module, name, layer)
    return model


def make_trainer(preset="paper", method=None, source=None, seed=20, **changes):
    config = getattr(FERDConfig, preset)(**(TINY | changes))
    teacher, student, generator = make_double_models(config.conditional_generator)
    generator.image_dtype = torch.float64
    if method is not None:
        method = build_method(method, 3, teacher=teacher, steps=2, eps=0.1, step_size=0.05)
    parts = {"method": method, "source": source, "seed": seed}
    return FERDTrainer(teacher, still(student), still(generator), config=config, **parts)


def trained(rank, size, preset, epochs, changes):
    trainer = make_trainer(preset, **changes)
    found = {"losses": [], "p": [], "generator": [], "agreement": []}
    for stats in trainer.epochs():
        found["losses"].append(stats.student_loss)
        found["p"].append(list(stats.class_probabilities))
        found["generator"].append(stats.synthesis["total"])
        found["agreement"].append(stats.label_agreement)
        assert stats.pool_size == 12 * stats.epoch
        if stats.epoch == epochs:
            break
    found["gradients"] = [p.grad.clone() for p in trainer.student.parameters()]
    found["weights"] = list(trainer.student.state_dict().values())
    return found | {"pool": trainer.state_dict()["pool"]["columns"]["images"]}


@pytest.mark.parametrize(
    ("preset", "changes", "size"),
    [
        ("paper", {}, 3),
        ("paper", {"reweighting": "lps_power"}, 2),
        ("released", {"random_start": None, "gamma": 0.5}, 2),
    ],
    ids=["paper", "lps", "released"],
)
def test_an_epoch_of_several_processes_is_that_of_one(preset, changes, size):
    """One epoch, in which every process trains on all that it has stored: the global batch is the same.

    Not so the crops of the student's images, which are in another order in the batch.
    """
    changes = EXACT | changes
    expected = trained(0, 1, preset, 1, changes)
    # The codes are float32, and sums over three parts of them are rounded otherwise.
    tolerance = 1e-10 if size == 2 else 1e-8
    whole = ["losses", "gradients", "weights"] if preset == "paper" else []
    for found in on_ranks(size, trained, preset, 1, changes):
        assert torch.allclose(found["pool"], expected["pool"], rtol=0, atol=1e-7)
        assert torch.allclose(
            torch.tensor(found["p"]), torch.tensor(expected["p"]), rtol=0, atol=1e-7
        )
        for key in ("generator", "agreement", *whole[:1]):
            assert found[key] == pytest.approx(expected[key], rel=tolerance, abs=tolerance)
        for key in whole[1:]:
            for a, b in zip(found[key], expected[key], strict=True):
                assert float((a - b).abs().max()) < tolerance


def test_noise_of_each_process_gives_about_the_same():
    """Bottleneck and attack draw on each process; the weights stay the same on all."""
    changes = {"generator_steps": 10, "uniformity_loss_weight": 1.0, "student_steps": 10}
    expected = trained(0, 1, "released", 1, changes)
    first, second = on_ranks(2, trained, "released", 1, changes)
    for a, b in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(a, b)
    for key in ("losses", "generator"):
        assert first[key] == second[key]
        assert first[key] != expected[key]
        assert first[key] == pytest.approx(expected[key], rel=0.3)


def streams(rank, size):
    """Two draws of each generator in two epochs."""
    shared, own, found = torch.Generator().manual_seed(3), torch.Generator(), []
    for _ in range(2):
        Ranks(rank, size).reseed(own, shared)
        found += [torch.rand((), generator=shared), torch.rand((), generator=own)]
    return torch.stack(found)


def test_a_process_has_a_stream_of_its_own_and_one_in_common():
    alone = torch.Generator().manual_seed(3)
    expected = torch.stack([torch.rand((), generator=alone) for _ in range(2)])
    first, second = streams(0, 2), streams(1, 2)
    for found in (first, second):
        assert torch.equal(found[::2], expected)  # as a single process draws them
    assert len({*first[1::2].tolist(), *second[1::2].tolist()}) == 4
    assert torch.equal(first, streams(0, 2))


class Years:
    """A source whose images show their epoch, one batch of 12 over all processes; its generator is given."""

    def __init__(self):
        self.metrics, self.rng, self.year = {}, None, 0

    def epoch(self, student, class_probabilities):
        self.year += 1
        assert type(self.rng) is torch.Generator
        y = torch.randint(3, (12 // Ranks.here().size,), generator=self.rng)
        yield torch.full((len(y), 1, 8, 8), self.year / 10), y

    def state_dict(self):
        return {"year": self.year}

    def load_state_dict(self, state):
        self.year = state["year"]


def years(rank, size, epochs, state):
    settings = {"epochs": 6, "student_steps": 0, "reweighting": "none", "pool_capacity": 36}
    trainer = make_trainer(source=Years(), **settings)
    if state is not None:
        trainer.load_state_dict(state)
    for stats in trainer.epochs():
        if stats.epoch == epochs:
            break
    return trainer.state_dict()


def test_the_oldest_images_give_way_whatever_the_number_of_processes():
    """Room for three epochs: the fourth takes the place of the first, the fifth of the second, and so on."""
    state = years(0, 1, 4, None)
    for size, newest in ((4, 5), (1, 6)):
        state = (
            years(0, 1, newest, state)
            if size == 1
            else on_ranks(size, years, newest, {**state, "rng": state["rng"]})[0]
        )
        expected = [year for year in (newest - 2, newest - 1, newest) for _ in range(12)]
        shown = state["pool"]["columns"]["images"][:, 0, 0, 0] * 10
        assert sorted(shown.round().int().tolist()) == expected


class Uneven(Years):
    """Of as many images as the rank says, or the same ones everywhere."""

    def __init__(self, count=None):
        super().__init__()
        self.count = count

    def epoch(self, student, class_probabilities):
        for x, y in super().epoch(student, class_probabilities):
            count = len(y) if self.count is None else self.count
            yield x[:count], y[:count]


def sources_of_ones_own(rank, size):
    settings = {"epochs": 1, "student_steps": 0, "reweighting": "none"}
    with pytest.raises(ValueError, match=r"equally many images on every process, got \[1, 2\] of"):
        make_trainer(source=Uneven(rank + 1), **settings).fit()
    with pytest.raises(ValueError, match="the same `seed` on every process, got others on rank 1"):
        make_trainer(source=Uneven(), seed=rank, **settings)
    said = []
    logging.getLogger("ferdlib").addHandler(handler := logging.Handler(logging.WARNING))
    handler.emit = lambda record: said.append(record.getMessage())
    trainer = make_trainer(source=Uneven(), **settings)
    trainer.source.rng = torch.Generator().manual_seed(rank)
    trainer.fit()
    state = trainer.state_dict()
    trainer.load_state_dict(state)
    return {"said": said, "rng": trainer.source.rng.get_state(), "saved": state["rng"]["source"]}


def test_sources_of_ones_own_are_kept_in_step_and_apart():
    first, second = on_ranks(2, sources_of_ones_own)
    for found in (first, second):
        assert sum("the same images on several processes" in words for words in found["said"]) == 1
    assert torch.equal(first["rng"], first["saved"])
    assert not torch.equal(second["rng"], first["rng"])


def state_of(rank, size, epochs, total):
    trainer = make_trainer(epochs=total)
    for stats in trainer.epochs():
        if stats.epoch == epochs:
            break
    return trainer.state_dict()


def resumed(rank, size, state, total):
    trainer = make_trainer(epochs=total)
    trainer.load_state_dict(state)
    losses = [stats.student_loss for stats in trainer.epochs()]
    weights = list(trainer.student.state_dict().values())
    return {"losses": losses, "pool": len(trainer.pool), "weights": weights}


def test_four_processes_go_on_as_two_and_as_one():
    states = on_ranks(4, state_of, 2, 6)
    assert states[0]["pool"]["columns"]["images"].shape[0] == 2 * 12
    for state in states[1:]:
        assert torch.equal(state["rng"]["trainer"], states[0]["rng"]["trainer"])
        for a, b in zip(state["student"].values(), states[0]["student"].values(), strict=True):
            assert torch.equal(a, b)
    found = on_ranks(2, resumed, states[0], 6)
    assert found[0]["losses"] == found[1]["losses"]
    assert [f["pool"] for f in found] == [6 * 12 // 2] * 2
    alone = resumed(0, 1, states[0], 6)
    assert len(alone["losses"]) == len(found[0]["losses"]) == 4
    assert alone["pool"] == 6 * 12


def test_resuming_with_as_many_processes_equals_not_stopping():
    whole = on_ranks(2, trained, "paper", 3, {})
    found = on_ranks(2, resumed, on_ranks(2, state_of, 1, 3)[0], 3)
    for a, b in zip(whole[0]["weights"], found[0]["weights"], strict=True):
        assert torch.equal(a, b)


def test_fair_weights_are_those_of_all_processes():
    found = on_ranks(2, fair_weights)
    assert torch.equal(found[0], found[1])
    assert float(found[0].std()) > 0.01


def fair_weights(rank, size):
    trainer = make_trainer(method="fair-rslad")
    trainer.fit()
    return trainer.method.rule.class_weights.weights


def ended_by_a_nan(rank, size):
    """Return what ends a run when the second of its processes finds a NaN in its first loss."""
    trainer = make_trainer()
    plain = trainer.method.loss
    if rank == 1:
        trainer.method.loss = lambda *batch: plain(*batch) * float("nan")
    try:
        trainer.fit()
    except RuntimeError as error:
        return str(error)
    return "it went on"


def test_a_nan_of_one_process_ends_all_of_them_in_the_same_step():
    for found in on_ranks(2, ended_by_a_nan):
        assert "got NaN or infinity in epoch 1, step 1 of the student" in found


def test_sizes_that_cannot_be_shared():
    with pytest.raises(
        Exception, match="expected `config.batch_size` to be a multiple of the 5 proc"
    ):
        on_ranks(5, trained, "paper", 1, {})


PROGRAM = """
    import os, sys
    sys.path[:0] = [{tests!r}]
    import torch
    from torch import distributed
    from test_distributed import make_trainer
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    trainer = make_trainer(epochs=10**6)
    for stats in trainer.epochs():
        if distributed.get_rank() == 1 and stats.epoch == 2:
            os._exit(9)
"""


def test_a_process_that_dies_ends_the_job(tmp_path):
    """It does not leave the others waiting."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM.format(tests=str(ROOT / "tests"))), "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(
        [*command, "--nproc-per-node", "2", str(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode != 0
    assert "exitcode" in result.stderr


ADDED = {"fair-rslad": {}, "absld": {}, "cfa-ard": {"begin": 1}, "dafa-ard": {"begin": 1}}
AVERAGED = {"mtard": {}, "frl-ard": {"slack": 0.0}, "wat-ard": {}}


def labelled_epoch(rank, size, name):
    """One step with a method on labelled images, in a loop of one's own, and what it has learnt by then."""
    teacher, student, _ = make_double_models(False)
    second = {"natural_teacher": teacher} if name == "mtard" else {}
    settings = {"random_start": None, **second, **(ADDED | AVERAGED)[name]}
    method = build_method(name, 3, teacher=teacher, **settings)
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()[rank::size]
    y = (torch.arange(12) % 3)[rank::size]
    student.eval()
    trained = student if size == 1 else nn.parallel.DistributedDataParallel(student)
    losses = method.loss(trained, x, method.attack(student, x, y), y)
    losses.mean().backward()
    if method.needs_validation:
        for _ in range(rank + 1):  # so that they differ
            method.validate(student, [(x, y)])
    before = copy.deepcopy(method.state_dict())
    method.sync()
    after = copy.deepcopy(method.state_dict())
    method.end_epoch()
    gradients = [p.grad for p in student.parameters()]
    found = {"losses": losses.detach(), "gradients": gradients, "end": method.state_dict()}
    return found | {"before": before, "after": after}


@functools.cache
def labelled_epochs():
    """Results of two processes, by rank and method."""
    return on_ranks(2, all_labelled_epochs)


def all_labelled_epochs(rank, size):
    return {name: labelled_epoch(rank, size, name) for name in (*ADDED, *AVERAGED)}


def numbers(state, path=""):
    if isinstance(state, torch.Tensor):
        return {path: state.double()}
    parts = state.items() if isinstance(state, dict) else ()
    return {k: v for name, part in parts for k, v in numbers(part, f"{path}.{name}").items()}


@pytest.mark.parametrize("name", ADDED)
def test_a_method_learns_from_the_images_of_all_processes(name):
    expected = labelled_epoch(0, 1, name)
    for rank, own in enumerate(each[name] for each in labelled_epochs()):
        assert torch.allclose(own["losses"], expected["losses"][rank::2], rtol=0, atol=1e-10)
        for a, b in zip(own["gradients"], expected["gradients"], strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-10)
        for key in ("after", "end"):
            ours, theirs = numbers(own[key]), numbers(expected[key])
            assert ours.keys() == theirs.keys()
            assert ours
            for k, value in ours.items():
                assert torch.allclose(value, theirs[k], rtol=0, atol=1e-10, equal_nan=True), k
        assert any(
            not torch.equal(v, numbers(own["before"])[k]) for k, v in numbers(own["after"]).items()
        )


@pytest.mark.parametrize("name", AVERAGED)
def test_what_cannot_be_added_up_is_averaged(name):
    found = [each[name] for each in labelled_epochs()]
    before = [numbers(own["before"]) for own in found]
    assert any(not torch.equal(v, before[1][k]) for k, v in before[0].items())
    for own in found:
        for k, value in numbers(own["after"]).items():
            if not k.endswith("updates"):  # a count
                assert torch.allclose(value, (before[0][k] + before[1][k]) / 2, rtol=0, atol=1e-12)
