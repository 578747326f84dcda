"""Commands in two processes on a CPU, as torchrun starts them, and a training that ends after some epochs."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from immunity_fast import evaluate, train
from immunity_fast.runtime import cli
from immunity_fast.training.state import TrainingState
from tests import sketches
from tests.places import REPOSITORY

PROCESSES = 2


# Processes are forked from one that has imported what all need, which takes longer than what most of them do.
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["immunity_fast.train", "torch._dynamo"])  # the latter for an optimiser's first step


def forked(target: Callable[..., Any], *arguments: Any) -> Any:
    """A process that calls a function of a module, with one thread, and kernels in the interpreter on any machine."""
    process = FORKING.Process(target=target, args=arguments)
    with pytest.MonkeyPatch.context() as patch:  # of the first one: that from which all are forked has it then
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TRITON_INTERPRET", "1")
        process.start()
    return process


def launch(*command: str, processes: int = PROCESSES, seconds: float = 240) -> str:
    """Run a command of Python's, `-m …` or `-c …`, in processes as torchrun starts them; what they printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    common |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    with tempfile.NamedTemporaryFile(mode="r", encoding="utf-8") as printed:
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        started = [forked(_started, command, {**os.environ, **common, **own}, printed.name) for own in ranks]
        try:
            end = time.monotonic() + seconds
            for process in started:
                process.join(max(0.0, end - time.monotonic()))
            assert [process.exitcode for process in started] == [0] * processes, printed.read()
        finally:
            for process in started:
                process.kill()
        return printed.read()


def _started(command: tuple[str, ...], environment: dict[str, str], printed: str) -> None:
    """Be the process that `python` with these words starts."""
    with open(printed, "a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    torch.set_num_threads(1)
    if command[0] == "-W":
        warnings.simplefilter(command[1])  # type: ignore[arg-type]
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
