"""Activations that are not kept for the backward pass, but computed again in it, a part of a network at a time.

What is computed again has to be what was computed: with the tensors that were in the modules in the forward pass, which
of N experts in one stack are each expert's own, with the same random numbers and number formats, which
`torch.utils.checkpoint` sees to, and on copies of the buffers, so that BatchNorm counts a batch once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from immunity_fast.channelwise import ExpertsAsChannels
from immunity_fast.models.catching import Catcher, version
from immunity_fast.models.chains import is_chain
from immunity_fast.models.stacking import (
    call,
    in_use,
    own_tensors,
    places,
    run_by_vmap,
    run_stacked,
    slices,
    stack_maps,
    stacked_tensors,
    write_back,
)
from immunity_fast.runtime.sharding import is_sharded
from immunity_fast.runtime.strategies import Batching, choose

Run = Callable[[Mapping[str, Tensor], Any], Any]


class Recomputable(Protocol):
    """What is asked of a mixture before; `ImmunityMoE` is such."""

    experts: nn.Module

    @property
    def stage(self) -> str | tuple[str, ...]:
        """Where Grad-CAM looks, in all experts or in each."""


def run_recomputed(stacked: nn.Sequential, x: Tensor, num_experts: int, *, batching: Batching = "auto") -> Tensor:
    """`run_stacked` on x (B, …) that all experts share, which keeps the segments' inputs alone for the backward pass.

    In a loop over the experts one segment of one expert is computed again at a time, by `vmap` one segment of all.
    """
    if not torch.is_grad_enabled():
        return run_stacked(stacked, x, num_experts, shared=True, batching=batching)
    parts = segments(stacked)
    if torch.compiler.is_compiling():
        _check_compilable(stacked)
    if choose(batching, x.device) == "loop":
        with in_use():
            of_parts = [slices(part, num_experts) for part in parts]
            outputs = []
            for index in range(num_experts):
                maps = x
                for part, own in zip(parts, of_parts, strict=True):
                    maps = recomputed(partial(call, part), own[index], _names(part), maps)
                outputs.append(maps)
            return stack_maps(outputs)
    maps = x
    # A compiler takes no mode that begins inside of what is computed again.
    outer, inner = (
        (ExpertsAsChannels, nullcontext) if torch.compiler.is_compiling() else (nullcontext, ExpertsAsChannels)
    )
    with in_use(), outer():
        for index, part in enumerate(parts):
            run = partial(run_by_vmap, part, shared=index == 0, mode=inner)
            maps = recomputed(run, stacked_tensors(part), _names(part), maps)
    return maps


def segments(chain: nn.Sequential) -> list[nn.Sequential]:
    """A chain's parts: each child that has children of its own, with the single layers up to the next.

    A layer's input is what it would keep anyway. A chain of single layers alone is one part.
    """
    found: list[OrderedDict[str, nn.Module]] = [OrderedDict()]
    # Not named_children(): it drops the second use of a module that stands in the chain twice.
    for name, child in chain._modules.items():
        assert child is not None
        if _is_composed(child) and any(_is_composed(earlier) for earlier in found[-1].values()):
            found.append(OrderedDict())
        found[-1][name] = child
    return [nn.Sequential(part) for part in found]


def recomputed(run: Run, tensors: Mapping[str, Tensor], buffers: list[str], given: Any) -> Any:
    """`run(tensors, given)`, whose activations are computed again in the backward pass; updates the buffers once.

    Args:
        run: computes with the tensors that it is given, and changes none but buffers.
        tensors: parameters and buffers.
        buffers: which of them are buffers.
        given: a tensor, or anything with tensors, which stay as they are until the backward pass.

    Raises:
        ValueError: they, or parameters, were changed in place; now, or in the backward pass.
    """
    kept = {name: tensors[name].clone() for name in buffers}
    used = [value for name, value in tensors.items() if name not in kept]
    used += [value for value in _pytree.tree_leaves(given) if isinstance(value, Tensor)]
    versions = [version(value) for value in used]

    def check_kept() -> None:
        if [version(value) for value in used] != versions:
            raise ValueError(
                "checkpoint_activations: expected inputs and weights of the parts that are computed again to stay as "
                "they are until the backward pass, got one that was changed in place; a layer that does so first in "
                "its part needs inplace=False"
            )

    def compute(given: Any) -> tuple[Any, dict[str, Tensor]]:
        check_kept()
        copies = {name: value.clone() for name, value in kept.items()}
        with in_use():
            return run({**tensors, **copies}, given), copies

    output, updated = checkpoint(compute, given, use_reentrant=False)
    check_kept()
    write_back({name: tensors[name] for name in buffers}, updated)  # another expert's pass has kept its row of them
    return output


@contextmanager
def parts_recomputed(network: nn.Module, stage: str, catcher: Catcher | None) -> Iterator[None]:
    """In a `with` block of one pass of a network that runs whole, in this thread: its parts are computed again.

    Args:
        network: which is not entered by another thread meanwhile.
        stage: where Grad-CAM looks.
        catcher: of the stage's maps. What runs behind it is differentiated twice, and keeps its activations. None is a
            pass of which all may be computed again.
    """
    parts = composed_parts(network, stage)
    if not torch.is_grad_enabled():
        yield
        return
    given = {part: vars(part).get("forward") for part in parts}
    for part in parts:
        part.forward = _Forward(part, catcher)
    try:
        yield
    finally:
        for part, forward in given.items():
            del part.forward
            if forward is not None:
                part.forward = forward


class _Forward:
    """In the place of a module's `forward`, inside of its hooks."""

    def __init__(self, module: nn.Module, catcher: Catcher | None) -> None:
        self.module, self.forward, self.catcher = module, module.forward, catcher

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.catcher is not None and self.catcher.maps is not None:
            return self.forward(*args, **kwargs)
        return recomputed(self.run, own_tensors(self.module), _names(self.module), (args, kwargs))

    def run(self, tensors: Mapping[str, Tensor], given: tuple[Any, Any]) -> Any:
        by_own = {value: tensors[name] for name, value in own_tensors(self.module).items()}
        by_place = {f"module.{name}": by_own[value] for name, value in places(self.module)}
        args, kwargs = given
        return functional_call(_Holder(self.module, self.forward), by_place, args, kwargs, tie_weights=False)


