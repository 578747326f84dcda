"""The queue of runs: what is done is not done again, what fails stops no other, and two processes share the work."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from immunity_fast import train
from immunity_fast.evaluation.settings import EvaluationSettings
from immunity_fast.reproduction.jobs import Job, Queue
from immunity_fast.training import run_evaluation, session
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.preparation import CHANGEABLE_ON_RESUME, Start
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from tests import grids
from tests.small_runs import arrays, saved, write_data
from tests.typed_settings import BESIDE, GIVEN

CONFIG = TrainConfig(
    dataset="npz", experts=2, batch_size=8, epochs=1, beta=0.5, gamma=1e-4, check_images=0, attack_images=3
)
EVALUATION = EvaluationSettings(attacks=("fgsm",), attackers=("mean",), limit=3, masking_images=0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data.npz")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the queue asks for, in order: "train NAME" and "evaluate NAME"."""
    made: list[str] = []
    fit, judge = session.fit, run_evaluation.evaluate_folder

    def fitted(start: Start) -> Any:
        made.append(f"train {start.folder.name}")
        return fit(start)

    def judged(folder: Path, *given: Any, **options: Any) -> None:
        made.append(f"evaluate {folder.name}")
        judge(folder, *given, **options)

    monkeypatch.setattr(session, "fit", fitted)
    monkeypatch.setattr(run_evaluation, "evaluate_folder", judged)
    return made


def _queue(tmp_path: Path, *jobs: Job) -> Queue:
    return Queue(tmp_path / "runs", jobs, device="cpu", data=str(tmp_path / "data.npz"))


