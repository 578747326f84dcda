"""`FusedImmunityLoss`: the whole training loss of arXiv 2402.18787, eq. (12), as one module."""

import re
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from immunity_fast.arguments import (
    Backend,
    Experts,
    HeatmapOptions,
    Layout,
    Score,
    Size,
    WeightScale,
    channels_back,
    channels_first,
    check_distinct,
    check_gate,
    checked_size,
    join_experts,
)
from immunity_fast.forward_mode import ExactTangents
from immunity_fast.functional import (
    cross_entropies,
    gradients_of_heatmap_losses,
    label_scores,
    losses_of_heatmaps,
)
from immunity_fast.runtime.checks import check_choice, check_weight
from immunity_fast.runtime.compilation import eagerly
from immunity_fast.runtime.precision import accumulation_dtype
from immunity_fast.runtime.strategies import DoubleBackprop
from immunity_fast.second_derivatives import SecondDerivatives
from immunity_fast.targets import (
    IGNORE_INDEX,
    ClassWeights,
    TargetOptions,
    Targets,
    check_ignore_index,
    check_label_smoothing,
    checked_class_weights,
    read_targets,
)

Classification = Callable[[Tensor, Tensor | None], Tensor]

# Chosen on CIFAR-10's validation split for heatmaps of 32×32 pixels; docs/training.md, "Choosing α, β and γ".
ALPHA, BETA, GAMMA = 1.0, 3.0, 2e-4

FLOAT16_SCALE = 256.0  # of derivatives while they are in float16; a power of two, so that nothing is rounded

_TANGENT = threading.RLock()  # PyTorch counts levels of forward mode for the whole process, not for each thread


class ImmunityTerms(NamedTuple):
    """The three addends of the loss before weighting, each 0-d: mean CE_q, mean MI_q, and PS / B."""

    cross_entropy: Tensor
    mutual_information: Tensor
    position_stability: Tensor


