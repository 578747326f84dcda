import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from immunity_fast.reporting.style import COLORS
from immunity_fast.reproduction.charts import Panel, dot_chart, sweep_figure
from tests import grids, pictures
from tests.pictures import assert_no_text_is_hidden, near, pixels

drawn = pictures.drawn

ROWS = ("ResNet18", "DenseNet121", "GoogLeNet")
SERIES = ("five networks trained independently", "Immunity")
LONG = "a network of four heads with random switching, attacked by PGD-10 averaged over draws, $\\alpha$ = 2/255"
PLACES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
POWERS = (0.0, 0.001, 0.01, 0.1, 1.0)


def panel(rows: Sequence[str] = ROWS, series: Sequence[str] = SERIES, axis: str = "%", log: bool = False) -> Panel:
    values = {
        name: {row: (10.0 ** ((7 * i + 3 * j) % 13 / 6.5), 1.5) for j, row in enumerate(rows)}
        for i, name in enumerate(series)
    }
    return Panel("Accuracy under PGD-10", axis, values, log)


def one_row(values: Sequence[float], axis: str = "", log: bool = False, spread: float = 0.0) -> Panel:
    """One series, and so one colour, a value."""
    return Panel("IScore", axis, {f"{i}": {"row": (value, spread)} for i, value in enumerate(values)}, log)


def curve(
    places: Sequence[float] = PLACES, value: float = 2.0, spread: float = 0.3
) -> list[tuple[float, float, float]]:
    return [(x, value / (1 + x), spread) for x in places]


def inside(path: Path, figure: Figure, index: int = 0) -> np.ndarray:
    """The picture within the axes, and the half of a marker around."""
    picture = pixels(path)
    box = figure.axes[index].get_window_extent()
    x0, x1, y0, y1 = (round(edge) for edge in (box.x0, box.x1, box.y0, box.y1))
    return picture[picture.shape[0] - y1 - 8 : picture.shape[0] - y0 + 8, x0 - 8 : x1 + 8]


def middle(where: np.ndarray, axis: int) -> float:
    """The middle of what is true, along the axis."""
    return float(np.flatnonzero(where.any(axis=1 - axis))[[0, -1]].mean())


def length(where: np.ndarray, axis: int) -> int:
    return int(np.ptp(np.flatnonzero(where.any(axis=1 - axis))))


def assert_same(first: Path, second: Path) -> None:
    assert pixels(first).shape == pixels(second).shape
    assert (pixels(first) == pixels(second)).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("panels", "rows", "series"),
    [
        pytest.param(1, ["ResNet18"], ["Immunity"], marks=pytest.mark.exhaustive),
        pytest.param(1, [f"{i}: {LONG}" for i in range(3)], [LONG, "_", "$"], marks=pytest.mark.exhaustive),
        (3, list(ROWS), list(SERIES)),
        pytest.param(
            2,
            [f"DenseNet121, attack {i}" for i in range(40)],
            [f"series {i}" for i in range(6)],
            marks=pytest.mark.exhaustive,
        ),
        (4, ["W" * 100, "_", "$", ""], ["", f"1: {LONG}", f"2: {LONG}"]),
    ],
)
def test_dot_chart_hides_no_text(
    tmp_path: Path, drawn: list[Figure], panels: int, rows: list[str], series: list[str]
) -> None:
    kinds = [panel(rows, series), panel(rows, series, log=True), panel(rows, series, "nats"), panel(rows, series, LONG)]
    dot_chart(kinds[:panels], tmp_path / "d.png")
    assert_no_text_is_hidden(drawn[0])
    assert pixels(tmp_path / "d.png").shape[1] == (896 if panels == 1 else 1792)
    for i in range(panels):
        picture = inside(tmp_path / "d.png", drawn[0], i)
        assert all(near(picture, color).sum() > 100 for color, _ in zip(COLORS, series, strict=False))
    names = [label.get_text() for axes in drawn[0].axes for label in axes.get_yticklabels()]
    shown = [name.replace("\n", " ") for name in names if name]
    assert len(shown) == sum(row != "" for row in rows) * (2 if panels == 4 else 1)
    assert drawn[0].axes[0].get_position().width > 0.2


