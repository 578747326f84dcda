"""A mixture's training as a LightningModule, for whoever has data, devices and loggers in PyTorch Lightning."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from immunity_fast.data.augmentation import as_float
from immunity_fast.data.own import as_targets, check_range, parted
from immunity_fast.evaluation.metrics import correct
from immunity_fast.models.moe import CIFAR10_MEAN, CIFAR10_STD, ImmunityMoE
from immunity_fast.models.recomputing import check_recomputable
from immunity_fast.targets import hard_labels
from immunity_fast.training.checkpoint import described_model
from immunity_fast.training.config import TrainConfig


def _package() -> Any:
    """Lightning, by the name under which the program has it: a trainer of one takes no module of the other.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    names = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
    loaded = next((name for name in names.values() if name in sys.modules), None)
    found = next((names[name] for name in names if find_spec(name) is not None), None)
    if loaded is None and found is None:
        raise ModuleNotFoundError(
            "ImmunityLightningModule needs PyTorch Lightning, which is not installed: pip install pytorch-lightning",
            name="pytorch_lightning",
        )
    return import_module(str(loaded or found))


lightning: Any = _package()

# Settings that say how images become batches or how weights are kept, which is Lightning's here.
LEFT_TO_OTHERS = {"adversarial": "off", "mixup": 0.0, "cutmix": 0.0, "ema": None, "shard": False, "auto_batch": False}
LEFT_TO_OTHERS |= {"poison": None, "shards": False, "ensemble": "immunity", "gate": "auto", "adversary": "mixture"}


