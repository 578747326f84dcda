"""Setups: a victim each, trained on poisons of its own; what is done is not done again, what fails is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from immunity_fast import poison
from immunity_fast.data import poison_file
from immunity_fast.data.datasets import load
from immunity_fast.poisoning import setups
from immunity_fast.poisoning.settings import CraftSettings
from immunity_fast.poisoning.tables import Outcome, summary, tables
from immunity_fast.training import session
from immunity_fast.training.checkpoint import load_model
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.preparation import Start
from tests.small_runs import options, write_data

CRAFTING = ["--steps", "2", "--restarts", "1", "--budget", "0.1"]


class Watched:
    """What is done, in order, "train SEED" and "craft SEED"; the training of the seed `killed` is interrupted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.killed: int | None = None
        self._fit, self._craft = session.fit, setups.craft
        patch.setattr(session, "fit", self.fit)
        patch.setattr(setups, "craft", self.craft)

    def fit(self, start: Start) -> Any:
        """`session.fit`."""
        if start.config.seed == self.killed:
            raise KeyboardInterrupt
        self.done.append(f"train {start.config.seed}")
        return self._fit(start)

    def craft(self, *given: Any, **keywords: Any) -> Any:
        """`crafting.craft`."""
        self.done.append(f"craft {keywords['seed']}")
        return self._craft(*given, **keywords)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and the command done, of one setup, in `out`, after it was killed before the victim."""
    folder = tmp_path_factory.mktemp("setups")
    write_data(folder / "data.npz")
    with pytest.MonkeyPatch.context() as patch:
        watched = Watched(patch)
        watched.killed = 1
        with pytest.raises(KeyboardInterrupt):
            poison.main(_words(folder, 1))
        assert watched.done == ["train 0", "craft 1"]
        watched.killed = None
        poison.main(_words(folder, 1))
        assert watched.done == ["train 0", "craft 1", "train 1"]
    return folder


def _words(folder: Path, count: int) -> list[str]:
    words = ["setups", "--out", str(folder / "out"), "--setups", str(count), *CRAFTING]
    return [*words, *options(folder / "data.npz", epochs=1)]


def test_each_victim_is_asked_for_its_own_target(folder: Path) -> None:
    found = json.loads((folder / "out" / "setups.json").read_text(encoding="utf-8"))
    assert len(found["setups"]) == found["summary"]["setups"] >= 1
    test = load("npz", folder / "data.npz").test
    for number, entry in enumerate(found["setups"], start=1):
        model, info = load_model(folder / "out" / "runs" / entry["run"])
        image = test.images[entry["target"]][None] / 255
        answer = int(model.deterministic()(image).argmax())
        assert entry["answer"] == info["classes"][answer]
        assert entry["reached"] == (entry["answer"] == entry["wanted"])
        assert entry["label"] == info["classes"][int(test.labels[entry["target"]])] != entry["wanted"]
        experts = model.expert_logits(image)[:, 0].argmax(-1).tolist()
        assert entry["experts_reached"] == sum(info["classes"][each] == entry["wanted"] for each in experts)
        config = json.loads((folder / "out" / "runs" / entry["run"] / "config.json").read_text(encoding="utf-8"))
        assert config["seed"] == number
        poisons = poison_file.read(Path(config["poison"]))
        assert len(poisons.indices) == entry["poisons"] == 4
        results = json.loads((folder / "out" / "runs" / entry["run"] / "results.json").read_text(encoding="utf-8"))
        fooled = {each["judge"]: each["fooled"] for each in results["poison"]["target"]}  # by the evaluation itself
        assert fooled["mean"] == entry["reached"]
    text = (folder / "out" / "setups.md").read_text(encoding="utf-8")
    assert f"{found['summary']['successes']} of {len(found['setups'])}" in text
    assert all(entry["run"] in text for entry in found["setups"])


def test_nothing_is_done_twice_and_more_setups_go_on(folder: Path, watched: Watched) -> None:
    file = folder / "out" / "setups.json"
    before = json.loads(file.read_text(encoding="utf-8"))
    poison.main(_words(folder, 1))
    assert watched.done == []
    assert json.loads(file.read_text(encoding="utf-8")) == before
    poison.main(_words(folder, 2))
    assert watched.done == ["craft 2", "train 2"]
    after = json.loads(file.read_text(encoding="utf-8"))
    assert after["setups"][:1] == before["setups"]
    assert len(after["setups"]) == 2


def test_shards_are_the_victims_alone(folder: Path) -> None:
    config = TrainConfig(experts=2, ensemble="plain", shards=True, seed=4)
    made = setups.Made(setups.Setup(1, 2), folder / "p.npz")
    job = setups.victim(config, made, 1)
    assert (job.config.shards, job.config.seed, job.config.poison) == (True, 6, str(folder / "p.npz"))


def test_the_summary_is_counted_and_its_interval_wilsons() -> None:
    one = Outcome(0, "a", "b", "b", True, 2, 2, 0.5, 4, "r", "f")
    outcomes = [one, dataclasses.replace(one, reached=False, clean=0.7), one, one]
    found = summary(outcomes, 0.9)
    assert (found["setups"], found["successes"]) == (4, 3)
    low, high = found["interval"]
    for end in (low, high):  # where the score test's statistic is its critical value
        assert abs(0.75 - end) / (end * (1 - end) / 4) ** 0.5 == pytest.approx(1.959964, rel=1e-5)
    assert found["clean accuracy"] == pytest.approx(0.55)
    assert found["clean accuracy, least and most"] == [0.5, 0.7]
    first, second = tables(outcomes, 0.9, CraftSettings())
    assert list(first.rows[0]) == ["3 of 4", "75", "30 to 95", "55.0 ± 10.0", "90.0"]
    assert [row[4] for row in second.rows] == ["yes", "no", "yes", "yes"]
    assert tables([], 0.9, CraftSettings())[0].rows[0][1] == "—"


def test_too_many_setups_for_the_seeds_are_refused() -> None:
    config = TrainConfig(seed=2**63 - 1)
    with pytest.raises(ValueError, match="--seed"):
        setups.check_count(config, 1)
