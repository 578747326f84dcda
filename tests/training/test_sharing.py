"""Two processes on one folder, dozens of times: none fails, no work is done twice, nothing is half written."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from immunity_fast import evaluate, train
from immunity_fast.reproduction.jobs import Job, Queue
from immunity_fast.runtime import files
from immunity_fast.training import session
from immunity_fast.training.run_folder import Run
from tests.processes import FORKING, forked
from tests.sharing import ALONE, JOBS, KEYS, hold, serve
from tests.small_runs import contents, error_line, half_trained, options, saved, trained, without_seconds

pytestmark = pytest.mark.skipif(files.fcntl is None, reason="the system has no such locks")
FEW = ["--attacks", "fgsm", "--attackers", "mean,sample", "--limit", "4", "--masking-images", "0", "--device", "cpu"]


class Worker:
    """A process of `tests.sharing`."""

    def __init__(self) -> None:
        self.connection, theirs = FORKING.Pipe()
        self.process = forked(serve, theirs)
        theirs.close()

    def ask(self, do: str, **request: Any) -> None:
        self.connection.send({"do": do, **request})

    def answer(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            raise AssertionError("it failed: see its traceback") from None


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    made = [Worker(), Worker()]
    yield made
    for worker in made:
        worker.connection.close()
        worker.process.join()
        assert worker.process.exitcode == 0


def both(workers: list[Worker], do: str, **request: Any) -> list[Any]:
    """The answers of two processes to one request."""
    for worker in workers:
        worker.ask(do, **request)
    return [worker.answer() for worker in workers]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run; tests take copies."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    trained([*options(data), "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def half(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, killed in its second epoch; tests take copies."""
    return half_trained(data, tmp_path_factory.mktemp("runs") / "half")


def test_pieces_of_a_ledger_are_done_once(workers: list[Worker], tmp_path: Path) -> None:
    shares = []
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        first, second = both(workers, "ledger", folder=str(folder))
        assert sorted(first + second) == sorted(KEYS)
        lines = [json.loads(line)["key"] for line in (folder / "ledger.jsonl").read_text().splitlines()]
        assert sorted(lines) == sorted(KEYS)
        shares += [len(first), len(second)]
    assert min(sum(shares[::2]), sum(shares[1::2])) > len(KEYS) * 12 // 5, "both have worked"


@pytest.mark.parametrize("torn", [False, True])
def test_what_a_killed_process_was_at_is_done_by_the_other(workers: list[Worker], torn: bool, tmp_path: Path) -> None:
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        workers[0].ask("killed", folder=str(folder), at=number % 5, torn=torn)
        workers[1].ask("ledger", folder=str(folder))
        end, made = (worker.answer() for worker in workers)
        assert end in (0, signal.SIGKILL)  # 0: the other had done all before it came so far
        lines = [json.loads(line)["key"] for line in (folder / "ledger.jsonl").read_text().splitlines()]
        assert sorted(lines) == sorted(KEYS)
        assert len(made) >= len(KEYS) - 4


