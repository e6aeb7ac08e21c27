"""The commands over several processes, as torchrun starts them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ferdlib.evaluation import RobustnessReport
from ferdlib.models import load_checkpoint, small_cnn

ROOT = Path(__file__).parents[1]


def launch(processes: int, *arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a command on so many processes; on a plain one for 1."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{path}"
    return subprocess.run(
        [sys.executable, *(run if processes > 1 else []), "-m", "ferdlib", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_ferd_starts_as_two_and_goes_on_as_one(tmp_path):
    command = ["distill", "--smoke", "--epochs", "3", "--out", str(tmp_path)]
    for words, where in (([], "1 of 2 of teacher"), (["--resume", "auto"], "1 of 3")):
        result = launch(2, *command, *words, "--max-minutes", "0")
        assert result.returncode == 0, result.stderr
        assert result.stdout.count(f"stopped after epoch {where}") == 1  # said once
    alone = launch(1, *command, "--resume", "auto")
    assert alone.returncode == 0, alone.stderr
    load_checkpoint(tmp_path / "student.pt")


def test_ferd_ends_with_one_report_of_all_images(tmp_path):
    result = launch(2, "distill", "--smoke", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^The student, default:", result.stdout, flags=re.MULTILINE)) == 1
    report = RobustnessReport.load(tmp_path / "report-student.json")
    assert report.index.tolist() == list(range(40))


def test_training_starts_as_two_and_goes_on_as_one(tmp_path):
    command = ["train", "--smoke", "--method", "mtard", "--rule", "fair", "--epochs", "3"]
    command += ["--out", str(tmp_path)]
    first = launch(2, *command, "--max-minutes", "0")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("stopped after epoch 1 of 2 of teacher") == 1  # said once
    second = launch(1, *command, "--resume", "auto")
    assert second.returncode == 0, second.stderr
    load_checkpoint(tmp_path / "student.pt")


@pytest.mark.parametrize("rule", ["dafa", "wat"])
def test_training_ends_with_one_report_of_all_images(rule, tmp_path):
    result = launch(2, "train", "--smoke", "--rule", rule, "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert len(re.findall(rf"^{rule}-ard, paper, ", result.stdout, flags=re.MULTILINE)) == 1
    assert len(RobustnessReport.load(tmp_path / "report.json")) == 40
    load_checkpoint(tmp_path / "student.pt")


def test_batches_that_cannot_be_shared(tmp_path):
    result = launch(2, "train", "--smoke", "--batch-size", "15", "--out", str(tmp_path / "a"))
    assert result.returncode != 0
    sentence = "ferdlib train: expected --batch-size to be a multiple of the 2 processes, got 15"
    assert sentence in result.stderr
    assert not (tmp_path / "a").exists()


FACTORY = """
import os
import torch
from ferdlib.models import small_cnn

def mine():
    torch.manual_seed(0)
    model = small_cnn(1, 10, width=2)
    if os.environ["RANK"] == "1":
        {change}
    return model
"""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("model.fc.weight.data.add_(1)", "the same model on every process, got others on rank 1"),
        (
            "model.register_forward_hook(lambda m, i, z: z + z.new_tensor(torch.nan) * (len(z) > 2))",
            "expected numbers as logits `model(x)`, got NaN",
        ),
    ],
    ids=["compared", "found"],
)
def test_every_process_says_what_one_has_found(change, sentence, tmp_path):
    (tmp_path / "nets.py").write_text(FACTORY.format(change=change))
    words = ["--data", "digits", "--factory", "nets:mine", "--protocol", "quick"]
    result = launch(2, "evaluate", *words, "--out", str(tmp_path / "out"), path=tmp_path)
    assert result.returncode != 0
    said = re.findall(rf"ferdlib evaluate: .*{re.escape(sentence)}.*", result.stderr)
    assert len(said) == 2
    assert "Traceback" not in result.stderr.partition("ChildFailedError")[0].partition(said[-1])[0]


def test_evaluation_does_not_depend_on_the_number(tmp_path):
    torch.manual_seed(0)
    checkpoint = tmp_path / "model.pt"
    torch.save(small_cnn(1, 10, width=4).state_dict(), checkpoint)
    command = ["evaluate", "--checkpoint", str(checkpoint), "--data", "digits"]
    command += ["--architecture", "small_cnn_4", "--protocol", "quick", "--eps", "0.1"]
    command += ["--test-images", "50"]
    reports = []
    for processes in (1, 3):
        out = tmp_path / str(processes)
        result = launch(processes, *command, "--out", str(out))
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("written to") == 1
        reports.append(RobustnessReport.load(out / "report.json"))
    assert reports[0] == reports[1]
