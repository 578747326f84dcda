"""What a probe image tells of the networks that are to be one mixture: whether they can be, and what their maps are.

A stack of experts holds each one's parameters and buffers; all else, plain attributes, functions and hooks, is number
0's. Whether the others compute the same with it shows in what they compute, alone and in the stack.
"""

from __future__ import annotations

import functools
import random
import threading
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from immunity_fast.models.maps import pick
from immunity_fast.models.stacking import call, in_use, own_tensors, run_stacked
from immunity_fast.runtime.outputs import check_logits

# Of images that networks are built for, the usual ones first; those who take one size alone seldom say which.
SIDES = (32, 224, 28, 64, 96, 128, 256, 299, 384, *range(4, 64))
# Of the largest magnitude. The same operations on the same numbers: what differs is rounding, if anything.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_TOLERANCE_CUDA = {torch.float64: 1e-8, torch.float32: 3e-3}  # products in TF32
_TOLERANCE_HALF = 3e-2

_HERE = threading.local()  # how many passes that are nobody's this thread is in


class Pass(NamedTuple):
    """What one pass of a network gave."""

    output: Any
    maps: list[Any]  # the stage's outputs, as they were when it returned them
    buffers: dict[str, Tensor]
    overwritten: bool  # whether something behind the stage changed its output in place
    input_changed: bool  # whether something changed the images in place
    gradients: list[Tensor]  # of the images, and of all parameters in one tensor; empty where they are not asked for


class Twin(NamedTuple):
    """What stands for an expert in the mixture."""

    module: nn.Module
    tensors: Mapping[str, Tensor]  # to run it with
    shares: bool  # all that is no tensor with the other experts


class _Way(NamedTuple):
    """In which state networks are compared."""

    mode: str
    moved: bool = False  # with other weights: those of a fresh network can hide much, being zero here and there
    loud: bool = False  # on images far beyond [0, 1]: bounds that nothing reaches look alike
    backward: bool = False  # by gradients, too: hooks and functions may change these alone


# Every network has to run in the first of them. One that does not in another is not compared there.
_WAYS = (
    _Way("evaluation"),
    _Way("training", moved=True),
    _Way("evaluation", loud=True),
    _Way("evaluation", moved=True, backward=True),
)


class _Reached(Exception):
    """Stops a pass at its stage."""


def find_images(networks: Sequence[nn.Module], image_size: tuple[int, int], channels: int | None) -> Tensor:
    """Two images in [0, 1], (2, C, H, W), on the first network's device, which all accept in evaluation mode.

    Their sides are `image_size`; where that is 32×32, which nobody may have meant, other squares are tried, too.

    Raises:
        ValueError: there are none.
    """
    network = networks[0]
    own = own_tensors(network).values()
    first = next(iter(own), torch.empty(0))
    dtype = next((tensor.dtype for tensor in own if tensor.is_floating_point()), torch.float32)
    convolution = next((part for part in network.modules() if isinstance(part, nn.Conv2d)), None)
    depths = [channels] if channels else [3] if convolution is None else [3, convolution.in_channels]
    sides = [(side, side) for side in dict.fromkeys(SIDES)] if image_size == (32, 32) else [image_size]
    failed: tuple[int, Exception, tuple[int, ...]] | None = None
    for height, width in sides:
        for depth in dict.fromkeys(depths):
            for kind in dict.fromkeys((dtype, torch.float32)):
                images = noise(depth, height, width).to(first.device, kind)
                error = _first_error(networks, images)
                if error is None:
                    return images
                if failed is None or error[0] > failed[0]:  # where most of the experts run
                    failed = (*error, (2, depth, height, width))
    assert failed is not None
    index, reason, shape = failed
    raise ValueError(
        f"experts: expected number {index} to run on images of {shape}, got {_line(reason)}; image_size says which it "
        "takes"
    ) from reason


def _first_error(networks: Sequence[nn.Module], images: Tensor) -> tuple[int, Exception] | None:
    """The first network that does not accept images, and what it raises."""
    for index, network in enumerate(networks):
        try:
            run_pass(network, own_tensors(network), images)
        except Exception as error:  # whatever a network may raise
            return index, error
    return None


