"""TRADES (Zhang et al. 2019) with uniform-target adversarial examples in place of its own.

TRADES attacks with the divergence from the model's clean prediction. `utae_pgd` does the same, and pulls
the prediction towards the uniform distribution (FERD Eq. 10), so that the examples of a class lean to no
class in particular. With `gamma=0` it is TRADES' own attack. On digits, in seconds on a CPU:

    python examples/drop_in/trades_utae.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from ferdlib import losses, metrics
from ferdlib.attacks import pgd, utae_pgd
from ferdlib.models import small_cnn

BALL = {"eps": 0.1, "step_size": 0.025}
BETA = 6.0  # TRADES' weight of the robust term


def train(model, x, y, epochs, gamma):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(50):
            # Without reference logits, the reference is the model's own clean prediction.
            x_adv = utae_pgd(model, x[i], gamma=gamma, **BALL)
            clean = model(x[i])
            robust = losses.kl_divergence(clean, model(x_adv))
            loss = F.cross_entropy(clean, y[i]) + BETA * robust.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main(epochs=6, gamma=0.5, seed=0):
    torch.manual_seed(seed)
    x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16  # 8x8, in [0, 1]
    y = torch.tensor(load_digits().target)
    fit, test = torch.randperm(len(x)).split([1257, 540])
    model = small_cnn(1, 10, width=8)
    train(model, x[fit], y[fit], epochs, gamma)
    model.eval()
    x_adv = pgd(model, x[test], y[test], steps=20, **BALL)
    confusion = metrics.confusion_matrix(model(x_adv).argmax(dim=1), y[test], num_classes=10)
    accuracy = metrics.class_accuracy(confusion)
    print(
        f"PGD-20: average {metrics.average(accuracy):.1%}, worst class "
        f"{metrics.worst_class(accuracy):.1%}; entropy of where the errors go, 1 is uniform: "
        f"{metrics.target_entropy(confusion).nanmean():.2f}"
    )
    return accuracy


if __name__ == "__main__":
    main()
