"""The documents say what is there: their code runs, and the names, fields and tests they name exist."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import ferdlib
from ferdlib.__main__ import parse
from ferdlib.trainer import FERDConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = sorted(p for p in [ROOT / "README.md", *DOCS.rglob("*.md")] if p.exists())
MODULES = ["ferdlib", *(m.name for m in pkgutil.walk_packages(ferdlib.__path__, "ferdlib."))]
# Recipes are used from the command line.
PUBLIC_MODULES = [m for m in MODULES if re.fullmatch(r"ferdlib\.(?!_|recipes)\w+", m)]
# Sections of the list of names; rules are used as `rules.DAFA`.
LISTED = [*PUBLIC_MODULES, "ferdlib.methods.rules"]
# Protocols, and results of something else: their examples are those of their users or makers.
WITHOUT_EXAMPLE = {"AutoAttackResult", "EpochStats", "Method", "Source"}
# Methods that are used like `SAT` and `ARD`.
WITHOUT_EXAMPLE |= {"ABSLD", "AdaAD", "BAT", "IAD", "MTARD", "RSLAD", "TRADES"}
# Bases, whose subclasses have some; old names; and calls that need other processes.
WITHOUT_EXAMPLE |= {"Adversarial", "Distilled", "create", "first_ahead", "join"}
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
    """The public functions and classes of a module: those in `__all__`, or all; re-exports have another home."""
    module = importlib.import_module(module_name)
    names = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
    home = ".".join(module_name.split(".")[:2])
    found = {name: getattr(module, name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and f"{value.__module__}.".startswith(f"{home}.")
    }


PUBLIC = [(m, name) for m in PUBLIC_MODULES for name in public(m)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_code_in_the_documents_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": path.stem}
    for code in python_blocks(path.read_text("utf-8")):
        if code is not None:
            exec(compile(code, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_commands_in_the_documents_parse(path):
    text = path.read_text("utf-8").replace("\\\n", " ")
    for name, options in re.findall(
        r"^(?:torchrun .* -m )?ferdlib ([a-z]+)((?: --.*)?)$", text, re.M
    ):
        parse(name, shlex.split(options, comments=True))


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


def test_the_api_list_has_a_section_for_each_module():
    text = (DOCS / "api.md").read_text("utf-8")
    assert sorted(re.findall(r"^## (\S+)$", text, flags=re.MULTILINE)) == sorted(LISTED)


@pytest.mark.parametrize("module", LISTED)
def test_the_api_list_names_what_is_public_and_nothing_else(module):
    text = (DOCS / "api.md").read_text("utf-8")
    sections = dict(
        re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    )
    listed = re.findall(r"^- `(\w+)`: ", sections[module], flags=re.MULTILINE)
    assert sorted(listed) == sorted(public(module))


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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_to_files_and_headings_lead_somewhere(path):
    for link in re.findall(r"\]\(([^):\s]+)\)", path.read_text("utf-8")):
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        titles = (
            re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE) if heading else []
        )
        assert not heading or heading in {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles
        }


def test_a_name_that_is_not_there_is_found():
    with pytest.raises(ModuleNotFoundError, match="no_such_loss"):
        resolve("ferdlib.losses.no_such_loss")


def entries():
    """The headings of the paper map's third level, `Name: title`, and the text of each."""
    found = re.findall(r"^### (.+?): .*\n((?:(?!##).*\n)*)", PAPER_MAP, flags=re.MULTILINE)
    names = [name for name, _ in found]
    assert len(set(names)) == len(names)
    return dict(found)


def test_every_equation_has_a_heading_with_function_and_test():
    ferd = [f"FERD Eq. {n}" for n in [*range(1, 12), "12–23", *range(24, 29)]]
    fair_ard = [f"Fair-ARD Eq. {n}" for n in range(1, 8)]
    found = entries()
    assert [name for name in found if " Eq. " in name] == ferd + fair_ard
    for name in {*ferd, *fair_ard} - {"FERD Eq. 3", "FERD Eq. 12–23"}:
        assert re.search(r"`ferdlib\.\w+", found[name]), name
        assert re.search(r"`tests/\w+\.py::test_\w+`", found[name]), name


def test_every_line_of_the_algorithm_is_there():
    table = PAPER_MAP.split("### FERD Algorithm 1\n")[1].split("\n| Question")[0]
    assert re.findall(r"^\| (\d+) ", table, flags=re.MULTILINE) == [str(n) for n in range(1, 18)]


def test_every_method_and_every_rule_has_a_heading():
    kinds = {value for name, value in public("ferdlib.methods").items() if inspect.isclass(value)}
    rules = importlib.import_module("ferdlib.methods.rules")
    text = "".join(entries().values())
    for name in ["SAT", "TRADES", "BAT", "ARD", "IAD", "RSLAD", "MTARD", "AdaAD", "ABSLD"]:
        assert f"`ferdlib.methods.{name}`" in entries()[name]
        assert getattr(importlib.import_module("ferdlib.methods"), name) in kinds
    for name in set(rules.__all__) - {"Rule", "Uniform"}:
        assert f"`ferdlib.methods.rules.{name}`" in text, name


def test_every_row_of_a_table_has_the_cells_of_its_header():
    for table in re.findall(r"(?:^\|.*\n)+", PAPER_MAP, flags=re.MULTILINE):
        counts = {line.count("|") for line in table.splitlines()}
        assert len(counts) == 1, table[:200]
        assert not re.search(r"\| *\|", table), table[:200]


def test_every_field_of_the_config_is_named():
    for field in dataclasses.fields(FERDConfig):
        assert f"`{field.name}`" in PAPER_MAP, field.name


def test_the_table_of_defaults_is_the_code():
    table = PAPER_MAP.split("## Defaults and presets")[1].split("Fields without")[0]
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
