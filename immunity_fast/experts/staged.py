"""Networks as chains of named stages, so that Grad-CAM's activations can be taken between any two of them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor


class StagedNetwork(nn.Sequential):
    """A chain of named stages followed by a child called `classifier`.

    Built from an `OrderedDict` of children whose last key is `"classifier"`. Maps images (B, C, H, W) to logits
    (B, K); every stage's output is a map (B, C, h, w).
    """

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names of the stages, first to last: every child but the classifier."""
        return tuple(self._modules)[:-1]

    def split(self, stage: str) -> tuple[nn.Sequential, nn.Sequential]:
        """The network cut after `stage`; see `split`."""
        return split(self, stage)


def split(network: nn.Sequential, stage: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Cut a chain after one of its stages.

    Args:
        network: images (B, C, H, W) to logits (B, K).
        stage: the name of any child but the last.

    Returns:
        (trunk, head): trunk maps images to that stage's activations (B, C, h, w), head maps these to logits. Both share
        the network's modules and keep their names, so the parameter names of the two together are those of the network.

    Raises:
        ValueError: `network` has no such stage.
    """
    # Not named_children(): it drops the second use of a module that stands in the chain twice, such as a shared ReLU.
    children = list(network._modules.items())
    stages = [name for name, _ in children[:-1]]
    if stage not in stages:
        raise ValueError(f"stage: expected one of {', '.join(stages)}, got {stage!r}")
    cut = stages.index(stage) + 1
    trunk, head = nn.Sequential(OrderedDict(children[:cut])), nn.Sequential(OrderedDict(children[cut:]))
    # Only the two containers' own flags: train() would also change children that were given a mode of their own.
    trunk.training = head.training = network.training
    return trunk, head


def default_stage(network: nn.Module, image_size: int | tuple[int, int], channels: int = 3) -> str:
    """The last stage whose map exceeds 8×8 on both sides: the Grad-CAM layer of arXiv 2402.18787.

    Args:
        network: a chain of stages, which is left as it is: a copy is run, in eval mode, on images (B, C, H, W).
        image_size: the side of square images in pixels, or (H, W).
        channels: C.

    Raises:
        ValueError: no stage's map is that large.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    chain = copied(network).eval()
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    maps, sizes = like.new_zeros(1, channels, height, width), {}
    with torch.no_grad():
        for name, stage in chain.named_children():
            maps = stage(maps)
            if maps.dim() == 4:
                sizes[name] = (maps.shape[2], maps.shape[3])
    for name, size in reversed(sizes.items()):
        if min(size) > 8:
            return name
    found = ", ".join(f"{name} {h}×{w}" for name, (h, w) in sizes.items())
    raise ValueError(
        f"stage: expected a map above 8×8 for images of {height}×{width}, got none ({found}); name a stage"
    )


def copied(network: nn.Module, memo: dict[int, Any] | None = None, *, used: bool = False) -> nn.Module:
    """A deep copy of a network.

    PyTorch copies no tensor of a graph. A weight that each pass makes anew, of `nn.utils.weight_norm` and its like, is
    copied without its graph.

    Args:
        memo: what takes the place of the old, by the old's identity.
        used: so is copied all that a pass may have left in plain attributes.

    Raises:
        ValueError: something else cannot be copied.
    """
    try:
        left = [
            value
            for part in network.modules()
            for name, value in vars(part).items()
            if isinstance(value, Tensor) and (used or any(own.startswith(f"{name}_") for own in part._parameters))
        ]
        made = [value for value in left if not value.is_leaf or is_functorch_wrapped_tensor(value)]
        return copy.deepcopy(network, {id(value): _without_graph(value) for value in made} | (memo or {}))
    except Exception as error:
        raise ValueError(
            f"experts: expected networks that can be copied, got {type(error).__name__}: {error}"
        ) from error


def _without_graph(value: Tensor) -> Tensor:
    """A copy; of what a `torch.vmap` that has ended left, of all its rows."""
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    return value.detach().clone()


class GlobalAveragePool(nn.Module):
    """Activations (B, C, h, w) to their mean over space, (B, C).

    `nn.AdaptiveAvgPool2d` does the same, but has no batching rule for channels-last maps under `vmap`.
    """

    def forward(self, activations: Tensor) -> Tensor:
        """The mean of each channel."""
        return activations.mean((-2, -1))


def classifier(channels: int, num_classes: int) -> nn.Sequential:
    """Global average pooling and a linear layer: activations (B, C, h, w) of any h and w to logits (B, K)."""
    return nn.Sequential(GlobalAveragePool(), nn.Linear(channels, num_classes))


def initialise(network: StagedNetwork) -> StagedNetwork:
    """Draw every convolution's weights as He et al. do (arXiv 1502.01852, by fan-out), biases 0; returns the network.

    Batch normalisation starts at weight 1 and bias 0, which is PyTorch's default.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            if not module.weight.is_meta:  # where PyTorch would import its compiler for it, which takes seconds
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
