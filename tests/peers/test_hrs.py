"""HRS: paths that share channels, whose turn it is, and that one path answers."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import ImmunityMoE
from immunity_fast.experts import create
from immunity_fast.models.gate import SelectionGate
from immunity_fast.peers import HRSLoss
from immunity_fast.peers.hrs import anew, blocks_of, cut
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.state import TrainingState
from tests.adversarial_cases import chain, noisy_images
from tests.small_runs import CPU, as_bytes, dataset, go_on, interrupted, options, saved, trained, write_data

LABELS = torch.tensor([0, 2, 1, 1, 0])
BASE: dict[str, Any] = {"experts": 4, "batch_size": 10, "epochs": 4, "check_images": 0, "arch": "resnet8"}


def small_model(experts: int = 4) -> ImmunityMoE:
    torch.manual_seed(0)
    gate = SelectionGate(experts, generator=torch.Generator().manual_seed(0))
    return ImmunityMoE.from_experts([chain() for _ in range(experts)], stage="2", gate=gate, batching="loop")


def begun(model: ImmunityMoE, loss: HRSLoss, stage: int, stages: int) -> None:
    loss.begin_epoch(model, stage, stages, 5)
    loss.begin_stage(model, stage, stages, 5)


def slices_of(model: ImmunityMoE, index: int) -> dict[str, Any]:
    return {name: as_bytes(value[index]) for name, value in model.experts.state_dict().items()}


def epoch_of(state: TrainingState) -> None:
    state.begin_epoch()
    state.model.train()
    for batch in state.loader:
        state.advance(batch)
    state.end_epoch()
    state.epoch += 1


def check_ties(tensors: dict[str, Tensor], blocks: dict[str, int], channels: int, count: int) -> None:
    """Paths with the same channel of a block have the same bits there, and others have others."""
    paths = list(itertools.product(range(channels), repeat=count))
    for name, stacked in tensors.items():
        for (i, one), (j, other) in itertools.combinations(enumerate(paths), 2):
            if one[blocks[name]] == other[blocks[name]]:
                assert as_bytes(stacked[i]) == as_bytes(stacked[j]), (name, one, other)
            elif name.endswith("weight") and stacked.dim() > 2:
                assert as_bytes(stacked[i]) != as_bytes(stacked[j]), (name, one, other)


# Blocks


def test_blocks_are_cut_where_the_largest_is_smallest() -> None:
    sizes = [3, 9, 2, 4, 7]
    children = OrderedDict((f"part{i}", nn.Linear(size, 1, bias=False)) for i, size in enumerate(sizes))
    network = nn.Sequential(children)
    for blocks in range(1, 6):
        found = [[sizes[int(name[4:])] for name in part] for part in cut(network, blocks)]
        assert [size for part in found for size in part] == sizes
        least = min(
            max(sum(sizes[a:b]) for a, b in itertools.pairwise((0, *cuts, 5)))
            for cuts in itertools.combinations(range(1, 5), blocks - 1)
        )
        assert max(map(sum, found)) == least
    assert cut(create("resnet8", 3), 2) == [["stem", "layer1", "layer2"], ["layer3", "classifier"]]


def test_what_cannot_be_cut_is_an_error() -> None:
    with pytest.raises(ValueError, match="experts: expected chains of children of one structure"):
        cut(nn.Linear(2, 2), 2)
    with pytest.raises(ValueError, match="experts: expected chains of at least 3 children with parameters"):
        cut(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), 3)
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"experts: expected tensors of one block each, got 1\.weight in several"):
        blocks_of(tied, 2)


@pytest.mark.parametrize(("blocks", "good", "bad"), [(1, (2, 3, 7), (1,)), (2, (4, 9), (1, 2, 6)), (3, (8, 27), (9,))])
def test_experts_are_a_power(blocks: int, good: tuple[int, ...], bad: tuple[int, ...]) -> None:
    loss = HRSLoss(blocks)
    for count in good:
        loss.check_experts(count)
        assert loss.channels(count) ** blocks == count
        assert loss.stages(count) == blocks * loss.channels(count)
    for count in bad:
        with pytest.raises(ValueError, match=f"experts: expected one for each path .*, got {count}$"):
            loss.check_experts(count)


@pytest.mark.parametrize("blocks", [100, 10**6, 10**12])
def test_powers_that_nothing_has_are_not_computed(blocks: int) -> None:
    with pytest.raises(ValueError, match=f"experts: expected one for each path through {blocks} blocks .*, got 4$"):
        HRSLoss(blocks).check_experts(4)


def test_fresh_experts_are_drawn_by_their_seed_alone() -> None:
    model = ImmunityMoE("resnet8", 2, 3, image_size=12)
    before, state = slices_of(model, 0), torch.get_rng_state()
    first, again, other = (anew(model.experts, seed) for seed in (3, 3, 4))
    assert slices_of(model, 0) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    weight = "layer2.0.conv1.weight"
    assert not torch.equal(first[weight], other[weight])
    # He's by fan-out, as the architecture has it: PyTorch's own would have a third of that variance.
    assert float(first[weight].std()) == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.1)
    assert not first["layer2.0.bn1.running_mean"].any()


# Whose turn it is


def test_a_batch_trains_the_drawn_path_alone() -> None:
    model, loss = small_model(), HRSLoss()
    begun(model, loss, 0, 4)
    begun(model, loss, 3, 4)  # channel 1 of block 1
    blocks = blocks_of(model.experts, 2)
    assert set(blocks.values()) == {0, 1}
    model.train()
    images = noisy_images(dtype=torch.float32)
    draws = set()
    for batch in range(6):
        loss.begin_batch(model, batch, 5)
        draws.add(loss._drawn)
        first = loss._drawn[0]
        before = [slices_of(model, index) for index in range(4)]
        expected = _alone(model, [first, 1], images)
        value, terms = loss.loss_and_terms(model, images, LABELS)
        torch.testing.assert_close(value, torch.nn.functional.cross_entropy(expected, LABELS))
        assert torch.equal(value, terms[0])
        model.zero_grad()
        value.backward()
        for name, parameter in model.experts.named_parameters():
            moved = [parameter.grad is not None and bool(parameter.grad[index].any()) for index in range(4)]
            assert moved == [False, blocks[name] == 1, False, False] or "bias" in name, name
        for index in range(4):  # BatchNorm's statistics: of the last block's, at the place where it is trained
            changed = {name for name, bits in slices_of(model, index).items() if bits != before[index][name]}
            assert all(blocks[name] == 1 for name in changed)
            assert bool(changed) == (index == 1)
        loss.after_update(model)
    assert draws == {(0,), (1,)}
    assert all(module.training for module in model.experts.modules())


def _alone(model: ImmunityMoE, channels: list[int], images: Tensor) -> Tensor:
    """The logits of a network of such channels, in evaluation mode up to the block that is trained."""
    blocks, network = blocks_of(model.experts, 2), chain()
    state = {name: value[2 * channels[0] + channels[1]] for name, value in model.experts.state_dict().items()}
    network.load_state_dict(state)
    for name, part in network.named_modules():
        part.train(not any(own.startswith(f"{name}.") and blocks[own] == 0 for own in blocks) or not name)
    return network(images)


def test_what_is_drawn_depends_on_seed_and_batch_alone() -> None:
    model = small_model(9)
    drawn = []
    for _ in range(2):
        loss = HRSLoss()
        loss.begin_epoch(model, 5, 6, 1)
        found = []
        for batch in (*range(20), 3):
            loss.begin_batch(model, batch, 1)
            found.append(loss._drawn)
        assert found[-1] == found[3]
        drawn.append(found)
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {(0,), (1,), (2,)}


def test_paths_not_yet_trained_have_no_vote() -> None:
    model, loss = small_model(), HRSLoss()
    expected = [[1, 0, 0, 0], [0, 0, 1, 0], [0.5, 0, 0.5, 0], [0.25] * 4]
    for stage, votes in enumerate(expected):
        begun(model, loss, stage, 4)
        assert model.gate.probabilities.tolist() == votes


def test_one_path_answers() -> None:
    model, loss = small_model(), HRSLoss()
    begun(model, loss, 2, 4)
    model.eval()
    images = noisy_images(dtype=torch.float32)
    with torch.no_grad():
        alone = model.expert_logits(images).log_softmax(-1)
        answers = [model(images) for _ in range(12)]
    found = {next(i for i in range(4) if torch.allclose(answer, alone[i], atol=1e-6)) for answer in answers}
    assert found == {0, 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.05},
        {"optimizer": "adamw", "weight_decay": 0.5, "ema": 0.5},
        {"experts": 8, "epochs": 6, "ensemble": "hrs:blocks=3"},
    ],
    ids=["sgd", "adamw-ema", "three-blocks"],
)
def test_channels_are_the_same_in_all_paths(changes: dict[str, Any]) -> None:
    settings = {**BASE, "ensemble": "hrs", "lr": 0.01, **changes}
    state = TrainingState(TrainConfig(**settings), dataset(), CPU)
    count = 3 if settings["experts"] == 8 else 2
    blocks = blocks_of(state.model.experts, count)
    finished: dict[str, Any] = {}
    for stage in range(2 * count):
        epoch_of(state)
        block, channel = divmod(stage, 2)
        check_ties(dict(state.model.experts.state_dict()), blocks, 2, count)
        if state.average is not None:
            averaged = {name: state.average.tensors()[f"experts.{name}"] for name in blocks}
            check_ties(averaged, blocks, 2, count)
        home = channel * 2 ** (count - 1 - block)
        kept = {name: value[home].clone() for name, value in state.model.experts.state_dict().items()}
        if state.average is not None:
            kept = {name: state.average.tensors()[f"experts.{name}"][home].clone() for name in blocks}
        finished |= {f"{name} {channel}": as_bytes(value) for name, value in kept.items() if blocks[name] == block}
    tensors = dict(state.model.experts.state_dict())
    if state.average is not None:
        tensors = {name: state.average.tensors()[f"experts.{name}"] for name in blocks}
    for name, stacked in tensors.items():
        for channel in range(2):
            home = channel * 2 ** (count - 1 - blocks[name])
            assert as_bytes(stacked[home]) == finished[f"{name} {channel}"], name


# Runs


def test_a_run_that_is_interrupted_ends_the_same(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.npz")
    settings: dict[str, Any] = {"ensemble": "hrs", "arch": "resnet8", "experts": 4, "epochs": 4}
    settings |= {"adversarial": "n-fgsm", "ema": 0.9}
    arguments = options(data, **settings, checkpoint_every=1, batch_size=20)  # 2 steps a stage
    trained([*arguments, "--out", str(tmp_path / "whole")])
    for stop in (4, 3):
        interrupted((TrainingState, "advance"), stop, go_on(tmp_path / "run", arguments))
    trained(go_on(tmp_path / "run", arguments))
    assert saved(tmp_path / "run") == saved(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 6}, "--experts: expected one for each path through 2 blocks of 2 or more channels each"),
        ({"experts": 1}, "--experts: expected one for each path through 2 blocks"),
        ({"epochs": 6}, "--epochs: expected a multiple of 4"),
        ({"weights": "file.pt"}, "--weights: expected none"),
        ({"ensemble": "hrs:blocks=0"}, "--ensemble: hrs: blocks: expected"),
        ({"gate": "switch"}, "--gate: expected auto, uniform or selection"),
    ],
)
def test_settings_that_do_not_go_together_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{**BASE, "ensemble": "hrs", **changes})


def test_experts_that_are_no_chain_are_an_error() -> None:
    config = TrainConfig(**{**BASE, "ensemble": "hrs", "stage": "layer1,layer2", "arch": "resnet8,resnet8"})
    with pytest.raises(ValueError, match="experts: expected chains of children of one structure"):
        TrainingState(config, dataset(), CPU)


def test_a_pass_costs_one_path() -> None:
    assert HRSLoss().passes(9, 0) == 1
    assert HRSLoss().passes(9, 10) == 11
