"""Attention that can be differentiated twice: by PyTorch's math kernel, as its fast kernels cannot."""

from __future__ import annotations

import threading
from typing import Any

import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_ATTENTION = {F.scaled_dot_product_attention, F.multi_head_attention_forward}
_ALONE = threading.RLock()  # which kernels may run is a setting of the whole process


class MathAttention(TorchFunctionMode):
    """Inside of it attention of this thread runs the math kernel, from `begin` on; `seen` is whether there was any."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = self.seen = False

    def begin(self) -> None:
        """What runs from here on counts."""
        self.begun, self.seen = True, False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.begun or function not in _ATTENTION:
            return function(*args, **kwargs or {})
        self.seen = True
        with _ALONE, sdpa_kernel(SDPBackend.MATH):
            return function(*args, **kwargs or {})
