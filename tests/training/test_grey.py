"""Grey images, and such of other channels than three, from a file to a report; coloured ones that become grey."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import immunity_fast
from immunity_fast import ensemble, evaluate, explain, train
from immunity_fast.data.datasets import load
from immunity_fast.data.images import to_grey
from immunity_fast.experts import create
from immunity_fast.training.checkpoint import load_checkpoint, load_info, load_model, save_checkpoint
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.preparation import prepare
from immunity_fast.training.run_evaluation import evaluate_trained
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from tests.pictures import pixels
from tests.small_runs import arrays, error_line, interrupted, options, saved, trained, write_data

Image = pytest.importorskip("PIL.Image", reason="the reader of images")
SMALL = {"channels": 1, "stage": "layer1", "crop-padding": 2, "epochs": 1, "limit-train": 16, "check-images": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data.npz")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on attacked grey images, with what it ends with."""
    out = tmp_path_factory.mktemp("runs") / "grey"
    arguments = options(data, **SMALL, adversarial="pgd", attack_steps=1, attack_images=3)
    state, run = trained([*arguments, "--out", str(out)])
    evaluate_trained(state, run)
    return run


# Data


def test_data_sets_as_grey_images(tmp_path: Path, data: Path) -> None:
    rgb, grey = load("npz", data), load("npz", data, channels=1)
    assert (rgb.channels, grey.channels) == (3, 1)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(grey, part).images, to_grey(getattr(rgb, part).images))
        assert torch.equal(getattr(grey, part).labels, getattr(rgb, part).labels)
    kept = {name: value[..., 0] if name.endswith("images") else value for name, value in arrays().items()}
    stored = load("npz", write_data(tmp_path / "grey.npz", **kept), channels=1)
    assert torch.equal(stored.test.images, torch.from_numpy(kept["test_images"])[:, None])
    repeated = load("npz", tmp_path / "grey.npz")
    assert torch.equal(repeated.test.images, stored.test.images.expand(-1, 3, -1, -1))


def test_digits_and_folders_as_grey_images(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="whose digits these are")
    rgb, grey = load("digits"), load("digits", channels=1)
    assert torch.equal(grey.train.images, rgb.train.images[:, :1])
    values = np.random.default_rng(0).integers(0, 256, (8, 6, 7, 3), dtype=np.uint8)
    for index, each in enumerate(values):
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.fromarray(each).save(tmp_path / "ab"[index % 2] / f"{index}.png")
    coloured, one = load("folder", tmp_path), load("folder", tmp_path, channels=1)
    assert torch.equal(one.train.images, to_grey(coloured.train.images))


def test_cifar_as_grey_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets", reason="the reader of this data set")

    class Stored:
        url = ""

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            random = np.random.default_rng(train)
            self.data = random.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
            self.targets, self.classes = [index % 2 for index in range(20)], ["a", "b"]

    monkeypatch.setattr(datasets, "CIFAR10", Stored)
    rgb, grey = load("cifar10", tmp_path), load("cifar10", tmp_path, channels=1)
    exact = rgb.test.images.double().permute(0, 2, 3, 1) @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    assert (grey.test.images[:, 0].double() - exact).abs().max() <= 0.51
    with pytest.raises(ValueError, match=r"channels: expected 3 \(RGB\) or 1 \(grey\) for cifar10, got 2"):
        load("cifar10", tmp_path, channels=2)


