"""A queue of training runs and their evaluations that survives a kill: what is done is not done again.

A job's folder is named after its settings, so whatever asks for the same run finds it, trained or half trained. A job
that fails is reported, and the others go on. Several processes may work on one queue: a job is locked by the one at
it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from immunity_fast.data.datasets import fingerprint, load
from immunity_fast.evaluation.runner import VERSION
from immunity_fast.evaluation.settings import EvaluationSettings
from immunity_fast.experts.registry import file_title, imports_code
from immunity_fast.runtime import cli
from immunity_fast.runtime.commands import shell_command
from immunity_fast.runtime.files import locked, parse_json, write_atomically
from immunity_fast.training import ensemble, run_evaluation, session
from immunity_fast.training.checkpoint import model_file
from immunity_fast.training.config import ADDED, REMOVED, TrainConfig
from immunity_fast.training.preparation import CHANGEABLE_ON_RESUME, begin, go_on
from immunity_fast.training.run_folder import Run

LOCKS = ".locks"
CHECKSUM = "sha256"  # of a record of what is done: its other members'


@dataclass(frozen=True)
class Job:
    """A run to be trained and evaluated.

    Args:
        config: the settings, of each member where there are several.
        evaluation: what is then found out of it.
        members: above 1: so many single networks, trained alone with seeds of their own, and joined to a mixture.
        begins_from: a job whose run is trained first, and with whose weights this one's begins.
        transfer_from: a job whose run is trained first, and whose adversarial images are tried on this one's.
    """

    config: TrainConfig
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    members: int = 1
    begins_from: Job | None = None
    transfer_from: Job | None = None

    @property
    def name(self) -> str:
        """Of the run's folder: readable, and different for different settings."""
        settings = self.config.to_json() | REMOVED  # by which runs from before have their names
        settings = {k: v for k, v in settings.items() if k not in (*CHANGEABLE_ON_RESUME, "preset")}
        default = TrainConfig()
        settings = {k: v for k, v in settings.items() if k not in ADDED or v != getattr(default, k)}
        described = [settings, self.members, *([] if self.begins_from is None else [self.begins_from.name])]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:8]
        config = self.config
        count = f"{self.members}-alone" if self.members > 1 else f"{config.experts}"
        words = [config.dataset, count, file_title(config.arch)]
        words += [] if config.adversarial == "off" else [config.adversarial]
        return "-".join([*words, digest, f"seed{config.seed}"])

    @property
    def trust(self) -> list[str]:
        """The option of commands that read the run's architecture where it is code of the user's, as given here."""
        return ["--trust-code"] if imports_code(self.config.arch) else []

    def alone(self) -> list[Job]:
        """The jobs of the networks that are trained alone and then joined, each with a seed of its own."""
        seeds = range(self.config.seed * self.members, (self.config.seed + 1) * self.members)
        return [Job(dataclasses.replace(self.config, seed=seed)) for seed in seeds]

    @property
    def trained(self) -> list[Job]:
        """The jobs whose training this one's weights are made of: its members, or what it begins from and itself."""
        if self.members > 1:
            return self.alone()
        return [*([] if self.begins_from is None else self.begins_from.trained), self]


@dataclass(frozen=True)
class Done:
    """What a job has found.

    Args:
        results: as `evaluation.results.results` makes them.
        settings: of the run, by name.
        commands: that do the job.
        data: a hash of the test split.
        device: that it was done on.
        versions: of the packages that it was done with.
        training_seconds, attack_seconds: of all its training, with that of what it begins from, and all its attacks.
    """

    results: dict[str, Any]
    settings: dict[str, Any]
    commands: list[str]
    data: str
    device: str
    versions: dict[str, str]
    training_seconds: float
    attack_seconds: float


