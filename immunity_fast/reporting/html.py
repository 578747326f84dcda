"""A run's report: one HTML file that needs nothing beside it, and its tables as Markdown."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

import jinja2

from immunity_fast.runtime.failures import readable
from immunity_fast.runtime.files import write_atomically

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
NUMBER = re.compile(r"[-+−±]?\s*[\d.]*\d")
BLANK = frozenset({"", "-", "–", "—", "n/a", "nan", "inf", "not done"})


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Raises:
        ValueError: if a row has another number of cells than there are columns.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"rows[{i}]: expected {len(self.columns)} cells, one a column, got {len(row)}")

    def numeric(self) -> list[bool]:
        """For each column, whether all it holds is numbers (with units or an error, perhaps) and blanks."""
        return [_is_numeric([row[i] for row in self.rows]) for i in range(len(self.columns))]

    def to_markdown(self) -> str:
        """The table in GitHub's Markdown, padded so that it reads as plain text too; no newline at the end."""
        numeric = self.numeric()
        lines = [[_markdown_cell(cell) for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(self.columns))]
        rule = ["-" * (w - 1) + ":" if right else "-" * w for w, right in zip(widths, numeric, strict=True)]
        padded = [
            [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True)]
            for line in lines
        ]
        text = "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))
        return "\n\n".join(part for part in (f"**{self.caption}**" if self.caption else "", text, self.note) if part)

    def to_html(self) -> str:
        """The table as a piece of HTML, all texts escaped, columns of numbers aligned to the right."""
        sides = ["right" if numeric else "left" for numeric in self.numeric()]
        rows = [("th", self.columns), *(("td", row) for row in self.rows)]
        lines = [
            "".join(
                f'<{kind} style="text-align: {side}">{escape(readable(cell))}</{kind}>'
                for cell, side in zip(cells, sides, strict=True)
            )
            for kind, cells in rows
        ]
        caption = f"<caption>{escape(readable(self.caption))}</caption>" if self.caption else ""
        note = f"<p><small>{escape(readable(self.note))}</small></p>" if self.note else ""
        head, *body = (f"<tr>{line}</tr>" for line in lines)
        return f"<table>{caption}<thead>{head}</thead><tbody>{''.join(body)}</tbody></table>{note}"

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        return self.to_html()


def _is_numeric(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell.strip().lower() not in BLANK]
    return bool(filled) and all(NUMBER.match(cell.strip()) for cell in filled)


def _markdown_cell(cell: str) -> str:
    return " ".join(cell.split()).replace("|", r"\|")


def write_report(
    path: Path,
    *,
    title: str,
    lead: str,
    facts: Mapping[str, str],
    tables: Sequence[Table],
    figures: Sequence[tuple[Path, str]],
    commands: Mapping[str, str],
    settings: Mapping[str, object],
) -> None:
    """Writes the report as one HTML file, its pictures inlined; a reader of `path` never sees half of one.

    All texts are plain text and are escaped. Sections with nothing in them are left out.

    Args:
        path: the HTML file; one that exists is replaced.
        title: heading, and the name of the browser's tab.
        lead: what the run was and what came of it, in a sentence or two.
        facts: the most important results, name → value with its unit.
        tables: shown in order; columns of numbers are aligned to the right.
        figures: PNG file and caption (also its alternative text); drawn for two pixels a CSS pixel.
        commands: what a command does → the shell command.
        settings: name → value of every setting of the run, folded away.

    Raises:
        ValueError: if a figure is not a PNG file.
        OSError: if a figure cannot be read or the report not be written.
    """
    html = render(
        "immunity_fast.reporting",
        "report.html.jinja",
        title=title,
        lead=lead,
        facts=facts,
        tables=tables,
        figures=[(*_inline_png(file), caption) for file, caption in figures],
        commands=commands,
        settings=settings,
    )
    write_atomically(path, html.encode())


def render(package: str, template: str, **values: object) -> str:
    """A template of ours, filled in; all texts are escaped, and a value that it lacks is an error.

    Args:
        package: in whose folder the template lies.
        template: its file name.
        values: what it is filled with. The filter `sha256` gives the base64 hash of a text, for a page's policy.

    Returns:
        The file's text, with a newline at its end.
    """
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # A path may be anything but text, and is found out to be only when hours of work are to be written.
        finalize=lambda value: readable(value) if type(value) is str else value,
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    source = resources.files(package).joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(source).render(**values) + "\n"


def _inline_png(path: Path) -> tuple[str, int]:
    """The file in base64, and its width in pixels."""
    data = path.read_bytes()
    if not data.startswith(PNG_SIGNATURE):
        raise ValueError(f"figures: expected PNG files, got {path}, which is none")
    # The signature is followed by the header chunk: 4 bytes length, 4 bytes type, 4 bytes width.
    return base64.b64encode(data).decode("ascii"), int.from_bytes(data[16:20], "big")
