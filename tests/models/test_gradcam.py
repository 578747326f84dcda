"""`ImmunityMoE.heatmaps`: Grad-CAM of each expert, for any class and mode, and no trace of it in the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import ImmunityMoE
from immunity_fast.functional import WeightScale
from immunity_fast.models.moe import SingleNetwork
from tests import grids
from tests.oracle import assert_matches


def images(count: int = 3, *, side: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(width: int = 4, stride: int = 1) -> nn.Sequential:
    """BatchNorm and dropout, whose modes can be told from what they do."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=stride),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width + 1, 3, padding=1),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * (width + 1), 5),
    )


def mixture(*experts: nn.Module, stage: str = "3") -> ImmunityMoE:
    torch.manual_seed(0)
    networks = experts or (network(), network(), network())
    kind = SingleNetwork if len(networks) == 1 else ImmunityMoE
    model = kind.from_experts([each.double() for each in networks], stage=stage, image_size=(12, 14))
    model.double().train()  # the gate, too
    model(images(8, seed=5))  # statistics that are not the first ones
    return model


def plain_heatmaps(
    model: ImmunityMoE, x: Tensor, classes: Tensor, scale: Callable[[Tensor], float], stage: int = 3
) -> Tensor:
    """The same by plain autograd, expert by expert, on ordinary modules that are cut by hand."""
    found = []
    for expert in model.unstack():
        assert isinstance(expert, nn.Sequential)
        expert.eval()
        maps = expert[: stage + 1](x).detach().requires_grad_()
        score = expert[stage + 1 :](maps)[torch.arange(len(x)), classes].sum()
        (slopes,) = torch.autograd.grad(score, maps)
        weights = scale(maps) * slopes.sum((2, 3), keepdim=True)
        small = F.relu((weights * maps.detach()).sum(1, keepdim=True))
        found.append(F.interpolate(small, size=tuple(x.shape[2:]), mode="bilinear", align_corners=False)[:, 0])
    return torch.stack(found)


SCALES: dict[WeightScale, Callable[[Tensor], float]] = {
    "channels": lambda maps: 1 / maps.shape[1],
    "spatial": lambda maps: 1 / (maps.shape[2] * maps.shape[3]),
}


@pytest.mark.parametrize("weight_scale", ["channels", "spatial"])
@pytest.mark.parametrize("training", [False, True])
def test_it_is_grad_cam_by_plain_autograd(weight_scale: WeightScale, training: bool) -> None:
    model, x = mixture(), images()
    model.train(training)
    classes = torch.tensor([4, 0, 2])
    expected = plain_heatmaps(model, x, classes, SCALES[weight_scale])
    found = model.heatmaps(x, classes, weight_scale=weight_scale)
    assert found.shape == (3, 3, 12, 14)
    assert expected.amax() > 0
    assert_matches(found, expected)


def test_it_is_captums_layer_grad_cam() -> None:
    attr = pytest.importorskip("captum.attr", reason="an independent Grad-CAM")
    model, x = mixture().eval(), images()
    found = model.heatmaps(x, 1, size=(10, 12), weight_scale="spatial")
    for expert, heatmap in zip(model.unstack(), found, strict=True):
        assert isinstance(expert, nn.Sequential)
        theirs = attr.LayerGradCam(expert, expert[3]).attribute(x, target=1, relu_attributions=True)
        assert_matches(heatmap, theirs[:, 0].detach())


def test_of_different_structures_each_has_its_own_maps() -> None:
    model = mixture(network(4), network(6, stride=2))
    x = images()
    found = model.heatmaps(x, torch.tensor([1, 2, 3]))
    assert_matches(found, plain_heatmaps(model, x, torch.tensor([1, 2, 3]), SCALES["channels"]))


def test_a_single_network_has_heatmaps_too() -> None:
    model, x = mixture(network()), images()
    found = model.heatmaps(x, 2)
    assert found.shape == (1, 3, 12, 14)
    assert_matches(found, plain_heatmaps(model, x, torch.full((3,), 2), SCALES["channels"]))


def test_a_network_that_runs_whole_is_asked_as_one_that_is_cut() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.body(x)
            return logits

    torch.manual_seed(0)
    whole = [Whole(), Whole()]
    cut = mixture(*(each.body for each in whole)).eval()
    model = ImmunityMoE.from_experts([each.double() for each in whole], stage="body.3", image_size=(12, 14))
    model.double()
    for expert, own in zip(model.unstack(), cut.unstack(), strict=True):
        assert expert.state_dict().keys() == {f"body.{name}" for name in own.state_dict()}
    model.load_state_dict(
        {k.replace("experts.", "experts.body."): v for k, v in cut.state_dict().items() if k[:8] == "experts."}
        | {k: v for k, v in cut.state_dict().items() if k[:8] != "experts."}
    )
    assert_matches(model.heatmaps(images(), 3), cut.heatmaps(images(), 3))


