"""The documents say what is there: their code runs, and the names, fields and tests they name exist."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import ferdlib
from ferdlib.trainer import FERDConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = sorted(p for p in [ROOT / "README.md", *DOCS.rglob("*.md")] if p.exists())
MODULES = ["ferdlib", *(m.name for m in pkgutil.walk_packages(ferdlib.__path__, "ferdlib."))]
PUBLIC_MODULES = [m for m in MODULES if m.count(".") == 1 and "._" not in m]
# Protocols, and what something else returns: their examples are those of what uses or makes them.
WITHOUT_EXAMPLE = {"AutoAttackResult", "EpochStats", "Method", "Source"}
WITHOUT_EXAMPLE |= {"Adversarial", "Distilled", "Fair"}  # their subclasses have some
WITHOUT_EXAMPLE |= {"Comparison", "PairedTest", "RobustnessReport"}
WITHOUT_EXAMPLE |= {"MobileNetV2", "PreActResNet", "SmallCNN", "WideResNet"}
BLOCK = re.compile(
    r"(?:<!--\s*not run:(?P<reason>.*?)-->\s*)?^(?P<indent> *)```python\n(?P<code>.*?)^ *```$",
    flags=re.MULTILINE | re.DOTALL,
)


def python_blocks(text):
    """The code of each python block, or the reason why it is not run."""
    for block in BLOCK.finditer(text):
        reason = block["reason"]
        assert reason is None or reason.strip(), "`not run:` without a reason"
        code = inspect.cleandoc("\n" + block["code"]) if block["indent"] else block["code"]
        lines_above = text[: block.start("code")].count("\n")
        yield None if reason else "\n" * lines_above + code


def public(module_name):
    """The public functions and classes of a module: those in `__all__`, or those it defines itself."""
    module = importlib.import_module(module_name)
    names = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
    found = {name: getattr(module, name) for name in names}
    kinds = (inspect.isfunction, inspect.isclass)
    home = module_name if not hasattr(module, "__all__") else "ferdlib"
    return {
        name: value
        for name, value in found.items()
        if any(kind(value) for kind in kinds) and value.__module__.startswith(home)
    }


PUBLIC = [(m, name) for m in PUBLIC_MODULES for name in public(m)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_code_in_the_documents_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": path.stem}
    for code in python_blocks(path.read_text("utf-8")):
        if code is not None:
            exec(compile(code, str(path), "exec"), namespace)


def test_blocks_are_found_skipped_and_refused():
    text = "<!-- not run: downloads -->\n```python\nfetch()\n```\n\n```python\nx = 1\n```\n```\nno\n```\n"
    assert list(python_blocks(text)) == [None, "\n" * 6 + "x = 1\n"]
    assert list(python_blocks("- item\n\n  ```python\n  x = 1\n  ```\n")) == ["\n" * 3 + "x = 1"]
    with pytest.raises(AssertionError, match="without a reason"):
        list(python_blocks("<!-- not run: -->\n```python\nfetch()\n```\n"))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_run(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples; see stdout"


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_every_public_name_has_a_docstring_with_an_example(module, name):
    value = public(module)[name]
    # A dataclass or a subclass may inherit a docstring; that would not be about this name.
    text = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    assert text
    assert not text.startswith(f"{name}(")
    assert ">>> " in text or name in WITHOUT_EXAMPLE


def test_names_without_an_example_are_public():
    assert {name for _, name in PUBLIC} >= WITHOUT_EXAMPLE


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_the_api_list_names_what_is_public_and_nothing_else(module):
    text = (DOCS / "api.md").read_text("utf-8")
    sections = dict(
        re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    )
    listed = re.findall(r"^- `(\w+)`: ", sections[module], flags=re.MULTILINE)
    assert sorted(listed) == sorted(public(module))
    assert set(sections) == set(PUBLIC_MODULES)


PAPER_MAP = (DOCS / "paper-map.md").read_text("utf-8")


def resolve(dotted):
    """The object of a dotted path, through modules as far as there are some, then attributes."""
    parts = dotted.split(".")
    found = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:i]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_named_functions_and_tests_exist(path):
    text = path.read_text("utf-8")
    for dotted in re.findall(r"`(ferdlib(?:\.\w+)+)", text):
        resolve(dotted)
    for file, test in re.findall(r"\b(tests/\w+\.py)::(\w+)", text):
        nodes = ast.parse((ROOT / file).read_text("utf-8")).body
        assert test in {n.name for n in nodes if isinstance(n, ast.FunctionDef)}, f"{file}::{test}"


def test_a_name_that_is_not_there_is_found():
    with pytest.raises(ModuleNotFoundError, match="no_such_loss"):
        resolve("ferdlib.losses.no_such_loss")


def rows(first_cell):
    """The cells of each row of the paper map whose first cell matches, its backticks aside."""
    for line in PAPER_MAP.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and re.fullmatch(first_cell, cells[0].strip("`")):
            yield cells


def test_every_equation_and_every_row_is_there_once():
    ferd = [f"FERD {n}" for n in [*range(1, 12), *range(24, 29)]]
    fair_ard = [f"Fair-ARD {n}" for n in range(1, 8)]
    assert [cells[0] for cells in rows(r"(FERD|Fair-ARD) \d+")] == ferd + fair_ard
    assert re.search(r"^FERD 12-23 ", PAPER_MAP, flags=re.MULTILINE)
    assert [cells[0] for cells in rows("[a-z]")] == list("abcdefghijklm")
    algorithm = [str(n) for n in range(1, 18)]
    assert [cells[0] for cells in rows(r"\d+")] == algorithm + [str(n) for n in range(1, 34)]


def test_every_row_of_a_table_has_the_cells_of_its_header():
    for table in re.findall(r"(?:^\|.*\n)+", PAPER_MAP, flags=re.MULTILINE):
        counts = {line.count("|") for line in table.splitlines()}
        assert len(counts) == 1, table[:200]
        assert not re.search(r"\| *\|", table), table[:200]


def test_every_field_of_the_config_is_named():
    for field in dataclasses.fields(FERDConfig):
        assert f"`{field.name}`" in PAPER_MAP, field.name


def test_the_table_of_defaults_is_the_code():
    table = PAPER_MAP.split("### Defaults that differ")[1].split("###")[0]
    listed = re.findall(
        r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.+) \|$", table, flags=re.MULTILINE
    )
    settings = {"num_classes": 10, "layer": "layer4"}
    presets = [make(**settings) for make in (FERDConfig, FERDConfig.paper, FERDConfig.released)]
    for name, *values, _ in listed:
        assert [ast.literal_eval(v) for v in values] == [getattr(p, name) for p in presets], name
    differing = {
        field.name
        for field in dataclasses.fields(FERDConfig)
        if len({repr(getattr(p, field.name)) for p in presets}) > 1
    }
    assert differing <= {name for name, *_ in listed}
