"""The command that evaluates any network that a user names by its module."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from immunity_fast import evaluate
from immunity_fast.data import sampling
from immunity_fast.data.datasets import load
from immunity_fast.data.sampling import sample, sample_order
from immunity_fast.evaluation.report import Outputs
from immunity_fast.evaluation.runner import Plan
from tests import evaluated
from tests.evaluated import ATTACKED, accuracy_of, attacks_made, count_correct, file_bytes, network_options, results_of
from tests.small_runs import arrays, error_line, write_data

asked = evaluated.asked
finished = evaluated.finished
networks = evaluated.networks
plain = evaluated.plain


# Any network


@pytest.mark.parametrize(
    "name", ["instance", "make", "Brightness", "OfClasses", "Holder.network", "plain", "in_an_object", "in_a_tuple"]
)
def test_any_network_is_evaluated(networks: ModuleType, name: str, data: Path, tmp_path: Path) -> None:
    shared, test = torch.get_rng_state(), load("npz", data).test
    evaluate.main([*network_options(networks, name, data, tmp_path / "out"), "--eps", "26/255"])
    assert torch.equal(torch.get_rng_state(), shared)
    found = accuracy_of(tmp_path / "out")
    rows = [("clean", None), ("subset", None), ("noise", None), ("fgsm", "output")]
    assert list(found) == [(*row, "output") for row in rows]
    expected = count_correct(lambda x: x.mean((2, 3)), test.images.double() / 255, test.labels)
    assert found["clean", None, "output"]["correct"] == expected > 20, "dropout is off"
    chosen = sample(test, 6)
    # The worst image of the ball: the label's colour darker, the others brighter.
    images, own = chosen.images.double() / 255, nn.functional.one_hot(chosen.labels, 3).bool()[..., None, None]
    attacked = torch.where(own, (images - 26 / 255).clamp(0, 1), (images + 26 / 255).clamp(0, 1))
    assert found["fgsm", "output", "output"]["correct"] == count_correct(
        lambda x: x.mean((2, 3)), attacked, chosen.labels
    )
    names = {"results.json", "results.md", "results.csv", "report.html", "evaluation.jsonl"}
    assert file_bytes(tmp_path / "out").keys() == names
    assert f"{networks.__name__}:{name} on npz" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"{networks.__name__}:{name}" not in (tmp_path / "out" / "results.json").read_text(encoding="utf-8")


def test_a_network_keeps_its_weights_and_what_is_to_be_trained(
    networks: ModuleType, data: Path, tmp_path: Path
) -> None:
    networks.instance.scale.grad = None
    evaluate.main(network_options(networks, "instance", data, tmp_path))
    assert networks.instance.scale.requires_grad
    assert networks.instance.scale.grad is None
    assert networks.instance.scale.item() == 30


def test_a_function_makes_its_network_once(networks: ModuleType, data: Path, tmp_path: Path) -> None:
    networks.MADE.clear()
    evaluate.main(network_options(networks, "make", data, tmp_path))
    assert len(networks.MADE) == 1
    assert not networks.MADE[0].training


def test_a_user_s_mixture_is_attacked_like_a_run_of_its_weights(
    networks: ModuleType, data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "folder", finished)
    arguments = ["--limit", str(ATTACKED), "--attackers", "sample,mean,worst,experts"]
    evaluate.main([*network_options(networks, "mixture", data, tmp_path), *arguments])
    found, of_run = accuracy_of(tmp_path), accuracy_of(finished)
    assert {key[1] for key in found} == {None, "sample", "mean", "worst", "expert 1", "expert 2"}
    assert {key[2] for key in found} == {"sample", "mean", "off", "worst", "expert 1", "expert 2"}
    both = found.keys() & of_run.keys()
    assert len(both) == 5 * 6
    assert all(found[key] == of_run[key] for key in both)
    assert "heatmaps" not in results_of(tmp_path)


def test_a_single_network_of_this_package_is_a_network(
    networks: ModuleType, data: Path, tmp_path: Path, asked: list[tuple[Any, Plan, Outputs]]
) -> None:
    evaluate.main(network_options(networks, "single", data, tmp_path))
    assert asked[0][0].attackers == ("output",)


def test_a_random_network_is_attacked_by_eot_and_repeats_itself(
    networks: ModuleType, data: Path, tmp_path: Path
) -> None:
    arguments = [*network_options(networks, "blurred", data, tmp_path), "--draws", "5", "--eps", "24/255"]
    shared = torch.get_rng_state()
    evaluate.main(arguments)
    assert torch.equal(torch.get_rng_state(), shared)
    found = accuracy_of(tmp_path)
    assert {key[1] for key in found} == {None, "output", "eot"}
    torch.manual_seed(77)
    evaluate.main([*arguments, "--again"])
    assert accuracy_of(tmp_path) == found
    evaluate.main([*arguments, "--again", "--seed", "1"])
    assert accuracy_of(tmp_path) != found


def test_networks_take_another_run_s_images(networks: ModuleType, data: Path, finished: Path, tmp_path: Path) -> None:
    evaluate.main([*network_options(networks, "plain", data, tmp_path), "--transfer-from", str(finished)])
    assert {key[1] for key in accuracy_of(tmp_path)} == {None, "output", "transfer"}


def test_networks_without_weights_are_told_apart_by_their_names(
    networks: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = attacks_made(monkeypatch)
    for name in ("plain", "blurred", "plain"):
        evaluate.main(network_options(networks, name, data, tmp_path))
    assert made == [("fgsm", "output")] * 2


def test_all_attacks_run(networks: ModuleType, data: Path, tmp_path: Path) -> None:
    arguments = ["--attacks", "all", "--queries", "3", "--autoattack-steps", "2", "--eps", "26/255", "--drop-fooled"]
    evaluate.main([*network_options(networks, "instance", data, tmp_path), *arguments])
    found = accuracy_of(tmp_path)
    attacks = ("fgsm", "bim", "mim", "pgd", "cw", "dlr", "cw100", "dlr100", "square", "autoattack")
    rows = [("clean", None), ("subset", None), ("noise", None), *((attack, "output") for attack in attacks)]
    assert list(found) == [(*row, "output") for row in rows]
    correct = {key[0]: entry["correct"] for key, entry in found.items()}
    assert all(correct[attack] <= correct["subset"] for attack in attacks)
    # Of a linear network nothing is worse than one step, which AutoAttack's first part reaches.
    assert len({correct[attack] for attack in ("fgsm", "bim", "mim", "pgd", "cw", "cw100", "autoattack")}) == 1
    left_out = [(pair["attack"], pair["attacker"]) for pair in results_of(tmp_path)["left_out"]]
    assert left_out == [("pgd-sum", "output"), ("arc", "output"), ("mora", "output")]
    (worst,) = results_of(tmp_path)["worst_case"]
    assert worst["correct"] == correct["fgsm"] < 6


@pytest.mark.parametrize("attacked", [True, False])
def test_nan_is_named_with_the_number_of_its_test_image(
    networks: ModuleType,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    attacked: bool,
) -> None:
    test = load("npz", data).test
    index = int(sample_order(test, 30)[3 if attacked else 20])
    monkeypatch.setattr(networks, "broken", test.images[index] / 255)
    message = error_line(capsys, evaluate.main, network_options(networks, "nan_for_one", data, tmp_path))
    assert f"got NaN or infinite ones for test image {index}" in message


# What was not attacked


def test_images_without_a_gradient_are_counted_in_every_form(
    networks: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last five of the six images that are attacked, and so the whole of a batch."""
    dark, test = arrays(), load("npz", data).test
    chosen = sample_order(test, 6)[1:]
    dark["test_images"][chosen] = 20
    dark["test_labels"][chosen] = 0
    file, out = write_data(tmp_path / "dark.npz", **dark), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sampling.ATTACK_BATCH, "cpu", 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            evaluate.main(network_options(networks, "no_gradient_in_the_dark", file, out))
    stuck = {"attack": "fgsm", "attacker": "output", "unmoved": 5, "right": 5, "images": 6}
    assert results_of(out)["unmoved"] == [stuck]
    (check,) = (check for check in results_of(out)["masking"] if not check["passed"])
    assert check["finding"] == "5 of 6 images (83.3 %) under FGSM (the model's own output)"
    texts = [
        capsys.readouterr().out,
        *((out / name).read_text(encoding="utf-8") for name in ("report.html", "results.md")),
    ]
    for text in texts:
        assert "their gradient is exactly zero" in text
        assert "5 of 6 images (83.3 %)" in text