def test_dot_chart_grows_by_the_same_height_for_each_row(tmp_path: Path, drawn: list[Figure]) -> None:
    for count in (1, 11, 21):
        dot_chart([panel([f"row {i}" for i in range(count)], axis="nats")], tmp_path / f"{count}.png")
    heights = [pixels(tmp_path / f"{count}.png").shape[0] for count in (1, 11, 21)]
    assert np.diff(heights).tolist() == pytest.approx([heights[1] - heights[0]] * 2, abs=2)
    assert 400 < heights[1] - heights[0] < 600
    inches = [figure.axes[0].get_window_extent().height for figure in drawn]
    assert inches == pytest.approx([inches[0] * count for count in (1, 11, 21)], rel=0.03)


def test_a_series_has_the_same_color_in_all_panels(tmp_path: Path, drawn: list[Figure]) -> None:
    both, second = panel(), panel(series=SERIES[1:])
    dot_chart([both, second], tmp_path / "d.png")
    for color, counts in zip(COLORS, ((True, False), (True, True)), strict=False):
        assert tuple(near(inside(tmp_path / "d.png", drawn[0], i), color).any() for i in (0, 1)) == counts


def test_percents_are_drawn_from_0_to_100(tmp_path: Path, drawn: list[Figure]) -> None:
    dot_chart([one_row([0, 50, 100, 25], "accuracy (%)", spread=0.5)], tmp_path / "d.png")
    picture = inside(tmp_path / "d.png", drawn[0])
    places = [middle(near(picture, color), 1) for color in COLORS[:4]]
    width = picture.shape[1] - 16
    assert places == pytest.approx([8 + width * share for share in (0, 0.5, 1, 0.25)], abs=2)


def test_percents_outside_of_0_to_100_are_drawn_too(tmp_path: Path, drawn: list[Figure]) -> None:
    dot_chart([one_row([-20, 0, 120], "change (%)")], tmp_path / "d.png")
    picture = inside(tmp_path / "d.png", drawn[0])
    places = [middle(near(picture, color), 1) for color in COLORS[:3]]
    assert places[2] - places[1] == pytest.approx(6 * (places[1] - places[0]), rel=0.02)


@pytest.mark.parametrize("values", [(1, 10, 100, 1e3, 1e4, 1e5), (0, 10, 100, 1e3, 1e4, 1e5), (-10, 0, 10, 100)])
def test_powers_of_ten_and_0_are_equally_far_apart_on_a_log_axis(
    tmp_path: Path, drawn: list[Figure], values: tuple[float, ...]
) -> None:
    dot_chart([one_row(values, log=True)], tmp_path / "d.png")
    picture = inside(tmp_path / "d.png", drawn[0])
    gaps = np.diff([middle(near(picture, color), 1) for color, _ in zip(COLORS, values, strict=False)])
    assert gaps.min() > 80
    assert np.ptp(gaps) < 3


def test_a_log_axis_of_one_magnitude_is_linear(tmp_path: Path) -> None:
    for log in (True, False):
        dot_chart([one_row([200, 250, 300], log=log)], tmp_path / f"{log}.png")
    assert_same(tmp_path / "True.png", tmp_path / "False.png")


def test_a_whisker_is_as_long_as_twice_its_spread(tmp_path: Path, drawn: list[Figure]) -> None:
    values = {"a": {"row": (50.0, 10.0)}, "b": {"row": (50.0, 20.0)}, "c": {"row": (95.0, 20.0)}}
    dot_chart([Panel("", "%", values)], tmp_path / "d.png")
    picture = inside(tmp_path / "d.png", drawn[0])
    width = picture.shape[1] - 16
    lengths = [length(near(picture, color), 1) for color in COLORS[:3]]
    assert lengths == pytest.approx([0.2 * width, 0.4 * width, 0.25 * width], abs=3)


def test_a_whisker_below_0_is_cut_on_a_log_axis(tmp_path: Path, drawn: list[Figure]) -> None:
    values = {"a": {"row": (10.0, 1e6)}, "b": {"row": (1e5, 0.0)}}
    dot_chart([Panel("", "", values, log=True)], tmp_path / "d.png")
    assert drawn[0].axes[0].get_xlim()[0] > 0.1
    assert near(inside(tmp_path / "d.png", drawn[0]), COLORS[0])[:, 8:12].any()


