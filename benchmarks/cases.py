"""What is measured: three groups of cases, their inputs, and the ways of computing each that are compared.

On CUDA every case of the product of batch sizes, maps, dtypes and layouts; on a CPU, where the subject is the PyTorch
reference, a few small ones.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks import naive, traffic
from immunity_fast import FusedImmunityLoss, functional
from immunity_fast.kernels import launch, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

EXPERTS = 5
SIZE = (32, 32)  # of the heatmaps: CIFAR's
SAMPLES = (32, 128, 512, 2048)
MAPS = ((128, 16, 16), (256, 8, 8), (512, 16, 16))  # C, h, w
CLASSES = (10, 1000)
LOSS_CLASSES = 10
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

FORWARD, BACKWARD, BOTH = "forward", "backward", "both"
NAIVE, EAGER, COMPILED, TRITON = "naive", "eager", "compiled", "triton"
VARIANTS = (NAIVE, EAGER, COMPILED, TRITON) if DEVICE.type == "cuda" else (NAIVE, EAGER, COMPILED)
if DEVICE.type == "cuda" and launch.INTERPRETED:  # a rehearsal: no compiled code runs in Triton's interpreter
    VARIANTS = (NAIVE, EAGER, TRITON)

Operation = Callable[..., tuple[Tensor, ...]]

# Otherwise compiled code may run its backward pass only once, and a backward pass that is timed alone is repeated.
torch._functorch.config.donated_buffer = False


class Inputs(NamedTuple):
    """Arguments of an operation, and ∂L/∂(each of its results); L is differentiated by what requires a gradient."""

    arguments: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]

    @property
    def wanted(self) -> list[Tensor]:
        """The arguments that L is differentiated by."""
        return [argument for argument in self.arguments if argument.requires_grad]


@dataclass(frozen=True)
class Case:
    """One problem: a group, a size, a dtype and a layout."""

    samples: int
    shape: tuple[int, ...]  # (C, h, w), or (K,)
    dtype: str
    channels_last: bool = False

    group: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = (FORWARD, BACKWARD, BOTH)
    memory: ClassVar[int]  # peak of checking and measuring, in float32 tensors of the size of the largest argument

    def __str__(self) -> str:
        layout = "channels-last" if self.channels_last else "contiguous"
        return f"{self.group} B={self.samples} {'x'.join(map(str, self.shape))} {self.dtype} {layout}"

    @property
    def largest(self) -> tuple[int, ...]:
        """Shape of the largest argument, (N, B, C, h, w) or (N, B, K)."""
        return (EXPERTS, self.samples, *self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one of its elements."""
        return DTYPES[self.dtype].itemsize

    def describe(self) -> dict[str, Any]:
        """The fields of a record that name the case."""
        return {
            "group": self.group,
            "experts": EXPERTS,
            "samples": self.samples,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "layout": "channels-last" if self.channels_last else "contiguous",
        }

    def rank(self) -> int:
        """Cases of low rank come first, for when time runs out."""
        return (self.samples == 512) + (self.dtype == "fp32") + self.channels_last

    def inputs(self, seed: int) -> Inputs:
        """Arguments and upstream gradients, the same for the same seed."""
        raise NotImplementedError

    def traffic(self) -> dict[str, int]:
        """Mode → bytes that have to be moved."""
        raise NotImplementedError

    def operations(self) -> dict[str, Operation]:
        """Variant → what computes it; the compiled one is compiled when it is first called."""
        raise NotImplementedError


