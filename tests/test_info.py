"""`python -m immunity_fast.info`: what it says is so, and it says it on any machine, with torch alone."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from immunity_fast import functional, info
from immunity_fast.experts import NAMES
from immunity_fast.runtime.strategies import choose
from tests.places import REPOSITORY

SECTIONS = ["versions", "system", "devices", "backends", "auto", "architectures", "caches"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test, and no folder of compiled code but the one in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_its_packages_are_those_of_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=found.update))
    runpy.run_path(str(REPOSITORY / "setup.py"))
    extras = {"": found["install_requires"], "train": found["extras_require"]["train"]}
    stated = {Requirement(line).name: extra for extra, lines in extras.items() for line in lines}
    assert stated == info.PACKAGES


def test_text_and_json_hold_the_same(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info.main([])
    text = capsys.readouterr().out
    info.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == SECTIONS
    for section, values in found.items():
        assert f"\n{section}:\n" in f"\n{text}"
        for name, value in values.items():
            assert name in text
            if not isinstance(value, dict):
                assert str(value) in text
    assert found["versions"]["torch"] in text
    assert str(home) not in text, "a report need not tell whose home it is"
    assert "~/.cache/immunity_fast" in text


def test_auto_is_what_the_code_makes_of_it(home: Path) -> None:
    auto = info.collect()["auto"]
    device = torch.device(auto["device"])
    tensors = [torch.zeros(1, device=device)]
    assert (auto["backend of the losses"] == "triton") == functional._use_triton("auto", "activations", tensors)
    assert set(auto["batching, double backprop, memory format"]) == set(NAMES)
    for arch, ways in auto["batching, double backprop, memory format"].items():
        assert ways.split(", ")[0] == choose("auto", device, arch)
    assert auto["compile"] == ("on" if device.type == "cuda" else "off")


def test_what_is_broken_is_said_and_the_rest_as_well(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("driver:\n  no such device")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    monkeypatch.setattr(torch.cuda, "is_available", broken)  # which counts devices, or asks the driver, by a variable
    found = info.collect()
    assert found["devices"] == "not known: RuntimeError: driver: no such device"
    assert list(found) == SECTIONS
    assert "no such device" in info.to_text(found)


def test_it_needs_torch_alone(tmp_path: Path) -> None:
    missing = ["numpy", "rich", "jinja2", "matplotlib", "safetensors", "sklearn", "torchvision", "torchattacks", "PIL"]
    program = (
        "import runpy, sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        f"sys.modules.update(dict.fromkeys({missing}))\n"
        "sys.argv = ['info', '--json']\n"
        "runpy.run_module('immunity_fast.info', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert list(json.loads(done.stdout)) == SECTIONS


def test_what_is_not_installed_is_named_with_its_extra(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise info.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(info.importlib.metadata, "version", missing)
    versions = info.collect()["versions"]
    assert versions["rich"] == "not installed (extra train)"
    assert versions["triton"] == "not installed"


def test_architectures_are_listed_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["--archs"])
    assert set(capsys.readouterr().out.splitlines()) >= set(NAMES)
    info.main(["--archs", "robnet_large", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found[:2] == ["robnet_large", "robnet_large_v2"]
    assert all("robnet_large" in name for name in found)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_networks_of_a_library_are_listed_where_it_is(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm" if library == "timm" else "torchvision.models", reason="whose networks are listed")
    assert f"{library}:resnet18" in info.architectures("resnet18")
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.models", None)
    assert f"{library}:resnet18" not in info.architectures("resnet18")
    assert info.collect()["architectures"][library].startswith("not installed; pip install")
