"""A trained mixture as a plain module for inference: N ordinary networks, BatchNorm folded into their convolutions."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from immunity_fast.experts.plain import is_plain
from immunity_fast.kernels import reference
from immunity_fast.runtime.outputs import logits_of
from immunity_fast.runtime.precision import accumulation_dtype

Gate = Literal["mean", "off"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class InferenceMixture(nn.Module):
    """N networks and what weighs them, without `vmap`, stacked tensors or chance: for export, compiling and serving.

    It is always in evaluation mode, and its parameters need no gradients; those of the images are there, as ever.

    Args:
        experts: N ordinary modules from normalised images (B, C, H, W) to logits (B, K), or what holds them; they are
            used, not copied.
        normalize: what the images go through first.
        gate: from normalised images to logits (B, N) of the experts' weights, −∞ of what does not count; None weighs
            each 1/N.
    """

    def __init__(self, experts: Sequence[nn.Module], normalize: nn.Module, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.normalize = normalize
        self.experts = nn.ModuleList(experts)
        self.gate = gate
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, K) of `images` (B, C, H, W) in [0, 1]."""
        x = self.normalize(images)
        logits = [logits_of(expert(x)) for expert in self.experts]
        dtype = accumulation_dtype(logits[0])
        scores = torch.stack([each.log_softmax(-1, dtype=dtype) for each in logits])
        if self.gate is None:
            return scores.logsumexp(0) - math.log(len(logits))
        weights = self.gate(x).softmax(-1, dtype=dtype)
        return reference.log_mixture(scores, weights.T[..., None])

    def train(self, mode: bool = True) -> InferenceMixture:
        """Nothing: what is folded knows no training mode."""
        return super().train(False)


def folded(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy in evaluation mode, each BatchNorm folded into the convolution before it where that is sure to be right.

    It is where a pass uses both once, and the convolution's output for nothing else. Layers with hooks or a `forward`
    of their own stay as they are, and so do subclasses, which may do anything.

    Args:
        network: from images to logits.
        images: (B, C, H, W), on which it runs, to see what follows what.
    """
    network = copy.deepcopy(network).eval()
    for convolution, normalisation in _pairs(network, images):
        dtype = convolution.weight.dtype
        # In float64, so that half precision rounds once.
        fused = fuse_conv_bn_eval(convolution.double(), normalisation.double()).to(dtype)
        _replace(network, {convolution: fused, normalisation: nn.Identity()})
    return network


class _Readers(TorchFunctionMode):
    """How many functions read the values of each tensor; what reads its shape does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        self.alive: list[Tensor] = []  # an identity is another tensor's once its own is gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _OF_SHAPES and not (getattr(func, "__name__", "") == "__get__" and not _tensors(result)):
            self.see((args, kwargs))
        return result

    def see(self, values: object) -> None:
        """Count each tensor among these as read once more."""
        self.alive += (found := _tensors(values))
        self.counts.update(map(id, found))


_OF_SHAPES = {Tensor.dim, Tensor.size, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point}


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _pairs(network: nn.Module, images: Tensor) -> list[tuple[Any, Any]]:
    """Convolutions, and the BatchNorm that alone reads their output."""
    made: list[tuple[nn.Module, Tensor]] = []
    taken: list[tuple[nn.Module, Tensor]] = []
    hooks = []
    for layer in network.modules():
        if not is_plain(layer):
            continue
        if type(layer) in _CONVOLUTIONS:
            hooks.append(layer.register_forward_hook(lambda layer, _inputs, output: made.append((layer, output))))
        elif type(layer) in _NORMALISATIONS and layer.running_mean is not None:
            hooks.append(layer.register_forward_pre_hook(lambda layer, inputs: taken.append((layer, inputs[0]))))
    try:
        with torch.no_grad(), _Readers() as readers:
            readers.see(network(images))
    finally:
        for hook in hooks:
            hook.remove()
    calls = Counter(layer for layer, _ in (*made, *taken))
    makers = {id(output): layer for layer, output in made}
    return [
        (makers[id(read)], layer)
        for layer, read in taken
        if id(read) in makers and readers.counts[id(read)] == calls[layer] == calls[makers[id(read)]] == 1
    ]


def _replace(network: nn.Module, others: dict[Any, nn.Module]) -> None:
    """Put other layers in the place of some, wherever they stand."""
    for part in network.modules():
        for name, child in part._modules.items():
            if child in others:
                part._modules[name] = others[child]
