"""Training steps that are compared: an architecture cut at a stage, a batch, and the ways of taking a step of it.

Each way is measured with the whole loss ("full"), with Grad-CAM's weights held constant ("detached") and with the
mixture's cross-entropy alone, which is what the losses' cost is measured against.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import naive
from benchmarks.cases import DEVICE, EXPERTS
from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.experts import create
from immunity_fast.experts.staged import default_stage
from immunity_fast.functional import mixture_cross_entropy
from immunity_fast.kernels import launch
from immunity_fast.losses import ALPHA, BETA, GAMMA
from immunity_fast.models.stacking import channels_last_
from immunity_fast.runtime.compilation import Compiled
from immunity_fast.runtime.precision import autocast, chosen_amp
from immunity_fast.training.optimizer import FusedSGD
from immunity_fast.training.step import TrainStep

CLASSES = 10
SIDE = 32  # of images and heatmaps
FULL, DETACHED, CROSS_ENTROPY = "full", "detached", "cross-entropy"
LOSSES = (FULL, DETACHED, CROSS_ENTROPY)
NAIVE = "naive eager loop"
CUDA = DEVICE.type == "cuda"
COUNTED = 2  # images, when FLOPs are counted

Step = Callable[[], object]


class Way(NamedTuple):
    """How a step is taken."""

    name: str
    batching: str
    double_backprop: str
    compile: str
    memory_format: str = "channels_last" if CUDA else "contiguous"
    amp: str | None = None  # None is the case's


CHANNELS_LAST = "channels_last"
WAYS = [
    Way("eager loop", "loop", "reverse", "off"),
    Way("eager loop, forward mode", "loop", "forward", "off"),
    Way("eager vmap", "vmap", "reverse", "off"),
    Way("eager vmap, forward mode", "vmap", "forward", "off"),
    Way("compiled loop", "loop", "reverse", "on"),
    Way("compiled loop, forward mode", "loop", "forward", "on"),
    Way("compiled vmap", "vmap", "reverse", "on"),
    Way("compiled vmap, forward mode", "vmap", "forward", "on"),
]
# On a CPU contiguous maps and float32 are what everybody else has. A GPU's steps are always channels-last.
CPU_WAYS = [
    Way("eager loop, channels-last", "loop", "reverse", "off", CHANNELS_LAST),
    Way("eager loop, bf16", "loop", "reverse", "off", "contiguous", "bf16"),
    Way("eager loop, channels-last, bf16", "loop", "reverse", "off", CHANNELS_LAST, "bf16"),
    Way("compiled loop, channels-last", "loop", "reverse", "on", CHANNELS_LAST),
]
WAYS += [] if CUDA else CPU_WAYS
FORWARD_MODE = ", forward mode"

# Of batching and compilation, in what is measured: the most promising first, and a compiled loop, whose graph is N
# times as long, last.
ORDER = [("vmap", "on"), ("vmap", "off"), ("loop", "off"), ("loop", "on")]


@dataclass(frozen=True)
class StepCase:
    """Five experts of an architecture, cut after a stage; None is the stage that is cut after by default."""

    arch: str
    stage: str | None
    samples: int
    amp: Any = "bf16" if CUDA else "off"
    compiled: tuple[str, ...] = ()  # which batchings are measured compiled, too
    quick: bool = False  # of what is compiled, only what the overhead is made of
    eager: bool = True  # whether eager ways are measured
    few: bool = False  # of eager ways, only loops in reverse mode, and of losses what the overhead is made of
    experts: int = EXPERTS
    side: int = SIDE

    def __str__(self) -> str:
        case = f"{self.experts} × {self.arch}, cut after {self.cut}, {self.samples} images, amp {self.amp}"
        return case if self.eager else f"{case}, compiled {' and '.join(self.compiled)}"

    @property
    def cut(self) -> str:
        """The stage that is cut after."""
        return _default_stage(self.arch, self.side) if self.stage is None else self.stage

    def ways(self, loss: str) -> list[Way]:
        """The ways in which a loss is measured, but for the naive one; in bf16 where the device multiplies in it."""
        ways = [way for way in WAYS if (self.eager if way.compile == "off" else way.batching in self.compiled)]
        ways = [way for way in ways if way.amp in (None, chosen_amp("auto", DEVICE))]
        if self.few:
            loops = [way for way in ways if (way.batching, way.double_backprop) == ("loop", "reverse")]
            ways = [way for way in loops if loss == FULL or (loss == CROSS_ENTROPY and way.amp is None)]
        if self.quick:
            few = [way for way in ways if way.double_backprop == "reverse" and loss != DETACHED]
            ways = [way for way in ways if way.compile == "off" or way in few]
        # Forward mode is a way of differentiating twice, which nothing but the whole loss does.
        return ways if loss == FULL else [way for way in ways if way.double_backprop == "reverse"]

    def order(self) -> list[tuple[Way, str]]:
        """All that is measured: what "auto" does on a GPU and its overhead first, what compiles longest last."""

        def rank(pair: tuple[Way, str]) -> tuple[int, bool, bool, bool]:
            way, loss = pair
            kind = ORDER.index((way.batching, way.compile))
            return kind, loss == DETACHED, way.double_backprop == "forward", loss == CROSS_ENTROPY

        return sorted([(way, loss) for loss in LOSSES for way in self.ways(loss)], key=rank)

    def model(self) -> ImmunityMoE:
        """The same weights each time, on the CPU."""
        torch.manual_seed(0)
        return ImmunityMoE(self.arch, self.experts, CLASSES, stage=self.stage, image_size=self.side)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and labels."""
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(self.samples, 3, self.side, self.side, generator=generator)
        return images.to(DEVICE), (torch.arange(self.samples) % CLASSES).to(DEVICE)

    def step(self, way: Way, loss: str) -> tuple[Step, nn.Module]:
        """What takes a step, and the model that it trains."""
        model = self.model().to(DEVICE)
        model.batching = way.batching  # type: ignore[assignment]
        model.memory_format = way.memory_format  # type: ignore[assignment]
        images, labels = self.batch()
        options: dict[str, Any] = {
            "amp": self.amp if way.amp is None else way.amp,
            "compile": way.compile,
            "log": _refuse,
        }
        if loss == CROSS_ENTROPY:
            return _plain_step(model, images, labels, **options), model
        step = TrainStep(
            model,
            FusedImmunityLoss(size=(self.side, self.side), detach_weights=loss == DETACHED, ignore_index=None),
            _optimizer(model),
            double_backprop=way.double_backprop,  # type: ignore[arg-type]
            **options,
        )
        return lambda: step(images, labels), model

    def naive_step(self, loss: str) -> tuple[Step, nn.Module]:
        """A whole step as one would write it: experts one after another, hooks, `autograd.grad(create_graph=True)`."""
        model = self.model()
        experts = nn.ModuleList(model.unstack()).to(DEVICE)
        gate = copy.deepcopy(model.gate).to(DEVICE)
        normalize = copy.deepcopy(model.normalize).to(DEVICE)
        if CUDA:
            channels_last_(experts)
        activations: list[Tensor] = []
        for expert in experts:
            expert.get_submodule(model.stage).register_forward_hook(lambda _m, _i, output: activations.append(output))
        images, labels = self.batch()
        if CUDA:
            images = images.contiguous(memory_format=torch.channels_last)
        together = nn.ModuleList([experts, gate])
        optimizer = SGD(together.parameters(), 1e-3, 0.9, weight_decay=5e-4, nesterov=True)

        def step() -> None:
            activations.clear()
            with autocast(self.amp, DEVICE):
                logits = [expert(images) for expert in experts]
                weights = gate(normalize(images))
            if loss == CROSS_ENTROPY:
                total = naive.mixture_cross_entropy(torch.stack(logits), weights, labels, ALPHA).mean()
            else:
                size, detached = (self.side, self.side), loss == DETACHED
                total = naive.immunity_loss(
                    logits, activations, labels, size, ALPHA, BETA, GAMMA, weights, detach_weights=detached
                )
            optimizer.zero_grad()
            total.backward()
            optimizer.step()

        return step, together

    def flops(self, loss: str) -> float:
        """Floating-point operations of a step's forward and backward passes: twice its multiplications."""
        way = Way("", "loop", "reverse", "off")
        step, _ = replace(self, samples=COUNTED, amp="off").step(way, loss)
        with FlopCounterMode(display=False) as counter:
            step()
        return float(counter.get_total_flops()) * self.samples / COUNTED


