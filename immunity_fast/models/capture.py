"""`capture_activations`: N networks of one's own, and what a layer of each returns, in the graph of its logits."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from immunity_fast.models.catching import Catcher, catch
from immunity_fast.models.chains import check_submodule
from immunity_fast.models.expert_list import are_alike
from immunity_fast.models.looking import check_layout, look
from immunity_fast.models.maps import MapLayout, Reading, Reshape
from immunity_fast.models.probe import is_apart, noise
from immunity_fast.models.stacking import in_use
from immunity_fast.models.stages import find_stage
from immunity_fast.runtime.checks import kind_given
from immunity_fast.runtime.compilation import eagerly
from immunity_fast.runtime.outputs import check_logits, kind_of, logits_of

Layers = str | Sequence[str] | None
Reshapes = MapLayout | Reshape | Sequence[MapLayout | Reshape | None] | None

_BLOCKS = threading.local()  # `with` blocks that this thread is in, and their hooks, the innermost last


def capture_activations(
    networks: Iterable[nn.Module],
    layer: Layers = None,
    *,
    reshape: Reshapes = None,
    call: int | None = None,
    detach_weights: bool = False,
) -> CapturedNetworks:
    """Networks that give `FusedImmunityLoss` what it takes: logits, and the activations that led to them.

    ::

        captured = capture_activations([resnet_a, resnet_b], "layer2")
        logits, activations = captured(images)
        loss = FusedImmunityLoss(size=(224, 224))(logits, activations, labels)

    Args:
        networks: N ≥ 1 modules from images (B, C, H, W) to logits (B, K), each another one. They are kept, not copied,
            and nothing is changed in them. Of an object with ``.logits``, a dictionary with "logits" or a tuple these
            are taken.
        layer: the dotted name of the submodule whose output Grad-CAM looks at, or one a network; None is the last stage
            whose map exceeds 8×8 and changes the logits, found at the first pass.
        reshape: what the layer returns: "NCHW" for (B, C, h, w), "NHWC" for (B, h, w, C), as in a Swin Transformer,
            "tokens" for (B, T, C), as in a ViT, of which those before the image's are left out; or a function to
            (B, C, h, w), as pytorch-grad-cam's `reshape_transform`; or one of these a network. None finds out at the
            first pass, by some passes on made-up images of the same size.
        call: where the layer runs several times in a pass, which of them, from 0; None: it runs once.
        detach_weights: as the loss's: attention behind the layer then keeps its fast kernels, which cannot be
            differentiated twice. Otherwise it runs PyTorch's math kernel, with a warning.

    Raises:
        ValueError: no networks, one given twice, an unknown layer or layout.
        TypeError: no modules.
    """
    return CapturedNetworks(networks, layer, reshape=reshape, call=call, detach_weights=detach_weights)


class CapturedNetworks(nn.Module):
    """N networks whose logits come with a layer's activations; see `capture_activations`.

    It is an ordinary module: its copies, pickled ones too, have networks and activations of their own. Hooks are in the
    networks during a pass alone. `torch.compile` leaves the passes as they are, because the loss differentiates their
    gradients, which compiled code cannot.

    As a context it captures what passes of the networks themselves give, in this thread:

    ::

        with captured as activations:
            logits = [network(images) for network in networks]

    Attributes:
        networks: the networks, as an `nn.ModuleList`.
        layers: their layers' names; None of what the first pass is to find.
    """

    def __init__(
        self,
        networks: Iterable[nn.Module],
        layer: Layers = None,
        *,
        reshape: Reshapes = None,
        call: int | None = None,
        detach_weights: bool = False,
    ) -> None:
        super().__init__()
        modules = _check_networks(networks)
        self.networks = nn.ModuleList(modules)
        self.layers: list[str | None] = _each("layer", layer, len(modules))
        self.reshape: list[MapLayout | Reshape | None] = _each("reshape", reshape, len(modules))
        for network, name, index in zip(modules, self.layers, range(len(modules)), strict=True):
            if name is not None:
                check_submodule("layer", _uncompiled(network), name, f"number {index}")
        for layout in self.reshape:
            check_layout(layout, "reshape")
        if call is not None and (not isinstance(call, int) or call < 0):
            raise ValueError(f"call: expected a number from 0 or None, got {call!r}")
        self.call, self.detach_weights = call, detach_weights
        self._alike = [0 if are_alike([modules[0], other]) else index for index, other in enumerate(modules)]
        self._readings: list[Reading | None] = [None] * len(modules)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """N logits (B, K) and N activations (B, C, h, w), each in the graph of its logits, of images (B, C, H, W).

        Raises:
            ValueError: images of another shape, a layer that does not run once, or returns no map, or whose output is
                changed in place, networks without logits.
            TypeError: images that are no floating-point tensor.
        """
        check_images(images)
        logits, activations = self._passes(images)
        return logits, activations

    @eagerly
    def _passes(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        logits: list[Tensor] = []
        activations: list[Tensor] = []
        sides = (images.shape[2], images.shape[3])
        for index, network in enumerate(self.networks):
            layer, reading = self._reading(index, images)
            network = _uncompiled(network)
            catcher = Catcher(layer, index, self.call)
            output = catch(network, catcher, partial(network, images), reading, sides)
            logits.append(check_logits("networks", index, output, len(images)))
            activations.append(catcher.caught("layer"))
        return logits, activations

    def __enter__(self) -> list[Tensor]:
        activations: list[Any] = [None] * len(self.networks)
        layers = [None if name is None else network.get_submodule(name) for network, name in self._named()]
        for index, layer in enumerate(layers):
            if layer is not None and any(layer is other for other in layers[:index]):
                raise ValueError(
                    f"networks: expected a layer of its own in each, got {self.layers[index]!r} of number {index}, "
                    "which several share; call this module instead of them"
                )
        block = [_Passes(self, index, activations) for index in range(len(self.networks))]
        _BLOCKS.stack = [*getattr(_BLOCKS, "stack", []), (self, block)]
        return activations

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        *_BLOCKS.stack, (_, block) = _BLOCKS.stack
        for passes in block:
            passes.end()
        if error is None:
            for passes in block:
                passes.check()

    def extra_repr(self) -> str:
        return f"layers={self.layers}"

    def _named(self) -> list[tuple[nn.Module, str | None]]:
        return [(_uncompiled(network), name) for network, name in zip(self.networks, self.layers, strict=True)]

    def _reading(self, index: int, images: Tensor) -> tuple[str, Reading]:
        """A network's layer, and how its output is read; a look at the network, once."""
        layer, reading = self.layers[index], self._readings[index]
        if layer is None or reading is None:
            with in_use():  # one thread looks
                layer, reading = self._look(index, images)
                self.layers[index], self._readings[index] = layer, reading
        return layer, replace(reading, attention=reading.attention and not self.detach_weights)

    def _look(self, index: int, images: Tensor) -> tuple[str, Reading]:
        first = self._alike[index]
        layer, reshape = self.layers[index], self.reshape[index]
        known = self.layers[first], self._readings[first]
        same = reshape is self.reshape[first] and layer in (None, known[0])
        if first < index and same and known[0] is not None and known[1] is not None:
            return known[0], known[1]
        network = _uncompiled(self.networks[index])
        like = noise(images.shape[1], images.shape[2], images.shape[3]).to(images.device, images.dtype)
        if layer is None:
            layer = find_stage(network, like, reshape)
        calls = None if self.call is not None else 1
        return layer, look(network, layer, like, reshape, name="layer", calls=calls, modes=("evaluation", "training"))