class FusedImmunityLoss(nn.Module):
    """L = mean CE_q + (β/N)·mean MI_q + γ/(N(N−1))·PS/B, eq. (12), for N ≥ 2 experts.

    Args:
        alpha: weight α of the experts' own cross-entropies in CE_q, eq. (2).
        beta: weight β of the mutual-information loss, eq. (9).
        gamma: weight γ of the position-stability loss, eq. (11). That loss is in pixels⁴: halve `size` and the same
            effect takes 16 times the γ.
        size: (H, W) of the heatmaps, or the side of a square, usually the images'; None keeps the activations' own.
        normalize: eq. (9) on the heatmaps' distributions; False is the paper's literal eq. (9), for study.
        smoothing: ε of the distributions.
        weight_scale: factor of Grad-CAM's channel weights, "channels" (1/C) or "spatial" (1/(h·w)).
        score: what Grad-CAM differentiates, the label's "logit" or its "probability".
        detach_weights: True treats the channel weights as constants: no double backprop, an approximate gradient.
        backend: "auto" runs the fused Triton kernels on CUDA tensors that are not float64, and plain PyTorch elsewhere;
            "triton" and "torch" choose. With "torch" the loss can be differentiated any number of times, else once.
        group_name: of a `torch.distributed` process group whose processes train together, as in
            `DistributedDataParallel`, each on as many samples; see `heatmap_losses`. The mean of the processes' losses,
            and of their gradients, is then that of all samples in one process. "" is this process alone.
        layout: the order of the activations' axes, "NCHW" for (B, C, h, w), or "NHWC" for (B, h, w, C), the maps of a
            Swin Transformer. (`memory_format=torch.channels_last` changes no axes: its tensors are "NCHW".)
        label_smoothing: ε in [0, 1]: in CE_q a target t becomes (1 − ε)·t + ε/K. Grad-CAM looks at the target as it is.
        class_weights: (K,), ≥ 0, a tensor or numbers, which multiply the classes' parts of CE_q; of labels the mean is
            then weighted, Σ_q CE_q / Σ_q w_label, as PyTorch's. It is the module's buffer, and moves with it.
        ignore_index: the label of samples that count for nothing, in no term, as if they were not in the batch; of
            probabilities the value of a whole row. A batch of such samples alone gives 0, with zero gradients. None:
            every sample counts.

    Without the heatmaps' terms (β = γ = 0), and with one network in the place of the experts, or α = 0 and experts that
    are alike, the loss is `torch.nn.functional.cross_entropy` of the same arguments.

    What it takes comes from `capture_activations` or `ImmunityMoE`. With hooks of your own, mind an in-place operation
    right behind the module (the ReLU after `bn1` of a torchvision ResNet, after `features.9` of a VGG, after `features`
    of a DenseNet): it changes the tensor that the hook has kept, and the loss cannot see that. A hook that returns
    `output.clone()` is safe: what follows changes the copy.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        alpha: float = ALPHA,
        beta: float = BETA,
        gamma: float = GAMMA,
        size: Size = (32, 32),
        normalize: bool = True,
        smoothing: float = 0.01,
        weight_scale: WeightScale = "channels",
        score: Score = "logit",
        detach_weights: bool = False,
        backend: Backend = "auto",
        group_name: str = "",
        layout: Layout = "NCHW",
        label_smoothing: float = 0.0,
        class_weights: ClassWeights = None,
        ignore_index: int | None = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            check_weight(name, value)
        check_choice("score", score, Score)
        check_choice("layout", layout, Layout)
        options = HeatmapOptions(checked_size(size), normalize, smoothing, weight_scale, backend, group_name)
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.size, self.normalize, self.smoothing = options.size, normalize, smoothing
        self.weight_scale: WeightScale = weight_scale
        self.backend: Backend = backend
        self.group_name = group_name
        self.score, self.detach_weights = score, detach_weights
        self.layout: Layout = layout
        check_label_smoothing(label_smoothing)
        check_ignore_index(ignore_index)
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", checked_class_weights(class_weights))
        self._has_looked = False  # at what the gradients of the activations are made of: once will do

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}, size={self.size}"

    @overload
    def forward(
        self,
        logits: Experts,
        activations: Experts,
        targets: Tensor,
        gate: Tensor | None = None,
        *,
        classification: Classification | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        logits: Experts,
        activations: Experts,
        targets: Tensor,
        gate: Tensor | None = None,
        *,
        return_terms: Literal[True],
        classification: Classification | None = None,
    ) -> tuple[Tensor, ImmunityTerms]: ...

    def forward(
        self,
        logits: Experts,
        activations: Experts,
        targets: Tensor,
        gate: Tensor | None = None,
        *,
        return_terms: bool = False,
        classification: Classification | None = None,
    ) -> Tensor | tuple[Tensor, ImmunityTerms]:
        """The loss of a batch; takes ∂y/∂A itself, by one extra backward pass through the experts' heads.

        Args:
            logits: (N, B, K), or N tensors (B, K).
            activations: (N, B, C, h, w), or N tensors (B, C, h, w), each another one, in the graph that leads to
                `logits`; with layout "NHWC" (N, B, h, w, C), or N tensors (B, h, w, C). Of N tensors C, h and w may be
                each expert's own, if there is a `size` that all are brought to.
            targets: (B,) integer labels, or (B, K) probabilities, whose rows sum to 1; of these Grad-CAM differentiates
                Σ_k t_k f_k, or Σ_k t_k softmax(f)_k.
            gate: (B, N) or (N,) weights ≥ 0 that sum to 1; None is 1/N each. `mixture_log_probabilities` says what is
                looked at.
            return_terms: return `(loss, ImmunityTerms)`; the heatmap terms are then computed even if β = γ = 0.
            classification: (logits (N, B, K), gate) to losses (B,), in the place of eq. (2), as TRADES wants it; in
                `ImmunityTerms` its mean then stands for the cross-entropy's. Ignored samples are left out.

        Returns:
            The loss, 0-d; 0 for B = 0.

        Raises:
            ValueError: a wrong shape or gate, activations that are not in the graph of the logits, or are one tensor
                twice, or none of which an expert's logits depend on.
            TypeError: a wrong dtype.
        """
        if self._needs_heatmaps(return_terms):
            return self._by_autograd(logits, activations, targets, gate, return_terms, classification)
        stacked_logits = join_experts("logits", logits, 3, "(N, B, K)")
        found = self._check(stacked_logits, activations, targets)
        losses = self._classification(stacked_logits, gate, found, classification)
        return losses.sum() / found.samples(self.group_name)

    @eagerly  # a compiler has no double backward across its graphs
    def _by_autograd(
        self,
        logits: Experts,
        activations: Experts,
        targets: Tensor,
        gate: Tensor | None,
        return_terms: bool,
        classification: Classification | None,
    ) -> Tensor | tuple[Tensor, ImmunityTerms]:
        stacked_logits = join_experts("logits", logits, 3, "(N, B, K)")
        found = self._check(stacked_logits, activations, targets)
        losses = self._classification(stacked_logits, gate, found, classification)
        parts = [activations] if isinstance(activations, Tensor) else list(activations)
        if not torch.compiler.is_compiling():
            _check_graph(logits, parts)
        # From the caller's own tensors: a stacked copy of them would not be in the graph of the logits.
        made = stacked_logits if isinstance(logits, Tensor) else logits[0]
        score = label_scores(stacked_logits, found.values, self.score, found.counted)
        gradients = self._gradients(score, parts, made)
        slopes = gradients[0] if isinstance(activations, Tensor) else gradients
        return self._total(losses, activations, slopes, found, len(stacked_logits), return_terms, self.layout)

    def from_head(
        self,
        head: Callable[[Tensor], Any],
        activations: Tensor,
        targets: Tensor,
        gate: Tensor | None = None,
        *,
        return_terms: bool = False,
        has_aux: bool = False,
        double_backprop: DoubleBackprop = "reverse",
        classification: Classification | None = None,
    ) -> Any:
        """The same loss, running the head itself: all is one graph for `torch.compile(fullgraph=True)`.

        ∂y/∂A is taken by `torch.func` instead of the autograd engine, which cannot be traced twice.

        Args:
            head: (N, B, C, h, w) activations to (N, B, K) logits, for example a `torch.vmap` over stacked experts. It
                must be functional: BatchNorm in training mode may not update buffers that it captures, but copies of
                them, which it may return besides the logits; `ImmunityMoE.head_outputs` does.
            activations: (N, B, C, h, w), or as `layout` says, which is also what `head` takes.
            targets, gate, return_terms, classification: see `forward`.
            has_aux: whether `head` returns (logits, anything else).
            double_backprop: how the loss is differentiated through Grad-CAM's weights. Both ways are exact.

                * "reverse" differentiates the head's backward pass: 6 passes' worth of its convolutions.
                * "forward" takes the loss's derivatives u by the activations and v by the channel weights first, and
                  then one tangent of the head along v: plain convolutions only, 7 passes' worth. It runs the head
                  twice, so the head may not be random; batch, instance and layer normalisation are computed from
                  primitives. The terms it returns have no gradient of their own.

                A plain step is 3 passes' worth. "auto" is "reverse".

        Returns:
            As `forward`; with `has_aux` a pair of that and what `head` returned besides the logits.

        Raises:
            ValueError, TypeError: as `forward`; a head that "forward" cannot differentiate.
        """
        check_choice("double_backprop", double_backprop, DoubleBackprop)

        if activations.dim() == 5:
            activations = channels_first(activations, self.layout)

        def run(maps: Tensor) -> tuple[Tensor, Any]:
            maps = channels_back(maps, self.layout)
            logits, aux = head(maps) if has_aux else (head(maps), ())
            return join_experts("head", logits, 3, "(N, B, K) of its result"), aux

        if not self._needs_heatmaps(return_terms):
            logits, aux = run(activations)
            found = self._check(logits, activations, targets)
            losses = self._classification(logits, gate, found, classification)
            loss = losses.sum() / found.samples(self.group_name)
            return (loss, aux) if has_aux else loss
        differentiated = not self.detach_weights and (self.beta > 0 or self.gamma > 0)
        if differentiated and double_backprop == "forward":
            result, aux = self._reverse_over_forward(run, activations, targets, gate, return_terms, classification)
        else:
            logits, gradients, aux, found = self._head_gradients(run, activations, targets, differentiated)
            losses = self._classification(logits, gate, found, classification)
            result = self._total(losses, activations, gradients, found, len(logits), return_terms, "NCHW")
        return (result, aux) if has_aux else result

    def _head_gradients(
        self,
        run: Callable[[Tensor], tuple[Tensor, Any]],
        activations: Tensor,
        targets: Tensor,
        differentiated: bool,
    ) -> tuple[Tensor, Tensor, Any, Targets]:
        """Logits, ∂y/∂A or its sums over space, in the graph or not, what else the head returned, and the targets."""
        if is_traced(activations) or not torch.is_grad_enabled():
            logits, pullback, aux = torch.func.vjp(run, activations, has_aux=True)  # type: ignore[misc]
        else:
            logits, pullback, aux = direct_vjp(run, activations, differentiated)
        found = self._check(logits, activations, targets)
        graph = torch.set_grad_enabled(differentiated and torch.is_grad_enabled())
        # Autocast would cast the backward pass of operations whose forward pass it has not seen.
        with graph, torch.autocast(logits.device.type, enabled=False):
            slopes = torch.func.grad(label_scores)(logits, found.values, self.score, found.counted)
            if activations.dtype != torch.float16:
                return logits, pullback(slopes)[0], aux, found
            # Derivatives of a logit by single activations fall below float16's smallest number.
            sums = pullback(slopes * FLOAT16_SCALE)[0].sum((-2, -1), dtype=torch.float32)
            return logits, sums / FLOAT16_SCALE, aux, found

    def _reverse_over_forward(
        self,
        run: Callable[[Tensor], tuple[Tensor, Any]],
        activations: Tensor,
        targets: Tensor,
        gate: Tensor | None,
        return_terms: bool,
        classification: Classification | None,
    ) -> tuple[Any, Any]:
        """The loss and its gradient by a tangent of the head.

        H(A, w) are the heatmap losses, w_k = Σ_uv ∂y/∂A_k(u, v), u = ∂H/∂A and v = ∂H/∂w. Then dH = ⟨u, dA⟩ + ⟨v, dw⟩,
        and ⟨v, w⟩ is the derivative of y along v, constant over space: its tangent.
        """
        with torch.no_grad():
            logits, gradients, aux, found = self._head_gradients(run, activations, targets, differentiated=False)
            sums = gradients if gradients.dim() == 3 else gradients.sum((-2, -1), dtype=accumulation_dtype(gradients))
            experts, samples = logits.shape[:2]
            divisor = found.samples(self.group_name)
            # In float16 derivatives of a mean over the batch would be nothing.
            unit = FLOAT16_SCALE * max(samples, 1) if activations.dtype == torch.float16 else 1.0
            of_information = sums.new_full((samples,), unit * self.beta / experts) / divisor
            of_stability = sums.new_full((), unit * self.gamma / (experts * (experts - 1))) / divisor
            information, stability, u, v = gradients_of_heatmap_losses(
                activations, sums, of_information, of_stability, self._heatmap_options(), counted=found.counted
            )
            along = v.to(activations.dtype)[..., None, None].expand_as(activations)

        def scored(maps: Tensor) -> tuple[Tensor, Tensor]:
            with ExactTangents():
                logits, _ = run(maps)
            return label_scores(logits, found.values, self.score, found.counted), logits

        with _alone():
            _, tangent, logits = torch.func.jvp(scored, (activations,), (along,), has_aux=True)  # type: ignore[misc]
        losses = self._classification(logits, gate, found, classification)
        with torch.autocast(activations.device.type, enabled=False):
            through = ((u.to(sums.dtype) * activations).sum() + tangent) / unit
        terms = ImmunityTerms(losses.sum() / divisor, information.sum() / divisor, stability / divisor)
        loss = self._weighted(terms, experts) + (through - through.detach())
        return ((loss, terms) if return_terms else loss), aux

    def class_losses(self, logits: Experts, gate: Tensor | None, targets: Tensor, alpha: float | None = None) -> Tensor:
        """Eq. (2) of each sample by this loss's options, so that the mean over the samples that count is their loss.

        Of weighted labels that is `mixture_cross_entropy` times (their number / Σ_q w_label), because PyTorch's mean of
        these is the weighted one.

        Args:
            logits, gate, targets: see `forward`.
            alpha: in the place of this loss's.

        Returns:
            (B,) in nats, 0 of samples that are ignored.

        Raises:
            ValueError, TypeError: see `forward`.
        """
        stacked = join_experts("logits", logits, 3, "(N, B, K)")
        return self._class_losses(stacked, gate, self._read(stacked, targets), self.alpha if alpha is None else alpha)

    def mean(self, losses: Tensor, targets: Tensor, classes: int) -> Tensor:
        """The mean of losses (B,) over the samples that count, of all processes; 0 where there are none.

        Args:
            losses: (B,), as of `class_losses`.
            targets: see `forward`.
            classes: K.
        """
        found = read_targets(targets, len(losses), classes, self._target_options(), group_name=self.group_name)
        return found.masked(losses).sum() / found.samples(self.group_name)

    def _class_losses(self, logits: Tensor, gate: Tensor | None, targets: Targets, alpha: float) -> Tensor:
        options = self._target_options()
        weights = check_gate(gate, logits, values=True)
        losses = cross_entropies(logits, weights, targets, alpha, options, backend=self.backend)
        factor = targets.per_weight(options, losses.dtype, self.group_name)
        return losses if factor is None else losses * factor

    def _classification(
        self, logits: Tensor, gate: Tensor | None, targets: Targets, given: Classification | None
    ) -> Tensor:
        if given is not None:
            return targets.masked(given(logits, gate))
        return self._class_losses(logits, gate, targets, self.alpha)

    def _needs_heatmaps(self, return_terms: bool) -> bool:
        return return_terms or self.beta > 0 or self.gamma > 0

    def _read(self, logits: Tensor, targets: Tensor) -> Targets:
        _, samples, classes = logits.shape
        return read_targets(targets, samples, classes, self._target_options(), group_name=self.group_name)

    def _check(self, logits: Tensor, activations: Experts, targets: Tensor) -> Targets:
        experts, samples, _ = logits.shape
        if experts < 2:
            raise ValueError(f"logits: expected at least 2 experts, got shape {tuple(logits.shape)}")
        if isinstance(activations, Tensor):
            shapes = [tuple(activations.shape[1:])] * (activations.shape[0] if activations.dim() else 1)
        elif isinstance(activations, Sequence) and all(isinstance(part, Tensor) for part in activations):
            shapes = [tuple(part.shape) for part in activations]
            check_distinct(activations)
        else:
            raise TypeError(f"activations: expected a tensor or a list of tensors, got {type(activations).__name__}")
        if len(shapes) != experts or any(len(shape) != 4 or shape[0] != samples for shape in shapes):
            axes = "h, w, C" if self.layout == "NHWC" else "C, h, w"
            raise ValueError(
                f"activations: expected shape ({experts}, {samples}, {axes}) or a list of {experts} tensors "
                f"({samples}, {axes}), got {len(shapes)} of {' and '.join(map(str, dict.fromkeys(shapes)))}"
            )
        return self._read(logits, targets)

    def _gradients(self, score: Tensor, activations: Sequence[Tensor], logits: Tensor) -> list[Tensor]:
        hint = "in the graph that leads to logits, with gradients enabled"
        if not score.requires_grad:
            raise ValueError(f"logits: expected activations {hint}, got logits {_without_gradient(logits)}")
        if not all(part.requires_grad for part in activations):
            raise ValueError(
                f"activations: expected tensors {hint}, got some that require no gradient; behind frozen layers "
                "images.requires_grad_() gives them one, and so does capture_activations"
            )
        twice = not self.detach_weights and (self.beta > 0 or self.gamma > 0)
        # Autocast would cast the backward pass of operations whose forward pass it has not seen.
        with torch.autocast(score.device.type, enabled=False):
            gradients = torch.autograd.grad(
                score, activations, create_graph=twice, retain_graph=True, allow_unused=True
            )
        if any(gradient is None for gradient in gradients):
            raise ValueError(f"activations: expected tensors {hint}, got some that logits do not depend on")
        if twice and not self._has_looked and not torch.compiler.is_compiling():
            _check_differentiable(gradients)
            self._has_looked = True
        return list(gradients)

    def _total(
        self,
        losses: Tensor,
        activations: Experts,
        gradients: Experts,
        targets: Targets,
        experts: int,
        return_terms: bool,
        layout: Layout,
    ) -> Tensor | tuple[Tensor, ImmunityTerms]:
        mutual_information, position_stability = losses_of_heatmaps(
            activations, gradients, self._heatmap_options(), layout, targets.counted
        )
        samples = targets.samples(self.group_name)
        terms = ImmunityTerms(losses.sum() / samples, mutual_information.sum() / samples, position_stability / samples)
        loss = self._weighted(terms, experts)
        return (loss, terms) if return_terms else loss

    def _weighted(self, terms: ImmunityTerms, experts: int) -> Tensor:
        loss = terms.cross_entropy
        if self.beta > 0:
            loss = loss + self.beta / experts * terms.mutual_information
        if self.gamma > 0:
            loss = loss + self.gamma / (experts * (experts - 1)) * terms.position_stability
        return loss

    def _target_options(self) -> TargetOptions:
        return TargetOptions(self.label_smoothing, self.class_weights, self.ignore_index)

    def _heatmap_options(self) -> HeatmapOptions:
        return HeatmapOptions(
            self.size, self.normalize, self.smoothing, self.weight_scale, self.backend, self.group_name
        )


def is_traced(activations: Tensor) -> bool:
    """Whether a compiler or `torch.func` looks on, which autograd's own functions cannot be shown to."""
    return torch.compiler.is_compiling() or peek_interpreter_stack() is not None or activations.is_inference()


