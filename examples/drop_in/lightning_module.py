"""A Lightning module that attacks in its training step, trained by DDP on two CPU processes.

    pip install lightning
    python examples/drop_in/lightning_module.py

Lightning starts the second process itself. The loss is TRADES' with uniform-target adversarial examples;
the validation runs PGD-20 and adds up a confusion matrix over the processes.
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from ferdlib import losses, metrics
from ferdlib.attacks import pgd, utae_pgd
from ferdlib.models import small_cnn

BALL = {"eps": 0.1, "step_size": 0.025}


class RobustClassifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = small_cnn(1, 10, width=8)
        self.losses = []

    def training_step(self, batch, batch_index):
        x, y = batch
        # The inner module is attacked, not the DistributedDataParallel around it (here
        # `self.trainer.model`), which does not support `torch.autograd.grad`: every forward of the
        # wrapper is a rendezvous of all processes that overwrites BatchNorm buffers, and with
        # `static_graph=True` the gradients come out wrong, without an error.
        x_adv = utae_pgd(self.model, x, **BALL)
        clean = self.model(x)
        robust = losses.kl_divergence(clean, self.model(x_adv))
        loss = F.cross_entropy(clean, y) + 6 * robust.mean()
        self.losses.append(loss.item())
        return loss

    def on_validation_epoch_start(self):
        self.confusion = torch.zeros(10, 10, dtype=torch.int64, device=self.device)

    def validation_step(self, batch, batch_index):
        x, y = batch  # the attack works under Lightning's inference mode, too
        predictions = self.model(pgd(self.model, x, y, steps=20, **BALL)).argmax(dim=1)
        self.confusion += metrics.confusion_matrix(predictions, y, num_classes=10)

    def on_validation_epoch_end(self):
        self.confusion = self.trainer.strategy.reduce(self.confusion, reduce_op="sum")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main(devices, epochs):
    L.seed_everything(0, verbose=False)
    x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16  # 8x8, in [0, 1]
    y = torch.tensor(load_digits().target)
    train, test = torch.randperm(len(x)).split([1257, 540])
    module = RobustClassifier()
    start = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp",
        max_epochs=epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module,
        DataLoader(TensorDataset(x[train], y[train]), batch_size=50, shuffle=True),
        DataLoader(TensorDataset(x[test], y[test]), batch_size=135),
    )
    weights = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
    everyone = module.all_gather(weights).reshape(-1, len(weights))
    if trainer.is_global_zero:
        accuracy = metrics.class_accuracy(module.confusion)
        print(
            f"{trainer.world_size} processes, {int(module.confusion.sum())} test digits: PGD-20 "
            f"average {metrics.average(accuracy):.1%}, worst class {metrics.worst_class(accuracy):.1%}"
        )
        print(
            f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}, weights moved by "
            f"{(weights - start).norm():.3f}, processes differ by "
            f"{(everyone - weights).abs().max():g}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    main(arguments.devices, arguments.epochs)
