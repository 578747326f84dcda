"""The comparison of ways to train an ensemble: its rows, their runs and costs, and what stands in its tables."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from immunity_fast import reproduce
from immunity_fast.attacks.descent import Attack
from immunity_fast.data import datasets
from immunity_fast.data.readers import Parts, read_digits
from immunity_fast.evaluation import plan as plans
from immunity_fast.evaluation.metrics import wilson_interval
from immunity_fast.evaluation.plan import Plan, gradient_attack
from immunity_fast.peers.methods import METHODS
from immunity_fast.reproduction import peer_tables, peers
from immunity_fast.reproduction.experiments import SCALES, Entry, Experiments
from immunity_fast.reproduction.jobs import Done, Job
from immunity_fast.reproduction.peers import ADVERSARIAL, PLAIN, STANDARD, Comparison, Way
from immunity_fast.train import parse
from immunity_fast.training import session
from immunity_fast.training.config import TrainConfig
from tests import grids

QUICK = ["--scale", "smoke", "--device", "cpu"]
LARGEST = 8 / 255


def _comparison(scale: str = "small", **changes: Any) -> Comparison:
    return Comparison(Experiments(SCALES[scale], changes, 1))


def _rows(comparison: Comparison, training: str) -> dict[str, Entry]:
    return {way.label: entry for way, entry in comparison.rows(training)}


# Rows and runs


@pytest.mark.parametrize("scale", grids.sampled(SCALES, ordinary=lambda scale: scale == "small"))
def test_every_run_is_one_that_train_accepts(scale: str) -> None:
    for entry in _comparison(scale).queue():
        for job in entry.jobs:
            _, _, config = parse([*job.config.options(), "--out", "nowhere"])
            assert config == job.config


def test_all_rows_have_the_same_images_epochs_and_optimiser() -> None:
    comparison = _comparison()
    for training, adversarial in ((STANDARD, "off"), (ADVERSARIAL, "n-fgsm")):
        common = comparison.config(training)
        for way, entry in comparison.rows(training):
            (job,) = entry.jobs
            config = job.config
            method = config.method()
            stages = 1 if method is None else method.stages(config.experts)
            assert config.adversarial == adversarial
            assert config.epochs == common.epochs * stages, way.label
            for name in ("dataset", "limit_train", "batch_size", "optimizer", "lr", "weight_decay", "eps", "seed"):
                assert getattr(config, name) == getattr(common, name)
            assert config.experts == (1 if way.settings.get("experts") == 1 else 4 if way.square else 3)


def test_every_method_of_the_package_is_a_row() -> None:
    seen = {str(way.settings["ensemble"]).partition(":")[0] for way in peers.WAYS}
    assert seen == set(METHODS)


def test_who_begins_and_whose_images_are_transferred() -> None:
    for training in (STANDARD, ADVERSARIAL):
        comparison = Comparison(Experiments(SCALES["small"], {}, 2))
        rows = _rows(comparison, training)
        plain = rows[PLAIN]
        sources = {job.transfer_from for entry in rows.values() for job in entry.jobs}
        (source,) = sources
        assert source is not None
        assert source.config == dataclasses.replace(plain.jobs[0].config, seed=peers.SOURCE_SEED)
        assert source.config.seed not in [job.config.seed for job in plain.jobs]
        for way, entry in comparison.rows(training):
            for job, own in zip(entry.jobs, plain.jobs, strict=True):
                assert (job.begins_from is not None) == way.begins_from_plain
                if job.begins_from is not None:
                    assert job.begins_from.name == own.name


def test_the_mean_of_a_switch_gate_is_of_the_same_run() -> None:
    rows = _rows(_comparison(), STANDARD)
    assert rows["Immunity, its mean"].jobs == rows["Immunity"].jobs
    uniform = rows["Immunity, uniform gate"].jobs[0].config
    assert dataclasses.replace(uniform, gate="switch") == rows["Immunity"].jobs[0].config


def test_the_cheapest_runs_come_first_of_each_seed() -> None:
    comparison = Comparison(Experiments(SCALES["small"], {}, 2))
    runs = [job for entry in comparison.queue() for job in entry.jobs]
    keys = [(job.config.seed, peers.cost(job)) for job in runs]
    assert keys == sorted(keys)
    expected = {job for training in peers.TRAININGS for _, entry in comparison.rows(training) for job in entry.jobs}
    assert set(runs) == expected


def test_options_change_every_run_but_what_is_compared() -> None:
    comparison = _comparison(epochs=3, experts=4, ensemble="plain", gate="selection", adversarial="pgd", seed=7)
    for training, adversarial in ((STANDARD, "off"), (ADVERSARIAL, "pgd")):
        rows = _rows(comparison, training)
        assert {entry.jobs[0].config.adversarial for entry in rows.values()} == {adversarial}
        assert {entry.jobs[0].config.seed for entry in rows.values()} == {7}
        assert rows[PLAIN].jobs[0].config.epochs == 3
        assert rows["Immunity"].jobs[0].config.experts == 4
        assert rows["Immunity"].jobs[0].config.gate_kind == "switch"
        assert rows[PLAIN].jobs[0].config.gate_kind == "uniform"


# Costs


def test_costs_are_counted_in_passes_of_one_expert() -> None:
    standard, adversarial = (_rows(_comparison(), training) for training in (STANDARD, ADVERSARIAL))
    plain = standard[PLAIN].jobs[0]
    epochs = plain.config.epochs
    assert peers.cost(plain) == 3 * epochs
    assert peers.cost(standard["one network"].jobs[0]) == epochs
    assert peers.cost(adversarial[PLAIN].jobs[0]) == 6 * epochs  # N-FGSM: one step
    assert peers.cost(adversarial["plain, own adversaries"].jobs[0]) == 6 * epochs
    assert peers.cost(standard["Immunity"].jobs[0]) == 3 * 1.5 * epochs
    steps = _rows(_comparison(adversarial="pgd", attack_steps=7), ADVERSARIAL)[PLAIN].jobs[0]
    assert peers.cost(steps) == 3 * 8 * epochs
    # Of what begins with another's weights, theirs too.
    assert peers.cost(Job(plain.config, begins_from=plain)) == 6 * epochs
    assert peers.relative_cost(Way("x"), adversarial["one network"].jobs[0], plain) == pytest.approx(2 / 3)
    assert peers.relative_cost(Way("x", widened=True), standard["one network"].jobs[0], plain) == 1


def test_seconds_are_told_on_the_same_machine_only() -> None:
    rows = _rows(Comparison(Experiments(SCALES["small"], {}, 2)), STANDARD)
    plain, other = rows[PLAIN], rows["one network"]
    found = {job: _done({}, seconds=10.0) for job in plain.jobs}
    assert peer_tables.seconds(other, plain, found) == "not done"
    found |= {job: _done({}, seconds=5.0 + 2 * i) for i, job in enumerate(other.jobs)}
    assert peer_tables.seconds(other, plain, found) == "0.6 ± 0.1"
    assert peer_tables.seconds(plain, plain, found) == "1.0 ± 0.0"
    found[other.jobs[1]] = dataclasses.replace(found[other.jobs[1]], device="another")
    assert peer_tables.seconds(other, plain, found) == "0.5"
    del found[plain.jobs[0]]
    assert peer_tables.seconds(other, plain, found) == "—"


# Tables


def _share(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "images": 200, "interval": list(wilson_interval(200 * accuracy, 200))}


def _done(results: dict[str, Any], *, seconds: float = 1.0, device: str = "CPU") -> Done:
    return Done(results, {}, [], "", device, {}, seconds, 0.0)


def _results(judges: dict[str, float], drawn: float | None) -> dict[str, Any]:
    """Of attacks at three radii: under the worst what `judges` say, a tenth less at each radius; transfer is 0.1 more.

    drawn: of what is random, the expectation under the worst case, likewise.
    """
    radii = []
    for number, eps in enumerate((2 / 255, 4 / 255, 8 / 255)):
        own = {judge: share - 0.1 * number for judge, share in judges.items()}
        attacks = [("pgd", "mean", 0.05), ("pgd", "worst", 0.02), ("pgd", "transfer", 0.1), ("cw", "transfer", 0.2)]
        accuracy: list[dict[str, Any]] = [
            {"attack": attack, "attacker": attacker, "judge": judge, **_share(share + more)}
            for attack, attacker, more in attacks
            for judge, share in own.items()
        ]
        radius: dict[str, Any] = {"eps": eps, "accuracy": accuracy, "drawn": []}
        radius["worst_case"] = [{"judge": judge, **_share(0.0)} for judge in own]  # with what is transferred
        white: dict[str, Any] = {"worst_case": [{"judge": judge, **_share(share)} for judge, share in own.items()]}
        radius["white_box"] = white | {"drawn": None}
        if drawn is not None:
            expected = drawn - 0.1 * number
            radius["drawn"] = [
                {"attack": attack, "attacker": attacker, **_share(expected + more)}
                for attack, attacker, more in [*attacks, ("worst case", "all", -expected)]
            ]
            white["drawn"] = {"attack": "worst case", "attacker": "all", **_share(expected)}
            radius["white_box"] = white
        radii.append(radius)
    entries = [{"attack": "clean", "attacker": None, "judge": judge, **_share(0.9)} for judge in judges]
    return {"radii": radii, "accuracy": [*entries, *radii[-1]["accuracy"]]}


def test_what_draws_is_shown_by_its_expectation() -> None:
    random, fixed = _results({"sample": 0.7, "mean": 0.5}, 0.6), _results({"output": 0.4}, None)
    worst = [peer_tables.worst(eps, None) for eps in (2 / 255, 4 / 255, LARGEST)]
    assert [value(random)["accuracy"] for value in worst] == pytest.approx([0.6, 0.5, 0.4])
    assert [value(fixed)["accuracy"] for value in worst] == pytest.approx([0.4, 0.3, 0.2])
    mean = [peer_tables.worst(eps, "mean")(random)["accuracy"] for eps in (2 / 255, LARGEST)]
    assert mean == pytest.approx([0.5, 0.3])
    assert peer_tables.transferred(LARGEST, None)(random)["accuracy"] == pytest.approx(0.5)
    assert peer_tables.transferred(LARGEST, "mean")(random)["accuracy"] == pytest.approx(0.4)
    assert peer_tables.worst(5 / 255, None)(random) is None
    assert peer_tables.clean(None)(random)["judge"] == "sample"
    assert peer_tables.clean("mean")(random)["judge"] == "mean"
    assert peer_tables.clean(None)(fixed)["judge"] == "output"


def test_columns_from_results() -> None:
    comparison = _comparison()
    rows = _rows(comparison, STANDARD)
    found = {
        rows["one network"].jobs[0]: _done(_results({"output": 0.4}, None)),
        rows["Immunity"].jobs[0]: _done(_results({"sample": 0.7, "mean": 0.5}, 0.6), seconds=3.0),
        rows[PLAIN].jobs[0]: _done(_results({"mean": 0.45}, None), seconds=2.0),
    }
    table = peer_tables.comparison_table(comparison, STANDARD, found)
    assert len(table.columns) <= 10
    assert list(table.columns[:6]) == [
        "trained as",
        "clean",
        *(f"white box, ε = {radius}/255" for radius in (2, 4, 8)),
        "transfer, ε = 8/255",
    ]
    shown = {row[0]: [cell.split(" ± ")[0] for cell in row[1:]] for row in table.rows}
    assert shown["one network"] == ["90.0", "40.0", "30.0", "20.0", "30.0", "0.3", "0.5"]
    assert shown[PLAIN] == ["90.0", "45.0", "35.0", "25.0", "35.0", "1.0", "1.0"]
    assert shown["Immunity"] == ["90.0", "60.0", "50.0", "40.0", "50.0", "1.5", "1.5"]
    assert shown["Immunity, its mean"] == ["90.0", "50.0", "40.0", "30.0", "40.0", "1.5", "1.5"]
    uniform = shown["Immunity, uniform gate"]
    assert uniform == ["not done"] * 5 + ["1.5", "not done"]
    assert "half the 95 % Wilson interval" in table.note
    attacks = peer_tables.attacks_table(comparison, STANDARD, found)
    assert list(attacks.columns) == ["trained as", "PGD-20", "PGD-20 on the CW margin"]
    assert [row[1].split(" ± ")[0] for row in attacks.rows if row[0] == "Immunity"] == ["42.0"]
    values = peer_tables.samples(comparison, found, LARGEST)
    assert values.keys() == {"standard training"}
    assert values["standard training"]["Immunity"][0] == pytest.approx(40)


def test_a_published_figure_needs_the_same_network_and_training() -> None:
    config = TrainConfig(dataset="cifar10", arch="resnet18", experts=1, adversarial="pgd", beta=0.0, gamma=0.0)
    assert peer_tables.published("one network", config, LARGEST) == "51.7 (ARC)"
    assert not peer_tables.published("one network", config, 4 / 255)
    assert not peer_tables.published(PLAIN, config, LARGEST)
    other: dict[str, Any] = {"arch": "resnet8", "dataset": "cifar100", "adversarial": "off", "limit_train": 100}
    for name, value in (other | {"eps": 4 / 255}).items():
        assert not peer_tables.published("one network", dataclasses.replace(config, **{name: value}), LARGEST)
    for scale, there in (("small", False), ("paper", True)):
        comparison = _comparison(scale)
        for training in peers.TRAININGS:
            columns = peer_tables.comparison_table(comparison, training, {}).columns
            assert any("published" in column for column in columns) == (there and training == ADVERSARIAL)


# The command


@pytest.fixture(scope="module", params=["tiny", pytest.param("smoke", marks=pytest.mark.exhaustive)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it; or of some rows, with smaller images, two of which are attacked by one step."""
    out = tmp_path_factory.mktemp("peers") / "out"
    smoke = SCALES["smoke"]

    def shorter(name: str, plan: Plan) -> Attack:
        return dataclasses.replace(gradient_attack(name, plan), steps=1)

    @cache
    def smaller(channels: int) -> Parts:
        parts = read_digits(channels)
        train, test = ((images[..., ::2, ::2].contiguous(), labels) for images, labels in (parts.train, parts.test))
        return parts._replace(train=train, test=test)

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tiny":
            evaluation = dataclasses.replace(smoke.comparison.evaluation, limit=2, eps=(4 / 255, 8 / 255))
            settings = {**smoke.comparison.settings, "limit_train": 10, "batch_size": 10}
            less = dataclasses.replace(smoke.comparison, evaluation=evaluation, settings=settings)
            patch.setattr(plans, "gradient_attack", shorter)
            patch.setattr(datasets, "read_digits", smaller)
            patch.setitem(SCALES, "smoke", dataclasses.replace(smoke, comparison=less))
            patch.setattr(peers, "WAYS", tuple(way for way in peers.WAYS if way.label in (PLAIN, "Immunity", "DVERGE")))
        reproduce.main(["peers", *QUICK, "--out", str(out)])
        patch.setattr(session, "fit", None)  # what is done is not done again
        shutil.copytree(out, out.parent / "again")
        reproduce.main(["peers", *QUICK, "--done-only", "--out", str(out.parent / "again")])
    return out


def test_everything_is_written(folder: Path) -> None:
    record = json.loads((folder / "peers.json").read_text(encoding="utf-8"))
    assert not record["failed"]
    assert [table["caption"] for table in record["tables"][:2]] == ["Standard training", "Adversarial training, n-fgsm"]
    for table in record["tables"][:2]:
        for row in table["rows"]:
            assert all(cell and cell not in ("not done", "—") for cell in row), row
    for form in ("md", "csv", "html", "png"):
        assert (folder / f"peers.{form}").stat().st_size > 500
    again = json.loads((folder.parent / "again" / "peers.json").read_text(encoding="utf-8"))
    assert again["tables"] == record["tables"]
    commands = "\n".join(command for run in record["runs"].values() for command in run["commands"])
    assert "--transfer-from" in commands
    assert all(math.isfinite(run["training_seconds"]) for run in record["runs"].values())