def direct_vjp(
    run: Callable[[Tensor], tuple[Tensor, Any]], activations: Tensor, differentiated: bool
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]], Any]:
    """`torch.func.vjp` with an auxiliary result, by autograd: less to do for Python, and a direct second derivative.

    Args:
        run: activations to (logits, anything else).
        activations: where the gradient is taken.
        differentiated: whether the gradient will be, too.

    Returns:
        The logits; what makes the gradient, alone in a tuple, of slopes of the logits' shape; and what else `run` gave.
    """
    # A view, in which no other way that leads from the activations to the logits counts.
    maps = activations.view_as(activations) if activations.requires_grad else activations.detach().requires_grad_()
    second = SecondDerivatives(maps)
    with second if differentiated else nullcontext():
        logits, aux = run(maps)

    def pullback(slopes: Tensor) -> tuple[Tensor]:
        if not logits.requires_grad:
            return (torch.zeros_like(maps),)
        with second.input_gradient():
            (gradient,) = torch.autograd.grad(
                logits, maps, slopes, create_graph=torch.is_grad_enabled(), retain_graph=True, allow_unused=True
            )
        return (torch.zeros_like(maps) if gradient is None else gradient,)

    return logits, pullback, aux


def _alone() -> AbstractContextManager[object]:
    """For the length of a `with` block no other thread takes a tangent. A compiler's code has no need of it."""
    return nullcontext() if torch.compiler.is_compiling() else _TANGENT


