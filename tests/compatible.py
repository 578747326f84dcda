"""What works with what: networks, wrappers and attack libraries, and the tables of docs/compatibility.md.

    python -m tests.compatible                          prints the tables
    python -m tests.compatible OUT NETWORK|WRAPPER …    in two processes: the gradients in wrappers of `PROCESSES`

A cell is "works", or why it does not; tests/integrations/ has a test of each.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from immunity_fast import ImmunityMoE
from immunity_fast.experts import create
from tests.captured import LABELS, loss_fn, tokens_to_maps

Turn = Callable[[Tensor], Tensor]
CLASSES = 4


def same(maps: Tensor) -> Tensor:
    """Maps that are (B, C, h, w) already."""
    return maps


def channels_first(maps: Tensor) -> Tensor:
    """(B, h, w, C) to (B, C, h, w)."""
    return maps.permute(0, 3, 1, 2)


# Networks


@dataclass(frozen=True)
class Network:
    """A small network, and what of it Grad-CAM looks at.

    Args:
        make: it, for images of 32×32 pixels and four classes.
        layer: dotted name.
        to_maps: what the layer returns as (B, C, h, w).
        library: that it is of; "" is none but PyTorch.
        channels: of the images.
    """

    make: Callable[[], nn.Module]
    layer: str
    to_maps: Turn = same
    library: str = ""
    channels: int = 3


def _torchvision_resnet() -> nn.Module:
    from torchvision import models

    network: nn.Module = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    return network


def _torchvision_swin() -> nn.Module:
    from torchvision import models

    network: nn.Module = models.SwinTransformer([2, 2], 16, [1, 1], [1, 2], [4, 4], num_classes=CLASSES)
    return network


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(name, num_classes=CLASSES, **options)
    return network


def _hugging_face_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    width = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    network: nn.Module = ViTForImageClassification(ViTConfig(**width, image_size=32, patch_size=4, num_labels=CLASSES))
    return network


def _grey() -> nn.Module:
    trunk = [nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*trunk, nn.Flatten(), nn.Linear(8 * 13 * 13, CLASSES))


_VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
_OURS = Network(partial(create, "resnet8", CLASSES), "layer2")
_TIMM_CNN = Network(partial(_timm, "test_resnet"), "layer1", library="timm")

NETWORKS: dict[str, tuple[Network, Network]] = {
    "ours, ResNet8": (_OURS, _OURS),
    "torchvision, ResNet": (Network(_torchvision_resnet, "layer1", library="torchvision"),) * 2,
    "timm, ResNet": (_TIMM_CNN, _TIMM_CNN),
    "timm, ViT": (Network(partial(_timm, "vit_tiny_patch16_224", **_VIT), "blocks.0", tokens_to_maps(1, 8, 8), "timm"),)
    * 2,
    "torchvision, Swin": (Network(_torchvision_swin, "features.1", channels_first, "torchvision"),) * 2,
    "timm, Swin": (
        Network(partial(_timm, "swin_tiny_patch4_window7_224", **_SWIN), "layers.0", channels_first, "timm"),
    )
    * 2,
    "Hugging Face, ViT": (Network(_hugging_face_vit, "vit.layers.0", tokens_to_maps(1, 8, 8), "transformers"),) * 2,
    "two architectures, of ours and timm": (_OURS, _TIMM_CNN),
    "grey images, a CNN of one's own": (Network(_grey, "3", channels=1),) * 2,
}


def experts(name: str) -> list[nn.Module]:
    """The networks of a row, in float64 and in evaluation mode, with weights of their own."""
    torch.manual_seed(0)
    return [network.make().double().eval() for network in NETWORKS[name]]


def layers(name: str) -> list[str]:
    """Where Grad-CAM looks in each."""
    return [network.layer for network in NETWORKS[name]]


def images(name: str) -> Tensor:
    """Four images in [0, 1], in float64."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, NETWORKS[name][0].channels, 32, 32, generator=generator, dtype=torch.float64)