class Queue:
    """Works through jobs; `done` and `failures` hold what came of each.

    Args:
        folder: where the runs are.
        jobs: in the order in which they are begun; the same one twice is one.
        device, data: for the commands.

    Raises:
        ValueError, OSError: data that cannot be read.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job], *, device: str = "auto", data: str | None = None) -> None:
        self.folder, self.device, self.data = folder, device, data
        self.jobs = list(dict.fromkeys(jobs))
        self.done: dict[Job, Done] = {}
        self.failures: dict[Job, str] = {}
        # A file may have other content than when a run was done. And what is wrong with the data is better said once.
        self._data: dict[tuple[str, int | None, int], str] = {}
        for config in (job.config for job in self.jobs):
            place = _place(config)
            if place not in self._data:
                found = load(config.dataset, data, image_size=config.image_size, channels=config.channels)
                self._data[place] = fingerprint(found.test)

    def run(self, *, wait: bool = True) -> bool:
        """Do what is not done, first what no other process is at; then wait for the others, unless that is not wanted.

        Returns:
            Whether every job is done or has failed; without waiting, those of other processes may be left.
        """
        (self.folder / LOCKS).mkdir(parents=True, exist_ok=True)
        left = [job for job in self.jobs if job not in self.done and job not in self.failures]
        others = [job for job in left if not self._try(job, wait=False)]
        for job in others if wait else ():
            if self._found(job) is None:
                cli.console.print(f"{job.name}: another process is at it; this one helps or waits")
                self._help(job)
            self._try(job, wait=True)
        return wait or not others

    def find_done(self) -> None:
        """Fill `done` with what was done before, by whatever process; nothing is trained or evaluated."""
        found = {job: self._found(job) for job in self.jobs}
        self.done = {job: done for job, done in found.items() if done is not None}

    def _try(self, job: Job, *, wait: bool) -> bool:
        """Do a job; whether that was possible, which it is not where another process is at it."""
        found = self._found(job)
        if found is None:
            with locked(self._lock(job), wait=wait) as mine:
                if not mine:
                    return False
                found = self._found(job)  # another process may have done it meanwhile
                if found is None:
                    found = self._attempt(job)
        if found is not None:
            self.done[job] = found
        return True

    def _attempt(self, job: Job) -> Done | None:
        place = f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {job.name}"
        cli.console.print(f"\n{place}")
        try:
            return self._do(job)
        except Exception as error:  # whatever is wrong with one run says nothing about the others
            line = " ".join(str(error).split()) or type(error).__name__
            self.failures[job] = line
            cli.console.print(f"{place} FAILED: {line}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return None

    def _do(self, job: Job) -> Done:
        run = Run(self.folder / job.name)
        commands = []
        for other in job.trained:
            commands.append(self._train(other) if other == job else self._train_locked(other))
        if job.members > 1:
            commands.append(self._join(job))
        if job.transfer_from is not None:
            commands += [self._train_locked(other) for other in job.transfer_from.trained]
        commands.append(self._evaluate(job))
        results = json.loads(run.results_file.read_text(encoding="utf-8"))
        trained = [Run(self.folder / other.name) for other in job.trained]
        done = Done(
            results=results,
            settings={k: v for k, v in run.config().to_json().items() if k not in ("data", "device")},
            commands=commands,
            data=self._data[_place(job.config)],
            device=describe(cli.pick_device(self.device)),
            versions={"python": platform.python_version(), "torch": torch.__version__},
            training_seconds=sum(record["seconds"] for each in trained for record in each.metrics()),
            attack_seconds=attack_seconds(results),
        )
        found = dataclasses.asdict(done)
        record = found | {CHECKSUM: checksum(found)}
        write_atomically(self._record(job), json.dumps(record, indent=1).encode())
        return done

    def _help(self, job: Job) -> None:
        """Train what another process, at a job of several members, has not come to."""
        for member in job.alone() if job.members > 1 else ():
            with locked(self._lock(member), wait=False) as mine:
                if mine and self._found(job) is None:
                    with suppress(Exception):  # it fails there, too, and is reported
                        self._train(member)

    def _train_locked(self, job: Job) -> str:
        """`_train` of what is not the job that is done: locked, as it may be one of another process as well."""
        with locked(self._lock(job), wait=True):
            return self._train(job)

    def _train(self, job: Job) -> str:
        """Train a run to its end, from where it stands; the command that does it."""
        run = Run(self.folder / job.name)
        config = dataclasses.replace(job.config, device=self.device, data=self.data)
        if job.begins_from is not None:
            config = dataclasses.replace(config, weights=str(model_file(self.folder / job.begins_from.name)))
        if not _ended(run):
            here = {"device": self.device} | ({} if self.data is None else {"data": self.data})
            trust = bool(job.trust)
            known = run.folder.exists()
            session.fit(go_on(run.folder, here, trust_code=trust) if known else begin(config, run.folder))
        return shell_command("train", [*config.options(), "--out", str(run.folder)])

    def _evaluate(self, job: Job) -> str:
        """Evaluate a job's run; the command that does it."""
        folder = self.folder / job.name
        with cli.input_errors():
            device = cli.pick_device(self.device)
            run_evaluation.evaluate_folder(
                folder,
                job.evaluation,
                device,
                data=self.data,
                trust_code=bool(job.trust),
                transfer_from=None if job.transfer_from is None else self.folder / job.transfer_from.name,
            )
        options = [*job.evaluation.options(), "--device", self.device]
        options += [] if self.data is None else ["--data", self.data]
        if job.transfer_from is not None:
            options += ["--transfer-from", str(self.folder / job.transfer_from.name)]
        return shell_command("evaluate", [str(folder), *options, *job.trust])

    def _join(self, job: Job) -> str:
        """Join a job's members, unless that is done; the command that does it."""
        run = Run(self.folder / job.name)
        members = [self.folder / member.name for member in job.alone()]
        if run.folder.exists() and not run.checkpoint.is_file():
            shutil.rmtree(run.folder)  # it was killed on the way
        if not run.folder.exists():
            ensemble.join(members, run.folder, trust_code=bool(job.trust))
        return shell_command("ensemble", [*map(str, members), "--out", str(run.folder), *job.trust])

    def _lock(self, job: Job) -> Path:
        return self.folder / LOCKS / job.name

    def _record(self, job: Job) -> Path:
        described = [VERSION, *job.evaluation.options()]  # what another version has found is computed again
        if job.transfer_from is not None:
            described += ["transfer from", job.transfer_from.name]
        digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:8]
        return self.folder / job.name / f"done-{digest}.json"

    def _found(self, job: Job) -> Done | None:
        try:
            record = parse_json(self._record(job).read_bytes())
            # The record is made again where it is not as it was written: that takes its evaluation's ledger, no more.
            if record.pop(CHECKSUM) != checksum(record):
                return None
            found = Done(**record)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return None  # not done, or not by this version
        return found if found.data == self._data[_place(job.config)] else None


def _place(config: TrainConfig) -> tuple[str, int | None, int]:
    """What the images of a job depend on; where they lie is the queue's."""
    return config.dataset, config.image_size, config.channels


def checksum(record: dict[str, Any]) -> str:
    """A hash of what a file says, whatever the order and the spaces."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def attack_seconds(results: dict[str, Any]) -> float:
    """The seconds that all attacks of an evaluation took, in whatever process each was made."""
    first = results["accuracy"][0]["judge"]  # a row is there once for each judge
    return float(sum(entry["seconds"] for entry in results["accuracy"] if entry["judge"] == first))


def describe(device: torch.device) -> str:
    """A device's name: a GPU's own, or a CPU's kind, cores that the process may use, and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = f"{count} cores"
    return f"CPU ({platform.machine()}), {cores}, {threads} thread{'s' if threads > 1 else ''}"


def _ended(run: Run) -> bool:
    return run.checkpoint.is_file() and run.has_ended(run.epochs_trained())