def test_arrays_of_other_channels(tmp_path: Path) -> None:
    deep = {
        name: np.repeat(value, 2, axis=-1)[..., :4] if name.endswith("images") else value
        for name, value in arrays().items()
    }
    file = write_data(tmp_path / "deep.npz", **deep)
    dataset = load("npz", file, channels=4)
    assert dataset.channels == 4
    assert torch.equal(dataset.test.images, torch.from_numpy(deep["test_images"]).permute(0, 3, 1, 2))
    with pytest.raises(
        ValueError, match=r"\(n, H, W, 1\) or \(n, H, W, 3\), got .*; channels=4 \(--channels 4\) takes it"
    ):
        load("npz", file)
    with pytest.raises(ValueError, match=r"train_images: expected 2-D images as \(n, H, W, 5\), got shape"):
        load("npz", file, channels=5)
    for wrong, error in ((0, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="channels: expected"):
            load("npz", file, channels=wrong)  # type: ignore[arg-type]
    arguments = options(file, **SMALL | {"channels": 4, "check-images": 0})
    _, run = trained([*arguments, "--out", str(tmp_path / "run")])
    assert load_info(run.checkpoint)["model"]["channels"] == 4
    assert immunity_fast.load(run.folder)(torch.rand(2, 4, 12, 12)).shape == (2, 3)


# Runs


def test_a_grey_run_says_so_and_is_loaded(run: Run) -> None:
    assert run.config().channels == 1
    assert load_info(run.checkpoint)["model"]["channels"] == 1
    assert run.report.is_file()
    assert "heatmaps" in " ".join(file.name for file in (run.folder / "figures").iterdir())
    model = immunity_fast.load(run.folder)
    assert model.channels == 1
    assert model(torch.rand(2, 1, 12, 12)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"images: expected shape \(B, 1, H, W\), got \(2, 3, 12, 12\)"):
        model(torch.rand(2, 3, 12, 12))


def test_a_grey_run_goes_on_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    arguments = options(data, **SMALL | {"check-images": 0}, checkpoint_every=1)
    trained([*arguments, "--out", str(tmp_path / "whole")])
    interrupted((TrainingState, "advance"), 2, [*arguments, "--out", str(tmp_path / "killed")])
    trained(["--resume", str(tmp_path / "killed")])
    assert saved(tmp_path / "killed") == saved(tmp_path / "whole")


def test_a_grey_run_is_evaluated_again(
    run: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--attacks", "fgsm", "--limit", "3", "--masking-images", "0", "--out", str(tmp_path / "again")]
    evaluate.main([str(run.folder), *few, "--attackers", "mean", "--device", "cpu"])
    assert (tmp_path / "again" / "report.html").is_file()
    line = error_line(capsys, evaluate.main, [str(run.folder), "--channels", "3"])
    assert "--channels 3: the run in" in line
    own = ["--dataset", "npz", "--data", str(data), "--device", "cpu", "--channels", "1"]
    evaluate.main(["tests.own_networks:of_channels", *few[:-1], str(tmp_path / "own"), *own])
    assert (tmp_path / "own" / "results.json").is_file()


def test_coloured_and_grey_pictures_are_explained_alike(run: Run, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(values).save(tmp_path / "photos" / "rgb.png")
    Image.fromarray(values).convert("L").save(tmp_path / "photos" / "grey.png")
    out = tmp_path / "out"
    explain.main([str(run.folder), str(tmp_path / "photos"), "--device", "cpu", "--out", str(out)])
    found = [json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in ("rgb", "grey")]
    assert found[0]["probabilities"] == found[1]["probabilities"]
    assert pixels(out / "rgb.png").shape == pixels(out / "grey.png").shape


def test_grey_networks_are_joined_and_not_with_coloured_ones(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, channels, seed in (("a", 1, 0), ("b", 1, 1), ("c", 3, 2)):
        changes = SMALL | {"channels": channels, "experts": 1, "seed": seed, "check-images": 0}
        trained([*options(data, **changes), "--out", str(tmp_path / name)])
    ensemble.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "both")])
    assert load_model(tmp_path / "both")[0](torch.rand(2, 1, 12, 12)).shape == (2, 3)
    arguments = [str(tmp_path / "a"), str(tmp_path / "c"), "--out", str(tmp_path / "mixed")]
    line = error_line(capsys, ensemble.main, arguments)
    assert "channels of the images: expected that of" in line
    assert "1, got 3" in line


def test_a_run_without_the_entry_is_of_three_channels(data: Path, tmp_path: Path) -> None:
    """As all were before there was a setting."""
    changes = SMALL | {"channels": 3, "check-images": 0}
    _, run = trained([*options(data, **changes), "--out", str(tmp_path / "run")])
    tensors, info = load_checkpoint(run.checkpoint)
    assert "channels" not in info["model"]
    assert load_model(run.folder)[0].channels == 3
    settings = json.loads(run.config_file.read_text(encoding="utf-8"))
    del settings["channels"]
    assert TrainConfig.from_json(settings).channels == 3
    for wrong in (0, "3", 2**70):
        save_checkpoint(run.checkpoint, tensors, info | {"model": info["model"] | {"channels": wrong}})
        with pytest.raises(ValueError, match="not a whole checkpoint: model was"):
            load_info(run.checkpoint)


@pytest.mark.parametrize("experts", [1, 2])
def test_weights_of_coloured_networks_are_summed(experts: int, data: Path, tmp_path: Path) -> None:
    source = create("resnet8", 3)
    torch.save(source.state_dict(), tmp_path / "rgb.pt")
    arguments = options(data, **SMALL, experts=experts, weights=tmp_path / "rgb.pt", perturbation=0)
    folder, resume, config = train.parse([*arguments, "--out", str(tmp_path / "run")])
    state, _ = prepare(folder, resume, config)
    assert "its first convolution, of 3 channels, is summed to 1 (stem.0.weight)" in state.beginning.lines[0]
    own: Any = state.model.unstack()[0].state_dict()
    name = next(name for name in own if name.endswith("stem.0.weight"))
    assert torch.equal(own[name], source.state_dict()["stem.0.weight"].sum(1, keepdim=True))


def test_weights_of_a_coloured_mixture_are_summed_with_its_gate(data: Path, tmp_path: Path) -> None:
    changes = SMALL | {"channels": 3, "check-images": 0}
    _, run = trained([*options(data, **changes), "--out", str(tmp_path / "rgb")])
    arguments = options(data, **SMALL, weights=run.checkpoint)
    folder, resume, config = train.parse([*arguments, "--out", str(tmp_path / "run")])
    state, _ = prepare(folder, resume, config)
    assert "the 2 experts and the gate begin" in state.beginning.lines[0]
    assert "is summed to 1" in state.beginning.lines[0]


def test_a_network_of_three_channels_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(data, **SMALL | {"stage": "norm"}, arch="tests.own_networks:Plain")
    line = error_line(capsys, train.main, [*arguments, "--out", str(tmp_path / "run")])
    assert "--arch tests.own_networks:Plain: cannot be trained on images of 1 × 12×12" in line
    assert "3 channels" in line
