"""Mixtures of experts made harder to attack, fast: arXiv 2402.18787 for PyTorch."""

from immunity_fast.runtime import interrupts  # noqa: F401  before what takes seconds to import

# isort: split
from pathlib import Path
from typing import Literal

import torch

from immunity_fast.losses import FusedImmunityLoss, ImmunityTerms
from immunity_fast.models.gate import RandomSwitchGate, SwitchingGateWarning
from immunity_fast.models.moe import ImmunityMoE, UnsynchronisedWarning

__all__ = [
    "FusedImmunityLoss",
    "ImmunityMoE",
    "ImmunityTerms",
    "RandomSwitchGate",
    "SwitchingGateWarning",
    "UnsynchronisedWarning",
    "load",
]
__version__ = "0.1.0"


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
