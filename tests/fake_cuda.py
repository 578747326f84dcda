"""CUDA tensors without a GPU: nothing computes, but PyTorch makes all its choices by device, dtype and layout."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

Module = TypeVar("Module", bound=nn.Module)

__all__ = ["FakeTensorMode", "to_fake_cuda"]


def to_fake_cuda(module: Module, dtype: torch.dtype | None = None) -> Module:
    """Inside of a `FakeTensorMode`: all tensors of `module` become fake CUDA tensors of the same layout, in place."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device="cuda")
                tensors[name] = nn.Parameter(fake, tensor.requires_grad) if tensors is part._parameters else fake
    return module
