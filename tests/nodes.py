"""Two machines, as far as one can stand in for two: torchrun agents of different ranks, each in a folder of its own.

`python -m tests.nodes OUT DATA` is what each of their processes runs: one start for several cases, of which the first
process writes down what came out, in OUT.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from immunity_fast import train
from immunity_fast.runtime import cli, distributed
from immunity_fast.training import session, shards
from immunity_fast.training.state import TrainingState
from tests.places import REPOSITORY
from tests.small_runs import arrays, options

SMOOTH = "tests.own_networks:smooth"
STOPPED_AT = 7  # the step after which the second machine's process gets a signal


def start_nodes(folders: list[Path], *command: str) -> list[Any]:
    """A torchrun agent in each folder, with one process each of a module and its words."""
    port = free_port()
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(REPOSITORY),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
                *("--node-rank", str(number), "--master-addr", "127.0.0.1", "--master-port", str(port)),
                *("-m", *command),
            ],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, folder in enumerate(folders)
    ]


def ended(agents: list[Any], seconds: float = 240) -> tuple[list[int], list[str]]:
    """Their status and what they printed, once they have ended."""
    try:
        printed = [agent.communicate(timeout=seconds)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [agent.returncode for agent in agents], printed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def smooth_options(data: Path, **changes: Any) -> list[str]:
    """Of a run whose result does not depend on how many processes there are."""
    return options(data, **{"arch": SMOOTH, "stage": "2", "compile": "off", **changes})


def refused(arguments: list[str]) -> str:
    """What a command says that is refused."""
    try:
        train.main(arguments)
    except (cli.InputError, OSError) as error:
        return str(error)
    return "nothing was wrong"


def stopped_by_a_signal(arguments: list[str]) -> int:
    """Train until the second process gets SIGTERM; the status with which the command ends."""
    advance = TrainingState.advance

    def signalled(state: TrainingState, batch: Any) -> Any:
        if state.step == STOPPED_AT and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(state, batch)

    TrainingState.advance = signalled  # type: ignore[method-assign]
    try:
        train.main(arguments)
    except KeyboardInterrupt as interrupt:
        return int(getattr(interrupt, "status", 0))
    finally:
        TrainingState.advance = advance  # type: ignore[method-assign]
    return 0


def cases(data: Path) -> dict[str, Callable[[], Any]]:
    """What is tried, in turn, by name; each process has a working folder of its own."""
    run = ["--out", "runs/several"]
    mine = Path("mine.npz")
    np.savez(mine, **arrays(seed=int(os.environ["RANK"])))
    if os.environ["RANK"] == "0":
        np.savez("first.npz", **arrays())

    return {
        "stopped": lambda: stopped_by_a_signal([*smooth_options(data), *run]),
        "resumed": lambda: train.main(["--resume", "runs/several", "--trust-code"]),
        "other data": lambda: refused([*smooth_options(mine), "--out", "runs/other"]),
        "no data": lambda: refused([*smooth_options(Path("first.npz")), "--out", "runs/none"]),
        "shards": lambda: refused([*smooth_options(data), "--shard", "--out", "runs/shards"]),
        "wrong option": lambda: refused([*smooth_options(data), "--lr", "0"]),
    }


def main() -> None:
    out, data = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    shards.PATIENCE = 0.2
    session.evaluate_trained = lambda *_: None  # what one process does alone is looked at elsewhere
    found = {name: case() for name, case in cases(data).items()}
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
