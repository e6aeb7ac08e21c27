"""Evaluation: one valid call of each function.

A new function is a line here: its name, and the kind of each argument.
"""

import torch

from bad_input.kinds import (
    CLASSES,
    COUNTS,
    MODEL,
    NO_TENSOR,
    K,
    Kind,
    X,
    Y,
    anything,
    bounds,
    case,
    choice,
    counts,
    device,
    finite,
    flags,
    fractions,
    function,
    images,
    integer,
    labels,
    names,
    nothing,
    number,
    optional,
    path,
    quiet,
    spoilt,
    state,
    word,
)
from ferdlib.evaluation import PROTOCOLS, compare, evaluate

REPORT = evaluate(MODEL, (X, Y), "quick", num_classes=K)
ON_HOST = "samples are read on the host"


def data():
    """Images and labels."""
    pictures, answers = images(), labels().but(length=ValueError, device=ON_HOST)
    cells = pictures.but(device=ON_HOST, length=ValueError).of(lambda x: (x, Y), "images ")
    cells |= answers.of(lambda y: (X, y), "labels ")
    cells |= {"number": (7, TypeError), "text": ("text", TypeError), "none": (None, TypeError)}
    return Kind((X, Y), cells | {"empty": ((X[:0], Y[:0]), ValueError)})


case(
    "evaluation.evaluate",
    model=function(MODEL),
    data=data(),
    protocol=choice("quick"),
    num_classes=CLASSES,
    class_names=optional(names()),
    groups=optional(labels(valid=torch.tensor([0, 1, 1])).without("above")).but(
        device="read on the host", length=ValueError
    ),
    group_names=optional(names(2)),
    custom=Kind(
        None,
        {
            "text": ("own", TypeError),
            "number": (7, TypeError),
            "not asked for": ({"own": quiet}, ValueError),
        },
    ),
    bounds=bounds(),
    batch_size=integer(2, 1).but(text=ValueError).also(auto=("auto", anything)),
    device=optional(device()),
    resume=Kind(None, {"number": (7, TypeError)}),
).that(empty=ValueError)
case(
    "evaluation.trust_checks",
    model=function(MODEL),
    data=Kind(
        (X, Y),
        data().cells
        | {
            "images above": ((spoilt(X, 1.01), Y), anything),  # a finding
            "images below": ((spoilt(X, -0.01), Y), anything),
        },
    ),
    protocol=choice("quick"),
    num_classes=CLASSES,
    bounds=bounds(),
    report=optional(Kind(REPORT, NO_TENSOR)),
    batch_size=integer(2, 1),
    device=optional(device()),
)
REPORTS = {
    "text": ("text", TypeError),
    "number": (7, TypeError),
    "none": (None, TypeError),
}
case(
    "evaluation.compare",
    reports=Kind(
        {"a": REPORT, "b": REPORT},
        REPORTS | {"empty": ({}, ValueError), "inner": ({"a": 1}, TypeError)},
    ),
    worst=optional(choice("class")),
)
case(
    "evaluation.merge",
    reports=Kind([REPORT], REPORTS | {"empty": ([], ValueError), "inner": ([1], TypeError)}),
)
case("evaluation.gather", report=Kind(REPORT, REPORTS))
case("evaluation.share", data=Kind(torch.utils.data.TensorDataset(X, Y), REPORTS))
PGD = {"name": word("PGD"), "kind": choice("pgd"), "eps": number(0.1, 0.0)}
case(
    "evaluation.AttackSpec",
    **PGD,
    step_size=number(0.05, 0.0),
    steps=integer(2, 1),
    start=optional(choice("uniform")),
    restarts=integer(1, 1),
    judge=choice("last"),
    confidence=number(50.0, 0.0),
    version=choice("standard"),
    batch_size=integer(250, 1),
    survivors=Kind(False, {"text": ("no", TypeError), "number": (0, TypeError)}),
)
SPEC = PROTOCOLS["quick"].attacks[0]
case(
    "evaluation.Protocol",
    name=word("mine"),
    attacks=Kind(
        (SPEC,),
        {
            "list": ([SPEC], TypeError),
            "text": ("FGSM", TypeError),
            "inner": (("FGSM",), TypeError),
            "empty": ((), ValueError),
            "twice": ((SPEC, SPEC), ValueError),
        },
    ),
    seed=integer(0, 0),
)
QUICK = PROTOCOLS["quick"]
case("evaluation.Protocol.at", eps=number(0.1, 0.0, open_low=True)).that(on=lambda: QUICK)
case("evaluation.Protocol.without", names=choice("FGSM")).that(
    call=lambda names: QUICK.without(names)
)
case("evaluation.Protocol.with_seed", seed=integer(0, 0)).that(on=lambda: QUICK)
case("evaluation.Protocol.from_dict", content=state(QUICK.to_dict()))
case("evaluation.RobustnessReport.__getitem__", column=choice("clean")).that(on=lambda: REPORT)
case("evaluation.RobustnessReport.survival", attack=choice("clean")).that(on=lambda: REPORT)
case(
    "evaluation.RobustnessReport.from_dict",
    # Of a file's content any kind is another content, no wrong type.
    content=state(REPORT.to_dict()).but(text=ValueError, none=ValueError).without("one more"),
)
case("evaluation.RobustnessReport.save", path=path("again.json")).that(on=lambda: REPORT)
case(
    "evaluation.RobustnessReport.load",
    path=path("report.json").also(missing=("none.json", FileNotFoundError)),
)
case(
    "evaluation.AttackResult.of",
    name=Kind("PGD"),
    predictions=labels().but(device=ON_HOST),
    targets=labels().but(device=ON_HOST),
    num_classes=CLASSES,
    row_names=optional(names()),
    rows=optional(labels(K, torch.tensor([0, 1, 3]))).but(device=ON_HOST),
).that(
    says=r"AttackResult\.of|confusion_matrix", names={"row_names": "row_names|rows"}, empty=anything
)
case(
    "evaluation.Comparison.test",
    first=choice("a"),
    second=choice("b"),
    column=choice("clean"),
    seed=integer(0, 0),
).that(on=lambda: compare({"a": REPORT, "b": REPORT}), says=r"Comparison\.test|paired_permutation")
CORRECT = counts().also(above=(COUNTS + 9, ValueError))
CONFIDENCE = number(0.95, 0.0, 1.0, open_low=True, open_high=True)
DRAWS = {"confidence": CONFIDENCE, "draws": integer(20, 1), "seed": integer(0, 0)}
for name, other in {
    "wilson_interval": {"confidence": CONFIDENCE},
    "simultaneous_interval": {"confidence": CONFIDENCE},
    "worst_class_interval": {"confidence": CONFIDENCE},
    "worst_fraction_interval": {
        "confidence": CONFIDENCE,
        "fraction": number(0.1, 0.0, 1.0, open_low=True),
    },
    "average_interval": DRAWS,
    "nsd_interval": DRAWS | {"ddof": integer(0, 0)},
}.items():
    case(f"evaluation.{name}", correct=CORRECT, totals=counts(COUNTS + 5), **other)
case("evaluation.mcnemar", only_a=counts(), only_b=counts())
case(
    "evaluation.holm",
    p=fractions().but(one_class=finite, empty=nothing),
)
case(
    "evaluation.paired_permutation",
    correct_a=flags().but(device=ON_HOST),
    correct_b=flags().but(device=ON_HOST),
    rows=labels().but(device=ON_HOST),
    num_rows=CLASSES,
    figure=choice("average"),
    draws=integer(20, 1),
    seed=integer(0, 0),
).that(empty=lambda found: found[0] != found[0])
