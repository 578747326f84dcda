"""The job script for Slurm, with stand-ins for Slurm's commands and for torchrun: nothing here has seen a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.places import REPOSITORY

SCRIPT = REPOSITORY / "examples" / "slurm.sh"
# Two machines, of which each runs the task; a signal is passed on to both, as srun does.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM $first $second; wait' TERM
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""
PYTHON = """#!/bin/bash
printf '%s\\n' "$*" >> started.txt
if [[ -n ${FAILS:-} ]]; then exit 3; fi
if [[ " $* " == *" --resume "* ]]; then exit 0; fi
mkdir -p runs/immunity-71 && touch runs/immunity-71/config.json
trap 'echo saved >> saved.txt; exit 143' TERM
for _ in $(seq 100); do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'node7\\nnode8\\n'; else echo "$*" >> queued.txt; fi
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", SCONTROL)):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        file.chmod(0o755)
    slurm = {"JOB_NAME": "immunity", "JOB_ID": "71", "JOB_NODELIST": "node[7-8]", "NNODES": "2"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return (
        kept
        | {f"SLURM_{name}": value for name, value in slurm.items()}
        | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    )


def _start(environment: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), "--preset", "paper"], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE
    )


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_a_job_is_saved_queued_again_and_goes_on(number: int, environment: dict[str, str], tmp_path: Path) -> None:
    job = _start(environment, tmp_path)
    started = tmp_path / "started.txt"
    until = time.monotonic() + 20
    while not (started.is_file() and started.read_text().count("\n") == 2 and (tmp_path / "runs").is_dir()):
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.3)  # until the stand-ins listen
    job.send_signal(number)
    assert "goes back into the queue" in job.communicate(timeout=20)[0]
    assert job.returncode == 0
    assert (tmp_path / "saved.txt").read_text() == "saved\n" * 2
    assert (tmp_path / "queued.txt").read_text() == "requeue 71\n"
    for rank, line in enumerate(sorted(started.read_text().splitlines())):
        assert line == (
            f"-m torch.distributed.run --nnodes 2 --node-rank {rank} --master-addr node7 --master-port 20071 "
            "--nproc-per-node gpu -m immunity_fast.train --out runs/immunity-71 --preset paper"
        )
    started.unlink()
    job = _start(environment, tmp_path)
    job.communicate(timeout=20)
    assert job.returncode == 0
    assert all("--resume runs/immunity-71 --preset paper" in line for line in started.read_text().splitlines())


def test_a_job_that_fails_has_its_status(environment: dict[str, str], tmp_path: Path) -> None:
    job = _start(environment | {"FAILS": "yes"}, tmp_path)
    job.communicate(timeout=20)
    assert job.returncode == 3
    assert not (tmp_path / "queued.txt").exists()
