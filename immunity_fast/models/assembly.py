"""From N networks to what a mixture holds of them: a stack, or a list of different structures, and their stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from immunity_fast.experts import create
from immunity_fast.experts.registry import repeated
from immunity_fast.experts.staged import StagedNetwork, copied, default_stage
from immunity_fast.experts.stems import StemChoice, chosen_stem
from immunity_fast.models import probe
from immunity_fast.models.chains import check_stage, is_chain
from immunity_fast.models.expert_list import ExpertList, are_alike, check_together
from immunity_fast.models.looking import check_layout, look
from immunity_fast.models.maps import MapLayout, Reading, Reshape
from immunity_fast.models.stacking import own_tensors, stack_modules
from immunity_fast.models.stages import find_stage
from immunity_fast.runtime.checks import check_choice
from immunity_fast.runtime.strategies import Batching

Stages = str | Sequence[str] | None
Layouts = MapLayout | Reshape | Sequence[MapLayout | Reshape | None] | None


class Assembly(NamedTuple):
    """What a mixture holds of its experts."""

    experts: nn.Module  # all in one stack, or an `ExpertList`
    stages: tuple[str, ...]  # of each expert
    readings: tuple[Reading, ...]  # of the stage's output
    image_size: tuple[int, int]
    channels: int
    num_classes: int
    batching: Batching


def sides_of(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W)."""
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])


def from_names(
    arch: str | Sequence[str],
    num_experts: int,
    num_classes: int,
    *,
    stage: Stages,
    image_size: int | tuple[int, int],
    channels: int,
    batching: Batching,
    stem: StemChoice,
) -> Assembly:
    """Fresh experts of architectures that take turns.

    Raises:
        ValueError: no such architecture or stage, more architectures than experts, or networks that are no experts.
    """
    takes = repeated(arch, num_experts)
    begin = chosen_stem(stem, image_size)
    experts = [create(name, num_classes, stem=begin, image_size=image_size, channels=channels) for name in takes]
    if not all(isinstance(expert, StagedNetwork) for expert in experts):
        return assembled(experts, stage=stage, image_size=image_size, channels=channels, batching=batching)
    stages = _of_each("stage", stage, num_experts)
    defaults: dict[str, str] = {}
    chosen: list[str] = []
    for name, expert, asked in zip(takes, experts, stages, strict=True):
        if asked is None and name not in defaults:
            defaults[name] = default_stage(expert, image_size, channels)
        chosen.append(asked or defaults[name])
        check_stage(expert, chosen[-1])
    one_stack = _are_one_stack(experts, chosen, batching)
    # Nothing to look at: stages of ours return maps (B, C, h, w), and nothing behind them is in place.
    return Assembly(
        stack_modules(experts) if one_stack else ExpertList(experts),
        tuple(chosen),
        (Reading(),) * num_experts,
        sides_of(image_size),
        channels,
        num_classes,
        batching,
    )


def assembled(
    experts: Sequence[nn.Module],
    *,
    stage: Stages,
    image_size: int | tuple[int, int],
    channels: int | None,
    batching: Batching,
    layout: Layouts = None,
) -> Assembly:
    """Any networks, copied, once each was seen to compute in the mixture what it computes alone.

    Args:
        channels: of the images; None finds out.

    Raises:
        ValueError: see `ImmunityMoE.from_experts`.
    """
    asked = _of_each("stage", stage, len(experts))
    layouts = _of_each("layout", layout, len(experts))
    for axes in layouts:
        check_layout(axes)
    one_stack = _are_one_stack(experts, list(zip(asked, layouts, strict=True)), batching)
    if not one_stack:
        check_together(experts)
    images = probe.find_images(experts[:1] if one_stack else experts, sides_of(image_size), channels)
    found = [_look(experts[i], asked[i], layouts[i], images) for i in range(1 if one_stack else len(experts))]
    stages = [where for where, _ in found] * (len(experts) if one_stack else 1)
    whole: nn.Module
    if one_stack:
        whole = stack_modules(experts)
        own = own_tensors(whole)
        twins = [
            probe.Twin(whole, {name: tensor.detach()[index] for name, tensor in own.items()}, True)
            for index in range(len(experts))
        ]
    else:
        whole = ExpertList(copied(expert) for expert in experts)
        twins = [probe.Twin(copy, own_tensors(copy), False) for copy in whole]
    overwritten, num_classes = probe.check_alike(experts, twins, stages, images)
    if one_stack:  # which has one head
        overwritten = [any(overwritten)] * len(experts)
        batching = _possible(batching, whole, images, len(experts))
    return Assembly(
        whole,
        tuple(stages),
        tuple(
            replace(reading, overwritten=overwritten[index])
            for index, (_, reading) in enumerate(found * (len(experts) if one_stack else 1))
        ),
        (images.shape[2], images.shape[3]),
        images.shape[1],
        num_classes,
        batching,
    )