def _without_gradient(logits: Tensor) -> str:
    """Why logits have no graph, which ends the message."""
    if logits.is_inference() or torch.is_inference_mode_enabled():
        return "of torch.inference_mode, which have no graph: leave it, Grad-CAM takes a gradient"
    if not torch.is_grad_enabled():
        return "of torch.no_grad, which have no graph: leave it, or torch.enable_grad(), Grad-CAM takes a gradient"
    return (
        "that require no gradient, of which Grad-CAM is made: networks run under torch.no_grad have none; of frozen "
        "networks images.requires_grad_() gives them one"
    )


def _check_differentiable(gradients: Sequence[Tensor]) -> None:
    """Check that the gradients of activations can be differentiated: PyTorch cannot do that to all it can do itself.

    Raises:
        ValueError: they come of such an operation, as of attention's fast kernels, or cuDNN's recurrent layers.
    """
    nodes, seen = [gradient.grad_fn for gradient in gradients], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # "Error" is what @once_differentiable leaves behind.
        if node.name().endswith(("NotImplemented", "::Error")):
            inputs = {other.name() for other, _ in node.next_functions if other is not None}
            known = [name.removesuffix("Backward0") for name in sorted(inputs) if re.search("Attention|Rnn", name)]
            raise ValueError(
                "activations: expected a head that can be differentiated twice, got an operation that PyTorch "
                f"differentiates once alone{f' ({known[0]})' if known else ''}; detach_weights=True does without, "
                "and capture_activations and ImmunityMoE run attention's math kernel, which can"
            )
        nodes += [before for before, _ in node.next_functions]


