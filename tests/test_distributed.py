"""FERD over several gloo processes: the same numbers as one process with the same global batch."""

import copy
import functools
import itertools
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

from ferdlib._ranks import Ranks
from ferdlib.methods import METHODS, build_method
from ferdlib.synthesis import ImagePool
from ferdlib.trainer import FERDConfig, FERDTrainer
from ferdlib.trainer.state import gathered, parted

ROOT = Path(__file__).parents[1]
TINY = SIZES | {
    "epochs": 3,
    "warmup_epochs": 0,
    "generator_steps": 4,
    "generator_lr": 0.01,
    "bottleneck_steps": 3,
    "student_steps": 2,
}


class StillNorm(nn.BatchNorm2d):
    """BatchNorm in eval mode for good: of a whole batch's statistics only SyncBatchNorm knows, on CUDA."""

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


def make_trainer(preset="paper", method=None, **changes):
    config = getattr(FERDConfig, preset)(**(TINY | changes))
    teacher, student, generator = make_double_models(config.conditional_generator)
    generator.image_dtype = torch.float64
    if method is not None:
        method = build_method(method, 3, teacher=teacher, steps=2, eps=0.1, step_size=0.05)
    return FERDTrainer(
        teacher, still(student), still(generator), config=config, method=method, seed=20
    )


def trained(rank, size, preset, epochs, changes, method=None):
    trainer = make_trainer(preset, method, **changes)
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
    return found


@pytest.mark.parametrize(
    ("preset", "changes", "size"),
    [
        ("paper", {}, 3),
        ("paper", {"reweighting": "lps_power"}, 2),
        ("released", {"mask_threshold": "channel"}, 2),
    ],
    ids=["paper", "lps", "released"],
)
def test_an_epoch_of_several_processes_is_that_of_one(preset, changes, size):
    """One epoch, in which every process trains on all that it has stored: the global batch is the same.

    Not so crops and starts of the student's images, whose order in the batch is another one.
    """
    expected = trained(0, 1, preset, 1, changes)
    tolerance = (
        1e-10 if size == 2 else 1e-8
    )  # three cut the float32 codes where their order of sums shows
    for found in on_ranks(size, trained, preset, 1, changes):
        for key in ("generator", "agreement", *(["losses"] if preset == "paper" else [])):
            assert found[key] == pytest.approx(expected[key], rel=tolerance, abs=tolerance)
        assert torch.allclose(
            torch.tensor(found["p"]), torch.tensor(expected["p"]), rtol=0, atol=1e-7
        )
        if preset == "paper":
            for key in ("gradients", "weights"):
                for a, b in zip(found[key], expected[key], strict=True):
                    assert float((a - b).abs().max()) < tolerance


def state_of(rank, size, epochs):
    trainer = make_trainer(epochs=6)
    for stats in trainer.epochs():
        if stats.epoch == epochs:
            break
    return trainer.state_dict()


def resumed(rank, size, state):
    trainer = make_trainer(epochs=6)
    trainer.load_state_dict(state)
    losses = [stats.student_loss for stats in trainer.epochs()]
    return {"losses": losses, "p": trainer.class_probabilities, "pool": len(trainer.pool)}


