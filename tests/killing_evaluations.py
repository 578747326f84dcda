"""`python -m tests.killing_evaluations RUN FOLDER SEED`: evaluates into FOLDER/whole, and, with kills, FOLDER/killed.

Each evaluation is a process forked from this one, as in `tests.killing`. Prints what each of the four SIGKILLs left, as
JSON.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

from immunity_fast import evaluate
from immunity_fast.evaluation import report
from immunity_fast.evaluation.runner import Evaluation
from immunity_fast.runtime import cli
from tests.killing import STEP, WRITE, kill, telling


def main(finished: str, folder: Path, seed: int) -> None:
    """See the top."""
    chance, killed = random.Random(seed), folder / "killed"
    arguments = [finished, "--device", "cpu", "--attacks", "fgsm", "--masking-images", "0"]
    arguments += ["--draws", "2", "--limit", "5"]

    def start(name: str) -> tuple[int, int]:
        hearing, pipe = os.pipe()
        process = os.fork()
        if process:
            os.close(pipe)
            return process, hearing
        os.close(hearing)
        report._figures = lambda *_: []  # type: ignore[assignment]
        evaluate.CHUNK["cpu"] = 3
        Evaluation._piece = telling(pipe, STEP, Evaluation._piece)  # type: ignore[method-assign]
        os.fsync = telling(pipe, WRITE, os.fsync)
        try:
            cli.run_command(lambda: evaluate.main([*arguments, "--out", str(folder / name)]))
        except SystemExit as end:
            os._exit(int(end.code or 0))

    def finish(name: str) -> None:
        process, pipe = start(name)
        while os.read(pipe, 4096):
            pass
        if os.waitpid(process, 0)[1]:
            raise SystemExit(f"{name} failed")

    finish("whole")
    kills = []
    for writing in (False, True, False, True):
        process, pipe = start("killed")
        kills.append(kill(process, pipe, chance.randint(1, 3), chance.uniform(0, 0.005), writing=writing))
        kills[-1]["pieces"] = (killed / "evaluation.jsonl").read_bytes().count(b"\n")
    finish("killed")
    print(json.dumps(kills))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
