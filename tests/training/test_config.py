"""Settings: their ranges, their JSON and their options agree."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from immunity_fast import train
from immunity_fast.losses import ALPHA, BETA, GAMMA
from immunity_fast.training.config import ADDED, PRESETS, TrainConfig, add_options, from_preset
from tests.small_runs import error_line
from tests.typed_settings import BESIDE, FIELDS, GIVEN, option_of


def _parse(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser)
    return vars(parser.parse_args(arguments))


def test_every_setting_is_tried_here() -> None:
    assert GIVEN.keys() == FIELDS.keys()
    assert all(value != getattr(TrainConfig(), name) for name, (_, value) in GIVEN.items())


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_an_option_that_sets_it_alone(name: str) -> None:
    typed, meant = GIVEN[name]
    given = _parse(option_of(name), *typed)
    assert given == {name: meant}
    assert type(given[name]) is type(meant)
    assert getattr(TrainConfig(**BESIDE.get(name, {}), **given), name) == meant


def test_no_option_gives_nothing() -> None:
    assert _parse() == {}


def test_a_flag_can_be_taken_back() -> None:
    assert _parse("--no-detach-weights") == {"detach_weights": False}


def test_help_explains_every_option() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    text = " ".join(parser.format_help().split())
    for name, field in FIELDS.items():
        assert option_of(name) in text
        assert field.metadata["help"].split(";")[0] in text


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.type in (float, "float")])
def test_every_number_may_have_a_fraction_where_it_is_a_float(name: str) -> None:
    assert _parse(option_of(name), "0.5") == {name: 0.5}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    config = PRESETS[name]
    assert config.preset == name
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_all_settings_survive_json() -> None:
    apart = ("shard", "shards", "ensemble", "adversary")  # which go with few of the others
    settings = {name: meant for name, (_, meant) in GIVEN.items() if name not in apart}
    plain = TrainConfig(ensemble="plain", shards=True, adversarial="pgd", adversary="each")
    for config in (TrainConfig(**settings), TrainConfig(shard=True), plain):
        assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_paper_preset_is_the_paper_s_recipe() -> None:
    paper = PRESETS["paper"]
    assert (paper.arch, paper.experts, paper.epochs, paper.batch_size, paper.lr) == ("googlenet", 5, 200, 32, 0.01)
    assert paper.dataset == "cifar10"
    assert paper.score == "logit"
    assert not paper.detach_weights


def test_the_quickstart_needs_no_download() -> None:
    assert PRESETS["quickstart"].dataset == "digits"
    assert PRESETS["quickstart"].data is None


def test_the_loss_s_weights_default_to_its_own() -> None:
    assert (TrainConfig().alpha, TrainConfig().beta, TrainConfig().gamma) == (ALPHA, BETA, GAMMA)


KINDS = typing.get_type_hints(TrainConfig)
OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("epochs", 0),
    ("batch_size", 0),
    ("checkpoint_every", 0),
    ("early_stopping", 0),
    ("monitor", "speed"),
    ("loggers", "paper"),
    ("attack_images", 0),
    ("experts", 0),
    ("eps", -0.1),
    ("eps", 1.5),
    ("attack_alpha", -0.1),
    ("attack_steps", 0),
    ("trades_weight", -1.0),
    ("ema", 1.0),
    ("limit_train", 0),
    ("channels", 0),
    ("workers", -1),
    ("workers", "many"),
    ("workers", 10**6),
    ("alpha", -1.0),
    ("beta", math.inf),
    ("gamma", math.nan),
    ("smoothing", -0.1),
    ("weight_decay", -1e-9),
    ("lr", 0.0),
    ("lr", math.inf),
    ("momentum", -0.1),
    ("momentum", 1.0),
    ("accumulate", 0),
    ("betas", (0.9,)),
    ("betas", (0.9, 1.0)),
    ("betas", "a,b"),
    ("betas", (0.9, math.nan)),
    ("optimizer_eps", -1e-9),
    ("optimizer_eps", math.inf),
    ("warmup_epochs", -0.5),
    ("warmup_epochs", 12.5),
    ("warmup_epochs", math.nan),
    ("lr_min", -1e-9),
    ("lr_min", 0.06),
    ("milestones", (2, 1)),
    ("milestones", (0,)),
    ("milestones", (1, math.inf)),
    ("milestones", ("x",)),
    ("lr_factor", 0.0),
    ("lr_factor", 1.5),
    ("label_smoothing", -0.1),
    ("label_smoothing", 1.1),
    ("label_smoothing", math.nan),
    ("class_weights", "balance"),
    ("class_weights", "1,-2"),
    ("class_weights", "1,,2"),
    ("class_weights", "1,inf"),
    ("class_weights", ""),
    ("ignore_index", -(2**63) - 1),
    ("mixup", -0.1),
    ("cutmix", math.inf),
    ("clip_grad_norm", 0.0),
    ("clip_grad_norm", math.nan),
    ("crop_padding", -1),
    ("check_images", -1),
    ("rotation", 180.5),
    ("rotation", math.nan),
    ("seed", -1),
    ("seed", 2**63),
    ("arch", "resnet9"),
    ("dataset", "mnist"),
    ("image_size", 0),
    ("perturbation", -0.1),
    ("perturbation", math.inf),
    ("ensemble", "other"),
    ("ensemble", "plain:weight=1"),
    ("shards", True),
    *((name, "other") for name, kind in KINDS.items() if typing.get_origin(kind) is typing.Literal),
]


def test_every_setting_that_has_a_range_is_tried_out_of_it() -> None:
    free = {"preset", "data", "stage", "weights", "device", "poison"} | {
        name for name, kind in KINDS.items() if kind is bool
    }
    assert {name for name, _ in OUT_OF_RANGE} >= FIELDS.keys() - free


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_its_option_s_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{option_of(name)}: expected .*, got "):
        TrainConfig(**({} if name == "shards" else BESIDE.get(name, {})) | {name: value})


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [[], {}, 1j, b""], ids=["list", "object", "complex", "bytes"])
def test_json_of_a_wrong_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        TrainConfig.from_json(TrainConfig().to_json() | {name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_json_null_is_refused_unless_none_is_a_value(name: str) -> None:
    values = TrainConfig().to_json() | {name: None}
    if type(None) in typing.get_args(KINDS[name]):
        assert getattr(TrainConfig.from_json(values), name) is None
    else:
        with pytest.raises(ValueError, match=name):
            TrainConfig.from_json(values)


@pytest.mark.parametrize(("name", "value"), [("epochs", True), ("lr", True), ("detach_weights", 1), ("epochs", 1.0)])
def test_json_does_not_mix_truth_and_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        TrainConfig.from_json(TrainConfig().to_json() | {name: value})


def test_json_may_write_a_float_without_a_fraction() -> None:
    assert TrainConfig.from_json(TrainConfig().to_json() | {"lr": 1}).lr == 1


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_json_that_is_no_object_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="expected an object"):
        TrainConfig.from_json(values)


def test_a_missing_and_an_unknown_setting_are_named() -> None:
    values = TrainConfig().to_json() | {"colour": "red"}
    del values["lr"]
    with pytest.raises(ValueError, match="colour, lr"):
        TrainConfig.from_json(values)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1.0  # type: ignore[misc]


def test_help_has_its_options_under_headings() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    lines = parser.format_help().splitlines()
    headings = {option.metadata["group"] for option in FIELDS.values()}
    assert len(headings) == 9
    assert all(f"{heading}:" in lines for heading in headings)
    options = next(i for i, line in enumerate(lines) if line == "options:")
    assert not lines[options + 2], "only --help has no heading"


def test_a_run_from_before_has_a_setting_that_is_gone() -> None:
    values = TrainConfig(lr=0.5).to_json()
    assert TrainConfig.from_json(values | {"weight_scale": "channels"}) == TrainConfig(lr=0.5)
    with pytest.raises(ValueError, match=r"^setting weight_scale: expected channels, .*, got spatial$"):
        TrainConfig.from_json(values | {"weight_scale": "spatial"})


def test_a_run_from_before_lacks_settings_that_are_new() -> None:
    values = TrainConfig(lr=0.5).to_json()
    for name in ADDED:
        del values[name]
    assert TrainConfig.from_json(values) == TrainConfig(lr=0.5, stem="cifar")


@pytest.mark.parametrize(
    ("given", "experts"),
    [
        ({}, 5),
        ({"arch": "resnet18"}, 5),
        ({"arch": "resnet8,resnet18,resnet8"}, 3),
        ({"arch": "resnet8, timm:resnet18", "experts": 5}, 5),
        ({"arch": "resnet8,torchvision:resnet18", "preset": "paper"}, 2),
    ],
)
def test_there_are_as_many_experts_as_architectures(given: dict[str, Any], experts: int) -> None:
    config = from_preset(given)
    assert config.experts == experts
    again = _parse(*config.options())
    assert from_preset(again) == config


def test_fewer_experts_than_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^--experts: expected at least 2, as many as --arch names, .*, got 1$"):
        TrainConfig(arch="resnet8,resnet18", experts=1)


@pytest.mark.parametrize(
    "arch", ["resnet8,", ",resnet8", "", "resnet9", "resnet8,x y", "a:b,no:where:", "timm:../x", "os.system", "x.json"]
)
def test_what_can_be_no_architecture_is_refused(arch: str) -> None:
    with pytest.raises(ValueError, match=r"^--arch: .*expected "):
        TrainConfig(arch=arch)


def test_an_option_that_is_gone_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, train.main, ["--weight-scale", "spatial"], code=2)
    assert "unrecognized arguments: --weight-scale spatial" in line


def test_python_s_values_become_a_setting_s_type() -> None:
    given: dict[str, Any] = {
        "epochs": np.int64(3),
        "lr": np.float64(0.25),
        "eps": "4/255",
        "beta": 2,
        "data": Path("some") / "file.npz",
        "class_weights": np.array([1.0, 2.0]),
    }
    config = TrainConfig(**given)
    assert (config.epochs, config.lr, config.eps, config.beta) == (3, 0.25, 4 / 255, 2.0)
    assert (config.data, config.class_weights) == (str(Path("some/file.npz")), "1,2")
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", 2.5), ("epochs", "three"), ("lr", [0.1]), ("detach_weights", 1), ("arch", None)]
)
def test_python_s_values_of_another_type_are_refused(name: str, value: Any) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf"^--{name.replace('_', '-')}: expected .*, got "):
        TrainConfig(**given)


def test_another_optimiser_comes_with_its_own_numbers() -> None:
    sgd, adamw = TrainConfig(seed=3), TrainConfig(optimizer="adamw", seed=3)
    assert sgd.changed(optimizer="adamw") == adamw != dataclasses.replace(sgd, optimizer="adamw")
    assert adamw.changed(optimizer="sgd") == sgd
    assert sgd.changed(optimizer="adamw", lr=3e-4) == TrainConfig(optimizer="adamw", lr=3e-4, seed=3)
    assert sgd.changed(optimizer="sgd", lr=0.2) == TrainConfig(lr=0.2, seed=3)
    stepped = TrainConfig(schedule="step", milestones=(1, 2), lr_factor=0.5)
    assert stepped.changed(schedule="cosine") == TrainConfig()
    assert stepped.changed(schedule="step") == stepped


def test_a_preset_is_had_from_python() -> None:
    assert TrainConfig.from_preset("paper") == PRESETS["paper"]
    assert TrainConfig.from_preset("fast", optimizer="adamw") == PRESETS["fast"].changed(optimizer="adamw")
    with pytest.raises(ValueError, match=r"^--preset: expected one of quickstart, paper, fast, got slow$"):
        TrainConfig.from_preset("slow")
