"""One step of each of FERD's stages at the paper's full size: WRN-34-10 teacher, ResNet-18 student.

python -m pytest tests/benchmarks/full_size.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# In a process of its own, whose peak memory is this step's alone.
PROGRAM = """
import json, resource, sys, time
import torch
from ferdlib.models import resnet18, wide_resnet
from ferdlib.trainer import FERDConfig, FERDTrainer

torch.manual_seed(0)
config = getattr(FERDConfig, sys.argv[1])(
    num_classes=10, layer="bn1", batch_size=8, generator_steps=1, margin_attack_steps=1
)
trainer = FERDTrainer(wide_resnet(34, 10), resnet18(10), config=config)
before = {k: v.clone() for k, v in trainer.student.state_dict().items()}
figures = {}
for name in ("synthesize", "update_class_probabilities", "distill_step"):
    start = time.perf_counter()
    result = getattr(trainer, name)()
    figures[name] = time.perf_counter() - start
figures["loss"] = float(result)
figures["changed"] = any(not torch.equal(v, before[k]) for k, v in trainer.student.state_dict().items())
figures["images"] = list(trainer.pool.sample(8)[0].shape)
figures["p"] = trainer.class_probabilities.tolist()
figures["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(figures))
"""


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_one_step_of_each_stage(preset, capsys):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, preset],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    with capsys.disabled():
        seconds = ", ".join(
            f"{name} {figures[name]:.0f} s"
            for name in ("synthesize", "update_class_probabilities", "distill_step")
        )
        print(f"\n{preset}: batch 8, {seconds}; peak memory {figures['peak_mib']:.0f} MiB")
    assert figures["images"] == [8, 3, 32, 32]
    assert figures["changed"]
    assert 0 < figures["loss"] < float("inf")
    assert sum(figures["p"]) == pytest.approx(1)
    assert figures["peak_mib"] < 8192
