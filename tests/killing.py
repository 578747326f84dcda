"""`python -m tests.killing FOLDER DATA SEED KILLS`: trains FOLDER/whole, and FOLDER/killed with SIGKILLs on the way.

Each attempt is a process forked from this one, which has imported everything and computed nothing, so that an attempt
costs no imports. Through a pipe it tells of each step it begins and of each file it is about to flush to the disk. It
is killed a random time after a random step, or in the middle of writing what follows it; too early, in sum, for the
attempts to reach the end. Prints a JSON object: what each attempt began and left behind.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401
from torch.utils import tensorboard  # noqa: F401  both for the processes to come

from immunity_fast import train
from immunity_fast.experts import create
from immunity_fast.experts.staged import default_stage
from immunity_fast.runtime import cli
from immunity_fast.training.checkpoint import load_checkpoint
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from tests import sketches
from tests.small_runs import go_on, options

MOST_STEPS = 8  # of an attempt
STEPS = 5  # an epoch
STARTING = (0, 4)  # attempts killed before their first step
WRITING = (2, 3, 7, 9)  # attempts killed while they write
STEP, WRITE = b".", b"w"


def start(arguments: list[str], folder: Path) -> tuple[int, int]:
    """A process that trains: its id, and the end of the pipe where it tells of its steps and writings."""
    hearing, pipe = os.pipe()
    process = os.fork()
    if process:
        os.close(pipe)
        return process, hearing
    code = 1
    try:
        os.close(hearing)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        TrainingState.advance = telling(pipe, STEP, TrainingState.advance)  # type: ignore[method-assign]
        os.fsync = telling(pipe, WRITE, os.fsync)
        try:
            cli.run_command(lambda: train.main(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
    finally:
        os._exit(code)


def telling(pipe: int, what: bytes, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, each call of which is told of through the pipe before it does its work."""

    def told(*arguments: Any) -> Any:
        os.write(pipe, what)
        return function(*arguments)

    return told


def finish(arguments: list[str], folder: Path) -> tuple[int, float]:
    """Train to the end: how many steps that took, and how many seconds each of them, with its checkpoint."""
    process, pipe = start(arguments, folder)
    times = []
    while heard := os.read(pipe, 1):
        if heard == STEP:
            times.append(time.perf_counter())
    os.close(pipe)
    if os.waitpid(process, 0)[1] != 0:
        raise SystemExit((folder / "log.txt").read_text(encoding="utf-8"))
    return len(times), (times[-1] - times[0]) / len(times)


def kill(process: int, pipe: int, steps: int, delay: float, *, writing: bool) -> dict[str, Any]:
    """Wait for so many steps, then for a writing or for `delay` seconds, and kill: what came of it."""
    heard = b""
    while heard.count(STEP) < steps or (writing and not heard.endswith(WRITE)):
        next_one = os.read(pipe, 1)
        if not next_one:
            break  # it has ended by itself
        heard += next_one
    if not writing:
        time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    while more := os.read(pipe, 4096):
        heard += more
    os.close(pipe)
    return {"killed": os.WIFSIGNALED(status), "begun": heard.count(STEP)}


def main(folder: Path, data: Path, seed: int, number_of_kills: int) -> None:
    """See the top."""
    chance = random.Random(seed)
    default_stage(create("resnet8"), 12)  # imports what the attempts need
    epochs = number_of_kills * MOST_STEPS // STEPS
    arguments = options(data, epochs=epochs, checkpoint_every=1, check_images=0, attack_images=2)
    _, seconds = finish([*arguments, "--out", str(folder / "whole")], folder)
    run = Run(folder / "killed")
    kills = []
    for number in range(number_of_kills):
        process, pipe = start(go_on(run.folder, arguments), folder)
        if number in STARTING:
            kills.append(kill(process, pipe, 0, chance.uniform(0, 0.25), writing=False))
        else:
            steps, delay = chance.randint(1, MOST_STEPS), chance.uniform(0, 2 * seconds)
            kills.append(kill(process, pipe, steps, delay, writing=number in WRITING))
        # Raises where a checkpoint is not whole.
        kills[-1]["step"] = load_checkpoint(run.checkpoint)[1]["step"] if run.checkpoint.is_file() else 0
        kills[-1]["unfinished"] = [file.name for file in folder.rglob("*.unfinished")]
    rest, _ = finish(go_on(run.folder, arguments), folder)
    print(json.dumps({"kills": kills, "rest": rest}))


if __name__ == "__main__":
    with sketches.short():  # what is drawn of a run is not compared
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