class _Passes:
    """Hooks on one network in a `with` block, which fill in its place among the activations."""

    def __init__(self, captured: CapturedNetworks, index: int, activations: list[Any]) -> None:
        self.captured, self.index, self.activations = captured, index, activations
        self.network = _uncompiled(captured.networks[index])
        self.catcher: Catcher | None = None
        self.open: list[Any] = []  # the context of the pass that is under way
        self.layer_hook: Any = None
        self.thread = threading.get_ident()
        self.hooks = [
            self.network.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.network.register_forward_hook(self._finish, always_call=True),
        ]

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        # Another thread's pass may see the hook before, or after, PyTorch has noted that it takes keywords.
        if is_apart() or self.thread != threading.get_ident():
            return
        self._leave()
        images = next((value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)), None)
        check_images(images)
        assert images is not None
        layer, reading = self.captured._reading(self.index, images)
        self.catcher = Catcher(layer, self.index, self.captured.call)
        self.layer_hook = self.network.get_submodule(layer).register_forward_hook(self.catcher)
        context = self.catcher.begin(reading, (images.shape[2], images.shape[3]))
        context.__enter__()
        self.open.append(context)

    def _finish(self, _module: nn.Module, _inputs: object, output: Any) -> None:
        if is_apart() or self.thread != threading.get_ident() or not self.open:
            return
        self._leave()
        if isinstance(logits_of(output), Tensor) and self.catcher is not None:
            self.activations[self.index] = self.catcher.caught("layer")

    def _leave(self) -> None:
        while self.open:
            self.open.pop().__exit__(None, None, None)
        if self.layer_hook is not None:
            self.layer_hook.remove()
            self.layer_hook = None

    def end(self) -> None:
        """Take the hooks out of the network."""
        self._leave()
        for hook in self.hooks:
            hook.remove()

    def check(self) -> None:
        """Check that the network has run.

        Raises:
            ValueError: it has not.
        """
        if self.activations[self.index] is None:
            raise ValueError(f"networks: expected number {self.index} to run inside of the block, got no pass of it")


def check_images(images: Any) -> None:
    """Check that images are a floating-point tensor (B, C, H, W).

    Raises:
        ValueError: they have another shape.
        TypeError: they are something else.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"images: expected a floating-point tensor (B, C, H, W), got {kind_given(images)}")
    if images.dim() != 4:
        raise ValueError(f"images: expected shape (B, C, H, W), got {tuple(images.shape)}")


def _check_networks(networks: Any) -> list[nn.Module]:
    if not isinstance(networks, Iterable) or isinstance(networks, (str, Tensor)):
        raise TypeError(f"networks: expected a list of modules, got {type(networks).__name__}")
    modules: list[nn.Module] = []
    for network in networks:
        if not isinstance(network, nn.Module):
            raise TypeError(f"networks: expected modules, got {type(network).__name__} as number {len(modules)}")
        for earlier, other in enumerate(modules):
            if other is network:
                raise ValueError(
                    f"networks: expected each another one, got number {len(modules)} that is number {earlier}"
                )
        modules.append(network)
    if not modules:
        raise ValueError("networks: expected at least one module, got none")
    return modules


def _each(name: str, value: Any, count: int) -> list[Any]:
    if value is None or isinstance(value, str) or callable(value):
        return [value] * count
    if not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected one for all or {count}, one a network, got {kind_of(value)}")
    if len(value) != count:
        raise ValueError(f"{name}: expected one for all or {count}, one a network, got {len(value)}")
    return list(value)


def _uncompiled(network: nn.Module) -> nn.Module:
    """The network that `torch.compile` has wrapped, or the network."""
    inner = getattr(network, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else network
