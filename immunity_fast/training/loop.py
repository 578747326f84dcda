"""A run from where it stands to its end: steps, checks after each epoch, records, checkpoints, lines about them."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from immunity_fast.runtime import cli, distributed, interrupts
from immunity_fast.runtime.files import write_atomically
from immunity_fast.runtime.profiling import profiled
from immunity_fast.runtime.sharding import local
from immunity_fast.training.auto_batch import AutoBatch
from immunity_fast.training.callbacks import Callbacks, StepMetrics
from immunity_fast.training.checkpoint import save_checkpoint
from immunity_fast.training.collapse import collapse_line, collapsed
from immunity_fast.training.display import Display, synchronize
from immunity_fast.training.loggers import Logger, Loggers
from immunity_fast.training.monitoring import Monitor, best_epoch
from immunity_fast.training.run_folder import Run
from immunity_fast.training.sharding import as_ordinary, join, whole_tensors
from immunity_fast.training.shards import save_shards
from immunity_fast.training.state import TrainingState
from immunity_fast.training.validation import training_means, validate

PGD = "val_pgd10_accuracy_mean"


class DivergedError(cli.InputError, FloatingPointError):
    """The loss, or a weight, is no longer a number."""


def train(
    state: TrainingState,
    run: Run | None,
    callbacks: Callbacks | None = None,
    loggers: Sequence[Logger] = (),
    *,
    progress: bool = True,
) -> None:
    """Train from where the state is to the end; the first process writes records and checkpoints.

    Ctrl-C and SIGTERM stop it behind a step, which is saved, or behind an epoch's checks; of several processes all, at
    the same step, whichever of them got the signal.

    Args:
        state: what is trained, whose history gets the records.
        run: where it is saved; None saves nothing.
        callbacks: are told of it.
        loggers: get each epoch's numbers, in the first process.
        progress: show a bar and a line an epoch.

    Raises:
        DivergedError: the loss is no longer finite; the last checkpoint is from before.
        NoPlaceError: a logger needs a run's folder, and there is none.
        CallbackError: a callback has failed.
        KeyboardInterrupt: it was stopped.
    """
    first = distributed.rank() == 0
    callbacks = Callbacks() if callbacks is None else callbacks
    agreement = distributed.Agreement()
    if run is not None and distributed.of_first(run.last_checkpoint is None):
        write_checkpoint(state, run, callbacks)
    if first and run is not None:
        run.forget_metrics_after(state.epoch)
        state.history = run.metrics()
    with (
        Display(state, shown=progress) as display,
        # After these: on a full disk TensorBoard's thread would print a traceback.
        logging_to(loggers if first else (), state, run, display) as log,
        steps_profiled(state, run) as profile,
        interrupts.deferred(run is not None and agreement.possible) as asked,
    ):
        callbacks.call("on_fit_start")
        smaller = AutoBatch(state, run)
        while state.epoch < state.config.epochs and state.stopped is None:
            state.begin_epoch()
            callbacks.call("on_epoch_start")
            images, seconds = take_steps(
                state, run, callbacks, display, profile, smaller, lambda: agreement.ask(asked[0] if asked else 0)
            )
            state.synchronize()
            check_finite(state, run)
            state.end_epoch()
            state.epoch += 1
            # Of a model in shards each process has a part, and all are asked.
            record = check(state, run, display, images, seconds) if first or state.config.shard else None
            if record is not None:
                log.log(record, state.epoch)
            state.sums.zero_()
            if callbacks.callbacks:
                callbacks.call("on_epoch_end", distributed.of_first(record))
                state.stopped = distributed.first_of_any(state.stopped)
            if state.stopped is not None:
                display.line(f"epoch {state.epoch}: training ends: {state.stopped}")
            if run is not None:
                write_checkpoint(state, run, callbacks)
            if first and run is not None:
                run.diverged.unlink(missing_ok=True)  # what had diverged before has got past it
            stop_if(agreement.now(asked[0] if asked else 0))
        if run is not None and state.config.shard and first:
            display.line(join(run.folder))
        callbacks.call("on_fit_end")


def take_steps(
    state: TrainingState,
    run: Run | None,
    callbacks: Callbacks,
    display: Display,
    profile: Any,
    smaller: AutoBatch,
    asked: Callable[[], int],
) -> tuple[int, float]:
    """The rest of an epoch's steps, with a checkpoint now and then.

    Args:
        state, run: what is trained, and where it is saved.
        callbacks, display: are told of each step.
        profile: the profiler, is told as well; None where there is none.
        smaller: where a batch does not fit, it begins the run again with smaller ones, if it was asked for.
        asked: is called once a step: the signal by which the training is to stop, saved; or 0.

    Returns:
        (images seen, seconds).
    """
    reader = state.dataset.reader
    if reader is not None:
        reader.waited = 0.0
    loader, started, images = state.loader, time.perf_counter(), 0
    state.model.train()
    for batch in loader:
        try:
            measured = state.advance(batch)
        except Exception as error:
            tried = smaller.instead(error)
            if tried is None:
                raise
        else:
            tried = None
        if tried is not None:  # the exception, and what it held of the step, is gone
            display.line(smaller.begin_again(tried))
            display.begun_again()
            return take_steps(state, run, callbacks, display, profile, smaller, asked)
        images += len(batch.labels) * distributed.count()
        if profile is not None:
            profile.step()
        if not state.between_steps:
            continue
        display.step_taken()
        smaller.step_taken()
        if callbacks.sees_steps:
            callbacks.call("on_step_end", StepMetrics(measured, state.train_step.measured))
        signal = asked()
        if (
            run is not None
            and loader.position < len(loader)
            and (signal or state.step % state.config.checkpoint_every == 0)
        ):
            save(state, run, callbacks)
            stop_if(signal)
    synchronize(state.device)
    return images, time.perf_counter() - started


def check(state: TrainingState, run: Run | None, display: Display, images: int, seconds: float) -> dict[str, Any]:
    """Measure a finished epoch on the validation split; write it down, keep the best model, and say what came of it.

    Args:
        state, run: what is trained, and where it is saved.
        display: shows it.
        images, seconds: of the epoch's steps.

    Returns:
        The epoch's record.
    """
    display.checking()
    reading = {} if state.dataset.reader is None else state.dataset.reader.measured(seconds)
    record: dict[str, Any] = {
        "epoch": state.epoch,
        "step": state.step,
        "lr": state.lr,
        **training_means(state),
        **validate(state),
        **found_batches(state),
        "images_per_second": images / seconds,
        "seconds": seconds,
        **reading,
    }
    doubts: dict[str, str] = record.pop("val_doubts", {})
    state.history.append(record)
    if run is not None:
        if distributed.rank() == 0:
            run.append_metrics(record)
        save_best(state, run)
    display.epoch_checked(record, doubts)
    of_stage = state.history[(state.epoch - 1) // state.stage_epochs * state.stage_epochs :]
    lost = collapsed(of_stage, min(state.config.check_images, len(state.dataset.validation)))
    if lost is not None:
        display.line(
            collapse_line(record, lost, None if run is None or not state.in_last_stage else run.best_checkpoint)
        )
    return record


def found_batches(state: TrainingState) -> dict[str, int]:
    """What a record says of batches whose size was not given, but found."""
    config = state.config
    return {"batch_size": config.batch_size, "accumulate": config.accumulate} if config.auto_batch else {}


def save_best(state: TrainingState, run: Run) -> None:
    """The model of the epoch that was best by what is monitored on validation images, never test images, as a file.

    The first of those that are as good; of a training in stages an epoch of the last one, before which some experts are
    not trained. A run that was killed before the epoch's checkpoint comes here again.
    """
    if state.config.monitored is None or not state.in_last_stage:
        return
    monitor, history = Monitor(state.config.monitored), state.history[state.config.epochs - state.stage_epochs :]
    if state.config.shard:
        history = distributed.of_first(list(history))
    best = best_epoch(monitor, history)
    if best is not None and best == len(history) - 1:
        save_model(state, run.best_checkpoint, {monitor.name: history[best][monitor.name]})


def save_model(state: TrainingState, path: Path, monitored: Mapping[str, float] | None = None) -> None:
    """Write the model alone, or the average of its weights, where there is one.

    Args:
        state: whose model; where its weights are in shards, all processes call this.
        path: the file, which the first process writes.
        monitored: by what the epoch was chosen.
    """
    tensors, config = state.weights(), state.config
    if config.shard:
        tensors = as_ordinary(whole_tensors(state.model, tensors), config.arch, config.stage, config.experts)
    if distributed.rank():
        return
    info = state.info() | ({} if monitored is None else {"monitored": dict(monitored)})
    if monitored is not None and PGD in monitored:
        info[PGD] = monitored[PGD]  # where earlier versions have it
    save_checkpoint(path, {f"model/{name}": value for name, value in tensors.items()}, info)


def save(state: TrainingState, run: Run, callbacks: Callbacks) -> None:
    """Write a checkpoint between two steps, of what all processes have made the same.

    Raises:
        DivergedError: the loss or a weight is no longer finite; nothing is written.
    """
    state.synchronize()
    check_finite(state, run)
    write_checkpoint(state, run, callbacks)


def stop_if(signal: int) -> None:
    """`KeyboardInterrupt` in all processes by a signal that one has got, once all that is to be saved is; 0 is none."""
    if signal:
        distributed.barrier()  # where one process ends, a scheduler may end the others
        interrupts.stop_if(signal)


def write_checkpoint(state: TrainingState, run: Run, callbacks: Callbacks) -> None:
    """Write the run's checkpoint of the state and of what callbacks have gathered.

    The first process does, or of weights in shards all of them.
    """
    listed, of_callbacks = callbacks.state()
    info = state.info() | ({"callbacks": listed} if listed else {})
    kept = {f"callbacks/{name}": tensor for name, tensor in of_callbacks.items()}
    if state.config.shard:
        rest = state.rest() | kept
        save_shards(run.folder, state.step, state.shards(), lambda file: save_checkpoint(file, rest, info))
    elif distributed.rank() == 0:
        save_checkpoint(run.checkpoint, state.tensors() | kept, info)
    state.saved_step = state.step


@contextmanager
def logging_to(loggers: Sequence[Logger], state: TrainingState, run: Run | None, display: Display) -> Iterator[Loggers]:
    """The loggers of a training, open for the length of a `with` block."""
    log = Loggers(loggers, display.warn)
    try:
        log.open(None if run is None else run.folder, state.epoch, state.config.to_json())
        yield log
    finally:
        log.close()


def steps_profiled(state: TrainingState, run: Run | None) -> AbstractContextManager[Any]:
    """The profiler of some steps, where it was asked for."""
    if run is not None and state.config.profile and distributed.rank() == 0:
        return profiled(run.profile, state.device)
    return nullcontext()


def check_finite(state: TrainingState, run: Run | None) -> None:
    """Stop a training whose loss or weights are no longer numbers, before its checkpoint is overwritten.

    Raises:
        DivergedError: they are not; what is left and may help.
    """
    if is_finite(state):
        return
    lr = state.config.lr
    if run is None:
        raise DivergedError(
            f"the loss became infinite or NaN in epoch {state.epoch + 1}: try a smaller lr or clip_grad_norm"
        )
    if distributed.rank() == 0:
        where = {"epoch": state.epoch + 1, "step": state.step, "lr": lr}
        write_atomically(run.diverged, json.dumps(where).encode())
    raise DivergedError(
        f"the loss became infinite or NaN in epoch {state.epoch + 1}; {run.checkpoint} is from before. "
        f"Try a smaller --lr or --clip-grad-norm: {run.resume_command}"
    )


def is_finite(state: TrainingState) -> bool:
    """Whether loss, weights and statistics are all numbers."""
    # The weights too: a gradient can be NaN where the loss, from before its step, is not.
    finite = all(bool(local(t).isfinite().all()) for t in (state.sums, *state.model.state_dict().values()))
    return all(distributed.every(finite)) if state.config.shard else finite
