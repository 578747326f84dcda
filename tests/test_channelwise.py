"""N experts' channels side by side under `vmap`: right for every normalisation, and channels-last all the way."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import ImmunityMoE
from immunity_fast.experts.staged import GlobalAveragePool
from immunity_fast.models.stacking import call_stacked, channels_last_, run_stacked, stack_modules, unstack_modules
from immunity_fast.runtime.strategies import Batching
from tests import grids
from tests.fake_cuda import FakeTensorMode, to_fake_cuda
from tests.tensors import noise

EXPERTS, SAMPLES, CHANNELS, SIDE = 3, 4, 4, 8


class Functional(nn.Module):
    """A normalisation of somebody's own, with statistics that are no module's."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.direct = direct
        self.scale = nn.Parameter(torch.rand(CHANNELS) + 0.5)
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("variance", torch.ones(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        if self.direct:
            return torch.batch_norm(x, self.scale, None, self.mean, self.variance, self.training, 0.2, 1e-3, True)
        return F.batch_norm(x, self.mean, self.variance, weight=self.scale, training=self.training, momentum=0.2)


class Branches(nn.Module):
    """Maps that are joined, split and pooled, and the image itself, which belongs to no expert, pooled beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.other = nn.Conv2d(CHANNELS, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.one(x), self.other(x), F.max_pool2d(x, 3, stride=1, padding=1)], dim=1)
        return torch.concat((joined, joined[:, :2]), -3)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(CHANNELS),
    "batch, no affine": lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    "batch, no statistics": lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "batch, nothing": lambda: nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False),
    "batch, no momentum": lambda: nn.BatchNorm2d(CHANNELS, momentum=None),
    "batch, synchronised": lambda: nn.SyncBatchNorm(CHANNELS),
    "batch, a function": lambda: Functional(direct=False),
    "batch, torch's own": lambda: Functional(direct=True),
    "instance": lambda: nn.InstanceNorm2d(CHANNELS),
    "instance, statistics": lambda: nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, CHANNELS),
    "layer": lambda: nn.LayerNorm([CHANNELS, SIDE, SIDE]),
    "rms": lambda: nn.RMSNorm([CHANNELS, SIDE, SIDE]),
    "local response": lambda: nn.LocalResponseNorm(2),
    "max": lambda: nn.MaxPool2d(3, stride=2, padding=1),
    "average": lambda: nn.AvgPool2d(2, count_include_pad=False),
    "adaptive average": lambda: nn.AdaptiveAvgPool2d((3, 1)),
    "adaptive max": lambda: nn.AdaptiveMaxPool2d(2),
    "branches": Branches,
    "batch, parts of weights": lambda: Slimmable(),
    "batch, somebody's own": lambda: Doubling(CHANNELS),
    "pooling by name": lambda: ByName(),
}


class Slimmable(nn.Module):
    """Statistics and weights that are parts of larger ones, which are no piece of memory once they are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.affine = nn.Parameter(torch.rand(2 * CHANNELS) + 0.5)
        self.register_buffer("mean", torch.zeros(CHANNELS + 2))
        self.register_buffer("variance", torch.ones(CHANNELS + 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.mean[:CHANNELS], self.variance[:CHANNELS], *self.affine.chunk(2), training=self.training
        )


class ByName(nn.Module):
    """Poolings whose maps are no positional argument."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(input=x, kernel_size=2)
        return y + torch.max_pool2d(input=x, kernel_size=2) + F.adaptive_avg_pool2d(input=x, output_size=y.shape[-2:])


class Doubling(nn.BatchNorm2d):
    """Somebody's own, which only looks like PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _branching() -> nn.Module:
    """Two modules of branches, as GoogLeNet has nine, and a classifier."""
    first, second = (
        nn.Sequential(nn.Conv2d(inside, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), Branches()) for inside in (3, 12)
    )
    return nn.Sequential(first, nn.MaxPool2d(2), second, GlobalAveragePool(), nn.Linear(12, 10))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def grid_of_dtypes() -> list[Any]:
    """Layers, dtypes and halves of the modes; of every layer one half is ordinary, in float32 or in bfloat16."""
    ordinary = itertools.cycle([(torch.float32, True), (torch.bfloat16, False)])
    chosen = dict(zip(LAYERS, ordinary, strict=False))
    return grids.grid(LAYERS, DTYPES, (True, False), ordinary=lambda layer, *choice: choice == chosen[layer])


def _experts(layer: str, training: bool) -> list[nn.Module]:
    torch.manual_seed(0)
    experts = []
    for _ in range(EXPERTS):
        expert = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), LAYERS[layer](), nn.Softplus())
        for name, tensor in expert.state_dict().items():
            if tensor.is_floating_point() and not name.startswith("0."):
                tensor.copy_(torch.rand_like(tensor) + 0.5)  # no expert's is another's
        experts.append(expert.double().train(training))
    return experts


def _images(seed: int = 0) -> Tensor:
    return noise(SAMPLES, SIDE, seed=seed).requires_grad_()


def _derivatives(outputs: Tensor, images: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """First ones by the images, and second ones by them and by the parameters."""
    upstream = torch.linspace(-1, 2, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    (first,) = torch.autograd.grad((outputs * upstream).sum(), images, create_graph=True)
    found = torch.autograd.grad(first.square().sum(), [images, *parameters], allow_unused=True)
    return [first, *(torch.zeros(()) if each is None else each for each in found)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("layer", LAYERS)
def test_each_expert_gives_what_it_gives_alone(layer: str, batching: Batching, training: bool) -> None:
    """Outputs, derivatives, second derivatives and running statistics, over some batches, in float64."""
    alone = _experts(layer, training)
    stacked = stack_modules(alone)
    for seed in range(2):
        images = _images(seed)
        outputs = run_stacked(stacked, images, EXPERTS, shared=True, batching=batching)
        expected = torch.stack([expert(images) for expert in alone])
        torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
        ours = _derivatives(outputs, images, list(stacked.parameters()))
        theirs = _derivatives(expected, images, [p for expert in alone for p in expert.parameters()])
        own = [torch.zeros(()) if each.dim() == 0 else each for each in theirs[2:]]
        count = len(own) // EXPERTS
        joined = [torch.stack([own[i * count + k] for i in range(EXPERTS)]) for k in range(count)]
        for mine, reference in zip(ours, [*theirs[:2], *joined], strict=True):
            torch.testing.assert_close(mine.expand_as(reference), reference, rtol=1e-8, atol=1e-8)
    for expert, twin in zip(alone, unstack_modules(stacked, EXPERTS), strict=True):
        torch.testing.assert_close(twin.state_dict(), expert.state_dict(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(twin(images), expert(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_a_head_may_begin_with_any_of_them(batching: Batching) -> None:
    """On maps (N, B, C, h, w), as a function that leaves the stacked module as it is."""
    for layer in LAYERS:
        alone = [expert[1] for expert in _experts(layer, True)]
        stacked = stack_modules(alone)
        before = copy.deepcopy(stacked.state_dict())
        maps = torch.rand(EXPERTS, SAMPLES, CHANNELS, SIDE, SIDE, dtype=torch.float64)
        outputs, buffers = call_stacked(stacked, maps, EXPERTS, batching=batching)
        expected = torch.stack([expert(maps[i]) for i, expert in enumerate(alone)])
        torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10, msg=layer)
        for name, tensor in stacked.state_dict().items():
            assert torch.equal(tensor, before[name]), layer
            if name in buffers:
                after = torch.stack([expert.state_dict()[name] for expert in alone])
                torch.testing.assert_close(buffers[name], after, rtol=1e-10, atol=1e-10, msg=layer)


def test_a_mean_over_batches_leaves_no_trace_where_experts_part() -> None:
    twin = unstack_modules(stack_modules(_experts("batch, no momentum", True)), EXPERTS)[0]
    assert "forward" not in twin[1].__dict__
    assert twin[1].momentum is None


@pytest.mark.parametrize("own", ["a class", "an instance", "synchronised"])
def test_a_forward_of_somebodys_own_is_left_to_them(own: str) -> None:
    def make() -> nn.Module:
        if own == "a class":
            return Doubling(CHANNELS, momentum=None)
        if own == "synchronised":
            return nn.SyncBatchNorm(CHANNELS, momentum=None)
        part = nn.BatchNorm2d(CHANNELS, momentum=None)
        part.forward = lambda x: 3 * x  # type: ignore[method-assign]
        return part

    alone = [nn.Sequential(nn.Conv2d(3, CHANNELS, 1), make()).double() for _ in range(2)]
    stacked, images = stack_modules(alone), _images()
    expected = torch.stack([expert(images) for expert in alone])
    torch.testing.assert_close(run_stacked(stacked, images, 2, shared=True, batching="loop"), expected)
    for expert, twin in zip(alone, unstack_modules(stacked, 2), strict=True):
        assert ("forward" in twin[1].__dict__) == ("forward" in expert[1].__dict__)


def test_a_mixture_of_means_over_batches_is_copied_and_pickled() -> None:
    def expert() -> nn.Module:
        normalization = nn.BatchNorm2d(4, momentum=None)
        return nn.Sequential(nn.Conv2d(3, 4, 3), normalization, nn.ReLU(), GlobalAveragePool(), nn.Linear(4, 3))

    model = ImmunityMoE.from_experts([expert(), expert()], stage="2")
    images = torch.rand(4, 3, 8, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for step in range(2):
            torch.testing.assert_close(
                twin.expert_logits(images + step), copy.deepcopy(model).expert_logits(images + step)
            )
        assert twin.experts[1].num_batches_tracked.tolist() == [2, 2]
        assert model.experts[1].num_batches_tracked.tolist() == [0, 0]


@pytest.mark.parametrize("layer", ["batch", "branches", "max", "batch, a function"])
def test_another_vmap_goes_around_it(layer: str) -> None:
    """As `torch.func.jacrev` of a mixture does it."""
    stacked = stack_modules(_experts(layer, False))

    def run(images: Tensor) -> Tensor:
        return run_stacked(stacked, images, EXPERTS, shared=True, batching="vmap")

    images = torch.stack([_images(seed).detach() for seed in range(2)])
    torch.testing.assert_close(torch.vmap(run)(images), torch.stack([run(each) for each in images]))


def test_a_plain_mean_over_batches_compiles_to_one_graph() -> None:
    stacked = {b: stack_modules(_experts("batch, no momentum", True)) for b in ("on", "off")}
    images = _images().detach()

    def run(images: Tensor) -> Tensor:
        return run_stacked(stacked["on"], images, EXPERTS, shared=True, batching="vmap")

    torch.compiler.reset()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(images)
    expected = run_stacked(stacked["off"], images, EXPERTS, shared=True, batching="vmap")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stacked["on"].state_dict(), stacked["off"].state_dict(), rtol=1e-10, atol=1e-10)


def test_experts_cannot_share_statistics_that_each_would_update() -> None:
    shared = torch.zeros(CHANNELS, dtype=torch.float64)

    class Sharing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, shared, shared + 1, training=True)

    stacked = stack_modules([nn.Sequential(nn.Conv2d(3, CHANNELS, 1), Sharing()).double() for _ in range(2)])
    with pytest.raises(ValueError, match="running_mean: expected statistics of each expert"):
        run_stacked(stacked, _images(), 2, shared=True, batching="vmap")


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a PyTorch that knows CUDA")
@pytest.mark.parametrize(("layer", "dtype", "odd"), grid_of_dtypes())
def test_on_cuda_tensors_of_every_dtype_layout_and_mode(layer: str, dtype: torch.dtype, odd: bool) -> None:
    """Half of all modes, in which each pair of choices is met: those with an odd number of them on, or an even one."""
    for channels_last, training, batching in itertools.product((True, False), (True, False), ("loop", "vmap")):
        if (channels_last + training + (batching == "vmap")) % 2 != odd:
            continue
        stacked = stack_modules(_experts(layer, training))
        if channels_last:
            channels_last_(stacked)
        with FakeTensorMode():
            to_fake_cuda(stacked, dtype)
            images = torch.empty(SAMPLES, 3, SIDE, SIDE, dtype=dtype, device="cuda")
            maps = torch.empty(EXPERTS, SAMPLES, 3, SIDE, SIDE, dtype=dtype, device="cuda")
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            options: Any = {"batching": batching}
            outputs = run_stacked(stacked, images, EXPERTS, shared=True, **options)
            again, _ = call_stacked(stacked, maps, EXPERTS, **options)
        assert outputs.shape == again.shape
        assert outputs.shape[:2] == (EXPERTS, SAMPLES)
        assert outputs.is_cuda
        assert outputs.dtype == dtype


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a PyTorch that knows CUDA")
@pytest.mark.parametrize(
    ("arch", "training"),
    grids.grid(
        ("resnet8", "branches", "googlenet", "densenet121", "pdarts"),
        (True, False),
        ordinary=lambda arch, training: arch == "resnet8" or (arch == "branches" and not training),
    ),
)
def test_on_cuda_maps_stay_channels_last(arch: str, training: bool) -> None:
    """One expert's channels beside another's, all of them innermost, as grouped convolutions read and write them."""
    if arch == "branches":
        model = ImmunityMoE.from_experts([_branching() for _ in range(2)], stage="2", batching="vmap")
    else:
        model = ImmunityMoE(arch, 2, batching="vmap")
    model.train(training)
    channels_last_(model)
    with FakeTensorMode():
        to_fake_cuda(model)
        images = torch.rand(2, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
        maps, _ = model.trunk_outputs(images)
        logits, _ = model.head_outputs(maps)
    assert maps.movedim(0, 1).flatten(1, 2).is_contiguous(memory_format=torch.channels_last)
    assert logits.shape == (2, 2, 10)