def _job(**changes: Any) -> Job:
    return Job(dataclasses.replace(CONFIG, **changes), EVALUATION)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, and `_job()` done."""
    folder = tmp_path_factory.mktemp("once")
    write_data(folder / "data.npz")
    _queue(folder, _job()).run()
    return folder


# Names


def test_a_name_depends_on_what_a_run_depends_on() -> None:
    other: dict[str, Any] = {"dataset": "digits", "arch": "resnet18", "adversarial": "pgd", "flip": "on", "amp": "bf16"}
    other |= {"score": "probability", "attack_batchnorm": "train", "attack_gate": "mean"}
    other |= {"stage": "layer1", "float32": "ieee", "detach_weights": True}
    other |= {"image_size": 9, "limit_train": 9, "ema": 0.5, "clip_grad_norm": 2.0, "stem": "cifar", "weights": "w.pt"}
    names = {_job().name}
    for option in dataclasses.fields(TrainConfig):
        if option.name in (*CHANGEABLE_ON_RESUME, "preset"):
            continue
        value = other.get(option.name, GIVEN[option.name][1])
        assert value != getattr(CONFIG, option.name)
        beside = BESIDE.get(option.name, {})
        name = _job(**beside | {option.name: value}).name
        assert name != _job(**beside).name
        names.add(name)
    kept = [
        option.name
        for option in dataclasses.fields(TrainConfig)
        if option.name not in (*CHANGEABLE_ON_RESUME, "preset")
    ]
    assert len(names) == 1 + len(kept)
    assert Job(CONFIG, EVALUATION, members=2).name not in names


def test_a_name_does_not_depend_on_where_it_runs() -> None:
    moved: dict[str, Any] = {"data": "x.npz", "device": "cpu", "compile": "off", "batching": "loop", "profile": True}
    assert _job(**moved, double_backprop="reverse", preset="fast").name == _job().name
    assert Job(CONFIG).name == _job().name


def test_a_name_depends_on_what_it_begins_from() -> None:
    # As they were before there was such a thing: runs are found by their names.
    assert _job().name == "npz-2-resnet8-a9676b9d-seed0"
    assert Job(CONFIG, EVALUATION, members=2).name == "npz-2-alone-resnet8-dc1e5b76-seed0"
    names = {Job(CONFIG, begins_from=other).name for other in (None, _job(seed=1), _job(seed=2))}
    assert len(names) == 3
    assert Job(CONFIG, transfer_from=_job(seed=1)).name == _job().name  # the same training


# Doing


def test_what_is_done_is_not_done_again(tmp_path: Path, data: Path, calls: list[str]) -> None:
    queue = _queue(tmp_path, _job(), _job(seed=1), _job())
    queue.run()
    first, second = _job().name, _job(seed=1).name
    assert calls == [f"train {first}", f"evaluate {first}", f"train {second}", f"evaluate {second}"]
    assert queue.done.keys() == {_job(), _job(seed=1)}
    assert not queue.failures
    again = _queue(tmp_path, _job(seed=1), _job())
    again.run()
    assert len(calls) == 4
    assert again.done == queue.done
    # Another evaluation trains nothing.
    more = Job(CONFIG, dataclasses.replace(EVALUATION, seed=5))
    third = _queue(tmp_path, more)
    third.run()
    assert calls[4:] == [f"evaluate {first}"]
    assert third.done.keys() == {more}
    done = queue.done[_job()]
    assert done.results["accuracy"][0]["images"] == 30
    assert done.training_seconds == sum(r["seconds"] for r in Run(tmp_path / "runs" / first).metrics())
    assert done.device.startswith("CPU")
    assert [command.split()[2] for command in done.commands] == ["immunity_fast.train", "immunity_fast.evaluate"]


def test_the_commands_make_the_same_run(tmp_path: Path, data: Path) -> None:
    queue = _queue(tmp_path, _job(detach_weights=True, flip="on"))
    queue.run()
    (done,) = queue.done.values()
    words = done.commands[0].split()[3:]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    session.fit(train.parse(words))
    assert saved(tmp_path / "again") == saved(tmp_path / "runs" / queue.jobs[0].name)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.exhaustive), 7])
def test_a_run_that_was_killed_goes_on(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    job = _job(epochs=2)
    whole = _queue(tmp_path, job)
    whole.folder = tmp_path / "whole"
    whole.run()
    advance = TrainingState.advance

    def killed(trainer: TrainingState, batch: Any) -> None:
        if trainer.step == step:
            raise KeyboardInterrupt
        advance(trainer, batch)

    monkeypatch.setattr(TrainingState, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        _queue(tmp_path, job).run()
    monkeypatch.setattr(TrainingState, "advance", advance)
    queue = _queue(tmp_path, job)
    queue.run()
    name = job.name
    assert saved(tmp_path / "runs" / name) == saved(tmp_path / "whole" / name)
    assert _without_seconds(queue.done[job].results) == _without_seconds(whole.done[job].results)


def test_a_failed_run_does_not_stop_the_others(tmp_path: Path, data: Path, calls: list[str]) -> None:
    bad = _job(lr=1e30, momentum=0.99)
    queue = _queue(tmp_path, bad, _job())
    queue.run()
    assert queue.done.keys() == {_job()}
    assert queue.failures.keys() == {bad}
    assert "NaN" in queue.failures[bad]
    before = len(calls)
    again = _queue(tmp_path, bad, _job())
    again.run()
    assert again.failures.keys() == {bad}
    assert calls[before:] == [f"train {bad.name}"], "only what failed is tried again"


@pytest.mark.parametrize(
    "content",
    grids.sampled(["", "{", "[]", '{"results": {}}', '{"other": 1}'], ordinary=lambda content: len(content) in (1, 15)),
)
def test_a_damaged_record_is_made_again(tmp_path: Path, once: Path, calls: list[str], content: str) -> None:
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    queue = _queue(tmp_path, _job())
    queue.find_done()
    (file,) = (tmp_path / "runs" / _job().name).glob("done-*.json")
    file.write_text(content)
    again = _queue(tmp_path, _job())
    again.run()
    assert calls == [f"evaluate {_job().name}"]
    assert _without_seconds(again.done[_job()].results) == _without_seconds(queue.done[_job()].results)


def test_other_data_under_the_same_name_are_not_taken_for_these(tmp_path: Path, once: Path) -> None:
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    same = _queue(tmp_path, _job())
    same.run()
    assert same.done.keys() == {_job()}
    write_data(
        tmp_path / "data.npz", **{name: 255 - images for name, images in arrays().items() if name.endswith("images")}
    )
    queue = _queue(tmp_path, _job())
    queue.run()
    assert not queue.done
    assert "data" in queue.failures[_job()]


def test_networks_trained_alone_are_joined(tmp_path: Path, data: Path, calls: list[str]) -> None:
    config = dataclasses.replace(CONFIG, experts=1, beta=0.0, gamma=0.0, epochs=1)
    joined = Job(dataclasses.replace(config, seed=1), EVALUATION, members=2)
    queue = _queue(tmp_path, joined)
    queue.run()
    members = [Job(dataclasses.replace(config, seed=seed)).name for seed in (2, 3)]
    assert calls == [f"train {members[0]}", f"train {members[1]}", f"evaluate {joined.name}"]
    done = queue.done[joined]
    assert "heatmaps" in done.results
    assert [command.split()[2].removeprefix("immunity_fast.") for command in done.commands] == [
        "train",
        "train",
        "ensemble",
        "evaluate",
    ]
    # Killed after the folder was made, before its checkpoint was.
    run = Run(tmp_path / "runs" / joined.name)
    run.checkpoint.unlink()
    for file in run.folder.glob("done-*.json"):
        file.unlink()
    again = _queue(tmp_path, joined)
    again.run()
    assert _without_seconds(again.done[joined].results) == _without_seconds(done.results)
    assert calls[3:] == [f"evaluate {joined.name}"]


def test_what_a_run_begins_from_is_trained_first(tmp_path: Path, data: Path, calls: list[str]) -> None:
    base, source = _job(seed=1), _job(seed=2)
    job = Job(CONFIG, EVALUATION, begins_from=base, transfer_from=source)
    queue = _queue(tmp_path, job)
    queue.run()
    assert not queue.failures
    assert calls == [f"train {base.name}", f"train {job.name}", f"train {source.name}", f"evaluate {job.name}"]
    run, other = (Run(tmp_path / "runs" / each.name) for each in (job, base))
    weights = run.config().weights
    assert weights is not None
    assert Path(weights).samefile(other.checkpoint)
    done = queue.done[job]
    assert done.training_seconds == sum(record["seconds"] for each in (other, run) for record in each.metrics())
    assert {entry["attacker"] for entry in done.results["accuracy"]} == {None, "mean"}
    # Asked for alone they are there; and another source, or none, is another evaluation of the same run.
    more = Job(CONFIG, dataclasses.replace(EVALUATION, attackers=("transfer",)), begins_from=base, transfer_from=base)
    again = _queue(tmp_path, job, more)
    again.run()
    assert not again.failures
    assert calls[4:] == [f"evaluate {job.name}"]
    assert {entry["attacker"] for entry in again.done[more].results["accuracy"]} == {None, "transfer"}
    assert "--transfer-from" in again.done[more].commands[-1]


def test_what_another_process_is_at_comes_last(tmp_path: Path, data: Path, calls: list[str]) -> None:
    first, second = _job(), _job(seed=1)
    locks = tmp_path / "runs" / ".locks"
    locks.mkdir(parents=True)
    with (locks / first.name).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        queue = _queue(tmp_path, first, second)
        thread = threading.Thread(target=queue.run)
        thread.start()
        for _ in range(600):
            if (tmp_path / "runs" / second.name / "results.json").is_file():
                break
            thread.join(0.1)
        assert calls == [f"train {second.name}", f"evaluate {second.name}"]
        thread.join(0.3)
        assert thread.is_alive()
        assert first not in queue.done
        fcntl.flock(file, fcntl.LOCK_UN)
        thread.join(120)
    assert not thread.is_alive()
    assert queue.done.keys() == {first, second}


def _without_seconds(results: dict[str, Any]) -> str:
    kept = json.loads(json.dumps(results), object_hook=lambda found: {k: v for k, v in found.items() if k != "seconds"})
    return json.dumps(kept, sort_keys=True)
