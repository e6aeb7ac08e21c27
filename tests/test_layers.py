"""The layers of ferdlib hold, and the rules that say so can fail."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "from importlinter.cli import lint_imports_command as run; run()"
CONTRACT = "Each layer imports only the layers before it"
PROCESSES = "Primitives and evaluation know nothing of processes"
# The rooms that may speak to other processes.
DISTRIBUTED = {
    "_meeting.py",
    "distributed.py",
    "synthesis",
    "methods",
    "trainer",
    "recipes",
    "__main__.py",
}


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the `ferdlib` of `root`, whichever one is installed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, "--no-cache"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ferdlib", tmp_path / "ferdlib", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def append(path: Path, line: str) -> None:
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")


def test_the_layers_hold():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{CONTRACT} KEPT" in result.stdout
    assert f"{PROCESSES} KEPT" in result.stdout
    assert "2 kept, 0 broken" in result.stdout


def test_an_unchanged_copy_passes(copy):
    result = lint_imports(copy)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("importer", "line", "contract", "broken"),
    [
        pytest.param(
            "losses/__init__.py",
            "from ferdlib.trainer import FERDConfig",
            CONTRACT,
            "ferdlib.losses is not allowed to import ferdlib.trainer",
            id="upward",
        ),
        pytest.param(
            "metrics.py",
            "from ferdlib.reweight import normalize",
            CONTRACT,
            "ferdlib.metrics is not allowed to import ferdlib.reweight",
            id="sibling",
        ),
        pytest.param(
            "augment.py",
            "def late():\n    import ferdlib.trainer",
            CONTRACT,
            "ferdlib.augment is not allowed to import ferdlib.trainer",
            id="inside a function",
        ),
        pytest.param(
            "bottleneck.py",
            "from ferdlib.distributed import Ranks",
            PROCESSES,
            "ferdlib.bottleneck is not allowed to import ferdlib.distributed",
            id="processes",
        ),
    ],
)
def test_a_forbidden_import_is_found(copy, importer, line, contract, broken):
    append(copy / "ferdlib" / importer, line)
    result = lint_imports(copy)
    assert result.returncode != 0
    assert f"{contract} BROKEN" in result.stdout
    assert broken in result.stdout


def test_a_module_without_a_layer_is_found(copy):
    stray = copy / "ferdlib" / "stray.py"
    stray.write_text('"""In no layer."""\n', encoding="utf-8")
    result = lint_imports(copy)
    assert result.returncode != 0
    assert f"{CONTRACT} BROKEN" in result.stdout
    assert "ferdlib.stray" in result.stdout


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_torch_distributed_is_named_in_its_rooms_only():
    files = (ROOT / "ferdlib").rglob("*.py")
    users = {
        path.relative_to(ROOT / "ferdlib").parts[0]
        for path in files
        if any(name.startswith("torch.distributed") for name in imported(path))
    }
    assert "distributed.py" in users  # or this test sees nothing
    assert users <= DISTRIBUTED


def test_an_example_can_be_copied_alone():
    examples = sorted((ROOT / "examples").rglob("*.py"))
    names = {path.stem for path in examples}
    assert {"quickstart", "cifar10_ferd"} <= names
    for path in examples:
        assert not imported(path) & (names - {path.stem}), path
