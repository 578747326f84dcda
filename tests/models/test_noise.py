"""Noise before convolutions: what is drawn and where, and that a model says of itself that it has some."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import ImmunityMoE, experts, export
from immunity_fast.models.moe import SingleNetwork
from immunity_fast.models.noise import MeanOfPasses, NoisyConv2d, add_noise_, has_noise
from immunity_fast.second_derivatives import SecondDerivatives

IMAGES = torch.rand(3, 3, 13, 11, generator=torch.Generator().manual_seed(0))
NOISE = (0.4, 0.1)


def _model(**options: Any) -> SingleNetwork:
    torch.manual_seed(0)
    return SingleNetwork("resnet8x0.25", 4, image_size=(13, 11), noise=NOISE, **options)


def _mixture(**options: Any) -> ImmunityMoE:
    torch.manual_seed(0)
    return ImmunityMoE("resnet8x0.25", 2, 4, image_size=(13, 11), noise=NOISE, switch="mean", **options)


def _seeded(function: Any, *arguments: Any) -> Any:
    torch.manual_seed(5)
    return function(*arguments)


def test_a_layer_convolves_its_input_plus_noise() -> None:
    """Against the definition, in float64, with stride, padding, groups and bias."""
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2).double()
    weight, bias, maps = layer.weight, layer.bias, torch.rand(2, 4, 7, 9, dtype=torch.float64)
    add_noise_(layer, 0.7, 0.1)
    torch.manual_seed(5)
    drawn = 0.7 * torch.randn(2, 4, 7, 9, dtype=torch.float64)
    expected = F.conv2d(maps + drawn, weight, bias, 2, 1, 1, 2)
    torch.testing.assert_close(_seeded(layer, maps), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_the_first_convolution_has_noise_of_its_own(training: bool) -> None:
    network = experts.create("resnet8x0.5", 4).train(training)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    seen: list[Tensor] = []

    def identity(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        seen.append(x)
        return x.new_zeros(len(x), len(weight), *x.shape[2:])

    add_noise_(network, 0.4, 0.1)
    images = torch.rand(8, 3, 32, 32)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for layer in convolutions:
            patch.setattr(layer, "_conv_forward", identity)
            layer(zeros := torch.zeros(8, layer.in_channels, 32, 32))
            assert not zeros.any(), "the input stays as it is"
        network.get_submodule("stem")(images)
    deviations = [each.std().item() for each in seen]
    assert deviations[:-1] == pytest.approx([0.4] + [0.1] * (len(convolutions) - 1), rel=0.05)
    assert all(abs(each.mean().item()) < 0.02 for each in seen[:-1])
    assert (seen[-1] - images).std().item() == pytest.approx(0.4, rel=0.05)


def test_each_pass_is_another_and_a_seed_repeats_it() -> None:
    model = _model().eval()
    assert not torch.equal(model(IMAGES), model(IMAGES))
    assert torch.equal(_seeded(model, IMAGES), _seeded(model, IMAGES))
    assert torch.equal(_seeded(copy.deepcopy(model), IMAGES), _seeded(model, IMAGES))


def test_without_noise_the_network_is_the_plain_one() -> None:
    torch.manual_seed(0)
    silent = SingleNetwork("resnet8x0.25", 4, image_size=(13, 11), noise=(0, 0)).eval()
    torch.manual_seed(0)
    plain = SingleNetwork("resnet8x0.25", 4, image_size=(13, 11)).eval()
    torch.testing.assert_close(silent(IMAGES), plain(IMAGES))
    assert silent.state_dict().keys() == plain.state_dict().keys()
    assert not has_noise(silent)


def test_making_it_draws_what_making_the_plain_one_draws() -> None:
    torch.manual_seed(0)
    SingleNetwork("resnet8x0.25", 4, image_size=16)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    SingleNetwork("resnet8x0.25", 4, image_size=16, noise=NOISE)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_experts_of_a_stack_draw_noise_of_their_own(batching: Any) -> None:
    model = _mixture(batching=batching).eval()
    with torch.no_grad():
        for tensor in model.experts.state_dict().values():
            tensor.copy_(tensor[:1].expand_as(tensor))  # one network twice
        logits = model.expert_logits(IMAGES)
    assert not torch.allclose(logits[0], logits[1], rtol=1e-3)


@pytest.mark.parametrize("arch", ["resnet8x0.25", "resnet8x0.25,resnet8x0.5"])
def test_every_expert_s_first_convolution_is_the_first(arch: str) -> None:
    for network in ImmunityMoE(arch, 2, 3, image_size=16, noise=NOISE).unstack():
        levels = [layer.noise for layer in network.modules() if isinstance(layer, NoisyConv2d)]
        assert levels == [0.4] + [0.1] * 8


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_gradients_are_those_of_the_drawn_noise(memory_format: Any) -> None:
    """Eager and recomputed passes are one function of the weights once the noise is seeded."""
    model = _model().double().train()
    model.memory_format = memory_format
    found = []
    for recomputed in (False, True):
        model.checkpoint_activations = recomputed
        loss = _seeded(model, IMAGES.double())[:, 0].sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_second_derivatives_are_of_the_noisy_input() -> None:
    layer = nn.Conv2d(2, 3, 3).double()
    add_noise_(layer, 0.5, 0.0)
    maps = torch.rand(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)

    def slopes(mode: Any) -> Tensor:
        output = _seeded(layer, maps).pow(3).sum()
        with mode.input_gradient() if mode else torch.enable_grad():
            (gradient,) = torch.autograd.grad(output, maps, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), layer.weight)[0]

    with SecondDerivatives(maps) as second:
        found = slopes(second)
    torch.testing.assert_close(found, slopes(None), rtol=1e-10, atol=1e-12)


def test_a_compiled_pass_is_compiled_once() -> None:
    model = _model().eval()
    graphs: list[object] = []

    def backend(module: Any, _inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model.expert_logits, backend=backend, fullgraph=True)
        outputs = [compiled(IMAGES) for _ in range(3)]
    assert len(graphs) == 1
    assert not torch.equal(outputs[0], outputs[1])


def test_a_folder_keeps_the_noise(tmp_path: Path) -> None:
    model = _model().eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["noise"] == list(NOISE)
    assert "standard deviation 0.4 before the first" in (tmp_path / "README.md").read_text(encoding="utf-8")
    read = SingleNetwork.from_pretrained(tmp_path)
    assert read.noise == NOISE
    assert torch.equal(_seeded(read, IMAGES), _seeded(model, IMAGES))
    own = SingleNetwork.from_pretrained(tmp_path, experts=[experts.create("resnet8x0.25", 4)])
    assert torch.equal(_seeded(own, IMAGES), _seeded(model, IMAGES))


@pytest.mark.parametrize("noise", [0.2, [0.2], [0.2, -0.1], [0.2, "x"], [True, 0.1], None])
def test_a_folder_of_wrong_noise_is_refused(noise: Any, tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"noise": noise}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: noise: expected two standard deviations, got "):
        SingleNetwork.from_pretrained(tmp_path)


def test_a_plain_model_says_nothing_of_noise(tmp_path: Path) -> None:
    SingleNetwork("resnet8x0.25", 4, image_size=16).save_pretrained(tmp_path)
    assert "noise" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert SingleNetwork.from_pretrained(tmp_path).noise is None


def test_what_is_the_same_every_time_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model: expected one without noise, which no fixed graph draws anew"):
        _model().for_inference()
    with pytest.raises(ValueError, match=r"^model: expected one without noise"):
        export(_model(), tmp_path / "m.pt2", format="torch.export")
    assert not list(tmp_path.iterdir())


def test_networks_of_the_user_s_get_noise_once_looked_at() -> None:
    network = experts.create("resnet8x0.25", 4)
    model = SingleNetwork.from_experts([network], image_size=16, noise=NOISE).eval()
    assert model.noise == NOISE
    assert has_noise(model)
    assert not has_noise(network), "it was copied"
    heatmaps, state = model.heatmaps(torch.rand(2, 3, 16, 16)), torch.get_rng_state()
    model.heatmaps(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert heatmaps.shape == (1, 2, 16, 16)


class _Own(nn.Conv2d):
    """What may do anything."""


@pytest.mark.parametrize(
    ("network", "levels", "message"),
    [
        (nn.Linear(2, 2), (0.1, 0.1), "networks with 2-D convolutions, got a Linear without"),
        (_Own(3, 2, 1), (0.1, 0.1), "networks of PyTorch's own convolutions, got a _Own"),
        (nn.Conv2d(3, 2, 1), (-0.1, 0.1), "two finite standard deviations of at least 0"),
        (nn.Conv2d(3, 2, 1), (0.1, float("inf")), "two finite standard deviations of at least 0"),
        (nn.Conv2d(3, 2, 1), (0.1, float("nan")), "two finite standard deviations of at least 0"),
    ],
)
def test_what_cannot_have_noise_is_a_line(network: nn.Module, levels: tuple[float, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^noise: expected {message}"):
        add_noise_(network, *levels)
    assert not has_noise(network)


@pytest.mark.parametrize("noise", [0.2, (0.1,), (0.1, 0.1, 0.1), ("a", "b"), (True, 0.1)])
def test_a_model_takes_two_deviations(noise: Any) -> None:
    with pytest.raises(ValueError, match=r"^noise: expected two finite standard deviations"):
        SingleNetwork("resnet8x0.25", 3, image_size=16, noise=noise)


def test_the_mean_of_passes_is_that_of_their_probabilities() -> None:
    model = _model().double().eval()
    mean = MeanOfPasses(model, 4)
    found = _seeded(mean, IMAGES.double())
    torch.manual_seed(5)
    expected = sum(model(IMAGES.double()).exp() for _ in range(4)) / 4
    torch.testing.assert_close(found.exp(), expected, rtol=1e-10, atol=1e-12)


def test_several_answers_share_three_times_the_passes_of_one() -> None:
    """The first is of the first passes, each of as many different ones; of each draw of all, none has another's."""
    calls = list[int]()

    class Counting(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            calls.append(len(calls))
            return F.one_hot(torch.full((len(images),), calls[-1]), 6).double() * 1e3

    found = MeanOfPasses(Counting(), 2).several(IMAGES, 10, torch.Generator().manual_seed(1)).exp()
    assert len(calls) == 6
    assert found.shape == (10, 3, 6)
    used = found[:, 0] > 0.25
    assert torch.equal(used.sum(1), torch.full((10,), 2))
    assert used[0].tolist() == [True, True] + 4 * [False]
    for start in (0, 3, 6):
        assert bool(used[start : start + 3].any(0).all())
    calls.clear()
    assert MeanOfPasses(Counting(), 2).several(IMAGES, 1).shape == (1, 3, 6)
    assert len(calls) == 2


def test_each_of_several_answers_is_as_random_as_one() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    mean = MeanOfPasses(add_noise_(network, 2.0, 0.0), 3)
    with torch.no_grad():
        one = torch.stack([mean(IMAGES) for _ in range(300)]).exp()
        several = torch.stack([mean.several(IMAGES, 10)[9] for _ in range(300)]).exp()
    torch.testing.assert_close(several.mean(0), one.mean(0), rtol=0, atol=5e-3)
    assert several.std(0).mean().item() == pytest.approx(one.std(0).mean().item(), rel=0.15)


def test_noise_of_channels_last_maps_is_drawn_as_they_lie() -> None:
    layer = add_noise_(nn.Conv2d(4, 2, 1, bias=False), 0.7, 0.1)
    maps = torch.rand(2, 4, 7, 9).contiguous(memory_format=torch.channels_last)
    found = _seeded(layer, maps)
    torch.manual_seed(5)
    drawn = torch.randn(2, 7, 9, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, F.conv2d(maps + 0.7 * drawn, layer.weight))


@pytest.mark.parametrize("passes", [0, -1, 1.5])
def test_passes_are_counted(passes: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^passes: expected "):
        MeanOfPasses(_model(), passes)


def test_more_passes_are_nearer_to_their_mean() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    add_noise_(network, 2.0, 0.0)
    with torch.no_grad():
        spread = [torch.stack([_passes(network, passes) for _ in range(200)]).std(0).mean().item() for passes in (1, 9)]
    assert spread[1] == pytest.approx(spread[0] / 3, rel=0.25)


def _passes(network: nn.Module, passes: int) -> Tensor:
    answer: Tensor = MeanOfPasses(network, passes)(IMAGES).exp()
    return answer