def _check_graph(logits: Experts, activations: Sequence[Tensor]) -> None:
    """Each expert's logits depend on its activations, not only on others', as in a list that is in disorder.

    They may depend on all, where one head computes all at once.
    """
    own = {_edge(part): index for index, part in enumerate(activations) if part.requires_grad}
    if len(own) < len(activations):  # without a graph, or several of one
        return
    if not isinstance(logits, Tensor):
        ends = [(scores.grad_fn, scores.output_nr) for scores in logits]
    elif getattr(logits.grad_fn, "_saved_dim", None) == 0 and "Stack" in logits.grad_fn.name():  # type: ignore[union-attr]
        ends = list(logits.grad_fn.next_functions)  # type: ignore[union-attr]
    else:  # not to be taken apart
        return
    for index, end in enumerate(ends):
        found = _reached(end, own)
        if len(activations) == 1 and found:  # all experts' in one tensor
            continue
        if not found:
            raise ValueError(
                "activations: expected one of each expert, of the pass that gave its logits, got none that the logits "
                f"of number {index} depend on"
            )
        if index not in found:
            others = " and ".join(f"number {other}" for other in sorted(found))
            raise ValueError(
                f"activations: expected those of each expert at its place, got logits of number {index} that depend on "
                f"those of {others}"
            )


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """A tensor's place in the graph, a leaf's too."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _reached(end: tuple[Any, int], own: dict[tuple[Any, int], int]) -> set[int]:
    """Which of some places in the graph an end depends on, others of them not between."""
    edges, seen, found = [end], set(), set()
    while edges:
        edge = edges.pop()
        if edge in own:
            found.add(own[edge])
        elif edge[0] is not None and edge[0] not in seen:
            seen.add(edge[0])
            edges += edge[0].next_functions
    return found
