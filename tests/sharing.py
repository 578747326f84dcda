"""What a process does, again and again, as a test asks for it beside another such process.

A request is a dictionary, {"do": NAME, …}, and has an answer. The work is a moment's sleep, where it can be.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from immunity_fast import evaluate, train
from immunity_fast.evaluation.ledger import Ledger
from immunity_fast.evaluation.runner import Evaluation
from immunity_fast.reproduction.jobs import Job, Queue
from immunity_fast.runtime import cli
from immunity_fast.training import ensemble, preparation, run_evaluation, session
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.preparation import Start
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from tests import sketches

KEYS = [f"piece {number}" for number in range(12)]
WORK = 0.001  # seconds
CONFIG = TrainConfig(dataset="npz", experts=2, beta=0.0, gamma=0.0)
ALONE = Job(replace(CONFIG, experts=1), members=3)
JOBS = [ALONE, *(Job(replace(CONFIG, seed=seed)) for seed in range(3))]
ENTRY = {"attack": "clean", "attacker": None, "judge": "mean", "accuracy": 1.0, "interval": [0.5, 1.0], "seconds": 0.0}


def ledger(folder: str, *, killed_at: int = -1, torn: bool = False) -> list[str]:
    """All pieces of a ledger; those that were done here. Killed at one of them, or as its line is half written."""
    own = Ledger(Path(folder) / "ledger.jsonl")
    made = []
    for key in own.shared(KEYS, str):
        if key not in own:
            time.sleep(WORK)
            if len(made) == killed_at:
                with own._writing() as file:
                    os.write(file, b'{"key": "pie' if torn else b"")
                    os.kill(os.getpid(), signal.SIGKILL)
            own.add(key, {"by": os.getpid()})
            made.append(key)
    assert own.pieces.keys() == set(KEYS)
    return made


def killed(folder: str, at: int, torn: bool) -> int:
    """`ledger` in a process that is killed; the signal."""
    process = os.fork()
    if not process:
        ledger(folder, killed_at=at, torn=torn)
        os._exit(0)
    return -os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def lock(folder: str) -> str:
    """Hold a run for a moment, and leave "+" and "-" in a file."""
    try:
        with Run(Path(folder)).locked(), (Path(folder) / "log").open("ab", buffering=0) as log:
            log.write(b"+")
            time.sleep(0.01)
            log.write(b"-")
            return "held"
    except BlockingIOError as error:
        return str(error)


def queue(folder: str, data: str) -> dict[str, Any]:
    """A queue of runs that take no time: what was done here, and what is known of all of them."""
    done: list[str] = []

    def made(out: Path, config: TrainConfig) -> Run:
        time.sleep(WORK)
        done.append(out.name)
        run = Run.create(out, config)
        run.checkpoint.touch()
        return run

    def fit(start: Start) -> None:
        assert not start.resume
        made(start.folder, start.config)

    def judge(out: Path, *_given: Any, **_options: Any) -> None:
        Run(out).results_file.write_text(json.dumps({"accuracy": [ENTRY], "worst_case": []}))

    with (
        _patched(session, "fit", fit),
        _patched(run_evaluation, "evaluate_folder", judge),
        _patched(ensemble, "join", lambda _runs, out, **_options: made(out, CONFIG)),
        _patched(Run, "epochs_trained", lambda _run: CONFIG.epochs),
    ):
        own = Queue(Path(folder) / "runs", JOBS, device="cpu", data=data)
        own.run()
    assert not own.failures, own.failures
    return {"here": done, "done": sorted(job.name for job in own.done)}


def resume(folder: str) -> list[Any]:
    """Go on with a run; (steps taken, error)."""
    steps = []
    advance = TrainingState.advance

    def counted(trainer: TrainingState, batch: Any) -> None:
        steps.append(trainer.step)
        advance(trainer, batch)

    with _patched(TrainingState, "advance", counted):
        try:
            with cli.input_errors():
                start = train.parse(["--resume", folder])
            session.fit(start)
        except (cli.InputError, OSError) as error:
            return [steps, str(error)]
    return [steps, ""]


def judge(run: str, out: str, arguments: list[str]) -> int:
    """Evaluate a run; how many pieces were computed here."""
    pieces = []
    piece = Evaluation._piece

    def counted(*given: Any) -> Any:
        pieces.append(given[1])
        return piece(*given)

    with _patched(Evaluation, "_piece", counted):
        evaluate.main([run, *arguments, "--out", out])
    return len(pieces)


def begin(folder: str, arguments: list[str]) -> str:
    """Begin a run for which nobody gives a name, at a certain second, in a current folder; its folder."""

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Stopped:
            return cls(2026, 1, 2, 3, 4, 5)

    with _within(folder), _patched(preparation, "datetime", Stopped):
        trained = session.fit(train.parse(arguments))
    assert trained is not None
    return trained[1].folder.name


def hold(folder: str) -> None:
    """Go on with a run, as the command does, and stay in its next step, of which a file tells."""

    def stay(*_: Any) -> None:
        (Path(folder) / "training").touch()
        signal.pause()

    with _patched(TrainingState, "advance", stay):
        cli.console.quiet = True
        cli.run_command(lambda: train.main(["--resume", folder]))


@contextlib.contextmanager
def _patched(where: Any, name: str, value: Any) -> Any:
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


@contextlib.contextmanager
def _within(folder: str) -> Any:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def serve(connection: Connection) -> None:
    """Answer requests until there are no more."""
    cli.console.quiet = True
    tasks: dict[str, Callable[..., Any]] = {
        function.__name__: function for function in (ledger, killed, lock, queue, resume, judge, begin)
    }
    with sketches.short(), contextlib.suppress(EOFError):
        while True:
            request = connection.recv()
            connection.send(tasks[request.pop("do")](**request))
