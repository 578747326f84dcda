"""Networks that are cut into blocks of several channels each, one of which is drawn of every block: HRS.

Wang et al., IJCAI 2019; compared with the authors' code, https://github.com/KieranXWang/HRS.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from immunity_fast.experts.staged import StagedNetwork, initialise
from immunity_fast.models.chains import is_chain
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.models.stacking import own_tensors, places, unstack_modules
from immunity_fast.peers.sequence import SequentialLoss, vote_
from immunity_fast.runtime.checks import check_whole


class HRSLoss(SequentialLoss):
    """Hierarchical random switching: a mixture of the C^M paths through M blocks of C channels, one of which answers.

    Every expert is a path, a network of one channel a block, and paths that share a channel have the same tensors
    there, bit for bit. The drawn expert is then the drawn channels. Of expert i the channels are the digits of i in
    base C, the first block's first.

    Training has C stages a block, first to last. Channel c of block b is trained by cross-entropy with a channel of
    each earlier block drawn at random for every batch, which are finished and stay as they are, running statistics
    included, and with fresh later blocks on top, which learn along and are then dropped. Until the last block's turn
    those on top of the present channel answer. Adversarial training, which HRS does not have, attacks the network that
    a batch trains.

    Blocks are children of the experts' chain, cut where the largest block has the fewest parameters.

    Args:
        blocks: M.
        label_smoothing, class_weights, ignore_index, group_name: see `EnsembleLoss`.

    Raises:
        ValueError: fewer than one block.
        TypeError: no whole number of them.
    """

    gate = "selection"
    compiles = False  # each draw of channels would be code of its own
    fresh = True

    def __init__(self, blocks: int = 2, **shared: Any) -> None:
        super().__init__(**shared)
        check_whole("blocks", blocks, 1)
        self.blocks = blocks
        self._drawn: tuple[int, ...] = ()
        self._ties: tuple[list[Tensor], list[Tensor]] = ([], [])

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, 0-d.

        Args:
            logits: (B, K) of the path that is trained.
            targets: (B,) integers or (B, K) probabilities.
        """
        return self.mean(self.expert_losses(logits[None], targets)[0], targets, logits.shape[-1])

    def check_experts(self, num_experts: int) -> None:
        if self._root(num_experts) is None:
            such = ", such as " + " or ".join(str(count**self.blocks) for count in (2, 3)) if self.blocks < 10 else ""
            raise ValueError(
                f"experts: expected one for each path through {self.blocks} blocks of 2 or more channels each{such}, "
                f"got {num_experts}"
            )

    def check_model(self, model: ImmunityMoE) -> None:
        super().check_model(model)
        blocks_of(model.experts, self.blocks)

    def _root(self, num_experts: int) -> int | None:
        """C, of which the M-th power is N."""
        if self.blocks >= num_experts.bit_length():  # 2 channels each would already be more, and that power huge
            return None
        nearest = round(num_experts ** (1 / self.blocks))
        return nearest if nearest**self.blocks == num_experts else None

    def channels(self, num_experts: int) -> int:
        """C: channels of each block.

        Args:
            num_experts: N = C^M.

        Raises:
            ValueError: it is no such power.
        """
        self.check_experts(num_experts)
        found = self._root(num_experts)
        assert found is not None
        return found

    def stages(self, num_experts: int) -> int:
        return self.blocks * self.channels(num_experts)

    def turn(self, num_experts: int) -> tuple[int, int]:
        """(b, c): the block and the channel of it that the present stage trains, from 0."""
        return divmod(self.stage, self.channels(num_experts))

    def paths(self, num_experts: int) -> list[tuple[int, ...]]:
        """The channels of each expert, one a block."""
        return list(itertools.product(range(self.channels(num_experts)), repeat=self.blocks))

    def begin_epoch(self, model: ImmunityMoE, epoch: int, epochs: int, seed: int) -> bool:
        begins = super().begin_epoch(model, epoch, epochs, seed)
        self._drawn = (0,) * self.turn(model.num_experts)[0]
        return begins

    def begin_batch(self, model: ImmunityMoE, batch: int, seed: int) -> None:
        block = self.turn(model.num_experts)[0]
        generator = torch.Generator().manual_seed((seed * 1_000_003 + batch) % 2**63)
        self._drawn = tuple(torch.randint(self.channels(model.num_experts), (block,), generator=generator).tolist())

    def change(self, model: ImmunityMoE, seed: int) -> None:
        block, channel = self.turn(model.num_experts)
        paths, of_names = self.paths(model.num_experts), blocks_of(model.experts, self.blocks)
        fresh = anew(model.experts, seed * 1_000_003 + self.stage)
        with torch.no_grad():
            for name, stacked in own_tensors(model.experts).items():
                own = of_names[name]
                if not self.stage:  # as many channels as there are, of the networks that the run begins with
                    beginning = stacked.clone()
                    for index, path in enumerate(paths):
                        stacked[index].copy_(beginning[self._home(own, path[own], len(paths))])
                if own < block:
                    continue
                for index, path in enumerate(paths):
                    if path[own] == (channel if own == block else 0):
                        stacked[index].copy_(fresh[name])
        last = block == self.blocks - 1
        voting = [
            (path[block] <= channel if last else path[block] == channel) and not any(path[block + 1 :])
            for path in paths
        ]
        vote_(model.gate, [vote / sum(voting) for vote in voting])

    def _home(self, block: int, channel: int, num_experts: int) -> int:
        """The expert whose tensors of a channel are trained: that with the first channel of all other blocks."""
        channels: int = self.channels(num_experts)
        return channel * int(channels ** (self.blocks - 1 - block))

    def _trained(self, block: int, num_experts: int) -> int | None:
        """Which channel of a block the present stage trains; None of one that is finished."""
        present, channel = self.turn(num_experts)
        return None if block < present else channel if block == present else 0

    def keep(self, model: ImmunityMoE) -> None:
        super().keep(model)
        self._ties = self._tied(own_tensors(model.experts), model)

    def staying(self, model: ImmunityMoE) -> Iterable[Tensor]:
        paths, of_names = self.paths(model.num_experts), blocks_of(model.experts, self.blocks)
        for name, stacked in own_tensors(model.experts).items():
            trained = self._trained(of_names[name], len(paths))
            for index, path in enumerate(paths):
                if path[of_names[name]] != trained:
                    yield stacked.detach()[index]

    def _tied(self, tensors: Mapping[str, Tensor], model: ImmunityMoE) -> tuple[list[Tensor], list[Tensor]]:
        """(Views that are to be as, views that are trained), of stacked tensors by their names in an expert."""
        paths, of_names = self.paths(model.num_experts), blocks_of(model.experts, self.blocks)
        copies: list[Tensor] = []
        homes: list[Tensor] = []
        for name, stacked in tensors.items():
            own = of_names[name]
            trained = self._trained(own, len(paths))
            if trained is None:
                continue
            home = self._home(own, trained, len(paths))
            for index, path in enumerate(paths):
                if path[own] == trained and index != home:
                    copies.append(stacked.detach()[index])
                    homes.append(stacked.detach()[home])
        return copies, homes

    def after_update(self, model: ImmunityMoE) -> None:
        super().after_update(model)
        _copy(*self._ties)

    def after_average(self, model: ImmunityMoE, tensors: Mapping[str, Tensor]) -> None:
        # Rounded alike they would be the same; but kernels may round an element by its place.
        averaged = {name: tensors[f"experts.{name}"] for name in own_tensors(model.experts)}
        _copy(*self._tied(averaged, model))

    def loss_and_terms(
        self, model: ImmunityMoE, images: Tensor, targets: Tensor, prepared: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        with self._finished_evaluating(model):
            loss = self(self._path_logits(model, images), targets)
        return self.all_used(model, loss), (loss,)

    def attacked(self, model: ImmunityMoE) -> Callable[[Tensor], Tensor]:
        return partial(self._path_logits, model)

    def _path_logits(self, model: ImmunityMoE, images: Tensor) -> Tensor:
        """Logits (B, K) of the drawn channels, the present one, and what is on top of it."""
        present, channel = self.turn(model.num_experts)
        drawn = (*self._drawn, channel, *(0,) * (self.blocks - present - 1))
        homes = [self._home(block, each, model.num_experts) for block, each in enumerate(drawn)]
        of_names = blocks_of(model.experts, self.blocks)
        fixed = {name for name, block in of_names.items() if block < present}
        return model.logits_of_parts(images, lambda name: homes[of_names[name]], fixed)

    @contextmanager
    def _finished_evaluating(self, model: ImmunityMoE) -> Iterator[None]:
        """Channels that are finished answer by their running statistics."""
        present = self.turn(model.num_experts)[0]
        children = dict(model.experts.named_children())
        parts = cut(model.experts, self.blocks)[:present]
        modes = [(part, part.training) for names in parts for name in names for part in children[name].modules()]
        for part, _ in modes:
            part.training = False
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training

    def passes(self, num_experts: int, attack_steps: int) -> float:
        """An image of an epoch takes one path."""
        return float(1 + attack_steps)


def cut(chain: nn.Module, blocks: int) -> list[list[str]]:
    """The names of a chain's children in so many blocks, in order, of which the largest has the fewest parameters.

    Every block has parameters; of cuts that are as good it is the first.

    Args:
        chain: an `nn.Sequential`, or such a stack.
        blocks: how many.

    Raises:
        ValueError: no chain, or one of too few children.
    """
    if not is_chain(chain):
        raise ValueError(
            "experts: expected chains of children of one structure, nn.Sequential, which can be cut into blocks, got "
            f"{type(chain).__name__}"
        )
    children = list(chain.named_children())
    sizes = [sum(parameter.numel() for parameter in child.parameters()) for _, child in children]
    best: tuple[int, tuple[int, ...]] | None = None
    for cuts in itertools.combinations(range(1, len(children)), blocks - 1):
        bounds = (0, *cuts, len(children))
        found = [sum(sizes[start:end]) for start, end in itertools.pairwise(bounds)]
        if min(found) > 0 and (best is None or max(found) < best[0]):
            best = max(found), bounds
    if best is None:
        raise ValueError(
            f"experts: expected chains of at least {blocks} children with parameters, one for each block, got "
            f"{sum(size > 0 for size in sizes)}"
        )
    return [[name for name, _ in children[start:end]] for start, end in itertools.pairwise(best[1])]


def blocks_of(chain: nn.Module, blocks: int) -> dict[str, int]:
    """The block, from 0, of each of a chain's parameters and buffers, by their names.

    Args:
        chain, blocks: see `cut`.

    Raises:
        ValueError: see `cut`; or a tensor is in two blocks.
    """
    of_children = {name: index for index, names in enumerate(cut(chain, blocks)) for name in names}
    found = {name: of_children[name.partition(".")[0]] for name in own_tensors(chain)}
    of_tensors = {id(value): found[name] for name, value in own_tensors(chain).items()}
    for place, value in places(chain):
        child = place.partition(".")[0]
        if of_children.get(child, of_tensors[id(value)]) != of_tensors[id(value)]:
            raise ValueError(f"experts: expected tensors of one block each, got {place} in several")
    return found


def anew(stacked: nn.Module, seed: int) -> dict[str, Tensor]:
    """A freshly initialised expert's parameters and buffers, by their names, on the CPU.

    Args:
        stacked: a stack of experts, which stays as it is.
        seed: of the draw; PyTorch's default generators stay as they are.

    Raises:
        ValueError: a module with parameters of its own cannot be initialised anew.
    """
    network = unstack_modules(stacked, 1)[0].cpu()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**63)
        for name, part in network.named_modules():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
            elif any(True for _ in part.parameters(recurse=False)):
                raise ValueError(
                    f"experts: expected modules that reset_parameters() initialises anew, got {type(part).__name__} "
                    f"at {name}"
                )
        if isinstance(network, StagedNetwork):
            initialise(network)
    return {name: value.detach() for name, value in own_tensors(network).items()}


def _copy(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if into:
        with torch.no_grad():
            torch._foreach_copy_(list(into), list(values))
