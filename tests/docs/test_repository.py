"""What is around the code: workflows, hooks, templates and the citation are valid, and say what setup.py says."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import immunity_fast
from tests.docs.pages import name
from tests.places import REPOSITORY

yaml = pytest.importorskip("yaml", reason="PyYAML reads the files that are looked at here")

FILES = sorted(
    file
    for pattern in (".github/**/*.yml", ".pre-commit-config.yaml", "CITATION.cff")
    for file in REPOSITORY.glob(pattern)
)
KERNELS = Path("immunity_fast/kernels")  # a link, which a search for files need not follow
WORKFLOW = REPOSITORY / ".github" / "workflows" / "ci.yml"


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    found: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=found.update))
    runpy.run_path(str(REPOSITORY / "setup.py"))
    return found


@pytest.fixture
def jobs() -> dict[str, Any]:
    return dict(yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"])


def python_of(job: dict[str, Any]) -> tuple[int, ...]:
    (given,) = (step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert isinstance(given, str), f"{given}: unquoted, 3.10 is 3.1"
    return tuple(map(int, given.split(".")))


def commands_of(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("file", FILES, ids=name)
def test_it_is_valid_yaml(file: Path) -> None:
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


def test_every_job_runs_what_there_is(jobs: dict[str, Any]) -> None:
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for job in jobs.values():
        (command,) = commands_of(job)
        program, *rest = command.split()
        assert (set(rest) <= set(targets)) if program == "make" else (REPOSITORY / program).is_file(), command


def test_both_ends_of_what_setup_allows_are_tested(jobs: dict[str, Any], metadata: dict[str, Any]) -> None:
    least = tuple(map(int, metadata["python_requires"].removeprefix(">=").split(".")))
    pythons = {title: python_of(job) for title, job in jobs.items()}
    assert pythons["oldest"] == least
    assert pythons["newest"] == max(pythons.values())
    assert commands_of(jobs["oldest"]) == ["make test-oldest"], (
        "whose PyTorch is setup.py's lower bound: test_oldest.py"
    )
    assert commands_of(jobs["newest"]) == ["make test"], "whose PyTorch is the one of constraints.txt"
    # constraints.txt has versions that Python 3.10 has not.
    assert all(python >= (3, 11) for title, python in pythons.items() if title != "oldest")


def test_all_that_ci_does_is_in_the_workflow(jobs: dict[str, Any]) -> None:
    done = {command for job in jobs.values() for command in commands_of(job)}
    assert {"make lint", "make test", "make test-exhaustive", "make test-oldest", "make docs", ".ci/wheel"} <= done


def test_hooks_download_nothing() -> None:
    found = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repository["repo"] for repository in found["repos"]} == {"local"}
    assert {hook["language"] for repository in found["repos"] for hook in repository["hooks"]} == {"system"}


def test_a_report_of_a_fault_asks_for_info() -> None:
    form = yaml.safe_load((REPOSITORY / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text(encoding="utf-8"))
    asked = [part for part in form["body"] if "immunity_fast.info" in part["attributes"]["label"]]
    assert asked
    assert asked[0]["validations"]["required"]


def test_setup_lists_all_packages_and_files_beside_the_code(metadata: dict[str, Any]) -> None:
    there = {file.parent.relative_to(REPOSITORY) for file in (REPOSITORY / "immunity_fast").rglob("__init__.py")}
    assert sorted(metadata["packages"]) == sorted(".".join(folder.parts) for folder in {*there, KERNELS})
    listed = {f"{package}/{file}" for package, files in metadata["package_data"].items() for file in files}
    beside = (
        file
        for folder in there
        for file in (REPOSITORY / folder).iterdir()
        if file.is_file() and file.suffix not in (".py", ".pyc")
    )
    assert {f"{'.'.join(file.parent.relative_to(REPOSITORY).parts)}/{file.name}" for file in beside} == listed


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == immunity_fast.__version__
    (paper,) = cited["references"]
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    authors = " and ".join(f"{person['family-names']}, {person['given-names']}" for person in paper["authors"])
    assert authors in readme
    assert "2402.18787" in paper["url"]


def test_the_documentation_is_pinned() -> None:
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").lower()
    for package in ("sphinx", "myst-parser", "furo"):
        assert f"\n{package}==" in pins
