"""What makes an evaluation faster, beside the plain one: early stop, survivors, a fast copy, batch sizes."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_model
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from ferdlib.attacks import autoattack
from ferdlib.attacks.autoattack import AutoAttackResult
from ferdlib.evaluation import (
    PROTOCOLS,
    AttackSpec,
    Protocol,
    RobustnessReport,
    compare,
    evaluate,
    merge,
    trust_checks,
)
from ferdlib.models import FrozenModel

K, N = 4, 40


def tiny(**settings):
    """In float64, where no sign of a gradient hangs on how a batch is cut."""
    return make_tiny_model(K, **settings).double()


def samples(n=N):
    """Images of which the model calls three of four right."""
    x = torch.rand(n, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = tiny()(x).argmax(dim=1).detach()
    return x, torch.where(torch.arange(n) % 4 == 1, (y + 1) % K, y)


X, Y = samples()
DATA = TensorDataset(X, Y)


def ascent(name="PGD", **change):
    common = {"kind": "pgd", "eps": 0.02, "step_size": 0.008, "steps": 4}
    return AttackSpec(name=name, **(common | change))


def run(*attacks, model=None, data=(X, Y), **change):
    protocol = Protocol(name="test", attacks=attacks or (ascent(),))
    return evaluate(model or tiny(), data, **({"protocol": protocol, "num_classes": K} | change))


def counted(model):
    """The model, and how many images go through it in each forward."""
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return model, seen


@pytest.mark.parametrize("kind", ["pgd", "cw"])
@pytest.mark.parametrize("batch_size", [64, 7])
def test_stopping_early_gives_the_same_report(kind, batch_size):
    attacks = [
        ascent("any", kind=kind, judge="any", restarts=3),
        ascent("again", kind=kind, judge="any", start=None, eps=0.03),
        ascent("last", kind=kind, restarts=2),
    ]
    early, full = (
        run(*attacks, batch_size=batch_size, early_stop=early_stop) for early_stop in (True, False)
    )
    assert early == full
    assert early.winners == full.winners
    for name in ("any", "again"):
        assert torch.equal(early.fooled_at[name], full.fooled_at[name])
        assert torch.equal(early.predictions[name], full.predictions[name])
    assert len(set(early.fooled_at["any"].tolist())) > 4
    assert 0 < early["any"].average < early["clean"].average


@pytest.mark.parametrize("kind", ["pgd", "cw"])
def test_an_early_stop_leaves_out_what_is_fooled(kind):
    """A sample costs a pass for each iterate up to the first wrong one, in each start it comes to."""
    restarts, steps = 3, 4
    attack = ascent(kind=kind, judge="any")
    early = full = N  # the clean images
    came = torch.ones(N, dtype=torch.bool)
    for k in range(restarts):
        found = run(replace(attack, restarts=k + 1))
        early += int((found.fooled_at["PGD"][came].clamp(max=steps) + 1).sum())
        full += int(came.sum()) * (steps + 1)
        came = found["PGD"].robust
    for early_stop, expected in ((True, early), (False, full)):
        model, seen = counted(tiny())
        run(replace(attack, restarts=restarts), model=model, early_stop=early_stop)
        assert sum(seen) == expected
    assert early < 0.9 * full


def test_the_last_iterate_needs_all_steps():
    for early_stop in (True, False):
        model, seen = counted(tiny())
        run(ascent(), model=model, early_stop=early_stop)
        assert seen == [N] * 6


AA = AttackSpec(name="AA", kind="autoattack", eps=0.05, batch_size=7)
BEFORE = (ascent("FGSM", eps=0.01, step_size=0.01, steps=1, start=None), ascent())


class Stub:
    """In place of AutoAttack: a member fools the images whose first pixel lies in its part of [0, 1]."""

    def __init__(self):
        self.reached = []

    def __call__(self, model, x, targets, **settings):
        self.reached += x[:, 0, 0, 0].tolist()
        first = x[:, 0, 0, 0]
        clean = model(x).argmax(dim=1)
        right = clean == targets
        flags = {"clean": right, "apgd-ce": right & (first > 0.2)}
        flags["square"] = flags["apgd-ce"] & (first < 0.9)
        fooled = right & ~flags["square"]
        predictions = torch.where(fooled, (targets + 1) % K, clean)
        return AutoAttackResult(x, flags["square"], flags, predictions)


@pytest.fixture
def stub(monkeypatch):
    stub = Stub()
    monkeypatch.setattr("ferdlib.evaluation.attack.autoattack", stub)
    return stub


def on_survivors(*attacks, **change):
    protocol = Protocol(name="test", attacks=attacks or (*BEFORE, AA)).on_survivors()
    return run(protocol=protocol, **change)


def test_only_survivors_are_attacked(stub):
    plain = run(*BEFORE, AA)
    assert stub.reached == X[:, 0, 0, 0].tolist()
    stub.reached = []
    on_survivors()
    left = plain["clean"].robust & plain["FGSM"].robust & plain["PGD"].robust
    assert stub.reached == X[left, 0, 0, 0].tolist()
    assert 5 < len(stub.reached) < plain["clean"].robust.sum()


def test_the_column_is_the_worst_case_by_hand(stub):
    plain, report = run(*BEFORE, AA), on_survivors()
    left = plain["clean"].robust & plain["FGSM"].robust & plain["PGD"].robust
    first = X[:, 0, 0, 0]
    flags = {"AA/apgd-ce": left & (first > 0.2), "AA/square": left & (first > 0.2) & (first < 0.9)}
    assert report.members("AA") == tuple(flags)
    for member, robust in flags.items():
        assert torch.equal(report[member].robust, robust)
    assert left.sum() > flags["AA/apgd-ce"].sum() > flags["AA/square"].sum() > 0
    for column in ("AA", "worst case"):
        assert torch.equal(report[column].robust, flags["AA/square"])
    assert torch.equal(report["worst case"].robust, plain["worst case"].robust)
    assert torch.equal(report["AA"].confusion, report["worst case"].confusion)
    # What fell before keeps the class that it fell to first.
    assert report.winners == plain.winners
    expected = Y.clone()
    for name in reversed(("clean", "FGSM", "PGD", "AA")):
        fooled = plain.predictions[name] != Y
        expected[fooled] = plain.predictions[name][fooled]
    assert torch.equal(report.predictions["AA"], expected)
    assert report.stages["AA"] == ("before", "apgd-ce", "square")
    assert torch.equal(report.fooled_at["AA"] == 0, ~left)
    share = torch.stack([left, *flags.values()]).double()
    by_hand = torch.stack([share[:, k == Y].mean(dim=1) for k in range(K)])
    assert torch.allclose(report.survival("AA"), by_hand, rtol=0, atol=1e-12)
    for column in ("clean", "FGSM", "PGD"):
        assert torch.equal(report.predictions[column], plain.predictions[column])


def test_an_attack_after_it_is_as_ever(stub):
    after = ascent("CW", kind="cw", eps=0.1)
    plain, report = run(*BEFORE, AA, after), on_survivors(*BEFORE, AA, after)
    assert torch.equal(report.predictions["CW"], plain.predictions["CW"])
    assert torch.equal(report["worst case"].robust, plain["worst case"].robust)
    assert report["worst case"].average < report["AA"].average


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_survivors_of_blocks_and_shards(stub, tmp_path):
    report = on_survivors()
    assert on_survivors(data=DataLoader(DATA, batch_size=3)) == report
    shards = [Subset(DATA, range(k, N, 2)) for k in range(2)]
    assert merge([on_survivors(data=shard) for shard in shards]) == report
    report.save(tmp_path / "report.json")
    again = RobustnessReport.load(tmp_path / "report.json")
    assert again == report
    assert again.protocol.attacks[-1].survivors
    assert torch.equal(again["AA/apgd-ce"].robust, report["AA/apgd-ce"].robust)


def test_survivors_are_resumed(stub, tmp_path):
    report = on_survivors(resume=tmp_path)
    stub.reached = []
    assert on_survivors(resume=tmp_path) == report
    assert stub.reached == []
    for path in tmp_path.glob("AA-*-000002.json"):  # that of 14..20
        path.unlink()
    assert on_survivors(resume=tmp_path) == report
    left = report.fooled_at["AA"] > 0
    assert stub.reached == X[14:21][left[14:21], 0, 0, 0].tolist()
    with pytest.raises(ValueError, match="^evaluate: expected the protocol that `resume`"):
        run(*BEFORE, AA, resume=tmp_path)


def test_it_is_not_compared_with_plain_autoattack(stub):
    plain, report = run(*BEFORE, AA), on_survivors()
    with pytest.raises(ValueError, match="^compare: expected one setting .* on what withstood all"):
        compare({"plain": plain, "survivors": report})
    assert compare({"1": report, "2": report}).columns == report.columns
    # Over other attacks it is another worst case.
    alone = on_survivors(BEFORE[1], AA)
    for reports in ({"1": report, "2": alone}, {"2": alone, "1": report}):
        assert compare(reports).columns == ("clean", "PGD")
    longer = on_survivors(*BEFORE, AA, ascent("CW", kind="cw"))
    assert compare({"1": report, "2": longer}).columns == ("clean", "FGSM", "PGD", "AA")


def test_the_texts_say_so(stub):
    plain, report = run(*BEFORE, AA), on_survivors()
    assert report.protocol.name == "test, AutoAttack on survivors"
    note = "AA was run on what withstood all before it: its rows are the worst case up to there"
    for text in (str(report), report.to_markdown()):
        assert note in text
    for text in (str(plain), plain.to_markdown()):
        assert "withstood" not in text
    line = str(report.protocol).splitlines()[-1]
    assert line.endswith("AutoAttack standard, batches of 7, on what withstood all before")


def test_a_block_without_survivors():
    """The second block is wrong from the start: AutoAttack itself is not asked, and has its stages."""
    model = make_tiny_model(K)
    x = X[:6].float()
    y = model(x).argmax(dim=1)
    y[3:] = (y[3:] + 1) % K
    attack = replace(AA, eps=0.02, batch_size=3)
    model, seen = counted(model)
    report = on_survivors(attack, model=model, data=(x[3:], y[3:]))
    assert seen == [3]
    assert report.stages["AA"] == ("before", "apgd-ce", "apgd-t", "fab-t", "square")
    assert torch.equal(report.predictions["AA"], report.predictions["clean"])
    assert report.winners == ("clean",) * 3
    alone = autoattack(model, x[:3], y[:3], num_classes=K, eps=0.02, batch_size=3)
    both = on_survivors(attack, model=model, data=(x, y))
    assert both["AA"].robust.tolist() == [*alone.robust.tolist(), False, False, False]


def test_no_check_of_trust_is_passed_by_construction(stub):
    plain, report = run(*BEFORE, AA), on_survivors()
    checks = [
        {f.check for f in trust_checks(tiny(), DATA, num_classes=K, report=made)}
        for made in (plain, report)
    ]
    assert checks[0] - checks[1] == {
        "AA is at least as strong as FGSM",
        "AA is at least as strong as PGD",
    }
    assert any(check.startswith("AA's black-box Square") for check in checks[1])


def test_protocols_on_survivors():
    protocol = PROTOCOLS["fair-ard"].on_survivors()
    assert protocol.attacks[:3] == PROTOCOLS["fair-ard"].attacks[:3]
    assert protocol.attacks[3] == replace(PROTOCOLS["fair-ard"].attacks[3], survivors=True)
    content = json.loads(json.dumps(protocol.to_dict()))
    assert Protocol.from_dict(content) == protocol
    for attack in content["attacks"]:  # as they were written before there was a choice
        del attack["survivors"]
    assert Protocol.from_dict(content).attacks == PROTOCOLS["fair-ard"].attacks
    with pytest.raises(ValueError, match="^Protocol.on_survivors: expected .* AutoAttack, got 'qu"):
        PROTOCOLS["quick"].on_survivors()


def test_the_copy_attacks_and_judges():
    """An attack is given the copy; the model stays as it is, and is what the report is of."""
    own, given = AttackSpec(name="own", kind="custom", eps=0.1), []

    def attack(model, x, targets):
        given.append(model)
        return (x + 0.1 * torch.linspace(-1, 1, 6)).clamp(0, 1)

    model = make_tiny_model(K).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    data = X.float(), Y
    slow, fast = (
        run(ascent(), own, model=model, data=data, custom={"own": attack}, fast=fast)
        for fast in (False, True)
    )
    assert given[0] is model
    assert isinstance(given[1], FrozenModel)
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()] == (
        flags
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert fast.predictions.keys() == slow.predictions.keys()
    for name in slow.predictions:
        assert (fast.predictions[name] != slow.predictions[name]).sum() <= 1
    assert (slow.manifest["precision"]["fast"], fast.manifest["precision"]["fast"]) == (False, True)
    assert fast.manifest["model"] == slow.manifest["model"]
    assert "fast True" in fast.to_markdown()
    assert "fast" not in slow.to_markdown()


def test_fast_and_slow_are_compared_and_not_mixed(tmp_path):
    data = TensorDataset(X.float(), Y)
    reports = {
        name: run(
            ascent(),
            model=make_tiny_model(K),
            data=data,
            fast=name == "fast",
            resume=tmp_path / name,
        )
        for name in ("slow", "fast")
    }
    assert compare(reports).columns == ("clean", "PGD", "worst case")
    assert abs(compare(reports).test("slow", "fast").average[0]) < 0.05
    with pytest.raises(ValueError, match="^merge: expected .* got others in precision$"):
        merge(list(reports.values()))
    for name in reports:
        message = "^evaluate: expected the choice of `fast` that `resume` .* was begun with, got"
        with pytest.raises(ValueError, match=message):
            run(model=make_tiny_model(K), data=data, fast=name == "slow", resume=tmp_path / name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fast_in_surroundings_without_gradients(mode):
    model = make_tiny_model(K)
    expected = run(model=model, data=(X.float(), Y), fast=True)
    with mode():
        assert run(model=model, data=(X.float(), Y.clone()), fast=True) == expected


class Forked(nn.Module):
    """Its path depends on the values of the images."""

    def forward(self, x):
        return x.flatten(1)[:, :K] * (2 if x.sum() > 0 else 1)


@pytest.mark.parametrize(
    ("model", "error"), [(Forked(), ValueError), (lambda x: x.flatten(1)[:, :K], TypeError)]
)
def test_what_cannot_be_copied_is_refused(model, error, tmp_path):
    assert len(run(model=model)) == N
    message = (
        "^evaluate: expected a `model` that can be copied for `fast`, got (?!.*fold_batchnorm)"
    )
    with pytest.raises(error, match=message):
        run(model=model, fast=True, resume=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_copy_that_answers_otherwise_is_refused(tmp_path):
    class Called(nn.Module):
        """Its function for a trace is another one than for images."""

        def forward(self, x):
            return x.flatten(1)[:, :K] * (2 if isinstance(x, torch.Tensor) else 1)

    # Of all numbers, half is missing.
    with pytest.raises(ValueError, match=r"^evaluate: .* logits off by 0.5 of their size; leave"):
        run(model=Called(), fast=True, resume=tmp_path)
    assert len(run(model=Called(), resume=tmp_path)) == N


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Small(nn.Module):
    """Memory for so many images."""

    def __init__(self, most, error=None):
        super().__init__()
        self.model, self.most, self.error = tiny(), most, error or FULL

    def forward(self, x):
        if len(x) > self.most:
            raise self.error
        return self.model(x)


def dark(model, x, targets):
    model(x)
    return (x - 0.05).clamp(min=0)


EACH = (ascent(), ascent("any", judge="any"), AttackSpec(name="dark", kind="custom", eps=0.05))


ON_A_CPU = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"
)
ERRORS = [RuntimeError("CUDA error: out of memory"), RuntimeError(ON_A_CPU), MemoryError()]


@pytest.mark.parametrize("error", [None, *ERRORS], ids=["CUDA", "plain", "CPU", "NumPy"])
def test_what_memory_cannot_hold_is_halved(error, caplog):
    expected = run(*EACH, custom={"dark": dark})
    model, seen = counted(Small(3, error))
    report = run(*EACH, model=model, custom={"dark": dark}, batch_size=16)
    assert {name: p.tolist() for name, p in report.predictions.items()} == {
        name: p.tolist() for name, p in expected.predictions.items()
    }
    assert all(torch.equal(report.fooled_at[k], f) for k, f in expected.fooled_at.items())
    sizes = [(16, 8), (8, 4), (4, 2)]
    message = "out of memory with {} samples at a time; going on with {}"
    assert caplog.messages == [message.format(*pair) for pair in sizes]
    assert seen[:4] == [16, 8, 4, 2]
    assert max(seen[3:]) == 2


def test_memory_that_ends_in_an_attack(caplog):
    """Its gradients do not fit where its logits do."""

    class Graded(Small):
        def forward(self, x):
            return super().forward(x) if x.requires_grad else self.model(x)

    report = run(ascent(), model=Graded(5), batch_size=20)
    expected = run(ascent())
    assert torch.equal(report.predictions["PGD"], expected.predictions["PGD"])
    assert [record.args for record in caplog.records] == [(20, 10), (10, 5)]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_single_image_that_does_not_fit(caplog):
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        run(model=Small(0), batch_size=4)
    assert len(caplog.records) == 2
    model, seen = counted(Small(3, RuntimeError("an error of the model")))
    with pytest.raises(RuntimeError, match="an error of the model"):
        run(model=model, batch_size=4)
    assert seen == [4]


def test_trust_checks_halve_too(caplog):
    wanted = trust_checks(tiny(), DATA, "quick", num_classes=K, batch_size=N)
    model = Small(N // 2).eval()
    found = trust_checks(model, DATA, "quick", num_classes=K, batch_size=N)
    assert [(f.check, f.verdict) for f in found] == [(f.check, f.verdict) for f in wanted]
    assert [record.args for record in caplog.records] == [(N, N // 2)]
