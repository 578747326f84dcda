"""Attacks on any callable from images to logits or log-probabilities, with torchattacks' conventions and defaults.

`gradient` has those that follow gradients, `autoattack` AutoAttack and Square Attack. Nothing here knows a model of
this package: what `mixtures` asks for is what a mixture can do.
"""

from immunity_fast.attacks.autoattack import autoattack, square
from immunity_fast.attacks.checks import NotFiniteError
from immunity_fast.attacks.gradient import ALPHA, EPS, Attack, BoundAttack, UnmovedWarning, bim, fgsm, mim, pgd
from immunity_fast.attacks.losses import Loss
from immunity_fast.attacks.mixtures import LabelledModel, Model
from immunity_fast.attacks.projections import Norm

__all__ = [
    "ALPHA",
    "EPS",
    "Attack",
    "BoundAttack",
    "LabelledModel",
    "Loss",
    "Model",
    "Norm",
    "NotFiniteError",
    "UnmovedWarning",
    "autoattack",
    "bim",
    "fgsm",
    "mim",
    "pgd",
    "square",
]
