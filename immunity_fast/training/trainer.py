"""A training run in memory: what it consists of, how all of it is saved, and what is measured after an epoch."""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunity_fast.attacks import Attack, NotFiniteError
from immunity_fast.data.datasets import ImageDataset, Split
from immunity_fast.data.loader import Batch, TrainLoader
from immunity_fast.data.sampling import EVALUATION_BATCH, batches, sample
from immunity_fast.evaluation.metrics import correct, heatmap_metrics
from immunity_fast.functional import log_mixture
from immunity_fast.models.modes import frozen
from immunity_fast.models.moe import ImmunityMoE, SingleNetwork
from immunity_fast.runtime import distributed
from immunity_fast.runtime.compilation import Compiled, Log, at_size, resolve
from immunity_fast.runtime.failures import one_line
from immunity_fast.runtime.files import shown
from immunity_fast.runtime.strategies import fastest
from immunity_fast.training.adversarial import InnerAttack
from immunity_fast.training.checkpoint import (
    check_classes,
    check_tensors,
    has_info,
    load_checkpoint,
    load_module,
    load_optimizer_tensors,
    module_tensors,
    optimizer_tensors,
    under,
)
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.ema import WeightAverage
from immunity_fast.training.optimizer import FusedSGD
from immunity_fast.training.step import MEASURED, TrainStep, cosine_lr

CUDA_STATE = 16  # bytes of a GPU's generator


