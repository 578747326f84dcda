"""`ImmunityMoE`: N experts and a Random Switch Gate as one `nn.Module` from images to log-probabilities."""

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, overload

import torch
from torch import Tensor, nn

from immunity_fast.arguments import Experts, Score, WeightScale
from immunity_fast.experts import identical
from immunity_fast.experts.packed import packed
from immunity_fast.experts.registry import check_trusted
from immunity_fast.experts.stems import Stem, StemChoice, chosen_stem
from immunity_fast.functional import log_mixture
from immunity_fast.losses import FusedImmunityLoss, ImmunityTerms
from immunity_fast.models import pretrained
from immunity_fast.models.assembly import Assembly, Layouts, Stages, assembled, check_classes, check_experts, from_names
from immunity_fast.models.attention import MathAttention
from immunity_fast.models.catching import Catcher, catch, check_kept, version
from immunity_fast.models.chains import halves, is_chain, prepended
from immunity_fast.models.expert_list import ExpertList
from immunity_fast.models.gate import FixedWeights, GateKind, RandomSwitchGate, Switch, gate_of
from immunity_fast.models.gradcam import expert_heatmaps
from immunity_fast.models.inference import Gate as InferenceGate
from immunity_fast.models.inference import InferenceMixture, folded
from immunity_fast.models.layers import NoChoice, Normalize, channels_last
from immunity_fast.models.maps import MapLayout, Reshape
from immunity_fast.models.noise import Noise, add_noise_, check_noise, has_noise
from immunity_fast.models.objective import loss_and_terms
from immunity_fast.models.recomputing import parts_recomputed, run_recomputed
from immunity_fast.models.stacking import (
    call,
    call_stacked,
    expert_by_expert,
    in_use,
    run_stacked,
    slices,
    stack_maps,
    unstack_modules,
    write_back,
)
from immunity_fast.runtime.checks import check_choice, check_whole, kind_given
from immunity_fast.runtime.compilation import eagerly
from immunity_fast.runtime.distributed import training_group
from immunity_fast.runtime.strategies import Batching, MemoryFormat, Use, choose, laid_out
from immunity_fast.selection import fixed_weights, mean_mixture

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class UnsynchronisedWarning(UserWarning):
    """A mixture is trained in several processes by a forward pass whose gradients nobody averages."""


