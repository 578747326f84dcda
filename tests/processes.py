"""Commands in two processes on a CPU, as torchrun starts them, and a training that ends after some epochs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from immunity_fast import evaluate, train
from immunity_fast.runtime import cli
from immunity_fast.training.state import TrainingState
from tests import sketches
from tests.places import REPOSITORY

PROCESSES = 2


# Imports what everybody needs, then forks the processes, each of which runs the command: imports are most of its time.
FORKING = """
import os, runpy, sys, traceback
import immunity_fast.train

def started(rank):
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    command = sys.argv[2:]
    if command[0] == "-W":
        import warnings
        warnings.simplefilter(command[1])
        command = command[2:]
    kind, what, *sys.argv[1:] = command
    code = 1
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<command>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

processes = []
for rank in range(int(sys.argv[1])):
    process = os.fork()
    if not process:
        started(rank)
    processes.append(process)
codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
sys.exit(int(any(codes)))
"""


def launch(*command: str) -> str:
    """Run a command of Python's in two processes as torchrun starts them; what they printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
    common |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", FORKING, str(PROCESSES), *command],
        cwd=REPOSITORY,
        env=os.environ | common,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed = process.communicate(timeout=240)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the processes that it forked, too
    assert process.returncode == 0, printed
    return printed


def stopped(arguments: list[str]) -> None:
    """The command, killed after its first epoch."""
    with failing_after(1):
        train.main(arguments)


def shortly_ended(arguments: list[str]) -> None:
    """The command, with a short end of the run; see `tests.sketches`."""
    with sketches.short():
        cli.run_command(lambda: train.main(arguments))


def trained_and_evaluated(arguments: list[str]) -> None:
    """The command, with a short end of the run, which is "run", and then `evaluate`, as a user has it."""

    def both() -> None:
        with sketches.short():
            train.main(arguments)
        evaluate.main(["run", "--attacks", "fgsm", "--attackers", "mean", "--limit", "2", "--masking-images", "0"])

    cli.run_command(both)


class Enough(Exception):
    """No error of a user's, of which a command makes a line."""


@contextmanager
def failing_after(epochs: int) -> Iterator[None]:
    """Training ends with an error in its `with` block after so many epochs, without having written anything more."""
    advance = TrainingState.advance

    def failing(trainer: TrainingState, batch: Any) -> None:
        if trainer.epoch == epochs:
            raise Enough
        advance(trainer, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "advance", failing)
        with pytest.raises(Enough):
            yield
