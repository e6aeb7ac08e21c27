"""Class-wise robustness of several models, as the examples print it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ferdlib import metrics
from ferdlib.attacks import autoattack, cw_linf, fgsm, pgd

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
Results = dict[str, dict[str, Tensor]]


def attacks(
    eps: float,
    step_size: float,
    seed: int,
    *,
    steps: int = 20,
    num_classes: int = 10,
    with_autoattack: bool = False,
) -> dict[str, Attack]:
    """The papers' columns, in the order of strength; PGD and CW-inf start uniformly."""
    rng = torch.Generator()
    stepped = {"eps": eps, "step_size": step_size, "steps": steps}
    columns: dict[str, Attack] = {
        "clean": lambda model, x, y: x,
        "FGSM": lambda model, x, y: fgsm(model, x, y, eps=eps),
        f"PGD-{steps}": lambda model, x, y: pgd(model, x, y, **stepped, rng=rng.manual_seed(seed)),
        "CW-inf": lambda model, x, y: cw_linf(model, x, y, **stepped, rng=rng.manual_seed(seed)),
    }
    if with_autoattack:
        columns["AutoAttack"] = lambda model, x, y: (
            autoattack(model, x, y, num_classes=num_classes, eps=eps, seed=seed).x_adv
        )
    return columns


def class_accuracies(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    columns: dict[str, Attack],
    *,
    num_classes: int = 10,
    batch_size: int = 1000,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Class-wise accuracy under each attack, `(K,)` each."""
    found = {}
    for name, attack in columns.items():
        counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            images, labels = images.to(device), labels.to(device)
            with torch.no_grad():
                predictions = model(attack(model, images, labels)).argmax(dim=1)
            counts += metrics.confusion_matrix(predictions, labels, num_classes).cpu()
        found[name] = metrics.class_accuracy(counts)
    return found


def print_table(results: Results, class_names: tuple[str, ...] | None = None) -> None:
    """One row per model; per attack the average, the worst class and its name, and NSD."""
    columns = list(next(iter(results.values())))
    width = max(len(name) for name in results)
    print(f"\n{'':{width}}" + "".join(f" | {name:^22}" for name in columns))
    print(f"{'':{width}}" + " |   avg   worst     NSD " * len(columns))
    print("-" * (width + 25 * len(columns)))
    for model, row in results.items():
        cells = []
        for accuracy in row.values():
            worst = int(accuracy.argmin())
            cells.append(
                f" | {100 * metrics.average(accuracy):5.1f} {100 * accuracy[worst]:5.1f} ({worst})"
                f" {metrics.nsd(accuracy):6.3f} "
            )
        print(f"{model:{width}}" + "".join(cells))
    print("in %: average over classes, worst class (which one); NSD = SD / mean over classes")
    if class_names:
        shown = {int(accuracy.argmin()) for row in results.values() for accuracy in row.values()}
        print("; ".join(f"({c}) {class_names[c]}" for c in sorted(shown)))
    print()
