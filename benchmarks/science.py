"""What mixtures of 5 × ResNet18 learn in minutes: trainings one after the other, each followed by its attacks.

    python -m benchmarks.science --data FILE.npz --out FILE.json --limit SECONDS [--runs NAME…]

Every training is a process of its own (`benchmarks.training`). They begin beside each other, up to and with their first
step, which compiles and leaves the GPU idle; then they get the GPU in turns, each for its share of what is left. What a
training reports is written as it comes: epochs, accuracies, or why there are none.
"""

import argparse
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import outcomes
from benchmarks.outcomes import FAILED, NOT_FINISHED, ROOT, write
from benchmarks.stages import INTERRUPTED

# Each with its part of the time: epochs, by the passes through the network that an image takes in one, in units of a
# plain step of five experts. A choice beforehand; what is measured decides on the epochs.
RUNS = {
    "standard, plain": 16 * 1.0,
    "standard, full": 16 * 1.5,
    "fgsm-rs, single": 15 * 0.4,
    "fgsm-rs, plain": 15 * 2.0,
    "fgsm-rs, full": 15 * 2.5,
}
READY, OVER = "ready", (outcomes.PASSED, FAILED, NOT_FINISHED, outcomes.NOT_RUN, outcomes.NOT_JUDGED)
RESERVE = 3.0  # seconds before the limit: then everything is stopped
GRACE = 10.0  # seconds after its turn: then a training is stopped that has not ended by itself
COMPILING_CORES = 3  # of one training
CHECKPOINTS = 8 << 30  # bytes that five trainings may want for a while: weights, momentum, and both once more
TAIL = 30  # lines
TOLD_ONCE = ("settings", "versions", "device")  # in the record: too much for a line


def turn(name: str, left: float, unfinished: Iterable[str]) -> float:
    """Seconds for a training, of those that are left for all that have not ended."""
    return max(0.0, left) * RUNS[name] / sum(RUNS[other] for other in unfinished)


