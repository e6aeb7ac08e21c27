"""The package as a user gets it: version, type marker, and what importing it brings along."""

import importlib.metadata
import importlib.resources
import subprocess
import sys

import ferdlib

MODULES = (
    "ferdlib, ferdlib.attacks, ferdlib.augment, ferdlib.bottleneck, ferdlib.evaluation, "
    "ferdlib.losses, ferdlib.methods, ferdlib.metrics, ferdlib.models, ferdlib.plots, "
    "ferdlib.reweight, ferdlib.synthesis, ferdlib.trainer"
)
LATE = {"matplotlib", "pyautoattack", "sklearn", "tensorboard", "torchvision", "tqdm", "tyro"}

# torch imports some of these itself where they are installed (tqdm): what it brought is forgotten
# first, so that whatever is there afterwards came with the statement.
PROGRAM = """
import sys, torch
late = set(sys.argv[2:])
for name in [n for n in sys.modules if n.partition(".")[0] in late]:
    del sys.modules[name]
exec(sys.argv[1])
print(*sorted({n.partition(".")[0] for n in sys.modules} & late))
"""


def late_imports(statement: str) -> set[str]:
    """Which of LATE a fresh interpreter has loaded after `statement`."""
    command = [sys.executable, "-c", PROGRAM, statement, *sorted(LATE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_imports_bring_no_extra_no_torchvision_and_no_pyautoattack():
    assert late_imports(f"import {MODULES}") == set()


def test_late_imports_sees_an_import():
    assert late_imports("import ferdlib, tqdm.auto") == {"tqdm"}


def test_import_ferdlib_alone_does_not_import_torch():
    program = "import sys, ferdlib; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_version_is_the_installed_one():
    assert ferdlib.__version__ == importlib.metadata.version("ferdlib")


def test_the_package_says_that_it_is_typed():
    assert importlib.resources.files(ferdlib).joinpath("py.typed").is_file()