class Trainer:
    """A run in memory: model, optimiser, batches and random states, and where it stands.

    `tensors` and `info` are all of it that a checkpoint holds; `load` takes up from them.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: ImageDataset,
        device: torch.device,
        log: Log | None = None,
        traceback_file: Path | None = None,
    ) -> None:
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
        self.loader = TrainLoader(
            self.dataset.train,
            config.batch_size,
            config.seed + 2,
            padding=config.crop_padding,
            degrees=config.rotation,
            flip=dataset.flip if config.flip == "auto" else config.flip == "on",
            rank=distributed.rank(),
            processes=distributed.count(),
        )
        mean, std = channel_statistics(dataset.train.images)
        self.gate_generator = torch.Generator().manual_seed(config.seed + 1)
        compiled = resolve(config.compile, device) != "off"
        strategy = fastest(device.type, config.arch, self.steps if compiled else None)
        options: dict[str, Any] = {
            "stage": config.stage,
            "image_size": dataset.image_size,
            "batching": strategy.batching if config.batching == "auto" else config.batching,
            "mean": mean,
            "std": std,
        }
        if config.experts == 1:
            self.model: ImmunityMoE = SingleNetwork(config.arch, dataset.num_classes, **options).to(device)
        else:
            mixture = ImmunityMoE(
                config.arch, config.experts, dataset.num_classes, generator=self.gate_generator, **options
            )
            self.model = mixture.to(device)
        if distributed.rank():  # whatever is random in a network: not the same in every process
            torch.manual_seed(config.seed + 3 + distributed.rank())
        group = distributed.group()
        self.loss_fn = config.loss_fn(dataset.image_size, "" if group is None else group.group_name)
        self.optimizer = FusedSGD(
            self.model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=True
        )
        attack = None
        if config.inner_attack is not None:
            attack = InnerAttack(
                self.model,
                config.inner_attack,
                amp=config.amp,
                compile=config.compile,
                device=device,
                log=log,
                traceback_file=traceback_file,
            )
        self.average = None if config.ema is None else WeightAverage(self.model, config.ema)
        self.train_step = TrainStep(
            self.model,
            self.loss_fn,
            self.optimizer,
            clip_grad_norm=config.clip_grad_norm,
            amp=config.amp,
            double_backprop=(strategy.double_backprop if config.double_backprop == "auto" else config.double_backprop),
            compile=config.compile,
            log=log,
            traceback_file=traceback_file,
            attack=attack,
            trades_weight=config.trades_weight,
            group=group,
        )
        self._expert_logits = Compiled(self.model.expert_logits, config.compile, device, log, traceback_file)
        self.fingerprint = dataset.fingerprint()
        self.epoch = 0  # epochs finished
        self.kept = 0  # optimiser steps that the run's checkpoint has
        self.sums = torch.zeros(len(MEASURED), dtype=torch.float64, device=device)  # over the present epoch's steps

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self.epoch * len(self.loader) + self.loader.position

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.epochs * len(self.loader)

    @property
    def lr(self) -> float:
        """The learning rate of the step that was taken last."""
        last: float = self.optimizer.param_groups[0]["lr"]
        return last

    def advance(self, batch: Batch) -> None:
        """Take the step of the batch that the loader gave last."""
        for group in self.optimizer.param_groups:
            group["lr"] = cosine_lr(self.config.lr, self.step - 1, self.steps)
        self.sums += self.train_step(*batch)
        if self.average is not None:
            self.average.update()

    def expert_logits(self, images: Tensor) -> Tensor:
        """`model.expert_logits` of at most `EVALUATION_BATCH` images, by code that is compiled for one size only."""
        return at_size(self._expert_logits, images, min(EVALUATION_BATCH, len(self.dataset.validation)))

    def synchronize(self) -> None:
        """Make what each process has measured on its samples the same in all; before anything is made of it."""
        self.sums = distributed.mean(self.sums)
        distributed.average_buffers(self.model)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the rest of the run depends on, and is a tensor."""
        random = {"random/torch": torch.get_rng_state(), "random/gate": self.gate_generator.get_state()}
        if self.device.type == "cuda":
            random["random/cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            **module_tensors("model", self.model),
            **optimizer_tensors("optimizer", self.optimizer),
            **{f"loader/{name}": value for name, value in self.loader.state().items()},
            **{f"scaler/{name}": torch.tensor(value) for name, value in self.train_step.scaler.state_dict().items()},
            **({f"ema/{name}": value for name, value in self.average.tensors().items()} if self.average else {}),
            **random,
            "sums": self.sums,
        }

    def info(self) -> dict[str, Any]:
        """What JSON can hold of the run's place and nature."""
        return {
            "model": self.description,
            "data": self.fingerprint,
            "classes": list(self.dataset.classes),
            "epoch": self.epoch,
            "step": self.step,
            # Parameters that have had a gradient, which need not be all.
            "momenta": len(optimizer_tensors("optimizer", self.optimizer)),
        }

    def load(self, path: Path) -> None:
        """Take up where a checkpoint was written; ValueError where it is not one that this run can have written."""
        tensors, info = load_checkpoint(path)
        has_info(path, info, "model", "data", "epoch", "step")
        load_module(path, self.model, under("model", tensors), "model/")
        if info["model"] != self.description:
            raise ValueError(f"{path}: of another model: {info['model']}, expected {self.description}")
        if info["data"] != self.fingerprint:
            raise ValueError(f"{path}: trained on other data than {self.config.dataset} as it is now")
        check_classes(path, info, self.dataset.classes)
        if "sums" not in tensors:
            raise ValueError(f"{path}: a model alone, such as of joined networks: there is no training to go on with")
        self._check(path, tensors, info)
        if self.average is not None:
            self.average.load(under("ema", tensors), info["step"])
        load_optimizer_tensors(self.optimizer, under("optimizer", tensors))
        self.loader.load_state(under("loader", tensors))
        if scaler := under("scaler", tensors):
            self.train_step.scaler.load_state_dict({name: value.item() for name, value in scaler.items()})
        random = under("random", tensors)
        self.gate_generator.set_state(random["gate"])
        if distributed.rank():  # the states are those of the process that wrote them
            torch.manual_seed(self.config.seed + 3 + distributed.rank() + info["step"])
        else:
            torch.set_rng_state(random["torch"])
            if self.device.type == "cuda" and "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], self.device)
        self.sums = tensors["sums"].to(self.device)
        self.epoch = info["epoch"]

    def _check(self, path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """ValueError, by file and entry, unless a checkpoint is as this run would write it at some step."""
        momenta = {
            f"optimizer/{index}/momentum_buffer": parameter for index, parameter in enumerate(self.model.parameters())
        }
        expected = {name: tensor for name, tensor in self.tensors().items() if name not in momenta}
        there = [name for name in momenta if name in tensors]
        if len(there) != info.get("momenta", len(there)):
            lost = "".join(f"; it lacks {name}" for name in momenta if name not in tensors)
            raise ValueError(f"{path}: has {len(there)} of {info['momenta']} momentum buffers{shown(lost)}")
        expected |= {name: momenta[name] for name in there}
        # The state of a GPU's generator is taken up on a GPU alone: a run may go on without one.
        of_gpu = expected.pop("random/cuda", torch.empty(CUDA_STATE, dtype=torch.uint8))
        if "random/cuda" in tensors:
            expected["random/cuda"] = of_gpu
        check_tensors(path, tensors, expected)
        for name in ("random/torch", "random/gate", "loader/generator"):
            check_generator_state(path, name, tensors[name])
        epoch, step, position = info["epoch"], info["step"], int(tensors["loader/position"])
        batches, epochs = len(self.loader), self.config.epochs
        whole = epoch <= epochs and 0 <= position < (batches if epoch < epochs else 1)
        if not whole or step != epoch * batches + position:
            raise ValueError(
                f"{path}: stands at epoch {epoch}, step {step}, loader/position {position}, which is no place in a run "
                f"of {epochs} epochs of {batches} steps"
            )
        for name in ("scaler/scale", "scaler/growth_factor", "scaler/backoff_factor"):
            if name in tensors and not 0 < float(tensors[name]) < math.inf:
                raise ValueError(f"{path}: {name} was {float(tensors[name])}, expected a finite number above 0")


def check_generator_state(path: Path, name: str, state: Tensor) -> None:
    """ValueError, by file and entry, unless a CPU generator can have this state (5056,), uint8."""
    try:
        torch.Generator().set_state(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: {name} is no state of a generator ({error})") from error
    # PyTorch takes these two each for itself, and would read beyond its 624 words. 1 and 0 are those of a new seed.
    left, following = int(state[8:12].view(torch.int32)), int(state[16:24].view(torch.int64))
    if left + following != 625 and (left, following) != (1, 0):
        raise ValueError(f"{path}: {name} is no state of a generator (word {following} of 624, {left} left)")


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


def validate(trainer: Trainer) -> dict[str, Any]:
    """Accuracies and heatmap measures on the validation split; attacks are on the exact mean and judged on it.

    Of the averaged weights, where there are such. A check that cannot be made, of a network that has died, say, ends
    no training: what it measures is left out, and `val_not_measured` names it and the reason. `val_doubts` has what was
    warned of in one that can.
    """
    gate, epoch = trainer.model.gate, trainer.epoch
    drawn_from = gate.generator
    # Not what a training step may draw from: how much is checked changes no training.
    gate.generator = torch.Generator().manual_seed(trainer.config.seed + epoch)
    try:
        with trainer.average.applied() if trainer.average else nullcontext():
            return _validate(trainer)
    finally:
        gate.generator = drawn_from


def _validate(trainer: Trainer) -> dict[str, Any]:
    trainer.model.eval()
    measured: dict[str, Any] = {}
    missing: dict[str, str] = {}
    doubts: dict[str, str] = {}
    for name, measure in _checks(trainer).items():
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                found = measure()
            wrong = [key for key, value in found.items() if not math.isfinite(value)]
            if wrong:
                raise ValueError(f"{', '.join(wrong)} came out NaN or infinite")
            measured |= found
            # Of an attack that cannot move, which a person has to know of who reads how much withstands it.
            said = [" ".join(str(each.message).split()) for each in caught if issubclass(each.category, UserWarning)]
            if said:
                doubts[name] = "; ".join(dict.fromkeys(said))
        except Exception as error:  # hours of training are worth more than any check
            missing[name] = one_line(error)
    trainer.model.train()
    notes = {"val_not_measured": missing, "val_doubts": doubts}
    return measured | {name: note for name, note in notes.items() if note}


def _checks(trainer: Trainer) -> dict[str, Callable[[], dict[str, float]]]:
    """What is measured after an epoch, in order, each independent of whether the others can be."""
    config = trainer.config
    checked = sample(trainer.dataset.validation, config.check_images)
    checks: dict[str, Callable[[], dict[str, float]]] = {"accuracy": lambda: _accuracies(trainer)}
    if len(checked):
        starts = torch.Generator().manual_seed(config.seed)
        attacks = {"pgd10": Attack(config.eps, config.eps / 4, steps=10, random_start=True)}
        if config.adversarial != "off":  # against both, the collapse of single-step training shows
            attacks["fgsm"] = Attack(config.eps, config.eps, steps=1)
        for name, attack in attacks.items():
            checks[name] = partial(_attacked_accuracy, trainer, name, attack, checked, starts)
        if trainer.model.num_experts > 1:
            checks["heatmaps"] = lambda: _heatmaps(trainer, checked)
    return checks


def _accuracies(trainer: Trainer) -> dict[str, float]:
    validation = trainer.dataset.validation

    def expert_logits(images: Tensor) -> Tensor:
        logits = trainer.expert_logits(images)
        broken = (logits.isnan() | (logits == math.inf)).any(-1).any(0)
        if bool(broken.any()):  # the largest of such numbers would pass for an answer
            raise NotFiniteError(int(broken.nonzero()[0, 0]))
        return logits

    right = [
        correct(trainer.model, images, labels, expert_logits)
        for images, labels in batches(validation, EVALUATION_BATCH)
    ]
    return {
        "val_accuracy_switching": sum(count["sample"] for count in right) / len(validation),
        "val_accuracy_mean": sum(count["mean"] for count in right) / len(validation),
    }


def _attacked_accuracy(
    trainer: Trainer, name: str, attack: Attack, checked: Split, starts: torch.Generator
) -> dict[str, float]:
    model, survived = trainer.model, 0

    def mean_of_gate(images: Tensor) -> Tensor:
        return log_mixture(trainer.expert_logits(images))

    for images, labels in batches(checked, EVALUATION_BATCH):
        with frozen(model):
            attacked = attack(mean_of_gate, images, labels, generator=starts)
        survived += correct(model, attacked, labels, trainer.expert_logits)["mean"]
    return {f"val_{name}_accuracy_mean": survived / len(checked)}


def _heatmaps(trainer: Trainer, checked: Split) -> dict[str, float]:
    heatmaps = heatmap_metrics(trainer.model, trainer.loss_fn, checked, EVALUATION_BATCH)
    return {f"val_{name}": value for name, value in heatmaps.items()}
