"""`python -m immunity_fast.train`: trains an Immunity mixture of experts; without options, minutes on two CPU cores.

A run folder holds config.json, metrics.jsonl (a record an epoch), checkpoints/, figures/, results.json, report.html.
"""

import dataclasses
import json
import re
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from immunity_fast.adversarial import collapsed
from immunity_fast.checkpoint import load_model, not_finite, save_checkpoint
from immunity_fast.config import PRESETS, TrainConfig, add_options, resolve_architecture
from immunity_fast.data.datasets import load
from immunity_fast.evaluate import AFTER_TRAINING, chunk_of, evaluate_run
from immunity_fast.experts import create, title
from immunity_fast.runs import Run
from immunity_fast.runtime import cli, distributed, interrupts
from immunity_fast.runtime.compilation import keep_caches
from immunity_fast.runtime.failures import kept_traceback, one_line
from immunity_fast.runtime.files import write_atomically
from immunity_fast.runtime.memory import check_fits
from immunity_fast.runtime.precision import set_float32
from immunity_fast.runtime.profiling import profiled
from immunity_fast.trainer import Trainer, training_means, validate

# Settings that may differ when a run goes on: where, and by which of several exact ways.
MOVABLE = ("data", "device", "compile", "batching", "double_backprop", "profile")
# Those that may differ as well once the loss has diverged: without it, no run could ever go on from there.
REMEDIES = ("lr", "clip_grad_norm")
MEMORY_ADVICE = "a smaller --batch-size, fewer --experts, a smaller --arch or smaller images"
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
    folder.add_argument(
        "--out", type=cli.path, metavar="DIR", help="folder of a new run; default: runs/DATASET-ARCH-TIME"
    )
    folder.add_argument("--resume", type=cli.path, metavar="DIR", help="go on with the run in this folder")
    add_options(parser)
    given = vars(parser.parse_args(arguments))
    out, resume = given.pop("out"), given.pop("resume")
    resolve_architecture(given)
    if resume is None:
        config = dataclasses.replace(PRESETS[given.get("preset", "quickstart")], **given)
        if config.dataset == "digits" and config.flip == "on":
            raise ValueError("--flip on: a mirrored digit is another sign; leave it out for --dataset digits")
        if out is None:
            return Run.free_name(Path("runs") / f"{default_name(config)}{datetime.now():%Y%m%d-%H%M%S}"), False, config
        Run.check_free(out)
        return out, False, config
    run = Run.open(resume)
    config = run.config()
    movable = MOVABLE + (REMEDIES if run.diverged.is_file() else ())
    for name, value in given.items():
        if name not in movable and value != getattr(config, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {value}: the run in {resume} was begun with {option} {getattr(config, name)}")
    return resume, True, dataclasses.replace(config, **given)


def default_name(config: TrainConfig) -> str:
    """What a run's name begins with where the user gave none; the time follows."""
    return f"{config.dataset}-{title(config.arch)}-"


def is_default(folder: Path, config: TrainConfig) -> bool:
    """Whether nobody chose this name, so that another one will do if a run of the same second has taken it."""
    return folder.parent == Path("runs") and bool(
        re.fullmatch(rf"{re.escape(default_name(config))}\d{{8}}-\d{{6}}(-\d+)?", folder.name)
    )


def prepare(folder: Path, resume: bool, config: TrainConfig) -> tuple[Trainer, Run]:
    """Everything that can go wrong with what the user gave, before the first step.

    Raises:
        ValueError, OSError, ModuleNotFoundError: one clear line.
    """
    keep_caches()  # before anything imports the compiler, as torchvision does
    device = cli.pick_device(config.device)
    if config.dataset in ("npz", "folder") and config.data is None:
        raise ValueError(f"--data: missing; --dataset {config.dataset} needs the path of what it reads")
    if config.dataset == "folder" and config.image_size is not None:  # before all images are made so large
        check_trainable(config, (config.image_size, config.image_size), 2, 2, device)
    with distributed.first_of_all():  # a data set that is missing is downloaded once
        dataset = load(config.dataset, config.data, limit_train=config.limit_train, image_size=config.image_size)
    check_trainable(config, dataset.image_size, dataset.num_classes, len(dataset.train), device)
    set_float32(config.float32)
    trainer = Trainer(config, dataset, device, cli.console.print, Run(folder).tracebacks)
    if not resume:
        if distributed.rank():
            return trainer, Run(folder)
        return trainer, Run.create(folder, config, numbered=is_default(folder, config))
    run = Run.open(folder)
    if run.checkpoint.is_file():
        trainer.load(run.checkpoint)
        trainer.kept = trainer.step
        wrong = not_finite(trainer.tensors())
        if wrong is not None:  # momentum and averages too: from these the next step would make the same of the weights
            raise ValueError(
                f"{run.checkpoint}: holds weights that are NaN or infinite, from which nothing can go on "
                f"({wrong}); begin a new run, with a smaller --lr"
            )
    run.check_goes_on(trainer.epoch)
    take_remedies(run, config)
    return trainer, run


def take_remedies(run: Run, config: TrainConfig) -> None:
    """Write down with what a run goes on that has diverged, if that is not what it began with."""
    begun = run.config()
    changed = {name: getattr(config, name) for name in REMEDIES if getattr(config, name) != getattr(begun, name)}
    if changed and distributed.rank() == 0:
        now = dataclasses.replace(begun, **changed)
        write_atomically(run.config_file, json.dumps(now.to_json(), indent=2).encode())
        run.diverged.unlink(missing_ok=True)


def check_trainable(
    config: TrainConfig, image_size: tuple[int, int], num_classes: int, images: int, device: torch.device
) -> None:
    """ValueError where so many images of (H, W) pixels do not suit the settings; next to nothing is computed.

    They are too small for the architecture or for its random crops, or a step cannot fit into the device's memory.
    """
    batch = min(config.batch_size, images)
    height, width = image_size
    if config.crop_padding >= min(height, width):
        raise ValueError(
            f"--crop-padding: expected less than {min(height, width)} for images of {height}×{width}, of which else "
            f"nothing may be left, got {config.crop_padding}"
        )
    values = 0  # that one expert's layers put out for a batch

    def count(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal values
        values += output.numel() if isinstance(output, torch.Tensor) else 0

    try:
        with torch.device("meta"):
            expert = create(config.arch, num_classes).train()
            for module in expert.modules():
                if not list(module.children()):
                    module.register_forward_hook(count)
            expert(torch.empty(batch, 3, height, width))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--arch {title(config.arch)}: cannot be trained on images of {height}×{width}, {batch} at a time ({error})"
        ) from error
    # Weights, their gradients and momentum in float32; and half of what the layers put out, which is kept for the
    # backward pass, in half precision at least.
    weights = sum(parameter.numel() for parameter in expert.parameters())
    size = config.experts * (12 * weights + values / distributed.count())
    what = f"{config.experts} × {title(config.arch)}, {batch} images of {height}×{width} a step,"
    check_fits(size, device, what, MEMORY_ADVICE)


@cli.enough_memory(MEMORY_ADVICE)
def fit(arguments: list[str] | None) -> tuple[Trainer, Run] | None:
    """Train what a command line says, to its end; without the evaluation. None in processes other than the first."""
    folder: Path | None = None
    trainer: Trainer | None = None

    def left() -> str:
        if folder is None:
            return "interrupted, before anything was done; go on with the same command"
        if not Run(folder).config_file.is_file():
            return "interrupted, before anything was written"
        kept = "" if trainer is None else f"its checkpoint is of step {trainer.kept} of {trainer.steps}; "
        return f"interrupted; {kept}go on with: {Run(folder).resume_command}"

    with interrupts.told(left, distributed.tell_once(cli.console.print)), ExitStack() as held:
        try:
            folder, resume, config = parse(arguments)
            device = cli.pick_device(config.device)
            distributed.check_environment()
        except ValueError as error:
            raise cli.InputError(str(error)) from error
        held.enter_context(distributed.processes(device))
        main_process = distributed.rank() == 0
        if resume and main_process:
            held.enter_context(Run(folder).locked())
        try:
            trainer, run = prepare(folder, resume, config)
        except (ValueError, ModuleNotFoundError) as error:
            raise cli.InputError(str(error)) from error
        if not resume and main_process:
            held.enter_context(run.locked())
        folder, dataset = run.folder, trainer.dataset
        if main_process:
            where = f"{trainer.device}" + (f" × {distributed.count()}" if distributed.count() > 1 else "")
            cli.console.print(
                f"{config.experts} × {title(config.arch)} on {config.dataset}: {len(dataset.train):,} training, "
                f"{len(dataset.validation):,} validation, {len(dataset.test):,} test images; {where}; {run.folder}"
            )
            if trainer.epoch:
                cli.console.print(f"going on after epoch {trainer.epoch}, step {trainer.step}")
        try:
            train(trainer, run)
        except ValueError as error:
            raise cli.InputError(f"training stopped: {one_line(error)}; go on with: {run.resume_command}") from error
    return (trainer, run) if main_process else None


@cli.enough_memory(MEMORY_ADVICE)
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    trained = fit(arguments)
    if trained is None:
        return
    trainer, run = trained
    try:
        with interrupts.told(
            lambda: f"interrupted; training has ended; go on with: {run.resume_command}", cli.console.print
        ):
            evaluate_trained(trainer, run)
    except Exception as error:
        dead = " (where the network has died or diverged, only a new run with a smaller --lr helps)"
        raise cli.InputError(
            f"training has ended, and {run.folder} keeps it, but evaluating it failed: {one_line(error)}"
            f"{kept_traceback(error, run.folder)}; try again with: {run.resume_command}"
            + (dead if isinstance(error, ValueError) else "")
        ) from error
    cli.console.print(f"more attacks, more attackers: {run.evaluate_command}")


def evaluate_trained(trainer: Trainer, run: Run) -> None:
    """What a run ends with: attacks on test images, tables, figures and the report."""
    config = trainer.config
    model, _ = load_model(run.folder, trainer.device)  # the best one, or the average of the weights, if there is
    plan = dataclasses.replace(
        AFTER_TRAINING, images=config.attack_images, seed=config.seed, chunk=chunk_of(trainer.device)
    )
    if config.experts == 1:  # nothing about a gate to know
        plan = dataclasses.replace(plan, attackers=None)
    evaluate_run(run, model, trainer.dataset, config, plan, compile=config.compile)


if __name__ == "__main__":
    cli.run_command(main)
