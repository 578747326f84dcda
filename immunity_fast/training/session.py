"""A training from its start to its report: prepared, locked, trained, evaluated; and what is said where it stops."""

from contextlib import ExitStack

import torch

from immunity_fast.experts import WITH_STEMS, split_names, title
from immunity_fast.experts.registry import has_stems, repeated
from immunity_fast.runtime import cli, distributed, interrupts
from immunity_fast.runtime.failures import in_units, one_line, traceback_note
from immunity_fast.runtime.modes import evaluating
from immunity_fast.runtime.precision import emulation_line
from immunity_fast.runtime.sharding import local
from immunity_fast.training.preparation import MEMORY_ADVICE, Start
from immunity_fast.training.run_evaluation import evaluate_trained
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from immunity_fast.training.trainer import Trainer


@cli.enough_memory(MEMORY_ADVICE)
def fit(start: Start) -> tuple[TrainingState, Run] | None:
    """Train to the end, without the evaluation; the run is locked meanwhile.

    Returns:
        The state and the run; None in processes other than the first.

    Raises:
        cli.InputError, OSError: what the user gave is wrong, or the loss is no longer finite; one clear line.
        KeyboardInterrupt: it was stopped, and has said how to go on.
    """
    with cli.input_errors():
        trainer = Trainer(start.config, out=start.folder, progress=True)

    def stopped() -> str:
        run = trainer.run or Run(start.folder)
        if not run.config_file.is_file():
            return "interrupted, before anything was written"
        state = trainer.state
        saved = "" if state is None else f"its checkpoint is of step {state.saved_step} of {state.steps}; "
        return f"interrupted; {saved}go on with: {run.resume_command}"

    with interrupts.explained(stopped, distributed.log_in_first(cli.console.print)), ExitStack() as held:
        with cli.input_errors():
            device = cli.pick_device(start.config.device)
            distributed.check_environment()
        held.enter_context(distributed.processes(device))
        with cli.input_errors():
            state, run = trainer.prepare(held, resume=start.resume)
        assert run is not None
        say_what_is_trained(state, run)
        try:
            trainer.train()
        except (ValueError, OSError) as error:
            raise cli.InputError(f"training stopped: {one_line(error)}; go on with: {run.resume_command}") from error
        return (state, run) if distributed.rank() == 0 else None


def say_what_is_trained(state: TrainingState, run: Run) -> None:
    """A line on the experts, the data, the device and the folder; on their weights, stages, and where a run goes on."""
    config, dataset = state.config, state.dataset
    # Of a model in shards each process has a part, and all are asked.
    looks = stage_line(state) if config.experts > 1 and (config.shard or distributed.rank() == 0) else None
    if distributed.rank():
        return
    where = f"{state.device}" + (f" × {distributed.count()}" if distributed.count() > 1 else "")
    what = title(config.arch, config.experts) if config.experts > 1 else f"1 × {title(config.arch)}"
    depth = {1: ", grey", 3: ""}.get(dataset.channels, f" of {dataset.channels} channels")
    cli.console.print(
        f"{what} on {config.dataset}: {len(dataset.train):,} training, {len(dataset.validation):,} validation, "
        f"{len(dataset.test):,} test images{depth}; {where}; {run.folder}"
    )
    for line in (*stem_lines(state), *state.beginning.lines):
        cli.console.print(line)
    if looks is not None:
        cli.console.print(looks)
    if config.shard:
        cli.console.print(shard_line(state))
    if (note := emulation_line(config.amp, state.device)) is not None:
        cli.console.print(note)
    if state.epoch or state.loader.position:
        cli.console.print(f"going on after epoch {state.epoch}, step {state.step}")


def stage_line(state: TrainingState) -> str:
    """Where Grad-CAM looks in each architecture, and how large its maps are there."""
    config, model = state.config, state.model
    image = torch.zeros(1, state.dataset.channels, *state.dataset.image_size, device=state.device)
    with evaluating(model), torch.no_grad(), model.gate.switched("off"):
        maps = model.expert_outputs(image)[1]
    stages = (model.stage,) * config.experts if isinstance(model.stage, str) else model.stage
    names = repeated(config.arch, config.experts)
    seen: dict[tuple[str, str], str] = {}
    for name, stage, own in zip(names, stages, maps, strict=True):
        channels, height, width = own.shape[-3:]
        seen[name, stage] = f"{stage} ({height}×{width}, {channels} channels)"
    several = len(set(names)) > 1
    places = [f"{place} in {title(name)}" if several else place for (name, _), place in seen.items()]
    return f"Grad-CAM looks at {', '.join(places)}"


def shard_line(state: TrainingState) -> str:
    """How much of the weights this process has."""
    parameters = list(state.model.parameters())
    own = sum(local(value).numel() * value.element_size() for value in parameters)
    size = sum(value.numel() * value.element_size() for value in parameters)
    count = distributed.count()
    where = f"in shards over {count} processes" if count > 1 else "in one process, whole"
    return f"weights lie {where}: {in_units(own)} of {in_units(size)} in each"


def stem_lines(state: TrainingState) -> list[str]:
    """That an architecture keeps its own stem, where another was asked for."""
    config = state.config
    kept = [title(name) for name in dict.fromkeys(split_names(config.arch)) if not has_stems(name)]
    if config.stem == "auto" or not kept:
        return []
    return [f"--stem {config.stem}: {', '.join(kept)} keep the stem of their own; {', '.join(WITH_STEMS)} have both"]


def fit_and_evaluate(start: Start) -> None:
    """`fit`, and what a run ends with: attacks on test images, tables, figures and the report.

    Raises:
        cli.InputError, OSError: as `fit`, or the evaluation has failed; the training is kept then.
        KeyboardInterrupt: it was stopped, and has said how to go on.
    """
    trained = fit(start)
    if trained is None:
        return
    state, run = trained
    try:
        with interrupts.explained(
            lambda: f"interrupted; training has ended; go on with: {run.resume_command}", cli.console.print
        ):
            evaluate_trained(state, run)
    except Exception as error:
        dead = " (where the network has died or diverged, only a new run with a smaller --lr helps)"
        raise cli.InputError(
            f"training has ended, and {run.folder} keeps it, but evaluating it failed: {one_line(error)}"
            f"{traceback_note(error, run.folder)}; try again with: {run.resume_command}"
            + (dead if isinstance(error, ValueError) else "")
        ) from error
    cli.console.print(f"more attacks, more attackers: {run.evaluate_command}")