def mixture(name: str) -> ImmunityMoE:
    """Of the networks of a row, in evaluation mode and, but for the gate's draws, not random."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "attention behind")
        model = ImmunityMoE.from_experts(experts(name), stage=layers(name), image_size=32).double().eval()
    model.gate.switch = "off"
    model.loss_fn = loss_fn()
    return model


def missing(name: str) -> str | None:
    """A library that a row needs and that is not installed."""
    names = [network.library for network in NETWORKS[name] if network.library]
    return next((library for library in names if importlib.util.find_spec(library) is None), None)


# Columns. Of a wrapper or library: what tables call it, and what has to be installed.

WRAPPERS: dict[str, str] = {
    "a plain loop, `capture_activations`": "",
    "`from_experts`": "",
    "`torch.compile`": "",
    "`deepcopy`, pickle": "",
    "`AveragedModel`": "",
    "Lightning": "pytorch_lightning",
    "DDP": "",
    "FSDP2": "",
    "accelerate": "accelerate",
    "`save_pretrained`": "safetensors",
    "`export`, ONNX": "onnxscript",
    "`export`, torch.export": "",
    "`export`, TorchScript": "",
}
ATTACKS: dict[str, str] = {
    "ours": "",
    "torchattacks": "torchattacks",
    "our AutoAttack": "",
    "foolbox": "foolbox",
    "ART": "art",
}
ATTACKED: tuple[str, ...] = (
    "`model.deterministic()`",
    "`model.eval()`, whose gate draws",
    "`torch.compile` of it",
    "a deep copy, a pickled one",
    "`AveragedModel`",
    "DDP",
    "`from_pretrained`",
    "`model.for_inference()`",
    "a file of torch.export",
    "a file of TorchScript",
    "a file of ONNX, in ONNX Runtime",
)
WORKS = "yes"
Cells = Mapping[tuple[str, str], str]  # what does not work, by row and column, and why


# Cells that do not work

NOT_WRAPPED: Cells = {}
NOT_ATTACKED: Cells = {}
NOT_ATTACKED_AS: Cells = {
    **{
        ("DDP", column): "DDP wants one backward pass, of all parameters, after each forward "
        "pass: attack a deep copy of `wrapped.module`"
        for column in ("foolbox", "ART")
    },
    **{
        ("a file of torch.export", column): "its module has no `train()` and no `eval()`, which the library calls: "
        "attack `model.for_inference()`"
        for column in ("torchattacks", "ART")
    },
    **{("a file of ONNX, in ONNX Runtime", column): "ONNX Runtime gives no gradients" for column in ATTACKS},
}


def table(corner: str, rows: Sequence[str], columns: Sequence[str], refused: Cells) -> str:
    """Markdown: what works, and numbers of the notes below where it does not."""
    reasons = list(dict.fromkeys(refused.values()))

    def cell(row: str, column: str) -> str:
        why = refused.get((row, column))
        return WORKS if why is None else f"no ({reasons.index(why) + 1})"

    lines = [[corner, *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(cell(row, column) for column in columns)] for row in rows]
    notes = [f"{number}. {why}." for number, why in enumerate(reasons, 1)]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + (["", *notes] if notes else []))


def tables() -> list[str]:
    """Those of docs/compatibility.md, in their order."""
    return [
        table("network", list(NETWORKS), list(WRAPPERS), NOT_WRAPPED),
        table("network", list(NETWORKS), list(ATTACKS), NOT_ATTACKED),
        table("what is attacked", ATTACKED, list(ATTACKS), NOT_ATTACKED_AS),
    ]


# What `make test` tests of columns whose cells take seconds each; the others are `make test-exhaustive`'s

GREY = "grey images, a CNN of one's own"
TWO = "two architectures, of ours and timm"
SAMPLE: dict[str, tuple[str, ...]] = {
    "a plain loop, `capture_activations`": ("ours, ResNet8", "torchvision, Swin", "Hugging Face, ViT", TWO, GREY),
    "`torch.compile`": ("timm, ViT",),
    "`deepcopy`, pickle": ("ours, ResNet8", TWO),
    "`AveragedModel`": ("ours, ResNet8", TWO),
    "Lightning": (TWO,),
    "DDP": ("ours, ResNet8",),
    "FSDP2": ("ours, ResNet8",),
    "accelerate": ("ours, ResNet8",),
    "`save_pretrained`": ("ours, ResNet8", TWO),
    "`export`, ONNX": (GREY,),
    "`export`, torch.export": ("ours, ResNet8",),
    "`export`, TorchScript": ("ours, ResNet8", TWO),
    "our AutoAttack": (GREY, "`model.deterministic()`"),
}
OF_OTHERS = ("ours, ResNet8", "timm, ViT", TWO, GREY)  # networks that libraries attack besides ours


def is_left_out(row: str, column: str) -> bool:
    """Whether a cell is `make test-exhaustive`'s."""
    if column in SAMPLE:
        return row not in SAMPLE[column]
    of_others = column in ATTACKS and column != "ours" and row in NETWORKS and row not in OF_OTHERS
    return of_others or row == "`torch.compile` of it"


# In two processes

PROCESSES: dict[str, str] = {name: WRAPPERS[name] for name in ("DDP", "FSDP2", "accelerate")}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole ones, of whatever a wrapper makes of parameters, by the names that they have in the mixture."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def wrapped(wrapper: str, model: ImmunityMoE) -> tuple[nn.Module, Callable[[Tensor], None]]:
    """A mixture in one of `PROCESSES`, and its backward pass."""
    if wrapper == "DDP":
        return nn.parallel.DistributedDataParallel(model), lambda loss: loss.backward()
    if wrapper == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        return prepared, accelerator.backward
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return model, lambda loss: loss.backward()


def trained_in(wrapper: str, name: str) -> dict[str, Any]:
    """A row's loss and gradients of this process' half of the images."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = slice(rank * 4 // count, (rank + 1) * 4 // count)
    model, backward = wrapped(wrapper, mixture(name))
    loss = model(images(name)[own], LABELS[own])
    backward(loss)
    return {"loss": loss.detach(), "gradients": gradients(model)}


def main(out: str, *cells: str) -> None:
    """See the top."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        name, wrapper = cell.split("|")
        try:
            found[cell] = trained_in(wrapper, name)
        except Exception as error:  # of one, to be told apart from the others
            found[cell] = {"error": f"{type(error).__name__}: {error}"}
    torch.save(found, f"{out}-{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print("\n\n".join(tables()))
    else:
        main(*sys.argv[1:])
