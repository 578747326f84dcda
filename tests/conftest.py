"""Before anything imports the kernels: on a machine without a GPU they run in Triton's interpreter."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # As many processes as cores: threads besides would wait for each other in every parallel region.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: xdist hands out files in this order, and none of these is to be left for the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What has been imported by now stays: a collection, which dozens of tests ask for, need not look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def caches_stay_where_they_are() -> Iterator[None]:
    """A command says for its whole process where compiled code is kept, in some tests in a folder of the test."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data set in MedMNIST's layout, as a file."""
    from tests.small_runs import write_data

    return write_data(tmp_path_factory.mktemp("data") / "data.npz")


@pytest.fixture(scope="session", autouse=True)
def ends_of_runs_are_short() -> Iterator[None]:
    """In this process; where figures and attacks are the matter, a test takes `whole_end`."""
    from tests import sketches

    with sketches.short():
        yield


@pytest.fixture
def whole_end() -> Iterator[None]:
    """What a trained run ends with is attacked and drawn as it is for a user."""
    from tests import sketches

    with sketches.whole():
        yield