def check_alike(
    experts: Sequence[nn.Module], twins: Sequence[Twin], stages: Sequence[str], images: Tensor
) -> tuple[list[bool], int]:
    """Each expert has to compute alone what its twin in the mixture computes: outputs, maps, what becomes of buffers.

    Returns:
        Whether something behind an expert's stage changes its output in place, of each; and K, the number of classes.

    Raises:
        ValueError: an expert that does not, or has other classes than number 0, by its number.
    """
    for index, expert in enumerate(experts):
        _check_parameters(index, expert)
    overwritten = [False] * len(experts)
    classes: list[int] = []
    for way in _WAYS:
        # What a pass leaves in plain attributes the next expert's meets there, as it would later.
        with ExitStack() as undisturbed:
            for module in {id(twin.module): twin.module for twin in twins}.values():
                undisturbed.enter_context(_undisturbed(module))
            for index, expert in enumerate(experts):
                alone = _alone(index, expert, stages[index], images, way)
                if alone is None:
                    if twins[0].module is twins[-1].module:
                        break  # as it is with all of one structure
                    continue
                if way is _WAYS[0]:
                    _check_classes(index, alone.output, classes)
                _compare(alone, experts, index, twins[index], stages[index], images, way)
                overwritten[index] = overwritten[index] or alone.overwritten
    return overwritten, classes[0]


def why_not_batched(stacked: nn.Module, images: Tensor, num_experts: int) -> str:
    """Why `vmap` over a stack does not run, in evaluation mode; "" where it does."""
    with apart(stacked, images), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it does slowly; nobody has asked for it yet
        try:
            run_stacked(stacked, images.clone(), num_experts, shared=True, batching="vmap")
        except Exception as error:  # whatever PyTorch and the network may raise
            return _line(error)
    return ""


def _check_classes(index: int, logits: Tensor, classes: list[int]) -> None:
    """Add an expert's number of classes, which is the others'."""
    classes.append(logits.shape[1])
    if classes[index] != classes[0]:
        raise ValueError(
            f"experts: expected number {index} to have {classes[0]} classes, as number 0, got {classes[index]}"
        )


def _check_parameters(index: int, expert: nn.Module) -> None:
    """Hooks of parameters are the parameters' own, which in the mixture are others."""
    for name, value in expert.named_parameters():
        if value._backward_hooks or getattr(value, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"experts: expected number {index} without a hook on the gradient of {name}, got one, which the "
                "mixture's parameter would not have: remove it, and give the mixture's its own"
            )


def _alone(index: int, expert: nn.Module, stage: str, images: Tensor, way: _Way) -> Pass | None:
    """An expert's own pass; None where it has none to compare with."""
    try:
        found = run_pass(
            expert, _weights(expert, own_tensors(expert), way), _as_loud(images, way), stage, way.mode, way.backward
        )
    except Exception as error:  # whatever a network may raise
        if way is not _WAYS[0]:
            return None
        raise ValueError(f"experts: expected number {index} to run alone, got {_line(error)}") from error
    if found.input_changed:
        raise ValueError(
            f"experts: expected number {index} to leave its images, which the others are to see, got others in place"
        )
    if way is _WAYS[0]:
        check_logits("experts", index, found.output, len(images))
    return found


def _compare(
    alone: Pass,
    experts: Sequence[nn.Module],
    index: int,
    twin: Twin,
    stage: str,
    images: Tensor,
    way: _Way,
) -> None:
    expert = experts[index]
    images = _as_loud(images, way)
    model_for = experts[0] if twin.shares else expert  # which all that is no tensor was taken of
    tensors = _weights(expert, twin.tensors, way)
    try:
        together = run_pass(twin.module, tensors, images, stage, way.mode, way.backward, restore=False)
    except Exception as error:
        if way.backward:  # as with a checkpoint's second pass; in training it is an error, and not everyone trains
            return
        reason = _reason(model_for, expert)
        raise ValueError(
            f"experts: expected number {index} to run in the mixture, as it does alone, got {_line(error)}; {reason}"
        ) from error
    for name in ("output", "maps", "buffers", "gradients"):
        gap = _gap(getattr(alone, name), getattr(together, name))
        if gap is None:
            continue
        again = run_pass(expert, _weights(expert, own_tensors(expert), way), images, stage, way.mode, way.backward)
        if gap <= 10 * (_gap(getattr(alone, name), getattr(again, name), exactly=True) or 0.0):
            continue  # by chance: it differs from itself
        what = {"output": "outputs", "maps": f"maps at {stage!r}", "buffers": "buffers", "gradients": "gradients"}[name]
        raise ValueError(
            f"experts: expected number {index} to have the {what} in the mixture that it has alone, got others by "
            f"up to {gap:.2g} on a probe image in {way.mode} mode; {_reason(model_for, expert)}"
        )


def _weights(expert: nn.Module, tensors: Mapping[str, Tensor], way: _Way) -> dict[str, Tensor]:
    if not way.moved:
        return dict(tensors)
    return moved(tensors, set(_weighed(expert)))


def _as_loud(images: Tensor, way: _Way) -> Tensor:
    return 20 * (images - 0.5) if way.loud else images


