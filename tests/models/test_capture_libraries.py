"""Networks of torchvision, timm and Hugging Face, small ones: their maps, and the loss's gradients by plain hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import ImmunityMoE, capture_activations
from tests.captured import LABELS, assert_gradients, expected_gradients, gradients_of, loss_fn, tokens_to_maps
from tests.tensors import noise

pytestmark = pytest.mark.filterwarnings("ignore:attention behind")
Case = tuple[Callable[[], nn.Module], int, str, Callable[[Tensor], Tensor], tuple[int, ...]]


def _last(maps: Tensor) -> Tensor:
    return maps.permute(0, 3, 1, 2)


def _first(maps: Tensor) -> Tensor:
    return maps


def _torchvision(name: str) -> Case:
    models = pytest.importorskip("torchvision.models", reason="networks of torchvision")

    def resnet() -> nn.Module:
        net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
        net.layer3, net.layer4, net.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 4)  # most of its weights
        return net

    cases: dict[str, Case] = {
        "resnet": (resnet, 40, "layer1", _first, (64, 10, 10)),
        "densenet": (
            lambda: models.DenseNet(4, (1, 1), num_init_features=8, bn_size=2, num_classes=4),
            40,
            "features.denseblock1",
            _first,
            (12, 10, 10),
        ),
        "vit": (
            lambda: models.VisionTransformer(36, 4, 3, 2, 8, 16, num_classes=4),
            36,
            "encoder.layers.encoder_layer_1",
            tokens_to_maps(1, 9, 9),
            (8, 9, 9),
        ),
        "swin": (
            lambda: models.SwinTransformer([2, 2], 8, [1, 1], [1, 2], [3, 3], num_classes=4),
            36,
            "permute",
            _first,
            (16, 9, 9),
        ),
        "convnext": (
            lambda: models.ConvNeXt(
                [models.convnext.CNBlockConfig(6, 8, 1), models.convnext.CNBlockConfig(8, None, 1)], num_classes=4
            ),
            72,
            "features",
            _first,
            (8, 9, 9),
        ),
    }
    return cases[name]


def _timm(name: str) -> Case:
    timm = pytest.importorskip("timm", reason="networks of timm")
    small = {"num_classes": 4, "img_size": 36, "patch_size": 4, "embed_dim": 8, "depth": 3, "num_heads": 2}
    cases: dict[str, Case] = {
        "vit": (
            lambda: timm.create_model("vit_tiny_patch16_224", **small),
            36,
            "blocks.1",
            tokens_to_maps(1, 9, 9),
            (8, 9, 9),
        ),
        "registers": (
            lambda: timm.create_model("vit_tiny_patch16_224", **small, reg_tokens=4),
            36,
            "blocks.1",
            tokens_to_maps(5, 9, 9),
            (8, 9, 9),
        ),
        "mean of tokens": (
            lambda: timm.create_model("vit_tiny_patch16_224", **small, global_pool="avg", class_token=False),
            36,
            "norm",
            tokens_to_maps(0, 9, 9),
            (8, 9, 9),
        ),
        "distilled": (
            lambda: timm.create_model("deit_tiny_distilled_patch16_224", **small),
            36,
            "blocks.1",
            tokens_to_maps(2, 9, 9),
            (8, 9, 9),
        ),
        "swin": (
            lambda: timm.create_model(
                "swin_tiny_patch4_window7_224",
                num_classes=4,
                img_size=72,
                embed_dim=4,
                depths=(1, 1, 1, 1),
                num_heads=(1, 1, 2, 2),
                window_size=3,
            ),
            72,
            "layers.1",
            _last,
            (8, 9, 9),
        ),
        "convnext": (
            lambda: timm.create_model("convnext_atto", num_classes=4, depths=(1, 1, 1, 1), dims=(4, 4, 6, 8)),
            72,
            "stages.1",
            _first,
            (4, 9, 9),
        ),
    }
    return cases[name]


def _transformers(name: str) -> Case:
    hub = pytest.importorskip("transformers", reason="networks of Hugging Face")
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    cases: dict[str, Case] = {
        "vit": (
            lambda: hub.ViTForImageClassification(
                hub.ViTConfig(**sizes, image_size=36, patch_size=4, num_labels=4, attn_implementation="sdpa")
            ),
            36,
            "",
            tokens_to_maps(1, 9, 9),
            (8, 9, 9),
        ),
        "resnet": (
            lambda: hub.ResNetForImageClassification(
                hub.ResNetConfig(embedding_size=4, hidden_sizes=[4, 6, 8, 8], depths=[1, 1, 1, 1], num_labels=4)
            ),
            72,
            "",
            _first,
            (6, 9, 9),
        ),
    }
    return cases[name]


def _by_hooks(layer: str) -> Any:
    """The plain pass of a network, whose output a hook keeps; what is in place behind it gets a copy."""

    def run(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Any) -> Any:
            maps = output[0] if isinstance(output, tuple) else output
            kept.append(maps)
            return (maps.clone(), *output[1:]) if isinstance(output, tuple) else maps.clone()

        hook = network.get_submodule(layer).register_forward_hook(keep)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            output = network(x)
        hook.remove()
        return getattr(output, "logits", output), kept[0]

    return run


@pytest.mark.parametrize(
    ("library", "name"),
    [
        *[(_torchvision, name) for name in ("densenet", "vit", "swin", "convnext")],
        *[(_timm, name) for name in ("vit", "registers", "mean of tokens", "distilled", "swin", "convnext")],
        *[(_transformers, name) for name in ("vit", "resnet")],
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_the_default_layer_and_its_gradients(library: Callable[[str], Case], name: str) -> None:
    make, side, layer, to_maps, shape = library(name)
    torch.manual_seed(0)
    networks = [make().double().eval() for _ in range(2)]
    for network in networks:
        for parameter in network.parameters():  # heads and scales of layers begin at zero
            parameter.data += 0.05 * torch.randn_like(parameter)
    captured = capture_activations(networks)
    x = noise(4, side)
    logits, activations = captured(x)
    assert [tuple(maps.shape) for maps in activations] == [(4, *shape)] * 2
    assert layer in ("", captured.layers[0])
    found = gradients_of(loss_fn()(logits, activations, LABELS), networks)
    assert_gradients(found, expected_gradients(networks, x, _by_hooks(str(captured.layers[0])), to_maps))


def test_a_mixture_of_a_resnet_a_vit_and_a_swin() -> None:
    networks: list[nn.Module] = []
    layers: list[str] = []
    torch.manual_seed(0)
    for name in ("resnet", "vit", "swin"):
        make, _, layer, _, _ = _torchvision(name)
        networks.append(make().double().eval())
        layers.append("features.3" if name == "swin" else layer)
    nn.init.normal_(networks[1].heads.head.weight)  # type: ignore[union-attr,arg-type]
    model = ImmunityMoE.from_experts(networks, stage=layers, image_size=36, switch="off").double()
    assert model.layout == ("NCHW", "tokens", "NHWC")
    x = noise(4, 36)
    logits, activations, gate = model.expert_outputs(x)
    torch.testing.assert_close(logits, torch.stack([network(x) for network in networks]), rtol=1e-10, atol=1e-10)
    assert [tuple(maps.shape[1:]) for maps in activations] == [(64, 9, 9), (8, 9, 9), (16, 9, 9)]
    loss_fn()(logits, activations, LABELS, gate).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model(x).shape == (4, 4)


def test_the_last_block_of_a_vit_is_not_silently_blind() -> None:
    """By the patches of its last block no logit changes: Grad-CAM sees nothing there, in any library."""
    make, side, _, _, _ = _timm("vit")
    logits, activations = capture_activations([make() for _ in range(2)], "blocks.2")(torch.rand(4, 3, side, side))
    assert not torch.autograd.grad(logits[0].sum(), activations[0])[0].any()


def test_stacked_transformers_are_one_mixture() -> None:
    make, side, layer, to_maps, shape = _timm("registers")
    torch.manual_seed(0)
    networks = [make().double().eval() for _ in range(2)]
    model = ImmunityMoE.from_experts(networks, image_size=side, switch="off").double()
    assert (model.stage, model.layout) == (layer, "tokens")
    x = noise(4, side)
    logits, activations, _ = model.expert_outputs(x)
    assert [tuple(maps.shape) for maps in activations] == [(4, *shape)] * 2
    found = torch.autograd.grad(loss_fn()(logits, activations, LABELS), list(model.experts.parameters()))
    expected = expected_gradients(networks, x, _by_hooks(layer), to_maps)
    half = len(expected) // 2
    assert_gradients([gradient[0] for gradient in found], expected[:half])
    assert_gradients([gradient[1] for gradient in found], expected[half:])


def test_a_mixture_of_hugging_faces_networks() -> None:
    """Their objects' logits, in a loop where vmap does not run them."""
    make, side, _, _, shape = _transformers("resnet")
    torch.manual_seed(0)
    networks = [make().double().eval() for _ in range(2)]
    model = ImmunityMoE.from_experts(networks, image_size=side, switch="off").double()
    x = noise(4, side)
    logits, activations, _ = model.expert_outputs(x)
    assert [tuple(maps.shape) for maps in activations] == [(4, *shape)] * 2
    plain: Any = [network(x).logits for network in networks]
    torch.testing.assert_close(logits, torch.stack(plain), rtol=1e-10, atol=1e-10)
    assert model(x).shape == (4, 4)
    assert [tuple(getattr(expert(x), "logits", None).shape) for expert in model.unstack()] == [(4, 4)] * 2  # type: ignore[union-attr]


def test_inception_in_training_mode_has_its_logits_taken() -> None:
    models = pytest.importorskip("torchvision.models", reason="networks of torchvision")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = models.GoogLeNet(num_classes=4, aux_logits=True, init_weights=False).train()
    captured = capture_activations([network], "inception3b")
    logits, activations = captured(torch.rand(2, 3, 96, 96))
    assert (logits[0].shape, activations[0].shape) == ((2, 4), (2, 480, 12, 12))
