"""What `amp="auto"` means on a device, and that a run trains in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from immunity_fast.runtime import precision
from immunity_fast.runtime.precision import chosen_amp
from immunity_fast.training.config import TrainConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "off")])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_auto_is_bfloat16_where_the_hardware_has_it(
    device: torch.device, supported: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    monkeypatch.setattr(precision, "has_bfloat16", lambda: supported)
    assert chosen_amp("auto", device) == expected


@pytest.mark.parametrize("choice", ["off", "bf16", "fp16"])
def test_what_is_chosen_stays(choice: Any) -> None:
    assert chosen_amp(choice, CPU) == choice


def test_a_processor_without_either_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert not precision.has_bfloat16()
    assert chosen_amp("auto", torch.device("mps")) == "off"


def test_the_default_is_float32_everywhere() -> None:
    assert TrainConfig().amp == "off"
