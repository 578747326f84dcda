"""`examples/tour.ipynb`: executed by a kernel as whoever opens it does, with fewer images; what its cells show is few.

It is kept in the repository without what it showed: that would be of one machine, and the timings of one day.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from tests.places import REPOSITORY

nbformat = pytest.importorskip("nbformat", reason="it reads notebooks")
nbclient = pytest.importorskip("nbclient", reason="it runs notebooks")
pytest.importorskip("ipykernel", reason="in which notebooks run")

TOUR = REPOSITORY / "examples" / "tour.ipynb"
FEWER = "IMAGES, EPOCHS, EXPERTS, ATTACKED = 80, 2, 2, 3"
MOST_OUTPUTS = 3  # of a cell
MOST_LINES = 80  # of an output as text: the tables of an evaluation, which are shown as HTML


def read() -> Any:
    return nbformat.read(TOUR, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def executed(folder: Path, parameters: str | None = None) -> Any:
    """The notebook with what its cells have put out, run in a folder, with other parameters."""
    notebook = read()
    if parameters is not None:
        (cell,) = (cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", ()))
        assert set(re.findall("[A-Z]{2,}", parameters)) == set(re.findall("(?m)^[A-Z]+", cell.source))
        cell.source = parameters
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
            patch.setenv(name, str(folder / "home"))
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("OMP_NUM_THREADS", "1")
        where = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """A cell's outputs, streams that follow each other as one, which is how a notebook shows them."""
    found: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and found and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(copy.deepcopy(output))
    return found


def text_of(output: Any) -> str:
    return str(output.text if output.output_type == "stream" else output.data.get("text/plain", ""))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tour")


@pytest.fixture(scope="module")
def tour(folder: Path) -> Any:
    return executed(folder, FEWER)


@pytest.fixture(scope="module")
def shown(tour: Any) -> dict[str, list[Any]]:
    """What each cell has put out, by its last line."""
    return {cell.source.splitlines()[-1].strip(): joined(cell.outputs) for cell in code_cells(tour)}


def test_it_is_kept_without_what_it_showed() -> None:
    notebook = read()
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None
    assert [cell.id for cell in notebook.cells] == [f"tour-{number:02}" for number in range(len(notebook.cells))]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_its_text_names_commands_and_extras_that_there_are() -> None:
    from immunity_fast.runtime.commands import COMMANDS

    text = "\n".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    named = set(re.findall(r"immunity-fast (\w+)", text))
    assert named >= {"train", "evaluate", "explain", "export"}
    assert named <= set(COMMANDS)
    assert "'.[train,notebook]'" in text


@pytest.mark.slow
def test_every_cell_runs_and_says_little(tour: Any) -> None:
    for cell in code_cells(tour):
        assert cell.execution_count is not None, cell.source
        outputs = joined(cell.outputs)
        assert len(outputs) <= MOST_OUTPUTS, [text_of(output) for output in outputs]
        for output in outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", text_of(output)
            assert len(text_of(output).splitlines()) <= MOST_LINES, text_of(output)
            assert not re.search("[\r\x1b\b]", text_of(output)), "what moves a terminal's cursor is noise here"


@pytest.mark.slow
def test_training_shows_one_line_that_moves_and_one_an_epoch(shown: dict[str, list[Any]]) -> None:
    bar, lines = shown["records = trainer.fit()"][-2:]
    assert re.fullmatch(r"training: (\d+) of \1, \d:\d\d:\d\d", bar.data["text/plain"])
    assert "<progress" not in bar.data["text/html"], "it has ended"
    assert [line[:11] for line in lines.text.splitlines()] == ["epoch   1/2", "epoch   2/2"]


@pytest.mark.slow
def test_records_and_results_are_tables(shown: dict[str, list[Any]]) -> None:
    (records,) = shown["records"]
    assert records.data["text/html"].startswith("<table>")
    assert records.data["text/html"].count("<tr>") == 3, "a header, and two epochs"
    results = shown["results"][-1]
    assert "PGD-20" in results.data["text/html"]
    assert "report: tour/run-" in results.data["text/plain"]


@pytest.mark.slow
def test_figures_are_in_the_notebook(shown: dict[str, list[Any]]) -> None:
    for cell in ('Picture(RUN / "figures" / "curves.png", width=700)', "plt.show()"):
        assert len(shown[cell][-1].data["image/png"]) > 1000


@pytest.mark.slow
def test_what_it_leaves_behind_is_a_run_and_a_file(folder: Path, tour: Any) -> None:
    (run,) = (folder / "tour").glob("run-*")
    assert (run / "report.html").is_file()
    assert (folder / "tour" / "digits.pt2").stat().st_size > 0
    assert len(list((folder / "tour" / "digits").rglob("*.png"))) == 80


@pytest.mark.exhaustive
def test_as_it_stands_it_learns_the_digits(tmp_path: Path) -> None:
    (results,) = (cell for cell in code_cells(executed(tmp_path)) if cell.source.splitlines()[-1] == "results")
    clean = re.search(r"\| clean +\|.*?\| +\d+ \| +([\d.]+)", results.outputs[-1].data["text/plain"])
    assert clean is not None
    assert float(clean[1]) > 80
