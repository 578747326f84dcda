"""Stages that share a budget of seconds, and jobs: commands that run beside each other, each with a limit.

A job is a process group of its own, which is ended whole. What it says about its parts (see `outcomes`) is handed on as
it comes: whoever is killed has told what it knew.
"""

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from benchmarks import outcomes
from benchmarks.outcomes import FAILED, NOT_FINISHED, NOT_RUN, PASSED, ROOT

# In the order in which they run, with the seconds that each was made for: its share of a budget is in this proportion.
STAGES = {"check": 110.0, "kernels": 100.0, "steps": 260.0, "science": 330.0}
TAIL = 40  # lines of a failed job's output that are kept,
WIDTH = 300  # so many characters of each
MOMENT = 1.0  # seconds for a process that is asked to end
DRAIN = 2.0  # seconds for the last lines of a process that has ended
GLANCE = 0.5  # seconds between two looks at whether this process is to end

interrupted = threading.Event()  # set where it is: between starting a process and knowing it, nothing may be raised
INTERRUPTED = 143  # the status then

Take = Callable[[dict[str, Any]], None]


def parse(text: str) -> tuple[str, ...]:
    """The stages of a list with commas, in the order in which they run.

    Raises:
        ValueError: one is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        raise ValueError(f"--stages {text}: expected some of {', '.join(STAGES)}, with commas")
    return tuple(name for name in STAGES if name in names)


def share(stage: str, stages: Sequence[str], left: float) -> float:
    """Seconds for a stage, of those that are left for it and the stages after it."""
    after = stages[stages.index(stage) :]
    return max(0.0, left) * STAGES[stage] / sum(STAGES[name] for name in after)


@dataclass(frozen=True)
class Job:
    """A command.

    Args:
        name: of its files and its outcome.
        command: its words.
        limit: seconds that it may take.
        environment: what it has there besides.
        cores: how many it keeps busy.
        after: the job that is to have ended first.
        echo: whether what it prints is printed.
        expected: names of the outcomes that it will report; without any its status is the only one, under the job's
            name.
    """

    name: str
    command: list[str]
    limit: float = float("inf")
    environment: dict[str, str] = field(default_factory=dict)
    cores: int = 1
    after: str = ""
    echo: bool = False
    expected: tuple[str, ...] = ()


class _Running:
    """A job's process, and what is known of it so far."""

    def __init__(self, job: Job, environment: Mapping[str, str], deadline: float, events: "queue.Queue[Any]") -> None:
        self.job, self.begin = job, time.monotonic()
        self.deadline = min(deadline, self.begin + job.limit)
        self.hung = self.deadline < deadline  # if it is stopped: by its own limit, not because all time was over
        self.missing = list(job.expected)
        self.stopped = False  # because its time was over
        self.tail: deque[str] = deque(maxlen=TAIL)
        self.process = subprocess.Popen(
            job.command,
            cwd=ROOT,
            env={**os.environ, **environment, **job.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # its children end with it
        )
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout, events), daemon=True)
        self._reader.start()
        # A child that goes on holds the pipe open: that the process has ended is not seen there.
        threading.Thread(target=self._wait, args=(events,), daemon=True).start()

    def _read(self, output: IO[str], events: "queue.Queue[Any]") -> None:
        for text in output:
            events.put((self, text.rstrip("\n")))

    def _wait(self, events: "queue.Queue[Any]") -> None:
        self.process.wait()
        self._reader.join(DRAIN)
        events.put((self, None))

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self.begin, 1)

    def ask(self) -> None:
        """Have the process and all that it has started end, and remove what they have on disk."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """The process and all that it has started: asked first, a moment before."""
        self.ask()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(MOMENT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def heard(self, text: str) -> dict[str, Any] | None:
        """An outcome, if the line is one."""
        found = outcomes.read(text)
        if found is None:
            self.tail.append(text[:WIDTH])
            if self.job.echo:
                print(outcomes.portable(text), flush=True)
            return None
        if found["name"] in self.missing:
            self.missing.remove(found["name"])
        return {"seconds": self.seconds} | found

    def ended(self) -> Iterable[dict[str, Any]]:
        """The outcomes that were still to come."""
        names, status = self.missing if self.job.expected else [self.job.name], self.process.returncode
        if self.stopped:
            hung = {"outcome": FAILED, "cause": f"hung: stopped at its limit of {self.job.limit:.0f} s"}
            for name in names:
                yield {"name": name, "seconds": self.seconds} | (hung if self.hung else {"outcome": NOT_FINISHED})
            return
        how = f"ended with status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
        text = outcomes.innermost_line("\n".join(self.tail)) if status else ""
        failed: dict[str, Any] = {"outcome": FAILED, "cause": (text if status > 0 else "") or f"{how} {text}".strip()}
        tail: dict[str, Any] = {"tail": list(self.tail)}
        for name in names:
            if status == 0 and not self.job.expected:
                yield {"name": name, "outcome": PASSED, "seconds": self.seconds}
                continue
            yield {"name": name, "seconds": self.seconds} | failed | tail
            tail = {}  # once is enough


def run(jobs: Sequence[Job], *, cores: int, deadline: float, take: Take, environment: Mapping[str, str]) -> None:
    """Run jobs, in their order as far as there are cores, until all have ended or the deadline has come.

    Args:
        jobs: what is to be run.
        cores: how many may be busy at once; a job that wants more runs alone.
        deadline: of `time.monotonic`; what runs then is ended, and what has not begun is not begun.
        take: is given each outcome, as it comes.
        environment: what every job has there besides.
    """
    waiting, running = list(jobs), list[_Running]()
    events: queue.Queue[tuple[_Running, str | None]] = queue.Queue()
    unfinished = {job.name for job in jobs}
    try:
        while waiting or running:
            if interrupted.is_set():
                raise SystemExit(INTERRUPTED)
            now = time.monotonic()
            free = cores - sum(one.job.cores for one in running)
            for job in list(waiting):
                if job.after in unfinished or now >= deadline or (running and job.cores > free):
                    continue
                waiting.remove(job)
                free -= job.cores
                try:
                    running.append(_Running(job, environment, deadline, events))
                except OSError as error:
                    unfinished.discard(job.name)
                    missing = isinstance(error, FileNotFoundError)
                    cause = f"there is no {os.path.basename(job.command[0])} here" if missing else str(error)
                    for name in job.expected or (job.name,):
                        take({"name": name, "outcome": NOT_RUN if missing else FAILED, "cause": cause})
            if now >= deadline:
                for job in waiting:
                    for name in job.expected or (job.name,):
                        take({"name": name, "outcome": NOT_FINISHED, "cause": "not begun: no time was left"})
                waiting = []
            for one in running:
                if now >= one.deadline and not one.stopped:
                    one.stopped = True
                    one.kill()  # what it has said before is still to be read
            if not running:
                continue
            until = min((one.deadline for one in running if not one.stopped), default=now + DRAIN)
            try:
                one, text = events.get(timeout=min(GLANCE, max(0.0, until - time.monotonic()) + 0.01))
            except queue.Empty:
                continue
            if text is not None:
                found = [] if (outcome := one.heard(text)) is None else [outcome]
            else:
                one.kill()  # what it may have left behind
                running.remove(one)
                unfinished.discard(one.job.name)
                found = list(one.ended())
            for outcome in found:
                take(outcome)
    finally:
        for one in running:
            one.ask()
        for one in running:
            one.kill()
