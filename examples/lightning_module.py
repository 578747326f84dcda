"""The mixture of `drop_in.py` in PyTorch Lightning, by the package's own LightningModule.

pip install '.[train]' pytorch-lightning
python examples/lightning_module.py
"""

import argparse
from typing import Any

from drop_in import digits, resnet10
from torch.utils.data import DataLoader, TensorDataset

try:
    import lightning.pytorch as L
except ImportError:  # the same under its other name
    import pytorch_lightning as L

from immunity_fast import ImmunityMoE
from immunity_fast.training import ImmunityLightningModule, TrainConfig


def fit(steps: int, **trainer_options: Any) -> tuple[ImmunityLightningModule, dict[str, float]]:
    """A mixture trained on digits for `steps` batches of 32, and what it logged last."""
    L.seed_everything(0)
    images, labels, test_images, test_labels = digits("cpu")
    train = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True, drop_last=True)
    test = DataLoader(TensorDataset(test_images, test_labels), batch_size=120)
    model = ImmunityMoE.from_experts([resnet10() for _ in range(3)], stage="layer1", image_size=images.shape[-1])
    mixture = ImmunityLightningModule(model, TrainConfig(lr=0.005, schedule="constant"))
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
