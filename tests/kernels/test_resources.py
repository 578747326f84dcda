"""Every kernel compiled ahead of time for GPUs that need not be there: nothing spills, and loads are 16 bytes wide.

Here for one GPU and a few sizes; with `-m exhaustive` for every size and layout on it, and for the other GPUs.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernel_resources
from immunity_fast import kernels as package

REPOSITORY = Path(__file__).parents[2]
CONTRACTION = {"_scores_kernel", "_sums_kernel", "_scores_backward_kernel"}
WHOLE = 90  # the compute capability for which every call is compiled
UPDATES = {"_squares_kernel", "_sgd_kernel", "_lerp_kernel"}


def _compiled(out: Path, *options: str) -> list[dict[str, Any]]:
    """Records, made in another process: this one may have Triton's interpreter, which compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--out", str(out), *options]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL)
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["records"]
    return found


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.exhaustive)])
def records(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of a few calls for one GPU; or of all for it, and a few for the others."""
    out = tmp_path_factory.mktemp("resources") / "resources.json"
    if request.param == "few":
        return _compiled(out, "--few", "--targets", str(WHOLE))
    others = [str(capability) for capability in kernel_resources.TARGETS if capability != WHOLE]
    return _compiled(out, "--targets", str(WHOLE)) + _compiled(out, "--few", "--targets", *others)


@pytest.fixture
def every(request: pytest.FixtureRequest) -> bool:
    """Whether the records are of every target, and of every size and layout."""
    return bool(request.node.callspec.params["records"] == "all")


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target(records: list[dict[str, Any]], every: bool) -> None:
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert kernels >= CONTRACTION | UPDATES
    for capability in kernel_resources.TARGETS if every else (WHOLE,):
        found = {record["kernel"] for record in records if record["capability"] == capability}
        assert found == kernels


def test_nothing_is_spilled_and_shared_memory_fits(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert record["stack_bytes"] == 0, record
        assert record["shared_bytes"] <= 1024 * kernel_resources.SHARED_MEMORY[record["capability"]], record


def test_copies_of_a_sum_over_threads_are_equal(records: list[dict[str, Any]]) -> None:
    """Threads write them to one place in shared memory, so which of them is read would be a race (see `SAME_BITS`)."""
    for record in records:
        # The factors in the contraction's sums are powers of two: products with them are exact, fused or not.
        assert record["fused_into_sums"] == 0 or record["kernel"] == "_scores_kernel", record


def _aligned(record: dict[str, Any]) -> bool:
    odd = tuple(str(shape) for shape in kernel_resources.ODD_MAPS)
    return not record["first_used_by"].startswith(odd) and "sliced" not in record["first_used_by"]


def _bits_of_a_tile(record: dict[str, Any]) -> float:
    """Bits of one thread's share of a tile of activations."""
    constants = record["constants"]
    itemsize = 32 if "fp32" in record["first_used_by"] else 16
    elements = constants["BLOCK_CHANNELS"] * constants["BLOCK_CELLS"]
    return itemsize * elements / (32 * record["num_warps"])


def test_large_tensors_are_read_and_written_128_bits_at_a_time(records: list[dict[str, Any]], every: bool) -> None:
    """In the contraction, which alone sees them; widths are strings in JSON."""
    checked = 0
    for record in records:
        if record["kernel"] in CONTRACTION and _aligned(record):
            wide = sum(int(bits) * count for bits, count in record["loads"].items() if int(bits) >= 128)
            tiles = 2 if record["kernel"] == "_scores_kernel" and not record["constants"]["SUMMED"] else 1
            assert wide >= tiles * _bits_of_a_tile(record), record
            if tiles == 2:
                assert all(int(bits) >= 128 for bits in record["loads"]), record
            if record["kernel"] == "_scores_backward_kernel":
                wide = sum(int(bits) * count for bits, count in record["stores"].items() if int(bits) >= 128)
                assert wide >= _bits_of_a_tile(record), record
            checked += 1
    assert checked >= (30 if every else 5)


def test_weights_are_read_and_written_128_bits_at_a_time(records: list[dict[str, Any]], every: bool) -> None:
    """All but what is left of a tensor behind its last whole chunk, and tensors that begin between 16 bytes."""
    aligned = [r for r in records if r["kernel"] in UPDATES and r["constants"]["ALIGNED"]]
    for record in aligned:
        constants = record["constants"]
        each = 32 * constants["CHUNK"] // (128 * 32 * record["num_warps"])  # instructions of a thread for one tensor
        tensors = {"_squares_kernel": (1, 0), "_sgd_kernel": (2, 1), "_lerp_kernel": (2, 1)}[record["kernel"]]
        loads, stores = (count + (1 if constants.get("HAS_MOMENTUM") else 0) for count in tensors)
        assert int(record["loads"].get("128", 0)) >= loads * each, record
        assert int(record["stores"].get("128", 0)) >= stores * each, record
    assert len(aligned) >= len(UPDATES) * (len(kernel_resources.TARGETS) if every else 1)


def test_the_committed_table_is_of_the_kernels_as_they_are(records: list[dict[str, Any]], every: bool) -> None:
    """Looked at with the versions that made it alone: other compilers spend other registers."""
    table = json.loads((REPOSITORY / "benchmarks" / "results" / "kernel_resources.json").read_text(encoding="utf-8"))
    import triton

    if table["versions"]["triton"] != triton.__version__:
        pytest.skip(f"the table was made with triton {table['versions']['triton']}, this is {triton.__version__}")
    if every:
        assert [r for r in records if r["capability"] == WHOLE] == [
            r for r in table["records"] if r["capability"] == WHOLE
        ]
    known = [{**record, "first_used_by": ""} for record in table["records"]]  # of many calls, another may come first
    for record in records:
        assert {**record, "first_used_by": ""} in known, record
