"""Networks as chains of named stages, so that Grad-CAM's activations can be taken between any two of them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from immunity_fast.arguments import Layout


class StagedNetwork(nn.Sequential):
    """A chain of named stages followed by a child called `classifier`.

    Built from an `OrderedDict` of children whose last key is `"classifier"`. Maps images (B, 3, H, W) to logits
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
        network: images (B, 3, H, W) to logits (B, K).
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


def default_stage(
    network: nn.Module,
    image_size: int | tuple[int, int],
    *,
    layout: Layout | None = "NCHW",
    like: Tensor | None = None,
) -> str:
    """The last stage whose map exceeds 8×8 on both sides: the Grad-CAM layer of arXiv 2402.18787.

    Any module on images (B, C, H, W) will do: its stages are the children that run once in a forward pass and return a
    map, in the order in which they run. Of a list of modules these are its members; and, unless the network itself is
    an `nn.Sequential`, of a plain `nn.Sequential` that most of its modules are in, such as torchvision's `features` and
    timm's `blocks`, likewise its own.

    Args:
        network: is left as it is: a copy is run, in eval mode.
        image_size: the side of square images in pixels, or (H, W).
        layout: of the maps, "NCHW" for (B, C, h, w) or "NHWC"; None finds out of each.
        like: a tensor (B, C, …) of the images' channels, dtype and device; without it they are three, and the
            network's.

    Raises:
        ValueError: no stage's map is that large.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if like is None:
        like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0)).new_empty(1, 3)
    probe = copied(network).eval()
    stages = _stages(probe)
    ran = _shapes_of(probe, stages, like.new_zeros(1, like.shape[1], height, width), whole=True)
    wider, taller = {}, {}
    if layout is None:
        wider = _shapes_of(probe, stages, like.new_zeros(1, like.shape[1], height, 2 * width))
        taller = _shapes_of(probe, stages, like.new_zeros(1, like.shape[1], 2 * height, width))
    sizes = {}
    for name, shape in ran.items():
        found = layout or map_layout(shape, wider.get(name), taller.get(name), square=height == width)
        if shape is not None and len(shape) == 4:
            sizes[name] = shape[1:3] if found == "NHWC" else shape[2:]
    for name, size in reversed(sizes.items()):
        if min(size) > 8:
            return name
    found_text = ", ".join(f"{name} {h}×{w}" for name, (h, w) in sizes.items()) or "no child returns one"
    raise ValueError(
        f"stage: expected a map above 8×8 for images of {height}×{width}, got none ({found_text}); name a stage"
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


def map_layout(
    shape: tuple[int, ...] | None,
    wider: tuple[int, ...] | None,
    taller: tuple[int, ...] | None,
    *,
    square: bool,
) -> Layout | None:
    """Which axes of a map are space, from its shapes for some images, wider ones and taller ones.

    Args:
        shape: for some images; None: it is no tensor.
        wider: for wider ones; None: it is unknown.
        taller: for taller ones; None: it is unknown.
        square: whether the first images are as high as wide. Where the others are unknown, or change nothing, two
            sides of the map that are equal while the third axis is not are space.

    Returns:
        None if it is open.
    """
    if shape is None or len(shape) != 4:
        return None
    grown = [
        {axis for axis, (before, after) in enumerate(zip(shape, other, strict=False)) if before != after}
        for other in (taller or shape, wider or shape)
    ]
    if grown == [{2}, {3}]:
        return "NCHW"
    if grown == [{1}, {2}]:
        return "NHWC"
    _, a, b, c = shape
    if grown == [set(), set()] and square and a != c and b in (a, c):
        return "NHWC" if a == b else "NCHW"
    return None


def _stages(network: nn.Module) -> dict[str, nn.Module]:
    """What may be a network's stages, by dotted names."""
    half = len(list(network.modules())) / 2

    def parts(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for key, child in module.named_children():
            name, is_list = f"{prefix}{key}", type(child) in (nn.ModuleList, nn.ModuleDict)
            is_chain = type(child) is nn.Sequential and not isinstance(network, nn.Sequential)
            if is_list or (is_chain and len(list(child.modules())) > half):
                yield from parts(f"{name}.", child)
            if not is_list:
                yield name, child

    return dict(parts("", network))


def _shapes_of(
    network: nn.Module, stages: dict[str, nn.Module], images: Tensor, *, whole: bool = False
) -> dict[str, tuple[int, ...] | None]:
    """Of the stages that run once in a forward pass, in the order of their ends; None for what is no tensor.

    A child that runs twice, such as a shared ReLU, has no one map to take. Unless it is to run as a `whole`, the
    network may fail of the images on the way.
    """
    outputs: list[tuple[str, object]] = []

    def note(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda _module, _inputs, output: outputs.append((name, output))

    hooks = [stage.register_forward_hook(note(name)) for name, stage in stages.items()]
    try:
        with torch.no_grad():
            network(images)
    except Exception:
        if whole:
            raise
    finally:
        for hook in hooks:
            hook.remove()
    ran = [name for name, _ in outputs]
    return {
        name: tuple(output.shape) if isinstance(output, Tensor) else None
        for name, output in outputs
        if ran.count(name) == 1
    }


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
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
