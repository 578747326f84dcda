"""Where Grad-CAM looks in a network by default: the last stage whose map exceeds 8×8, arXiv 2402.18787.

Of a transformer it is the last block by whose tokens the logits change: those of the image's patches that leave the
last block of a ViT that classifies by its class token go nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from immunity_fast.models.looking import check_layout, map_layout
from immunity_fast.models.maps import MapLayout, Reading, Reshape, find_prefix, pick, read
from immunity_fast.models.probe import apart, moved, noise
from immunity_fast.models.stacking import call, own_tensors
from immunity_fast.runtime.outputs import logits_of

LEAST = 8  # pixels that a side of a map exceeds
_Found = dict[str, Tensor | None]  # of modules that ran once, in the order of their ends: their maps


def find_stage(network: nn.Module, images: Tensor, layout: MapLayout | Reshape | None = None) -> str:
    """The dotted name of the last stage whose map exceeds 8×8 on both sides.

    The stages are the children that run once in a forward pass and return a map, or tokens, in the order in which they
    end. Of a list of modules these are its members; and, unless the network itself is an `nn.Sequential`, of a plain
    `nn.Sequential` that most of its modules are in, such as torchvision's `features` and timm's `blocks`, likewise its
    own. Where none of them will do, they are the members of all lists and each
    `nn.Sequential`, wherever these are.

    Args:
        network: is left as it is.
        images: which it accepts.
        layout: of the maps; None finds out of each.

    Raises:
        ValueError: no stage's map is that large, and changes the logits.
    """
    check_layout(layout)
    pools = [_Stages(network, _children(network), images, layout)]
    if name := pools[0].last(searching=True):
        return name
    if not isinstance(network, nn.Sequential) and (members := _members(network)):
        pools.append(_Stages(network, members, images, layout))
    for pool in reversed(pools):
        if name := pool.last():
            return name
    height, width = images.shape[2:]
    sizes = {name: size for pool in pools for name, size in pool.sizes.items()}
    found = ", ".join(f"{name} {h}×{w}" for name, (h, w) in sizes.items()) or "no child returns one"
    change = " that changes the logits" if any(min(size) > LEAST for size in sizes.values()) else ""
    raise ValueError(
        f"stage: expected a map above 8×8{change} for images of {height}×{width}, got none ({found}); name a stage"
    )


class _Stages:
    """What some submodules return in a pass."""

    def __init__(
        self, network: nn.Module, names: list[str], images: Tensor, layout: MapLayout | Reshape | None
    ) -> None:
        self.network, self.images, self.layout = network, images, layout
        height, width = images.shape[2:]
        found, grids = self._run(names, images)
        wider: _Found = {}
        taller: _Found = {}
        if layout is None and any(maps is not None and maps.dim() == 4 for maps in found.values()):
            wider, taller = (
                self._run(names, noise(images.shape[1], *sides).to(images.device, images.dtype), partly=True)[0]
                for sides in ((height, 2 * width), (2 * height, width))
            )
        self.sizes: dict[str, tuple[int, int]] = {}
        self.readings: dict[str, Reading] = {}
        for name, maps in found.items():
            if maps is None:
                continue
            axes = layout or map_layout(
                tuple(maps.shape), _shape(wider.get(name)), _shape(taller.get(name)), square=height == width
            )
            reading = Reading("NCHW" if axes is None else axes)
            if axes == "tokens":
                prefix = find_prefix(maps.shape[1], (height, width), grids) if maps.dim() == 3 else None
                if prefix is None:
                    continue
                reading = Reading("tokens", prefix)
            try:
                cells, _ = read(maps, reading, (height, width))
            except Exception:  # it is no map of such a layout
                continue
            self.sizes[name], self.readings[name] = (cells.shape[2], cells.shape[3]), reading

    def last(self, *, searching: bool = False) -> str | None:
        """The last whose map exceeds 8×8 and, of tokens, changes the logits; None where there is none.

        Args:
            searching: what comes before one that changes nothing will not do: an earlier block may, inside of it.
        """
        for name, size in reversed(self.sizes.items()):
            if min(size) > LEAST:
                if self.readings[name].layout in ("NCHW", "NHWC") or self._changes_logits(name):
                    return name
                if searching:
                    return None
        return None

    def _changes_logits(self, name: str) -> bool:
        """Whether some logit has a derivative by the map: of other weights, since fresh heads are often zero."""
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Any) -> Any:
            found, put_back = pick(output)
            assert found is not None
            maps, onward = read(found, self.readings[name], (self.images.shape[2], self.images.shape[3]))
            kept.append(maps)
            return put_back(onward)

        own = own_tensors(self.network)
        weights = {key for key, value in self.network.named_parameters() if value.is_floating_point()}
        hook = self.network.get_submodule(name).register_forward_hook(keep)
        try:
            with apart(self.network, self.images, backward=True):
                buffers = {key: value.detach().clone() for key, value in self.network.named_buffers()}
                logits = logits_of(call(self.network, moved(own, weights) | buffers, self.images.clone()))
                scale = torch.linspace(1, 2, logits.numel(), device=logits.device, dtype=logits.dtype)
                score = (scale.view_as(logits) * logits).sum()
                slopes = torch.autograd.grad(score, kept, allow_unused=True, materialize_grads=True)
        finally:
            hook.remove()
        return any(bool(slope.any()) for slope in slopes)

    def _run(self, names: list[str], images: Tensor, *, partly: bool = False) -> tuple[_Found, list[tuple[int, int]]]:
        """Maps of what ran once, and the sides of what convolutions gave; `partly`: the network may fail."""
        outputs: list[tuple[str, Any]] = []
        grids: list[tuple[int, int]] = []

        def note(name: str) -> Any:
            return lambda _module, _inputs, output: outputs.append((name, output))

        def measure(_module: nn.Module, _inputs: object, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                grids.append((output.shape[2], output.shape[3]))

        hooks = [self.network.get_submodule(name).register_forward_hook(note(name)) for name in names]
        hooks += [part.register_forward_hook(measure) for part in self.network.modules() if isinstance(part, nn.Conv2d)]
        own = {name: value.detach() for name, value in own_tensors(self.network).items()}
        try:
            with apart(self.network, images):
                buffers = {name: value.clone() for name, value in self.network.named_buffers()}
                call(self.network, own | buffers, images.clone())
        except Exception:
            if not partly:
                raise
        finally:
            for hook in hooks:
                hook.remove()
        ran = [name for name, _ in outputs]
        return {name: pick(output)[0] for name, output in outputs if ran.count(name) == 1}, grids


def _children(network: nn.Module) -> list[str]:
    """Dotted names of what may be a network's stages: its children, and the members of its lists and large chains."""
    half = len(list(network.modules())) / 2

    def parts(prefix: str, module: nn.Module) -> Iterator[str]:
        for key, child in module.named_children():
            name, is_list = f"{prefix}{key}", type(child) in (nn.ModuleList, nn.ModuleDict)
            is_chain = type(child) is nn.Sequential and not isinstance(network, nn.Sequential)
            if is_list or (is_chain and len(list(child.modules())) > half):
                yield from parts(f"{name}.", child)
            if not is_list:
                yield name

    return list(parts("", network))


def _members(network: nn.Module) -> list[str]:
    """Dotted names of the members of lists and chains anywhere in a network, but in other such members."""

    def parts(prefix: str, module: nn.Module) -> Iterator[str]:
        for key, child in module.named_children():
            if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and not isinstance(
                child, (nn.ModuleList, nn.ModuleDict)
            ):
                yield f"{prefix}{key}"
            else:
                yield from parts(f"{prefix}{key}.", child)

    return list(parts("", network))


def _shape(maps: Tensor | None) -> tuple[int, ...] | None:
    return None if maps is None else tuple(maps.shape)