def test_a_run_is_one_process(workers: list[Worker], finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    answers = [answer for _ in range(15) for answer in both(workers, "lock", folder=str(folder))]
    assert (folder / "log").read_bytes() == b"+-" * answers.count("held")
    refused = [answer for answer in answers if answer != "held"]
    assert len(refused) <= 15
    assert len(refused) >= 3
    assert set(refused) == {f"{folder}: another process is training this run; wait for it or end it"}


@pytest.mark.exhaustive  # by default one run, one ledger, one evaluation are shared
def test_runs_of_a_queue_are_done_once(workers: list[Worker], data: Path, tmp_path: Path) -> None:
    names = sorted(job.name for job in JOBS)
    shares = []
    for number in range(6):
        first, second = both(workers, "queue", folder=str(tmp_path / str(number)), data=str(data))
        assert first["done"] == second["done"] == names
        assert sorted(first["here"] + second["here"]) == sorted([*names, *(job.name for job in ALONE.alone())])
        shares += [len(first["here"]), len(second["here"])]
    assert min(sum(shares[::2]), sum(shares[1::2])) > len(names) * 6 // 5, "both have worked"


def test_two_evaluations_share_the_work(workers: list[Worker], finished: Path, tmp_path: Path) -> None:
    evaluate.main([str(finished), *FEW, "--out", str(tmp_path / "alone")])
    pieces = (tmp_path / "alone" / "evaluation.jsonl").read_bytes().count(b"\n")
    wanted = without_seconds(tmp_path / "alone" / "results.json")
    for number in range(2):
        out = tmp_path / str(number)
        computed = both(workers, "judge", run=str(finished), out=str(out), arguments=FEW)
        assert sum(computed) == pieces
        assert without_seconds(out / "results.json") == wanted
        assert {file.name for file in out.rglob("*") if file.is_file()} == {
            file.name for file in (tmp_path / "alone").rglob("*") if file.is_file()
        }


def test_a_run_that_two_processes_resume_is_trained_once(
    workers: list[Worker], half: Path, finished: Path, tmp_path: Path
) -> None:
    whole, refused = saved(finished), 0
    for number in range(3):
        folder = tmp_path / str(number)
        shutil.copytree(half, folder)
        answers = both(workers, "resume", folder=str(folder))
        steps = sorted(step for steps, _ in answers for step in steps)
        assert steps == [8, 9, 10]
        errors = [error for _, error in answers if error]
        assert errors in ([], [f"{folder}: another process is training this run; wait for it or end it"])
        refused += len(errors)
        assert saved(folder) == whole
        assert not list(folder.rglob(".*"))
    assert refused, "they were at it at once"


def test_runs_of_one_second_have_two_folders(workers: list[Worker], data: Path, tmp_path: Path) -> None:
    made = both(workers, "begin", folder=str(tmp_path), arguments=options(data, epochs=1))
    assert sorted(made) == ["npz-resnet8-20260102-030405", "npz-resnet8-20260102-030405-2"]
    one, other = (tmp_path / "runs" / name for name in made)
    assert saved(one) == saved(other)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(made)


def test_a_name_nobody_chose_may_be_taken_meanwhile(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = train.parse(options(data, epochs=1))
    start.folder.mkdir(parents=True)
    made = session.fit(start)
    assert made is not None
    assert made[1].folder == start.folder.with_name(f"{start.folder.name}-2")
    assert not list(start.folder.iterdir())


@pytest.mark.parametrize("command", ["--resume", "--out"])
def test_a_run_in_training_is_refused_and_left_as_it_is(
    command: str, half: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    before = contents(folder)
    arguments = [] if command == "--resume" else options(data)
    with Run(folder).locked():
        message = error_line(capsys, train.main, [*arguments, command, str(folder)])
    assert str(folder) in message
    assert ("another process" if command == "--resume" else "exists already") in message
    assert contents(folder) == before


def test_a_queue_reports_a_run_that_is_in_training_and_leaves_it(half: Path, data: Path, tmp_path: Path) -> None:
    job = Job(Run(half).config())
    folder = tmp_path / "runs" / job.name
    shutil.copytree(half, folder)
    before = contents(folder)
    queue = Queue(tmp_path / "runs", [job], device="cpu", data=str(data))
    with Run(folder).locked():
        queue.run()
    assert queue.failures == {job: f"{folder}: another process is training this run; wait for it or end it"}
    assert contents(folder) == before


def test_a_lock_ends_with_its_process(half: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    training = forked(hold, str(folder))
    while not (folder / "training").exists():
        assert training.is_alive()
        time.sleep(0.01)
    (folder / "training").unlink()
    with pytest.raises(BlockingIOError, match="another process is training this run"):
        session.fit(train.parse(["--resume", str(folder)]))
    training.kill()
    training.join()
    trained(["--resume", str(folder)])
    assert saved(folder) == saved(finished)
