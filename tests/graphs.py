"""Compilation as far as a test can afford it: graphs are captured as they would be, and run without Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def captured(backend: str = "aot_eager") -> Callable[..., Any]:
    """What stands in for `torch.compile`: one graph of fixed shapes, run by PyTorch's own kernels."""
    compile_ = torch.compile

    def quickly(function: Any, **options: Any) -> Any:
        assert options["fullgraph"]
        assert not options["dynamic"]
        return compile_(function, fullgraph=True, dynamic=False, backend=backend)

    return quickly
