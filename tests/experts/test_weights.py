"""Weights from files: which files are read, and how they fit an expert."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from immunity_fast import ImmunityMoE
from immunity_fast.experts import create
from immunity_fast.experts.weights import Fitted, experts_of, fitted, read


def _state(classes: int = 4, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return create("resnet8", classes).state_dict()


def _saved(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def _fit(path: Path, content: Any, classes: int = 4, arch: str = "resnet8") -> Fitted:
    return fitted(read(_saved(path, content)), arch, create(arch, classes).state_dict(), classes)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_a_state_dict_of_any_kind_of_file(suffix: str, tmp_path: Path) -> None:
    path = _saved(tmp_path / f"w{suffix}", _state())
    file = read(str(path))
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not file.mixture
    assert file.tensors.keys() == _state().keys()
    assert all(torch.equal(value, _state()[name]) for name, value in file.tensors.items())


@pytest.mark.parametrize(
    "wrapped",
    [
        {"state_dict": _state(), "epoch": 3},
        {"model": _state(), "optimizer": {"state": {}}},
        {"model_state_dict": {f"module.{name}": value for name, value in _state().items()}},
        {"state_dict": {f"module._orig_mod.{name}": value for name, value in _state().items()}},
        {f"_orig_mod.module.{name}": value for name, value in _state().items()},
        {f"expert.{name}": value for name, value in _state().items()} | {"normalize.mean": torch.zeros(3, 1, 1)},
        {name: value for name, value in _state().items() if not name.endswith("num_batches_tracked")},
        {name: value.half() if value.is_floating_point() else value for name, value in _state().items()},
    ],
    ids=["state_dict", "model", "module", "both", "turned", "unstacked", "uncounted", "half"],
)
def test_wrappers_and_prefixes(wrapped: dict[str, Any], tmp_path: Path) -> None:
    fits = _fit(tmp_path / "w.pth", wrapped)
    assert not fits.replaced
    expected = {n: v for n, v in _state().items() if n in fits.tensors}
    assert len(fits.tensors) >= len(list(create("resnet8").parameters()))
    assert all(torch.allclose(v.float(), expected[n].float(), atol=1e-3) for n, v in fits.tensors.items())


@pytest.mark.parametrize(("classes", "in_file"), [(4, 10), (10, 4), (4, 1000)])
def test_a_head_of_other_classes_is_left_out(classes: int, in_file: int, tmp_path: Path) -> None:
    fits = _fit(tmp_path / "w.pt", _state(in_file), classes)
    assert fits.replaced == ("classifier.1.weight", "classifier.1.bias")
    assert fits.classes == in_file
    assert fits.tensors.keys() == _state().keys() - set(fits.replaced)


def test_a_file_without_a_head(tmp_path: Path) -> None:
    headless = {name: value for name, value in _state().items() if not name.startswith("classifier")}
    fits = _fit(tmp_path / "w.pt", headless)
    assert (fits.replaced, fits.classes) == (("classifier.1.weight", "classifier.1.bias"), 0)


def test_auxiliary_classifiers_are_no_mismatch(tmp_path: Path) -> None:
    extra = {"aux1.conv.conv.weight": torch.zeros(1), "AuxLogits.fc.weight": torch.zeros(1)}
    assert not _fit(tmp_path / "w.pt", _state() | extra).replaced


def test_torchvision_s_names_and_another_head(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models", reason="its weights")
    own = create("resnet18", 5, stem="imagenet").state_dict()
    file = read(_saved(tmp_path / "w.pth", models.resnet18().state_dict()))
    fits = fitted(file, "resnet18", own, 5)
    assert fits.classes == 1000
    assert own.keys() - fits.tensors.keys() == {"classifier.1.weight", "classifier.1.bias"}
    text = r"w\.pth: expected the weights of resnet18, got a file without stem\.0.*; .* that --stem imagenet has$"
    with pytest.raises(ValueError, match=text):
        fitted(file, "resnet18", create("resnet18", 5).state_dict(), 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem.0.weight": None}, r"got a file without stem\.0\.weight$"),
        ({"stem.9.weight": torch.zeros(2)}, r"got a file with stem\.9\.weight, which it does not have$"),
        (
            {"stem.0.weight": torch.zeros(16, 3, 5, 5)},
            r"stem\.0\.weight of shape \(16, 3, 5, 5\) where \(16, 3, 3, 3\) was expected$",
        ),
        ({"classifier.1.weight": torch.zeros(9, 64)}, None),
        ({"classifier.1.weight": torch.zeros(9, 64), "stem.0.weight": None}, r"without stem\.0\.weight, with classif"),
    ],
    ids=["missing", "unexpected", "misshaped", "half a head", "two"],
)
def test_other_mismatches_are_a_line(changes: dict[str, Tensor | None], message: str | None, tmp_path: Path) -> None:
    state = {name: value for name, value in (_state() | changes).items() if value is not None}
    if message is None:
        assert _fit(tmp_path / "w.pt", state).replaced == ("classifier.1.weight",)
        return
    with pytest.raises(ValueError, match=r"w\.pt: expected the weights of resnet8, .*" + message) as raised:
        _fit(tmp_path / "w.pt", state)
    assert "\n" not in str(raised.value)


class _Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("echo no > never",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pt", {"a": _Code()}, "holds other objects, which would run code: save model.state_dict"),
        ("w.pt", nn.Linear(2, 3), "holds other objects, which would run code: save model.state_dict"),
        ("w.pt", [torch.zeros(2)], "expected a state dict, tensors by name, got list"),
        ("w.pt", {"epoch": 3}, "expected a state dict, tensors by name, got epoch"),
        ("w.pt", {"a": torch.tensor([1.0, float("nan")])}, "expected finite weights, got NaN or infinite ones in a"),
        ("w.pt", b"no zip archive", "expected a file of weights, got "),
        ("w.safetensors", b"no tensors", "expected a file of weights, got "),
        ("no/such.pt", None, "No such file"),
    ],
)
def test_a_file_of_something_else_is_a_line(
    name: str, content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        _saved(path, content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + f": .*{message}") as raised:
        read(path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "never").exists(), "no code of the file's is run"


@pytest.mark.parametrize("arch", ["resnet8", "resnet8,resnet18"])
def test_a_mixture_s_experts(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ImmunityMoE(arch, 2, 3, image_size=16, stage="stem")
    file = read(_saved(tmp_path / "w.pt", model.state_dict()))
    assert file.mixture
    for own, alone in zip(experts_of(file), model.unstack(), strict=True):
        expected = {n: v for n, v in alone.state_dict().items() if not n.startswith("normalize.")}
        assert own.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in own.items())
