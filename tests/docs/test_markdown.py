"""The Markdown files: whole tables, links and anchors that exist, a README that a package index can show."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.docs.pages import PAGES, anchors, blocks, cells, links, name, tables
from tests.places import REPOSITORY

pages = pytest.mark.parametrize("page", PAGES, ids=name)


@pages
def test_every_row_of_a_table_has_as_many_cells_as_its_header(page: Path) -> None:
    for (_, header), *rows in tables(page):
        for line, row in rows:
            assert row.lstrip().startswith("|"), f"{name(page)}:{line}: a row without its beginning: {row}"
            assert cells(row) == cells(header), f"{name(page)}:{line}: {row}"


@pages
def test_no_table_row_stands_alone(page: Path) -> None:
    within = {line for table in tables(page) for line, _ in table}
    for line, text in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if text.startswith("|") and text.endswith("|"):
            assert line in within, f"{name(page)}:{line}: a row of no table: {text}"


def test_cells_are_counted_as_github_does() -> None:
    assert cells("| a | b |") == 2
    assert cells("a | b") == 2
    assert cells(r"| `a \| b` | c |") == 2
    assert cells("| a | | c |") == 3


def test_a_row_that_lost_its_first_column_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("| a | b | c |\n|---|---:|---:|\n| x | 1 | 2 |\n 1 | 2 |\n\ntext\n", encoding="utf-8")
    ((_, *rows),) = tables(page)
    assert [cells(row) for _, row in rows] == [3, 3, 2]
    assert not rows[-1][1].lstrip().startswith("|")


@pages
def test_every_relative_link_and_anchor_exists(page: Path) -> None:
    for line, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        where = f"{name(page)}:{line}: {target}"
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(REPOSITORY), f"{where}: outside of the repository"
        assert there.exists(), where
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{where}: {sorted(anchors(there))}"


def test_links_are_found_beside_code_that_is_wrapped(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "from `a\n--b` writes [a table](x.json), and `c`\n[`d`](y.md#e)\n\n`[f](z)` is code\n", encoding="utf-8"
    )
    assert list(links(page)) == [(2, "x.json"), (3, "y.md#e")]


# Where a file may lie that is named without its folder: the page says which it means.
FOLDERS = ("", "immunity_fast", "kernels", "benchmarks", "examples", "tests")
OF_OTHERS = {"immunity_fast/experts/NAME.py"}


@pages
def test_a_file_that_is_named_is_there_and_holds_the_name(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for file, name_in_it in re.findall(r"`([\w/.-]+\.py)`(?:: `([\w.]+)`)?", text):
        found = [path for folder in FOLDERS if (path := REPOSITORY / folder / file).is_file()]
        assert found or file in OF_OTHERS, f"{name(page)}: {file}"
        if name_in_it:
            last = name_in_it.rpartition(".")[2]
            assert any(re.search(rf"\b{last}\b", path.read_text(encoding="utf-8")) for path in found), name_in_it


PACKAGE = REPOSITORY / "immunity_fast"
MODULES = sorted(
    module.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    for module in PACKAGE.rglob("*.py")
    if module.name != "__init__.py" and "kernels" not in module.parts
)


def test_contributing_says_where_each_module_is() -> None:
    (tree,) = (block.text for block in blocks(REPOSITORY / "CONTRIBUTING.md") if block.language == "text")
    listed, wing = [], ""
    for line in tree.splitlines():
        if match := re.match(r"  (\w+)/", line):
            wing = match[1]
        elif match := re.match(r"    (\w+) ", line):
            listed.append(f"{wing}.{match[1]}")
        elif re.match(r"  \w", line):
            listed += re.findall(r"(\w+)\.py", line)
    in_one_line = ("experts.", "reproduction.")  # wings whose files explain themselves
    assert sorted(listed) == [module for module in MODULES if not module.startswith(in_one_line)]


# What has no section of its own: public names, which are documented where people import them from; and commands, which
# have --help.
COMMANDS = {"__main__", "train", "evaluate", "explain", "export_model", "ensemble", "reproduce", "poison", "info"}
ELSEWHERE = {
    "losses",
    "models.capture",
    "models.gate",
    "models.moe",
    "attacks.gradient",
    "attacks.descent",
    "attacks.autoattack",
    "peers.dverge",
}
ARCHITECTURES = {"cells", "darts", "densenet", "googlenet", "resnet", "robnet", "staged"}


def test_every_module_is_in_the_reference() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.is_relative_to(REPOSITORY / "docs/api"))
    documented = set(re.findall(r"automodule:: immunity_fast\.([\w.]+)", text))
    without = COMMANDS | ELSEWHERE | {f"experts.{name}" for name in ARCHITECTURES}
    assert sorted(documented - {"attacks"} | without) == MODULES
    assert not documented & without


@pytest.fixture
def index_description(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What setup.py makes of the README for a package index."""
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=lambda **_: None))
    return runpy.run_path(str(REPOSITORY / "setup.py"))["index_description"]


def test_an_index_sees_no_relative_link(index_description: Any) -> None:
    shown = index_description((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)]*)\)", shown)
    assert targets, "the absolute ones stay"
    assert all(target.startswith("https://") for target in targets), targets
    assert "docs/library.md" not in shown.replace("`", ""), "the text stays, not the file's name"
    assert "FusedImmunityLoss, ImmunityMoE" in shown, "code stays as it is"


def test_of_a_relative_link_the_text_is_left(index_description: Any) -> None:
    text = "see [the *page*](docs/a.md#b), [arXiv](https://arxiv.org/abs/1), ![a figure](a.png) and `x[0](1)`\n"
    code = "```python\nparts[0](images)\n```\n"
    expected = (
        "see the *page*, [arXiv](https://arxiv.org/abs/1), *Figure, in the repository: a figure.* and `x[0](1)`\n"
    )
    assert index_description(text + code) == expected + code


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
