"""Trains a run for its first epoch, and goes on with it in a new process, as somebody does after a kill.

python .ci/rehearsal/interrupted.py FOLDER -m immunity_fast.train arguments…
"""

import sys
from pathlib import Path

from immunity_fast import train
from immunity_fast.runtime import cli
from immunity_fast.training import loop
from immunity_fast.training.state import TrainingState


def main() -> None:
    """The command; its training is stopped after an epoch, the way SIGINT stops it."""
    folder, arguments = Path(sys.argv[1]), sys.argv[4:]
    validate = loop.validate

    def interrupt(state: TrainingState) -> dict[str, float]:
        loop.validate = validate
        raise KeyboardInterrupt

    loop.validate = interrupt
    try:
        train.main([*arguments, "--checkpoint-every", "1", "--out", str(folder)])
    except KeyboardInterrupt:
        cli.run_command(lambda: train.main(["--resume", str(folder), "--device", "cuda"]))
    raise SystemExit("error: the run was not interrupted")


if __name__ == "__main__":
    main()
