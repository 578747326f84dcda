"""Which parameters weight decay is for: groups for an optimiser, of a mixture's stacked experts or of any module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from immunity_fast.models.expert_list import ExpertList
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.runtime.checks import check_choice, check_weight

Decay = Literal["all", "weights"]

NORMALIZATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# Parameters of vision transformers that are no weights of a layer, as timm, torchvision and transformers call them.
TOKENS = frozenset(
    {
        *("cls_token", "class_token", "class_embedding", "dist_token", "distillation_token", "mask_token"),
        *("reg_token", "register_token", "register_tokens"),
        *("pos_embed", "pos_embedding", "position_embedding", "position_embeddings", "positional_embedding"),
        *("absolute_pos_embed", "relative_position_bias_table"),
    }
)


def parameter_groups(model: nn.Module, weight_decay: float = 5e-4, decay: Decay = "weights") -> list[dict[str, Any]]:
    """A model's parameters as groups for an optimiser of `torch.optim`, or for `FusedSGD`.

    With "weights", these do not decay:

    * biases;
    * all parameters of normalisations (batch, instance, group, layer, RMS), by the module's type;
    * class tokens, position embeddings and the like, by the names that timm, torchvision and transformers give them;
    * what a module's own `no_weight_decay()` names, as timm's models have one;
    * whatever else has at most one axis, such as scales of layers and temperatures.

    In a mixture's stack of experts an expert's own axes count, not the first one, which numbers the experts: a bias is
    (N, C) there, and so is a normalisation's weight.

    Args:
        model: any module; a parameter that it has under several names is taken once, and does not decay if it need
            not under one of them.
        weight_decay: of what decays.
        decay: "all" makes one group of everything.

    Returns:
        One or two groups, `{"params": […], "weight_decay": …}`, what decays first, in the order of
        `model.parameters()`; none that is empty.

    Raises:
        ValueError: a negative weight decay, or another word than these for `decay`.
        TypeError: no module, or a weight decay that is no number.
    """
    check_choice("decay", decay, Decay)
    check_weight("weight_decay", weight_decay)
    given: Any = model
    if not isinstance(given, nn.Module):
        raise TypeError(f"model: expected a module, whose kinds of layers say what decays, got {type(given).__name__}")
    parameters = list(model.parameters())
    exempt = {id(parameter) for parameter in _exempt(model)} if decay == "weights" else set[int]()
    decaying = [parameter for parameter in parameters if id(parameter) not in exempt]
    others = [parameter for parameter in parameters if id(parameter) in exempt]
    groups = [
        {"params": decaying, "weight_decay": float(weight_decay)},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _exempt(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that do not decay; some more than once."""
    stacked = _stacked(model)
    for name, module in model.named_modules(remove_duplicate=False):
        named = dict(module.named_parameters(remove_duplicate=False))
        yield from (named[own] for own in _names_without_decay(module) if own in named)
        token = not TOKENS.isdisjoint(name.split("."))
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            axes = parameter.dim() - (id(module) in stacked)
            if token or axes <= 1 or isinstance(module, NORMALIZATIONS) or leaf in TOKENS or _is_bias(leaf):
                yield parameter


def _stacked(model: nn.Module) -> set[int]:
    """Modules whose tensors hold those of all experts, along a first axis."""
    stacks = [
        mixture.experts
        for mixture in model.modules()
        if isinstance(mixture, ImmunityMoE) and not isinstance(mixture.experts, ExpertList)
    ]
    return {id(module) for stack in stacks for module in stack.modules()}


def _names_without_decay(module: nn.Module) -> set[str]:
    """What a module says itself; a parameter's name in it, or, of timm's keywords, a part of one."""
    asked = getattr(module, "no_weight_decay", None)
    names = set(asked()) if callable(asked) else set[str]()
    keywords = getattr(module, "no_weight_decay_keywords", None)
    if callable(keywords):
        words = set(keywords())
        names |= {name for name, _ in module.named_parameters() if any(word in name for word in words)}
    return names


def _is_bias(leaf: str) -> bool:
    """Whether a parameter's own name is a bias', as in `nn.Linear`, `nn.MultiheadAttention` and timm's."""
    return leaf == "bias" or leaf.endswith("_bias") or leaf in ("bias_k", "bias_v")