def run_pass(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    images: Tensor,
    stage: str | None = None,
    mode: str = "evaluation",
    backward: bool = False,
    *,
    restore: bool = True,
    stop: bool = False,
) -> Pass:
    """A pass with `tensors`, drawing from a seed; the network, buffers and PyTorch's random state stay as they are.

    Args:
        network: to run.
        tensors: its parameters and buffers, or others in their place.
        images: (B, C, H, W).
        stage: whose outputs are looked at.
        mode: "evaluation" or "training".
        backward: whether gradients are taken.
        restore: plain attributes are afterwards as they were.
        stop: when the stage has returned.
    """
    changing = {name for name, _ in network.named_buffers()}
    caught: list[tuple[Any, Any, int]] = []

    def catch(_module: nn.Module, _inputs: object, output: Any) -> None:
        found, _ = pick(output)
        if stop:
            caught.append((found, output if found is None else found, 0))
            raise _Reached
        kept = output if found is None else found.detach().clone()
        caught.append((found, kept, 0 if found is None else _version(found)))

    output, gradients = None, []
    with apart(network, images, mode, backward, restore):
        own = {name: t.detach().clone() if name in changing else t.detach() for name, t in tensors.items()}
        leaves = []
        if backward:
            own |= {name: own[name].clone().requires_grad_() for name in _weighed(network)}
            leaves = [images := images.clone().requires_grad_(), *(own[name] for name in _weighed(network))]
        images = images.clone()
        version = images._version
        hook = None if stage is None else network.get_submodule(stage).register_forward_hook(catch)
        try:
            output = call(network, own, images)
            if backward and isinstance(output, Tensor):
                gradients, output = _gradients(output, leaves), output.detach()
        except _Reached:
            pass
        finally:
            if hook is not None:
                hook.remove()
    changed = any(seen is not None and _version(seen) != version for seen, _, version in caught)
    maps, buffers = [kept for _, kept, _ in caught], {name: own[name] for name in sorted(changing)}
    return Pass(output, maps, buffers, changed and not stop, images._version != version, gradients)


@contextmanager
def apart(
    network: nn.Module, images: Tensor, mode: str = "evaluation", backward: bool = False, restore: bool = True
) -> Iterator[None]:
    """Passes that are nobody's: modes, attributes and random numbers are afterwards what they were; no autocast."""
    with (
        in_use(),
        _undisturbed(network, restore),
        _seeded(images.device),
        torch.inference_mode(False),
        torch.set_grad_enabled(backward),
        nullcontext() if images.is_meta else torch.autocast(images.device.type, enabled=False),
    ):
        for part in network.modules():
            part.training = mode == "training"
        _HERE.apart = getattr(_HERE, "apart", 0) + 1
        try:
            yield
        finally:
            _HERE.apart -= 1


def is_apart() -> bool:
    """Whether the pass that this thread is in is nobody's; hooks that count passes have to leave it alone."""
    return getattr(_HERE, "apart", 0) > 0


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, where that is counted."""
    return 0 if tensor.is_inference() else tensor._version


def _weighed(network: nn.Module) -> list[str]:
    """The parameters that a gradient may be taken of."""
    return [name for name, value in network.named_parameters() if value.is_floating_point()]


def _gradients(output: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of a sum of the outputs, no two counting alike, by the first leaf, and by all others in one tensor.

    In one, because rounding is measured by the largest: the gradient of a bias before a softmax is nothing else.
    """
    if not output.requires_grad:
        return []
    weights = torch.linspace(1, 2, output.numel(), device=output.device, dtype=output.dtype).view_as(output)
    found = torch.autograd.grad((weights * output).sum(), leaves, allow_unused=True, materialize_grads=True)
    return [found[0], torch.cat([part.flatten().to(found[0].dtype) for part in found[1:]] or [found[0].new_zeros(0)])]


@contextmanager
def _undisturbed(network: nn.Module, restore: bool = True) -> Iterator[None]:
    """Modes, plain attributes and generators, which begin at a seed, are afterwards what they were before."""
    before = [(part, dict(vars(part))) for part in network.modules()]
    values = [value for _, attributes in before for value in attributes.values()]
    generators = [(value, value.get_state()) for value in values if isinstance(value, torch.Generator)]
    for generator, _ in generators:
        generator.manual_seed(0)
    try:
        yield
    finally:
        for part, attributes in before if restore else ():
            vars(part).clear()
            vars(part).update(attributes)
        for generator, state in generators:
            generator.set_state(state)


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """PyTorch's and Python's random numbers begin at a seed, and go on afterwards where they were."""
    on_gpu = device.type == "cuda"
    state = random.getstate()
    with torch.random.fork_rng([device] if on_gpu else []):
        random.seed(0)
        torch.default_generator.manual_seed(0)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(state)


