"""`ImmunityMoE`: N experts and a Random Switch Gate as one `nn.Module` from images to log-probabilities."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from immunity_fast.arguments import Experts, Layout, channels_back, channels_first
from immunity_fast.experts import create
from immunity_fast.experts.staged import StagedNetwork, default_stage, split
from immunity_fast.functional import log_mixture
from immunity_fast.models import probe
from immunity_fast.models.gate import RandomSwitchGate, Switch
from immunity_fast.models.stacking import (
    call,
    call_stacked,
    expert_by_expert,
    in_use,
    run_stacked,
    slices,
    stack_modules,
    unstack_modules,
)
from immunity_fast.runtime.checks import check_choice, check_whole
from immunity_fast.runtime.strategies import Batching, choose

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class ImmunityMoE(nn.Module):
    """A mixture of N experts, arXiv 2402.18787 eq. (1): images in [0, 1], (B, 3, H, W), to log ŷ, (B, num_classes).

    In evaluation mode the gate's weights are permuted at random, as `model.gate.switch` says; see `RandomSwitchGate`.

    Args:
        arch: a name of `immunity_fast.experts.NAMES`, or a genotype file, `….json`.
        num_experts: N ≥ 2. Each expert is initialised on its own.
        num_classes: K ≥ 2.
        stage: where Grad-CAM looks, a name of the architecture's stages; None is the last stage whose map exceeds 8×8.
        image_size: the images' side or (H, W); only the default of `stage` depends on it.
        switch: what the gate does in evaluation mode.
        generator: where the gate's permutations come from; None is PyTorch's default generator.
        batching: "loop" or "vmap" over the experts; "auto" is what was measured to be faster, see `strategies`.
        mean, std: per channel, of images in [0, 1]; the model normalises with them itself. Default: CIFAR-10's.

    Raises:
        ValueError: an unknown name, or a number out of its range.
        TypeError: a number of experts that is no whole number.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        num_experts: int = 5,
        num_classes: int = 10,
        *,
        stage: str | None = None,
        image_size: int | tuple[int, int] = 32,
        switch: Switch = "call",
        generator: torch.Generator | None = None,
        batching: Batching = "auto",
        mean: Sequence[float] = CIFAR10_MEAN,
        std: Sequence[float] = CIFAR10_STD,
    ) -> None:
        super().__init__()
        self.arch = arch
        check_whole("num_experts", num_experts, 2)
        experts = [create(arch, num_classes) for _ in range(num_experts)]
        self._assemble(
            experts,
            RandomSwitchGate(num_experts, switch=switch, generator=generator),
            default_stage(experts[0], image_size) if stage is None else stage,
            batching,
            Normalize(mean, std),
        )

    @classmethod
    def from_experts(
        cls,
        experts: Sequence[nn.Module],
        *,
        gate: RandomSwitchGate | None = None,
        stage: str | None = None,
        image_size: int | tuple[int, int] = 32,
        switch: Switch = "call",
        generator: torch.Generator | None = None,
        batching: Batching = "auto",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        layout: Layout | None = None,
    ) -> "ImmunityMoE":
        """A mixture of the user's own networks, which are copied.

        They run on two images, some 8·N passes and 2·N backward, and are refused unless each computes in the mixture
        what it computes alone, gradients included: of what is no parameter and no buffer (plain attributes, functions,
        hooks) the mixture has number 0's. Weights, statistics, modes and PyTorch's random state stay as they are; hooks
        are called.
        Where an in-place operation follows on `stage`, it gets a copy of the activations.

        Args:
            experts: at least 2 modules from images (B, 3, H, W) to logits (B, K), of the same structure. An
                `nn.Sequential` is split at a child; any other module, or one with a `forward` or hooks of its own, runs
                whole, and its activations are caught on the way, so that `expert_outputs` gives them as a list.
            gate: None is a new `RandomSwitchGate` with `switch` and `generator`, which a given gate has of its own.
            stage: the child, or (not for `nn.Sequential`) the dotted name of any submodule, whose output Grad-CAM
                looks at; None is the last direct child whose map exceeds 8×8.
            image_size: the images' side or (H, W), which the experts have to accept.
            batching: see the class.
            mean, std: normalisation before the experts and the gate; None is none: the experts do their own.
            layout: the order of the axes of what `stage` returns, "NCHW" for (B, C, h, w), or "NHWC" for (B, h, w, C),
                as in a Swin Transformer; None finds out. The model's activations are (B, C, h, w) either way.

        Raises:
            ValueError: fewer than 2 experts, experts that differ in more than tensors, or do not run, an unknown stage,
                one that returns no map or whose layout cannot be told, a mean without a std.
            TypeError: no list of modules.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.arch = ""
        experts = _check_experts(experts)
        if gate is None:
            gate = RandomSwitchGate(len(experts), switch=switch, generator=generator)
        if (mean is None) != (std is None):
            raise ValueError(f"mean, std: expected both or neither, got {mean} and {std}")
        if layout is not None:
            check_choice("layout", layout, Layout)
        normalize = nn.Identity() if mean is None or std is None else Normalize(mean, std)
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        images = probe.find_images(experts[0], sides, None if mean is None else len(mean))
        if stage is None:
            stage = default_stage(experts[0], tuple(images.shape[2:]), layout=layout, like=images)  # type: ignore[arg-type]
        _check_stage(experts[0], stage)
        probe.check_stage(experts[0], stage, images, several=_is_chain(experts[0]))
        layout = layout or probe.find_layout(experts[0], stage, images)
        model._assemble(experts, gate, stage, batching, normalize)
        overwritten = probe.check_alike(experts, model.experts, stage, images)
        model._read(layout, overwritten)
        return model

    def _assemble(
        self,
        experts: Sequence[nn.Module],
        gate: RandomSwitchGate,
        stage: str,
        batching: Batching,
        normalize: nn.Module,
    ) -> None:
        check_choice("batching", batching, Batching)
        _check_stage(experts[0], stage)
        self.num_experts = len(experts)
        self.batching: Batching = batching
        self.stage = stage
        self.normalize = normalize
        self.gate = gate
        self.experts = stack_modules(experts)
        self._read("NCHW", False)

    def _read(self, layout: Layout, overwritten: bool) -> None:
        """Take the stage's maps, of such a layout, as (B, C, h, w); what follows gets a copy if it changes them."""
        self.layout, self._overwritten = layout, overwritten
        # A tuple, so that the two halves, which share the experts' modules, are not registered a second time.
        self._halves: tuple[nn.Sequential, nn.Sequential] | None = None
        if _is_chain(self.experts):
            trunk, head = split(self.experts, self.stage)
            if layout == "NHWC" or overwritten:
                trunk = _chain([*trunk._modules.items(), ("channels first", _ToRead(layout))])
                head = _chain([("channels back", _FromRead(layout, overwritten)), *head._modules.items()])
            self._halves = trunk, head

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, num_classes) of `images` (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: images of another shape.
            TypeError: images that are not floating-point.
        """
        x = self._normalized(images)
        return log_mixture(self._logits(x), self.gate(x))

    def expert_logits(self, images: Tensor) -> Tensor:
        """Logits (N, B, K) of `images` (B, 3, H, W) in [0, 1]: all of the model that is not the gate.

        Raises:
            ValueError, TypeError: as for `forward`.
        """
        return self._logits(self._normalized(images))

    def expert_logits_with_copied_buffers(self, images: Tensor) -> Tensor:
        """`expert_logits`, where another forward pass comes before the backward pass of both.

        BatchNorm in training mode keeps its running statistics for the backward pass, and a second forward pass would
        change them: here they are copies, written back.
        """
        x = self._normalized(images)
        inputs = x.expand(self.num_experts, *x.shape)
        with in_use():
            logits, buffers = call_stacked(self.experts, inputs, self.num_experts, batching=self._batching(x))
            for name, buffer in self.experts.named_buffers():
                buffer.copy_(buffers[name])
        return logits

    def gate_weights(self, images: Tensor) -> Tensor:
        """The gate's weights (B, N) for `images` (B, 3, H, W) in [0, 1], in the mode the model is in."""
        weights: Tensor = self.gate(self._normalized(images))
        return weights

    def expert_outputs(self, images: Tensor) -> tuple[Tensor, Experts, Tensor]:
        """What `FusedImmunityLoss` takes: logits (N, B, K), activations (N, B, C, h, w) in their graph, gate (B, N).

        The activations are a list of N tensors (B, C, h, w) if the experts are not an `nn.Sequential`.
        """
        if self._halves is None:
            x = self._normalized(images)
            logits, activations = self._run_whole(x)
            return logits, activations, self.gate(x)
        maps, weights = self.trunk_outputs(images)
        version = _version(maps)
        logits = run_stacked(self._halves[1], maps, self.num_experts, shared=False, batching=self._batching(maps))
        self._check_kept([maps], [version])
        return logits, maps, weights

    @property
    def has_head(self) -> bool:
        """Whether the experts are an `nn.Sequential`, which can be cut at the stage that Grad-CAM looks at."""
        return self._halves is not None

    def trunk_outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Activations (N, B, C, h, w) and the gate's weights (B, N); the first half of `expert_outputs`."""
        x = self._normalized(images)
        maps = run_stacked(self._cut()[0], x, self.num_experts, shared=True, batching=self._batching(x))
        return maps, self.gate(x)

    def head_outputs(self, activations: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The second half of `expert_outputs`, as a function: for `FusedImmunityLoss.from_head` with `has_aux=True`.

        Args:
            activations: (N, B, C, h, w).

        Returns:
            Logits (N, B, K), and the buffers that `update_head` takes.
        """
        return call_stacked(self._cut()[1], activations, self.num_experts, batching=self._batching(activations))

    def update_head(self, buffers: dict[str, Tensor]) -> None:
        """Take over what a pass through `head_outputs` made of the head's buffers, such as BatchNorm's statistics."""
        own = dict(self._cut()[1].named_buffers())
        with in_use(), _unseen(own):
            for name, buffer in own.items():
                buffer.copy_(buffers[name])

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters and their names; never those of a pass that is under way in another thread."""
        with in_use():
            return iter(list(super().named_parameters(*args, **kwargs)))

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The buffers and their names; never those of a pass that is under way in another thread."""
        with in_use():
            return iter(list(super().named_buffers(*args, **kwargs)))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's state; never that of a pass that is under way in another thread."""
        with in_use():
            return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Take over a state, once no pass is under way in another thread."""
        with in_use():
            return super().load_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ImmunityMoE":
        """A copy, made while no pass is under way in another thread."""
        with in_use():
            memo[id(self)] = twin = type(self).__new__(type(self))
            twin.__setstate__(copy.deepcopy(vars(self), memo))  # type: ignore[no-untyped-call]
        return twin

    def unstack(self) -> list[nn.Module]:
        """N ordinary modules from images in [0, 1] to logits, with tensors of their own.

        Where the model normalises, so does each module, in a first child called `normalize`.
        """
        with in_use():
            modules = unstack_modules(self.experts, self.num_experts)
        if isinstance(self.normalize, nn.Identity):
            return modules
        return [_prepend(copy.deepcopy(self.normalize), module) for module in modules]

    def _logits(self, x: Tensor) -> Tensor:
        return run_stacked(self.experts, x, self.num_experts, shared=True, batching=self._batching(x))

    def _batching(self, x: Tensor) -> Batching:
        return choose(self.batching, x.device, self.arch)

    def _cut(self) -> tuple[nn.Sequential, nn.Sequential]:
        if self._halves is None:
            raise ValueError(
                "experts: expected nn.Sequential, which can be cut into a trunk and a head, got networks that cannot"
            )
        return self._halves

    def _normalized(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = getattr(images, "dtype", type(images).__name__)
            raise TypeError(f"images: expected a floating-point tensor in [0, 1], got {kind}")
        if images.dim() != 4:
            raise ValueError(f"images: expected shape (B, 3, H, W), got {tuple(images.shape)}")
        normalized: Tensor = self.normalize(images)
        return normalized

    def _run_whole(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One expert after another: the activations inside a `vmap` are in no graph outside of it."""
        caught: list[Tensor] = []
        versions: list[int] = []
        inward, back = _ToRead(self.layout), _FromRead(self.layout, self._overwritten)

        def catch(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            maps = inward(output)
            caught.append(maps)
            versions.append(_version(maps))
            onward: Tensor = back(maps)  # in the graph behind `maps`
            return onward

        with in_use():
            hook = self.experts.get_submodule(self.stage).register_forward_hook(catch)
            try:
                logits = [call(self.experts, own, x) for own in slices(self.experts, self.num_experts)]
            finally:
                hook.remove()
        self._check_kept(caught, versions)
        return torch.stack(logits), caught

    def _check_kept(self, maps: Sequence[Tensor], versions: Sequence[int]) -> None:
        """What Grad-CAM looks at must be what the stage returned."""
        if any(_version(part) != version for part, version in zip(maps, versions, strict=True)):
            raise ValueError(
                f"stage: expected the output of {self.stage!r} to stay as it is, got one that an in-place operation "
                "behind it has changed; make it inplace=False, or the mixture anew, which then copies the output"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ImmunityMoE":
        """`nn.Module`'s, which `to` and its like call: of stacked tensors each expert's own is converted."""
        with in_use():
            if recurse:
                for child in self.children():
                    child._apply(expert_by_expert(fn) if child is self.experts else fn)  # type: ignore[no-untyped-call]
            super()._apply(fn, recurse=False)  # type: ignore[no-untyped-call]
        return self


class SingleNetwork(ImmunityMoE):
    """One network alone, the baseline, as a mixture of one: its gate has nothing to choose, and no parameters.

    Args:
        arch, num_classes, stage, image_size, batching, mean, std: see `ImmunityMoE`.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        num_classes: int = 10,
        *,
        stage: str | None = None,
        image_size: int | tuple[int, int] = 32,
        batching: Batching = "auto",
        mean: Sequence[float] = CIFAR10_MEAN,
        std: Sequence[float] = CIFAR10_STD,
    ) -> None:
        nn.Module.__init__(self)
        self.arch = arch
        gate = RandomSwitchGate(1, _NoChoice())
        network = create(arch, num_classes)
        stage = default_stage(network, image_size) if stage is None else stage
        self._assemble([network], gate, stage, batching, Normalize(mean, std))


class ExactMean(nn.Module):
    """A mixture by the exact mean of its gate; of one network, that network."""

    def __init__(self, model: ImmunityMoE) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with self.model.gate.switched("mean"):
            outputs: Tensor = self.model(images)
        return outputs


class _ToRead(nn.Module):
    """A stage's maps as (B, C, h, w)."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, maps: Tensor) -> Tensor:
        """A view of the maps as (B, C, h, w)."""
        return channels_first(maps, self.layout)


class _FromRead(nn.Module):
    """The inverse of `_ToRead`; a copy, where what follows would change the maps."""

    def __init__(self, layout: Layout, overwritten: bool) -> None:
        super().__init__()
        self.layout, self.overwritten = layout, overwritten

    def forward(self, maps: Tensor) -> Tensor:
        """Maps as the stage returned them."""
        back = channels_back(maps, self.layout)
        return back.clone() if self.overwritten else back


class _NoChoice(nn.Module):
    """A gate's network where there is one expert alone."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1) of the only weight there is."""
        return images.new_zeros(len(images), 1)


class Normalize(nn.Module):
    """(x − mean) / std per channel, for images (B, channels, H, W)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean, std: expected as many, std positive, got {tuple(mean)} and {tuple(std)}")
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images, of the same shape.

        Raises:
            ValueError: images of another number of channels.
        """
        if images.shape[-3] != self.mean.shape[0]:
            raise ValueError(f"images: expected shape (B, {self.mean.shape[0]}, H, W), got {tuple(images.shape)}")
        return (images - self.mean) / self.std


def _check_experts(experts: object) -> list[nn.Module]:
    if not isinstance(experts, Iterable) or isinstance(experts, (str, Tensor)):
        raise TypeError(f"experts: expected a list of at least 2 modules, got {type(experts).__name__}")
    modules: list[nn.Module] = []
    for expert in experts:
        if not isinstance(expert, nn.Module):
            raise TypeError(f"experts: expected modules, got {type(expert).__name__} as number {len(modules)}")
        modules.append(expert)
    if len(modules) < 2:
        raise ValueError(f"experts: expected at least 2 modules, got {len(modules)}")
    return modules


def _check_stage(network: nn.Module, stage: str) -> None:
    if _is_chain(network):
        split(network, stage)
    elif stage not in dict(network.named_modules(remove_duplicate=False)):  # by any of a module's names
        raise ValueError(f"stage: expected a submodule of the experts, got {stage!r}")


def _is_chain(network: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether running its children one after another is all that it does."""
    own = vars(network)
    is_plain = "forward" not in own and not network._forward_hooks and not network._forward_pre_hooks
    return isinstance(network, nn.Sequential) and type(network).forward is nn.Sequential.forward and is_plain


def _chain(children: Sequence[tuple[str, Any]]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(children))


def _unseen(buffers: dict[str, Tensor]) -> AbstractContextManager[object]:
    """Where autograd does not see that buffers change.

    A BatchNorm in both halves has kept its own for the trunk's backward pass, which in training mode never looks.
    """
    return nullcontext() if torch.compiler.is_compiling() else _unsafe_preserve_version_counter(tuple(buffers.values()))


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, where that is counted."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _prepend(normalize: nn.Module, network: nn.Module) -> nn.Module:
    if _is_chain(network) and "normalize" not in network._modules:
        # Not named_children(): it drops the second use of a module that stands in the chain twice. And a subclass of
        # the user's may take other arguments than children.
        kind = StagedNetwork if isinstance(network, StagedNetwork) else nn.Sequential
        chain = kind(OrderedDict([("normalize", normalize), *network._modules.items()]))
    else:
        chain = nn.Sequential(OrderedDict([("normalize", normalize), ("expert", network)]))
    chain.training = network.training  # which the children have
    return chain