def check_experts(experts: object, least: int) -> list[nn.Module]:
    """The modules of a list.

    Raises:
        ValueError: fewer than `least`.
        TypeError: no list, or one of something else.
    """
    some = f"at least {least} module{'s' if least > 1 else ''}"
    if not isinstance(experts, Iterable) or isinstance(experts, (str, Tensor)):
        raise TypeError(f"experts: expected a list of {some}, got {type(experts).__name__}")
    modules: list[nn.Module] = []
    for expert in experts:
        if not isinstance(expert, nn.Module):
            raise TypeError(f"experts: expected modules, got {type(expert).__name__} as number {len(modules)}")
        modules.append(expert)
    if len(modules) < least:
        raise ValueError(f"experts: expected {some}, got {len(modules)}")
    return modules


def check_classes(classes: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    """The classes' names, as many as there are classes; None where nobody has named them.

    Raises:
        ValueError: another number of names.
        TypeError: something else than names.
    """
    if classes is None:
        return None
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"classes: expected {num_classes} names, got {classes!r}")
    if len(classes) != num_classes:
        raise ValueError(f"classes: expected {num_classes} names, got {len(classes)}")
    return tuple(classes)


def _are_one_stack(experts: Sequence[nn.Module], stages: Sequence[object], batching: Batching) -> bool:
    """Whether experts are stacked: those of one structure, with one stage.

    Raises:
        ValueError: an unknown batching, or "vmap" where they are not.
    """
    check_choice("batching", batching, Batching)
    alike = are_alike(experts)
    one_stack = alike and len(set(stages)) == 1
    if batching == "vmap" and not one_stack:
        what = "stages" if alike else "structures"
        raise ValueError(f"batching: expected 'auto' or 'loop' for experts of different {what}, got 'vmap'")
    return one_stack


def _possible(batching: Batching, stacked: nn.Module, images: Tensor, num_experts: int) -> Batching:
    """The batching that was asked for; of "auto" a loop where `vmap` cannot run the networks.

    Raises:
        ValueError: it cannot, and was asked for.
    """
    if batching == "loop":
        return batching
    reason = probe.why_not_batched(stacked, images, num_experts)
    if reason and batching == "vmap":
        raise ValueError(
            f"batching: expected 'auto' or 'loop' for networks that torch.vmap does not run, got 'vmap' ({reason})"
        )
    return "loop" if reason else batching


def _look(
    network: nn.Module, stage: str | None, layout: MapLayout | Reshape | None, images: Tensor
) -> tuple[str, Reading]:
    """Where to look in a network, and how what is there is read."""
    if stage is None:
        stage = find_stage(network, images, layout)
    check_stage(network, stage)
    # A module that stands in a chain several times has a place of its own each time.
    return stage, look(network, stage, images, layout, calls=None if is_chain(network) else 1)


def _of_each(name: str, value: Any, count: int) -> list[Any]:
    """One value an expert, where one may stand for all.

    Raises:
        ValueError: as many as there are experts are neither one nor N.
    """
    if value is None or isinstance(value, str) or callable(value):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}: expected one for all or {count}, one an expert, got {len(value)}")
    return list(value)
