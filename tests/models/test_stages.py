"""Which stage is looked at where nobody has named one: the last that exceeds 8×8, and by which the logits change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast.models.maps import find_prefix, grid
from immunity_fast.models.stages import find_stage
from tests.tensors import assert_same_state
from tests.transformers_of import ViT


class Foreign(nn.Module):
    """A network whose children are neither a chain nor all maps, and one of which runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.late = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.early = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.relu(self.late(self.relu(self.early(x)))).mean((2, 3)))
        return logits


class Wrapped(nn.Module):
    """A network in another, whose one child returns no map."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.blocks = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.backbone.forward = self._features  # type: ignore[method-assign]
        self.fc = nn.Linear(3, 4)

    def _features(self, images: Tensor) -> Tensor:
        for block in self.backbone.blocks:
            images = torch.tanh(block(images))
        return images.mean((-2, -1))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.fc(self.backbone(images))
        return out


def test_stages_are_the_children_in_the_order_in_which_they_end() -> None:
    assert find_stage(Foreign(), torch.rand(2, 3, 32, 32)) == "late"
    assert find_stage(Foreign(), torch.rand(2, 3, 16, 16)) == "early"
    with pytest.raises(ValueError, match=r"stage: .*8×8 for images of 8×8, got none \(early 8×8, late 4×4\)"):
        find_stage(Foreign(), torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match="no child returns one"):
        find_stage(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), torch.rand(2, 3, 32, 32))


def test_looking_leaves_the_network_as_it_is() -> None:
    network = ViT(prefix=1).train()
    network.blocks[0].eval()
    before = copy.deepcopy(network)
    state = torch.get_rng_state()
    assert find_stage(network, torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))) == "blocks.1"
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_state(network, before)
    assert [module.training for module in network.modules()] == [module.training for module in before.modules()]
    assert not any(module._forward_hooks for module in network.modules())


def test_members_of_a_list_inside_of_a_child_are_stages() -> None:
    assert find_stage(Wrapped(), torch.rand(2, 3, 12, 12)) == "backbone.blocks.2"


@pytest.mark.parametrize(("pool", "stage"), [("class", "blocks.1"), ("mean", "blocks.2")])
def test_tokens_that_change_no_logit_are_passed_over(pool: str, stage: str) -> None:
    """A ViT that classifies by its class token does not look at the patches which leave its last block."""
    assert find_stage(ViT(prefix=1, pool=pool), torch.rand(2, 3, 40, 40)) == stage


def test_a_head_that_is_still_zero_does_not_matter() -> None:
    network = ViT(prefix=1)
    nn.init.zeros_(network.head.weight)
    assert find_stage(network, torch.rand(2, 3, 40, 40)) == "blocks.1"


def test_too_small_a_grid_of_tokens_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"stage: expected a map above 8×8 for images of 32×32, got none .*blocks\.2 8×8"
    ):
        find_stage(ViT(prefix=1, side=32), torch.rand(2, 3, 32, 32))


def test_of_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    images = torch.rand(2, 3, 64, 64)
    small: Any = {"num_classes": 4}
    assert find_stage(models.resnet18(**small), torch.rand(2, 3, 160, 160)) == "layer3"
    assert find_stage(models.mobilenet_v3_small(**small), torch.rand(2, 3, 160, 160)) == "features.8"
    vit = models.VisionTransformer(40, 4, 4, 2, 8, 16, num_classes=4)
    assert find_stage(vit, torch.rand(2, 3, 40, 40)) == "encoder.layers.encoder_layer_2"
    swin = models.SwinTransformer([2, 2], 8, [1, 1, 1], [1, 1, 2], [4, 4], num_classes=4)
    assert find_stage(swin, images) == "features.3"


def test_of_timm() -> None:
    timm = pytest.importorskip("timm")
    options = {"num_classes": 4, "img_size": 40, "patch_size": 4, "embed_dim": 8, "depth": 3, "num_heads": 2}
    images = torch.rand(2, 3, 40, 40)
    assert find_stage(timm.create_model("vit_tiny_patch16_224", **options), images) == "blocks.1"
    assert find_stage(timm.create_model("vit_tiny_patch16_224", **options, global_pool="avg"), images) == "norm"
    assert find_stage(timm.create_model("deit_tiny_distilled_patch16_224", **options), images) == "blocks.1"
    convnext = timm.create_model("convnext_atto", num_classes=4, depths=(1, 1, 1, 1), dims=(4, 4, 8, 8))
    assert find_stage(convnext, torch.rand(2, 3, 96, 96)) == "stages.1"


@pytest.mark.parametrize(
    ("cells", "sides", "expected"),
    [
        (196, (224, 224), (14, 14)),
        (6, (30, 50), (2, 3)),
        (50, (64, 32), (10, 5)),
        (3, (30, 50), (1, 3)),
        (197, (224, 224), None),
        (0, (224, 224), None),
    ],
)
def test_a_grid_has_about_the_images_aspect(
    cells: int, sides: tuple[int, int], expected: tuple[int, int] | None
) -> None:
    assert grid(cells, sides) == expected


@pytest.mark.parametrize(
    ("tokens", "sides", "grids", "expected"),
    [
        (196, (224, 224), [], 0),
        (197, (224, 224), [], 1),  # class token
        (198, (224, 224), [], 2),  # and a distilled one
        (201, (224, 224), [], 5),  # and four registers
        (51, (80, 160), [], 1),  # 5×10
        (9, (32, 32), [(2, 2)], 5),  # a grid of 3×3 it is not: the patches were 2×2
        (9, (32, 32), [], 0),
        (50, (224, 224), [(14, 14)], 1),  # patches merged
        (21, (30, 70), [(4, 5)], 1),  # 20 of an aspect that the images have only about
        (7, (224, 224), [], 3),
        (2, (224, 224), [(16, 16)], 1),
        (7, (70, 80), [], None),
    ],
)
def test_tokens_before_those_of_the_image_are_counted(
    tokens: int, sides: tuple[int, int], grids: list[tuple[int, int]], expected: int | None
) -> None:
    assert find_prefix(tokens, sides, grids) == expected
