"""`python -m immunity_fast.train`: trains an Immunity mixture of experts; without options, minutes on two CPU cores.

A run folder holds config.json, metrics.jsonl (a record an epoch), checkpoints/, figures/, results.json, report.html.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD

from immunity_fast import cli
from immunity_fast.attacks import pgd
from immunity_fast.checkpoint import (
    load_checkpoint,
    load_module,
    load_optimizer_tensors,
    module_tensors,
    optimizer_tensors,
    save_checkpoint,
    under,
)
from immunity_fast.config import PRESETS, TrainConfig, add_options
from immunity_fast.data import ImageDataset, load
from immunity_fast.evaluate import EVALUATION_BATCH, evaluate_run, make_loss
from immunity_fast.experts import create
from immunity_fast.loader import TrainLoader
from immunity_fast.metrics import batches, correct, heatmap_metrics, sample
from immunity_fast.model import ImmunityMoE
from immunity_fast.runs import Run
from immunity_fast.step import MEASURED, cosine_lr, train_step

MOVABLE = ("data", "device")  # settings that may differ when a run goes on


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
        self.loss_fn = make_loss(config, dataset.image_size)
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


def train(trainer: Trainer, run: Run) -> None:
    """Train from where the trainer stands to the end, writing records and checkpoints.

    Raises:
        cli.InputError: the loss is no longer finite; the last checkpoint is from before.
    """
    config, loader = trainer.config, trainer.loader
    total = config.epochs * len(loader)
    if not run.checkpoint.is_file():
        save_checkpoint(run.checkpoint, trainer.tensors(), trainer.info())
    run.forget_metrics_after(trainer.epoch)
    board = tensorboard(run)  # after these, because on a full disk its own thread would print a traceback
    with cli.progress_bar() as progress:
        task = progress.add_task("training", total=total, completed=trainer.step, status="")
        while trainer.epoch < config.epochs:
            started, images_seen = time.perf_counter(), 0
            trainer.model.train()
            for images, labels in loader:
                lr = cosine_lr(config.lr, trainer.step - 1, total)
                for group in trainer.optimizer.param_groups:
                    group["lr"] = lr
                trainer.sums += train_step(
                    trainer.model, trainer.loss_fn, trainer.optimizer, images, labels, config.clip_grad_norm
                )
                images_seen += len(labels)
                progress.advance(task)
                if trainer.step % config.checkpoint_every == 0 and loader.position < len(loader):
                    check_finite(trainer, run)
                    save_checkpoint(run.checkpoint, trainer.tensors(), trainer.info())
            check_finite(trainer, run)
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
            seconds = time.perf_counter() - started
            trainer.epoch += 1
            progress.update(task, status="checking on the validation split")
            record = {
                "epoch": trainer.epoch,
                "step": trainer.step,
                "lr": lr,
                **training_means(trainer),
                **validate(trainer),
                "images_per_second": images_seen / seconds,
                "seconds": seconds,
            }
            trainer.sums.zero_()
            run.append_metrics(record)
            save_checkpoint(run.checkpoint, trainer.tensors(), trainer.info())
            for name, value in record.items():
                board.add_scalar(name, value, trainer.epoch)
            progress.update(task, status="")
            progress.console.print(summary(record, config.epochs))
    board.close()


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


def check_finite(trainer: Trainer, run: Run) -> None:
    """Stop a run whose loss or weights are no longer numbers, before its checkpoint is overwritten."""
    # The weights too: a gradient can be NaN where the loss, from before its step, is not.
    watched = [trainer.sums, *trainer.model.parameters()]
    if not all(bool(tensor.isfinite().all()) for tensor in watched):
        raise cli.InputError(
            f"the loss became infinite or NaN in epoch {trainer.epoch + 1}; {run.checkpoint} is from before. "
            "Try a smaller --lr or --clip-grad-norm"
        )


def summary(record: Mapping[str, float], epochs: int) -> str:
    """One line on an epoch."""
    attacked = record.get("val_pgd10_accuracy_mean")
    return (
        f"epoch {record['epoch']:>3}/{epochs}  loss {record['loss']:.3f}  "
        f"validation {100 * record['val_accuracy_switching']:.1f} % switching, "
        f"{100 * record['val_accuracy_mean']:.1f} % mean"
        + ("" if attacked is None else f", {100 * attacked:.1f} % under PGD-10")
        + f"  mutual information {record['mutual_information']:.2f} nats  {record['images_per_second']:.0f} images/s"
    )


class Board(Protocol):
    """What is used of TensorBoard's SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Add one value."""

    def close(self) -> None:
        """Flush and close."""


