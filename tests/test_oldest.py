"""`make test-oldest` tests the lower bounds of setup.py: constraints-oldest.txt holds these very versions.

Not those of the extra `dev` alone: other people's networks and attacks are there in one version, as are the linters.
"""

import runpy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.places import REPOSITORY


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    found: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=found.update))
    runpy.run_path(str(REPOSITORY / "setup.py"))
    return found


def test_the_lower_bounds_are_what_is_tested(metadata: dict[str, Any]) -> None:
    lines = (REPOSITORY / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    tested = {canonicalize_name(name): Version(version) for name, version in pins.items()}
    assert len(tested) == len(pins), "one package, one version"
    extras = metadata["extras_require"]
    for extra in ("train", "export", "hub"):
        assert set(extras[extra]) <= set(extras["test"]) <= set(extras["dev"]), extra
    for requirement in map(Requirement, [*metadata["install_requires"], *extras["test"]]):
        (bound,) = (each for each in requirement.specifier if each.operator == ">=")
        assert {each.operator for each in requirement.specifier} <= {">=", "<"}
        assert tested[canonicalize_name(requirement.name)] == Version(bound.version), requirement