def test_four_processes_go_on_as_two_and_as_one():
    states = on_ranks(4, state_of, 2)
    assert states[0]["pool"]["columns"]["images"].shape[0] == 2 * 12
    for state in states[1:]:
        assert torch.equal(state["rng"]["trainer"], states[0]["rng"]["trainer"])
        for a, b in zip(state["student"].values(), states[0]["student"].values(), strict=True):
            assert torch.equal(a, b)
    found = on_ranks(2, resumed, states[0])
    assert found[0]["losses"] == found[1]["losses"]
    assert torch.equal(found[0]["p"], found[1]["p"])
    assert [f["pool"] for f in found] == [6 * 12 // 2] * 2
    assert len(found[0]["losses"]) == 4
    alone = resumed(0, 1, states[0])
    assert len(alone["losses"]) == 4
    assert alone["pool"] == 6 * 12


def years(rank, size, capacity, numbers, state):
    """A full pool after more batches of 12 images, each with its number as label, and its gathered state."""
    ranks = Ranks(rank, size)
    pool = ImagePool(capacity // size)
    if state is not None:
        pool.load_state_dict(parted(state, ranks))
    for number in numbers:
        own = 12 // size
        pool.add(torch.rand(own, 1, 2, 2), torch.full((own,), number))
    return gathered(pool.state_dict(), ranks)


def test_the_oldest_images_give_way_whatever_the_number_of_processes():
    """Room for three years: the fourth takes the place of the first, the fifth of the second, and so on."""
    state = years(0, 1, 36, range(4), None)
    for size, newest in ((4, 4), (2, 5), (1, 6)):
        arguments = (36, range(newest, newest + 1), state)
        state = years(0, 1, *arguments) if size == 1 else on_ranks(size, years, *arguments)[0]
        expected = [year for year in (newest - 2, newest - 1, newest) for _ in range(12)]
        assert sorted(state["columns"]["labels"].tolist()) == expected


def within_an_epoch():
    trainer, asked = make_trainer(), itertools.count()
    list(trainer.epochs(stop=lambda: next(asked) > 1))
    return trainer.state_dict()


def refusal(rank, size, state):
    trainer = make_trainer()
    try:
        trainer.load_state_dict(state)
    except ValueError as error:
        return [str(error), trainer.epoch, len(trainer.pool)]
    return []


def test_several_processes_do_not_go_on_within_an_epoch():
    """The class sums so far are of all images; each process would count them as its own."""
    sentence = (
        "FERDTrainer.load_state_dict: expected a state between two epochs, from which several processes "
        "can go on, got one within epoch 1; finish that with one process"
    )
    assert on_ranks(2, refusal, within_an_epoch()) == [[sentence, 0, 0]] * 2


def test_resuming_with_as_many_processes_equals_not_stopping():
    whole = on_ranks(2, trained, "paper", 3, {})
    found = on_ranks(2, finished, on_ranks(2, state_of_three, 1)[0])
    for a, b in zip(whole[0]["weights"], found[0], strict=True):
        assert torch.equal(a, b)


def state_of_three(rank, size, epochs):
    trainer = make_trainer()
    next(trainer.epochs())
    return trainer.state_dict()


def finished(rank, size, state):
    trainer = make_trainer()
    trainer.load_state_dict(state)
    trainer.fit()
    return list(trainer.student.state_dict().values())


def test_fair_weights_are_those_of_all_processes():
    found = on_ranks(2, fair_weights)
    assert torch.equal(found[0], found[1])
    assert float(found[0].std()) > 0.01


def fair_weights(rank, size):
    trainer = make_trainer(method="fair-rslad")
    trainer.fit()
    return trainer.method.rule.class_weights.weights


def ended_by_a_nan(rank, size):
    """What ends a trainer's run when the second of its processes finds a NaN in its first loss."""
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
    """And does not leave the others waiting."""
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


EXACT = {"fair-rslad": {}, "absld": {}, "cfa-ard": {"begin": 1}, "dafa-ard": {"begin": 1}}
AVERAGED = {"mtard": {}, "frl-ard": {"slack": 0.0}, "wat-ard": {}}


def labelled_epoch(rank, size, name):
    """One step with a method on labelled images, in a loop of one's own, and what it has learnt by then."""
    teacher, student, _ = make_double_models(False)
    teachers = {"teacher": teacher, "natural_teacher": teacher}
    wanted = {
        k: v
        for k, v in teachers.items()
        if k in METHODS[name.rpartition("-")[2]].__dataclass_fields__
    }
    method = build_method(name, 3, **wanted, random_start=None, **(EXACT | AVERAGED)[name])
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
    """Of two processes, by rank and method."""
    return on_ranks(2, all_labelled_epochs)


def all_labelled_epochs(rank, size):
    return {name: labelled_epoch(rank, size, name) for name in (*EXACT, *AVERAGED)}


def numbers(state):
    return {
        f"{part}.{k}": v.double()
        for part, values in state.items()
        if isinstance(values, dict)
        for k, v in values.items()
        if isinstance(v, torch.Tensor)
    } | {k: v.double() for k, v in state.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("name", EXACT)
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
