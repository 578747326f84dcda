"""How often poisons work: for each of several setups a victim, trained from scratch on poisons made for one target.

As "Just How Toxic is Data Poisoning?" (Schwarzschild et al., ICML 2021) has it: the setups, a target and a class each,
are fixed, and of each is asked whether the victim takes the target for that class. One clean run is the surrogate of
all. What is done is not done again, by whatever process, as in `reproduction.jobs`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from immunity_fast.data import poison_file
from immunity_fast.data.augmentation import as_float
from immunity_fast.evaluation.settings import EvaluationSettings, check_whole
from immunity_fast.evaluation.words import find
from immunity_fast.poisoning.crafting import Setup, Surrogate, chosen, craft, load_surrogate, progress
from immunity_fast.poisoning.settings import CraftSettings
from immunity_fast.poisoning.tables import Outcome, write
from immunity_fast.reproduction.jobs import LOCKS, Done, Job, Queue
from immunity_fast.runtime import cli
from immunity_fast.runtime.files import locked
from immunity_fast.training.checkpoint import load_model
from immunity_fast.training.config import TrainConfig

SETUPS = 8
MOST_SETUPS = 1000  # each is a training; more are a mistyped number
POISONS, RUNS = "poisons", "runs"


class Made(NamedTuple):
    """A setup whose poisons lie in a file."""

    setup: Setup
    file: Path


def evaluate_setups(
    config: TrainConfig,
    settings: CraftSettings,
    folder: Path,
    command: str,
    *,
    count: int = SETUPS,
    device: str = "auto",
    data: str | None = None,
) -> list[Outcome]:
    """Train a surrogate and the victims, and write the table.

    The surrogate has the victims' settings but `shards`: who attacks knows how they are trained, not what each expert
    will see, nor the seed. It has the config's seed, setup i the one after that by i + 1.

    Args:
        config: of the victims.
        settings: of the poisons.
        folder: where all of it lies.
        command: what makes it, as the files say.
        count: how many setups.
        device, data: of all runs.

    Returns:
        What came of each setup.

    Raises:
        ValueError: a number out of its range, data that cannot be read, or nothing that could be a setup.
        cli.InputError: a run that failed: of the others the table is written.
    """
    check_count(config, count)
    surrogate = job_of(dataclasses.replace(config, shards=False, poison=None))
    queue = Queue(folder / RUNS, [surrogate], device=device, data=data)
    queue.run()
    if surrogate in queue.failures:
        raise cli.InputError(f"the surrogate, {surrogate.name}, failed: {queue.failures[surrogate]}")
    where = cli.pick_device(device)
    loaded = load_surrogate(folder / RUNS / surrogate.name, where, data=data, trust_code=bool(surrogate.trust))
    made = [_made(loaded, surrogate.name, settings, folder / POISONS, config.seed + 1 + i) for i in range(count)]
    del loaded
    jobs = [victim(config, each, i) for i, each in enumerate(made)]
    victims = Queue(folder / RUNS, jobs, device=device, data=data)
    victims.run()
    outcomes = [
        outcome(folder / RUNS, job, each, victims.done[job], where)
        for job, each in zip(jobs, made, strict=True)
        if job in victims.done
    ]
    failed = [f"{job.name}: {line}" for job, line in victims.failures.items()]
    clean = clean_accuracy(queue.done[surrogate])
    write(folder, outcomes, clean, settings, queue.done[surrogate], victims.done, failed, command)
    if failed:
        raise cli.InputError(f"{len(failed)} failed, the same command tries them again: {', '.join(failed)}")
    return outcomes


def job_of(config: TrainConfig) -> Job:
    """A run with the least that an evaluation does: clean accuracy on all test images is what is wanted of it."""
    attackers = ("mean",) if config.experts > 1 else None
    return Job(config, EvaluationSettings(attacks=("fgsm",), attackers=attackers, limit=100, masking_images=0))


def check_count(config: TrainConfig, count: int) -> None:
    """Check how many setups are asked for.

    Raises:
        ValueError: too few or too many, by number, or by what is no seed any more.
    """
    check_whole("setups", count, 1)
    if count > MOST_SETUPS:
        raise ValueError(f"--setups: expected at most {MOST_SETUPS}, got {count}")
    dataclasses.replace(config, seed=config.seed + count)  # which has a largest one


def victim(config: TrainConfig, made: Made, index: int) -> Job:
    """The run of a setup, by its number from 0."""
    return job_of(dataclasses.replace(config, poison=str(made.file), seed=config.seed + 1 + index))


def _made(surrogate: Surrogate, name: str, settings: CraftSettings, folder: Path, seed: int) -> Made:
    """A setup, drawn by the seed, and its poisons, which are made where they are not there."""
    setup = chosen(surrogate, settings, seed=seed)
    digest = hashlib.sha256(json.dumps([settings.to_json(), seed, *setup]).encode()).hexdigest()[:8]
    file = folder / f"{name}-{digest}.npz"
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCKS / file.stem, wait=True):
        if not file.is_file():
            classes, labels = surrogate.dataset.classes, surrogate.dataset.test.labels
            own, wanted = classes[int(labels[setup.target])], classes[setup.target_class]
            with progress(settings) as on_step:
                crafted = craft(surrogate, setup, settings, seed=seed, on_step=on_step)
            poison_file.write(file, crafted.poisons)
            cli.console.print(
                f"{file}: test image {setup.target}, {own}, as {wanted}; matching loss {crafted.before:.3f} → "
                f"{crafted.after:.3f}"
            )
    return Made(setup, file)


def clean_accuracy(done: Done) -> float:
    """The share of all test images that a run, by the mean of its gate, answers rightly."""
    for judge in ("mean", "output"):
        entry = find(done.results, "clean", None, judge)
        if entry is not None:
            return float(entry["accuracy"])
    raise ValueError("results: expected an accuracy on clean images, got none")


@torch.no_grad()
def outcome(folder: Path, job: Job, made: Made, done: Done, device: torch.device) -> Outcome:
    """What a victim takes the target of its poisons for.

    Args:
        folder: of the runs.
        job: the victim's.
        made: its setup and poisons.
        done: what its evaluation has found.
        device: where it is asked.
    """
    poisons = poison_file.read(made.file)
    assert poisons.target_image is not None
    assert poisons.target_label is not None
    model, info = load_model(folder / job.name, device, trust_code=bool(job.trust))
    image = as_float(poisons.target_image)[None].to(device)
    experts = model.expert_logits(image)[:, 0].argmax(-1).tolist()
    answer = int(model.deterministic()(image)[0].argmax())
    classes: Sequence[str] = info["classes"]
    return Outcome(
        target=made.setup.target,
        label=classes[poisons.target_label],
        wanted=classes[made.setup.target_class],
        answer=classes[answer],
        reached=answer == made.setup.target_class,
        experts_reached=sum(each == made.setup.target_class for each in experts),
        experts=len(experts),
        clean=clean_accuracy(done),
        poisons=len(poisons.indices),
        run=job.name,
        file=made.file.name,
    )
