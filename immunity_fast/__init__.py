"""Mixtures of experts made harder to attack, fast: arXiv 2402.18787 for PyTorch."""

from immunity_fast.runtime import interrupts  # noqa: F401  before what takes seconds to import

# isort: split
from immunity_fast.losses import FusedImmunityLoss, ImmunityTerms
from immunity_fast.models.capture import capture_activations
from immunity_fast.models.gate import RandomSwitchGate
from immunity_fast.models.moe import ImmunityMoE

__all__ = ["FusedImmunityLoss", "ImmunityMoE", "ImmunityTerms", "RandomSwitchGate", "capture_activations"]
__version__ = "0.1.0"
