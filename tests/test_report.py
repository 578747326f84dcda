import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from immunity_fast.figures import heatmap_figure, training_curves
from immunity_fast.report import Table, write_report

RECORD = {
    "epoch": 1,
    "loss": 3.2,
    "cross_entropy": 2.1,
    "mutual_information_loss": 7.5,
    "position_stability": 2400.0,
    "val_accuracy_switching": 0.61,
    "val_accuracy_mean": 0.63,
    "val_pgd10_accuracy_mean": 0.2,
    "mutual_information": 0.3,
    "val_mutual_information": 0.28,
    "val_dead_heatmaps": 0.01,
    "images_per_second": 900.0,
}
HOSTILE = "<script>alert('x')</script> & \"quoted\""


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


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
        images, heatmaps, ["$\\bad$ → a$b", "a very long class name → another of that kind"], tmp_path / "h.png"
    )
    picture = pixels(tmp_path / "h.png")
    assert picture[:, 10:].shape[1] < 1200
    assert (picture[:, :4] == 255).all(), "a label reaches the edge"


@pytest.mark.parametrize(
    ("images", "heatmaps", "labels", "message"),
    [
        ((2, 1, 8, 8), (3, 2, 8, 8), 2, r"images must have shape \(n, 3, H, W\).*\(2, 1, 8, 8\)"),
        ((0, 3, 8, 8), (3, 0, 8, 8), 0, r"images .*\(0, 3, 8, 8\)"),
        ((2, 3, 8, 8), (3, 2, 4, 4), 2, r"heatmaps must have shape \(N, 2, 8, 8\).*got \(3, 2, 4, 4\)"),
        ((2, 3, 8, 8), (0, 2, 8, 8), 2, r"heatmaps .*got \(0, 2, 8, 8\)"),
        ((2, 3, 8, 8), (3, 2, 8, 8), 1, r"row_labels must hold 2 .*got 1"),
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
    ("value", "everywhere"), [("nan", True), ("inf", True), ("nan", False), ("-inf", False), ("0", True), ("-1", False)]
)
def test_training_curves_survives_any_value(tmp_path: Path, value: str, everywhere: bool) -> None:
    records = run_of(4)
    for record in records if everywhere else records[1:2]:
        record.update({key: float(value) for key in record if key != "epoch"})
    training_curves(records, tmp_path / "c.png")
    assert pixels(tmp_path / "c.png").std() > 10


@pytest.mark.parametrize("records", [[], [{"epoch": 1.0}]])
def test_training_curves_refuses_records_with_nothing_to_draw(tmp_path: Path, records: list[dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="records must hold"):
        training_curves(records, tmp_path / "c.png")


def test_to_markdown() -> None:
    table = Table("Accuracy", ["attack", "mean | off"], [["none", "98.1"], ["a|b\nc", "—"]], note="In percent.")
    assert table.to_markdown() == "\n".join(
        [
            "**Accuracy**",
            "",
            r"| attack | mean \| off |",
            "| ------ | ----------: |",
            "| none   |        98.1 |",
            r"| a\|b c |           — |",
            "",
            "In percent.",
        ]
    )


def test_to_markdown_of_a_table_without_rows() -> None:
    assert Table("", ["a"], []).to_markdown() == "| a   |\n| --- |"


@pytest.mark.parametrize(
    ("cells", "numeric"),
    [
        (["97.5", "−3", "+1.5 ± 0.2", ".5", "2,412", "0.8 nats", "8/255", "1e-3", "—", "nan", ""], True),
        (["97.5", "none"], False),
        (["-", ""], False),
        (["- a"], False),
    ],
)
def test_columns_of_numbers_are_recognised(cells: list[str], numeric: bool) -> None:
    assert Table("", ["x"], [[cell] for cell in cells]).numeric() == [numeric]


def test_table_refuses_a_row_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"rows\[1\] must hold 2 cells.*got 1"):
        Table("", ["a", "b"], [["1", "2"], ["3"]])


def write_hostile(folder: Path) -> str:
    """The report whose every text is hostile."""
    images, heatmaps = sample(2, 1, 8, 8)
    heatmap_figure(images, heatmaps, ["cat → dog"], folder / "h.png")
    write_report(
        folder / "report.html",
        title=HOSTILE,
        lead=HOSTILE,
        facts={HOSTILE: HOSTILE},
        tables=[Table(HOSTILE, [HOSTILE, "n"], [[HOSTILE, "1.5"]], note=HOSTILE)],
        figures=[(folder / "h.png", HOSTILE)],
        commands={HOSTILE: HOSTILE, "two lines": "python a.py --x 1 \\\n  --y 2"},
        settings={HOSTILE: HOSTILE, "alpha": 1.0, "data": None},
    )
    return (folder / "report.html").read_text(encoding="utf-8")


def test_report_escapes_every_text(tmp_path: Path) -> None:
    html = write_hostile(tmp_path)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 17
    assert unescape(re.findall(r'alt="([^"]*)"', html)[0]) == HOSTILE


def test_report_is_self_contained_and_leaves_no_other_file(tmp_path: Path) -> None:
    html = write_hostile(tmp_path)
    links = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'>\s]{0,16})""", html)
    assert links == ["data:image/png;b"]
    assert "url(" not in html
    assert "@import" not in html
    assert "http://" not in html
    assert "https://" not in html
    assert {file.name for file in tmp_path.iterdir()} == {"h.png", "report.html"}


def test_report_shows_commands_as_they_are(tmp_path: Path) -> None:
    code = re.findall("<pre><code>(.*?)</code></pre>", write_hostile(tmp_path), flags=re.DOTALL)
    texts = [unescape(re.sub("<[^>]*>", "", text)) for text in code]
    assert [text.removesuffix("\n") for text in texts] == [HOSTILE, "python a.py --x 1 \\\n  --y 2"]


def test_report_aligns_numbers_to_the_right(tmp_path: Path) -> None:
    assert '<td class="number">1.5</td>' in write_hostile(tmp_path)


def test_report_leaves_out_empty_sections_and_replaces_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, title="t", lead="", facts={}, tables=[], figures=[], commands={}, settings={})
    html = path.read_text(encoding="utf-8")
    assert "<h1>t</h1>" in html
    assert not re.findall("<h2|<dl|<table|<figure|<pre|<details", html)


def test_report_refuses_a_figure_that_is_not_png_and_keeps_the_old_report(tmp_path: Path) -> None:
    (tmp_path / "f.svg").write_text("<svg/>")
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match=r"figures must be PNG files, .*f\.svg"):
        write_report(
            path,
            title="",
            lead="",
            facts={},
            tables=[],
            figures=[(tmp_path / "f.svg", "")],
            commands={},
            settings={},
        )
    assert path.read_text() == "old"
