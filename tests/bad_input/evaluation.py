"""Evaluation."""

from pathlib import Path

import torch

from bad_input import table as t
from bad_input.table import K, X, Y, any_of, bad, each, good, or_none
from ferdlib import evaluation
from ferdlib.evaluation import PROTOCOLS, AttackResult, AttackSpec, Comparison, Protocol
from ferdlib.evaluation import RobustnessReport as Report

QUICK = PROTOCOLS["quick"]
REPORT = evaluation.evaluate(t.MODEL, (X, Y), "quick", num_classes=K)
COMPARISON = evaluation.compare({"a": REPORT, "b": REPORT})


def files():
    REPORT.save("report.json")
    Path("other.json").write_text("{}")


images = [((x, Y), error, "`data`") for x, error, _ in t.IMAGES if isinstance(x, torch.Tensor)]
data = images + any_of(TypeError, "data", 7, "text", None)
data += [((X, y), e, "labels of data") for y, e, _ in t.LABELS if isinstance(y, torch.Tensor)]
data += any_of(ValueError, "data`", (X, Y[:-1]), (X, Y - 1), (X, t.spoilt(Y, K)), (X[:0], Y[:0]))
protocols = [*any_of(TypeError, "", 7, None), ("unheard of", ValueError, "one of")]
groups = [*or_none(t.LABELS), *any_of(ValueError, "", Y[:-1], Y * 0, Y - 1)]
custom = [*any_of(TypeError, "by name", "own", 7), ({"own": t.quiet}, ValueError, "")]
good(evaluation.evaluate, model=t.MODEL, data=(X, Y), protocol="quick", num_classes=K)
each(evaluation.evaluate, model=t.FUNCTION, data=data, protocol=protocols, groups=groups)
each(evaluation.evaluate, custom=custom, resume=[(7, TypeError, "a str or a Path")])
two = {"groups": torch.tensor([0, 1, 1])}
for value, error, said in t.names(2):
    bad(evaluation.evaluate, error, said, **two, group_names=value)
good(evaluation.trust_checks, model=t.MODEL, data=(X, Y), protocol="quick", num_classes=K)
unread = [row for row in data if not isinstance(row[0], tuple) or not torch.is_tensor(row[0][0])]
each(evaluation.trust_checks, model=t.FUNCTION, data=unread, protocol=protocols)
each(evaluation.trust_checks, report=any_of(TypeError, "a RobustnessReport", "text", 7))
reports = any_of(TypeError, "reports", "text", 7, None)
good(evaluation.compare, reports={"a": REPORT})
inner = [({}, ValueError, "at least one"), ({"a": 1}, TypeError, "reports")]
each(evaluation.compare, reports=reports + inner, worst=or_none(t.CHOICE))
good(evaluation.merge, reports=[REPORT])
inner = [([], ValueError, "at least one"), ([1], TypeError, "reports")]
each(evaluation.merge, reports=reports + inner)
pair = {"first": "a", "second": "b", "column": "clean"}
good(Comparison.test, r"Comparison\.test|paired_permutation", self=lambda: COMPARISON, **pair)
each(Comparison.test, **dict.fromkeys(pair, t.CHOICE))

words = any_of(TypeError, "a word", 7, None)
good(AttackSpec, name="PGD", kind="pgd", eps=0.1, step_size=0.05, steps=2)
each(
    AttackSpec,
    name=words,
    kind=t.CHOICE,
    eps=t.WEIGHT,
    step_size=t.WEIGHT,
    start=or_none(t.CHOICE),
)
each(AttackSpec, judge=t.CHOICE, restarts=t.integer(1))
each(AttackSpec, survivors=any_of(TypeError, "one of", "no", 0))
specs = any_of(TypeError, "a tuple of AttackSpec", [*QUICK.attacks], "FGSM", ("FGSM",))
specs += any_of(ValueError, "", (), QUICK.attacks[:1] * 2)
good(Protocol, name="mine", attacks=QUICK.attacks)
each(Protocol, name=words, attacks=specs)
good(Protocol.at, self=lambda: QUICK, eps=0.1)
each(Protocol.at, eps=t.ABOVE_ZERO)
good(Protocol.with_seed, r"Protocol(\.with_seed)?", self=lambda: QUICK, seed=1)
good(Protocol.from_dict, content=QUICK.to_dict())
contents = [(v, e, "`content`") for v, e, _ in t.state(QUICK.to_dict())]
each(Protocol.from_dict, content=contents)
good(Report.__getitem__, self=lambda: REPORT, column="clean")
each(Report.__getitem__, column=t.CHOICE)
good(Report.survival, self=lambda: REPORT, attack="FGSM")
each(Report.survival, attack=t.CHOICE)
good(Report.from_dict, content=REPORT.to_dict())
each(Report.from_dict, content=any_of(ValueError, "`content`", "text", None, {}))
good(Report.save, self=lambda: REPORT, path="again.json")
each(Report.save, path=t.PATH)
good(Report.load, r"RobustnessReport\.(load|from_dict)", path="report.json")
wrong = [("none.json", FileNotFoundError, "a file"), ("other.json", ValueError, "`")]
each(Report.load, path=t.PATH + wrong)
counted = {"predictions": Y, "targets": Y}
good(AttackResult.of, r"AttackResult\.of", name="PGD", **counted, num_classes=K)
labels = t.LABELS + t.IN_RANGE
each(AttackResult.of, predictions=labels + t.SHORT, targets=labels)
each(AttackResult.of, row_names=or_none(t.names()), rows=or_none(t.LABELS) + t.SHORT + t.IN_RANGE)
