import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from torch import Tensor

from immunity_fast.reporting.curves import PANELS, robustness_figure, training_curves
from immunity_fast.reporting.heatmaps import attacked_heatmap_figure, heatmap_figure
from immunity_fast.reporting.overlay import as_rgb, grey_of
from immunity_fast.reporting.style import COLORS, drawable
from tests import grids, pictures
from tests.pictures import assert_no_text_is_hidden, near, pixels

drawn = pictures.drawn

RECORD = {
    "epoch": 1,
    "loss": 3.2,
    "cross_entropy": 2.1,
    "mutual_information_loss": 7.5,
    "position_stability": 2400.0,
    "val_accuracy_sample": 0.61,
    "val_accuracy_mean": 0.63,
    "val_fgsm_accuracy_mean": 0.3,
    "val_pgd10_accuracy_mean": 0.2,
    "mutual_information": 0.3,
    "val_mutual_information": 0.28,
    "val_dead_heatmaps": 0.01,
    "images_per_second": 900.0,
}
EPS = (0, 1, 2, 4, 8, 16, 32, 64, 255)
STEPS = (1, 2, 5, 10, 20, 50, 100)
LONG = "the attacker sees one draw a step and is judged on the exact mean of the experts, $\\alpha$ = 2/255"


def sample(experts: int, count: int, height: int = 32, width: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, height, width, generator=generator)
    return images, torch.rand(experts, count, height, width, generator=generator)


def run_of(epochs: int) -> list[dict[str, float]]:
    return [{key: value / epoch for key, value in RECORD.items()} | {"epoch": epoch} for epoch in range(1, epochs + 1)]


@pytest.mark.parametrize(
    ("experts", "count", "height", "width"), [(1, 1, 32, 32), (5, 3, 28, 28), (2, 2, 17, 30), (2, 1, 300, 400)]
)
def test_heatmap_figure_has_a_cell_for_each_map(
    tmp_path: Path, experts: int, count: int, height: int, width: int
) -> None:
    images, heatmaps = sample(experts, count, height, width)
    heatmap_figure(images, heatmaps, ["cat → dog"] * count, tmp_path / "h.png")
    picture = pixels(tmp_path / "h.png")
    scale = 256 / max(height, width) if max(height, width) > 256 else round(256 / max(height, width))
    # What is left beside the cells: gaps, titles, labels and the colour bar.
    assert 0 < picture.shape[0] - count * height * scale < 90 + 10 * count
    assert 0 < picture.shape[1] - (experts + 1) * width * scale < 400 + 10 * experts
    assert picture.std() > 20


def test_pixels_of_a_small_image_are_drawn_as_equal_squares(tmp_path: Path) -> None:
    images, heatmaps = sample(1, 1)
    heatmap_figure(images, heatmaps, [""], tmp_path / "h.png")
    picture = pixels(tmp_path / "h.png")
    expected = (images[0].permute(1, 2, 0) * 255).numpy().repeat(8, 0).repeat(8, 1)
    left, top = 30, 42
    np.testing.assert_allclose(picture[top : top + 256, left : left + 256], expected, atol=1)


def test_each_heatmap_is_scaled_by_its_own_maximum(tmp_path: Path) -> None:
    images, heatmaps = sample(3, 2)
    heatmap_figure(images, heatmaps, ["a", "b"], tmp_path / "1.png")
    factors = torch.tensor([1e-6, 1.0, 1e4])[:, None, None, None]
    heatmap_figure(images.requires_grad_(), (heatmaps * factors).double(), ["a", "b"], tmp_path / "2.png")
    np.testing.assert_allclose(pixels(tmp_path / "1.png"), pixels(tmp_path / "2.png"), atol=1)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_dead_and_non_finite_heatmaps_show_the_image_in_grey(tmp_path: Path, value: float) -> None:
    images, heatmaps = sample(1, 1)
    heatmaps[0, 0] = value
    heatmap_figure(images, heatmaps, [""], tmp_path / "h.png")
    cell = pixels(tmp_path / "h.png")[42:298, 30 + 256 + 20 :][:, :256].astype(int)
    assert cell.std() > 20
    assert np.ptp(cell, axis=-1).max() <= 1


