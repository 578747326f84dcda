"""Commands in two processes on a CPU, as torchrun starts them, and a training that ends after some epochs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from immunity_fast import train
from immunity_fast.training.state import TrainingState
from tests.places import REPOSITORY

PROCESSES = 2


def launch(*command: str) -> str:
    """Run a command in two processes as torchrun starts them; what they printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
    common |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(printed)
    return "".join(printed)


def stopped(arguments: list[str]) -> None:
    """The command, killed after its first epoch."""
    with failing_after(1):
        train.main(arguments)


@contextmanager
def failing_after(epochs: int) -> Iterator[None]:
    """Training ends with an error in its `with` block after so many epochs, without having written anything more."""
    advance = TrainingState.advance

    def failing(trainer: TrainingState, batch: Any) -> None:
        if trainer.epoch == epochs:
            raise InterruptedError("enough")
        advance(trainer, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "advance", failing)
        with pytest.raises(InterruptedError, match="enough"):
            yield
