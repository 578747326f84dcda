"""A run from where it stands to its end: steps, checks after each epoch, records, checkpoints, lines about them."""

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch

from immunity_fast.runtime import cli, distributed, interrupts
from immunity_fast.runtime.compilation import keep_caches
from immunity_fast.runtime.failures import one_line
from immunity_fast.runtime.files import write_atomically
from immunity_fast.runtime.profiling import profiled
from immunity_fast.training.adversarial import collapsed
from immunity_fast.training.checkpoint import save_checkpoint
from immunity_fast.training.run_folder import Run
from immunity_fast.training.trainer import Trainer, training_means, validate

CHECKS = {
    "accuracy": "accuracy",
    "pgd10": "accuracy under PGD-10",
    "fgsm": "accuracy under FGSM",
    "heatmaps": "the heatmaps",
}


def train(trainer: Trainer, run: Run) -> None:
    """Train from where the trainer stands to the end; the first process writes records and checkpoints.

    Ctrl-C and SIGTERM stop it behind a step, which is saved, or behind an epoch's checks; one process of several at
    once.

    Raises:
        cli.InputError: the loss is no longer finite; the last checkpoint is from before.
        KeyboardInterrupt: it was stopped.
    """
    config, loader = trainer.config, trainer.loader
    main = distributed.rank() == 0
    if main:
        if not run.checkpoint.is_file():
            keep(trainer, run)
        run.forget_metrics_after(trainer.epoch)
    # After these: on a full disk its own thread would print a traceback.
    board = tensorboard(run, trainer.epoch) if main else None
    begin = time.perf_counter()
    stepped = False

    def told() -> str:
        minutes = (time.perf_counter() - begin) / 60
        epoch = min(trainer.epoch + 1, config.epochs)
        return f"epoch {epoch}/{config.epochs}: step {trainer.step:,} of {trainer.steps:,} after {minutes:.0f} min"

    with (
        cli.progress_bar(shown=main) as progress,
        cli.telling(told, shown=main),
        steps_profiled(trainer, run) as profile,
        interrupts.deferred(distributed.count() == 1) as asked,  # several would stop at different steps
    ):
        task = progress.add_task("training", total=trainer.steps, completed=trainer.step, status=waiting_for(trainer))
        while trainer.epoch < config.epochs:
            started, images_seen = time.perf_counter(), 0
            trainer.model.train()
            for batch in loader:
                trainer.advance(batch)
                if not stepped:
                    stepped = True
                    synchronize(trainer.device)
                    progress.update(task, status="")
                    if main and trainer.train_step.compiled:
                        progress.console.print(f"first step after {time.perf_counter() - begin:.1f} s")
                images_seen += loader.batch_size
                progress.advance(task)
                if profile is not None:
                    profile.step()
                if loader.position < len(loader) and (asked or trainer.step % config.checkpoint_every == 0):
                    save(trainer, run)
                    interrupts.stop_if(asked)
            synchronize(trainer.device)
            seconds = time.perf_counter() - started
            trainer.synchronize()
            check_finite(trainer, run)
            trainer.epoch += 1
            if main:
                progress.update(task, status="checking on the validation split")
                record: dict[str, Any] = {
                    "epoch": trainer.epoch,
                    "step": trainer.step,
                    "lr": trainer.lr,
                    **training_means(trainer),
                    **validate(trainer),
                    "images_per_second": images_seen / seconds,
                    "seconds": seconds,
                }
                doubts: dict[str, str] = record.pop("val_doubts", {})
                run.append_metrics(record)
                keep_best(trainer, run)
                board = shown_on(board, record)
                progress.update(task, status="")
                progress.console.print(summary(record, config.epochs))
                for name, reason in record.get("val_not_measured", {}).items():
                    progress.console.print(not_measured_line(trainer.epoch, name, reason))
                for name, doubt in doubts.items():
                    progress.console.print(f"epoch {trainer.epoch}: {CHECKS[name]} on validation images: {doubt}")
                lost = collapsed(run.metrics(), min(config.check_images, len(trainer.dataset.validation)))
                if lost is not None:
                    progress.console.print(collapse_line(record, lost, run))
            trainer.sums.zero_()
            if main:
                keep(trainer, run)
                run.diverged.unlink(missing_ok=True)  # what had diverged before has got past it
            interrupts.stop_if(asked)
    if board is not None:
        with suppress(Exception):
            board.close()


def shown_on(board: Any, record: Mapping[str, Any]) -> Any:
    """TensorBoard with an epoch's numbers; None, and a line, where it fails: it is the least of what a run writes."""
    if board is None:
        return None
    try:
        for name, value in record.items():
            if isinstance(value, (int, float)):
                board.add_scalar(name, value, record["epoch"])
    except Exception as error:
        cli.console.print(f"going on without TensorBoard: {one_line(error)}")
        return None
    return board


