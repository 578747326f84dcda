"""Networks as chains of named stages, so that Grad-CAM's activations can be taken between any two of them."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn


class StagedNetwork(nn.Sequential):
    """A chain of named stages followed by a child called ``classifier``.

    Built from an ``OrderedDict`` of children whose last key is ``"classifier"``. Maps images (B, 3, H, W) to logits
    (B, K); every stage's output is a map (B, C, h, w).
    """

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names of the stages, first to last: every child but the classifier."""
        return tuple(self._modules)[:-1]

    def split(self, stage: str) -> tuple[nn.Sequential, nn.Sequential]:
        """The network cut after ``stage``; see :func:`split`."""
        return split(self, stage)


def split(network: nn.Sequential, stage: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Cuts a chain after one of its stages (any child but the last).

    Returns ``(trunk, head)``: trunk maps images (B, 3, H, W) to that stage's activations (B, C, h, w), head maps these
    to logits (B, K). Both share the network's modules and keep their names, so the parameter names of the two together
    are those of the network.

    Raises ``ValueError`` if ``network`` has no such stage.
    """
    # Not named_children(): it drops the second use of a module that stands in the chain twice, such as a shared ReLU.
    children = list(network._modules.items())
    stages = [name for name, _ in children[:-1]]
    if stage not in stages:
        raise ValueError(f"stage: got {stage!r}, expected one of {', '.join(stages)}")
    cut = stages.index(stage) + 1
    trunk, head = nn.Sequential(OrderedDict(children[:cut])), nn.Sequential(OrderedDict(children[cut:]))
    # Only the two containers' own flags: train() would also change children that were given a mode of their own.
    trunk.training = head.training = network.training
    return trunk, head


def default_stage(network: nn.Module, image_size: int | tuple[int, int]) -> str:
    """The last stage whose map exceeds 8×8 on both sides: the Grad-CAM layer of arXiv 2402.18787.

    ``image_size`` is the side of square images in pixels, or (H, W). Any module on images (B, 3, H, W) will do: its
    stages are the direct children that run once in a forward pass and return a map (B, C, h, w), in the order in which
    they run. The network is left as it is: a copy without data is run, in eval mode.

    Raises ``ValueError`` if no stage's map is that large.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    # float32 whatever the network's dtype: sizes do not depend on it, and the input has to match.
    probe = copy.deepcopy(network).to("meta", torch.float32).eval()
    outputs: list[tuple[str, object]] = []
    for name, child in probe.named_children():
        child.register_forward_hook(lambda _module, _inputs, output, name=name: outputs.append((name, output)))
    with torch.no_grad():
        probe(torch.empty(1, 3, height, width, device="meta"))

    ran = [name for name, _ in outputs]
    # A child that runs twice, such as a shared ReLU, has no one map to take.
    sizes = {
        name: (output.shape[2], output.shape[3])
        for name, output in outputs
        if isinstance(output, Tensor) and output.dim() == 4 and ran.count(name) == 1
    }
    for name, size in reversed(sizes.items()):
        if min(size) > 8:
            return name
    found = ", ".join(f"{name} {h}×{w}" for name, (h, w) in sizes.items()) or "no child returns one"
    raise ValueError(f"no stage's map exceeds 8×8 for images of {height}×{width} ({found}): name a stage")


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
    """Draws every convolution's weights as He et al. do (arXiv 1502.01852, by fan-out), biases 0; returns the network.

    Batch normalisation starts at weight 1 and bias 0, which is PyTorch's default.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
