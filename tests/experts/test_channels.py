"""Networks for images of any number of channels answer, where that can be said, as those for three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import ImmunityMoE
from immunity_fast.experts import NAMES, WITH_STEMS, create
from immunity_fast.experts.channels import adapt_, adapted, is_stem
from immunity_fast.experts.imported import called
from immunity_fast.experts.stems import Stem
from immunity_fast.experts.weights import fitted, read
from immunity_fast.models.moe import SingleNetwork

F64 = torch.float64


@pytest.mark.parametrize(("had", "channels"), [(3, 1), (1, 3), (1, 4), (3, 2), (3, 4), (3, 12), (3, 3)])
def test_an_adapted_weight_is_timms(had: int, channels: int) -> None:
    weight = torch.randn(5, had, 3, 2, dtype=F64)
    found = adapted(weight, channels)
    assert found.shape == (5, channels, 3, 2)
    expected = torch.zeros(5, channels, 3, 2, dtype=F64)
    for out in range(5):
        for channel in range(channels):
            if channels == 1:
                expected[out, 0] = sum(weight[out, each] for each in range(had))
            else:
                expected[out, channel] = weight[out, channel % had] * had / channels
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("had", "channels"), [(3, 1), (1, 3), (1, 12), (3, 12)])
def test_a_grey_picture_gets_the_same_answer(had: int, channels: int) -> None:
    """Repeated in each channel, as what that number of channels is made for sees a grey picture."""
    stem = nn.Conv2d(had, 4, 3, dtype=F64)
    grey = torch.rand(2, 1, 7, 9, dtype=F64)
    expected = stem(grey.expand(-1, had, -1, -1))
    weight = adapted(stem.weight, channels)
    found = nn.functional.conv2d(grey.expand(-1, channels, -1, -1), weight, stem.bias)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_adapted_is_named() -> None:
    with pytest.raises(ValueError, match="weight: expected one for images of 1 or 3 channels, got 4"):
        adapted(torch.zeros(2, 4, 3, 3), 1)
    with pytest.raises(ValueError, match=r"channels: expected 3 .*, got 1"):
        adapt_(nn.Linear(3, 3), 1)
    own, given = torch.zeros(2, 1, 3, 3), torch.zeros(2, 3, 3, 3)
    assert is_stem(own, given, 1)
    assert not is_stem(own, own, 1)
    assert not is_stem(own, torch.zeros(2, 3, 5, 5), 1)
    assert not is_stem(own, torch.zeros(2, 8, 3, 3), 1), "a convolution in place of a depthwise one"
    assert not is_stem(own, given, 3)


CASES = [(name, "cifar") for name in NAMES] + [(name, "imagenet") for name in WITH_STEMS]
LARGE = ("robnet_large", "robnet_large_v2", "advrush")  # which are built as another is


@pytest.mark.parametrize(
    ("name", "stem"),
    [pytest.param(*case, marks=pytest.mark.exhaustive) if case[0] in LARGE else case for case in CASES],
)
def test_ours_have_a_first_convolution_of_these_channels(name: str, stem: Stem) -> None:
    with torch.device("meta"):
        rgb, grey = (create(name, 4, stem=stem, channels=channels) for channels in (3, 1))
    pairs = zip(rgb.parameters(), grey.parameters(), strict=True)
    different = [(three.shape[1], other.shape[1]) for three, other in pairs if three.shape != other.shape]
    assert different == [(3, 1)]
    with pytest.raises(ValueError, match="channels: expected at least 1, got 0"):
        create(name, 4, channels=0)


@pytest.mark.parametrize("name", ["resnet8", "torchvision:squeezenet1_1", "timm:test_resnet"])
def test_weights_of_three_channels_answer_to_grey_as_to_rgb(name: str, tmp_path: Path) -> None:
    if ":" in name:
        pytest.importorskip(name.partition(":")[0], reason="whose network this is")
    torch.manual_seed(0)
    rgb, grey = create(name, 4).to(F64).eval(), create(name, 4, channels=1).to(F64).eval()
    torch.save(rgb.state_dict(), tmp_path / "rgb.pt")
    fits = fitted(read(tmp_path / "rgb.pt"), name, grey.state_dict(), 4, 1)
    assert (fits.replaced, fits.channels) == ((), 3)
    assert grey.state_dict()[fits.adapted].shape[1] == 1
    grey.load_state_dict(fits.tensors, strict=False)
    images = torch.rand(2, 1, 40, 40, dtype=F64)
    with torch.no_grad():
        torch.testing.assert_close(grey(images), rgb(images.expand(-1, 3, -1, -1)), rtol=1e-10, atol=1e-10)


def test_torchvisions_begin_with_the_sum() -> None:
    pytest.importorskip("torchvision.models", reason="whose network this is")
    networks = []
    for channels in (3, 1):
        torch.manual_seed(0)
        networks.append(create("torchvision:squeezenet1_1", 4, channels=channels).state_dict())
    rgb, grey = networks
    first = next(iter(rgb))
    assert torch.equal(grey.pop(first), rgb.pop(first).sum(1, keepdim=True))
    assert all(torch.equal(grey[name], value) for name, value in rgb.items())


def test_what_a_user_s_function_is_told() -> None:
    def told(function: Any, channels: int) -> Any:
        return called("place:name", function, 5, channels)

    assert told(lambda num_classes, in_channels: (num_classes, in_channels), 1) == (5, 1)
    assert told(lambda num_classes=10, in_chans=3: (num_classes, in_chans), 4) == (5, 4)
    assert told(lambda classes, *, input_channels=1: (classes, input_channels), 3) == (5, 3)
    assert told(lambda in_channels=3: in_channels, 1) == 1
    assert told(lambda num_classes, channels=64: (num_classes, channels), 1) == (5, 64), "a width"
    assert told(lambda num_classes: num_classes, 1) == 5
    with pytest.raises(ValueError, match="got one that requires width, depth"):
        told(lambda width, depth, in_channels=3: None, 1)


@pytest.mark.parametrize("channels", [1, 4])
def test_mixtures_of_other_channels(channels: int, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="what folders hold")
    torch.manual_seed(0)
    images = torch.rand(3, channels, 12, 14)
    for model in (
        ImmunityMoE("resnet8", 2, 4, image_size=(12, 14), channels=channels, stage="layer1"),
        SingleNetwork("resnet8", 4, image_size=(12, 14), channels=channels),
    ):
        model.eval().gate.switch = "off"
        assert model(images).shape == (3, 4)
        assert model(images, torch.tensor([0, 1, 2])).shape == ()
        assert model.heatmaps(images).shape == (model.num_experts, 3, 12, 14)
        assert model.normalize.mean.flatten().tolist() == [0.5] * channels  # type: ignore[union-attr, operator]
        folder = tmp_path / str(model.num_experts)
        model.save_pretrained(folder)
        again = ImmunityMoE.from_pretrained(folder)
        assert again.channels == channels
        assert torch.equal(again(images), model(images))
        assert f"(B, {channels}, 12, 14)" in (folder / "README.md").read_text(encoding="utf-8")
        torch.testing.assert_close(model.for_inference("off")(images), model(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=rf"images: expected shape \(B, {channels}, H, W\), got \(3, 3, 12, 14\)"):
        model(torch.rand(3, 3, 12, 14))
    with pytest.raises(ValueError, match=f"mean: expected {channels} numbers, one a channel, got 3"):
        ImmunityMoE("resnet8", 2, 4, channels=channels, mean=[0.5] * 3)


def test_captured_networks_of_other_channels() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.relu(self.conv(images)).mean((2, 3)))
            return logits

    model = ImmunityMoE.from_experts([Net(), Net()], image_size=12)
    assert model.channels == 1
    assert model(torch.rand(2, 1, 12, 12)).shape == (2, 3)
