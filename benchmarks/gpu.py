"""Everything that needs a GPU, from the source tree, within eight minutes, into one record.

    python -m benchmarks.gpu --out FILE

The GPU tests, bitwise determinism, compute-sanitizer where it is installed, and in what time is left the benchmarks,
the most important first. Each step is a process of its own with a limit: one that fails or hangs stops no other.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import DEVICE
from benchmarks.record import header, write

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 455  # seconds
LAST_CASE = 45  # that a benchmark may go on after its time
TAIL = 40  # lines of a step's output that are kept
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or a read beyond a tensor is inside the allocator's block


class Step(NamedTuple):
    """A command, the seconds it may take, and what its environment has besides."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str]


def steps() -> list[Step]:
    """All but the benchmarks, which take what time these leave."""
    # A new shape is a new kernel to compile, which takes a core and not the GPU: several at once, if pytest can.
    workers = ["-n", str(min(os.cpu_count() or 1, 12))] if importlib.util.find_spec("xdist") else []
    tests = [sys.executable, "-m", "pytest", "tests/kernels", "tests/test_step_gpu.py", "-m", "gpu", "-q", *workers]
    repeat = [sys.executable, "-m", "benchmarks.repeat"]
    sanitizer = [sanitizer_path(), "--error-exitcode", "9", "--tool"]
    return [
        Step("tests", tests, 130, {}),
        Step("determinism", repeat, 50, {}),
        Step("memcheck", [*sanitizer, "memcheck", *repeat, "--small"], 50, UNCACHED),
        Step("racecheck", [*sanitizer, "racecheck", *repeat, "--small"], 50, {}),
    ]


def sanitizer_path() -> str:
    """Of compute-sanitizer; its bare name where it is not to be found."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("compute-sanitizer", path=places) or "compute-sanitizer"


def run(step: Step) -> dict[str, Any]:
    """What became of a step."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=os.environ | step.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its children end with it
            )
            status = process.wait(max(step.limit, 1))
            outcome = "passed" if status == 0 else f"failed with status {status}"
        except FileNotFoundError:
            outcome = f"not run: there is no {Path(step.command[0]).name} here"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"stopped after {step.limit:.0f} s"
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()[-TAIL:]
    return {
        "name": step.name,
        "command": " ".join(map(portable, step.command)),
        "outcome": outcome,
        "seconds": round(time.monotonic() - begin, 1),
        "tail": [portable(line) for line in lines],
    }


def portable(text: str) -> str:
    """Without the places where this machine keeps things."""
    for place, name in (
        (sys.executable, "python"),
        (str(ROOT), "."),
        (sys.prefix, "<python>"),
        (tempfile.gettempdir(), "<tmp>"),
    ):
        text = text.replace(place, name)
    return text


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    out = parser.parse_args().out
    if DEVICE.type != "cuda":
        raise SystemExit("error: benchmarks.gpu needs a CUDA GPU, and torch finds none here")
    begin = time.monotonic()
    found: dict[str, Any] = header("python -m benchmarks.gpu") | {"steps": []}

    def take(step: Step) -> None:
        found["steps"].append(run(step))
        print(f"{step.name}: {found['steps'][-1]['outcome']}, {found['steps'][-1]['seconds']} s", flush=True)
        write(out, found)

    write(out, found)  # where that is not possible, it is better known now
    for step in steps():
        take(step)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        left = TOTAL - (time.monotonic() - begin)
        limits = ["--time-limit", str(int(left - LAST_CASE)), "--out", str(file)]
        take(Step("benchmarks", [sys.executable, "-m", "benchmarks.record", *limits], left, {}))
        if file.is_file():
            measured = json.loads(file.read_text(encoding="utf-8"))
            found |= {name: value for name, value in measured.items() if name not in found}
    write(out, found)
    failed = [step["name"] for step in found["steps"] if not step["outcome"].startswith(("passed", "not run"))]
    if failed:
        raise SystemExit(f"error: not all passed: {', '.join(failed)}; see {out}")


if __name__ == "__main__":
    main()
