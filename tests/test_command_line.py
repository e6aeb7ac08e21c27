"""The command line itself: help, wrong words, and what help may import."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time
from typing import get_args

import pytest
from commands import refused, run

from ferdlib.__main__ import COMMANDS, SEVERAL
from ferdlib.methods import METHODS
from ferdlib.methods.presets import RULES
from ferdlib.recipes import options
from ferdlib.trainer import FERDConfig

HELP = """
import sys
from ferdlib.__main__ import main
try:
    main([sys.argv[1], "--help"])
except SystemExit as stop:
    assert not stop.code
print(*(name for name in ("torch", "sklearn", "matplotlib", "numpy") if name in sys.modules))
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy_and_ends_with_two_examples(name):
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", HELP, name], capture_output=True, text=True, check=False
    )
    # A second on an idle machine; this one may be busy with other tests.
    assert time.perf_counter() - start < 20
    assert result.returncode == 0, result.stderr
    *_, heading, first, second, imported = result.stdout.split("\n")[:-1]
    assert (heading, imported) == ("examples:", "")
    assert all(line.startswith(f"  ferdlib {name}") for line in (first, second))


def help_of(name, *words, capsys):
    with pytest.raises(SystemExit) as stop:
        run(name, *words, "--help")
    assert stop.value.code == 0
    return re.sub(r"[\s│]+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_the_help_can_be_parsed(name):
    from ferdlib.__main__ import parse

    for example in COMMANDS[name][1:]:
        assert parse(name, example.split()[2:]) is not None


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_option_with_its_unit(name, capsys):
    text = help_of(name, capsys=capsys)

    def words(kind):
        for field in dataclasses.fields(kind):
            inner = getattr(options, str(field.type), None)
            if dataclasses.is_dataclass(inner):
                yield from words(inner)
            else:
                yield field.name.replace("_", "-")

    for word in words(getattr(options, name.capitalize())):
        assert f"--{word} " in text or f"--{word}," in text, word
    if "--eps" in text:
        assert "units of [0, 1] pixels" in text or "in units of" in text


def test_a_preset_shows_its_own_defaults(capsys):
    def default(words):
        text = help_of("distill", *words, capsys=capsys)
        return re.search(r"--attack-model .*?default: (\w+)\)", text)[1]

    assert default([]) == "student"
    assert default(["--preset", "paper"]) == "teacher"


def test_every_method_and_rule_is_a_choice():
    assert {*get_args(options.Method)} == {*METHODS, "natural"} - {"ferd"}
    assert {*get_args(options.Rule)} == {*RULES, "none"}


def test_ferds_options_are_the_fields_of_its_config():
    with_sizes = {"num_classes": 10, "layer": "", "image_shape": (3, 32, 32)}
    assert options.distill_defaults([]).ferd == FERDConfig(**with_sizes)
    assert options.distill_defaults(["--preset", "paper"]).ferd == FERDConfig.paper(**with_sizes)
    smoke = options.distill_defaults(["--smoke", "--preset=released"]).ferd
    assert (smoke.epochs, smoke.reset_generator) == (2, True)


def test_the_list_of_commands(capsys):
    run("--help")
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)
    run("--version")
    with pytest.raises(SystemExit, match="expected a command of quickstart, .*, got 'trian'"):
        run("trian")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train", "--epochs", "many"], "many"),
        (["train", "--method", "sit"], "sit"),
        (["distill", "--data", "cifar11"], "cifar11"),
        (["export"], "--student"),
        (["evaluate", "--colour", "red"], "--colour"),
        (["reproduce", "--seeds", "x"], "x"),
        (["quickstart", "--resume", "yes"], "yes"),
    ],
)
def test_words_that_cannot_be_read(words, part, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    assert part in capsys.readouterr().err


def test_a_config_that_contradicts_itself_is_a_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        run("distill", "--smoke", "--warmup-epochs", "9")
    text = f"{stop.value.code} {capsys.readouterr().err}"
    assert "expected `warmup_epochs` below `epochs`" in re.sub(r"[\s│]+", " ", text)


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {*SEVERAL}))
def test_commands_for_one_process_say_so(name, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "expected a single process, got 2; train, distill, evaluate run" in refused(name)


def test_python_dash_m_refuses_with_status_1(tmp_path):
    command = [sys.executable, "-m", "ferdlib", "train", "--eps", "-1", "--out", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert re.fullmatch(r"ferdlib train: expected --eps .*, got -1\.0\n", result.stderr)
    assert not any(tmp_path.iterdir())