# What a network is


def test_weights_replaced_behind_a_function_are_evaluated_anew(
    networks: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = load("npz", data).test
    images = test.images / 255
    for weights in (torch.eye(3), torch.eye(3)[[1, 2, 0]], torch.eye(3)):
        monkeypatch.setattr(networks, "WEIGHTS", weights)
        evaluate.main(network_options(networks, "of_weights", data, tmp_path))
        expected = count_correct(lambda x, w=weights: x.mean((2, 3)) @ w, images, test.labels)
        assert accuracy_of(tmp_path)["clean", None, "output"]["correct"] == expected
    assert expected > 20


def test_a_folder_of_images_of_any_size_is_brought_to_one_size(
    networks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[tuple[Any, Plan, Outputs]]
) -> None:
    image = pytest.importorskip("PIL.Image")
    for number, name in enumerate(("a", "b", "c") * 4):
        folder = tmp_path / "data" / ("train" if number < 9 else "test") / name
        folder.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (8 + number, 9), (10 * number, 5, 5)).save(folder / f"{number}.png")
    arguments = network_options(networks, "instance", tmp_path / "data", tmp_path / "out")
    arguments[arguments.index("npz")] = "folder"
    assert "--image-size) brings all images to one size" in error_line(capsys, evaluate.main, arguments)
    evaluate.main([*arguments, "--image-size", "8"])
    assert len(asked) == 1
    assert "--image-size: expected at least 1" in error_line(capsys, evaluate.main, [*arguments, "--image-size", "0"])


def test_what_makes_a_folder_s_images_fit_is_said(
    networks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("PIL.Image")
    for number in range(12):
        folder = tmp_path / "data" / ("train" if number < 9 else "test") / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (9, 9), (10 * number, 5, 5)).save(folder / f"{number}.png")
    arguments = network_options(networks, "one_channel", tmp_path / "data", tmp_path / "out")
    arguments[arguments.index("npz")] = "folder"
    line = error_line(capsys, evaluate.main, arguments)
    assert "expected a network that takes images (B, 3, 9, 9)" in line
    assert line.endswith("or --image-size N brings all images to N×N pixels\n")
