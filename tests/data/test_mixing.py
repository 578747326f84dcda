"""MixUp and CutMix: bit for bit what torchvision's transforms make of the same random state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast.data.mixing import Mixer, apply_mixing, draw_mixing

SIZE = (7, 10)
LABELS = torch.tensor([2, 0, 3, 3, 1])
IMAGES = torch.rand(5, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def _torchvision(mixup: float, cutmix: float, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="the reference of MixUp and CutMix")
    chosen = [kind(alpha=alpha, num_classes=4) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        mixed: tuple[Tensor, Tensor] = (v2.RandomChoice(chosen) if len(chosen) > 1 else chosen[0])(IMAGES, targets)
    return mixed


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.3), (0.2, 1.0)])
@pytest.mark.parametrize("soft", [False, True])
def test_it_is_what_torchvision_does(mixup: float, cutmix: float, soft: bool) -> None:
    targets = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)).softmax(-1) if soft else LABELS
    boxes = 0
    for seed in range(12):
        mixing = draw_mixing(torch.Generator().manual_seed(seed), SIZE, mixup=mixup, cutmix=cutmix)
        assert mixing is not None
        images, found = apply_mixing(IMAGES, targets, mixing, 4)
        expected, wanted = _torchvision(mixup, cutmix, targets, seed)
        torch.testing.assert_close(images, expected, rtol=0, atol=2e-7)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-7)
        boxes += bool(mixing[0] == 0)
    assert (boxes > 0) == (cutmix > 0)
    assert (boxes < 12) == (mixup > 0)


def test_a_mixer_goes_on_where_it_was() -> None:
    mixer = Mixer(0.2, 1.0, SIZE, seed=3)
    before = torch.get_rng_state()
    mixer.draw()
    state = mixer.state()
    following = [mixer.draw() for _ in range(4)]
    other = Mixer(0.2, 1.0, SIZE, seed=9)
    other.load_state(state)
    assert all(torch.equal(a, b) for a, b in zip(following, [other.draw() for _ in range(4)], strict=True))
    assert torch.equal(torch.get_rng_state(), before)  # PyTorch's own generator is somebody else's


def test_without_alphas_nothing_is_drawn() -> None:
    mixer = Mixer(0.0, 0.0, SIZE, seed=0)
    assert not mixer.active
    assert mixer.draw() is None


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("share", [0.7, 1.0, 0.0])
def test_what_is_mixed_with_an_ignored_sample_is_ignored(soft: bool, share: float) -> None:
    """Unless nothing of it is seen."""
    targets: Tensor = F.one_hot(LABELS).float() if soft else LABELS.clone()
    targets[1] = 9
    mixing = torch.tensor([share, 0, SIZE[0], 0, SIZE[1], share])
    _, found = apply_mixing(IMAGES, targets, mixing, 4, ignore_index=9)
    ignored = {0.7: [1, 2], 1.0: [1], 0.0: [2]}[share]
    assert [index for index in range(5) if (found[index] == 9).all()] == ignored
    kept = [index for index in range(5) if index not in ignored]
    known = F.one_hot(LABELS).float()
    expected = share * known + (1 - share) * known.roll(1, 0)
    torch.testing.assert_close(found[kept], expected[kept])


@pytest.mark.parametrize(("name", "value"), [("mixup", -0.1), ("cutmix", float("nan")), ("mixup", float("inf"))])
def test_a_wrong_alpha_is_named(name: str, value: float) -> None:
    options: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0, name: value}
    with pytest.raises(ValueError, match=f"{name}: expected a finite number of at least 0"):
        Mixer(**options, image_size=SIZE, seed=0)
