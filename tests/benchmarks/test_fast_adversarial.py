"""The comparison of single-step attacks: its record goes on where it was, and its table says what is in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import fast_adversarial
from tests.small_runs import write_data


def test_a_record_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_adversarial, "RADII", (8,))
    monkeypatch.setattr(fast_adversarial, "SEEDS", (0,))
    data, out = write_data(tmp_path / "data.npz"), tmp_path / "record.json"
    options = ["--data", str(data), "--train-images", "8", "--epochs", "1", "--check-images", "4", "--out", str(out)]
    fast_adversarial.main(options)
    first = json.loads(out.read_text())
    assert [run["method"] for run in first["runs"]] == ["fgsm-rs", "n-fgsm"]
    assert all(set(run["epochs"][0]) == set(fast_adversarial.SEEN) for run in first["runs"])
    monkeypatch.setattr(fast_adversarial, "trained", lambda config: pytest.fail("it is done already"))
    fast_adversarial.main(options)
    with pytest.raises(SystemExit, match="expected epochs 2, got 1"):
        fast_adversarial.main([*options, "--epochs", "2"])


def test_the_table_has_means_and_half_ranges() -> None:
    runs = [
        {"eps": 8, "method": "n-fgsm", "epochs": [{}, dict.fromkeys(fast_adversarial.SEEN, share)]}
        for share in (0.2, 0.3)
    ]
    assert fast_adversarial.table({"runs": runs}).splitlines()[2:] == [
        "| 8/255 | n-fgsm | 25.0 ± 5.0 | 25.0 ± 5.0 | 25.0 ± 5.0 | 2 |"
    ]