class ImmunityMoE(nn.Module):
    """A mixture of N experts, arXiv 2402.18787 eq. (1): images in [0, 1], (B, C, H, W), to log ŷ, (B, num_classes).

    In evaluation mode the gate's weights are permuted at random, as `model.gate.switch` says; see `RandomSwitchGate`.

    Args:
        arch: a name that `immunity_fast.experts.create` takes: of `immunity_fast.experts.NAMES`, a genotype file,
            `….json`, or a network of another library. Several, with commas or in a list, take turns. Experts of one
            structure are one stack, of different ones a list, which runs in a loop.
        num_experts: N ≥ 2. Each expert is initialised on its own.
        num_classes: K ≥ 2.
        stage: where Grad-CAM looks, a name of the architecture's stages, or one an expert; None is the last stage whose
            map exceeds 8×8.
        image_size: the images' side or (H, W); the default of `stage` depends on it.
        stem: with what `resnet18`, `googlenet` and `densenet121` begin, "cifar" or "imagenet"; "auto" is that for
            ImageNet where the images' smaller side exceeds 64 pixels. Others have one form.
        channels: of the images: 3, 1 for grey ones, or any other number.
        switch: what the gate does in evaluation mode.
        generator: where the gate's permutations come from; None is PyTorch's default generator.
        batching: "loop" or "vmap" over the experts; "auto" is what was measured to be faster, see `strategies`.
        mean, std: per channel, of images in [0, 1]; the model normalises with them itself. Default: CIFAR-10's where
            there are 3 channels, else 0.5 and 0.25 of each.
        classes: the classes' names, as many as there are; None where nobody has named them.
        loss_fn: what `model(images, labels)` gives, an attribute; None is `FusedImmunityLoss` with heatmaps of
            `image_size`.
        gate: the kind of gate: "switch", the paper's; "uniform", 1/N each; "selection", one expert at random.
        noise: standard deviations of Gaussian noise before each expert's first convolution and before its others, in
            either mode, as random self-ensembles have it; None is no noise. See `models.noise`.

    Attributes:
        checkpoint_activations: whether the trunk's activations are not kept for the backward pass, but computed again
            in it, stage by stage, and where nothing is differentiated twice the head's, too: less memory, more time,
            the same numbers.
        image_size, channels: (H, W) and C of the images that it was made for.
        num_classes: K.
        classes: their names, or None.
        noise: the two standard deviations, or None.
        card: the model card that `save_pretrained` writes, in Markdown; None is one that says what the model is.
        stem: with what architectures of two forms begin; None of networks of the user's.
        memory_format: how images and maps lie in memory, "contiguous" or "channels_last"; "auto" is what was measured
            to be faster, see `strategies`.
        stage, layout: where Grad-CAM looks, and the axes of what it sees there; of experts that differ in it a tuple.

    Raises:
        ValueError: an unknown name, or a number out of its range.
        TypeError: a number of experts that is no whole number, or classes that are no names.
    """

    _fewest: ClassVar[int] = 2  # experts
    _warned = False  # of gradients that are not averaged
    checkpoint_activations: bool = False
    noise: Noise | None = None

    def __init__(
        self,
        arch: str | Sequence[str] = "resnet18",
        num_experts: int = 5,
        num_classes: int = 10,
        *,
        stage: Stages = None,
        image_size: int | tuple[int, int] = 32,
        stem: StemChoice = "auto",
        channels: int = 3,
        switch: Switch = "call",
        generator: torch.Generator | None = None,
        batching: Batching = "auto",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
        loss_fn: FusedImmunityLoss | None = None,
        gate: GateKind = "switch",
        noise: Noise | None = None,
    ) -> None:
        super().__init__()
        self.arch = arch if isinstance(arch, str) else ",".join(arch)
        self.stem: Stem | None = chosen_stem(stem, image_size)
        check_whole("num_experts", num_experts, 2)
        parts = from_names(
            arch,
            num_experts,
            num_classes,
            stage=stage,
            image_size=image_size,
            channels=channels,
            batching=batching,
            stem=stem,
        )
        gating = gate_of(gate, num_experts, switch=switch, generator=generator, channels=channels)
        self._hold(parts, gating, _normalize(mean, std, channels), classes, loss_fn, noise)

    @classmethod
    def from_experts(
        cls,
        experts: Sequence[nn.Module],
        *,
        gate: RandomSwitchGate | None = None,
        stage: Stages = None,
        image_size: int | tuple[int, int] = 32,
        switch: Switch = "call",
        generator: torch.Generator | None = None,
        batching: Batching = "auto",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        layout: Layouts = None,
        classes: Sequence[str] | None = None,
        loss_fn: FusedImmunityLoss | None = None,
        noise: Noise | None = None,
    ) -> "ImmunityMoE":
        """A mixture of the user's own networks, which are copied.

        They run on two images, some 8·N passes and 2·N backward, and are refused unless each computes in the mixture
        what it computes alone, gradients included. Networks of one structure become one stack: of what is no parameter
        and no buffer (plain attributes, functions, hooks) the mixture has number 0's. Networks of different structures
        stay modules of their own, which run one after another. Weights, statistics, modes and PyTorch's random state
        stay as they are; hooks are called.
        Where an in-place operation follows on `stage`, it gets a copy of the activations. Of experts with equal
        weights, which training never parts, a warning says so: `immunity_fast.experts.perturb_` parts them.

        Args:
            experts: at least 2 modules from images (B, C, H, W) to logits (B, K). Where all are an `nn.Sequential` of
                one structure they are split at a child; any other module, or one with a `forward` or hooks of its own,
                runs whole, and its activations are caught on the way, so that `expert_outputs` gives them as a list.
            gate: None is a new `RandomSwitchGate` with `switch` and `generator`, which a given gate has of its own.
            stage: the child, or (not for `nn.Sequential`) the dotted name of any submodule, whose output Grad-CAM
                looks at, or one an expert; None is the last whose map exceeds 8×8 and changes the logits, of the
                direct children before others.
            image_size: the images' side or (H, W), which the experts have to accept.
            batching: see the class; "vmap" is for experts of one structure that it can run; of others "auto" is a loop.
            mean, std: normalisation before the experts and the gate; None is none: the experts do their own.
            layout: what `stage` returns, "NCHW" for (B, C, h, w), "NHWC" for (B, h, w, C), as in a Swin Transformer,
                "tokens" for (B, T, C), as in a ViT, or a function of it to (B, C, h, w), or one an expert; None finds
                out. The model's activations are (B, C, h, w) either way.
            classes, loss_fn, noise: see the class; with noise the experts are looked at before they have it.

        Raises:
            ValueError: fewer than 2 experts, experts that do not run, or in the mixture otherwise than alone, or have
                other classes, an unknown stage, one that returns no map or whose layout cannot be told, a mean without
                a std.
            TypeError: no list of modules.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.arch, model.stem = "", None
        modules = check_experts(experts, cls._fewest)
        if pairs := identical(modules):
            alike = " and ".join(f"{later} as {earlier}" for earlier, later in pairs)
            warnings.warn(
                f"experts: expected weights of their own, got number {alike}, which training never parts: give each a "
                "fresh head, or a little noise, immunity_fast.experts.perturb_(experts)",
                stacklevel=2,
            )
        if (mean is None) != (std is None):
            raise ValueError(f"mean, std: expected both or neither, got {mean} and {std}")
        normalize = nn.Identity() if mean is None or std is None else Normalize(mean, std)
        parts = assembled(
            modules,
            stage=stage,
            image_size=image_size,
            channels=None if mean is None else len(mean),
            batching=batching,
            layout=layout,
        )
        if gate is None:
            gate = cls._gate(len(modules), switch, generator, parts.channels)
        model._hold(parts, gate, normalize, classes, loss_fn, noise)
        return model

    @classmethod
    def _gate(
        cls, num_experts: int, switch: Switch, generator: torch.Generator | None, channels: int
    ) -> RandomSwitchGate:
        return RandomSwitchGate(num_experts, switch=switch, generator=generator, channels=channels)

    def _hold(
        self,
        parts: Assembly,
        gate: RandomSwitchGate,
        normalize: nn.Module,
        classes: Sequence[str] | None,
        loss_fn: FusedImmunityLoss | None,
        noise: Noise | None,
    ) -> None:
        self.num_experts = len(parts.stages)
        self.num_classes, self.image_size = parts.num_classes, parts.image_size
        self.loss_fn = FusedImmunityLoss(size=self.image_size) if loss_fn is None else loss_fn
        self.channels = parts.channels
        self.card: str | None = None
        self.classes = check_classes(classes, parts.num_classes)
        self.batching: Batching = parts.batching
        self.memory_format: MemoryFormat = "auto"
        self.normalize = normalize
        self.gate = gate
        self.experts = parts.experts
        self.noise = None if noise is None else check_noise(noise)
        if self.noise is not None:
            for network in self.experts if isinstance(self.experts, ExpertList) else [self.experts]:
                add_noise_(network, *self.noise)
        self._stages, self._readings = parts.stages, parts.readings
        # A tuple, so that the two halves, which share the experts' modules, are not registered a second time.
        self._halves: tuple[nn.Sequential, nn.Sequential] | None = None
        if is_chain(self.experts):
            self._halves = halves(self.experts, parts.stages[0], parts.readings[0])

    @property
    def stage(self) -> str | tuple[str, ...]:
        """Where Grad-CAM looks; of experts that differ in it one each."""
        return self._stages[0] if len(set(self._stages)) == 1 else self._stages

    @property
    def layout(self) -> MapLayout | Reshape | tuple[MapLayout | Reshape, ...]:
        """What the stage returns, see `from_experts`; of experts that differ in it one each."""
        layouts = tuple(reading.layout for reading in self._readings)
        return layouts[0] if len(set(layouts)) == 1 else layouts

    def __setattr__(self, name: str, value: Any) -> None:
        """`nn.Module`'s; but `loss_fn` is no part of the model, which is the same however it is trained."""
        if name == "loss_fn":
            if not isinstance(value, FusedImmunityLoss):
                raise TypeError(f"loss_fn: expected a FusedImmunityLoss, got {type(value).__name__}")
            object.__setattr__(self, name, value)
            return
        if name == "memory_format":
            check_choice("memory_format", value, MemoryFormat)
        super().__setattr__(name, value)

    @overload
    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, return_terms: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def forward(
        self, images: Tensor, labels: Tensor, *, return_terms: Literal[True]
    ) -> tuple[Tensor, ImmunityTerms]: ...

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, return_terms: bool = False
    ) -> Tensor | tuple[Tensor, ImmunityTerms]:
        """Log-probabilities of images; with labels the loss, by `loss_fn`, in the module's own forward pass.

        So that wrappers see all of it: `DistributedDataParallel`, accelerate, FSDP2, `torch.compile(fullgraph=True)`.
        Under the first three, position stability is that of the samples of all processes, unless `loss_fn` has a
        `group_name` of its own; each process needs as many samples as the others.

        Args:
            images: (B, C, H, W) floating-point in [0, 1].
            labels: (B,) integers, or (B, num_classes) probabilities; None asks for log-probabilities.
            return_terms: return `(loss, ImmunityTerms)`.

        Returns:
            Log-probabilities (B, num_classes); with labels the loss, 0-d, eq. (12), of one network its cross-entropy.

        Raises:
            ValueError: images of another shape; terms without labels; as `FusedImmunityLoss.forward`.
            TypeError: images that are not floating-point; as `FusedImmunityLoss.forward`.
        """
        if labels is None:
            if return_terms:
                raise ValueError("labels: expected labels (B,), of which the loss has terms, got None")
            x = self._normalized(images)
            return log_mixture(self._logits(x), self.gate(x))
        loss, terms = self._loss_of_all_processes(images, labels)
        return (loss, terms) if return_terms else loss

    def _check_synchronised(self, name: str) -> None:
        """Warn, once, of a pass to train with that no wrapper sees, while there are several processes."""
        if self._warned or torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled()):
            return
        if training_group(self) is None and any(parameter.requires_grad for parameter in self.parameters()):
            self._warned = True
            warnings.warn(
                f"several processes run, and {name} is called on the model itself: DistributedDataParallel and FSDP "
                "see the forward pass of what they wrap alone, so gradients are each process' own; call "
                "wrapped(images, labels), which gives the loss (or average the gradients yourself)",
                UnsynchronisedWarning,
                stacklevel=3,
            )

    def _loss_of_all_processes(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ImmunityTerms]:
        """The loss by `loss_fn`, for the processes whose gradients will be averaged."""
        group = "" if self.loss_fn.group_name else training_group(self)
        if not group:
            return loss_and_terms(self, self.loss_fn, images, labels)
        if not torch.compiler.is_compiling():
            loss_fn = copy.copy(self.loss_fn)
            loss_fn.group_name = group
            return loss_and_terms(self, loss_fn, images, labels)
        self.loss_fn.group_name = group  # a compiler makes no copies of modules, and sees one thread
        try:
            return loss_and_terms(self, self.loss_fn, images, labels)
        finally:
            self.loss_fn.group_name = ""

    def expert_logits(self, images: Tensor) -> Tensor:
        """Logits (N, B, K) of `images` in [0, 1]: all of the model that is not the gate.

        Args:
            images: (B, C, H, W), which all experts see; or (N, B, C, H, W), each expert's own.

        Raises:
            ValueError, TypeError: as for `forward`.
        """
        self._check_synchronised("expert_logits")
        return self._logits(self._normalized(images, own=True))

    def some_logits(self, images: Tensor, experts: Sequence[int]) -> Tensor:
        """Logits (n, B, K) of some experts, by their indices: the others do not run, nor count a batch in BatchNorm.

        Args:
            images: (B, C, H, W) in [0, 1].
            experts: n indices of 0..N−1.

        Raises:
            ValueError, TypeError: as for `forward`.
        """
        self._check_synchronised("some_logits")
        x = self._normalized(images)
        if isinstance(self.experts, ExpertList):
            return torch.stack([self.experts.run(index, x) for index in experts])
        with in_use():
            own = slices(self.experts, self.num_experts)
            return stack_maps([call(self.experts, own[index], x) for index in experts])

    def logits_of_parts(self, images: Tensor, expert_of: Callable[[str], int], fixed: Collection[str]) -> Tensor:
        """Logits (B, K) of a network that is put together from the experts' tensors, which are one stack.

        Args:
            images: (B, C, H, W) in [0, 1].
            expert_of: from the name of a parameter or buffer in an expert to the index of the one whose it is.
            fixed: names of parameters that nothing is differentiated by.

        Raises:
            ValueError, TypeError: as for `forward`.
        """
        self._check_synchronised("logits_of_parts")
        x = self._normalized(images)
        with in_use():
            own = slices(self.experts, self.num_experts)
            tensors = {name: own[expert_of(name)][name] for name in own[0]}
            parts = {name: value.detach() if name in fixed else value for name, value in tensors.items()}
            logits: Tensor = call(self.experts, parts, x)
        return logits

    def expert_logits_with_copied_buffers(self, images: Tensor) -> Tensor:
        """`expert_logits`, where another forward pass comes before the backward pass of both.

        BatchNorm in training mode keeps its running statistics for the backward pass, and a second forward pass would
        change them: here they are copies, written back.
        """
        x = self._normalized(images, own=True)
        if isinstance(self.experts, ExpertList):
            return self.experts.logits_with_copied_buffers(x)
        if self.checkpoint_activations and is_chain(self.experts) and x.dim() == 4:
            return self._logits(x)  # which computes on copies
        inputs = x.expand(self.num_experts, *x.shape) if x.dim() == 4 else x
        with in_use():
            logits, buffers = call_stacked(self.experts, inputs, self.num_experts, batching=self._batching(x))
            for name, buffer in self.experts.named_buffers():
                buffer.copy_(buffers[name])
        return logits

    def expert_logits_and_buffers(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`expert_logits` as a function, which can be differentiated twice, also by `torch.func`.

        Activations are kept for the backward pass, whatever `checkpoint_activations` says.

        Args:
            images: see `expert_logits`.

        Returns:
            Logits (N, B, K), and the buffers that `update_experts` takes.
        """
        x = self._normalized(images, own=True)
        with self._differentiable_attention(everywhere=True):
            if isinstance(self.experts, ExpertList):
                return self.experts.logits_and_buffers(x)
            inputs = x.expand(self.num_experts, *x.shape) if x.dim() == 4 else x
            return call_stacked(self.experts, inputs, self.num_experts, batching=self._batching(x))

    def update_experts(self, buffers: dict[str, Tensor]) -> None:
        """Take over what a pass through `expert_logits_and_buffers` made of the buffers."""
        with in_use():
            write_back(dict(self.experts.named_buffers()), buffers)

    def gate_weights(self, images: Tensor) -> Tensor:
        """The gate's weights (B, N) for `images` (B, C, H, W) in [0, 1], in the mode the model is in."""
        weights: Tensor = self.gate(self._normalized(images))
        return weights

    def expert_outputs(self, images: Tensor, *, detach_weights: bool = False) -> tuple[Tensor, Experts, Tensor]:
        """What `FusedImmunityLoss` takes: logits (N, B, K), activations (N, B, C, h, w) in their graph, gate (B, N).

        The activations are a list of N tensors (B, C, h, w) if the experts are not an `nn.Sequential` of one structure;
        C, h and w are then each expert's own.

        Args:
            images: (B, C, H, W) in [0, 1].
            detach_weights: as the loss's: nothing is differentiated twice, and attention may run its fast kernels.
        """
        self._check_synchronised("expert_outputs")
        if self._halves is None:
            x = self._normalized(images)
            logits, activations = self._run_whole(x, detach_weights)
            return logits, activations, self.gate(x)
        maps, weights = self.trunk_outputs(images)
        if torch.is_grad_enabled() and not maps.requires_grad:  # behind a frozen trunk; Grad-CAM needs the head alone
            maps.requires_grad_()
        before = version(maps)
        with nullcontext() if detach_weights else self._differentiable_attention():
            logits = run_stacked(self._halves[1], maps, self.num_experts, shared=False, batching=self._batching(maps))
        check_kept("stage", self._stages[0], maps, before)
        return logits, maps, weights

    @property
    def has_head(self) -> bool:
        """Whether the experts are an `nn.Sequential` of one structure, which can be cut where Grad-CAM looks."""
        return self._halves is not None

    def trunk_outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Activations (N, B, C, h, w) and the gate's weights (B, N); the first half of `expert_outputs`."""
        self._check_synchronised("trunk_outputs")
        x = self._normalized(images)
        trunk = self._cut()[0]
        run = run_recomputed if self.checkpoint_activations else partial(run_stacked, shared=True)
        return run(trunk, x, self.num_experts, batching=self._batching(x)), self.gate(x)

    def head_outputs(self, activations: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The second half of `expert_outputs`, as a function: for `FusedImmunityLoss.from_head` with `has_aux=True`.

        Args:
            activations: (N, B, C, h, w).

        Returns:
            Logits (N, B, K), and the buffers that `update_head` takes.
        """
        with self._differentiable_attention():
            return call_stacked(self._cut()[1], activations, self.num_experts, batching=self._batching(activations))

    def update_head(self, buffers: dict[str, Tensor]) -> None:
        """Take over what a pass through `head_outputs` made of the head's buffers, such as BatchNorm's statistics."""
        with in_use():
            # A BatchNorm in both halves has kept its own for the trunk's backward pass, which in training mode never
            # looks.
            write_back(dict(self._cut()[1].named_buffers()), buffers)

    def heatmaps(
        self,
        images: Tensor,
        classes: Tensor | Sequence[int] | int | None = None,
        *,
        size: tuple[int, int] | None = None,
        score: Score = "logit",
        weight_scale: WeightScale = "channels",
        normalize: bool = False,
    ) -> Tensor:
        """Where each expert looks: Grad-CAM heatmaps (N, B, H, W) for a class of each image.

        In evaluation mode, whatever mode the model is in; modes, gradients, statistics and random states stay as they
        are.

        Args:
            images: (B, C, H, W) in [0, 1].
            classes: (B,) whole numbers, or one for all images; None is what the mixture predicts, by the mean of what
                its gate draws.
            size: (H, W) of the heatmaps; None is that of the images.
            score: what Grad-CAM differentiates, each class' "logit" or "probability".
            weight_scale: of Grad-CAM's channel weights: see `functional.gradcam_heatmaps`.
            normalize: scale each heatmap to a maximum of 1; one that is zero everywhere stays so.

        Returns:
            At least float32, ≥ 0, without a graph.

        Raises:
            ValueError, TypeError: images or classes of another shape or type, a class that the model does not have.
        """
        return expert_heatmaps(
            self, images, classes, size=size, score=score, weight_scale=weight_scale, normalize=normalize
        )

    def for_inference(self, gate: InferenceGate = "mean") -> InferenceMixture:
        """A plain module that answers as this one in evaluation mode, for export, compiling and serving.

        It has N ordinary networks, each BatchNorm folded into the convolution before it where that is sure to be right,
        and nothing random; it shares no tensors with this model. On a CPU, in float32, it keeps each convolution's
        weight once more, as the kernels want it, which spares each pass to lay it out anew.

        Args:
            gate: what weighs the experts: "mean", 1/N each, the exact mean of the gate's permutations; or "off", the
                trained weights as they are. Of a gate whose weights are fixed both are these, which of a
                `SelectionGate` are the exact mean of its draws.

        Raises:
            ValueError: another gate, or a model with noise: what is drawn anew at each call is nothing that a fixed
                graph could do.
        """
        if has_noise(self.experts):
            raise ValueError("model: expected one without noise, which no fixed graph draws anew at each call")
        if gate not in get_args(InferenceGate):
            raise ValueError(
                f"gate: expected 'mean' or 'off', got {gate!r}; no fixed graph draws a permutation anew at each call"
            )
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, self.channels, *self.image_size, generator=generator).to(like)
        normalize = copy.deepcopy(self.normalize)
        x = normalize(images)
        networks = [packed(folded(network, x), x) for network in self._networks()]
        return InferenceMixture(networks, normalize, self._weigher(gate, like))

    def _weigher(self, gate: InferenceGate, like: Tensor) -> nn.Module | None:
        """What gives the logits (B, N) of the experts' weights; None where each counts 1/N."""
        if self.num_experts == 1:
            return None
        if (fixed := fixed_weights(self.gate, like)) is not None:
            if bool((fixed == fixed[0]).all()):
                return None
            weigher = FixedWeights(self.num_experts).to(fixed)
            weigher.logits.copy_(fixed.log())
            return weigher
        return None if gate == "mean" else copy.deepcopy(self.gate.network)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model into a folder, as Hugging Face's hub has it; `from_pretrained` reads it.

        config.json, model.safetensors, and README.md, the model card, which is `model.card` or, where that is None,
        says what the model is; a README.md that is there already stays. Needs safetensors.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            OSError: the folder cannot be written.
        """
        pretrained.save(self, Path(folder).expanduser())

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "A mixture of immunity_fast",
    ) -> str:
        """Write what `save_pretrained` does into a repository of Hugging Face's hub, which is made where it is missing.

        Args:
            repository: "user/name".
            private: whether others may not see a new one; None is the user's or organisation's default.
            token: None is that of `hf auth login`.
            commit_message: of the one commit that is made.

        Returns:
            The commit's address.

        Raises:
            ModuleNotFoundError: huggingface_hub or safetensors is not installed.
            OSError: the hub cannot be reached, or does not take it.
        """
        return pretrained.push(self, repository, private=private, token=token, message=commit_message)

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path,
        *,
        device: torch.device | str = "cpu",
        trust_code: bool = False,
        experts: Sequence[nn.Module] | None = None,
        gate: RandomSwitchGate | None = None,
        layout: Layouts = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> "ImmunityMoE":
        """A model that `save_pretrained` or `push_to_hub` has written, to the same bits, in evaluation mode.

        Args:
            place: a folder, or a repository of Hugging Face's hub, "user/name".
            device: where the model is to be.
            trust_code: import an architecture of the form module.path:callable, whose code runs then.
            experts: networks of the saved ones' structure, whatever their weights; needed for a model of
                `from_experts`, which has no name of an architecture.
            gate: likewise, of a model whose gate has a network of the user's own.
            layout: likewise, of a model whose layout is a function.
            revision: of the repository: a branch, a tag or a commit.
            token: for the hub; None is that of `hf auth login`.

        Returns:
            A `SingleNetwork` where one network alone was saved.

        Raises:
            FileNotFoundError, OSError: there is no such folder, and the hub does not give such a repository.
            ValueError: files that are not what was written, an architecture that is not trusted, experts that do not
                fit or are missing.
            ModuleNotFoundError: safetensors, for the hub huggingface_hub, or the architecture's library is missing.
        """
        saved = pretrained.read(place, revision=revision, token=token)
        config = saved.config
        own = config["arch"] == "" or experts is not None
        if own and experts is None:
            raise ValueError(
                f"experts: expected networks for {place}, which was made by from_experts, got none; call "
                "from_pretrained(…, experts=[…]) with networks of the same structure"
            )
        if not own:
            check_trusted(place, config["arch"], trust_code)
            pretrained.check_fits(saved)
        kind = SingleNetwork if config["num_experts"] == 1 else ImmunityMoE
        unit = [0.0] * config["channels"], [1.0] * config["channels"]  # what normalises is among the tensors
        options: dict[str, Any] = {name: config[name] for name in ("stage", "classes")}
        options["image_size"] = tuple(config["image_size"])
        options["noise"] = config.get("noise")
        try:
            if own:
                assert experts is not None
                mean, std = unit if config["normalized"] else (None, None)
                if gate is None and "gate" in config:
                    gate = gate_of(config["gate"], config["num_experts"])
                model = kind.from_experts(
                    experts, gate=gate, layout=layout or config["layout"], mean=mean, std=std, **options
                )
                model.arch, model.stem = config["arch"], config["stem"]
            else:
                options |= {"channels": config["channels"], "mean": unit[0], "std": unit[1]}
                if config["stem"] is not None:
                    options["stem"] = config["stem"]
                if kind is ImmunityMoE:
                    options |= {"num_experts": config["num_experts"], "gate": config.get("gate", "switch")}
                model = kind(config["arch"], num_classes=config["num_classes"], **options)
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(f"{place}: describes a model that cannot be made ({error})") from error
        model.gate.switch = config["switch"]
        pretrained.fill(model, saved)
        model.card = saved.card
        return model.to(device).eval()

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
        modules = self._networks()
        if isinstance(self.normalize, nn.Identity):
            return modules
        return [prepended(copy.deepcopy(self.normalize), module) for module in modules]

    def list_experts_(self) -> None:
        """Hold the experts as N modules of their own, which run one after another, instead of as one stack; in place.

        What the model computes stays the same; names in its `state_dict` become `experts.0.…`, `experts.1.…`, and
        parameters are new ones, so an optimiser is made after it. Experts in a list are sharded one by one.
        """
        if isinstance(self.experts, ExpertList):
            return
        experts = ExpertList(self._networks())
        experts.training = self.experts.training  # the parts of each expert have modes of their own
        self.experts = experts
        self._halves = None

    def deterministic(self) -> "ExactMean":
        """The mixture by the exact mean of its gate, as a module of its own, which shares all parameters.

        It is what another library should attack: an attack that follows gradients through a gate that draws finds less
        than there is, see `SwitchingGateWarning`.
        """
        return ExactMean(self)

    def _networks(self) -> list[nn.Module]:
        """N ordinary modules from normalised images to logits, with tensors of their own."""
        with in_use():
            if isinstance(self.experts, ExpertList):
                return self.experts.copies()
            return unstack_modules(self.experts, self.num_experts)

    def _logits(self, x: Tensor) -> Tensor:
        shared = x.dim() == 4
        if self.checkpoint_activations and torch.is_grad_enabled() and shared:
            if is_chain(self.experts):
                return run_recomputed(self.experts, x, self.num_experts, batching=self._batching(x))
            return self._run_parts(x)
        if isinstance(self.experts, ExpertList):
            return self.experts.logits(x)
        return run_stacked(self.experts, x, self.num_experts, shared=shared, batching=self._batching(x))

    def _differentiable_attention(self, *, everywhere: bool = False) -> AbstractContextManager[object]:
        """What the heads of experts that are cut run in; `everywhere`: whole experts, of which nobody knows."""
        known = any(reading.attention for reading in self._readings)
        if not torch.is_grad_enabled() or not (known or (everywhere and not torch.compiler.is_compiling())):
            return nullcontext()
        attention = MathAttention()
        attention.begin()
        return attention

    def _batching(self, x: Tensor) -> Batching:
        return choose(self.batching, x.device, self.arch, self._use(x))

    def _use(self, x: Tensor) -> Use:
        """What a pass of x is for, by which the fastest way is chosen."""
        if self.training:
            return "training"
        return "attack" if torch.is_grad_enabled() and x.requires_grad else "inference"

    def _cut(self) -> tuple[nn.Sequential, nn.Sequential]:
        if self._halves is None:
            raise ValueError(
                "experts: expected nn.Sequential of one structure, which can be cut into a trunk and a head, got "
                "networks that cannot"
            )
        return self._halves

    def _normalized(self, images: Tensor, *, own: bool = False) -> Tensor:
        """Normalised images, laid out as was measured to be faster; `own`: each expert may have its own."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            raise TypeError(f"images: expected a floating-point tensor in [0, 1], got {kind_given(images)}")
        each = own and images.dim() == 5 and len(images) == self.num_experts
        if not (each or images.dim() == 4) or images.shape[-3] != self.channels:
            other = f" or ({self.num_experts}, B, {self.channels}, H, W)" if own and images.dim() == 5 else ""
            raise ValueError(f"images: expected shape (B, {self.channels}, H, W){other}, got {tuple(images.shape)}")
        normalized: Tensor = self.normalize(images)
        if laid_out(self.memory_format, images.device, self.arch, self._use(images)) != "channels_last":
            return normalized
        if each:
            return channels_last(normalized.flatten(0, 1)).view(images.shape)
        return channels_last(normalized)

    @eagerly
    def _run_whole(self, x: Tensor, detach_weights: bool) -> tuple[Tensor, list[Tensor]]:
        """One expert after another: the activations inside a `vmap` are in no graph outside of it."""
        logits, activations = [], []
        with self._one_by_one():
            for index, (network, run) in enumerate(self._runs(x)):
                catcher = Catcher(self._stages[index], index)
                reading = self._readings[index]
                reading = replace(reading, attention=reading.attention and not detach_weights)
                with self._parts_recomputed(network, index, catcher):
                    logits.append(catch(network, catcher, run, reading, (x.shape[2], x.shape[3])))
                activations.append(catcher.caught("stage"))
        return torch.stack(logits), activations

    @eagerly
    def _run_parts(self, x: Tensor) -> Tensor:
        """`_logits` of experts that run whole, with parts that are computed again."""
        logits = []
        with self._one_by_one():
            for index, (network, run) in enumerate(self._runs(x)):
                with self._parts_recomputed(network, index, None):
                    logits.append(run())
        return torch.stack(logits)

    def _runs(self, x: Tensor) -> list[tuple[nn.Module, Callable[[], Tensor]]]:
        experts = self.experts
        if isinstance(experts, ExpertList):
            return [(expert, partial(experts.run, index, x)) for index, expert in enumerate(experts)]
        return [(experts, partial(call, experts, own, x)) for own in slices(experts, self.num_experts)]

    def _one_by_one(self) -> AbstractContextManager[object]:
        alone = isinstance(self.experts, ExpertList) and not self.checkpoint_activations
        return nullcontext() if alone else in_use()

    def _parts_recomputed(
        self, network: nn.Module, index: int, catcher: Catcher | None
    ) -> AbstractContextManager[object]:
        if not self.checkpoint_activations:
            return nullcontext()
        return parts_recomputed(network, self._stages[index], catcher)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ImmunityMoE":
        """`nn.Module`'s, which `to` and its like call: of stacked tensors each expert's own is converted, and the
        loss's class weights go along.
        """
        with in_use():
            if recurse:
                for child in self.children():
                    stacked = child is self.experts and not isinstance(child, ExpertList)
                    child._apply(expert_by_expert(fn) if stacked else fn)  # type: ignore[no-untyped-call]
            super()._apply(fn, recurse=False)  # type: ignore[no-untyped-call]
            self.loss_fn._apply(fn)  # type: ignore[no-untyped-call]
        return self


class SingleNetwork(ImmunityMoE):
    """One network alone, the baseline, as a mixture of one: its gate has nothing to choose, and no parameters.

    `SingleNetwork.from_experts([network])` takes any.

    Args:
        arch, num_classes, stage, image_size, stem, channels, batching, mean, std, classes, loss_fn, noise: see
            `ImmunityMoE`.
    """

    _fewest: ClassVar[int] = 1

    def __init__(
        self,
        arch: str = "resnet18",
        num_classes: int = 10,
        *,
        stage: str | None = None,
        image_size: int | tuple[int, int] = 32,
        stem: StemChoice = "auto",
        channels: int = 3,
        batching: Batching = "auto",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
        loss_fn: FusedImmunityLoss | None = None,
        noise: Noise | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.arch = arch
        self.stem = chosen_stem(stem, image_size)
        parts = from_names(
            arch, 1, num_classes, stage=stage, image_size=image_size, channels=channels, batching=batching, stem=stem
        )
        gate = self._gate(1, "call", None, channels)
        self._hold(parts, gate, _normalize(mean, std, channels), classes, loss_fn, noise)

    @classmethod
    def _gate(
        cls, num_experts: int, switch: Switch, generator: torch.Generator | None, channels: int
    ) -> RandomSwitchGate:
        if num_experts != 1:
            raise ValueError(f"experts: expected one network, got {num_experts}")
        return RandomSwitchGate(1, NoChoice(), switch, generator)


class ExactMean(nn.Module):
    """A mixture by the exact mean of all that its gate may draw, in either mode; of one network, that network.

    Nothing is random in it but noise, where the model has some, so attacks and judges of any library see what there is.

    Args:
        model: the mixture, whose parameters and buffers these are.
    """

    def __init__(self, model: ImmunityMoE) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, num_classes) of `images` (B, C, H, W) in [0, 1]; nothing is drawn."""
        return mean_mixture(self.model.gate, self.model.expert_logits(images))

    @property
    def exact_mean_of(self) -> ImmunityMoE:
        """The mixture: an attack on a mixture alone knows this module by it."""
        return self.model


def _normalize(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> Normalize:
    """The normalisation of images of so many channels; where none is given, by what is usual.

    Raises:
        ValueError: one of another number of channels.
    """
    usual = channels == len(CIFAR10_MEAN)
    if mean is None:
        mean = CIFAR10_MEAN if usual else [0.5] * channels
    if std is None:
        std = CIFAR10_STD if usual else [0.25] * channels
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"{name}: expected {channels} numbers, one a channel, got {len(values)}")
    return Normalize(mean, std)