@pytest.fixture(scope="module")
def without_whiskers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dot chart and a sweep whose spreads are 0."""
    folder = tmp_path_factory.mktemp("without")
    dot_chart([one_row([1, 2], spread=0.0)], folder / "d.png")
    sweep_figure({"β": {"IScore": curve(spread=0.0)}}, folder / "s.png")
    return folder / "d.png", folder / "s.png"


@pytest.mark.parametrize("spread", [math.nan, pytest.param(math.inf, marks=pytest.mark.exhaustive), -1.0])
def test_no_whisker_where_the_spread_is_no_number_above_0(
    tmp_path: Path, without_whiskers: tuple[Path, Path], spread: float
) -> None:
    dot_chart([one_row([1, 2], spread=spread)], tmp_path / "d.png")
    sweep_figure({"β": {"IScore": curve(spread=spread)}}, tmp_path / "s.png")
    assert_same(tmp_path / "d.png", without_whiskers[0])
    assert_same(tmp_path / "s.png", without_whiskers[1])


@pytest.fixture(scope="module")
def without_a_value(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dot chart that lacks a value of its second series."""
    folder = tmp_path_factory.mktemp("lacking")
    full = panel().values
    without = {SERIES[0]: full[SERIES[0]], SERIES[1]: {row: full[SERIES[1]][row] for row in (ROWS[0], ROWS[2])}}
    for name, values in (("without", without), ("full", full)):
        dot_chart([Panel("Accuracy", "%", values)], folder / f"{name}.png")
    orange = [int(near(pixels(folder / f"{name}.png"), COLORS[1]).sum()) for name in ("without", "full")]
    assert orange[0] < orange[1]
    return folder / "without.png"


@pytest.mark.parametrize("value", [math.nan, math.inf, pytest.param(-math.inf, marks=pytest.mark.exhaustive)])
def test_values_that_are_not_finite_are_left_out_as_missing_ones(
    tmp_path: Path, without_a_value: Path, value: float
) -> None:
    full = panel().values
    with_value = {SERIES[0]: full[SERIES[0]], SERIES[1]: full[SERIES[1]] | {ROWS[1]: (value, 1.0)}}
    dot_chart([Panel("Accuracy", "%", with_value)], tmp_path / "1.png")
    assert_same(tmp_path / "1.png", without_a_value)


def test_the_order_in_later_series_and_panels_does_not_matter(tmp_path: Path) -> None:
    first, second = panel(), panel(axis="nats")
    turned = {name: dict(reversed(values.items())) for name, values in reversed(second.values.items())}
    dot_chart([first, second], tmp_path / "1.png")
    dot_chart([first, Panel(second.title, second.axis, turned)], tmp_path / "2.png")
    assert_same(tmp_path / "1.png", tmp_path / "2.png")


def test_rows_are_drawn_from_the_top_in_their_order(tmp_path: Path, drawn: list[Figure]) -> None:
    values = {f"{i}": {f"row {i}": (1.0, 0.0)} for i in range(4)}
    dot_chart([Panel("", "", values)], tmp_path / "d.png")
    picture = inside(tmp_path / "d.png", drawn[0])
    heights = [middle(near(picture, color), 0) for color in COLORS[:4]]
    assert heights == sorted(heights)
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == [f"row {i}" for i in range(4)]


