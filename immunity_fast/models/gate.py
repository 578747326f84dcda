"""The Random Switch Gate of arXiv 2402.18787: a small network that weighs the experts, shuffled at evaluation."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from immunity_fast.experts.staged import GlobalAveragePool
from immunity_fast.permutations import random_orders
from immunity_fast.runtime.checks import check_choice, check_whole
from immunity_fast.runtime.precision import accumulation_dtype

Switch = Literal["call", "sample", "off", "mean"]
GateKind = Literal["switch", "uniform", "selection"]

_expected = threading.local()  # `here`, in a `draws_expected` block


class SwitchingGateWarning(UserWarning):
    """Gradients by the images are taken through a gate that draws: attacks that follow them find less than there is."""


@contextmanager
def draws_expected() -> Iterator[None]:
    """No `SwitchingGateWarning` in a `with` block, in this thread: who is in it knows that gates may draw."""
    before = getattr(_expected, "here", False)
    _expected.here = True
    try:
        yield
    finally:
        _expected.here = before


class RandomSwitchGate(nn.Module):
    """Images (B, channels, H, W) to the experts' weights (B, N), at least float32, ≥ 0, each row summing to 1.

    In training mode these are the trained weights. In evaluation mode `switch` decides:

    * "call": one random permutation of the experts for the whole batch, drawn at every call;
    * "sample": one for each image;
    * "off": the trained weights as they are;
    * "mean": 1/N each, the exact expectation over all N! permutations, because a row sums to 1.

    Weights that are fixed, `FixedWeights`, are the answer in every mode, and nothing is drawn.

    Gradients by the images through a permutation that was drawn are one draw's; what follows them, such as an attack of
    another library, moves images against a mixture that answers otherwise the next time. Of that there is a
    `SwitchingGateWarning`, once a gate: not in training mode, not without gradients, not in compiled code, and not
    where `switched` says that the draw is meant.

    Args:
        num_experts: N ≥ 1.
        network: from images to (B, N) logits of the weights; None is two strided convolutions and a linear layer.
        switch: see above; may be set at any time.
        generator: where the permutations come from, on any device; None is PyTorch's default generator.
        channels: of the images that the network which is made here takes.

    Raises:
        ValueError: an unknown switch, fewer than one expert or channel; when it runs, a network with another number of
            outputs.
    """

    _warned = False
    selects = False  # whether it draws one expert, with fixed probabilities

    def __init__(
        self,
        num_experts: int,
        network: nn.Module | None = None,
        switch: Switch = "call",
        generator: torch.Generator | None = None,
        channels: int = 3,
    ) -> None:
        super().__init__()
        check_whole("num_experts", num_experts, 1)
        check_whole("channels", channels, 1)
        self.num_experts = num_experts
        self._here = threading.local()  # `switch`, where a `switched` block of this thread has another
        self.switch = switch
        self.generator = generator
        if network is None:
            network = nn.Sequential(
                nn.Conv2d(channels, 16, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
                nn.ReLU(),
                GlobalAveragePool(),
                nn.Linear(32, num_experts),
            )
        self.network = network

    @property
    def is_random(self) -> bool:
        """Whether it draws in evaluation mode, when `switch` says so: not where its weights are fixed."""
        return not isinstance(self.network, FixedWeights)

    def fixed_weights(self, dtype: torch.dtype) -> Tensor | None:
        """The weights (N,) by which it mixes on average, where they are the same for all images; else None.

        Args:
            dtype: of the weights.
        """
        return self.network.weights(dtype) if isinstance(self.network, FixedWeights) else None

    @property
    def switch(self) -> Switch:
        """How the weights are permuted in evaluation mode."""
        here: Switch | None = getattr(self._here, "switch", None)
        return self._switch if here is None else here

    @switch.setter
    def switch(self, value: Switch) -> None:
        check_choice("switch", value, Switch)
        if getattr(self._here, "switch", None) is None:
            self._switch: Switch = value
        else:
            self._here.switch = value

    @contextmanager
    def switched(self, switch: Switch) -> Iterator[None]:
        """Another `switch`, or the same on purpose, for the length of a `with` block, in this thread alone."""
        check_choice("switch", switch, Switch)
        before = getattr(self._here, "switch", None)
        self._here.switch = switch
        try:
            yield
        finally:
            self._here.switch = before

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which have no thread's part: their `switch` is this thread's."""
        kept = {name: value for name, value in vars(self).items() if name not in ("_here", "_warned")}
        return kept | {"_switch": self.switch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._here = threading.local()

    def forward(self, images: Tensor) -> Tensor:
        """Weights (B, N) for `images` (B, channels, H, W).

        Raises:
            ValueError: the gate's network gives no (B, N).
        """
        dtype = accumulation_dtype(images)
        if (fixed := self.fixed_weights(dtype)) is not None:
            return self._of_all(fixed.expand(images.shape[0], -1), images)
        if not self.training and self.switch == "mean":
            return images.new_full((images.shape[0], self.num_experts), 1 / self.num_experts, dtype=dtype)
        scores = self._of_all(self.network(images), images)
        weights = scores.softmax(-1, dtype=accumulation_dtype(scores))
        if self.training or self.switch == "off":
            return weights
        if images.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_of_draws()
        samples = images.shape[0]
        rows = samples if self.switch == "sample" else 1  # "call": the same in all rows
        orders = random_orders(rows, self.num_experts, self.generator, weights.device)
        return weights.gather(-1, orders.expand(samples, -1))

    def _of_all(self, scores: Tensor, images: Tensor) -> Tensor:
        """What the gate's network gives, if it is (B, N)."""
        expected = (images.shape[0], self.num_experts)
        if scores.shape != expected:
            raise ValueError(f"network: expected logits (B, N) = {expected} of the gate, got {tuple(scores.shape)}")
        return scores

    def _warn_of_draws(self) -> None:
        meant = getattr(self._here, "switch", None) is not None or getattr(_expected, "here", False)
        if self._warned or meant or self.num_experts == 1:
            return
        self._warned = True
        warnings.warn(
            f"gradients by the images are taken through a gate that switches at random (switch={self.switch!r}): an "
            "attack that follows them finds less than there is, and a robust accuracy comes out too high; attack "
            "model.deterministic(), which answers by the exact mean, or average over draws, as "
            "evaluation.gate_attackers.attacker(model, 'eot') does; `with model.gate.switched(...)` says that it is "
            "meant",
            SwitchingGateWarning,
            stacklevel=2,
        )


class FixedWeights(nn.Module):
    """The same logits (B, N) for all images: what weighs the experts of a gate that has nothing to learn.

    Args:
        num_experts: N; each counts as much.

    Attributes:
        logits: (N,), a buffer, 0 each at first; −∞ is a weight of 0.
    """

    logits: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        check_whole("num_experts", num_experts, 1)
        self.register_buffer("logits", torch.zeros(num_experts))

    def forward(self, images: Tensor) -> Tensor:
        """(B, N) for images (B, …)."""
        return self.logits.expand(images.shape[0], -1)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """(N,), summing to 1."""
        return self.logits.softmax(-1, dtype=dtype)


class SelectionGate(RandomSwitchGate):
    """A gate that answers by one expert, drawn with fixed probabilities: weights (B, N) of which one is 1.

    In evaluation mode "call" draws one expert for the whole batch, "sample" one for each image; "off" and "mean" are
    the probabilities, the exact expectation of the draw, and so is training mode.

    Args:
        num_experts: N ≥ 1.
        switch, generator: see `RandomSwitchGate`.

    Attributes:
        probabilities: (N,), ≥ 0, not all 0, which are divided by their sum; a buffer, 1/N each at first.
    """

    probabilities: Tensor
    selects = True

    def __init__(self, num_experts: int, switch: Switch = "call", generator: torch.Generator | None = None) -> None:
        super().__init__(num_experts, nn.Identity(), switch, generator)
        self.register_buffer("probabilities", torch.full((num_experts,), 1 / num_experts))

    def fixed_weights(self, dtype: torch.dtype) -> Tensor:
        """The probabilities (N,), summing to 1 in this dtype."""
        probabilities = self.probabilities.to(dtype)
        return probabilities / probabilities.sum()

    def forward(self, images: Tensor) -> Tensor:
        """Weights (B, N) for `images` (B, …)."""
        samples = len(images)
        expected = self.fixed_weights(accumulation_dtype(images)).expand(samples, -1)
        if self.training or self.switch in ("off", "mean"):
            return expected
        if images.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_of_draws()
        rows = expected if self.switch == "sample" else expected[:1]
        return selected(rows, self.generator).expand(samples, -1)


def selected(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One expert in each row (B, N), drawn with the row's probabilities: weights (B, N), 1 of it and 0 of the others.

    Args:
        probabilities: (B, N), each row summing to 1.
        generator: on any device; None is PyTorch's default generator of the probabilities' device.
    """
    source = probabilities.device if generator is None else generator.device
    drawn = torch.rand(len(probabilities), 1, generator=generator, device=source, dtype=torch.float64)
    bounds = probabilities.double().cumsum(-1)[:, :-1]  # the last expert has the rest, whatever rounding has made of it
    chosen = (drawn.to(probabilities.device, non_blocking=True) >= bounds).sum(-1)
    return torch.nn.functional.one_hot(chosen, probabilities.shape[-1]).to(probabilities.dtype)


def gate_of(
    kind: GateKind,
    num_experts: int,
    *,
    switch: Switch = "call",
    generator: torch.Generator | None = None,
    channels: int = 3,
) -> RandomSwitchGate:
    """A new gate.

    Args:
        kind: "switch", the paper's, whose weights are learned and permuted; "uniform", 1/N each, in which a permutation
            changes nothing; "selection", one expert at random, see `SelectionGate`.
        num_experts: N.
        switch, generator, channels: see `RandomSwitchGate`.

    Raises:
        ValueError: an unknown kind.
    """
    check_choice("gate", kind, GateKind)
    if kind == "selection":
        return SelectionGate(num_experts, switch, generator)
    network = FixedWeights(num_experts) if kind == "uniform" else None
    return RandomSwitchGate(num_experts, network, switch, generator, channels)


def kind_of_gate(gate: RandomSwitchGate) -> GateKind:
    """Which of `gate_of`'s kinds a gate is; one with a network of the user's is a "switch"."""
    if isinstance(gate, SelectionGate):
        return "selection"
    return "uniform" if isinstance(gate.network, FixedWeights) else "switch"
