"""The mixture of `drop_in.py` as a PyTorch Lightning module, trained with the immunity loss.

    pip install '.[train]' pytorch-lightning
    python examples/lightning_module.py

Automatic optimisation does, for the loss is one scalar. What Lightning adds to think of: validation runs without
gradients, so it can tell the accuracy but not the loss, which takes a gradient itself.
"""

import argparse
from typing import Any

import torch
from drop_in import digits, resnet10
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from immunity_fast import ImmunityMoE

try:
    import lightning as L
except ImportError:  # the same under its other name
    import pytorch_lightning as L


class Mixture(L.LightningModule):
    """Three ResNets and a gate, and the loss that pushes their heatmaps apart."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ImmunityMoE.from_experts([resnet10() for _ in range(3)], stage="layer1")

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.model.deterministic()(images)  # log-probabilities, the same at every call
        return outputs

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        loss, terms = self.model(images, labels, return_terms=True)  # the whole loss, through the model's own forward
        self.log_dict({"loss": loss, **terms._asdict()}, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        self.log("validation_accuracy", (self(images).argmax(-1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.005, momentum=0.9)


def fit(steps: int, **trainer_options: Any) -> tuple[Mixture, dict[str, float]]:
    """A mixture trained on digits for `steps` batches of 32, and what it logged last."""
    L.seed_everything(0)
    images, labels, test_images, test_labels = digits("cpu")
    train = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True, drop_last=True)
    test = DataLoader(TensorDataset(test_images, test_labels), batch_size=120)
    mixture = Mixture()
    trainer = L.Trainer(
        max_steps=steps,
        val_check_interval=steps,  # once, at the end
        check_val_every_n_epoch=None,
        logger=False,
        enable_checkpointing=False,
        **trainer_options,
    )
    trainer.fit(mixture, train, test)
    return mixture, {name: float(value) for name, value in trainer.callback_metrics.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Three ResNets on digits, in PyTorch Lightning.")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of 32 images (default: 60)")
    _, metrics = fit(parser.parse_args().steps)
    for name, value in metrics.items():
        print(f"{name:24}{value:12,.2f}")


if __name__ == "__main__":
    main()
