"""Gaussian noise before every convolution, in training and in use: random self-ensembles (RSE, arXiv 1712.00673).

A network with noise gives another answer at each pass. What is meant by its answer is the mean of some passes, as
`MeanOfPasses` gives it. The noise is drawn from PyTorch's default generator of the device, as dropout's is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from immunity_fast.runtime.checks import check_whole
from immunity_fast.runtime.outputs import logits_of
from immunity_fast.runtime.precision import accumulation_dtype

PASSES = 10
"""How many passes are averaged to one answer."""

SHARED = 3
"""How many times the passes of one answer there are for several."""

Noise = tuple[float, float]
"""Standard deviations: before the first convolution, and before each of the others."""


class NoisyConv2d(nn.Conv2d):
    """An `nn.Conv2d` of its input plus Gaussian noise, in either mode; `add_noise_` makes it of a plain one.

    Attributes:
        noise: the standard deviation, in the input's units.
    """

    noise: float = 0.0

    def forward(self, input: Tensor) -> Tensor:
        """Maps (B, C, h, w) to maps (B, C', h', w')."""
        return super().forward(input.add(_drawn_for(input), alpha=self.noise) if self.noise else input)

    def extra_repr(self) -> str:
        """`nn.Conv2d`'s, and the noise: experts of different noise are not alike."""
        return f"{super().extra_repr()}, noise={self.noise:g}"  # type: ignore[no-untyped-call]


class MeanOfPasses(nn.Module):
    """The mean answer of a random network: log-probabilities (B, K), the logarithm of the mean softmax of its passes.

    Args:
        model: from images (B, C, H, W) to random logits or log-probabilities (B, K).
        passes: how many.

    Raises:
        ValueError: passes < 1.
        TypeError: passes that are no whole number.
    """

    def __init__(self, model: nn.Module, passes: int = PASSES) -> None:
        super().__init__()
        check_whole("passes", passes, 1)
        self.model, self.passes = model, passes
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, K) of images (B, C, H, W)."""
        return self._scores(images, self.passes).logsumexp(0) - math.log(self.passes)

    def several(self, images: Tensor, number: int, generator: torch.Generator | None = None) -> Tensor:
        """Several answers, of at most `SHARED` times the passes of one: for so many, all would take long.

        Each is the mean of passes drawn without replacement from those that there are, so that it is distributed as
        an answer of passes of its own is. But together they vary less: of two of them a third of the passes is the
        same, on the average, where they are not from the same draw of all.

        Args:
            images: (B, C, H, W).
            number: of answers.
            generator: of which passes make an answer; the first is of the first passes. None is PyTorch's default.

        Returns:
            Log-probabilities (number, B, K).
        """
        shared = min(SHARED, number)
        scores = self._scores(images, shared * self.passes)
        orders = [torch.arange(len(scores))]
        orders += [torch.randperm(len(scores), generator=generator) for _ in range((number - 1) // shared)]
        chosen = torch.cat(orders).reshape(-1, self.passes)[:number]
        return torch.stack([scores[each.to(scores.device)].logsumexp(0) for each in chosen]) - math.log(self.passes)

    def _scores(self, images: Tensor, passes: int) -> Tensor:
        """Log-probabilities (passes, B, K)."""
        outputs = [logits_of(self.model(images)) for _ in range(passes)]
        dtype = accumulation_dtype(outputs[0])
        return torch.stack([each.log_softmax(-1, dtype=dtype) for each in outputs])


def _drawn_for(maps: Tensor) -> Tensor:
    """Standard Gaussian noise of the maps' shape and memory format, drawn in the order in which they lie in memory.

    A CPU draws for what it takes for not contiguous an element at a time, 8 times as slowly.
    """
    if maps.dim() == 4 and maps.shape[1] > 1 and maps.stride(1) == 1:
        return torch.randn_like(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return torch.randn_like(maps)


def add_noise_(network: nn.Module, first: float, inner: float) -> nn.Module:
    """Give each 2-D convolution of a network noise on its input, in place; returns the network.

    Its tensors and their names stay as they are. Noise that is there already is replaced.

    Args:
        network: whose first convolution, in the order of its modules, is the one that sees the images.
        first: standard deviation before that one, in units of the normalised images.
        inner: before all others.

    Raises:
        ValueError: a negative or infinite deviation, a network without a 2-D convolution, or with one that is not
            PyTorch's own.
    """
    check_noise((first, inner))
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    if not layers:
        raise ValueError(f"noise: expected networks with 2-D convolutions, got a {type(network).__name__} without")
    other = next((layer for layer in layers if type(layer) not in (nn.Conv2d, NoisyConv2d)), None)
    if other is not None:
        raise ValueError(f"noise: expected networks of PyTorch's own convolutions, got a {type(other).__name__}")
    for index, layer in enumerate(layers):
        layer.__class__ = NoisyConv2d
        assert isinstance(layer, NoisyConv2d)
        layer.noise = float(inner if index else first)
    return network


def has_noise(network: nn.Module) -> bool:
    """Whether a network has convolutions with noise."""
    return any(isinstance(layer, NoisyConv2d) and layer.noise > 0 for layer in network.modules())


def is_noise(value: Any) -> bool:
    """Whether a value is two finite numbers of at least 0, as a file or a caller may give them."""
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in value)
        and all(0 <= each < math.inf for each in value)
    )


def check_noise(value: Any) -> Noise:
    """Two standard deviations.

    Raises:
        ValueError: something else.
    """
    if not is_noise(value):
        raise ValueError(f"noise: expected two finite standard deviations of at least 0, first and inner, got {value}")
    return float(value[0]), float(value[1])