def test_tokens_are_maps_too() -> None:
    """Patches of 4×4 pixels as (B, T, C), in raster order, behind a token of their own."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.mix, self.fc = nn.Conv2d(3, 6, 4, stride=4), nn.Linear(6, 6), nn.Linear(6, 5)
            self.first = nn.Parameter(torch.randn(1, 1, 6))

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            tokens = self.mix(torch.cat([self.first.expand(len(x), -1, -1), tokens], 1).tanh())
            logits: Tensor = self.fc(tokens.tanh().mean(1))
            return logits

    torch.manual_seed(0)
    model = ImmunityMoE.from_experts([Tokens(), Tokens()], stage="mix", image_size=16, layout="tokens").double()
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    largest = []
    for expert, number in zip(model.unstack(), range(2), strict=True):
        caught: list[Tensor] = []
        expert.get_submodule("mix").register_forward_hook(lambda *call: caught.append(call[2]))  # noqa: B023
        logits = expert(x)
        for target in range(5):
            (slopes,) = torch.autograd.grad(logits[:, target].sum(), caught, retain_graph=True)
            weights = slopes[:, 1:].sum(1, keepdim=True) / 6
            expected = F.relu((weights * caught[0][:, 1:]).sum(-1)).reshape(3, 4, 4).detach()
            assert_matches(model.heatmaps(x, target, size=(4, 4))[number], expected)
            largest.append(float(expected.amax()))
    assert sum(value > 0 for value in largest) > 2


def test_without_a_class_it_is_what_the_exact_mean_predicts() -> None:
    model, x = mixture().eval(), images(6) * torch.linspace(-6, 6, 6, dtype=torch.float64)[:, None, None, None]
    model.gate.switch = "call"
    probabilities = torch.stack([expert(x) for expert in (e.eval() for e in model.unstack())]).softmax(-1).mean(0)
    predicted = probabilities.argmax(-1)
    assert len(predicted.unique()) > 1
    assert torch.equal(model.heatmaps(x), model.heatmaps(x, predicted))
    assert not torch.equal(model.heatmaps(x), model.heatmaps(x, (predicted + 1) % 5))


def test_classes_come_in_several_forms() -> None:
    model, x = mixture(), images()
    expected = model.heatmaps(x, torch.tensor([1, 1, 1]))
    for classes in (1, torch.tensor(1), [1, 1, 1], torch.tensor([1, 1, 1], dtype=torch.uint8)):
        assert torch.equal(model.heatmaps(x, classes), expected)
    np = pytest.importorskip("numpy", reason="arrays of classes")
    for array in (np.array([1, 1, 1]), np.array(1), np.int64(1)):
        assert torch.equal(model.heatmaps(x, array), expected)


@pytest.mark.parametrize(("switch", "training"), grids.every(2, ["call", "sample", "off", "mean"], [False, True]))
def test_it_leaves_everything_as_it_is(training: bool, switch: str) -> None:
    model, x = mixture(), images()
    model.train(training)
    model.experts.get_submodule("1").eval()  # a layer with a mode of its own
    model.gate.switch = switch  # type: ignore[assignment]
    model.gate.generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(model.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    state, drawn = torch.get_rng_state(), model.gate.generator.get_state()
    own = x.clone()
    found = model.heatmaps(x)
    assert not found.requires_grad
    assert not x.requires_grad
    assert torch.equal(x, own)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert needs == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is not None and bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(drawn, model.gate.generator.get_state())
    assert model.gate.switch == switch


def test_frozen_models_and_modes_without_gradients_have_them_too() -> None:
    model, x = mixture().eval(), images()
    expected = model.heatmaps(x, 1)
    with torch.no_grad():
        assert torch.equal(model.heatmaps(x, 1), expected)
    with torch.inference_mode():
        assert torch.equal(model.heatmaps(x.clone(), 1), expected)
    model.requires_grad_(False)
    assert torch.equal(model.heatmaps(x, 1), expected)


def test_normalised_they_have_a_maximum_of_one_or_are_dead() -> None:
    model, x = mixture(), images()
    with torch.no_grad():
        model.experts.get_parameter("7.weight")[1].zero_()  # nothing that expert 1 sees leads to an answer
    raw, scaled = model.heatmaps(x, 0), model.heatmaps(x, 0, normalize=True)
    peaks = raw.amax((-2, -1))
    assert [bool((peak == 0).all()) for peak in peaks] == [False, True, False]
    assert_matches(scaled.amax((-2, -1)), (peaks > 0).double())
    assert_matches(scaled * peaks[..., None, None], raw)


def test_no_images_have_no_heatmaps() -> None:
    assert mixture().eval().heatmaps(images(0), []).shape == (3, 0, 12, 14)


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        (5, ValueError, r"classes: expected labels in \[0, 5\), got 5 to 5"),
        (-1, ValueError, r"classes: expected labels in \[0, 5\), got -1"),
        ([0, 1], ValueError, r"classes: expected shape \(3,\), got \(2,\)"),
        (torch.zeros(3), TypeError, "classes: expected an integer tensor, got torch.float32"),
        ("cat", TypeError, "classes: expected whole numbers, one an image, or one for all, got 'cat'"),
        (1.5, TypeError, "classes: expected whole numbers, one an image, or one for all, got 1.5"),
    ],
)
def test_what_are_no_classes_is_refused(classes: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mixture().heatmaps(images(), classes)  # type: ignore[arg-type]


def test_what_are_no_images_is_refused() -> None:
    with pytest.raises(TypeError, match="images: expected a floating-point tensor"):
        mixture().heatmaps(torch.zeros(1, 3, 12, 14, dtype=torch.uint8))
    np = pytest.importorskip("numpy", reason="arrays of images")
    with pytest.raises(TypeError, match=r"images: expected a floating-point tensor in \[0, 1\], got numpy\.ndarray"):
        mixture().heatmaps(np.zeros((1, 3, 12, 14), np.float32))
    with pytest.raises(ValueError, match="score: expected one of"):
        mixture().heatmaps(images(), score="loss")  # type: ignore[arg-type]
