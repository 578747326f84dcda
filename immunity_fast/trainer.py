"""A training run in memory: what it consists of, how all of it is saved, and what is measured after an epoch."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from immunity_fast.attacks import pgd
from immunity_fast.checkpoint import (
    load_checkpoint,
    load_module,
    load_optimizer_tensors,
    module_tensors,
    optimizer_tensors,
    under,
)
from immunity_fast.config import TrainConfig
from immunity_fast.data import ImageDataset
from immunity_fast.loader import TrainLoader
from immunity_fast.metrics import EVALUATION_BATCH, batches, correct, heatmap_metrics, sample
from immunity_fast.model import ImmunityMoE
from immunity_fast.step import MEASURED


class Trainer:
    """A run in memory: model, optimiser, batches and random states, and where it stands.

    `tensors` and `info` are all of it that a checkpoint holds; `load` takes up from them.
    """

    def __init__(self, config: TrainConfig, dataset: ImageDataset, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.dataset = dataset.to(device)
        torch.manual_seed(config.seed)
        self.description = {
            "arch": config.arch,
            "num_experts": config.experts,
            "num_classes": dataset.num_classes,
            "stage": config.stage,
            "image_size": list(dataset.image_size),
        }
        mean, std = channel_statistics(dataset.train.images)
        self.gate_generator = torch.Generator().manual_seed(config.seed + 1)
        self.model = ImmunityMoE(
            config.arch,
            config.experts,
            dataset.num_classes,
            stage=config.stage,
            image_size=dataset.image_size,
            generator=self.gate_generator,
            mean=mean,
            std=std,
        ).to(device)
        self.loss_fn = config.loss_fn(dataset.image_size)
        self.optimizer = SGD(
            self.model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=True
        )
        self.loader = TrainLoader(
            self.dataset.train,
            config.batch_size,
            config.seed + 2,
            padding=config.crop_padding,
            degrees=config.rotation,
            flip=dataset.flip if config.flip == "auto" else config.flip == "on",
        )
        self.fingerprint = dataset.fingerprint()
        self.epoch = 0  # epochs finished
        self.sums = torch.zeros(len(MEASURED), dtype=torch.float64, device=device)  # over the present epoch's steps

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self.epoch * len(self.loader) + self.loader.position

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the rest of the run depends on, and is a tensor."""
        random = {"random/torch": torch.get_rng_state(), "random/gate": self.gate_generator.get_state()}
        if self.device.type == "cuda":
            random["random/cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            **module_tensors("model", self.model),
            **optimizer_tensors("optimizer", self.optimizer),
            **{f"loader/{name}": value for name, value in self.loader.state().items()},
            **random,
            "sums": self.sums,
        }

    def info(self) -> dict[str, Any]:
        """What JSON can hold of the run's place and nature."""
        return {"model": self.description, "data": self.fingerprint, "epoch": self.epoch, "step": self.step}

    def load(self, path: Path) -> None:
        """Take up where a checkpoint was written; ValueError where it is another run's."""
        tensors, info = load_checkpoint(path)
        load_module(path, self.model, under("model", tensors))
        if info["model"] != self.description:
            raise ValueError(f"{path}: of another model: {info['model']}, expected {self.description}")
        if info["data"] != self.fingerprint:
            raise ValueError(f"{path}: trained on other data than {self.config.dataset} as it is now")
        load_optimizer_tensors(self.optimizer, under("optimizer", tensors))
        self.loader.load_state(under("loader", tensors))
        random = under("random", tensors)
        torch.set_rng_state(random["torch"])
        self.gate_generator.set_state(random["gate"])
        if self.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.device)
        self.sums = tensors["sums"].to(self.device)
        self.epoch = info["epoch"]


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 images (n, 3, H, W), in units of [0, 1]."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    levels = torch.arange(256, dtype=torch.float64, device=images.device) / 255
    mean = counts @ levels / counts.sum(1)
    variance = counts @ levels.square() / counts.sum(1) - mean.square()
    return mean.tolist(), variance.clamp_min(0).sqrt().clamp_min(1 / 255).tolist()


def training_means(trainer: Trainer) -> dict[str, float]:
    """Means over the finished epoch's batches of what `train_step` measures, and the mutual information they mean."""
    means = dict(zip(MEASURED, (trainer.sums / len(trainer.loader)).tolist(), strict=True))
    experts = trainer.config.experts
    return means | {"mutual_information": math.log(experts) - means["mutual_information_loss"] / experts}


def validate(trainer: Trainer) -> dict[str, float]:
    """Accuracies and heatmap measures on the validation split; PGD attacks the exact mean and is judged on it."""
    model, validation, config = trainer.model.eval(), trainer.dataset.validation, trainer.config
    right = [correct(model, images, labels) for images, labels in batches(validation, EVALUATION_BATCH)]
    measured = {
        "val_accuracy_switching": sum(count["sample"] for count in right) / len(validation),
        "val_accuracy_mean": sum(count["mean"] for count in right) / len(validation),
    }
    checked = sample(validation, config.check_images)
    if len(checked):
        starts = torch.Generator().manual_seed(config.seed)
        survived = 0
        for images, labels in batches(checked, EVALUATION_BATCH):
            with model.gate.switched("mean"):
                attacked = pgd(model, images, labels, steps=10, generator=starts)
            survived += correct(model, attacked, labels)["mean"]
        measured["val_pgd10_accuracy_mean"] = survived / len(checked)
        heatmaps = heatmap_metrics(model, trainer.loss_fn, checked, EVALUATION_BATCH)
        measured |= {f"val_{name}": value for name, value in heatmaps.items()}
    model.train()
    return measured
