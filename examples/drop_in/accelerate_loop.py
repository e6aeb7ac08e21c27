"""An Accelerate loop with an attack in it, on one process or under DDP on several.

    pip install accelerate
    python examples/drop_in/accelerate_loop.py
    torchrun --standalone --nproc-per-node 2 examples/drop_in/accelerate_loop.py

The loss is TRADES' with uniform-target adversarial examples. On a CPU the processes talk through gloo.
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from ferdlib import losses
from ferdlib.attacks import utae_pgd
from ferdlib.models import small_cnn

BALL = {"eps": 0.1, "step_size": 0.025}


def main(epochs):
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16  # 8x8, in [0, 1]
    y = torch.tensor(load_digits().target)
    model = small_cnn(1, 10, width=8)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # The inner module is attacked, not the DistributedDataParallel around it, which does not support
    # `torch.autograd.grad`: every forward of the wrapper is a rendezvous of all processes that
    # overwrites BatchNorm buffers, and with `static_graph=True` the gradients come out wrong, without
    # an error.
    attacked = accelerator.unwrap_model(model)
    means = []
    for _ in range(epochs):
        epoch = []
        for images, labels in loader:
            x_adv = utae_pgd(attacked, images, **BALL)
            clean = model(images)
            robust = losses.kl_divergence(clean, model(x_adv))
            loss = F.cross_entropy(clean, labels) + 6 * robust.mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            epoch.append(loss.detach())
        means.append(accelerator.gather(torch.stack(epoch)).mean().item())
    weights = torch.nn.utils.parameters_to_vector(attacked.parameters()).detach()
    everyone = accelerator.gather(weights[None])
    accelerator.print(
        f"{accelerator.num_processes} processes: loss {means[0]:.3f} -> {means[-1]:.3f}, weights "
        f"moved by {(weights - start).norm():.3f}, processes differ by "
        f"{(everyone - weights).abs().max():g}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    main(parser.parse_args().epochs)