def keep_best(trainer: Trainer, run: Run) -> None:
    """In adversarial training, the model of the epoch that was best under PGD on validation images, never test images.

    The first of those that are as good. A run that was killed before the epoch's checkpoint comes here again.
    """
    if trainer.config.adversarial == "off" or not trainer.config.check_images:
        return
    accuracies = [record.get("val_pgd10_accuracy_mean", -1) for record in run.metrics()]
    if accuracies[-1] >= 0 and accuracies.index(max(accuracies)) == len(accuracies) - 1:
        tensors = trainer.average.tensors() if trainer.average else trainer.model.state_dict()
        info = trainer.info() | {"val_pgd10_accuracy_mean": accuracies[-1]}
        save_checkpoint(run.best_checkpoint, {f"model/{name}": value for name, value in tensors.items()}, info)


def collapse_line(record: Mapping[str, float], lost: float, run: Run) -> str:
    """What to say of catastrophic overfitting."""
    return (
        f"epoch {record['epoch']}: training has collapsed (catastrophic overfitting): validation accuracy under PGD-10 "
        f"fell from {100 * lost:.1f} % to {100 * record['val_pgd10_accuracy_mean']:.1f} % although it is "
        f"{100 * record['val_fgsm_accuracy_mean']:.1f} % under FGSM. {run.best_checkpoint} is from before. Try a "
        "smaller --eps or --lr, fewer epochs, or --adversarial pgd"
    )


def save(trainer: Trainer, run: Run) -> None:
    """A checkpoint between two steps."""
    trainer.synchronize()
    check_finite(trainer, run)
    if distributed.rank() == 0:
        keep(trainer, run)


def keep(trainer: Trainer, run: Run) -> None:
    """Write a checkpoint as it is."""
    save_checkpoint(run.checkpoint, trainer.tensors(), trainer.info())
    trainer.kept = trainer.step


def synchronize(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waiting_for(trainer: Trainer) -> str:
    """What the first step will take its time for."""
    if not trainer.train_step.compiled or trainer.epoch == trainer.config.epochs:
        return ""
    if distributed.rank() == 0:
        cli.console.print(
            f"compiling the training step: minutes, or seconds where {keep_caches()} has it from an earlier run; "
            "--compile off does without"
        )
    return "compiling the training step"


def steps_profiled(trainer: Trainer, run: Run) -> AbstractContextManager[Any]:
    """The profiler of some steps, where it was asked for."""
    if trainer.config.profile and distributed.rank() == 0:
        return profiled(run.profile, trainer.device)
    return nullcontext()


def check_finite(trainer: Trainer, run: Run) -> None:
    """Stop a run whose loss or weights are no longer numbers, before its checkpoint is overwritten."""
    if is_finite(trainer):
        return
    lr = trainer.config.lr
    if distributed.rank() == 0:
        where = {"epoch": trainer.epoch + 1, "step": trainer.step, "lr": lr}
        write_atomically(run.diverged, json.dumps(where).encode())
    raise cli.InputError(
        f"the loss became infinite or NaN in epoch {trainer.epoch + 1}; {run.checkpoint} is from before. "
        f"Try a smaller --lr or --clip-grad-norm: {run.resume_command}"
    )


def is_finite(trainer: Trainer) -> bool:
    """Whether loss, weights and statistics are all numbers."""
    # The weights too: a gradient can be NaN where the loss, from before its step, is not.
    return all(bool(tensor.isfinite().all()) for tensor in (trainer.sums, *trainer.model.state_dict().values()))


def not_measured_line(epoch: int, name: str, reason: str) -> str:
    """What to say of a check that could not be made."""
    option = "--check-images" if reason.startswith("out of memory") else "--lr"
    return (
        f"epoch {epoch}: {CHECKS[name]} on validation images was not measured: {reason}; training goes on, but where "
        f"this stays, try a smaller {option}"
    )


def summary(record: Mapping[str, float], epochs: int) -> str:
    """One line on an epoch."""
    attacked = record.get("val_pgd10_accuracy_mean")
    several = record["mutual_information_loss"] > 0  # a single network has none
    validation = "not measured"
    if "val_accuracy_mean" in record:
        switching, mean = (100 * record[f"val_accuracy_{name}"] for name in ("switching", "mean"))
        validation = f"{switching:.1f} % switching, {mean:.1f} % mean"
    return (
        f"epoch {record['epoch']:>3}/{epochs}  loss {record['loss']:.3f}  validation {validation}"
        + ("" if attacked is None else f", {100 * attacked:.1f} % under PGD-10")
        + (f"  mutual information {record['mutual_information']:.2f} nats" if several else "")
        + f"  {record['images_per_second']:.0f} images/s"
    )


def tensorboard(run: Run, epoch: int) -> Any:
    """TensorBoard's writer, or None where it is not installed, or does not work.

    It tells readers to drop what a killed process has written of epochs after `epoch`, which are trained again.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(run.tensorboard), purge_step=epoch + 1)
    except ImportError:
        return None
    except Exception as error:
        cli.console.print(f"going on without TensorBoard: {one_line(error)}")
        return None
