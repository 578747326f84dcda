import errno
import os
import re
from html import unescape
from pathlib import Path

import pytest
import torch

from immunity_fast.reporting.heatmaps import heatmap_figure
from immunity_fast.reporting.html import Table, write_report

HOSTILE = "<script>alert('x')</script> & \"quoted\""


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


def test_to_html_escapes_texts_and_aligns_numbers() -> None:
    table = Table("A & B", ["attack", "mean"], [["<b>", "98.1"], ["\udcff", "—"]], note="In <i>.")
    assert table.to_html() == table._repr_html_()
    text = table.to_html()
    assert text.startswith("<table><caption>A &amp; B</caption><thead><tr>")
    assert '<th style="text-align: right">mean</th>' in text
    assert '<td style="text-align: left">&lt;b&gt;</td><td style="text-align: right">98.1</td>' in text
    assert text.endswith("</table><p><small>In &lt;i&gt;.</small></p>")
    text.encode()  # a path may be no text


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
    with pytest.raises(ValueError, match=r"rows\[1\]: expected 2 cells.*got 1"):
        Table("", ["a", "b"], [["1", "2"], ["3"]])


def write_hostile(folder: Path) -> str:
    """The report whose every text is hostile."""
    heatmap_figure(torch.rand(1, 3, 8, 8), torch.rand(2, 1, 8, 8), ["cat → dog"], folder / "h.png")
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


def test_report_leaves_out_empty_sections_and_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, title="t", lead="", facts={}, tables=[], figures=[], commands={}, settings={})
    html = path.read_text(encoding="utf-8")
    assert "<h1>t</h1>" in html
    assert not re.findall("<h2|<dl|<table|<figure|<pre|<details", html)


def test_a_figure_that_is_no_png_leaves_the_old_report(tmp_path: Path) -> None:
    (tmp_path / "f.svg").write_text("<svg/>")
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match=r"figures: expected PNG files, got .*f\.svg"):
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


def test_a_full_disk_leaves_the_old_report_and_no_half_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_hostile(tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_hostile(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"h.png", "report.html"}