class _Holder(nn.Module):
    """A module without its hooks, which `functional_call` would call a second time."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def composed_parts(network: nn.Module, stage: str) -> list[nn.Module]:
    """The outermost modules of several layers that run as modules and do not have the stage inside of them."""
    found: list[nn.Module] = []
    for name, child in network.named_children():
        if stage.startswith(f"{name}.") or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += composed_parts(child, stage.removeprefix(f"{name}."))
        elif _is_composed(child):
            found.append(child)
    return found


def check_recomputable(model: Recomputable) -> None:
    """Check that each expert of a mixture has parts that are worth being computed again.

    Raises:
        ValueError: one has none, or weights are in shards, which are gone when the backward pass comes.
    """
    experts = model.experts
    if is_sharded(experts):
        raise ValueError("checkpoint_activations: expected whole weights, got a model in shards")
    if is_chain(experts):
        return
    networks = list(experts) if isinstance(experts, nn.ModuleList) else [experts]
    stages = (model.stage,) * len(networks) if isinstance(model.stage, str) else model.stage
    for index, (network, stage) in enumerate(zip(networks, stages, strict=False)):
        if not composed_parts(network, stage):
            raise ValueError(
                f"checkpoint_activations: expected experts with parts of several layers besides {stage!r}, got number "
                f"{index}, a {type(network).__name__} of single layers"
            )


def _check_compilable(module: nn.Module) -> None:
    """Check that what a pass computes does not depend on buffers that it changes.

    In compiled code the second computation would begin with buffers as the first has left them.

    Raises:
        ValueError: it may; compiled code then falls back to eager.
    """
    for part in module.modules():
        if not isinstance(part, _NormBase) and any(True for _ in part.buffers(recurse=False)):
            raise ValueError(
                "checkpoint_activations: expected no buffers but those of normalisation in what is compiled, got some "
                f"of a {type(part).__name__}"
            )


def _is_composed(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_buffers()]
