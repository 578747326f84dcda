"""Stems for large images: what networks give there, and that torchvision's weights are ours under other names."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from immunity_fast import ImmunityMoE
from immunity_fast.experts import NAMES, WITH_STEMS, create
from immunity_fast.experts.staged import StagedNetwork, default_stage
from immunity_fast.experts.stems import chosen_stem
from immunity_fast.experts.weights import translated
from tests import grids
from tests.tensors import assert_same_state

# The sides of the stages' maps on images of 224×224, and torchvision's numbers of parameters for 1000 classes.
SIDES = {"resnet18": [56, 56, 28, 14, 7], "googlenet": [28, 28, 14, 7], "densenet121": [56, 56, 28, 14, 7]}
PARAMETERS = {"resnet18": 11_689_512, "googlenet": 6_624_904, "densenet121": 7_978_856}
DEFAULTS = {"resnet18": "layer3", "googlenet": "inception4", "densenet121": "block3"}

each_name = pytest.mark.parametrize("name", WITH_STEMS)


@cache
def _outline(name: str) -> StagedNetwork:
    with torch.device("meta"):
        network = create(name, 1000, stem="imagenet")
    assert isinstance(network, StagedNetwork)
    return network


@each_name
def test_parameters_are_torchvision_s(name: str) -> None:
    assert sum(parameter.numel() for parameter in _outline(name).parameters()) == PARAMETERS[name]


@each_name
def test_maps_of_large_images(name: str) -> None:
    maps, sides = torch.empty(2, 3, 224, 224, device="meta"), []
    network = _outline(name).eval()
    for stage in network.stage_names:
        maps = network.get_submodule(stage)(maps)
        sides.append(maps.shape[-1])
        assert maps.shape[-2] == maps.shape[-1]
    assert sides == SIDES[name]
    last = max(index for index, side in enumerate(sides) if side > 8)
    assert network.stage_names[last] == DEFAULTS[name]


def test_the_default_stage_of_large_images() -> None:
    assert default_stage(create("googlenet", 2, stem="imagenet"), (224, 200)) == "inception4"


@pytest.mark.parametrize(
    ("name", "library"),
    grids.grid(
        WITH_STEMS,
        ["torchvision", "timm"],
        ordinary=lambda name, library: (library == "timm") == (name == "resnet18"),
    ),
)
def test_weights_of_libraries_are_ours(name: str, library: str) -> None:
    pytest.importorskip("timm" if library == "timm" else "torchvision.models", reason="whose networks these are")
    if (library, name) == ("timm", "googlenet"):
        pytest.skip("timm has none")
    torch.manual_seed(0)
    theirs = create(f"{library}:{name}", 7)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    ours = create(name, 7, stem="imagenet")
    ours.load_state_dict(translated(name, theirs.state_dict()))  # all of it, and nothing besides
    theirs, ours = theirs.double().eval(), ours.double().eval()
    images = torch.rand(2, 3, 97, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@each_name
def test_names_of_ours_stay(name: str) -> None:
    state = _outline(name).state_dict()
    assert list(translated(name, state)) == list(state)


@pytest.mark.parametrize(
    ("size", "stem"), [(32, "cifar"), (64, "cifar"), (65, "imagenet"), ((64, 300), "cifar"), ((65, 300), "imagenet")]
)
def test_what_auto_is(size: int | tuple[int, int], stem: str) -> None:
    assert chosen_stem("auto", size) == stem
    assert chosen_stem("cifar", size) == "cifar"
    assert chosen_stem("imagenet", size) == "imagenet"


def test_others_have_one_form() -> None:
    assert set(NAMES) > set(WITH_STEMS)
    with torch.device("meta"):
        one, other = create("resnet8", 3), create("resnet8", 3, stem="imagenet")
    assert repr(one) == repr(other)
    with pytest.raises(ValueError, match=r"^stem: expected one of cifar, imagenet, got 'auto'$"):
        create("resnet18", stem="auto")  # type: ignore[arg-type]


def test_a_mixture_of_large_images_has_that_stem() -> None:
    torch.manual_seed(0)
    model = ImmunityMoE("resnet18", 2, 3, image_size=72)
    assert "experts.stem.conv.weight" in model.state_dict()
    assert model.eval()(torch.rand(1, 3, 72, 72)).shape == (1, 3)
    torch.manual_seed(0)
    assert_same_state(model, ImmunityMoE("resnet18", 2, 3, image_size=32, stem="imagenet", stage="stem"))
    assert "experts.stem.0.weight" in ImmunityMoE("resnet18", 2, 3, image_size=72, stem="cifar").state_dict()
