"""What `amp="auto"` means on a device, and that a run trains in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from immunity_fast import evaluate, train
from immunity_fast.runtime import precision
from immunity_fast.runtime.precision import chosen_amp
from immunity_fast.training.config import TrainConfig
from tests.small_runs import options, write_data

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


@pytest.mark.parametrize(
    ("amp", "device", "has", "said"),
    [
        ("bf16", CPU, False, True),
        ("bf16", CPU, True, False),
        ("bf16", CUDA, False, False),
        ("auto", CPU, False, False),
        ("off", CPU, False, False),
    ],
)
def test_who_asks_for_what_is_emulated_is_told(
    amp: Any, device: torch.device, has: bool, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: has)
    note = precision.emulation_line(amp, device)
    assert (note is not None) == said
    assert note is None or note.startswith("--amp bf16: this processor emulates bfloat16")


def test_the_default_is_float32_everywhere() -> None:
    assert TrainConfig().amp == "off"


def test_commands_say_what_is_emulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    run = tmp_path / "run"
    data = write_data(tmp_path / "data.npz")
    train.main([*options(data, amp="bf16", epochs=1, limit_train=8, attack_images=2), "--out", str(run)])
    assert capsys.readouterr().out.count("emulates bfloat16") == 1
    again = [str(run), "--device", "cpu", "--attacks", "fgsm", "--attackers", "mean", "--limit", "1"]
    evaluate.main([*again, "--amp", "bf16"])
    assert capsys.readouterr().out.count("emulates bfloat16") == 1
    evaluate.main([*again, "--amp", "auto"])
    assert "emulates" not in capsys.readouterr().out
