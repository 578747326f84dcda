"""`python -m immunity_fast.train`: trains an Immunity mixture of experts; without options, minutes on two CPU cores.

A run folder holds config.json, metrics.jsonl (a record an epoch), checkpoints/, figures/, results.json, report.html.
"""

import dataclasses
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from immunity_fast import cli
from immunity_fast.checkpoint import save_checkpoint
from immunity_fast.config import PRESETS, TrainConfig, add_options
from immunity_fast.data import ImageDataset, load
from immunity_fast.evaluate import evaluate_run
from immunity_fast.experts import create
from immunity_fast.runs import Run
from immunity_fast.step import cosine_lr, train_step
from immunity_fast.trainer import Trainer, training_means, validate

MOVABLE = ("data", "device")  # settings that may differ when a run goes on


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
            if board is not None:
                for name, value in record.items():
                    board.add_scalar(name, value, trainer.epoch)
            progress.update(task, status="")
            progress.console.print(summary(record, config.epochs))
    if board is not None:
        board.close()


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


def tensorboard(run: Run) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    with suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(run.tensorboard))
    return None


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
    if config.dataset in ("npz", "folder") and config.data is None:
        raise ValueError(f"--data: missing; --dataset {config.dataset} needs the path of what it reads")
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
        cli.console.print(f"interrupted; go on with: {run.resume_command}")
        raise
    evaluate_run(run, trainer.model.eval(), dataset, config, config.attack_images)


if __name__ == "__main__":
    cli.run_command(main)
