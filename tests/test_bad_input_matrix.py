"""Every public name against every kind of bad input: the right error in one clear sentence, or the right result.

tests/bad_input/primitives.py, evaluation.py and compositions.py have one valid call of each name, with the kind of
each argument, from which the bad values follow (kinds.py). A public name that is neither there nor
in `NO_INPUT` fails a test, as does a parameter that is neither in its case nor in `FREE`.
"""

import contextlib
import importlib
import inspect
import re

import pytest
import torch
from bad_input import CASES
from bad_input.evaluation import REPORT
from bad_input.kinds import anything

from ferdlib import models, trainer

PACKAGES = (
    "losses",
    "attacks",
    "reweight",
    "bottleneck",
    "metrics",
    "models",
    "augment",
    "evaluation",
    "synthesis",
    "methods",
    "trainer",
    "plots",
)

# Patterns of names that are not in the matrix, and why.
NO_INPUT = {
    r"attacks\.AutoAttackResult|methods\.Recipe|trainer\.EpochStats": "a record that is returned",
    r"evaluation\.(AttackResult|Comparison|Finding|PairedTest|RobustnessReport)": "likewise",
    r"models\.(SmallCNN|WideResNet|PreActResNet|MobileNetV2|FrozenModel)": "made by a function that checks",
    r"models\.\w+\.forward": "what a network makes of its input is torch's to say",
    r"methods\.Fair(\.\w+)?": "is put before a method, and with it in the matrix",
    r"methods\.(Adversarial|Distilled)\.loss": "a subclass's",
    r"methods\.\w+\.(objective|ball|ascent|rule|distil|measure)": "a hook of `attack`, `loss` and `validate`",
    r"methods\.FERDDistillation\.(loss|load_state_dict)": "looks at nothing but models and images",
    r"evaluation\.RobustnessReport\.members": "of any name that is no AutoAttack there are none",
    r"models\.FrozenModel\.train": "takes a flag",
}
# Parameters without a kind, and why.
FREE = {
    **dict.fromkeys(("train_mode", "early_stop", "introspection", "detach_student"), "a flag"),
    **dict.fromkeys(("fold_batchnorm", "channels_last", "compile", "flip", "remargin"), "a flag"),
    **dict.fromkeys(("fast", "trust", "progress", "optimise_latents", "kl_mean"), "a flag"),
    "reset_generator": "a flag",
    **dict.fromkeys(("xlabel", "ylabel", "weights_label", "accuracy_label"), "matplotlib's"),
    "ranks": "of a private class, given by the trainer",
}


@pytest.fixture(autouse=True, scope="module")
def _files(tmp_path_factory):
    """Where the paths of the matrix lead."""
    with contextlib.chdir(tmp_path_factory.mktemp("matrix")):
        content = {"architecture": "small_cnn_2", "in_channels": 2, "num_classes": 4}
        weights = models.build_model("small_cnn_2", 4, in_channels=2).state_dict()
        torch.save(content | {"state_dict": weights}, "student.pt")
        REPORT.save("report.json")
        trainer.Checkpoints("saved").save({"epoch": 1}, 1)
        yield


def complaint(error, kind, says, fault):
    """What is wrong with an error, or nothing."""
    message = str(error)
    if type(error) is not kind:
        return f"{kind.__name__} expected, got {type(error).__name__}: {message}"
    problems = {
        "starts with another name": not re.match(rf"({says}): ", message),
        "does not name the argument": not re.search(rf"`[^`]*\b({fault})\b[^`]*`", message),
        "does not say what was expected": "expected" not in message,
        "does not say what came": "got " not in message,
        "has several lines": "\n" in message,
    }
    found = [problem for problem, there in problems.items() if there]
    return f"the message {' and '.join(found)}: {message}" if found else None


def verdict(where, arguments, outcome, fault):
    """What is wrong with a cell, or nothing."""
    case = CASES[where]
    try:
        result = case.target()(**arguments)
    except Exception as error:
        if isinstance(outcome, type):
            return complaint(error, outcome, case.says, fault)
        return f"expected to pass, got {type(error).__name__}: {error}"
    if isinstance(outcome, type):
        return f"{outcome.__name__} expected, but it passed"
    return None if outcome(result) else f"another result than expected: {result}"


def cells(where):
    """The cells that are not left out."""
    found = CASES[where].cells()
    return [cell for cell in found if not isinstance(cell[2], str)]


@pytest.mark.parametrize("where", CASES)
def test_each_cell(where):
    wrong = {name: verdict(where, *cell) for name, *cell in cells(where)}
    assert not {name: problem for name, problem in wrong.items() if problem}


def test_the_matrix_is_whole():
    n = sum(len(cells(where)) for where in CASES)
    left_out = sum(len(list(case.cells())) for case in CASES.values()) - n
    print(f"{n} cells of {len(CASES)} names, {left_out} left out")
    assert n >= 6000


def takes_input(value):
    """The parameters of a function, but for the object that it is a method of."""
    parameters = inspect.signature(value).parameters.values()
    named = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    return [name for name in named if name not in ("self", "cls")]


def public_names():
    """What a user can call with something: functions, classes, and methods of ferdlib's classes."""
    for package in PACKAGES:
        module = importlib.import_module(f"ferdlib.{package}")
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield f"{package}.{name}", value
            elif inspect.isclass(value) and not getattr(value, "_is_protocol", False):
                yield f"{package}.{name}", value
                yield from methods_of(f"{package}.{name}", value)


def methods_of(where, owner):
    settings = getattr(owner, "__dataclass_fields__", {})  # some are functions
    for name, value in inspect.getmembers(owner, inspect.isroutine):
        ours = (getattr(value, "__module__", None) or "").startswith("ferdlib.")
        public = not name.startswith("_") or name in ("__call__", "__getitem__")
        if ours and public and name not in settings and takes_input(value):
            yield f"{where}.{name}", value


def test_no_public_name_is_missing():
    names = {name for name, _ in public_names()}
    excused = {name for name in names if any(re.fullmatch(p, name) for p in NO_INPUT)}
    assert names - excused - CASES.keys() == set(), "without a line in the matrix"
    assert CASES.keys() - names == set(), "in the matrix, but not public"
    assert excused & CASES.keys() == set(), "both in the matrix and excused from it"
    unused = [p for p in NO_INPUT if not any(re.fullmatch(p, name) for name in names)]
    assert unused == []


def test_no_parameter_is_missing():
    for where, value in public_names():
        if where in CASES:
            missing = set(takes_input(value)) - CASES[where].arguments.keys() - FREE.keys()
            assert not missing, where


def test_the_matrix_finds_a_function_that_does_not_check():
    where = "metrics.average"
    outcomes = {name: outcome for name, _, outcome, _ in cells(where) if outcome is not anything}
    CASES[where].that(call=lambda acc: acc.mean())
    try:
        wrong = {name for name, *cell in cells(where) if verdict(where, *cell)}
    finally:
        CASES[where].that(call=None)
    assert wrong == outcomes.keys() - {"valid"}
