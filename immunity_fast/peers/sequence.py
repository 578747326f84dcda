"""Members that are trained one after another in one run: whose turn it is, and what has to stay as it is meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from immunity_fast.models.expert_list import ExpertList
from immunity_fast.models.gate import FixedWeights, RandomSwitchGate, SelectionGate
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.peers.base import EnsembleLoss

NO_VOTE = -1e4  # a logit whose softmax is exactly 0 beside one of 0, and which is a number, as all of a checkpoint is


class SequentialLoss(EnsembleLoss):
    """What is common to ensembles whose members are trained in turn.

    A run has `stages` parts of as many epochs each. After every update all that is not trained in the present one is
    put back to what it was, bit for bit: weights and running statistics, whatever weight decay or momentum made of
    them. Members that are not trained yet have no vote.

    Args:
        label_smoothing, class_weights, ignore_index, group_name: see `EnsembleLoss`.

    Attributes:
        stage: the present part, from 0; `begin_epoch` sets it.
    """

    own_images = False
    stage = 0

    _there: Sequence[Tensor] = ()  # views of what is to stay
    _kept: Sequence[Tensor] = ()  # and copies of it

    def check_model(self, model: ImmunityMoE) -> None:
        votes_of(model.gate)
        super().check_model(model)

    def begin_epoch(self, model: ImmunityMoE, epoch: int, epochs: int, seed: int) -> bool:
        length = epochs // self.stages(model.num_experts)
        self.stage = epoch // length
        self.keep(model)
        return epoch % length == 0

    def begin_stage(self, model: ImmunityMoE, epoch: int, epochs: int, seed: int) -> None:
        self.change(model, seed)
        self.keep(model)

    def change(self, model: ImmunityMoE, seed: int) -> None:
        """Make of the weights, and of the votes, what the present stage begins with."""
        raise NotImplementedError

    def keep(self, model: ImmunityMoE) -> None:
        """Remember what updates may not change, as it is now."""
        with torch.no_grad():
            self._there = list(self.staying(model))
            self._kept = [tensor.clone() for tensor in self._there]

    def staying(self, model: ImmunityMoE) -> Iterable[Tensor]:
        """Views of all of the experts' tensors that the present stage leaves as they are."""
        raise NotImplementedError

    def after_update(self, model: ImmunityMoE) -> None:
        if self._there:
            with torch.no_grad():
                torch._foreach_copy_(list(self._there), list(self._kept))

    def all_used(self, model: ImmunityMoE, loss: Tensor) -> Tensor:
        """A loss that all parameters are in, with a gradient of 0 where they are not trained.

        Processes that train together wait for every parameter's gradient.
        """
        if not self._classes.group_name:
            return loss
        return loss + sum(0 * parameter.sum() for parameter in model.experts.parameters() if parameter.requires_grad)


class InTurn(SequentialLoss):
    """Expert m is trained in stage m, from 0; those before it are finished, those behind it have no vote yet.

    Args:
        label_smoothing, class_weights, ignore_index, group_name: see `EnsembleLoss`.
    """

    def check_experts(self, num_experts: int) -> None:
        if num_experts < 2:
            raise ValueError(f"experts: expected at least 2, which are trained one after another, got {num_experts}")

    def check_alike(self, model: ImmunityMoE) -> None:
        """Check that each member can begin from the one before it.

        Raises:
            ValueError: they are not alike.
        """
        for index in range(1, model.num_experts):
            own, last = (_of(model, each) for each in (index, index - 1))
            if [tensor.shape for tensor in own] != [tensor.shape for tensor in last]:
                raise ValueError(
                    "experts: expected experts of one architecture, each of which begins from the one before it, got "
                    f"experts {index} and {index + 1} of other shapes"
                )

    def stages(self, num_experts: int) -> int:
        return num_experts

    def staying(self, model: ImmunityMoE) -> Iterable[Tensor]:
        if isinstance(model.experts, ExpertList):
            for index, expert in enumerate(model.experts):
                if index != self.stage:
                    yield from (tensor.detach() for tensor in (*expert.parameters(), *expert.buffers()))
            return
        for stacked in (*model.experts.parameters(), *model.experts.buffers()):
            if self.stage:
                yield stacked.detach()[: self.stage]
            if self.stage + 1 < len(stacked):
                yield stacked.detach()[self.stage + 1 :]

    def change(self, model: ImmunityMoE, seed: int) -> None:
        count = self.stage + 1
        vote_(model.gate, [1 / count] * count + [0.0] * (model.num_experts - count))

    def member_logits(self, model: ImmunityMoE, images: Tensor) -> Tensor:
        """Logits (B, K) of the member that is trained, the only one that runs."""
        return model.some_logits(images, [self.stage])[0]

    def begin_from_the_last(self, model: ImmunityMoE) -> None:
        """Give the member that is to be trained the weights and statistics of the one before it, if there is one."""
        if not self.stage:
            return
        with torch.no_grad():
            for own, last in zip(_of(model, self.stage), _of(model, self.stage - 1), strict=True):
                own.copy_(last)


def _of(model: ImmunityMoE, index: int) -> list[Tensor]:
    """One expert's parameters and buffers, as views."""
    if isinstance(model.experts, ExpertList):
        expert = model.experts[index]
        return [tensor.detach() for tensor in (*expert.parameters(), *expert.buffers())]
    return [tensor.detach()[index] for tensor in (*model.experts.parameters(), *model.experts.buffers())]


def vote_(gate: RandomSwitchGate, weights: Sequence[float]) -> None:
    """Give a gate of fixed weights other ones, in place.

    Args:
        gate: a `SelectionGate`, or one whose network is `FixedWeights`.
        weights: N numbers ≥ 0 that sum to 1; who has 0 has no vote at all.

    Raises:
        ValueError: a gate whose weights are learned, or another number of weights.
    """
    kept = votes_of(gate)
    if len(weights) != len(kept):
        raise ValueError(f"weights: expected {len(kept)}, one an expert, got {len(weights)}")
    given = torch.tensor(weights, dtype=torch.float64)
    if not isinstance(gate, SelectionGate):
        # Of equal ones exactly 0, so that they are equal in the mixture.
        given = torch.where(given > 0, given.div(given.max()).log(), NO_VOTE)
    with torch.no_grad():
        kept.copy_(given)


def votes_of(gate: RandomSwitchGate) -> Tensor:
    """The buffer (N,) in which a gate of fixed weights has them: probabilities, or logits.

    Raises:
        ValueError: a gate whose weights are learned.
    """
    if isinstance(gate, SelectionGate):
        return gate.probabilities
    if isinstance(gate.network, FixedWeights):
        return gate.network.logits
    raise ValueError(
        f"gate: expected fixed weights or a selection, by which the members that are trained already can answer, got "
        f"{type(gate.network).__name__}"
    )


def buffers_alike(tensors: Mapping[str, Tensor], module: nn.Module, prefix: str) -> None:
    """Copy a module's buffers into tensors of a state that has them under a prefix, such as an average of weights.

    Args:
        tensors: by the names of the whole.
        module: a part of it.
        prefix: of the part's names, with a dot at its end.
    """
    for name, buffer in module.named_buffers():
        tensors[prefix + name].copy_(buffer)
