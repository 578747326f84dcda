"""The benchmark of attacks and inference: what it concludes, and one small case from beginning to end."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import uses
from immunity_fast.runtime import precision
from immunity_fast.runtime.strategies import device_name


def _case(medians: dict[str, float], use: str = "attack") -> dict[str, Any]:
    return {
        "arch": "resnet8",
        "use": use,
        "images": 64,
        "ways": {name: {"median_us": medians.get(name, 1e6)} for name in uses.WAYS},
    }


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ({uses.PLAIN: 10.0, "loop, channels-last": 9.0}, ("loop", "channels_last")),
        ({uses.PLAIN: 10.0, "loop, channels-last": 9.9}, ("loop", "contiguous")),
        ({uses.PLAIN: 10.0, "vmap, contiguous": 8.0, "loop, channels-last, bf16": 1.0}, ("vmap", "contiguous")),
    ],
)
def test_the_fastest_float32_way_is_chosen(medians: dict[str, float], expected: tuple[str, str]) -> None:
    """bfloat16 is another result, and is never chosen."""
    (found,) = uses.fastest([_case(medians)], "somewhere.json", "CPU, AVX2")
    assert (found["batching"], found["memory_format"]) == expected
    assert (found["device"], found["arch"], found["use"]) == ("CPU, AVX2", "resnet8", "attack")
    assert uses.fastest([_case(medians)], "somewhere.json")[0]["device"] == device_name(uses.DEVICE.type)


@pytest.mark.parametrize("use", uses.USES)
def test_all_ways_compute_the_same(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is looked at; a way that computes something else is refused."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    found = _small_case(use, monkeypatch)
    assert found["ways"].keys() == uses.WAYS.keys()
    assert uses.table([found]).count("\n") == 2
    monkeypatch.setitem(uses.CLOSE, "bf16", 1.0)
    with pytest.raises(ValueError, match="not what a loop computes"):
        uses.case("resnet8", use)


def test_a_processor_that_emulates_bfloat16_is_spared_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    found = _small_case("inference", monkeypatch)
    assert found["ways"].keys() == {name for name, way in uses.WAYS.items() if way[2] == "off"}
    assert uses.table([found]).count("|  |") > 0
    assert uses.fastest([found], "somewhere.json")


def _small_case(use: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(uses, "ROUNDS", 2)
    monkeypatch.setattr(uses, "EXPERTS", 2)
    monkeypatch.setitem(uses.IMAGES, "resnet8", 3)
    return uses.case("resnet8", use)
