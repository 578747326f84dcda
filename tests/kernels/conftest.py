"""All kernel tests: new memory is NaN, and in the interpreter each launch is watched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.cases import DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its kin are filled with NaN, so that an element that no kernel writes cannot pass."""
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device=DEVICE).isnan().all()
    assert torch.ones(2, device=DEVICE).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(2, device=DEVICE)).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def watched_launches() -> Iterator[None]:
    """See `tests.kernels.memory`; on a GPU that is compute-sanitizer's work."""
    if DEVICE.type == "cuda":
        yield
        return
    from tests.kernels import memory

    with memory.watched():
        yield
