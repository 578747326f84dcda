"""A layer's maps, caught on their way through a network by a hook that lasts for one pass of one thread."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from immunity_fast.models.attention import MathAttention
from immunity_fast.models.maps import Reading, read
from immunity_fast.models.probe import is_apart


class Catcher:
    """A forward hook that reads a layer's output, in the thread that made it.

    A copy of a network that is made during a pass has a hook that does nothing.

    Args:
        layer: its name, for messages.
        number: of the network, for messages.
        call: which of several times that the layer runs in a pass, from 0; None: it runs once.
    """

    def __init__(self, layer: str, number: int, call: int | None = None) -> None:
        self.layer, self.number, self.call = layer, number, call
        self.thread: int | None = threading.get_ident()
        self.reading, self.sides = Reading(), (0, 0)
        self.attention = MathAttention()
        self.begin(self.reading, self.sides)

    def begin(self, reading: Reading, sides: tuple[int, int]) -> AbstractContextManager[object]:
        """Before a pass on images of such sides; what comes is the context for it."""
        self.reading, self.sides = reading, sides
        self.maps: Tensor | None = None
        self.version = self.ran = 0
        self.has_graph = torch.is_grad_enabled()
        self.attention.begun = False
        return self.attention if reading.attention and torch.is_grad_enabled() else nullcontext()

    def __call__(self, _module: nn.Module, _inputs: object, output: Any) -> Any:
        """The hook."""
        if self.thread != threading.get_ident() or is_apart():
            return None
        self.ran += 1
        if self.ran - 1 != (self.call or 0):
            return None
        if self.has_graph and not torch.is_grad_enabled():
            raise ValueError(
                f"layer: expected {self.layer!r} to run where gradients are enabled, as the network does, got "
                "torch.no_grad; of torch.utils.checkpoint use_reentrant=False is what can be captured"
            )
        self.maps, onward = read(output, self.reading, self.sides)
        self.version = version(self.maps)
        self.attention.begin()
        return onward

    def caught(self, name: str) -> Tensor:
        """The maps (B, C, h, w), once the pass is over.

        Args:
            name: of the argument that says which layer, for messages.

        Raises:
            ValueError: there are none, or several, or others than the layer returned.
        """
        if self.maps is None or (self.call is None and self.ran != 1):
            times = "once" if self.call is None else f"more than {self.call} times"
            hint = f"; call={self.ran - 1} takes the last" if self.call is None and self.ran > 1 else ""
            raise ValueError(
                f"{name}: expected {self.layer!r} to run {times} in a pass of number {self.number}, got {self.ran} "
                f"times{hint}"
            )
        check_kept(name, self.layer, self.maps, self.version)
        if self.attention.seen:
            _warn_of_attention(self.layer)
        return self.maps

    def __deepcopy__(self, memo: dict[int, Any]) -> Catcher:
        return _deaf(self.layer, self.number)

    def __reduce__(self) -> tuple[Any, ...]:
        return _deaf, (self.layer, self.number)


def catch(
    network: nn.Module, catcher: Catcher, run: Callable[[], Any], reading: Reading, sides: tuple[int, int]
) -> Any:
    """What `run`, one pass of `network`, returns; the catcher then has the maps. Nothing is left in the network."""
    hook = network.get_submodule(catcher.layer).register_forward_hook(catcher)
    try:
        with catcher.begin(reading, sides):
            return run()
    finally:
        hook.remove()


def check_kept(name: str, layer: str, maps: Tensor, before: int) -> None:
    """Check that maps are still what their layer returned.

    Raises:
        ValueError: their version is another: an operation behind the layer has changed them in place.
    """
    if version(maps) != before:
        raise ValueError(
            f"{name}: expected the output of {layer!r} to stay as it is, got one that an in-place operation behind it "
            "has changed; make it inplace=False, or this anew, which then copies the output"
        )


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, where that is counted."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _deaf(layer: str, number: int) -> Catcher:
    catcher = Catcher(layer, number)
    catcher.thread = None
    return catcher


def _warn_of_attention(layer: str) -> None:
    warnings.warn(
        f"attention behind {layer!r} runs PyTorch's math kernel, which can be differentiated twice, as its fast "
        "kernels cannot; with detach_weights=True, in the loss and where the maps are captured, it keeps these",
        stacklevel=4,
    )
