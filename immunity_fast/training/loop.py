"""A run from where it stands to its end: steps, checks after each epoch, records, checkpoints, lines about them."""

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from immunity_fast.runtime import cli, distributed, interrupts
from immunity_fast.runtime.files import write_atomically
from immunity_fast.runtime.profiling import profiled
from immunity_fast.training.checkpoint import save_checkpoint
from immunity_fast.training.collapse import collapse_line, collapsed
from immunity_fast.training.display import Display, synchronize
from immunity_fast.training.run_folder import Run
from immunity_fast.training.trainer import Trainer
from immunity_fast.training.validation import training_means, validate


def train(trainer: Trainer, run: Run) -> None:
    """Train from where the trainer stands to the end; the first process writes records and checkpoints.

    Ctrl-C and SIGTERM stop it behind a step, which is saved, or behind an epoch's checks; one process of several at
    once.

    Raises:
        cli.InputError: the loss is no longer finite; the last checkpoint is from before.
        KeyboardInterrupt: it was stopped.
    """
    first = distributed.rank() == 0
    if first:
        if not run.checkpoint.is_file():
            write_checkpoint(trainer, run)
        run.forget_metrics_after(trainer.epoch)
    with (
        Display(trainer, run) as display,  # after these: on a full disk TensorBoard's thread would print a traceback
        steps_profiled(trainer, run) as profile,
        interrupts.deferred(distributed.count() == 1) as asked,  # several would stop at different steps
    ):
        while trainer.epoch < trainer.config.epochs:
            images, seconds = take_steps(trainer, run, display, profile, asked)
            trainer.synchronize()
            check_finite(trainer, run)
            trainer.epoch += 1
            if first:
                check(trainer, run, display, images, seconds)
            trainer.sums.zero_()
            if first:
                write_checkpoint(trainer, run)
                run.diverged.unlink(missing_ok=True)  # what had diverged before has got past it
            interrupts.stop_if(asked)


def take_steps(trainer: Trainer, run: Run, display: Display, profile: Any, asked: Sequence[int]) -> tuple[int, float]:
    """The rest of an epoch's steps, with a checkpoint now and then.

    Args:
        trainer, run: what is trained, and where it is saved.
        display: is told of each step.
        profile: the profiler, is told as well; None where there is none.
        asked: the signals that have come, see `interrupts.deferred`; the first one stops the training, saved.

    Returns:
        (images seen, seconds).
    """
    loader, started, images = trainer.loader, time.perf_counter(), 0
    trainer.model.train()
    for batch in loader:
        trainer.advance(batch)
        display.step_taken()
        images += loader.batch_size
        if profile is not None:
            profile.step()
        if loader.position < len(loader) and (asked or trainer.step % trainer.config.checkpoint_every == 0):
            save(trainer, run)
            interrupts.stop_if(asked)
    synchronize(trainer.device)
    return images, time.perf_counter() - started


def check(trainer: Trainer, run: Run, display: Display, images: int, seconds: float) -> None:
    """Measure a finished epoch on the validation split; write it down, keep the best model, and say what came of it.

    Args:
        trainer, run: what is trained, and where it is saved.
        display: shows it.
        images, seconds: of the epoch's steps.
    """
    display.checking()
    record: dict[str, Any] = {
        "epoch": trainer.epoch,
        "step": trainer.step,
        "lr": trainer.lr,
        **training_means(trainer),
        **validate(trainer),
        "images_per_second": images / seconds,
        "seconds": seconds,
    }
    doubts: dict[str, str] = record.pop("val_doubts", {})
    run.append_metrics(record)
    save_best(trainer, run)
    display.epoch_checked(record, doubts)
    lost = collapsed(run.metrics(), min(trainer.config.check_images, len(trainer.dataset.validation)))
    if lost is not None:
        display.line(collapse_line(record, lost, run.best_checkpoint))


def save_best(trainer: Trainer, run: Run) -> None:
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


def save(trainer: Trainer, run: Run) -> None:
    """Write a checkpoint between two steps, of what all processes have made the same.

    Raises:
        cli.InputError: the loss or a weight is no longer finite; nothing is written.
    """
    trainer.synchronize()
    check_finite(trainer, run)
    if distributed.rank() == 0:
        write_checkpoint(trainer, run)


def write_checkpoint(trainer: Trainer, run: Run) -> None:
    """Write the run's checkpoint of the trainer as it stands."""
    save_checkpoint(run.checkpoint, trainer.tensors(), trainer.info())
    trainer.saved_step = trainer.step


def steps_profiled(trainer: Trainer, run: Run) -> AbstractContextManager[Any]:
    """The profiler of some steps, where it was asked for."""
    if trainer.config.profile and distributed.rank() == 0:
        return profiled(run.profile, trainer.device)
    return nullcontext()


def check_finite(trainer: Trainer, run: Run) -> None:
    """Stop a run whose loss or weights are no longer numbers, before its checkpoint is overwritten.

    Raises:
        cli.InputError: they are not; what is left and may help.
    """
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
