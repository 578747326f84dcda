"""Experts of different structures, which no stack can hold: one module each, run one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from immunity_fast.experts.staged import copied
from immunity_fast.models.stacking import call, explained, in_use, own_tensors, write_back
from immunity_fast.runtime.outputs import logits_of


class ExpertList(nn.ModuleList):
    """N networks from images (B, C, H, W) to logits (B, K), of any structures."""

    def logits(self, x: Tensor) -> Tensor:
        """Logits (N, B, K) of images (B, C, H, W) that all experts see, or (N, B, C, H, W), each expert's own."""
        return torch.stack([self.run(index, seen) for index, seen in enumerate(self._seen(x))])

    def run(self, index: int, x: Tensor) -> Any:
        """The logits (B, K) of one expert.

        Raises:
            TypeError: images of another dtype than its weights.
        """
        expert = self[index]
        return logits_of(explained(lambda: expert(x), own_tensors(expert), x))

    def logits_with_copied_buffers(self, x: Tensor) -> Tensor:
        """`logits`, on copies of the buffers, which are written back."""
        outputs, buffers = self.logits_and_buffers(x)
        with in_use():
            for name, buffer in self.named_buffers():
                buffer.copy_(buffers[name])
        return outputs

    def logits_and_buffers(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`logits` as a function, and the buffers as it would have left them, under their names, detached."""
        with in_use():
            outputs: list[Tensor] = []
            updated: dict[str, Tensor] = {}
            for index, (expert, seen) in enumerate(zip(self, self._seen(x), strict=True)):
                buffers = {name: buffer.clone() for name, buffer in expert.named_buffers()}
                outputs.append(call(expert, own_tensors(expert) | buffers, seen))
                updated |= {f"{index}.{name}": buffer.detach() for name, buffer in buffers.items()}
        return torch.stack(outputs), updated

    def update_experts(self, buffers: dict[str, Tensor]) -> None:
        """Take over the buffers that `logits_and_buffers` gave."""
        with in_use():
            write_back(dict(self.named_buffers()), buffers)

    def _seen(self, x: Tensor) -> Sequence[Tensor]:
        """Each expert's images."""
        return x.unbind() if x.dim() == 5 else [x] * len(self)

    def copies(self) -> list[nn.Module]:
        """N modules with tensors of their own."""
        return [copied(expert, used=True) for expert in self]


def are_alike(experts: Sequence[nn.Module]) -> bool:
    """Whether all have one structure: their modules, and their tensors' names and shapes."""
    first = _structure(experts[0])
    return all(_structure(expert) == first for expert in experts[1:])


def check_together(experts: Sequence[nn.Module]) -> None:
    """Check that experts of different structures can see the same images.

    Raises:
        ValueError: they are on several devices, or in several dtypes.
    """
    kinds = [
        {(str(value.device), str(value.dtype)) for value in own_tensors(expert).values() if value.is_floating_point()}
        for expert in experts
    ]
    first = next((kind for kind in kinds if kind), set())
    for index, kind in enumerate(kinds):
        if kind and not kind & first:
            raise ValueError(
                f"experts: expected number {index} to be on the device and in the dtype of the others, "
                f"{_words(first)}, got {_words(kind)}"
            )


def _structure(expert: nn.Module) -> tuple[object, ...]:
    return type(expert), repr(expert), [(name, value.shape) for name, value in own_tensors(expert).items()]


def _words(kinds: set[tuple[str, str]]) -> str:
    return " and ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
