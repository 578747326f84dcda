"""Networks of another width by name, and the width at which one computes as much as several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from immunity_fast import ImmunityMoE, experts
from immunity_fast.experts.registry import check_form, file_title, has_stems, is_ours
from immunity_fast.experts.weights import fitted, read, translated
from immunity_fast.experts.widths import scaled, split_width
from tests import grids

# What each number of channels of a network with a width of 1.5 is multiplied by: all are even where that is published.
PUBLISHED = {"resnet8": 1.5, "resnet18": 1.5, "googlenet": 1.5, "densenet121": 1.5, "pdarts": 1.5, "robnet_free": 1.5}


def _convolutions(name: str, stem: str = "cifar") -> list[nn.Conv2d]:
    with torch.device("meta"):
        network = experts.create(name, stem=stem)  # type: ignore[arg-type]
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("name", grids.each(4, list(PUBLISHED)))
def test_every_convolution_has_so_many_times_the_channels(name: str) -> None:
    narrow, wide = _convolutions(name), _convolutions(f"{name}x1.5")
    assert [each.out_channels for each in wide] == [each.out_channels * 3 // 2 for each in narrow]
    assert wide[0].in_channels == 3
    assert [each.kernel_size for each in wide] == [each.kernel_size for each in narrow]


@pytest.mark.parametrize("name", experts.WITH_STEMS)
def test_the_imagenet_form_has_widths(name: str) -> None:
    wide, narrow = (_convolutions(text, "imagenet")[0] for text in (f"{name}x2", name))
    assert wide.kernel_size == (7, 7)
    assert wide.out_channels == 2 * narrow.out_channels
    assert has_stems(f"{name}x2")


@pytest.mark.parametrize("name", experts.NAMES)
def test_a_width_of_one_is_the_published_network(name: str) -> None:
    with torch.device("meta"):
        assert repr(experts.create(f"{name}x1")) == repr(experts.create(name)) == repr(experts.create(f"{name}x1.00"))


@pytest.mark.parametrize("name", grids.each(3, experts.NAMES))
@pytest.mark.parametrize("width", ["0.01", "0.13", "1.73"])
def test_odd_numbers_of_channels_compute(name: str, width: str) -> None:
    with torch.device("meta"):
        network = experts.create(f"{name}x{width}", 3, channels=1).train()
        assert network(torch.empty(2, 1, 33, 31)).shape == (2, 3)


def test_numbers_of_channels_are_rounded() -> None:
    assert [scaled(16, times) for times in (0.01, 0.1, 1.0, 1.73, 100.0)] == [1, 2, 16, 28, 1600]
    assert [each.out_channels for each in _convolutions("resnet8x1.73")] == [28, 28, 28, 55, 55, 55, 111, 111, 111]


@pytest.mark.parametrize(
    "width",
    ["0", "", "foo", "1e9", "1000000000", "-2", "inf", "nan", "1_0", "0.009", "100.1", "2x2", "٢", " 2"],
)
def test_a_wrong_width_is_a_line(width: str) -> None:
    for use in (experts.create, experts.resolve, check_form, is_ours, has_stems):
        with pytest.raises(ValueError, match=r"^name: expected resnet8x and a decimal number from 0.01 to 100, got '"):
            use(f"resnet8x{width}")


@pytest.mark.parametrize("name", ["foox2", "resnetx2", "x2", "RESNET8x2"])
def test_a_width_of_no_network_is_a_line(name: str) -> None:
    for use in (experts.create, experts.resolve, check_form):
        with pytest.raises(ValueError, match=r"^name: expected one of resnet18, .*with a width \(resnet8x1.5\)"):
            use(name)


def test_other_forms_of_names_have_no_width() -> None:
    for name in ("resnet8x2.json", "resnet8x:net", "timm:resnet18x2", "resnet8", "{}"):
        assert split_width(name, experts.NAMES) == (name, 1.0)


def test_a_name_with_a_width_is_one_wherever_a_name_is() -> None:
    assert experts.resolve("resnet8x1.5,resnet8") == "resnet8x1.5,resnet8"
    assert experts.title("resnet8x1.5", 3) == "3 × resnet8x1.5"
    assert file_title("resnet8x1.5") == "resnet8x1.5"
    model = ImmunityMoE("resnet8x0.5,resnet8x0.25", 2, 4, image_size=20)
    logits, maps, _ = model.expert_outputs(torch.rand(2, 3, 20, 20))
    assert logits.shape == (2, 2, 4)
    assert [own.shape[1] for own in maps] == [16, 8]


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    torch.save(experts.create("resnet8", 4).state_dict(), tmp_path / "w.pt")
    own = experts.create("resnet8x2", 4).state_dict()
    message = r"the weights of resnet8x2, got a file .*of shape \(16, 3, 3, 3\) where \(32, 3, 3, 3\) was expected"
    with pytest.raises(ValueError, match=message):
        fitted(read(tmp_path / "w.pt"), "resnet8x2", own, 4)


def test_torchvision_s_names_are_those_of_any_width() -> None:
    given = {"conv1.weight": torch.zeros(128, 3, 7, 7)}
    assert list(translated("resnet18x2", given)) == ["stem.conv.weight"]


def _by_hand(name: str, height: int, width: int, classes: int) -> int:
    """Twice the multiplications of a chain's convolutions and of its last layer, by hooks on a real pass."""
    total = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            high, wide = module.kernel_size
            total += 2 * output.numel() * (module.in_channels // module.groups) * high * wide
        elif isinstance(module, nn.Linear):
            total += 2 * output.numel() * module.in_features

    network = experts.create(name, classes)
    for module in network.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        network.eval()(torch.rand(1, 3, height, width))
    return total


@pytest.mark.parametrize("name", ["resnet8", "resnet8x0.37"])
def test_flops_are_two_a_multiplication(name: str) -> None:
    assert experts.flops(name, num_classes=7, image_size=(13, 18)) == _by_hand(name, 13, 18, 7)


def test_flops_of_depthwise_convolutions_are_of_their_groups() -> None:
    assert experts.flops("pdartsx0.1", num_classes=3, image_size=9) == _by_hand("pdartsx0.1", 9, 9, 3)


def test_flops_of_several_are_their_sum() -> None:
    assert experts.flops("resnet8,resnet8x2") == experts.flops("resnet8") + experts.flops("resnet8x2")


@pytest.mark.parametrize(
    ("arch", "times"), [("resnet8", 3), ("resnet8", 5), ("resnet8", 0.5), ("resnet8x1.5", 2), ("resnet18", 3)]
)
def test_a_wider_network_computes_as_much_as_several(arch: str, times: float) -> None:
    name = experts.wider(arch, times, num_classes=4, image_size=24)
    wanted = times * experts.flops(arch, num_classes=4, image_size=24)
    own, width = split_width(name, experts.NAMES)
    assert own == split_width(arch, experts.NAMES)[0]

    def distance(by: float) -> float:
        return abs(experts.flops(f"{own}x{width + by:.2f}", num_classes=4, image_size=24) / wanted - 1)

    assert distance(0) <= 0.03
    assert distance(0) <= min(distance(-0.01), distance(0.01)), "and no width beside it comes nearer"


@pytest.mark.parametrize("arch", grids.each(3, ["googlenet", "densenet121", "pdarts"]))
def test_any_network_of_ours_has_a_wider_one(arch: str) -> None:
    name = experts.wider(arch, 2, image_size=16)
    assert experts.flops(name, image_size=16) == pytest.approx(2 * experts.flops(arch, image_size=16), rel=0.03)


def test_as_much_as_one_is_the_network_itself() -> None:
    assert experts.wider("resnet8", 1) == "resnet8"


@pytest.mark.parametrize("arch", ["resnet8,resnet18", "timm:resnet18", "{}", "foox2", ""])
def test_wider_takes_one_network_of_ours(arch: str) -> None:
    with pytest.raises(ValueError, match=r"^arch: expected one of resnet18, .*, with or without a width, got "):
        experts.wider(arch, 2)


@pytest.mark.parametrize("times", [0, -1, float("nan"), float("inf"), 1e9, 1e-9])
def test_wider_refuses_what_no_width_has(times: float) -> None:
    with pytest.raises(ValueError, match=r"^times: expected "):
        experts.wider("resnet8", times)
