"""Settings in YAML and JSON: what may be written, what wins, and what is said of a mistake."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from immunity_fast import train
from immunity_fast.training.config import PRESETS, TrainConfig, from_preset, read_settings
from immunity_fast.training.config_file import converted, parse_yaml
from tests.small_runs import error_line
from tests.typed_settings import BESIDE, FIELDS, GIVEN, option_of

yaml = pytest.importorskip("yaml", reason="PyYAML reads and writes settings in YAML")


def _written(folder: Path, text: str, name: str = "c.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_survives_yaml(name: str, tmp_path: Path) -> None:
    config = from_preset(BESIDE.get(name, {}) | {name: GIVEN[name][1]})
    text = config.to_yaml(tmp_path / "c.yaml")
    assert (tmp_path / "c.yaml").read_text(encoding="utf-8") == text
    assert TrainConfig.from_yaml(tmp_path / "c.yaml") == config
    assert yaml.safe_load(text) == config.to_json(), "as YAML 1.1 reads it, too"


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_typed_on_a_command_line_may_stand_in_a_file(name: str, tmp_path: Path) -> None:
    typed, meant = GIVEN[name]
    file = _written(tmp_path, f"{option_of(name)[2:]}: {typed[0] if typed else 'true'}\n")
    assert read_settings(file) == {name: meant}
    assert type(read_settings(file)[name]) is type(meant)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1e-3", {"lr": 1e-3}),
        ("lr: 1", {"lr": 1.0}),
        ("eps: 8/255", {"eps": 8 / 255}),
        ("epochs: 1e2", {"epochs": 100}),
        ("epochs: '7'", {"epochs": 7}),
        ("amp: off\nflip: on\ncompile: no_such", {"amp": "off", "flip": "on", "compile": "no_such"}),
        ("amp: false\nflip: true", {"amp": "off", "flip": "on"}),
        ("detach_weights: true", {"detach_weights": True}),
        ("arch: [resnet8, resnet18]", {"arch": "resnet8,resnet18"}),
        ("milestones: [100, 1.5e2]", {"milestones": (100, 150.0)}),
        ("milestones:\n  - 1\n  - 2", {"milestones": (1, 2)}),
        ("milestones: 30", {"milestones": (30,)}),
        ("betas: 0.9, 0.99", {"betas": (0.9, 0.99)}),
        ("data: 2020", {"data": "2020"}),
        ("data: ~\nema: null\nlimit_train:", {"data": None, "ema": None, "limit_train": None}),
        ("batch-size: 16  # a comment", {"batch_size": 16}),
        ("{\"lr\": 0.5}", {"lr": 0.5}),
        ("weight_scale: channels", {}),
        ("", {}),
        ("# nothing", {}),
    ],
)  # fmt: skip
def test_values_are_what_a_reader_takes_them_for(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    found = read_settings(_written(tmp_path, text))
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in expected.items()}


MISTAKES: list[tuple[str, str]] = [
    ("warmup: 5", "warmup: expected the name of a setting, got one that there is not; did you mean warmup_epochs?"),
    ("learning_rate: 1", "learning_rate: expected the name of a setting, got one that there is not"),
    ("epoch: 1", "did you mean epochs?"),
    ("optimiser: adam", "did you mean optimizer?"),
    ("lr: fast", "lr: expected int or float, got fast"),
    ("lr: true", "lr: expected int or float, got True"),
    ("epochs: 1.5", "epochs: expected int, got 1.5"),
    ("epochs: [1]", "epochs: expected int, got [1]"),
    ("experts: null", "experts: expected int, got None"),
    ("amp: 3", "--amp: expected one of auto, off, bf16, fp16, got 3"),
    ("optimizer: lion", "--optimizer: expected one of sgd, adam"),
    ("betas: {a: 1}", "betas: expected numbers or null, got {'a': 1}"),
    ("optimisation: {lr: 1}", "optimisation: expected the name of a setting"),
    ("preset: huge", "--preset: expected one of quickstart, paper, fast, got huge"),
    ("lr: 1\nlr: 2", "lr stands there twice"),
    ("batch-size: 1\nbatch_size: 2", "batch-size: expected each setting once"),
    ("- lr", "expected settings, name: value, got ['lr']"),
    ("3: 4", "expected settings, name: value, got {3: 4}"),
    ("lr", "expected settings, name: value, got lr"),
    ("lr: [", "expected settings by name, got what cannot be read (YAML: "),
    ("lr: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ("weight_scale: spatial", "weight_scale: expected channels"),
    ("seeds: x", "--seeds: expected whole numbers and ranges"),
]


@pytest.mark.parametrize(("text", "line"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_a_mistake_is_one_line(text: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _written(tmp_path, text)
    said = error_line(capsys, train.main, ["--config", str(file), "--out", str(tmp_path / "run")])
    assert line in said
    assert line.startswith("--") or str(file) in said
    assert not (tmp_path / "run").exists()


def test_seeds_are_no_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seeds: expected the name of a setting, .* did you mean seed\?"):
        TrainConfig.from_yaml(_written(tmp_path, "seeds: 0"))


def test_a_file_that_is_not_there_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = error_line(capsys, train.main, ["--config", str(tmp_path / "none.yaml")])
    assert said == f"error: {tmp_path / 'none.yaml'}: there is no such file of settings\n"


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"):
        with pytest.raises(ValueError, match="constructor"):
            parse_yaml(f"lr: {tag} ['{tmp_path / 'made'}']")
    assert not (tmp_path / "made").exists()


def test_a_command_line_wins_over_the_file_over_the_preset(tmp_path: Path) -> None:
    file = _written(tmp_path, "preset: paper\nlr: 0.5\nepochs: 7\n")
    config = train.parse(["--config", str(file), "--epochs", "3", "--out", "none"]).config
    assert (config.preset, config.arch, config.lr, config.epochs) == ("paper", "googlenet", 0.5, 3)
    config = train.parse(["--config", str(file), "--preset", "fast", "--out", "none"]).config
    assert (config.preset, config.arch, config.lr, config.epochs) == ("fast", "resnet18", 0.5, 7)


def test_another_optimiser_than_the_file_s_has_its_own_rate(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    TrainConfig(lr=0.3, schedule="step", milestones=(1,)).to_yaml(file)
    words = ["--config", str(file), "--optimizer", "adamw", "--schedule", "cosine", "--out", "none"]
    config = train.parse(words).config
    assert (config.lr, config.weight_decay, config.milestones) == (1e-3, 1e-2, None)


def test_a_run_s_settings_are_such_a_file(tmp_path: Path) -> None:
    config = from_preset({"arch": "resnet8,resnet18", "optimizer": "adam", "betas": (0.5, 0.9), "amp": "bf16"})
    file = _written(tmp_path, json.dumps(config.to_json()), "config.json")
    for given in (file, tmp_path):
        assert train.parse(["--config", str(given), "--out", "none"]).config == config
    assert TrainConfig.from_yaml(file) == config


def test_settings_of_an_earlier_version_mean_what_they_meant(tmp_path: Path) -> None:
    values = TrainConfig().to_json() | {"weight_scale": "channels"}
    del values["stem"]
    assert TrainConfig.from_yaml(_written(tmp_path, json.dumps(values), "config.json")).stem == "cifar"
    assert TrainConfig.from_yaml(_written(tmp_path, "lr: 0.1")).stem == "auto"


def test_settings_are_printed_and_nothing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.main(["--print-config", "--preset", "fast", "--optimizer", "adamw", "--experts", "3"])
    output, error = capsys.readouterr()
    assert not list(tmp_path.iterdir())
    assert error == ""
    file = _written(tmp_path, output)
    assert TrainConfig.from_yaml(file) == from_preset({"preset": "fast", "optimizer": "adamw", "experts": 3})
    assert "# optimisation\n" in output


@pytest.mark.parametrize("name", PRESETS)
def test_a_file_may_name_its_preset_alone(name: str, tmp_path: Path) -> None:
    assert TrainConfig.from_yaml(_written(tmp_path, f"preset: {name}")) == PRESETS[name]


def test_without_pyyaml_json_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_ = builtins.__import__

    def no_yaml(name: str, *rest: Any, **keywords: Any) -> Any:
        if name == "yaml":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_(name, *rest, **keywords)

    monkeypatch.setattr(builtins, "__import__", no_yaml)
    with pytest.raises(ModuleNotFoundError, match=r"PyYAML: pip install pyyaml; .* JSON"):
        read_settings(_written(tmp_path, "lr: 1"))
    assert read_settings(_written(tmp_path, '{"lr": 1}', "c.json")) == {"lr": 1}


def test_text_of_a_setting_that_may_be_text_stays() -> None:
    assert converted("1e-3", (str,)) == "1e-3"
    assert converted("x,y", (tuple, type(None))) == ("x", "y")
    assert converted(None, (tuple, type(None))) is None
