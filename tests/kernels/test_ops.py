"""What holds for each custom op of the package, whatever it computes."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

from immunity_fast import kernels

for _module in pkgutil.iter_modules(kernels.__path__):  # which registers all ops that there are
    importlib.import_module(f"{kernels.__name__}.{_module.name}")


def _ops() -> list[str]:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("immunity_fast::")]
    return sorted(name.split("::")[1] for name in names)


@pytest.mark.parametrize("name", _ops())
def test_no_argument_has_a_default(name: str) -> None:
    """PyTorch 2.11 leaves out inputs that equal their defaults, and then wants as many fewer gradients back."""
    schema = getattr(torch.ops.immunity_fast, name).default._schema
    assert [argument.name for argument in schema.arguments if argument.has_default_value()] == []


def test_all_ops_are_seen() -> None:
    expected = {"heatmap_losses", "gradcam_heatmaps", "mixture_cross_entropy"}
    assert {name.removesuffix("_backward") for name in _ops()} >= expected