def noise(channels: int, height: int, width: int) -> Tensor:
    """Two images in [0, 1], the same ones at every call."""
    source = torch.Generator("cpu").manual_seed(0)
    return torch.rand(2, channels, height, width, generator=source, device="cpu")


def moved(tensors: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """The tensors, those of `names` moved by a tenth of their size; the same for equal ones."""
    source = torch.Generator("cpu").manual_seed(1)
    noise = torch.randn(2**16 + 1, generator=source, device="cpu")  # a prime, as no tensor's sides are
    result = {}
    for name, tensor in tensors.items():
        value = tensor.detach()
        if name in names and value.numel():
            size = value.float().square().mean().sqrt()
            moves = noise.repeat(1 + value.numel() // len(noise))[: value.numel()].view(value.shape).to(value.device)
            value = (value + 0.1 * torch.where(size > 0, size, 1) * moves).to(value.dtype)
        result[name] = value
    return result


def _gap(one: Any, other: Any, *, exactly: bool = False) -> float | None:
    """The largest difference of two results, infinite for other shapes; None if there is none (beyond rounding)."""
    mine, theirs = tree_leaves(one), tree_leaves(other)
    if len(mine) != len(theirs):
        return float("inf")
    largest = 0.0
    for x, y in zip(mine, theirs, strict=True):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.is_meta or not x.numel():
            continue
        if x.shape != y.shape:
            return float("inf")
        table = _TOLERANCE_CUDA if x.is_cuda else _TOLERANCE
        tolerance = 0.0 if exactly else table.get(x.dtype, _TOLERANCE_HALF if x.is_floating_point() else 0.0)
        x, y = x.to("cpu", torch.float64), y.to("cpu", torch.float64)
        scale = float(x[x.isfinite()].abs().max()) if bool(x.isfinite().any()) else 0.0
        if not torch.allclose(x, y, rtol=0, atol=tolerance * scale, equal_nan=True):
            largest = max(largest, float((x - y).abs().nan_to_num(float("inf")).max()))
    return largest or None


def _reason(first: nn.Module, expert: nn.Module) -> str:
    """In what two experts differ that a stack does not hold, as far as it can be told."""
    if expert is first:
        return "a function or hook of it reaches modules of the network that it was made for; a copy has its own"
    try:
        found = list(_differences(first, expert))[:3]
    except Exception:  # attributes may be anything, and compare in any way
        found = []
    if found:
        return f"it differs from number 0 in {' and '.join(found)}: make that a parameter or buffer, or equal"
    return "it differs from number 0 in what is no parameter or buffer, such as an attribute, a function or a hook"


def _differences(first: nn.Module, other: nn.Module) -> Iterator[str]:
    """Attributes that differ, by their dotted names."""
    own = vars(nn.Module())
    for (prefix, mine), (_, theirs) in zip(first.named_modules(), other.named_modules(), strict=False):
        for name, value in vars(mine).items():
            if name in own and "forward" not in name and "backward" not in name:
                continue
            another = vars(theirs).get(name)
            if "hooks" in name:  # by a number that is each hook's own
                value, another = list(value.values()), list(another.values()) if another else []
            if _are_equal(value, another):
                continue
            short = isinstance(value, (int, float, str)) and isinstance(another, (int, float, str))
            values = f" ({value!r:.40} and {another!r:.40})" if short else ""
            yield f"{prefix}.{name}{values}" if prefix else f"{name}{values}"


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two attributes are the same, as far as that can be seen; what nobody can compare counts as equal."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_are_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    if isinstance(one, types.FunctionType):
        cells = [[cell.cell_contents for cell in function.__closure__ or ()] for function in (one, other)]
        codes = [(code.co_code, code.co_consts, code.co_names) for code in (one.__code__, other.__code__)]
        return codes[0] == codes[1] and _are_equal(one.__defaults__, other.__defaults__) and _are_equal(*cells)
    if isinstance(one, functools.partial):
        return _are_equal((one.func, one.args, one.keywords), (other.func, other.args, other.keywords))
    if isinstance(one, nn.Module):
        return _are_equal(own_tensors(one), own_tensors(other)) and not any(_differences(one, other))
    if isinstance(one, (int, float, complex, str, bytes, torch.dtype, torch.device)):
        return bool(one == other)
    if isinstance(one, types.BuiltinFunctionType):
        return False
    return _are_equal(vars(one), vars(other)) if hasattr(one, "__dict__") else True


def _line(error: Exception | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
