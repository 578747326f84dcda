"""The members of a mixture as an attack on it sees them: N networks, and the weights by which answers are mixed.

`arc` and `mora` attack through them. A mixture of this package, or anybody's that can do what `mixtures.Mixture` says,
has them; a list of networks has them; of any other callable nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from immunity_fast.attacks import mixtures
from immunity_fast.attacks.mixtures import Mixture, Model, is_mixture, trained_gate
from immunity_fast.attacks.modes import attacked
from immunity_fast.attacks.preprocessing import Preprocessing, preprocessed
from immunity_fast.runtime.outputs import check_logits
from immunity_fast.runtime.precision import accumulation_dtype

Weighing = Literal["mean", "off"]  # what is drawn on average, 1/N each of permutations, or the trained weights


class EnsembleMembers(Protocol):
    """N networks, and how much each counts."""

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, B, K) of all members for images (B, C, H, W), by one pass over each."""

    def one(self, index: int, images: Tensor) -> Tensor:
        """Logits (B, K) of one member; where that costs less than all, the others are not asked."""

    def weights(self, images: Tensor) -> Tensor:
        """(B, N) weights ≥ 0, each row summing to 1."""


class NetworkMembers(EnsembleMembers):
    """Networks of one's own.

    Args:
        networks: N callables from images (B, C, H, W) to logits (B, K).
        weights: N numbers ≥ 0, which are divided by their sum; None is 1/N each.
        preprocessing: of images on their way to all of them.

    Raises:
        ValueError: no network, or weights of another number, negative, not finite, or all zero.
        TypeError: what cannot be called, weights that are no numbers.
    """

    def __init__(
        self,
        networks: Sequence[Model],
        weights: Sequence[float] | Tensor | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self.networks = list(networks)
        if not self.networks:
            raise ValueError("model: expected at least one network, got none")
        for network in self.networks:
            if not callable(network):
                raise TypeError(f"model: expected networks that can be called, got {type(network).__name__}")
        count = len(self.networks)
        given = torch.full((count,), 1 / count, dtype=torch.float64)
        if weights is not None:
            try:
                given = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
            except (TypeError, ValueError):
                raise TypeError(f"weights: expected numbers, one of each network, got {weights!r}") from None
        if given.shape != (count,):
            raise ValueError(f"weights: expected one of each network ({count},), got {tuple(given.shape)}")
        if not (bool(given.isfinite().all()) and bool((given >= 0).all()) and float(given.sum()) > 0):
            raise ValueError(f"weights: expected finite numbers of at least 0, some above it, got {given.tolist()}")
        self.shares = given / given.sum()
        self._asked = [preprocessed(network, preprocessing) for network in self.networks]

    def logits(self, images: Tensor) -> Tensor:
        found = [self.one(i, images) for i in range(len(self.networks))]
        for i, logits in enumerate(found):
            if logits.shape != found[0].shape:
                raise ValueError(f"model: expected {found[0].shape[-1]} classes of network {i}, got {logits.shape[-1]}")
        return torch.stack(found)

    def one(self, index: int, images: Tensor) -> Tensor:
        return check_logits("model", index, self._asked[index](images), len(images))

    def weights(self, images: Tensor) -> Tensor:
        if self.shares.device != images.device:  # a copy from the host is waited for
            self.shares = self.shares.to(images.device)
        return self.shares.to(accumulation_dtype(images)).expand(len(images), -1)


class MixtureMembers(EnsembleMembers):
    """The experts of a mixture.

    Args:
        mixture: in evaluation mode. Its switch does not matter.
        weighing: "off", the gate's weights as they were trained; "mean", 1/N each, the mean of their permutations. Of a
            gate whose weights are fixed both are these.
        expert_logits: what computes the mixture's, if compiled code is to; None is its own.
        preprocessing: of images on their way to the mixture.
    """

    def __init__(
        self,
        mixture: mixtures.Mixture,
        weighing: Weighing = "off",
        expert_logits: Callable[[Tensor], Tensor] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self.mixture, self.weighing = mixture, weighing
        self.expert_logits = preprocessed(expert_logits or mixture.expert_logits, preprocessing)
        self._weights = preprocessed(self._weights_of, preprocessing)

    def logits(self, images: Tensor) -> Tensor:
        return self.expert_logits(images)

    def one(self, index: int, images: Tensor) -> Tensor:
        return self.expert_logits(images)[index]

    def weights(self, images: Tensor) -> Tensor:
        return self._weights(images)

    def _weights_of(self, images: Tensor) -> Tensor:
        if self.weighing == "off":
            return trained_gate(self.mixture, images)
        with self.mixture.gate.switched("mean"):
            weights: Tensor = self.mixture.gate_weights(images)
        return weights


def mixture_in(model: Any) -> Mixture | None:
    """The mixture that a model is, also behind `ImmunityMoE.deterministic()` or `torch.compile`; None if it is none."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        return None
    if is_mixture(model):
        return model
    inner = getattr(model, "exact_mean_of", None)  # not just any module that has a mixture inside
    return inner if isinstance(inner, nn.Module) and is_mixture(inner) else None


def networks_in(model: Any) -> list[Model] | None:
    """The networks that a list, a tuple or an `nn.ModuleList` holds; None if it is none of these."""
    return list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else None


@contextmanager
def all_attacked(model: Any) -> Iterator[None]:
    """`modes.attacked` of a model, or of each of a list's networks, in a `with` block."""
    with ExitStack() as stack:
        for network in networks_in(model) or [model]:
            stack.enter_context(attacked(network))
        yield