@functools.cache
def _default_stage(arch: str, side: int) -> str:
    return default_stage(create(arch, CLASSES), side)


def _plain_step(model: ImmunityMoE, images: Tensor, labels: Tensor, amp: Any, compile: Any, log: Any) -> Step:
    """Forward, cross-entropy, backward, optimiser: no Grad-CAM."""
    if model.memory_format == CHANNELS_LAST:
        channels_last_(model)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with autocast(amp, DEVICE):
            logits, weights = model.expert_logits(images), model.gate_weights(images)
        return mixture_cross_entropy(logits, weights, labels, ALPHA).mean()

    function, optimizer = Compiled(loss, compile, DEVICE, log), _optimizer(model)

    def step() -> None:
        optimizer.zero_grad()
        function(images, labels).backward()
        optimizer.step()

    return step


def _optimizer(model: nn.Module) -> FusedSGD:
    return FusedSGD(model.parameters(), 1e-3, 0.9, weight_decay=5e-4, nesterov=True)


def _refuse(line: str) -> None:
    """A compiled way that goes on in eager mode would be measured as what it is not."""
    raise RuntimeError(line)


def cases(quick: bool) -> list[StepCase]:
    """In the order in which they are measured: what matters most comes first."""
    if not CUDA:
        if quick:
            return [StepCase("resnet8", None, 32, compiled=("loop",), quick=True, few=True)]
        return [
            StepCase("resnet8", None, 32, compiled=("loop",)),
            StepCase("resnet8", None, 128, few=True),
            StepCase("resnet18", "layer2", 16, few=True),
            StepCase("googlenet", None, 4, few=True),
            StepCase("densenet121", None, 4, few=True),
        ]
    resnet18 = [StepCase("resnet18", "layer2", samples, compiled=("vmap",)) for samples in (512, 32)]
    resnet18 += [replace(case, compiled=("loop",), eager=False) for case in resnet18]
    if quick:
        return resnet18
    cut: list[tuple[str, str | None]] = [("resnet18", "layer2"), ("resnet18", "layer3")]
    cut += [("resnet8", None), ("googlenet", None), ("densenet121", None)]
    rest = [(*case, samples) for samples in (512, 32, 128) for case in cut]
    known = {(case.arch, case.stage, case.samples) for case in resnet18}
    return resnet18 + [StepCase(*case, compiled=("loop", "vmap")) for case in rest if case not in known]


def rehearsed_cases() -> list[StepCase]:
    """The smallest; on a device where compiled code runs, compiled too."""
    compiled = ("vmap",) if CUDA and not launch.INTERPRETED else ()
    return [StepCase("resnet8", None, 4, compiled=compiled, quick=True, experts=2, side=16)]
