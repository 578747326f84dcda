"""The mixture in wrappers that train in several processes: gradients are those of one process on the whole batch.

Two gloo processes, each with half of the batch. All cases of a kind run in one launch, see `tests/wrapped.py`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.processes import PROCESSES, launch
from tests.wrapped import KINDS, data, gradients, mixture

EAGER = [f"{wrapper}:{kind}" for wrapper in ("ddp", "fsdp") for kind in KINDS] + ["fsdp of parts:different"]
ACCELERATED = ["accelerate:chain", "accelerate:whole"]
COMPILED = ["compiled ddp:chain", pytest.param("ddp compiled:whole", marks=pytest.mark.exhaustive)]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each process measured, by case."""
    if not dist.is_gloo_available():
        pytest.skip("PyTorch was built without gloo")
    out = tmp_path_factory.mktemp("wrapped") / "found"
    accelerated = ACCELERATED if importlib.util.find_spec("accelerate") else []
    # Compiling comes last, where it disturbs nothing, and where it is asked for.
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    asked = {
        item.callspec.params["case"] for item in items if hasattr(item, "callspec") and "case" in item.fixturenames
    }
    compiled = [case for case in ("compiled ddp:chain", "ddp compiled:whole") if case in asked]
    launch("-m", "tests.wrapped", str(out), *EAGER, "nothing:chain", "nothing:whole", *accelerated, *compiled)
    parts = [torch.load(f"{out}-{rank}.pt") for rank in range(PROCESSES)]
    return {case: [part[case] for part in parts] for case in parts[0]}


def _assert_of_one_process(case: str, parts: list[dict[str, Any]]) -> None:
    """Loss, terms and gradients, to float64's rounding."""
    assert not any("error" in part for part in parts), parts
    model = mixture(case.split(":")[1])
    loss, terms = model(*data(), return_terms=True)
    loss.backward()
    torch.testing.assert_close(sum(part["loss"] for part in parts) / PROCESSES, loss.detach(), rtol=1e-12, atol=1e-12)
    for index, term in enumerate(terms):
        mean = sum(part["terms"][index] for part in parts) / PROCESSES
        torch.testing.assert_close(mean, term.detach(), rtol=1e-12, atol=1e-12)
    for part in parts:
        torch.testing.assert_close(part["gradients"], gradients(model), rtol=1e-10, atol=1e-12)
        assert "UnsynchronisedWarning" not in part["warnings"]


@pytest.mark.parametrize("case", EAGER)
def test_gradients_of_processes_are_those_of_one(case: str, found: Any) -> None:
    _assert_of_one_process(case, found[case])


@pytest.mark.parametrize("kind", ["chain", "whole"])
def test_a_pass_that_no_wrapper_sees_is_warned_of_once(kind: str, found: Any) -> None:
    """And has the gradients of its own process."""
    first, second = found[f"nothing:{kind}"]
    assert first["warnings"].count("UnsynchronisedWarning") == 1
    name = next(iter(first["gradients"]))
    assert not torch.equal(first["gradients"][name], second["gradients"][name])


@pytest.mark.parametrize("case", ACCELERATED)
def test_accelerate_gives_gradients_of_one_process(case: str, found: Any) -> None:
    pytest.importorskip("accelerate", reason="an outside library that the project does not need")
    _assert_of_one_process(case, found[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_in_a_wrapper_gradients_are_those_of_one(case: str, found: Any) -> None:
    _assert_of_one_process(case, found[case])


def test_data_parallel_of_no_gpu_is_the_model() -> None:
    model = mixture("chain")
    assert torch.equal(nn.DataParallel(model)(*data()), mixture("chain")(*data()))
