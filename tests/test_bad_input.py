"""Every public function refuses bad input in one sentence, and leaves everything else as it was.

The tables are in tests/bad_input, one for each module.
"""

import contextlib
import importlib
import inspect
import pkgutil
import random
import re

import bad_input
import pytest
import torch
from bad_input.table import CALLS, Call

from ferdlib import metrics

TABLES = [m.name for m in pkgutil.iter_modules(bad_input.__path__) if m.name != "table"]
MODULES = [importlib.import_module(f"bad_input.{name}") for name in TABLES]

# Patterns of public names without a row, and why.
NO_ROWS = {
    r"\w+\.(AutoAttackResult|EpochStats)": "a record",
    r"evaluation\.(AttackResult|Comparison|Finding|PairedTest|RobustnessReport)": "a record",
    r"evaluation\.Protocol\.without": "takes any number of names",
    r"evaluation\.RobustnessReport\.members": "of a name that is no AutoAttack there are none",
    r"synthesis\.Inversion\.optimizer": "a function among the settings",
    r"augment\.Crops\.__getitem__": "torch's errors",
    r"attacks\.StepCounter\.see": "raises under the name of the attack that counts",
    r"models\.(SmallCNN|WideResNet|PreActResNet|MobileNetV2|FrozenModel)": "made by a function that checks",
    r"models\.\w+\.forward": "torch's errors",
    r"models\.FrozenModel\.train": "takes a flag",
    r"(models|methods)\.create": "the old name of build_model and build_method",
    r"methods\.(\w+\.)*(ascend|terms|reference|ball|watch|combine|bind)": "called by attack and loss",
    r"methods\.(\w+\.)+(measure|weigh)": "called by validate and end_epoch",
    r"methods\.rules\.\w+\.(validate|load_state_dict)": "called by a method's",
    r"methods\.(Recipe|teacher_logits)|checkpoints\.write_file": "look at nothing",
}
# Parameters without a row, and why.
FREE = {
    **dict.fromkeys(("train_mode", "early_stop", "introspection", "detach_student"), "a flag"),
    "weigh_teacher": "a flag",
    **dict.fromkeys(("fold_batchnorm", "channels_last", "compile", "flip", "remargin"), "a flag"),
    **dict.fromkeys(("xlabel", "ylabel", "weights_label", "accuracy_label"), "matplotlib's"),
    **dict.fromkeys(("step", "x_adv", "name"), "not looked at, where a table has no rows"),
    **dict.fromkeys(("fast", "trust", "progress"), "a flag"),
    "ranks": "the processes, given by the trainer",
}


@pytest.fixture(autouse=True, scope="module")
def _files(tmp_path_factory):
    """Go to an empty folder, and let each table write the files that its paths lead to."""
    with contextlib.chdir(tmp_path_factory.mktemp("files")):
        for table in MODULES:
            getattr(table, "files", list)()
        yield


def run(call: Call, changes: dict[str, object]) -> None:
    arguments = call.valid | changes
    make = arguments.pop("self", None)
    owner = [make()] if make else []
    call.says = call.says or name_of(call.function, *owner)
    call.function(*owner, **arguments)


def name_of(function, owner=None) -> str:
    """Return the name that errors start with: the function's, the class's, or Class.method."""
    name, kind = function.__name__, type(owner).__name__
    if owner is None:
        return re.escape(function.__qualname__)
    return kind if name in ("__call__", "forward") else rf"{kind}(\.{name})?"


def versions(values) -> list[int]:
    """Return how often each tensor among these values was written to."""
    tensors = []
    for value in values:
        if isinstance(value, torch.nn.Module):
            tensors += [*value.parameters(), *value.buffers()]
        elif isinstance(value, torch.Tensor):
            tensors.append(value)
    return [t._version for t in tensors]


def problems(call: Call, changes: dict[str, object], error: type[Exception], fragment: str):
    """Yield all that is wrong with what a call with these changes raises."""
    values = (call.valid | changes).values()
    before = versions(values), torch.get_rng_state().tolist(), random.getstate()
    try:
        run(call, changes)
    except Exception as raised:
        message = str(raised)
        if type(raised) is not error:
            yield f"{error.__name__} expected, got {type(raised).__name__}: {message}"
        if not re.match(rf"({call.says}): ", message):
            yield f"starts with another name than {call.says}: {message}"
        named = rf"`[^`]*\b({'|'.join(changes)})\b[^`]*`"
        # A fragment may name another argument itself, and a wrong moment is the fault of none.
        anonymous = "`" in fragment or error is RuntimeError
        if not anonymous and not re.search(named, message):
            yield f"does not name the argument: {message}"
        if "expected" not in message or "got " not in message:
            yield f"does not say what was expected and what came: {message}"
        if fragment not in message or "\n" in message:
            yield f"does not say {fragment!r} in one line: {message}"
    else:
        yield f"{error.__name__} expected, but it passed"
    if before != (versions(values), torch.get_rng_state().tolist(), random.getstate()):
        yield "changed its input or the global random state"


every_call = pytest.mark.parametrize("call", CALLS.values(), ids=lambda c: c.function.__qualname__)


@every_call
def test_the_valid_call_passes(call):
    run(call, {})


@every_call
def test_each_row_is_refused(call):
    wrong = [f"{str(row[0])[:99]}: {each}" for row in call for each in problems(call, *row)]
    assert [*call]
    assert not wrong, "\n".join(wrong)


def parameters(function) -> list[str]:
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.kind is not p.VAR_KEYWORD and p.name not in ("self", "cls")]


def public_names():
    """Yield what a user can call with something: functions, classes, and their public methods."""
    for table in [*TABLES, "methods.rules"]:
        module = importlib.import_module(f"ferdlib.{table}")
        for name in module.__all__:
            value = getattr(module, name)
            if not callable(value) or getattr(value, "_is_protocol", False):
                continue
            yield f"{table}.{name}", value
            for method, each in inspect.getmembers(value, inspect.isfunction):
                ours = each.__module__.startswith("ferdlib.")
                called = not method.startswith("_") or method in ("__call__", "__getitem__")
                if inspect.isclass(value) and ours and called:
                    yield f"{table}.{name}.{method}", each


def test_no_public_name_and_no_parameter_is_forgotten():
    found = {name: value for name, value in public_names() if parameters(value)}
    excused = {name for name in found if any(re.fullmatch(p, name) for p in NO_ROWS)}
    assert {name for name, value in found.items() if value not in CALLS} - excused == set()
    for value, call in CALLS.items():
        spoilt = {argument for changes, *_ in call for argument in changes}
        # A method that only has its moment does not look at what it is given.
        assert spoilt == {"self"} or set(parameters(value)) - spoilt - FREE.keys() == set(), value
    assert all(any(re.fullmatch(p, name) for name in found) for p in NO_ROWS)


def test_a_function_that_does_not_check_is_found():
    call = Call(lambda acc: acc.mean(), {}, "average", CALLS[metrics.average].rows)
    assert all([*problems(call, *row)] for row in call)
