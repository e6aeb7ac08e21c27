"""Adversarially robust distillation (ARD, Goldblum et al. 2020) on digits; five lines make it Fair-ARD.

In `ard.py` the student is attacked with cross-entropy and learns the teacher's clean prediction at
temperature 30. `ard_reweighted.py` is the same file but for five lines: the attack counts its least
steps on the way, and last epoch's class weights multiply the loss (Fair-ARD Eq. 5 to 7, with the
release's clip). On a CPU, in seconds and without a download:

    python examples/drop_in/ard.py
    python examples/drop_in/ard_reweighted.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from ferdlib import attacks, losses, metrics
from ferdlib.models import small_cnn
from ferdlib.reweight import ClassWeights, lps_power, normalize

BALL = {"eps": 0.1, "step_size": 0.025}
TEMPERATURE, ALPHA = 30.0, 1.0


def adversarial_training(model, x, y, epochs):
    """Somebody's robust teacher."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(50):
            x_adv = attacks.pgd(model, x[i], y[i], **BALL, steps=5)
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y[i]).backward()
            optimizer.step()


def distil(teacher, student, x, y, epochs):
    """ARD's loop."""
    weights = ClassWeights(10, lambda kappa: normalize(lps_power(kappa), clip=(5 / 6, 5 / 2)))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(50):
            x_adv, steps = attacks.least_pgd_steps(student, x[i], y[i], **BALL)
            with torch.no_grad():
                reference = teacher(x[i])
            kl = losses.distillation(student(x_adv), reference, temperature=TEMPERATURE)
            ce = losses.cross_entropy(student(x[i]), y[i])
            # The release's KLDivLoss divides by the number of classes, 10, too.
            loss = ALPHA * TEMPERATURE**2 / 10 * kl + (1 - ALPHA) * ce
            optimizer.zero_grad()
            (weights(steps, y[i]) * loss).mean().backward()
            optimizer.step()
        weights.step()


def main(teacher_epochs=5, epochs=6, seed=0):
    torch.manual_seed(seed)
    x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16  # 8x8, in [0, 1]
    y = torch.tensor(load_digits().target)
    train, test = torch.randperm(len(x)).split([1257, 540])
    teacher, student = small_cnn(1, 10, width=12), small_cnn(1, 10, width=8)
    adversarial_training(teacher, x[train], y[train], teacher_epochs)
    distil(teacher.eval(), student, x[train], y[train], epochs)
    student.eval()
    x_adv = attacks.pgd(student, x[test], y[test], **BALL, steps=20)
    confusion = metrics.confusion_matrix(student(x_adv).argmax(dim=1), y[test], num_classes=10)
    accuracy = metrics.class_accuracy(confusion)
    print(
        f"student under PGD-20: average {metrics.average(accuracy):.1%}, worst class "
        f"{metrics.worst_class(accuracy):.1%}, NSD {metrics.nsd(accuracy):.3f}"
    )
    return accuracy


if __name__ == "__main__":
    main()