class _Training:
    """A training's process, and its record."""

    def __init__(self, name: str, record: dict[str, Any]) -> None:
        self.name, self.record = name, record
        self.process: subprocess.Popen[str] | None = None
        self.state = "waiting"  # then "compiling", READY, "training" or "over"
        self.until = float("inf")
        self.tail: deque[str] = deque(maxlen=TAIL)

    def start(self, command: list[str], events: "queue.Queue[Any]", threads: int) -> None:
        self.state = "compiling"
        self.process = subprocess.Popen(
            [*command, "--run", self.name],
            cwd=ROOT,
            env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        threading.Thread(target=self._read, args=(self.process, events), daemon=True).start()

    def _read(self, process: "subprocess.Popen[str]", events: "queue.Queue[Any]") -> None:
        assert process.stdout is not None
        for text in process.stdout:
            events.put((self, text.rstrip("\n")))
        process.wait()
        events.put((self, None))

    def go(self, seconds: float) -> None:
        """Tell the process, which has compiled and waits, to train for so many seconds."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.state = "training"
        try:
            self.process.stdin.write(f"{seconds:.1f}\n")
            self.process.stdin.flush()
        except OSError:  # it has ended, which is heard of next
            pass

    def stop(self) -> None:
        """Kill the process, if it is running."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def heard(self, text: str) -> str | None:
        """Take a line up into the record, and tell it; None where there is nothing to tell."""
        found = outcomes.read(text)
        if found is None:
            self.tail.append(text[:300])
            return None
        found.pop("name")
        if "epoch" in found:
            self.record.setdefault("epochs", []).append(found["epoch"])
        else:
            self.record.update(found)
        if found["outcome"] == READY and self.state == "compiling":
            self.state = READY
        return f"{self.name}: " + str({key: value for key, value in found.items() if key not in TOLD_ONCE})

    def tell(self) -> None:
        """Report what became of the process."""
        outcomes.report(self.name, self.record["outcome"], self.record.get("cause", ""))

    def ended(self) -> None:
        """Record of a process that has ended whatever it has not said of itself."""
        assert self.process is not None
        status = self.process.wait()
        if self.state == "stopped" and self.record.get("outcome") not in OVER:
            self.record["outcome"] = NOT_FINISHED
        elif status or self.record.get("outcome") not in OVER:
            said = outcomes.innermost_line("\n".join(self.tail))
            if self.record.get("outcome") != FAILED:
                self.record |= {"outcome": FAILED, "cause": f"ended with status {status}: {said}"}
            self.record["tail"] = list(self.tail)
        self.state = "over"


def run(
    command: list[str], out: Path, limit: float, cores: int, grace: float = GRACE, names: Iterable[str] = RUNS
) -> dict[str, Any]:
    """The record as it stands in `out`, of trainings that `command --run NAME` does; `grace` is beyond their turns."""
    deadline = time.monotonic() + limit - RESERVE
    found: dict[str, Any] = {"command": "python -m benchmarks.science", "limit": limit, "runs": []}
    trainings = [_Training(name, {"name": name, "outcome": "waiting"}) for name in names]
    found["runs"] = [one.record for one in trainings]
    write(out, found)  # where that is not possible, it is better known now
    beside = max(1, cores // COMPILING_CORES)
    events: queue.Queue[tuple[_Training, str | None]] = queue.Queue()
    try:
        while any(one.state != "over" for one in trainings) and time.monotonic() < deadline:
            compiling = [one for one in trainings if one.state == "compiling"]
            for one in [one for one in trainings if one.state == "waiting"][: beside - len(compiling)]:
                one.start(command, events, max(1, cores // beside))
            training = next((one for one in trainings if one.state in ("training", "stopped")), None)
            ready = next((one for one in trainings if one.state == READY), None)
            now = time.monotonic()
            if training is None and ready is not None:
                unfinished = [one.name for one in trainings if one.state != "over"]
                seconds = turn(ready.name, deadline - now, unfinished)
                others = sum(one.state == "compiling" for one in trainings)
                ready.record |= {"turn_seconds": round(seconds, 1), "compiling_beside": others}
                ready.go(seconds)
                ready.until = now + seconds + grace
                training = ready
            if training is not None and training.state == "training" and now > training.until:
                training.state = "stopped"
                training.stop()
            until = min(deadline, deadline if training is None else training.until)
            try:
                one, text = events.get(timeout=max(0.0, until - time.monotonic()) + 0.05)
            except queue.Empty:
                continue
            if text is None:
                one.ended()
                one.tell()
            elif (said := one.heard(text)) is not None:
                print(said, flush=True)
            else:
                continue
            write(out, found)
    finally:
        for one in trainings:
            one.stop()
            if one.state != "over":
                begun = "no time was left" if one.state in ("waiting", "compiling", READY) else "its time was over"
                one.record |= {"outcome": NOT_FINISHED, "cause": f"{begun}; it was {one.state}"}
                one.tell()
        write(out, found)
    return found


def main() -> None:
    """The command `python -m benchmarks.science`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help=".npz file in MedMNIST's layout")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--limit", type=float, required=True, metavar="SECONDS", help="for all of it")
    parser.add_argument("--python", default=sys.executable, metavar="COMMAND", help="what runs Python in processes")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help="some of them")
    parser.add_argument("--rehearse", action="store_true", help="few images and small networks")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED))  # so that what was started is stopped, and removed
    # Checkpoints of hundreds of megabytes an epoch: in memory, where there is a place for them.
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free >= CHECKPOINTS
    scratch = tempfile.mkdtemp(dir=memory if roomy else None)
    command = [
        *shlex.split(options.python),
        "-m",
        "benchmarks.training",
        "--data",
        str(options.data),
        "--scratch",
        scratch,
    ]
    try:
        command += ["--rehearse"] if options.rehearse else []
        grace = float("inf") if options.rehearse else GRACE
        found = run(command, options.out, options.limit, os.cpu_count() or 1, grace, options.runs)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    failed = [one for one in found["runs"] if one["outcome"] == FAILED]
    if failed:
        raise SystemExit(f"error: {len(failed)} trainings failed: {failed[0]['name']}: {failed[0].get('cause', '')}")


if __name__ == "__main__":
    main()
