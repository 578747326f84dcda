"""Mixtures of experts made harder to attack, fast: arXiv 2402.18787 for PyTorch.

What is public here is imported when it is first asked for: the console command lists its commands, and completes their
options, without the seconds that PyTorch takes.
"""

from __future__ import annotations

from immunity_fast.runtime import interrupts  # noqa: F401  before what takes seconds to import

# isort: split
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from immunity_fast.losses import FusedImmunityLoss, ImmunityTerms
    from immunity_fast.models.capture import capture_activations
    from immunity_fast.models.gate import RandomSwitchGate, SwitchingGateWarning
    from immunity_fast.models.moe import ImmunityMoE, UnsynchronisedWarning
    from immunity_fast.peers.adp import ADPLoss
    from immunity_fast.peers.boosting import BARRELoss, MRBoostLoss
    from immunity_fast.peers.dverge import DVERGELoss
    from immunity_fast.peers.gal import GALLoss
    from immunity_fast.peers.hrs import HRSLoss
    from immunity_fast.peers.rse import RSELoss
    from immunity_fast.peers.trs import TRSLoss

__all__ = [
    "ADPLoss",
    "BARRELoss",
    "DVERGELoss",
    "FusedImmunityLoss",
    "GALLoss",
    "HRSLoss",
    "ImmunityMoE",
    "ImmunityTerms",
    "MRBoostLoss",
    "RSELoss",
    "RandomSwitchGate",
    "SwitchingGateWarning",
    "TRSLoss",
    "UnsynchronisedWarning",
    "capture_activations",
    "export",
    "load",
]
__version__ = "0.1.0"

# Where the public names are from.
_MODULES = {
    "ADPLoss": "peers.adp",
    "BARRELoss": "peers.boosting",
    "DVERGELoss": "peers.dverge",
    "FusedImmunityLoss": "losses",
    "GALLoss": "peers.gal",
    "HRSLoss": "peers.hrs",
    "ImmunityMoE": "models.moe",
    "ImmunityTerms": "losses",
    "MRBoostLoss": "peers.boosting",
    "RSELoss": "peers.rse",
    "RandomSwitchGate": "models.gate",
    "SwitchingGateWarning": "models.gate",
    "TRSLoss": "peers.trs",
    "UnsynchronisedWarning": "models.moe",
    "capture_activations": "models.capture",
}


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package, when it is first asked for."""
    if name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as missing:
            if missing.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(
    run: str | Path,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Literal["best", "last"] | None = None,
    trust_code: bool = False,
) -> ImmunityMoE:
    """The model of a run, ready to answer: in evaluation mode, by the exact mean of its gate's permutations.

    Its classes' names are `model.classes`, its images' size `model.image_size`; it normalises them itself. Needs
    safetensors.

    Args:
        run: the folder of a run, a checkpoint, `….safetensors`, or a folder that `save_pretrained` has written.
        device: where the model is to be.
        checkpoint: of a run's folder; None is the best one, where there is one, or else the last.
        trust_code: import an architecture of the form module.path:callable, whose code runs then.

    Returns:
        The mixture; a `SingleNetwork` of a run of one network.

    Raises:
        FileNotFoundError: there is no run, or no checkpoint in it yet.
        ValueError: files that are broken, weights that are NaN or infinite, an architecture that is not trusted.
        ModuleNotFoundError: safetensors or the architecture's library is not installed.

    Warns:
        UserWarning: the run stopped before its end.
    """
    from immunity_fast.deployment.loading import load_trained  # not at the top: it needs more than torch

    return load_trained(run, device=device, checkpoint=checkpoint, trust_code=trust_code)


def export(
    model: str | Path | ImmunityMoE,
    path: str | Path,
    *,
    format: Literal["onnx", "torch.export", "torchscript"] = "onnx",
    gate: Literal["mean", "off"] = "mean",
    dtype: torch.dtype | None = None,
    trust_code: bool = False,
) -> Path:
    """Write a model into a file that runs without this package, on any number of images at once.

    It holds `model.for_inference(gate)`, from images (B, C, H, W) in [0, 1] to log-probabilities (B, K), and, as
    metadata, the classes' names, the images' size, the normalisation, which is inside of the graph, and the stage.
    Before the file gets its name it runs on several numbers of images, and has to answer as the model does, to within
    1e-4 in float32; one of ONNX where ONNX Runtime is installed.

    Args:
        model: a mixture, or what `load` takes.
        path: the file to write; one that is there is replaced.
        format: "onnx" needs the extra `export`, onnx and onnxscript; "torch.export" and "torchscript" are PyTorch's,
            of which the first is the newer.
        gate: what weighs the experts: "mean", 1/N each, the exact mean of the gate's permutations; or "off", the
            trained weights as they are. A file draws nothing.
        dtype: of the weights and images; None is the model's.
        trust_code: see `load`.

    Returns:
        The file's path.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a gate that draws, a network that the format cannot hold, a file that does not answer as the model.
        TypeError: neither a run nor a mixture.
        ModuleNotFoundError: what the format needs is not installed.
    """
    from immunity_fast.deployment.exporting import export_trained  # not at the top, as above

    return export_trained(model, path, format=format, gate=gate, dtype=dtype, trust_code=trust_code)