class NoBoard:
    """Where TensorBoard is not installed."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def tensorboard(run: Run) -> Board:
    """TensorBoard's writer where it is installed."""
    with suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        board: Board = SummaryWriter(str(run.tensorboard))
        return board
    return NoBoard()


def parse(arguments: list[str] | None) -> tuple[Path, bool, TrainConfig]:
    """(run folder, whether it is to go on, settings) of a command line.

    Raises:
        ValueError, OSError: settings out of range, or a run that cannot go on with them.
    """
    parser = cli.Parser(
        prog="python -m immunity_fast.train",
        description=(__doc__ or "").split("\n")[0],
        epilog="In brackets: what the preset quickstart sets.",
    )
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--out", type=Path, metavar="DIR", help="folder of a new run; default: runs/DATASET-ARCH-TIME")
    folder.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in this folder")
    add_options(parser)
    given = vars(parser.parse_args(arguments))
    out, resume = given.pop("out"), given.pop("resume")
    if resume is None:
        config = dataclasses.replace(PRESETS[given.get("preset", "quickstart")], **given)
        if config.dataset == "digits" and config.flip == "on":
            raise ValueError("--flip on: a mirrored digit is another sign; leave it out for --dataset digits")
        out = out or Path("runs") / f"{config.dataset}-{config.arch}-{datetime.now():%Y%m%d-%H%M%S}"
        Run.check_free(out)
        return out, False, config
    config = Run.open(resume).config()
    for name, value in given.items():
        if name not in MOVABLE and value != getattr(config, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {value}: the run in {resume} was begun with {option} {getattr(config, name)}")
    return resume, True, dataclasses.replace(config, **given)


def prepare(folder: Path, resume: bool, config: TrainConfig) -> tuple[Trainer, Run]:
    """Everything that can go wrong with what the user gave, before the first step.

    Raises:
        ValueError, OSError, ModuleNotFoundError: one clear line.
    """
    device = cli.pick_device(config.device)
    dataset = load(config.dataset, config.data, limit_train=config.limit_train, image_size=config.image_size)
    check_trainable(config, dataset)
    trainer = Trainer(config, dataset, device)
    if not resume:
        return trainer, Run.create(folder, config)
    run = Run.open(folder)
    run.metrics()
    if run.checkpoint.is_file():
        trainer.load(run.checkpoint)
    return trainer, run


def check_trainable(config: TrainConfig, dataset: ImageDataset) -> None:
    """ValueError where the images, or a batch of them, are too small for the architecture; nothing is computed."""
    batch = min(config.batch_size, len(dataset.train))
    height, width = dataset.image_size
    try:
        with torch.device("meta"):
            create(config.arch, dataset.num_classes).train()(torch.empty(batch, 3, height, width))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--arch {config.arch}: cannot be trained on images of {height}×{width}, {batch} at a time ({error})"
        ) from error


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    try:
        folder, resume, config = parse(arguments)
        trainer, run = prepare(folder, resume, config)
    except (ValueError, ModuleNotFoundError) as error:
        raise cli.InputError(str(error)) from error
    dataset = trainer.dataset
    cli.console.print(
        f"{config.experts} × {config.arch} on {config.dataset}: {len(dataset.train):,} training, "
        f"{len(dataset.validation):,} validation, {len(dataset.test):,} test images; {trainer.device}; {run.folder}"
    )
    if trainer.epoch:
        cli.console.print(f"going on after epoch {trainer.epoch}, step {trainer.step}")
    try:
        train(trainer, run)
    except KeyboardInterrupt:
        cli.console.print(f"interrupted; go on with: python -m immunity_fast.train --resume {run.folder}")
        raise
    evaluate_run(run, trainer.model.eval(), dataset, config, config.attack_images)


if __name__ == "__main__":
    cli.run_command(main)
