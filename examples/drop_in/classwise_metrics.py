"""Class-wise figures from an evaluation loop that only counted the correct ones.

One line in the loop adds up a confusion matrix; all figures are read from it afterwards. On digits, in
seconds on a CPU:

    python examples/drop_in/classwise_metrics.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from ferdlib import metrics
from ferdlib.attacks import pgd
from ferdlib.models import small_cnn

BALL = {"eps": 0.1, "step_size": 0.025}


def evaluate(model, loader, num_classes):
    """Somebody's loop: accuracy under PGD-20; and the counts that the class-wise figures need."""
    correct = total = 0
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    model.eval()
    for images, labels in loader:
        x_adv = pgd(model, images, labels, steps=20, **BALL)
        with torch.no_grad():
            predictions = model(x_adv).argmax(dim=1)
        correct += (predictions == labels).sum().item()
        total += len(labels)
        confusion += metrics.confusion_matrix(predictions, labels, num_classes)  # the added line
    return correct / total, confusion


def report(confusion):
    """Rows are true classes; a class without samples is nan and counts in no figure."""
    accuracy = metrics.class_accuracy(confusion)
    print("class:   ", "  ".join(f"{c:>4}" for c in range(len(accuracy))))
    print("accuracy:", "  ".join(f"{a:4.0%}" for a in accuracy))
    print(
        f"average {metrics.average(accuracy):.4f}, worst class {metrics.worst_class(accuracy):.4f}, "
        f"worst 10 % {metrics.worst_fraction(accuracy, 0.1):.4f}, NSD {metrics.nsd(accuracy):.4f}"
    )


def main(steps=80, seed=0):
    torch.manual_seed(seed)
    x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16  # 8x8, in [0, 1]
    y = torch.tensor(load_digits().target)
    train, test = torch.randperm(len(x)).split([1257, 540])
    model = small_cnn(1, 10, width=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):  # somebody's adversarial training
        i = train[torch.randint(len(train), (50,))]
        optimizer.zero_grad()
        F.cross_entropy(model(pgd(model, x[i], y[i], steps=5, **BALL)), y[i]).backward()
        optimizer.step()
    loader = DataLoader(TensorDataset(x[test], y[test]), batch_size=128)
    robust, confusion = evaluate(model, loader, num_classes=10)
    print(f"accuracy under PGD-20: {robust:.4f}")
    report(confusion)


if __name__ == "__main__":
    main()