class ImmunityLightningModule(lightning.LightningModule):  # type: ignore[misc]
    """Trains a mixture with the whole loss, by the settings' optimiser, groups and schedule; logs what records have.

    Batches are (images, targets), or dictionaries as those of Hugging Face: images uint8 or floating-point in [0, 1],
    targets class numbers (B,) or probabilities (B, K). They are trained on as they come: crops, mixing and the like are
    the data loader's. Precision, devices, accumulated batches and clipping are Lightning's, too.

    In training it logs "loss", "cross_entropy", "mutual_information_loss", "position_stability" and
    "mutual_information", in validation "val_accuracy_mean" and "val_accuracy_sample", in a test these with ``test_``.

    Args:
        model: what is trained, an `ImmunityMoE`; or a `TrainConfig`, or such as a dictionary, by which one is made.
        config: the settings, where `model` is a model; None are `TrainConfig`'s.
        num_classes, image_size, channels, mean, std: of a model that is made.
        classes: the classes' names, for the model.

    Raises:
        TypeError: neither a model nor settings.
        ValueError: settings that have no effect here.
    """

    def __init__(
        self,
        model: ImmunityMoE | TrainConfig | Mapping[str, Any] | None = None,
        config: TrainConfig | Mapping[str, Any] | None = None,
        *,
        num_classes: int = 10,
        image_size: int | Sequence[int] = 32,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, (TrainConfig, Mapping)):
            if config is not None:
                raise TypeError("model: expected a model beside config, got settings twice")
            model, config = None, model
        if model is not None and not isinstance(model, ImmunityMoE):
            raise TypeError(f"model: expected an ImmunityMoE or a TrainConfig, got {type(model).__name__}")
        if isinstance(config, Mapping):
            config = TrainConfig.from_json(dict(config))
        self.config = TrainConfig() if config is None else config
        for name, value in LEFT_TO_OTHERS.items():
            if getattr(self.config, name) != value:
                raise ValueError(
                    f"{name}: expected {value} in a LightningModule, which trains on batches as they come, got "
                    f"{getattr(self.config, name)}; immunity_fast.training.Trainer knows it"
                )
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if model is None:
            model = self._made(num_classes, (height, width), channels, mean, std)
        if classes is not None:
            model.classes = tuple(classes)
        self.model = model
        weights = None
        if self.config.class_weights is not None:
            if self.config.class_weights == "balanced":
                raise ValueError(
                    "class_weights: expected numbers in a LightningModule, which sees no labels before, got balanced"
                )
            weights = self.config.weights_of_classes(torch.zeros(0, dtype=torch.int64), model.num_classes)
        if self.config.checkpoint_activations:
            check_recomputable(model)
            model.checkpoint_activations = True
        model.loss_fn = self.config.loss_fn(model.image_size, class_weights=weights)
        self._checked = False
        self.save_hyperparameters(
            {
                "config": self.config.to_json(),
                "num_classes": model.num_classes,
                "image_size": list(model.image_size),
                "channels": model.channels,
                "classes": None if model.classes is None else list(model.classes),
            }
        )

    def _made(
        self,
        num_classes: int,
        image_size: tuple[int, int],
        channels: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> ImmunityMoE:
        config = self.config
        description = {
            "arch": config.arch,
            "num_experts": config.experts,
            "num_classes": num_classes,
            "stage": config.stage,
            "image_size": image_size,
            "stem": config.stem,
            "channels": channels,
        }
        usual = (CIFAR10_MEAN, CIFAR10_STD) if channels == 3 else ([0.5] * channels, [0.25] * channels)
        return described_model(description, batching=config.batching, mean=mean or usual[0], std=std or usual[1])

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, K), by the exact mean of the gate's permutations: the same at every call."""
        found: Tensor = self.model.deterministic()(as_float(images))
        return found

    def training_step(self, batch: Any, index: int) -> Tensor:
        """The loss of a batch."""
        images, targets = self._batch(batch)
        loss, terms = self.model(images, targets, return_terms=True)
        experts = self.model.num_experts
        measured = {
            "loss": loss.detach(),
            "cross_entropy": terms.cross_entropy,
            "mutual_information_loss": terms.mutual_information,
            "position_stability": terms.position_stability,
            "mutual_information": math.log(experts) - terms.mutual_information / experts,
        }
        named = {name: value.detach() for name, value in measured.items()}
        self.log_dict(named, on_step=True, on_epoch=False, prog_bar=False, batch_size=len(images))
        found: Tensor = loss
        return found

    def validation_step(self, batch: Any, index: int) -> None:
        """The accuracies of a batch."""
        self._log_accuracies("val", batch)

    def test_step(self, batch: Any, index: int) -> None:
        """The accuracies of a batch."""
        self._log_accuracies("test", batch)

    def predict_step(self, batch: Any, index: int = 0) -> Tensor:
        """Log-probabilities (B, K) of a batch of images, with targets or without."""
        images = batch if isinstance(batch, Tensor) else parted(batch, "batch")[0]
        found: Tensor = self(images)
        return found

    def configure_optimizers(self) -> dict[str, Any]:
        """The settings' optimiser, whose groups know what decays, and its schedule over Lightning's steps."""
        config = self.config
        optimizer = config.optimizer_of(self.model)
        steps = float(self.trainer.estimated_stepping_batches)
        if not math.isfinite(steps):
            if config.schedule != "constant":
                raise ValueError(
                    f"schedule: expected constant where Lightning's Trainer has no max_epochs or max_steps, got "
                    f"{config.schedule}"
                )
            return {"optimizer": optimizer}
        epochs = max(1, self.trainer.max_epochs or 1) if (self.trainer.max_epochs or -1) > 0 else config.epochs
        each = max(1, round(steps / epochs))
        rates = dataclasses.replace(config.learning_rate(each), steps=int(steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates(step) / config.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _batch(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, targets = parted(batch, "batch")
        if not self._checked and images.is_floating_point():
            check_range(images, "batch")  # of the first batch, since it waits for the device
        self._checked = True
        return as_float(images).to(self.dtype), as_targets(targets, "batch")

    def _log_accuracies(self, part: str, batch: Any) -> None:
        images, targets = self._batch(batch)
        right = correct(self.model, images, hard_labels(targets))
        named = {f"{part}_accuracy_{name}": count / len(images) for name, count in right.items()}
        self.log_dict(named, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images), sync_dist=True)
