"""Loggers: TensorBoard, CSV, Weights & Biases and MLflow without a network, their failures, and a run that goes on."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from immunity_fast.training import CSVLogger, Logger, MLflowLogger, Trainer, WandbLogger, loggers
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.loggers import Loggers
from tests.small_runs import CONFIG, dataset

RECORDS = [{"epoch": number, "loss": 2.0 / number, "val_not_measured": {"a": "b"}} for number in (1, 2, 3)]


def logged(logger: Logger, folder: Path, records: list[dict[str, Any]], epoch: int = 0) -> list[str]:
    """What a training does with a logger; the lines that were said."""
    said: list[str] = []
    all_of_them = Loggers([logger], said.append)
    all_of_them.open(folder, epoch, CONFIG.to_json())
    for record in records:
        all_of_them.log(record, record["epoch"])
    all_of_them.close()
    return said


def test_csv_has_a_row_an_epoch_also_after_a_kill(tmp_path: Path) -> None:
    assert logged(CSVLogger(), tmp_path, RECORDS) == []
    more = [RECORDS[1], RECORDS[2] | {"val_accuracy_mean": 0.5}]
    assert logged(CSVLogger(), tmp_path, more, epoch=1) == []
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [float(row["loss"]) for row in rows] == [2.0, 1.0, 2 / 3]
    assert [row["val_accuracy_mean"] for row in rows] == ["", "", "0.5"]


def test_mlflow_keeps_one_run_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="one of the loggers")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert logged(MLflowLogger(), tmp_path, RECORDS[:2]) == []
    assert logged(MLflowLogger(), tmp_path, RECORDS[2:], epoch=2) == []
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (experiment,) = (each for each in client.search_experiments() if each.name == "immunity-fast")
    (run,) = client.search_runs([experiment.experiment_id])
    assert [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "loss")] == [
        (1, 2.0),
        (2, 1.0),
        (3, 2 / 3),
    ]
    assert run.data.params["lr"] == str(CONFIG.lr)
    assert run.info.status == "FINISHED"


def test_wandb_offline_keeps_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="one of the loggers")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert logged(WandbLogger(), tmp_path, RECORDS[:2]) == []
    identity = json.loads((tmp_path / "loggers.json").read_text())["wandb"]
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert folder.name.endswith(identity)
    again = WandbLogger(mode="disabled")
    again.open(tmp_path, 2)
    assert again.run is not None
    again.close()


class Failing(Logger):
    def __init__(self, at: str) -> None:
        self.at = at

    def _fail(self, where: str) -> None:
        if where == self.at:
            raise OSError(28, "No space left on device")

    def open(self, folder: Path | None, epoch: int) -> None:
        self._fail("open")

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._fail("log_config")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        assert metrics.keys() == {"epoch", "loss"}
        self._fail("log")

    def close(self) -> None:
        self._fail("close")


@pytest.mark.parametrize("at", ["open", "log_config", "log"])
def test_a_logger_that_fails_is_told_of_once(at: str, tmp_path: Path) -> None:
    assert logged(Failing(at), tmp_path, RECORDS) == ["going on without Failing: [Errno 28] No space left on device"]


def test_one_that_cannot_be_closed_does_not_matter(tmp_path: Path) -> None:
    assert logged(Failing("close"), tmp_path, RECORDS) == []


@pytest.mark.parametrize(
    ("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny"), ("tensorboard", "tensorboard")]
)
def test_a_missing_package_is_one_line(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=rf"^--loggers {name}: needs {package}, .*pip install {package};"):
        Trainer(CONFIG, loggers=f"csv,{name}", out=tmp_path / "run")
    if name == "tensorboard":
        assert Trainer(CONFIG, out=tmp_path / "run")._loggers == [], "nobody has asked for it"


def test_names_functions_and_loggers_are_loggers(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []
    trainer = Trainer(
        TrainConfig(experts=1, batch_size=10, epochs=2, check_images=0, device="cpu"),
        dataset(),
        out=tmp_path / "run",
        loggers=["csv", lambda metrics, step: seen.append((step, metrics["loss"]))],
    )
    history = trainer.fit()
    assert seen == [(record["epoch"], record["loss"]) for record in history]
    assert (tmp_path / "run" / "metrics.csv").is_file()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_importing_the_training_brings_no_logger_along() -> None:
    assert importlib.import_module("immunity_fast.training").__all__.count("WandbLogger") == 1
    with pytest.raises(ValueError, match="expected none, or of tensorboard"):
        loggers.made("tensorboard,none")
    assert loggers.made("none") == []
