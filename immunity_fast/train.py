"""`python -m immunity_fast.train`: trains an Immunity mixture of experts; without options, minutes on two CPU cores.

A run folder holds config.json, metrics.jsonl (a record an epoch), checkpoints/, figures/, results.json, report.html.
"""

import dataclasses
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from immunity_fast.experts import title
from immunity_fast.runtime import cli, distributed, interrupts
from immunity_fast.runtime.failures import kept_traceback, one_line
from immunity_fast.training.config import PRESETS, TrainConfig, add_options, resolve_architecture
from immunity_fast.training.loop import train
from immunity_fast.training.preparation import CHANGEABLE_AFTER_DIVERGENCE, MEMORY_ADVICE, default_name, prepare
from immunity_fast.training.run_evaluation import evaluate_trained
from immunity_fast.training.run_folder import Run
from immunity_fast.training.trainer import Trainer

# Settings that may differ when a run goes on: where, and by which of several exact ways.
CHANGEABLE_ON_RESUME = ("data", "device", "compile", "batching", "double_backprop", "profile")


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
    movable = CHANGEABLE_ON_RESUME + (CHANGEABLE_AFTER_DIVERGENCE if run.diverged.is_file() else ())
    for name, value in given.items():
        if name not in movable and value != getattr(config, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {value}: the run in {resume} was begun with {option} {getattr(config, name)}")
    return resume, True, dataclasses.replace(config, **given)


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


if __name__ == "__main__":
    cli.run_command(main)
