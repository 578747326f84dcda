"""Attacks on any callable from images to logits or log-probabilities, with torchattacks' conventions and defaults.

`gradient` has those that follow gradients, as functions, `descent` what is behind them; `autoattack` AutoAttack, and
`apgd`, `fab` and `square` its parts; `arc` and `mora` attack mixtures through their `members`; `saving` keeps what they
made; `witches_brew` poisons training images. Nothing here knows a model of this package: what `mixtures` asks for is
what a mixture can do.
"""

from immunity_fast.attacks.apgd import apgd
from immunity_fast.attacks.arc import arc, every_member, expected_loss
from immunity_fast.attacks.autoattack import autoattack
from immunity_fast.attacks.checks import NotFiniteError
from immunity_fast.attacks.descent import ALPHA, EPS, Attack, BoundAttack, UnmovedWarning, radius_of
from immunity_fast.attacks.gradient import bim, fgsm, mim, pgd
from immunity_fast.attacks.losses import Loss, OwnLoss
from immunity_fast.attacks.mixtures import LabelledModel, Model
from immunity_fast.attacks.modes import MovedStatisticsWarning
from immunity_fast.attacks.mora import mora
from immunity_fast.attacks.preprocessing import Preprocessing
from immunity_fast.attacks.projections import Bounds, Norm
from immunity_fast.attacks.saving import AdversarialImages, load_adversarial, save_adversarial
from immunity_fast.attacks.square import square
from immunity_fast.attacks.witches_brew import gradient_matching, witches_brew

__all__ = [
    "ALPHA",
    "EPS",
    "AdversarialImages",
    "Attack",
    "BoundAttack",
    "Bounds",
    "LabelledModel",
    "Loss",
    "Model",
    "MovedStatisticsWarning",
    "Norm",
    "NotFiniteError",
    "OwnLoss",
    "Preprocessing",
    "UnmovedWarning",
    "apgd",
    "arc",
    "autoattack",
    "bim",
    "every_member",
    "expected_loss",
    "fgsm",
    "gradient_matching",
    "load_adversarial",
    "mim",
    "mora",
    "pgd",
    "radius_of",
    "save_adversarial",
    "square",
    "witches_brew",
]
