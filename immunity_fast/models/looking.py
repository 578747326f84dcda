"""What a look at a network's layer tells: whether it returns one map in a pass, how that is read, what follows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor, nn

from immunity_fast.models.attention import MathAttention
from immunity_fast.models.maps import MapLayout, Reading, Reshape, find_prefix, read
from immunity_fast.models.probe import noise, run_pass
from immunity_fast.models.stacking import own_tensors
from immunity_fast.runtime.checks import check_choice
from immunity_fast.runtime.outputs import kind_of


def look(
    network: nn.Module,
    layer: str,
    images: Tensor,
    layout: MapLayout | Reshape | None = None,
    *,
    name: str = "stage",
    calls: int | None = 1,
    modes: Sequence[str] = ("evaluation",),
) -> Reading:
    """How a layer's output is to be read, from passes on images, which leave the network as it is.

    Args:
        network: from images (B, C, H, W) to logits.
        layer: the dotted name of a submodule.
        images: which the network accepts.
        layout: see `Reading`; None finds out.
        name: of the argument that says which layer, for messages.
        calls: how often the layer runs in a pass; None is any number.
        modes: in which operations in place are looked for; in training mode a pass may fail.

    Raises:
        ValueError: the layer runs another number of times, or returns no map, or one whose axes cannot be told.
    """
    argument = "reshape" if name == "layer" else "layout"  # what it is called where the layer is
    check_layout(layout, argument)
    mode = MathAttention()
    watched = network.get_submodule(layer).register_forward_hook(lambda *_: mode.begin())
    try:
        with mode, _grids(network) as grids:
            found = run_pass(network, own_tensors(network), images, layer)
    finally:
        watched.remove()
    ran = len(found.maps)
    if ran == 0 or (calls is not None and ran != calls):
        hint = f"; call={ran - 1} takes the last" if name == "layer" and ran > 1 else ""
        raise ValueError(f"{name}: expected {layer!r} to run once in a forward pass, got {ran} times{hint}")
    maps = found.maps[0]
    reading = Reading("NCHW" if layout is None else layout, 0, found.overwritten, mode.seen)
    reading = _with_layout(network, layer, images, maps, reading, layout, grids, name, argument)
    for other in modes:
        if other != "evaluation" and not reading.overwritten:
            try:
                overwritten = run_pass(network, own_tensors(network), images, layer, other).overwritten
            except Exception:  # as of normalisation over one value; nobody may ever train it
                continue
            reading = replace(reading, overwritten=overwritten)
    return reading


def check_layout(layout: MapLayout | Reshape | None, name: str = "layout") -> None:
    """Check that it is one of the names, a function, or None.

    Raises:
        ValueError: another name.
    """
    if layout is not None and not callable(layout):
        check_choice(name, layout, MapLayout)


def map_layout(
    shape: tuple[int, ...] | None,
    wider: tuple[int, ...] | None,
    taller: tuple[int, ...] | None,
    *,
    square: bool,
) -> MapLayout | None:
    """Which axes of a map are space, from its shapes for some images, wider ones and taller ones.

    Args:
        shape: for some images; None: it is no tensor.
        wider: for wider ones; None: it is unknown.
        taller: for taller ones; None: it is unknown.
        square: whether the first images are as high as wide. Where the others are unknown, or change nothing, two
            sides of the map that are equal while the third axis is not are space.

    Returns:
        None if it is open. Three axes are a transformer's tokens.
    """
    if shape is None or len(shape) not in (3, 4):
        return None
    grown = [
        {axis for axis, (before, after) in enumerate(zip(shape, other, strict=False)) if before != after}
        for other in (taller or shape, wider or shape)
    ]
    if len(shape) == 3:
        return None if {2} in grown else "tokens"  # (B, C, T) is not what transformers have
    if grown == [{2}, {3}]:
        return "NCHW"
    if grown == [{1}, {2}]:
        return "NHWC"
    _, a, b, c = shape
    if grown == [set(), set()] and square and a != c and b in (a, c):
        return "NHWC" if a == b else "NCHW"
    return None


def _with_layout(
    network: nn.Module,
    layer: str,
    images: Tensor,
    maps: object,
    reading: Reading,
    layout: MapLayout | Reshape | None,
    grids: Sequence[tuple[int, int]],
    name: str,
    argument: str,
) -> Reading:
    """The reading with the layout that was asked for, or found, once it fits the layer's output."""
    height, width = images.shape[2:]
    of_any_axes = layout is not None and layout not in get_args(MapLayout)
    if not isinstance(maps, Tensor) or (not of_any_axes and (maps.dim() not in (3, 4) or len(maps) != len(images))):
        raise ValueError(
            f"{name}: expected a map (B, C, h, w) or (B, h, w, C), or tokens (B, T, C), of {layer!r}, got "
            f"{kind_of(maps)}"
        )
    if layout is None:
        shapes = shapes_at(network, layer, images)
        layout = map_layout(tuple(maps.shape), *shapes, square=height == width)
        if layout is None:
            raise ValueError(
                f'{argument}: expected "NCHW", "NHWC", "tokens" or a function, got None, and {layer!r} returns '
                f"{tuple(maps.shape)} for images of {height}×{width}, which does not tell where its channels are"
            )
    if layout == "tokens":
        prefix = find_prefix(maps.shape[1], (height, width), grids) if maps.dim() == 3 else None
        if prefix is None:
            raise ValueError(
                f"{name}: expected tokens (B, T, C) of {layer!r}, of a grid of the aspect of images of "
                f"{height}×{width}, got {kind_of(maps)}"
            )
        reading = replace(reading, prefix=prefix)
    reading = replace(reading, layout=layout)
    with torch.no_grad():
        read(maps, reading, (height, width))
    return reading


def shapes_at(network: nn.Module, layer: str, images: Tensor) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """The shapes of a layer's output for images twice as wide, and twice as high; None where they cannot be had."""
    height, width = images.shape[2:]
    found: list[tuple[int, ...] | None] = []
    for sides in ((height, 2 * width), (2 * height, width)):
        others = noise(images.shape[1], *sides).to(images.device, images.dtype)
        try:
            maps = run_pass(network, own_tensors(network), others, layer, stop=True).maps
        except Exception:  # a network may be made for images of one size
            maps = []
        found.append(tuple(maps[0].shape) if maps and isinstance(maps[0], Tensor) else None)
    return found[0], found[1]


@contextmanager
def _grids(network: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """(h, w) of the maps that convolutions give in a `with` block."""
    found: list[tuple[int, int]] = []

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == 4:
            found.append((output.shape[2], output.shape[3]))

    hooks = [part.register_forward_hook(note) for part in network.modules() if isinstance(part, nn.Conv2d)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
