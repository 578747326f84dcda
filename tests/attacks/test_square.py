"""Square Attack: the search as it was published, in images of any size, and never outside the ball."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from immunity_fast.attacks import NotFiniteError
from immunity_fast.attacks.projections import Norm, project_l2
from immunity_fast.attacks.square import _bumps, _halvings, square, square_search
from tests.attacked_models import Recorder, said_by, small_images, small_labels, small_network

each_norm = pytest.mark.parametrize("norm", ["Linf", "L2"])
each_size = pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 5), (14, 14), (7, 16)], ids=str)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
UNIT = (0.0, 1.0)


def _images(size: tuple[int, int], samples: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some pixels are 0 and 1."""
    images = torch.rand(samples, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (1.2 * images - 0.1).clamp(0, 1).to(dtype)


def _model(size: tuple[int, int]) -> Any:
    """Linear; class 0 is what it says of all images."""
    weight = torch.randn(3 * size[0] * size[1], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def model(images: Tensor) -> Tensor:
        outputs: Tensor = images.double().flatten(1) @ weight + torch.tensor([1e6, 0, 0])
        return outputs

    return model


def _share(query: int, queries: int, p_init: float) -> float:
    """Which share of an image a square of that query, counted from 0, covers."""
    return p_init / 2 ** int(_halvings(torch.tensor(query), queries))


def _shown(images: Tensor, norm: Norm, eps: float, queries: int = 15, rescale: bool = True) -> list[Tensor]:
    """All that a model, which is never fooled, is shown."""
    recorder = Recorder(_model((images.shape[2], images.shape[3])))
    labels = torch.zeros(len(images), dtype=torch.int64)
    found = square_search(
        recorder, images, labels, eps=eps, norm=norm, bounds=UNIT, queries=queries, rescale=rescale,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    assert torch.equal(found, images)
    assert [len(shown) for shown in recorder.shown] == [len(images)] * (queries + 1)
    return recorder.shown


@each_size
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linf_shows_the_lowest_and_highest_pixels_of_the_ball(size: tuple[int, int], dtype: torch.dtype) -> None:
    images, eps = _images(size, dtype=dtype), 8 / 255
    for shown in _shown(images, "Linf", eps):
        assert shown.dtype == dtype
        moves = shown.double() - images.double()
        assert bool((moves.abs() <= eps).all())
        assert bool(((shown >= 0) & (shown <= 1)).all())
        at_an_end = (shown == 0) | (shown == 1)
        assert bool((at_an_end | (moves.abs() >= eps - torch.finfo(dtype).eps)).all())


@each_size
def test_l2_uses_the_ball_and_stays_in_it(size: tuple[int, int]) -> None:
    images = 0.4 + 0.2 * _images(size)  # so far from the edge that no move is cut
    for shown in _shown(images, "L2", 0.3):
        lengths = torch.linalg.vector_norm((shown.double() - images.double()).flatten(1), dim=1)
        assert bool((lengths <= 0.3).all())
        assert bool((lengths >= 0.3 * (1 - 1e-5)).all())
        assert torch.equal(project_l2(shown, images, 0.3), shown)


@each_size
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_at_the_edge_of_the_box(size: tuple[int, int], dtype: torch.dtype) -> None:
    """What is cut there is given to later windows."""
    images = _images(size, dtype=dtype)
    slack = 0.0 if dtype.itemsize >= 4 else math.sqrt(3 * size[0] * size[1]) * torch.finfo(dtype).eps
    for shown in _shown(images, "L2", 1.5):
        assert shown.dtype == dtype
        assert bool(((shown >= 0) & (shown <= 1)).all())
        assert (
            float(torch.linalg.vector_norm((shown.double() - images.double()).flatten(1), dim=1).max()) <= 1.5 + slack
        )


@each_norm
@pytest.mark.parametrize("size", [(12, 12), (7, 16), (3, 5)], ids=str)
def test_each_query_is_the_best_so_far_but_for_a_square(norm: Norm, size: tuple[int, int]) -> None:
    """The search, retold from what the model was shown: squares of the published size, each image's elsewhere."""
    images = 0.3 + 0.4 * _images(size)
    queries = 40
    shown, model = _shown(images, norm, 0.05 if norm == "Linf" else 0.5, queries), _model(size)

    def margins(images: Tensor) -> Tensor:
        outputs: Tensor = model(images)
        return outputs[:, 0] - outputs[:, 1:].amax(1)

    best, least = shown[0], margins(shown[0])
    improvements, places = 0, set()
    for query, tried in enumerate(shown[1:]):
        side = round(math.sqrt(_share(query, queries, 0.8) * size[0] * size[1]))
        if norm == "L2":
            side = max(side, 3)
            side += 1 - side % 2
        side = max(min(side, *size), 1)
        changed = (tried != best).any(1)
        if norm == "Linf":
            for of_image in changed:
                rows, columns = of_image.any(1).nonzero()[:, 0], of_image.any(0).nonzero()[:, 0]
                if len(rows):  # colours may be those that were there
                    assert int(rows[-1] - rows[0]) < side
                    assert int(columns[-1] - columns[0]) < side
                    places.add((query, int(rows[0]), int(columns[0])))
        else:
            assert int(changed.flatten(1).sum(1).max()) <= 2 * side**2
        better = margins(tried) < least
        improvements += int(better.sum())
        best = torch.where(better[:, None, None, None], tried, best)
        least = torch.where(better, margins(tried), least)
    assert improvements > 10
    assert bool((least < margins(shown[0])).all())
    assert norm == "L2" or len(places) > queries * 1.5


@each_norm
def test_several_squares_by_one_pass_are_the_same_search(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retold image by image: the first improvement of a pass is taken, what follows it counts for nothing."""
    monkeypatch.setattr(sys.modules[square.__module__], "WASTED", 2)  # many improve these few images
    images, queries, model = 0.3 + 0.4 * _images((12, 12)), 60, _model((12, 12))
    recorder, labels = Recorder(model), torch.zeros(len(images), dtype=torch.int64)
    square_search(
        recorder, images, labels, eps=0.05 if norm == "Linf" else 0.5, norm=norm, bounds=UNIT, queries=queries,
        rescale=True, at_once=4 * len(images), generator=torch.Generator().manual_seed(2),
    )  # fmt: skip

    def margin(image: Tensor) -> float:
        outputs = model(image[None])[0]
        return float(outputs[0] - outputs[1:].max())

    start, *passes = recorder.shown
    best, least = list(start), [margin(image) for image in start]
    used, several, dropped = [0] * len(images), 0, 0
    for shown in passes:
        left = [i for i in range(len(images)) if used[i] < queries]
        tries = next(t for t in range(1, 5) if sum(min(t, queries - used[i]) for i in left) == len(shown))
        wanted = [(i, j) for i in left for j in range(tries) if used[i] + j < queries]
        wanted.sort(key=lambda place: int(_halvings(torch.tensor(used[place[0]] + place[1]), queries)))
        several += tries > 1
        of: dict[int, list[Tensor]] = {}
        for (i, j), tried in zip(wanted, shown, strict=True):
            side = max(round(math.sqrt(_share(used[i] + j, queries, 0.8) * 144)), 1 if norm == "Linf" else 3)
            side += norm == "L2" and side % 2 == 0
            changed = int((tried != best[i]).any(0).sum())
            assert changed <= (1 if norm == "Linf" else 2) * min(side, 12) ** 2
            of.setdefault(i, []).append(tried)
        for i, each in of.items():
            better = [j for j, tried in enumerate(each) if margin(tried) < least[i]]
            if better:
                best[i], least[i] = each[better[0]], margin(each[better[0]])
                dropped += len(each) - 1 - better[0]
            used[i] += better[0] + 1 if better else len(each)
    assert used == [queries] * len(images)
    assert several > 5
    assert dropped > 0
    assert len(passes) < queries


def test_squares_of_one_pass_are_as_strong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[square.__module__], "WASTED", 2)
    model, images, labels = small_network(), small_images(40), small_labels(40)
    survivors = []
    for at_once in (0, 160):
        passes = Recorder(model)
        found = square_search(
            passes, images, labels, eps=0.12, norm="Linf", bounds=UNIT, queries=120, rescale=False, at_once=at_once,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        survivors.append(int((model(found).argmax(1) == labels).sum()))
    assert abs(survivors[0] - survivors[1]) <= 4, survivors


def test_squares_shrink_as_published() -> None:
    published = {0: 1, 10: 1, 11: 2, 50: 2, 51: 4, 200: 4, 201: 8, 500: 8, 501: 16, 1000: 16, 1001: 32, 2000: 32}
    published |= {2001: 64, 4000: 64, 4001: 128, 6000: 128, 6001: 256, 8000: 256, 8001: 512, 9999: 512}
    for query, part in published.items():
        assert _share(query, 10_000, 0.8) == 0.8 / part
        if query % 2 == 0:
            assert _share(query // 2, 5000, 0.4) == 0.4 / part


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 12])
def test_bumps_are_those_of_the_authors(side: int) -> None:
    def half(height: int, width: int) -> Tensor:
        bump = torch.zeros(height, width, dtype=torch.float64)
        for k in range(max(height // 2, width // 2) + 1):
            top, left = height // 2 - k, width // 2 - k
            bump[max(top, 0) : top + 2 * k + 1, max(left, 0) : left + 2 * k + 1] += 1 / (k + 1) ** 2
        return bump / bump.norm() if height else bump

    expected = torch.cat([half(side // 2, side), -half(side - side // 2, side)])
    expected /= expected.norm()
    torch.testing.assert_close(_bumps(side, torch.device("cpu")), torch.stack([expected, expected.T]))


@each_norm
def test_images_that_fool_the_model_are_not_asked_again(norm: Norm) -> None:
    """Its first two images are fooled by any move, the others never; one more fools it as it is."""
    images = _images((6, 5), 5)

    def model(images: Tensor) -> Tensor:
        moved = (images != images.round()).flatten(1).any(1).float()
        return torch.stack([1 - 2 * moved * images.flatten(1).round()[:, 0], torch.zeros(len(images))], 1)

    images = torch.cat([torch.ones(2, 3, 6, 5), torch.zeros(3, 3, 6, 5)])
    recorder = Recorder(model)
    labels = torch.tensor([0, 0, 0, 0, 1])
    found = square_search(recorder, images, labels, eps=0.4, norm=norm, bounds=UNIT, queries=6, rescale=True)
    assert [len(shown) for shown in recorder.shown] == [5, 2, 2, 2, 2, 2, 2]
    assert said_by(model, found).tolist() == [1, 1, 0, 0, 0]
    assert torch.equal(found[2:4], images[2:4])


@each_norm
def test_chance_is_the_generators(norm: Norm) -> None:
    images = _images((9, 8))
    state = torch.get_rng_state()
    first, again = _shown(images, norm, 0.1, 5), _shown(images, norm, 0.1, 5)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    labels = torch.zeros(6, dtype=torch.int64)
    square_search(_model((9, 8)), images, labels, eps=0.1, norm=norm, bounds=UNIT, queries=2, rescale=True)
    assert not torch.equal(torch.get_rng_state(), state)


def test_logarithms_of_zero_are_outputs() -> None:
    """Next to no other class there is no margin; and a class of probability 0 is not the model's."""
    images = _images((6, 6), 4)
    labels = torch.tensor([0, 0, 1, 1])

    def model(images: Tensor) -> Tensor:
        return torch.tensor([0.0, -torch.inf, -torch.inf]).expand(len(images), 3)

    found = square_search(model, images, labels, eps=0.1, norm="Linf", bounds=UNIT, queries=2, rescale=True)
    assert torch.equal(found[:2], images[:2])
    assert bool((found[2:] != images[2:]).flatten(1).any(1).all())


# As a function of its own


@each_norm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_found_images_fool_from_within_the_ball(norm: Norm, dtype: torch.dtype) -> None:
    network, images = small_network(dtype=dtype), small_images(dtype=dtype)
    labels = said_by(network, images)
    labels[1:2] = (labels[1:2] + 1) % 5
    eps = 0.03 if norm == "Linf" else 0.4
    found = square(network, images, labels, eps=eps, norm=norm, queries=60)
    moves = (found.double() - images.double()).flatten(1)
    assert found.dtype == dtype
    assert float(torch.linalg.vector_norm(moves, ord=math.inf if norm == "Linf" else 2, dim=1).max()) <= eps
    assert bool(((found >= 0) & (found <= 1)).all())
    fooled = said_by(network, found) != labels
    assert 2 <= int(fooled.sum()) < 7
    assert torch.equal((found != images).flatten(1).any(1), fooled & (torch.arange(7) != 1))


@each_norm
def test_radii_seeds_and_states(norm: Norm) -> None:
    network, images, labels = small_network(), small_images(), small_labels()
    images.requires_grad_()
    state = torch.get_rng_state()
    radii = [0.01, 0.05] if norm == "Linf" else [0.1, 0.6]

    def attacked(eps: Any, seed: int = 0) -> Any:
        return square(network.train(), images, labels, eps=eps, norm=norm, queries=20, seed=seed)

    small, large = attacked(radii)
    assert network.training
    network.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert not large.requires_grad
    assert torch.equal(large, attacked(radii[1]))
    assert not torch.equal(large, attacked(radii[1], seed=1))
    each = torch.tensor([radii[i % 2] for i in range(7)], dtype=torch.float64)
    of_each = attacked(each)
    assert bool(((of_each.double() - images).abs() <= each.view(-1, 1, 1, 1)).all())
    assert attacked(radii)[0].shape == small.shape
    assert square(network, images[:0], labels[:0]).shape == (0, 3, 9, 8)
    network.eval()


def test_no_gradient_is_needed() -> None:
    network, images, labels = small_network(), small_images(), small_labels()

    @torch.inference_mode()
    def model(images: Tensor) -> Tensor:
        outputs: Tensor = network(images)
        return outputs

    found = square(model, images, labels, eps=0.05, queries=20)
    assert torch.equal(found, square(network, images, labels, eps=0.05, queries=20))
    with torch.inference_mode():
        inside = square(network, images, labels, eps=0.05, queries=20)
    assert torch.equal(found, inside)


def test_what_is_wrong_is_said() -> None:
    network, images, labels = small_network(), small_images(), small_labels()
    for wrong, message in (
        ({"queries": 0}, "queries: expected at least 1, got 0"),
        ({"eps": -1.0}, "eps"),
        ({"norm": "L1"}, "norm"),
        ({"bounds": (0.4, 0.6)}, "images: expected values in"),
    ):
        with pytest.raises(ValueError, match=message):
            square(network, images, labels, **wrong)
    with pytest.raises(NotFiniteError):
        square(lambda x: network(x) / 0, images, labels, queries=2)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.03), ("L2", 0.3)])
def test_no_weaker_than_torchattacks(norm: Norm, eps: float) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    network = small_network(dtype=torch.float32)
    images = torch.rand(64, 3, 9, 9, generator=torch.Generator().manual_seed(7))[:, :, :, :8]
    if norm == "L2":
        network, images = _cut(network), torch.nn.functional.pad(images, (0, 1))
    labels = said_by(network, images)
    attack = torchattacks.Square(network, norm=norm, eps=eps, n_queries=60, p_init=0.8, loss="margin")
    attack.device = torch.device("cpu")
    attack.init_hyperparam(images)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = attack.attack_single_run(images, labels)[1]
    ours = square(network, images, labels, eps=eps, norm=norm, queries=60)
    counts = [int((said_by(network, found) != labels).sum()) for found in (ours, theirs)]
    assert 5 < counts[1] < 60
    assert counts[0] >= counts[1] - 5


def _cut(network: Any) -> Any:
    """That network, of images that are a column wider."""

    class Cut(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            outputs: Tensor = network(images[..., :8].contiguous())
            return outputs

    return Cut().eval()