def test_figures_are_the_same_each_time(tmp_path: Path) -> None:
    for name in ("1", "2"):
        dot_chart([panel(), panel(log=True)], tmp_path / f"d{name}.png")
        sweep_figure({"β": {"IScore": curve()}}, tmp_path / f"s{name}.png", {"β": 1}, {"IScore"})
    for kind in "ds":
        assert (tmp_path / f"{kind}1.png").read_bytes() == (tmp_path / f"{kind}2.png").read_bytes()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("values", "log"),
    grids.every(2, [[math.nan], [0.0], [1e6, 0], [1e-30, 1e30], [-5, 1e4], [-3, -4e3], [0, math.inf]], [False, True]),
)
def test_both_survive_any_value(tmp_path: Path, drawn: list[Figure], values: list[float], log: bool) -> None:
    dot_chart([one_row(values, log=log, spread=3.0)], tmp_path / "d.png")
    points = [(float(i), value, 3.0) for i, value in enumerate(values)]
    sweep_figure({"β": {"CScore": points}}, tmp_path / "s.png", log={"CScore"} if log else ())
    for name, figure in zip("ds", drawn, strict=True):
        assert_no_text_is_hidden(figure)
        picture = inside(tmp_path / f"{name}.png", figure)
        assert near(picture, COLORS[0]).any() == math.isfinite(values[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("columns", grids.sampled([1, 2, 3, 5], ordinary=lambda columns: columns == 2))
def test_sweep_figure_hides_no_text(tmp_path: Path, drawn: list[Figure], columns: int) -> None:
    measures = {"IScore (nats)": curve(), "CScore (pixels⁴)": curve(POWERS, 1e6, 3e5), LONG: curve([0.1234567, 1e7])}
    sweeps = dict.fromkeys(("β", "γ", "α", LONG, "$")[:columns], measures)
    sweep_figure(sweeps, tmp_path / "s.png", {"β": 1, "γ": 0.3}, {"CScore (pixels⁴)"})
    assert_no_text_is_hidden(drawn[0])
    assert len(drawn[0].axes) == 3 * columns
    for i in range(3 * columns):
        assert near(inside(tmp_path / "s.png", drawn[0], i), COLORS[0]).sum() > 200


@pytest.mark.parametrize("places", [POWERS, PLACES])
def test_places_are_equally_far_apart_0_from_the_first_too(
    tmp_path: Path, drawn: list[Figure], places: tuple[float, ...]
) -> None:
    sweep_figure({"β": {"IScore": curve(places, spread=1.0)}}, tmp_path / "s.png")
    labels = [label.get_window_extent() for label in drawn[0].axes[0].get_xticklabels()]
    gaps = np.diff([(box.x0 + box.x1) / 2 for box in labels])
    assert len(gaps) == len(places) - 1
    assert np.ptp(gaps) < 3
    # A whisker beyond the line, at each of the places
    columns = near(inside(tmp_path / "s.png", drawn[0]), COLORS[0]).sum(axis=0) > 60
    assert (np.diff(columns.astype(int)) == 1).sum() == len(places)


def test_axes_of_a_sweep_are_equally_high_whatever_the_titles(tmp_path: Path, drawn: list[Figure]) -> None:
    sweep_figure({"β": {"IScore": curve()}}, tmp_path / "1.png")
    sweep_figure({"β": {f"{i}: {LONG}": curve() for i in range(4)}}, tmp_path / "2.png", {"β": 1.0})
    heights = [axes.get_window_extent().height for figure in drawn for axes in figure.axes]
    assert heights == pytest.approx([heights[0]] * 5, rel=0.03)


def test_a_measure_has_one_axis_for_all_coefficients(tmp_path: Path, drawn: list[Figure]) -> None:
    level, wide = [(1.0, 5.0, 0.0), (2.0, 5.0, 0.0)], [(1.0, 5.0, 0.0), (2.0, 50.0, 0.0)]
    sweep_figure({"β": {"IScore": level}, "γ": {"IScore": wide}}, tmp_path / "s.png")
    left, right = (near(inside(tmp_path / "s.png", drawn[0], i), COLORS[0]) for i in (0, 1))
    bottoms = [int(np.flatnonzero(picture.any(axis=1))[-1]) for picture in (left, right)]
    assert bottoms[0] == bottoms[1]
    assert length(left, 0) < 20
    assert length(right, 0) > 200


def test_the_default_is_a_line_through_its_column(tmp_path: Path, drawn: list[Figure]) -> None:
    sweeps = {name: {"a": curve(), "b": curve()} for name in ("β", "γ")}
    sweep_figure(sweeps, tmp_path / "1.png", {"γ": 2.0, "other": 1.0})
    sweep_figure({"β": {"a": curve()}}, tmp_path / "2.png", {"other": 1.0, "β": math.nan})
    grey = [near(inside(tmp_path / "1.png", drawn[0], i), "#777777", 6).sum(axis=0) for i in range(4)]
    lines = [int(columns[16:].argmax()) + 16 for columns in grey]
    assert [columns[line] > 60 for columns, line in zip(grey, lines, strict=True)] == [False, True] * 2
    # 2 is the last but one of 6 places, which are within 1/22 and 21/22 of the axis.
    width = drawn[0].axes[1].get_window_extent().width
    assert lines[1] == lines[3] == pytest.approx(8 + width * (1 / 22 + 0.8 * 20 / 22), abs=2)
    assert drawn[0].legends
    assert not drawn[1].legends


def test_a_default_that_was_not_swept_is_within_the_axis(tmp_path: Path, drawn: list[Figure]) -> None:
    sweep_figure({"β": {"IScore": curve()}}, tmp_path / "s.png", {"β": 64.0})
    assert drawn[0].axes[0].get_xlim()[1] > 64


def test_measures_on_a_log_axis_fall_evenly(tmp_path: Path, drawn: list[Figure]) -> None:
    points = [(2.0**i, 10.0**-i, 0.0) for i in range(5)]
    sweep_figure({"β": {"CScore": points, "IScore": points}}, tmp_path / "s.png", log=["CScore", "other"])
    for i, is_log in enumerate((True, False)):
        picture = near(inside(tmp_path / "s.png", drawn[0], i), COLORS[0])
        columns = [np.flatnonzero(picture[:, picture.shape[1] * k // 4]).mean() for k in (1, 2, 3)]
        gaps = np.diff(columns)
        assert (abs(gaps[0] - gaps[1]) < 3) == is_log


def test_a_sweeps_points_may_be_in_any_order_and_lack_a_place(tmp_path: Path) -> None:
    sweep_figure({"β": {"IScore": curve()}}, tmp_path / "1.png")
    sweep_figure({"β": {"IScore": [(math.nan, 1.0, 0.0), *curve()[::-1]]}}, tmp_path / "2.png")
    assert_same(tmp_path / "1.png", tmp_path / "2.png")


def test_a_value_that_is_not_finite_leaves_a_gap(tmp_path: Path, drawn: list[Figure]) -> None:
    points = {"full": curve(spread=0.0), "gap": curve(spread=0.0)}
    points["gap"][2] = (0.5, math.nan, 1.0)
    sweep_figure({"β": points}, tmp_path / "s.png")
    colored = [near(inside(tmp_path / "s.png", drawn[0], i), COLORS[0]).any(axis=0) for i in (0, 1)]
    gaps = [int(np.diff(np.flatnonzero(columns)).max()) for columns in colored]
    assert gaps[0] < 10
    assert gaps[1] > 150


@pytest.mark.filterwarnings("error")
def test_a_measure_may_be_missing_for_a_coefficient(tmp_path: Path, drawn: list[Figure]) -> None:
    sweeps = {"β": {"a": curve(), "b": curve()}, "γ": {"b": curve()}, "α": {}}
    sweep_figure(sweeps, tmp_path / "s.png", {"β": 1, "γ": 1, "α": 1}, {"a"})
    assert_no_text_is_hidden(drawn[0])
    colored = [near(inside(tmp_path / "s.png", drawn[0], i), COLORS[0]).any() for i in range(6)]
    assert colored == [True, False, False, True, True, False]


@pytest.mark.parametrize("panels", [[], [Panel("t", "%", {})], [Panel("t", "%", {"a": {}}), Panel("t", "", {})]])
def test_dot_chart_refuses_nothing_to_draw(tmp_path: Path, panels: list[Panel]) -> None:
    with pytest.raises(ValueError, match=rf"^panels: expected .* got {len(panels)} panels[^\n]*$"):
        dot_chart(panels, tmp_path / "d.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sweeps", [{}, {"β": {}}, {"β": {"IScore": []}, "γ": {}}])
def test_sweep_figure_refuses_nothing_to_draw(
    tmp_path: Path, sweeps: dict[str, dict[str, list[tuple[float, float, float]]]]
) -> None:
    with pytest.raises(ValueError, match=rf"^sweeps: expected .* got {len(sweeps)} coefficients[^\n]*$"):
        sweep_figure(sweeps, tmp_path / "s.png")
    assert not list(tmp_path.iterdir())
