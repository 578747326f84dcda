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
        if not self.training and self.switch == "mean":
            dtype = accumulation_dtype(images)
            return images.new_full((images.shape[0], self.num_experts), 1 / self.num_experts, dtype=dtype)
        scores: Tensor = self.network(images)
        if scores.shape != (images.shape[0], self.num_experts):
            expected = (images.shape[0], self.num_experts)
            raise ValueError(f"network: expected logits (B, N) = {expected} of the gate, got {tuple(scores.shape)}")
        weights = scores.softmax(-1, dtype=accumulation_dtype(scores))
        if self.training or self.switch == "off":
            return weights
        if images.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_of_draws()
        samples = images.shape[0]
        rows = samples if self.switch == "sample" else 1  # "call": the same in all rows
        orders = random_orders(rows, self.num_experts, self.generator, weights.device)
        return weights.gather(-1, orders.expand(samples, -1))

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
