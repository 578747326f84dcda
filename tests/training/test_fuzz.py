"""Spoilt checkpoints and run files: each gives one line of error or the right result, never a traceback, a hang or a
signal.

IMMUNITY_FUZZ="FIRST LAST" tries other cases, such as "0 2000", than those of `-m exhaustive`.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.processes import launch

CASES = os.environ.get("IMMUNITY_FUZZ", "8 110").split()


def wrong(case: dict[str, Any], right: dict[str, Any]) -> str | None:
    """What is wrong with how a case has ended."""
    status, said, target = case["status"], case["said"], case["target"]
    if status not in (0, 1):
        return f"ended with {status}"
    if status == 1:
        if not said.startswith("error: ") or said.count("\n") != 1:
            return "not one line of error"
        # What wrong numbers do, such as NaN among the weights, is said of the model or the loss.
        named = target in ("checkpoint", "metrics") and case["kind"] not in ("bytes", "values")
        return "the run is not named" if named and case["run"] not in said else None
    if said and ("UserWarning" not in said or "Traceback" in said):  # of a network that cannot be attacked
        return "said something"
    # Other numbers where numbers were are no damage that anybody could see; what a record or piece has to be is.
    seen = target in ("metrics", "done") or (target == "ledger" and case["kind"] not in ("bytes", "value"))
    return "another result" if seen and case["found"] != right[case["command"]] else None


@pytest.mark.slow
@pytest.mark.parametrize(("first", "last"), [("0", "8"), pytest.param(*CASES, marks=pytest.mark.exhaustive)])
@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded PyTorch")
def test_what_is_spoilt_is_one_line_or_the_right_result(tmp_path: Path, first: str, last: str) -> None:
    printed = launch("-m", "tests.fuzzing", str(tmp_path / "runs"), first, last, processes=1, seconds=1800)
    right, *cases = (json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    failed = [(text, case) for case in cases if (text := wrong(case, right)) is not None]
    assert not failed, failed[:5]
    count = int(last) - int(first)
    assert len(cases) == count
    if count >= 80:  # both ends are there, of every file
        outcomes = Counter((case["target"], case["status"]) for case in cases)
        assert {("checkpoint", 1), ("metrics", 1), ("config", 1), ("ledger", 0), ("done", 0)} <= outcomes.keys()