class HeatmapCase(Case):
    """`heatmap_losses` of activations and gradients."""

    group = "heatmap losses"
    memory = 12

    def inputs(self, seed: int) -> Inputs:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        activations, gradients = (self._maps(generator) for _ in range(2))
        avoid_kinks(activations, gradients.sum((-2, -1), dtype=torch.float32))
        information = torch.rand(self.samples, generator=generator, device=DEVICE) + 0.5
        stability = torch.full((), 1.3e-4, device=DEVICE)  # both losses then have gradients of about one size
        return Inputs((activations.requires_grad_(), gradients.requires_grad_()), (information, stability))

    def traffic(self) -> dict[str, int]:
        forward = traffic.heatmap_losses_forward(self.largest, self.itemsize)
        backward = traffic.heatmap_losses_backward(self.largest, self.itemsize)
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}

    def operations(self) -> dict[str, Operation]:
        def loop(activations: Tensor, gradients: Tensor) -> tuple[Tensor, ...]:
            return naive.heatmap_losses(activations, gradients, SIZE)

        def eager(activations: Tensor, gradients: Tensor) -> tuple[Tensor, ...]:
            return functional.heatmap_losses(activations, gradients, size=SIZE, backend="torch")

        def fused(activations: Tensor, gradients: Tensor) -> tuple[Tensor, ...]:
            return functional.heatmap_losses(activations, gradients, size=SIZE, backend="triton")

        return {NAIVE: loop, EAGER: eager, COMPILED: compiled(eager), TRITON: fused}

    def _maps(self, generator: torch.Generator) -> Tensor:
        return random_maps(self.largest, DTYPES[self.dtype], self.channels_last, generator)


class CrossEntropyCase(Case):
    """`mixture_cross_entropy` of logits and gate."""

    group = "mixture cross-entropy"
    memory = 12
    alpha: ClassVar[float] = 1.0

    def inputs(self, seed: int) -> Inputs:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        logits = torch.randn(self.largest, generator=generator, device=DEVICE, dtype=DTYPES[self.dtype])
        gate = torch.randn(self.samples, EXPERTS, generator=generator, device=DEVICE).softmax(-1)
        targets = torch.randint(self.shape[0], (self.samples,), generator=generator, device=DEVICE)
        upstream = torch.rand(self.samples, generator=generator, device=DEVICE) + 0.5
        return Inputs((logits.requires_grad_(), gate.requires_grad_(), targets), (upstream,))

    def traffic(self) -> dict[str, int]:
        forward = traffic.cross_entropy_forward(self.largest, self.itemsize)
        backward = traffic.cross_entropy_backward(self.largest, self.itemsize)
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}

    def operations(self) -> dict[str, Operation]:
        def loop(logits: Tensor, gate: Tensor, targets: Tensor) -> tuple[Tensor]:
            return (naive.mixture_cross_entropy(logits, gate, targets, self.alpha),)

        def eager(logits: Tensor, gate: Tensor, targets: Tensor) -> tuple[Tensor]:
            return (functional.mixture_cross_entropy(logits, gate, targets, self.alpha, backend="torch"),)

        def fused(logits: Tensor, gate: Tensor, targets: Tensor) -> tuple[Tensor]:
            return (functional.mixture_cross_entropy(logits, gate, targets, self.alpha, backend="triton"),)

        return {NAIVE: loop, EAGER: eager, COMPILED: compiled(eager), TRITON: fused}


class LossCase(Case):
    """`FusedImmunityLoss` with its defaults, behind a head that costs little beside it: a mean over space, a matrix."""

    group = "FusedImmunityLoss"
    modes = (BOTH,)
    memory = 16

    def inputs(self, seed: int) -> Inputs:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        channels = self.shape[0]
        activations = random_maps(self.largest, DTYPES[self.dtype], self.channels_last, generator)
        # Numbers of few digits: ∂y/∂A, a number of these over a power of two, is then exact in bfloat16.
        matrix = torch.randn(EXPERTS, channels, LOSS_CLASSES, generator=generator, device=DEVICE).bfloat16().float()
        targets = torch.randint(LOSS_CLASSES, (self.samples,), generator=generator, device=DEVICE)
        avoid_kinks(activations, matrix[..., targets].transpose(1, 2))
        upstream = torch.full((), 1.7, device=DEVICE)
        return Inputs((activations.requires_grad_(), matrix.requires_grad_(), targets), (upstream,))

    def traffic(self) -> dict[str, int]:
        """Of the losses alone: what the head moves is not theirs."""
        logits = (EXPERTS, self.samples, LOSS_CLASSES)
        return {
            BOTH: traffic.heatmap_losses_forward(self.largest, self.itemsize)
            + traffic.heatmap_losses_backward(self.largest, self.itemsize)
            + traffic.cross_entropy_forward(logits, torch.float32.itemsize)
            + traffic.cross_entropy_backward(logits, torch.float32.itemsize)
        }

    def operations(self) -> dict[str, Operation]:
        plain = FusedImmunityLoss(size=SIZE, backend="torch")
        fused = FusedImmunityLoss(size=SIZE, backend="triton")

        def loop(activations: Tensor, matrix: Tensor, targets: Tensor) -> tuple[Tensor]:
            maps = list(activations.unbind())
            logits = [head(a[None], m[None])[0] for a, m in zip(maps, matrix, strict=True)]
            return (naive.immunity_loss(logits, maps, targets, SIZE, plain.alpha, plain.beta, plain.gamma),)

        def one_graph(activations: Tensor, matrix: Tensor, targets: Tensor) -> tuple[Tensor]:
            loss: Any = plain.from_head(lambda maps: head(maps, matrix), activations, targets)
            return (loss,)

        return {
            NAIVE: loop,
            EAGER: lambda activations, matrix, targets: (plain(head(activations, matrix), activations, targets),),
            COMPILED: compiled(one_graph),
            TRITON: lambda activations, matrix, targets: (fused(head(activations, matrix), activations, targets),),
        }


