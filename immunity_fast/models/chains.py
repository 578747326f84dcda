"""Networks that are a plain chain of children, which can be cut at a stage and given one child more."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeGuard

from torch import nn

from immunity_fast.arguments import Layout
from immunity_fast.experts.staged import StagedNetwork, split
from immunity_fast.models.layers import FromRead, ToRead
from immunity_fast.models.maps import Reading


def is_chain(network: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether running its children one after another is all that it does."""
    own = vars(network)
    is_plain = "forward" not in own and not network._forward_hooks and not network._forward_pre_hooks
    return isinstance(network, nn.Sequential) and type(network).forward is nn.Sequential.forward and is_plain


def check_stage(network: nn.Module, stage: str) -> None:
    """Check that a network has a stage: a chain a child that is not its last, any other a submodule.

    Raises:
        ValueError: it has not.
    """
    if is_chain(network):
        split(network, stage)
    else:
        check_submodule("stage", network, stage, f"the experts' {type(network).__name__}")


def check_submodule(argument: str, network: nn.Module, name: object, whose: str) -> None:
    """Check that a network has a submodule, by any of its names.

    Args:
        argument: the argument that says which, for messages.
        network: which should have it.
        name: its dotted name.
        whose: the network, for messages.

    Raises:
        ValueError: it has not; with names that are close.
        TypeError: no name.
    """
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected the name of a submodule of {whose}, got {type(name).__name__}")
    names = [each for each, _ in network.named_modules(remove_duplicate=False) if each]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"{argument}: expected the name of a submodule of {whose}, got {name!r}{hint}")


def halves(network: nn.Sequential, stage: str, reading: Reading) -> tuple[nn.Sequential, nn.Sequential] | None:
    """A trunk to maps (B, C, h, w), and a head from them, which share the network's modules.

    None where the maps are not all that the head needs: of tokens there are others besides.
    """
    trunk, head = split(network, stage)
    if reading.layout == "NCHW" and not reading.overwritten:
        return trunk, head
    if reading.layout not in ("NCHW", "NHWC"):
        return None
    axes: Layout = "NHWC" if reading.layout == "NHWC" else "NCHW"
    trunk = _chain([*trunk._modules.items(), ("channels first", ToRead(axes))])
    return trunk, _chain([("channels back", FromRead(axes, reading.overwritten)), *head._modules.items()])


def prepended(normalize: nn.Module, network: nn.Module) -> nn.Module:
    """The network behind a normalisation, in a first child called `normalize` where it is a chain."""
    if is_chain(network) and "normalize" not in network._modules:
        # Not named_children(): it drops the second use of a module that stands in the chain twice. And a subclass of
        # the user's may take other arguments than children.
        kind = StagedNetwork if isinstance(network, StagedNetwork) else nn.Sequential
        chain = kind(OrderedDict([("normalize", normalize), *network._modules.items()]))
    else:
        chain = nn.Sequential(OrderedDict([("normalize", normalize), ("expert", network)]))
    chain.training = network.training  # which the children have
    return chain


def _chain(children: Sequence[tuple[str, Any]]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(children))
