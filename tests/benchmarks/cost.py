"""The arithmetic of an epoch of FERD, part by part: counted while it runs, beside what the passes predict.

    python -m tests.benchmarks.cost

A pass of a model is its multiply-adds on a batch, counted once; a gradient to the images costs another one, a
gradient to the weights a third. Counted are convolutions and matrix products, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ferdlib.models import build_model
from ferdlib.models.likeness import PROBE
from ferdlib.synthesis import Generator
from ferdlib.trainer import FERDConfig, FERDTrainer

SIZES: dict[str, Any] = {
    "num_classes": 10,
    "layer": "block3",
    "epochs": 1,
    "warmup_epochs": 0,
    "batch_size": 16,
    "generator_steps": 2,
    "student_steps": 4,
}
TEACHER, STUDENT = "wide_resnet_16_4", "resnet18"
PARTS = {
    "synthesize": "generation",
    "update_class_probabilities": "margins on the teacher",
    "distill_step": "student steps",
}


class MultiplyAdds(TorchDispatchMode):
    """Those of all operators inside the block; torch's own counter stumbles over gradients to images alone."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            counted = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
            self.total += counted // 2
        return result


def one_pass(model: nn.Module, *inputs: torch.Tensor) -> int:
    with MultiplyAdds() as counter, torch.no_grad():
        model(*inputs)
    return counter.total


def counted(config: FERDConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Measured and predicted multiply-adds of an epoch's parts."""
    torch.manual_seed(0)
    teacher, student = (build_model(name, config.num_classes).eval() for name in (TEACHER, STUDENT))
    labels = config.num_classes if config.conditional_generator else None
    generator = Generator(config.image_shape, num_classes=labels)
    trainer = FERDTrainer(teacher, student, generator, config=config)
    measured = dict.fromkeys(PARTS.values(), 0)
    for method, part in PARTS.items():
        for _ in range(config.student_steps if method == "distill_step" else 1):
            with MultiplyAdds() as counter:
                getattr(trainer, method)()
            measured[part] += counter.total

    x, y = torch.rand(config.batch_size, *config.image_shape), torch.arange(config.batch_size) % 10
    t, s = one_pass(teacher, x), one_pass(student, x)
    codes = torch.randn(config.batch_size, config.latent_dim)
    g = one_pass(generator, *((codes, y) if config.conditional_generator else (codes,)))
    attack = 2 * config.attack_steps
    on_teacher = config.attack_model == "teacher" and config.augment == "none"
    kept = t * (1 + attack) if on_teacher else 0.0  # once, when the batch is stored
    step = 6 * s if on_teacher else 6 * s + attack * s + t
    # Models and their copies run forward and backward, once.
    compared = 4 * PROBE / config.batch_size
    predicted = {
        PARTS["synthesize"]: config.generator_steps * (2 * t + 2 * s + 3 * g) + kept + compared * t,
        PARTS["update_class_probabilities"]: (2 * config.margin_attack_steps + 1) * t,
        PARTS["distill_step"]: config.student_steps * step + (0 if on_teacher else compared * s),
    }
    return measured, predicted


def main() -> None:
    print(
        f"Teacher {TEACHER}, student {STUDENT}, {SIZES['batch_size']} images of 32x32 pixels, "
        f"{SIZES['generator_steps']} generator and {SIZES['student_steps']} student steps; "
        "10^9 multiply-adds of an epoch."
    )
    print("\n| preset | part | predicted | counted | counted / predicted |\n|---|---|---|---|---|")
    for preset in ("paper", "released"):
        measured, predicted = counted(getattr(FERDConfig, preset)(**SIZES))
        for part, value in predicted.items():
            print(
                f"| {preset} | {part} | {value / 1e9:.2f} | {measured[part] / 1e9:.2f} | "
                f"{measured[part] / value:.3f} |"
            )


if __name__ == "__main__":
    main()
