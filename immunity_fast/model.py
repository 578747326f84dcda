"""`ImmunityMoE`: N experts and a Random Switch Gate as one `nn.Module` from images to log-probabilities."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call

from immunity_fast.batching import call_stacked, run_stacked, slices, stack_modules, unstack_modules
from immunity_fast.experts import create
from immunity_fast.experts.staged import StagedNetwork, default_stage, split
from immunity_fast.functional import Experts, check_choice, mixture_log_probabilities
from immunity_fast.gate import RandomSwitchGate, Switch
from immunity_fast.strategies import Batching, choose

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
        _check_number(num_experts)
        self._assemble(
            [create(arch, num_classes) for _ in range(num_experts)],
            RandomSwitchGate(num_experts, switch=switch, generator=generator),
            stage,
            image_size,
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
    ) -> "ImmunityMoE":
        """A mixture of the user's own networks, which are copied.

        Args:
            experts: at least 2 modules from images (B, 3, H, W) to logits (B, K), of the same structure. An
                `nn.Sequential` is split at a child; any other module, or one with a `forward` of its own, runs whole,
                and its activations are caught on the way, so that `expert_outputs` gives them as a list.
            gate: None is a new `RandomSwitchGate` with `switch` and `generator`, which a given gate has of its own.
            stage: the child, or (not for `nn.Sequential`) the dotted name of any submodule, whose output Grad-CAM
                looks at; None is the last direct child whose map exceeds 8×8.
            image_size, batching: see the class.
            mean, std: normalisation before the experts and the gate; None is none: the experts do their own.

        Raises:
            ValueError: fewer than 2 experts, experts of different structure, an unknown stage, a mean without a std.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.arch = ""
        _check_number(len(experts))
        if gate is None:
            gate = RandomSwitchGate(len(experts), switch=switch, generator=generator)
        if (mean is None) != (std is None):
            raise ValueError(f"mean, std: expected both or neither, got {mean} and {std}")
        normalize = nn.Identity() if mean is None or std is None else Normalize(mean, std)
        model._assemble(experts, gate, stage, image_size, batching, normalize)
        return model

    def _assemble(
        self,
        experts: Sequence[nn.Module],
        gate: RandomSwitchGate,
        stage: str | None,
        image_size: int | tuple[int, int],
        batching: Batching,
        normalize: nn.Module,
    ) -> None:
        check_choice("batching", batching, Batching)
        self.num_experts = len(experts)
        self.batching: Batching = batching
        self.stage = default_stage(experts[0], image_size) if stage is None else stage
        self.normalize = normalize
        self.gate = gate
        self.experts = stack_modules(experts)
        # A tuple, so that the two halves, which share the experts' modules, are not registered a second time.
        self._halves = split(self.experts, self.stage) if _is_chain(self.experts) else None
        if self._halves is None and self.stage not in dict(self.experts.named_modules()):
            raise ValueError(f"stage: the experts have no submodule {self.stage!r}")

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, num_classes) of `images` (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: images of another shape.
            TypeError: images that are not floating-point.
        """
        x = self._normalized(images)
        return mixture_log_probabilities(self._logits(x), self.gate(x))

    def expert_logits(self, images: Tensor) -> Tensor:
        """Logits (N, B, K) of `images` (B, 3, H, W) in [0, 1]: all of the model that is not the gate.

        Raises:
            ValueError, TypeError: as for `forward`.
        """
        return self._logits(self._normalized(images))

    def first_of_two(self, images: Tensor) -> Tensor:
        """`expert_logits`, where another forward pass comes before the backward pass of both.

        BatchNorm in training mode keeps its running statistics for the backward pass, and a second forward pass would
        change them: here they are copies, written back.
        """
        x = self._normalized(images)
        inputs = x.expand(self.num_experts, *x.shape)
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
        logits = run_stacked(self._halves[1], maps, self.num_experts, shared=False, batching=self._batching(maps))
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
        for name, buffer in self._cut()[1].named_buffers():
            buffer.copy_(buffers[name])

    def unstack(self) -> list[nn.Module]:
        """N ordinary modules from images in [0, 1] to logits, with tensors of their own.

        Where the model normalises, so does each module, in a first child called `normalize`.
        """
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
            raise ValueError("experts: expected an nn.Sequential, which can be cut into a trunk and a head")
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

        def catch(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            caught.append(output)

        hook = self.experts.get_submodule(self.stage).register_forward_hook(catch)
        try:
            logits = [functional_call(self.experts, own, (x,)) for own in slices(self.experts, self.num_experts)]
        finally:
            hook.remove()
        return torch.stack(logits), caught


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
        self._assemble([create(arch, num_classes)], gate, stage, image_size, batching, Normalize(mean, std))


class _NoChoice(nn.Module):
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
        """Normalised images, of the same shape."""
        if images.shape[-3] != self.mean.shape[0]:
            raise ValueError(f"images: expected shape (B, {self.mean.shape[0]}, H, W), got {tuple(images.shape)}")
        return (images - self.mean) / self.std


def _check_number(experts: int) -> None:
    if experts < 2:
        raise ValueError(f"num_experts: expected at least 2, got {experts}")


def _is_chain(network: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether running its children one after another is all that it does."""
    return isinstance(network, nn.Sequential) and type(network).forward is nn.Sequential.forward


def _prepend(normalize: nn.Module, network: nn.Module) -> nn.Module:
    if _is_chain(network):
        # Not named_children(): it drops the second use of a module that stands in the chain twice. And a subclass of
        # the user's may take other arguments than children.
        kind = StagedNetwork if isinstance(network, StagedNetwork) else nn.Sequential
        return kind(OrderedDict([("normalize", normalize), *network._modules.items()]))
    return nn.Sequential(OrderedDict([("normalize", normalize), ("expert", network)]))
