"""Runs tests/on_card.py in a process of its own: torch keeps a foreign device, and its threads, to the end."""

import subprocess
import sys
from pathlib import Path


def test_everything_runs_on_an_accelerator(request):
    settings = ["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider"]
    settings += ["--device", request.config.getoption("device")]
    command = [sys.executable, "-m", "pytest", *settings, Path(__file__).with_name("on_card.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:]
