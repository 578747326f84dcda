"""The expert networks: one file a kind of architecture of ours, and those of libraries and users by their names."""

from immunity_fast.experts.cost import flops, wider
from immunity_fast.experts.registry import NAMES, WITH_STEMS, create, resolve, split_names, title
from immunity_fast.experts.symmetry import identical, perturb_

__all__ = [
    "NAMES",
    "WITH_STEMS",
    "create",
    "flops",
    "identical",
    "perturb_",
    "resolve",
    "split_names",
    "title",
    "wider",
]
