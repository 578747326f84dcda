"""A data set, a callback and a table of one's own in the package's Trainer; seconds on a CPU.

pip install '.[train]'
python examples/own_loop.py
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from immunity_fast.training import Callback, CSVLogger, EarlyStopping, TrainConfig, Trainer


class Squares(Dataset[Any]):
    """Grey noise with a bright square in one of four corners, which is the class."""

    def __init__(self, count: int) -> None:
        self.targets = [index % 4 for index in range(count)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = self.targets[index]
        image = 0.5 * torch.rand(3, 16, 16)  # drawn anew in each epoch, and again the same where a run goes on
        top, left = 8 * (label // 2), 8 * (label % 2)
        image[:, top : top + 8, left : left + 8] += 0.5
        return image, label


class Fastest(Callback):
    """Remembers the epoch with the most images a second."""

    epoch = 0

    def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self.epoch = max(trainer.history, key=lambda each: each["images_per_second"])["epoch"]


def main(epochs: int = 3) -> list[dict[str, Any]]:
    fastest = Fastest()
    config = TrainConfig(experts=2, epochs=epochs, batch_size=16, check_images=0, device="cpu", rotation=0.0)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "epochs.csv"
        trainer = Trainer(
            config,
            train=Squares(64),
            validation=Squares(16),
            callbacks=[fastest, EarlyStopping(patience=2)],
            loggers=CSVLogger(table),
        )
        history = trainer.fit()
        print(table.read_text(encoding="utf-8").splitlines()[0])
    for record in history:
        print(f"epoch {record['epoch']}: loss {record['loss']:.3f}, accuracy {record['val_accuracy_mean']:.2f}")
    print(f"fastest: epoch {fastest.epoch}")
    return history


if __name__ == "__main__":
    main()
