"""What members compute inside: the features at a place of each, and nothing behind it.

A place is a number or a name. Numbers count the nonlinearities of a pass, from 1: place k is what the k-th of them is
given, which in a ResNet-20 are the sums and BatchNorms before its 19 ReLUs; the number behind the last is the logits. A
name is a submodule's, and the place its output.

A pass ends where its features are there: nothing behind them costs anything, or can overwrite them in place.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from immunity_fast.models.chains import check_submodule
from immunity_fast.models.expert_list import ExpertList
from immunity_fast.models.maps import pick
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.models.stacking import run_stacked
from immunity_fast.runtime.outputs import logits_of

Members: TypeAlias = "ImmunityMoE | Sequence[nn.Module]"
Place = int | str

_FUNCTIONS = ("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish")
NONLINEARITIES = frozenset(f"{name}{end}" for name in (*_FUNCTIONS, "hardtanh", "hardswish") for end in ("", "_"))
"""Functions of PyTorch that are counted, by their names; tanh and the sigmoid, which gates use, are not among them."""

# How many nonlinearities a pass has, by network. It follows from the network and costs a pass to find out.
_COUNTS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def members_of(members: Any) -> ImmunityMoE | list[nn.Module]:
    """Members as they are checked to be: a mixture, or N ≥ 2 networks, those inside of compiled and distributed ones.

    Raises:
        ValueError: there are fewer than two, or one is there twice.
        TypeError: they are no networks.
    """
    if isinstance(members, ImmunityMoE):
        networks: list[nn.Module] = []
        count = members.num_experts
    elif isinstance(members, Iterable) and not isinstance(members, (str, Tensor)):
        networks = [_inner(network) for network in members]
        count = len(networks)
        for index, network in enumerate(networks):
            if not isinstance(network, nn.Module):
                raise TypeError(f"members: expected modules, got {type(network).__name__} as number {index}")
            if any(network is other for other in networks[:index]):
                raise ValueError(f"members: expected each another one, got number {index} a second time")
    else:
        raise TypeError(f"members: expected an ImmunityMoE or a list of modules, got {type(members).__name__}")
    if count < 2:
        raise ValueError(f"members: expected at least 2, got {count}")
    return members if isinstance(members, ImmunityMoE) else networks


def features(members: Members, images: Tensor, places: Sequence[Place]) -> list[Tensor]:
    """Each member's features of images, in their graph.

    Args:
        members: a mixture, whose experts see the images normalised as it does it; or a list of networks.
        images: (B, C, H, W), which all see; or (N, B, C, H, W), each member's own.
        places: each member's, N of them; those of a stack of experts are one.

    Returns:
        N tensors (B, …) of any shapes; of a stack of experts one, (N, B, …).

    Raises:
        ValueError: a member has no such place, or a pass does not come to it.
    """
    if isinstance(members, ImmunityMoE):
        images = members._normalized(images, own=True)
    stack = _stack(members)
    if stack is not None and isinstance(members, ImmunityMoE):
        upto, shared = _UpTo(stack, places[0]), images.dim() == 4
        batching = members._batching(images)
        return [run_stacked(upto, images, members.num_experts, shared=shared, batching=batching)]
    networks = _networks(members)
    seen = images.unbind() if images.dim() == 5 else [images] * len(networks)
    return [_UpTo(network, place)(own) for network, place, own in zip(networks, places, seen, strict=True)]


def count_places(members: Members, images: Tensor) -> list[int]:
    """How many numbered places each member has: its nonlinearities and the logits. A pass, the first time.

    Args:
        members: a mixture, or a list of networks; in the mode that features are to be taken in.
        images: (B, C, H, W); two of them will do.
    """
    stack = _stack(members)
    networks = _networks(members) if stack is None else [stack]
    if any(network not in _COUNTS for network in networks):
        counters = [_UpTo(network, None) for network in networks]
        with torch.no_grad():
            seen = members._normalized(images) if isinstance(members, ImmunityMoE) else images
            if stack is not None and isinstance(members, ImmunityMoE):
                run_stacked(counters[0], seen, members.num_experts, shared=True, batching=members._batching(seen))
            else:
                for counter in counters:
                    counter(seen)
        _COUNTS.update({counter.network: counter.passed + 1 for counter in counters})
    counts = [_COUNTS[network] for network in networks]
    return counts * members.num_experts if stack is not None and isinstance(members, ImmunityMoE) else counts


def forget_places(members: Members) -> None:
    """Count anew the next time: the networks may have changed."""
    stack = _stack(members)
    for network in _networks(members) if stack is None else [stack]:
        _COUNTS.pop(network, None)


def check_places(members: Members, names: Iterable[str]) -> None:
    """Check that each member has submodules of these names.

    Raises:
        ValueError: one has not; with names that are close.
    """
    stack = _stack(members)
    for index, network in enumerate(_networks(members) if stack is None else [stack]):
        for name in names:
            check_submodule("layers", network, name, "the experts" if stack is not None else f"number {index}")


class _Reached(Exception):
    """Ends a pass whose features are there."""


class _UpTo(nn.Module):
    """A network up to a place; its parameters and buffers are the network's, in which nothing is left.

    Args:
        network: from images (B, C, H, W) to logits.
        place: see the module; None runs all of the network, and counts.

    Attributes:
        passed: nonlinearities that the last pass has come by.
    """

    def __init__(self, network: nn.Module, place: Place | None) -> None:
        super().__init__()
        self.network, self.place, self.passed = network, place, 0

    def forward(self, x: Tensor) -> Tensor:
        """The features of images (B, C, H, W): (B, …).

        Raises:
            ValueError: there is no such place.
        """
        if isinstance(self.place, str):
            return self._behind(self.place, x)
        counting = _Counting(self.place)
        output: Any = None
        try:
            with counting:
                output = self.network(x)
        except _Reached:
            pass
        self.passed = counting.passed
        if counting.found is not None:
            return counting.found
        logits = logits_of(output)
        if self.place not in (None, self.passed + 1) or not isinstance(logits, Tensor):
            raise ValueError(f"layer: expected a number from 1 to {self.passed + 1}, got {self.place}")
        return logits

    def _behind(self, name: str, x: Tensor) -> Tensor:
        """What a submodule returns, the first time that it runs."""
        thread, found = threading.get_ident(), []

        def catch(_module: nn.Module, _inputs: object, output: Any) -> None:
            if threading.get_ident() == thread:
                found.append(pick(output)[0])
                raise _Reached

        hook = self.network.get_submodule(name).register_forward_hook(catch)
        try:
            self.network(x)
        except _Reached:
            pass
        finally:
            hook.remove()
        if not found or found[0] is None:
            raise ValueError(f"layer: expected {name!r} to run in a pass and to return a tensor, got none")
        maps: Tensor = found[0]
        return maps


class _Counting(TorchFunctionMode):
    """Counts nonlinearities, and ends the pass before number `place` runs, which might overwrite what it is given."""

    def __init__(self, place: int | None) -> None:
        super().__init__()
        self.place, self.passed = place, 0
        self.found: Tensor | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in NONLINEARITIES:
            if self.passed + 1 == self.place:
                self.found = args[0] if args else kwargs["input"]
                raise _Reached
            self.passed += 1
        return function(*args, **kwargs)


def _stack(members: Members) -> nn.Module | None:
    """The experts of a mixture that are one module, whose tensors hold all N."""
    stacked = isinstance(members, ImmunityMoE) and not isinstance(members.experts, ExpertList)
    return members.experts if stacked and isinstance(members, ImmunityMoE) else None


def _networks(members: Members) -> list[nn.Module]:
    """The networks of a list, or of a mixture that holds one."""
    if not isinstance(members, ImmunityMoE):
        return list(members)
    assert isinstance(members.experts, ExpertList)
    return list(members.experts)


def _inner(network: Any) -> Any:
    """The network inside of what `torch.compile`, `DistributedDataParallel` and `DataParallel` have made of it."""
    while True:
        inner = (
            network.module
            if isinstance(network, DistributedDataParallel | nn.DataParallel)
            else getattr(network, "_orig_mod", None)
        )
        if not isinstance(inner, nn.Module):
            return network
        network = inner