def all_cases() -> list[Case]:
    """In the order in which they are measured: what matters most comes first."""
    cases: list[Case]
    if DEVICE.type == "cpu":
        samples = SAMPLES[0]
        cases = [HeatmapCase(samples, maps, "fp32") for maps in MAPS]
        cases += [HeatmapCase(samples, MAPS[0], "fp32", channels_last=True), LossCase(samples, MAPS[0], "fp32")]
        return [*cases, CrossEntropyCase(samples, CLASSES[:1], "fp32")]
    grid = list(itertools.product(SAMPLES, MAPS, DTYPES, [False, True]))
    cases = [kind(*case) for kind in (HeatmapCase, LossCase) for case in grid]
    cases += [CrossEntropyCase(b, (k,), dtype) for b, k, dtype in itertools.product(SAMPLES, CLASSES, DTYPES)]
    return sorted(cases, key=Case.rank)


def rehearsed_cases() -> list[Case]:
    """One small case of each group, to see that all of it runs."""
    return [HeatmapCase(2, (8, 8, 8), "bf16", True), LossCase(2, (8, 8, 8), "bf16"), CrossEntropyCase(2, (10,), "bf16")]


@functools.cache
def computes() -> bool:
    """Whether the device gives results; a rehearsal may run on one that only pretends to."""
    return torch.ones(3, device=DEVICE).add(1).tolist() == [2.0, 2.0, 2.0]


def compiled(operation: Operation) -> Operation:
    """By `torch.compile`, for the sizes of its first call."""
    return torch.compile(operation, fullgraph=True, dynamic=False)


def head(activations: Tensor, matrix: Tensor) -> Tensor:
    """Logits (N, B, K) of maps (N, B, C, h, w) and matrices (N, C, K)."""
    return torch.einsum("nbc,nck->nbk", activations.mean((-2, -1), dtype=matrix.dtype), matrix)


def random_maps(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, generator: torch.Generator) -> Tensor:
    """Normally distributed, (N, B, C, h, w)."""
    experts, samples, channels, height, width = shape
    memory = (experts, samples, height, width, channels) if channels_last else shape
    maps = torch.randn(memory, generator=generator, device=DEVICE, dtype=dtype)
    return maps.permute(0, 1, 4, 2, 3) if channels_last else maps


def avoid_kinks(activations: Tensor, weights: Tensor) -> None:
    """Move activations (N, B, C, h, w), in place, so that no score Σ_k w_k A_k lies where rounding decides its sign.

    There the gradient of the ReLU jumps, and two exact implementations may differ by all of it. Weights: (N, B, C).
    """
    if not computes():
        return  # nothing to look at
    for _ in range(20):  # rounding the moved activations may bring another score close to 0
        scores = reference.score_maps(activations.to(weights.dtype), weights)
        largest = scores.abs().amax((-2, -1), keepdim=True)
        n, b, u, v = (scores.abs() < 1e-4 * largest).nonzero(as_tuple=True)
        if len(n) == 0:
            return
        direction = weights[n, b]
        step = 0.02 * largest[n, b, 0, 0] / direction.square().sum(-1)
        activations[n, b, :, u, v] += (step[:, None] * direction).to(activations.dtype)
    raise RuntimeError("scores stay close to 0")
