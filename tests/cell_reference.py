"""Networks of cells once more, as plain as they can be: functions on tensors that are read off one after another."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Reference:
    """The operations of DARTS and RobNets on a network's tensors, in the order in which the network registers them."""

    def __init__(self, network: nn.Module, *, affine: bool) -> None:
        self.tensors = iter([tensor.clone() for tensor in network.state_dict().values()])
        self.affine = affine
        self.training = network.training

    def conv(self, x: Tensor, stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0) -> Tensor:
        return F.conv2d(x, next(self.tensors), stride=stride, padding=padding)

    def depthwise(self, x: Tensor, stride: int, padding: int, dilation: int = 1) -> Tensor:
        weight = next(self.tensors)
        maps = [
            F.conv2d(x[:, i : i + 1], weight[i : i + 1], stride=stride, padding=padding, dilation=dilation)
            for i in range(x.shape[1])
        ]
        return torch.cat(maps, 1)

    def norm(self, x: Tensor, *, affine: bool | None = None) -> Tensor:
        weight, bias = x.new_ones(1), x.new_zeros(1)
        if self.affine if affine is None else affine:
            weight, bias = next(self.tensors), next(self.tensors)
        mean, variance, _ = next(self.tensors), next(self.tensors), next(self.tensors)
        if self.training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        mean, variance, weight, bias = (t.view(1, -1, 1, 1) for t in (mean, variance, weight, bias))
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def stem(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images, padding=1), affine=True)

    def pointwise(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.clamp(min=0)))

    def reduce(self, x: Tensor) -> Tensor:
        """For even sides alone."""
        x = x.clamp(min=0)
        return self.norm(torch.cat([self.conv(x[:, :, ::2, ::2]), self.conv(x[:, :, 1::2, 1::2])], 1))

    def skip(self, x: Tensor, stride: int) -> Tensor:
        return x if stride == 1 else self.reduce(x)

    def separable(self, x: Tensor, kernel: int, stride: int) -> Tensor:
        x = self.norm(self.conv(self.depthwise(x.clamp(min=0), stride, kernel // 2)))
        return self.norm(self.conv(self.depthwise(x.clamp(min=0), 1, kernel // 2)))

    def classify(self, x: Tensor) -> Tensor:
        logits = x.mean((2, 3)) @ next(self.tensors).T + next(self.tensors)
        assert next(self.tensors, None) is None  # all are used
        return logits


def stir(network: nn.Module) -> nn.Module:
    """Draws all of a network's tensors anew, in float64: BatchNorm's first values would hide what is not applied."""
    network.double()
    generator = torch.Generator().manual_seed(3)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if tensor.dim() == 1:
                tensor.copy_(1 + 0.3 * noise.abs() if name.endswith(("weight", "var")) else 0.3 * noise)
            else:
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
    return network


def images(*size: int, samples: int = 2) -> Tensor:
    """Images (samples, 3, *size) in float64."""
    return torch.rand(samples, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