def test_dead_and_non_finite_are_told_apart(tmp_path: Path) -> None:
    images, heatmaps = sample(1, 1)
    heatmap_figure(images, heatmaps * 0, [""], tmp_path / "dead.png")
    heatmap_figure(images, heatmaps * torch.nan, [""], tmp_path / "nan.png")
    assert (pixels(tmp_path / "dead.png") != pixels(tmp_path / "nan.png")).any()


def test_labels_with_dollar_signs_and_long_labels_are_drawn(tmp_path: Path) -> None:
    images, heatmaps = sample(1, 2)
    heatmap_figure(
        images, heatmaps, ["$\\bad$ → $x^$ ^", "a very long class name → another of that kind"], tmp_path / "h.png"
    )
    picture = pixels(tmp_path / "h.png")
    assert picture[:, 10:].shape[1] < 1200
    assert (picture[:, :4] == 255).all(), "a label reaches the edge"


@pytest.mark.parametrize(
    ("images", "heatmaps", "labels", "message"),
    [
        ((2, 0, 8, 8), (3, 2, 8, 8), 2, r"images: expected shape \(n, C, H, W\).*\(2, 0, 8, 8\)"),
        ((0, 3, 8, 8), (3, 0, 8, 8), 0, r"images: .*\(0, 3, 8, 8\)"),
        ((2, 3, 8, 8), (3, 2, 4, 4), 2, r"heatmaps: expected shape \(N, 2, 8, 8\).*got \(3, 2, 4, 4\)"),
        ((2, 3, 8, 8), (0, 2, 8, 8), 2, r"heatmaps: .*got \(0, 2, 8, 8\)"),
        ((2, 3, 8, 8), (3, 2, 8, 8), 1, r"row_labels: expected 2 .*got 1"),
    ],
)
def test_shape_errors_name_the_argument(
    tmp_path: Path, images: tuple[int, ...], heatmaps: tuple[int, ...], labels: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        heatmap_figure(torch.rand(images), torch.rand(heatmaps), ["x"] * labels, tmp_path / "h.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("epochs", [1, 100])
def test_training_curves_draws_any_number_of_epochs(tmp_path: Path, epochs: int) -> None:
    training_curves(run_of(epochs), tmp_path / "c.png")
    picture = pixels(tmp_path / "c.png")
    assert 1.2 < picture.shape[1] / picture.shape[0] < 1.4  # two columns, three rows
    blue = (np.abs(picture.astype(int) - [0x00, 0x72, 0xB2]) < 40).all(axis=-1)
    assert blue.sum() > 300, "one point at least must be seen"


def test_training_curves_leaves_out_what_no_record_has(tmp_path: Path) -> None:
    training_curves([{"loss": 2.0, "learning_rate": 0.1}, {"cross_entropy": 1.0}], tmp_path / "c.png")
    picture = pixels(tmp_path / "c.png")
    assert 1.7 < picture.shape[1] / picture.shape[0] < 2.1  # one panel


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("value", "everywhere"),
    grids.sampled(
        [("nan", True), ("inf", True), ("nan", False), ("-inf", False), ("0", True), ("-1", False)],
        ordinary=lambda value, everywhere: value != "inf" and (value, everywhere) != ("nan", False),
    ),
)
def test_training_curves_survives_any_value(tmp_path: Path, value: str, everywhere: bool) -> None:
    """With a panel of each kind: with and without a logarithm, from zero on."""
    kinds = ("epoch", "loss", "cross_entropy", "position_stability", "val_dead_heatmaps")
    records = [{key: record[key] for key in kinds} for record in run_of(4)]
    for record in records if everywhere else records[1:2]:
        record.update({key: float(value) for key in record if key != "epoch"})
    training_curves(records, tmp_path / "c.png")
    assert pixels(tmp_path / "c.png").std() > 10


@pytest.mark.parametrize("records", [[], [{"epoch": 1.0}]])
def test_training_curves_refuses_records_with_nothing_to_draw(tmp_path: Path, records: list[dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="records: expected"):
        training_curves(records, tmp_path / "c.png")


def test_every_line_of_a_panel_has_a_color() -> None:
    assert max(len(panel.lines) for panel in PANELS) <= len(COLORS) == len(set(COLORS))


def accuracies(values: Sequence[float], eps: Sequence[float] = EPS, width: float = 0.08) -> list[dict[str, Any]]:
    return [
        {"eps": e / 255, "accuracy": value, "interval": [max(0, value - width / 2), min(1, value + width / 2)]}
        for e, value in zip(eps, values, strict=True)
    ]


def falling(start: float = 0.6, half: float = 4, eps: Sequence[float] = EPS) -> list[dict[str, Any]]:
    return accuracies([start / (1 + (e / half) ** 2) for e in eps], eps)


def rising(end: float = 9.0) -> list[dict[str, Any]]:
    return [{"steps": steps, "loss": end * steps / (steps + 8), "accuracy": 0.1} for steps in STEPS]


def below_names(picture: np.ndarray) -> np.ndarray:
    """The part of a panel from its axes on: where, near the left edge of the axes, a long grey line begins."""
    grey = near(picture, "#888888").sum(axis=0)
    axis = near(picture, "#888888")[:, grey.argmax()]
    return picture[axis.argmax() :]


def test_curves_titles_stand_at_one_height_and_hide_nothing(tmp_path: Path, drawn: list[Figure]) -> None:
    training_curves(run_of(3), tmp_path / "c.png")
    assert_no_text_is_hidden(drawn[0])
    left, right = (axes.title.axes._left_title.get_window_extent() for axes in drawn[0].axes[:2])
    assert left.y0 == pytest.approx(right.y0, abs=1)


@pytest.mark.parametrize(
    ("names", "eps"),
    [
        pytest.param([f"attack {i}" for i in range(6)], EPS, marks=pytest.mark.exhaustive),
        ([f"{i}: {LONG}" for i in range(6)], EPS),
        (["W" * 100, "_", "$", ""], (0, 0.5, *range(1, 33), 48, 64, 128, 192, 254, 255)),
    ],
)
def test_robustness_figure_hides_no_text(
    tmp_path: Path, drawn: list[Figure], names: list[str], eps: Sequence[float]
) -> None:
    accuracy = {name: falling(0.6 - i / 20, 2 + i, eps) for i, name in enumerate(names)}
    robustness_figure(accuracy, {name: rising(1e4 + i) for i, name in enumerate(names[:2])}, tmp_path / "r.png")
    assert_no_text_is_hidden(drawn[0])
    picture = pixels(tmp_path / "r.png")
    assert picture.shape[1] == 1792
    assert 550 < picture.shape[0] < 1200
    for color, _ in zip(COLORS, names, strict=False):
        assert near(picture, color).sum() > 100


@pytest.mark.parametrize("empty", ["accuracy", "loss"])
def test_robustness_figure_leaves_out_a_panel_of_nothing(tmp_path: Path, empty: str) -> None:
    accuracy = {} if empty == "accuracy" else {"a": falling()}
    robustness_figure(accuracy, {} if empty == "loss" else {"a": rising()}, tmp_path / "r.png")
    assert pixels(tmp_path / "r.png").shape[1] == 896


def test_robustness_figure_refuses_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"accuracy_by_eps, loss_by_steps: .*empty"):
        robustness_figure({}, {}, tmp_path / "r.png")
    assert not list(tmp_path.iterdir())


def test_accuracies_are_drawn_in_percent_from_0_to_100(tmp_path: Path) -> None:
    levels = {"all": accuracies([1.0] * 9), "half": accuracies([0.5] * 9), "none": accuracies([0.0] * 9)}
    robustness_figure(levels, {}, tmp_path / "r.png")
    picture = pixels(tmp_path / "r.png")
    lengths = [near(picture, color).sum(axis=1) for color in COLORS[:3]]
    top, middle, bottom = (np.flatnonzero(length > length.max() / 2).mean() for length in lengths)
    assert bottom - top > 350
    assert middle == pytest.approx((top + bottom) / 2, abs=1.5)
    axis = near(picture, "#888888").sum(axis=0).argmax()
    rows = np.flatnonzero(near(picture, "#888888")[:, axis])
    assert (rows[0], rows[-1]) == pytest.approx((top, bottom), abs=3)


def test_doubled_eps_are_equally_far_apart_0_from_the_first_too(tmp_path: Path) -> None:
    """One curve a point, so that each place has a colour of its own."""
    curves = {f"{e}": accuracies([0.5], [e]) for e in (0, 2, 4, 8, 16, 32)}
    robustness_figure(curves, {}, tmp_path / "r.png")
    picture = below_names(pixels(tmp_path / "r.png"))[:, 116:]
    picture = picture[: near(picture, "#888888").sum(axis=1).argmax()]  # without labels, which are dark as well
    gaps = np.diff([np.flatnonzero(near(picture, color).any(axis=0)).mean() for color in COLORS])
    assert gaps.min() > 80
    assert np.ptp(gaps) < 3


def test_a_loss_that_is_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    curves = {}
    for i, change in enumerate(({}, {"loss": math.nan}, {"loss": -math.inf}, {"loss": None}, {"steps": None})):
        curves[str(change)] = [{"steps": steps, "loss": 2.0 + i} for steps in STEPS]
        curves[str(change)][3].update(change)
    robustness_figure({}, curves, tmp_path / "r.png")
    picture = below_names(pixels(tmp_path / "r.png"))[:, 100:]
    picture = picture[: near(picture, "#888888").sum(axis=1).argmax()]  # without labels, which are dark as well
    gaps = [np.diff(np.flatnonzero(near(picture, color).any(axis=0))).max() for color in COLORS[:5]]
    assert gaps[0] < 15
    assert min(gaps[1:4]) > 150
    assert gaps[4] < 15, "a point without a place is left out"


def test_the_interval_is_a_light_band(tmp_path: Path) -> None:
    curves = {"a": accuracies([0.2] * 9, width=0.1), "b": accuracies([0.7] * 9, width=0.3)}
    robustness_figure(curves, {}, tmp_path / "r.png")
    picture = pixels(tmp_path / "r.png")
    # 15 % of blue and of vermilion on white
    narrow, wide = (int(near(picture, color, 6).any(axis=1).sum()) for color in ("#d9eaf3", "#f9e7d9"))
    assert wide == pytest.approx(3 * narrow, rel=0.2)


def test_the_interval_of_an_accuracy_is_not_drawn_around_a_loss(tmp_path: Path) -> None:
    robustness_figure({}, {"a": rising()}, tmp_path / "without.png")
    robustness_figure({}, {"a": [point | {"interval": [0.1, 0.6]} for point in rising()]}, tmp_path / "with.png")
    assert (pixels(tmp_path / "with.png") == pixels(tmp_path / "without.png")).all()


def test_the_order_of_points_does_not_matter(tmp_path: Path) -> None:
    robustness_figure({"a": falling()}, {}, tmp_path / "1.png")
    robustness_figure({"a": falling()[::-1]}, {}, tmp_path / "2.png")
    assert (pixels(tmp_path / "1.png") == pixels(tmp_path / "2.png")).all()


def test_a_name_has_the_same_color_in_both_panels(tmp_path: Path) -> None:
    robustness_figure({"a": falling(), "b": falling(0.5)}, {"b": rising()}, tmp_path / "r.png")
    picture = pixels(tmp_path / "r.png")[:, 896 + 100 :]
    assert near(picture, COLORS[1]).sum() > 500
    assert not near(picture, COLORS[0]).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("beside_others", [True, False])
def test_robustness_figure_survives_any_value(tmp_path: Path, beside_others: bool) -> None:
    accuracy: dict[str, list[dict[str, Any]]] = {
        "none": [],
        "nan": [{"eps": 0.0, "accuracy": math.nan, "interval": [math.nan, 0.5]}],
        "no place": [{"eps": math.nan, "accuracy": 0.5}, {"accuracy": 0.5}],
        "missing": [{"eps": 1.0, "accuracy": None, "interval": None}, {"eps": 0.5}],
    }
    loss: dict[str, list[dict[str, Any]]] = {
        "none": [],
        "inf": [{"steps": 0, "loss": -math.inf}],
        "no place": [{"loss": 1.0}, {"steps": None, "loss": 1.0}],
    }
    if beside_others:
        accuracy |= {"one": [{"eps": 8 / 255, "accuracy": 0.4, "interval": [0.3, 0.5]}], "many": falling()}
        loss |= {"huge": [{"steps": 3, "loss": 1e30}], "many": rising()}
    robustness_figure(accuracy, loss, tmp_path / "r.png")
    assert pixels(tmp_path / "r.png").std() > 10


def attacked_sample(experts: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, heatmaps = sample(experts, 2 * count)
    return images[:count], images[count:], heatmaps[:, :count], heatmaps[:, count:]


def test_an_attacked_image_stands_right_beneath_the_clean_one(tmp_path: Path) -> None:
    clean, attacked, *heatmaps = attacked_sample(2, 3)
    attacked_heatmap_figure(clean, attacked, *heatmaps, [("", "")] * 3, tmp_path / "h.png")
    picture = pixels(tmp_path / "h.png")
    left, top = 30, 42
    for clean_image, attacked_image in zip(clean, attacked, strict=True):
        for image in (clean_image, attacked_image):
            expected = (image.permute(1, 2, 0) * 255).numpy().repeat(8, 0).repeat(8, 1)
            np.testing.assert_allclose(picture[top : top + 256, left : left + 256], expected, atol=1)
            top += 256
            gap = (picture[top:, left : left + 256] == 255).all(axis=(1, 2)).argmin()
            top += int(gap)
        if top < picture.shape[0] - 100:
            assert gap == 44
    assert picture.shape[0] == 42 + 6 * 256 + 3 * 10 + 2 * 44 + 20


def test_the_attacked_heatmaps_are_drawn_as_others(tmp_path: Path) -> None:
    clean, attacked, clean_heatmaps, attacked_heatmaps = attacked_sample(3, 1)
    attacked_heatmaps[1] = 0
    clean_heatmaps[2] = math.nan
    arguments = (clean.requires_grad_(), attacked.double(), clean_heatmaps, attacked_heatmaps.double())
    attacked_heatmap_figure(*arguments, [("a → a", "a → b")], tmp_path / "1.png")
    images, heatmaps = torch.cat([clean, attacked]), torch.cat([clean_heatmaps, attacked_heatmaps], 1)
    heatmap_figure(images, heatmaps, ["a → a", "a → b"], tmp_path / "2.png")
    assert (pixels(tmp_path / "1.png") == pixels(tmp_path / "2.png")).all()


def test_labels_of_attacked_images_may_be_any_text(tmp_path: Path, drawn: list[Figure]) -> None:
    labels = [("clean\n$x$ → a$b", "attacked\na very long class name → another of that kind"), ("", "\n")]
    attacked_heatmap_figure(*attacked_sample(1, 2), labels, tmp_path / "h.png")
    texts = {text.get_text(): text for text in drawn[0].texts}
    assert not texts["clean\n$x$ →\u00a0a$b"].get_parse_math()
    assert_no_text_is_hidden(drawn[0])
    assert pixels(tmp_path / "h.png").shape[1] < 1000


@pytest.mark.parametrize(
    ("argument", "shape", "message"),
    [
        (0, (2, 0, 8, 8), r"clean: expected shape \(n, C, H, W\).*got \(2, 0, 8, 8\)"),
        (1, (1, 3, 8, 8), r"attacked: expected .* \(2, 3, 8, 8\), got \(1, 3, 8, 8\)"),
        (1, (2, 3, 8, 9), r"attacked: expected .*got \(2, 3, 8, 9\)"),
        (2, (3, 2, 4, 4), r"clean_heatmaps: expected shape \(N, 2, 8, 8\), N ≥ 1, to fit clean .*got \(3, 2, 4, 4\)"),
        (3, (4, 2, 8, 8), r"attacked_heatmaps: expected .* \(3, 2, 8, 8\), got \(4, 2, 8, 8\)"),
        (3, (2, 8, 8), r"attacked_heatmaps: .*got \(2, 8, 8\)"),
    ],
)
def test_shape_errors_of_attacked_heatmaps_name_the_argument(
    tmp_path: Path, argument: int, shape: tuple[int, ...], message: str
) -> None:
    shapes: list[tuple[int, ...]] = [(2, 3, 8, 8), (2, 3, 8, 8), (3, 2, 8, 8), (3, 2, 8, 8)]
    shapes[argument] = shape
    clean, attacked, clean_heatmaps, attacked_heatmaps = map(torch.rand, shapes)
    with pytest.raises(ValueError, match=message):
        attacked_heatmap_figure(
            clean, attacked, clean_heatmaps, attacked_heatmaps, [("x", "y")] * 2, tmp_path / "h.png"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("labels", [[("x", "y")], [("x", "y"), ("x",)]])
def test_attacked_heatmap_figure_wants_a_pair_of_labels_an_image(tmp_path: Path, labels: list[Any]) -> None:
    with pytest.raises(ValueError, match="row_labels: expected 2 pairs"):
        attacked_heatmap_figure(*attacked_sample(1, 2), labels, tmp_path / "h.png")


def test_labels_in_any_script_are_drawn_without_a_warning(tmp_path: Path) -> None:
    """Whatever fonts are installed: what none of them has is a box."""
    labels = ["猫 → 犬", "고양이\n→ cat", "\U000f0000 → dog"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heatmap_figure(torch.rand(3, 3, 8, 8), torch.rand(2, 3, 8, 8), labels, tmp_path / "figure.png")
    drawn, _ = drawable(labels)
    assert drawn[2] == "□ → dog", "no font has a character for private use"
    assert drawable(["cat → dog", "über $ 3"])[0] == ["cat → dog", "über $ 3"]


def test_a_font_with_the_characters_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the usual one lacks: a letter for private use of STIX, which comes with matplotlib."""
    usual, name = list(matplotlib.rcParams["font.family"]), "STIXNonUnicode"
    own = get_font(findfont(FontProperties(family=[name]))).get_charmap()
    known = get_font(findfont(FontProperties(family=usual))).get_charmap()
    character = chr(max(own.keys() - known.keys()))
    assert drawable([f"a{character}"]) == ([f"a{character}"], [*usual, name])
    monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if font.name != name])
    assert drawable([f"a{character}"]) == (["a□"], usual)


def test_images_of_any_channels_are_shown() -> None:
    values = np.random.default_rng(0).random((2, 5, 6, 4))
    assert np.array_equal(as_rgb(values[..., :3]), values[..., :3])
    for channels in (1, 2, 4):
        mean = values[..., :channels].sum(-1) / channels
        np.testing.assert_allclose(as_rgb(values[..., :channels]), np.stack([mean] * 3, -1), rtol=1e-14)
        np.testing.assert_allclose(grey_of(as_rgb(values[..., :channels])), mean, rtol=1e-12)
