"""FERD from end to end on a CPU, in minutes and without a download.

A robust teacher is trained on scikit-learn's 1,797 digits (8x8 pixels), the data are put away, and a student a
sixth of its size is distilled from the teacher alone. Both are then attacked on the 540 test digits. The models
are chosen by nothing: the last epoch counts, and the test digits only measure it.

`ferdlib quickstart` is the same job with checkpoints, and with the ablation of FERD's parts (`--ablate`).
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ferdlib.attacks import pgd
from ferdlib.evaluation import PROTOCOLS, compare, evaluate
from ferdlib.models import small_cnn
from ferdlib.plots import plot_classes, plot_images, plot_weights
from ferdlib.trainer import FERDConfig, FERDTrainer

# Threat model: L-infinity, a tenth of the grey scale; steps of a quarter of that.
EPS = 0.1
# A teacher of 1,000 images overfits; trained at a larger radius it is more robust at the smaller one.
TEACHER_EPS = 0.14


def digits(seed):
    """1,000 digits to train the teacher and 540 to report, grey values in [0, 1]; 257 are for choices."""
    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(bunch.target)
    rest, test = train_test_split(range(len(y)), test_size=540, random_state=seed, stratify=y)
    train, _ = train_test_split(rest, test_size=257, random_state=seed, stratify=y[rest])
    return (x[train], y[train]), (x[test], y[test])


def train_teacher(x, y, epochs, seed):
    """PGD adversarial training (Madry et al. 2018) with averaged weights."""
    rng = torch.Generator().manual_seed(seed)
    model = small_cnn(1, 10, width=40).to(memory_format=torch.channels_last)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    settings = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **settings)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * len(x.split(100)))
    ball = {"eps": TEACHER_EPS, "step_size": TEACHER_EPS / 4, "steps": 7}
    for _ in tqdm(range(epochs), "teacher, adversarial training", unit="epoch"):
        for i in torch.randperm(len(x), generator=rng).split(100):
            x_adv = pgd(model, x[i], y[i], **ball, rng=rng)
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y[i]).backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
    return averaged.module.eval()


def distil(teacher, epochs, seed):
    """FERD with the sizes of this small problem, which were chosen on the 257 digits."""
    config = FERDConfig(
        num_classes=10,
        layer="layer4",
        image_shape=(1, 8, 8),
        epochs=epochs,
        warmup_epochs=min(3, epochs - 1),
        batch_size=128,
        generator_steps=30,
        generator_width=32,
        generator_lr=5e-3,
        latent_lr=0.05,
        bn_loss_weight=1.0,
        student_steps=80,
        eps=EPS,
        step_size=EPS / 4,
        augment="none",
    )
    student = small_cnn(1, 10, width=16).to(memory_format=torch.channels_last)
    trainer = FERDTrainer(teacher, student, config=config, seed=seed)
    with tqdm(total=epochs, desc="student, FERD", unit="epoch") as bar:
        for stats in trainer.epochs():
            bar.set_postfix_str(f"labels agree {stats.label_agreement:.0%}")
            bar.update()
    return trainer


def draw(reports, trainer, out):
    """Both models class by class, the weights beside the student's classes, and synthetic images."""
    found = {name: report["PGD-20"] for name, report in reports.items()}
    accuracies = {name: result.class_accuracy for name, result in found.items()}
    intervals = {name: result.class_interval for name, result in found.items()}
    images = trainer.pool.sample(len(trainer.pool))
    figures = {
        "classwise": plot_classes(accuracies, intervals=intervals, ylabel="PGD-20 accuracy (%)"),
        "weights": plot_weights(trainer.class_probabilities, accuracies["student"]),
        "synthetic": plot_images(*images, num_classes=10),
    }
    for name, axes in figures.items():
        axes.figure.savefig(out / f"{name}.png", dpi=150)


def main(seed=0, teacher_epochs=30, epochs=30, out=Path("runs/quickstart")):
    torch.manual_seed(seed)
    train, test = digits(seed)
    teacher = train_teacher(*train, teacher_epochs, seed)
    trainer = distil(teacher, epochs, seed)
    protocol = PROTOCOLS["fair-ard"].at(eps=EPS).with_seed(seed).without("AutoAttack")
    reports = {}
    for name, model in {"teacher": teacher, "student": trainer.student}.items():
        reports[name] = evaluate(model, test, protocol, num_classes=10, progress=name)
    comparison = compare(reports)
    test = comparison.test("student", "teacher", "PGD-20")
    print(f"\n{comparison}\n\n{test}\n\n{reports['student']}\n")
    out.mkdir(parents=True, exist_ok=True)
    for name, report in reports.items():
        report.save(out / f"report-{name}.json")
    draw(reports, trainer, out)
    torch.save(trainer.student.state_dict(), out / "student.pt")
    print(f"written to {out}/: two reports, three pictures, student.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"--seed": 0, "--teacher-epochs": 30, "--epochs": 30}.items():
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    main(**vars(parser.parse_args()))
