"""`FusedImmunityLoss` on the kernels, differentiated through Grad-CAM, and how a backend is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE, functional
from immunity_fast.functional import gradcam_heatmaps, heatmap_losses, mixture_cross_entropy
from immunity_fast.kernels import launch
from tests import grids
from tests.kernels.cases import DEVICE, assert_as_exact_as, error, normal

pytestmark = pytest.mark.gpu

GENTLE = {"alpha": 0.5, "beta": 1.0, "gamma": 1e-3, "size": (6, 5)}


class Experts(nn.Module):
    """Three small experts that differ in their weights: maps by a convolution, logits behind a smooth layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunks = nn.ModuleList(nn.Conv2d(3, 7, 3, padding=1) for _ in range(3))
        self.heads = nn.ModuleList(nn.Sequential(nn.Conv2d(7, 6, 1), nn.Tanh()) for _ in range(3))
        self.last = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """N logits (B, 4) and N maps (B, 7, h, w)."""
        maps = [nn.functional.softplus(trunk(images)) for trunk in self.trunks]
        logits = [last(head(one).mean((-2, -1))) for one, head, last in zip(maps, self.heads, self.last, strict=True)]
        return logits, maps


def _loss_and_gradients(backend: Any, dtype: torch.dtype, form: str, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """For images and experts that are the same in every call; the batch is odd, so are the maps."""
    experts = Experts().to(DEVICE, dtype)
    logits, maps = experts(normal(5, 3, 5, 3, seed=1).to(dtype))
    gate = normal(5, 3, seed=2).softmax(-1).to(dtype).requires_grad_()
    loss_fn = FusedImmunityLoss(**GENTLE, **options, backend=backend)  # type: ignore[arg-type]
    if form == "tensor":  # the heads must see the stacked tensor, or it is in no graph to the logits
        stacked = torch.stack(maps)
        logits = [
            last(head(one).mean((-2, -1)))
            for one, head, last in zip(stacked.unbind(), experts.heads, experts.last, strict=True)
        ]
        loss = loss_fn(torch.stack(logits), stacked, torch.tensor([0, 1, 2, 3, 0], device=DEVICE), gate)
    else:
        loss = loss_fn(logits, maps, torch.tensor([0, 1, 2, 3, 0], device=DEVICE), gate)
    return loss, list(torch.autograd.grad(1.7 * loss, [*experts.parameters(), gate]))


@pytest.mark.parametrize(
    ("form", "options"),
    grids.every(
        2,
        ["tensor", "list"],
        [{}, {"detach_weights": True}, {"normalize": False}, {"score": "probability", "weight_scale": "spatial"}],
    ),
)
def test_loss_and_gradients_are_as_exact_as_float32_can_be(form: str, options: dict[str, Any]) -> None:
    ours = _loss_and_gradients("triton", torch.float32, form, **options)
    reference = _loss_and_gradients("torch", torch.float32, form, **options)
    exact = _loss_and_gradients("torch", torch.float64, form, **options)
    assert_as_exact_as(ours[0], reference[0], exact[0], torch.float32)
    for one, other, wanted in zip(ours[1], reference[1], exact[1], strict=True):
        assert_as_exact_as(one, other, wanted, torch.float32, floor=1.0)


def test_a_head_inside_one_compiled_graph() -> None:
    """`from_head`: forward, inner gradient, kernels and backward, `fullgraph=True`."""
    weights = [normal(3, 7, 6, seed=1).requires_grad_(), normal(3, 6, 4, seed=2).requires_grad_()]
    targets, gate = torch.tensor([0, 1, 2, 3, 0], device=DEVICE), normal(5, 3, seed=3).softmax(-1)

    def step(maps: Tensor, backend: Any) -> Tensor:
        loss_fn = FusedImmunityLoss(**GENTLE, backend=backend)  # type: ignore[arg-type]
        head = lambda maps: torch.tanh(maps.square().mean((-2, -1)) @ weights[0]) @ weights[1]  # noqa: E731
        loss = loss_fn.from_head(head, maps, targets, gate)
        assert isinstance(loss, Tensor)
        return loss

    maps = normal(3, 5, 7, 4, 3).requires_grad_()
    torch.compiler.reset()
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(maps, "triton")
    expected = step(maps, "torch")
    assert error(actual, expected) <= 1e-5 * float(expected.detach())
    pairs = zip(
        torch.autograd.grad(actual, [maps, *weights]), torch.autograd.grad(expected, [maps, *weights]), strict=True
    )
    for ours, theirs in pairs:
        assert error(ours, theirs) <= 1e-4 * float(theirs.abs().max())


def test_an_empty_batch_gives_zero_and_empty_gradients() -> None:
    activations = torch.zeros(2, 0, 3, 4, 5, device=DEVICE, requires_grad=True)
    logits = activations.sum((-2, -1))
    loss = FusedImmunityLoss(backend="triton")(logits, activations, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    loss.backward()
    assert float(loss.detach()) == 0
    assert activations.grad is not None
    assert activations.grad.shape == activations.shape


def test_a_training_step_of_the_mixture() -> None:
    """An `ImmunityMoE` as it trains, against the same step on the reference; float32, BatchNorm in training mode."""
    gradients = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        model = ImmunityMoE("resnet8", 2, 4, image_size=12).to(DEVICE)
        logits, activations, gate = model.expert_outputs(torch.rand(3, 3, 12, 12).to(DEVICE))
        loss_fn = FusedImmunityLoss(1.0, 1.0, 1e-4, (12, 12), backend=backend)  # type: ignore[arg-type]
        loss_fn(logits, activations, torch.tensor([0, 3, 1], device=DEVICE), gate).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected is not None
        actual = gradients[1][name]
        assert actual is not None
        assert error(actual, expected) <= 1e-3 * float(expected.abs().max()) + 1e-6, name


A, G = normal(2, 3, 4, 5, 6), normal(2, 3, 4, 5, 6, seed=1)
LABELS = torch.tensor([0, 1, 2], device=DEVICE)


@pytest.mark.parametrize("function", [heatmap_losses, gradcam_heatmaps])
def test_float64_is_not_quietly_computed_in_float32(function: Any) -> None:
    with pytest.raises(
        TypeError, match=r"activations: expected .* for backend 'triton', got .*torch\.float64; use 'torch' for float64"
    ):
        function(A.double(), G.double(), backend="triton")
    with pytest.raises(
        TypeError, match=r"activations: expected .* for backend 'triton', got .*torch\.float32 and torch\.float64"
    ):
        function(A, G.double(), backend="triton")
    with pytest.raises(TypeError, match=r"logits: expected .* for backend 'triton', got .*torch\.float64"):
        mixture_cross_entropy(A[..., 0, 0].double(), None, LABELS, 1.0, backend="triton")


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend: expected one of auto, torch, triton, got 'cuda'"):
        mixture_cross_entropy(A[..., 0, 0], None, LABELS, 1.0, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of machines without a GPU")
def test_without_gpu_and_interpreter_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(
        ValueError, match=r"backend: expected CUDA tensors for 'triton', got activations on cpu .*INTERPRET=1"
    ):
        heatmap_losses(A, G, backend="triton")
    heatmap_losses(A, G)


def test_without_triton_auto_is_torch_and_its_name_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "HAS_TRITON", False)
    expected = heatmap_losses(A, G, backend="torch")
    assert all(torch.equal(one, other) for one, other in zip(heatmap_losses(A, G), expected, strict=True))
    with pytest.raises(ValueError, match=r"backend: expected 'torch' or 'auto', got 'triton', which is not installed"):
        heatmap_losses(A, G, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sums_over_space_are_all_that_grad_cam_looks_at(backend: Any) -> None:
    sums = G.sum((-2, -1))
    for weight_scale in ("channels", "spatial"):
        options: dict[str, Any] = {"size": (7, 7), "weight_scale": weight_scale, "backend": backend}
        expected = gradcam_heatmaps(A, G, **options)
        for given in (sums, list(sums)):
            assert error(gradcam_heatmaps(A, given, **options), expected) <= 1e-5 * float(expected.max())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("gradients", "text"),
    [
        (G[:, :2], r"gradients: .*of activations, \(2, 3, 4, 5, 6\), or .* \(2, 3, 4\), got \(2, 2, 4, 5, 6\)"),
        (G[..., 0, 0][:, :2], r"gradients: .*\(2, 3, 4\), got \(2, 2, 4\)"),
        (list(G[..., 0, 0][:, :, :3]), r"gradients: .*\(2, 3, 4\), got \(2, 3, 3\)"),
        (G[..., 0], r"gradients: expected shape \(N, B, C, h, w\), got \(2, 3, 4, 5\)"),
    ],
)  # fmt: skip
def test_gradients_of_a_wrong_shape_are_named(backend: Any, gradients: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        heatmap_losses(A, gradients, backend=backend)


def test_tensors_on_another_device_are_named() -> None:
    elsewhere = torch.device("meta")
    with pytest.raises(ValueError, match=f"gradients: expected a tensor on {DEVICE}.*, got one on meta"):
        heatmap_losses(A, G.to(elsewhere))
    with pytest.raises(ValueError, match=f"activations: expected a tensor on {DEVICE}.*, got one on meta"):
        heatmap_losses([A[0], A[1].to(elsewhere)], list(G))
    with pytest.raises(ValueError, match=f"targets: expected a tensor on {DEVICE}.*, got one on meta"):
        mixture_cross_entropy(A[..., 0, 0], None, LABELS.to(elsewhere), 1.0)
    with pytest.raises(ValueError, match=f"gate: expected a tensor on {DEVICE}.*, got one on meta"):
        mixture_cross_entropy(A[..., 0, 0], torch.ones(2, device=elsewhere), LABELS, 1.0)


def _sum(activations: Tensor, backend: Any) -> Tensor:
    information, stability = heatmap_losses(activations, G, size=(7, 7), backend=backend)
    return information.sum() + 0.1 * stability


def _by_func(backend: Any) -> Tensor:
    gradient: Tensor = torch.func.grad(_sum)(A, backend)
    return gradient


def _by_jvp(backend: Any) -> Tensor:
    tangent: Tensor = torch.func.jvp(lambda maps: _sum(maps, backend), (A,), (G,))[1]
    return tangent


def _by_dual_numbers(backend: Any) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(
            _sum(torch.autograd.forward_ad.make_dual(A, G), backend)
        ).tangent
        assert tangent is not None
        return tangent


@pytest.mark.parametrize("differentiated", [_by_func, _by_jvp, _by_dual_numbers])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_other_modes_of_differentiation_are_right_or_raise(differentiated: Any) -> None:
    """A custom op knows reverse-mode autograd alone, and would otherwise give a tangent of zero without a word."""
    with pytest.raises(
        ValueError, match=r"backend: expected 'torch' or 'auto' .*, got 'triton', which is for reverse-mode autograd"
    ):
        differentiated("triton")
    assert error(differentiated("auto"), differentiated("torch")) <= 1e-5
    assert differentiated("torch").any()
