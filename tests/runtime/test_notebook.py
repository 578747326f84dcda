"""Progress in a notebook: one output that changes in place, text and HTML, and none of a terminal's."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from immunity_fast.runtime import cli, notebook


class Cell:
    """What stands in for IPython: the outputs of a cell, and how often each was shown."""

    def __init__(self) -> None:
        self.outputs: list[list[dict[str, str]]] = []

    def display(self, data: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        versions = [data]
        self.outputs.append(versions)
        return SimpleNamespace(update=lambda changed, raw: versions.append(changed))


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    cell = Cell()
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=cell.display))  # type: ignore[arg-type]
    return cell


def test_only_a_kernel_is_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not notebook.in_notebook()
    for shell in (None, SimpleNamespace()):  # imported by a program, or IPython in a terminal
        monkeypatch.setitem(
            sys.modules,
            "IPython",
            SimpleNamespace(get_ipython=lambda shell=shell: shell),  # type: ignore[arg-type]
        )
        assert not notebook.in_notebook()


def test_a_bar_is_one_output_that_says_where_it_stands(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "SECONDS", 0)
    with cli.progress_bar() as progress:
        task = progress.add_task("training", total=3, status="<compiling>")
        progress.advance(task)
        progress.update(task, status="")
        progress.advance(task, 2)
    (versions,) = cell.outputs
    assert versions[0]["text/plain"] == "training: 0 of 3, 0:00:00 so far, <compiling>"
    assert "&lt;compiling&gt;" in versions[0]["text/html"]
    assert '<progress value="1" max="3">' in versions[2]["text/html"]
    assert versions[-1]["text/plain"] == "training: 3 of 3, 0:00:00"
    assert "<progress" not in versions[-1]["text/html"]


def test_a_bar_is_not_shown_at_each_step(cell: Cell) -> None:
    with cli.progress_bar() as progress:
        task = progress.add_task("training", total=1000, status="")
        for _ in range(1000):
            progress.advance(task)
    (versions,) = cell.outputs
    assert len(versions) < 20
    assert versions[-1]["text/plain"].startswith("training: 1,000 of 1,000")


def test_what_failed_leaves_how_far_it_came(cell: Cell) -> None:
    def fail() -> None:
        with cli.progress_bar() as progress:
            progress.advance(progress.add_task("evaluation", total=4, status=""))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert cell.outputs[0][-1]["text/plain"].startswith("evaluation: 1 of 4")


def test_lines_in_a_notebook_are_text(cell: Cell, capsys: pytest.CaptureFixture[str]) -> None:
    with cli.progress_bar() as progress:
        progress.console.print("epoch 1/2  [b]")
        progress.console.print("epoch 2/2")
    assert capsys.readouterr().out == "epoch 1/2  [b]\nepoch 2/2\n"
    assert cell.outputs == [], "no task, no bar"


def test_no_line_now_and_then_beside_a_bar(
    cell: Cell, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "STATUS_SECONDS", 0.001)
    with cli.status_lines(lambda: "status"):
        sum(range(10**6))
    assert capsys.readouterr().out == ""


def test_a_bar_that_nobody_is_to_see_is_none(cell: Cell) -> None:
    with cli.progress_bar(enabled=False) as progress:
        progress.advance(progress.add_task("training", total=3, status=""))
    assert cell.outputs == []
