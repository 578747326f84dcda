"""The Markdown files of the repository, read as far as the tests need: prose, tables, headings, links, code blocks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.places import REPOSITORY

FOLDERS = ("docs", "benchmarks", "examples", "tests", "kernels", "immunity_fast", ".github")
PAGES = sorted(
    {*REPOSITORY.glob("*.md"), *(page for folder in FOLDERS for page in (REPOSITORY / folder).rglob("*.md"))}
)

FENCE = re.compile(r"^( *)(`{3,}|~{3,})\s*(\{?[\w-]*\}?)")
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n\s*\n).)+?)(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*([^()\s]+(?:\([^()]*\)[^()\s]*)?)(?:\s+\"[^\"]*\")?\s*\)")
COMMENT = re.compile(r"<!--\s*(.*?)\s*-->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced code block: `note` is the comment in the line before it, `line` its first line in the file."""

    page: Path
    line: int
    language: str
    text: str
    note: str

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    """A page as it is called in the repository."""
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path) -> list[Block]:
    """The fenced code blocks, without the indentation of a list they stand in."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    inside: tuple[str, str, int] | None = None
    body: list[str] = []
    for number, line in enumerate(lines):
        match = FENCE.match(line)
        if inside is None:
            if match:
                indentation, fence, language = match.groups()
                inside, body = (fence, language, number), []
                before = COMMENT.search(lines[number - 1]) if number else None
                note = before.group(1) if before else ""
                width = len(indentation)
        elif match and match.group(2).startswith(inside[0]) and not match.group(3):
            found.append(Block(page, inside[2] + 2, inside[1], "\n".join(body) + "\n", note))
            inside = None
        else:
            body.append(line[width:] if not line[:width].strip() else line)
    assert inside is None, f"{name(page)}: a code block without an end"
    return found


def prose(page: Path) -> list[str]:
    """The lines of a page, those of code blocks being empty."""
    lines: list[str] = []
    fence = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        match = FENCE.match(line)
        if match and not fence:
            fence = match.group(2)
        elif match and match.group(2).startswith(fence) and not match.group(3):
            fence = ""
        elif not fence:
            lines.append(line)
            continue
        lines.append("")
    return lines


def cells(row: str) -> int:
    """How many cells a table's row has, as GitHub counts: a pipe ends one, in code, too, unless it is escaped."""
    text = row.strip().replace(r"\|", "")
    return text.removeprefix("|").removesuffix("|").count("|") + 1


def tables(page: Path) -> Iterator[list[tuple[int, str]]]:
    """Each table as its lines with their numbers: header, the line below it, rows up to the end of the paragraph."""
    lines = prose(page)
    number = 0
    while number < len(lines):
        below = lines[number + 1] if number + 1 < len(lines) else ""
        if "|" in lines[number] and re.fullmatch(r"\s*\|?(\s*:?-+:?\s*\|)+\s*(:?-+:?)?\s*", below):
            rows = []
            while number < len(lines) and lines[number].strip():
                rows.append((number + 1, lines[number]))
                number += 1
            yield rows
        number += 1


def anchors(page: Path) -> set[str]:
    """What a link's # may name: a heading's slug, as GitHub and MyST make it, or an explicit target."""
    found: set[str] = set()
    for line in prose(page):
        if heading := re.match(r"#{1,6}\s+(.+?)\s*#*\s*$", line):
            base = slug = _slug(heading.group(1))
            count = 0
            while slug in found:
                count += 1
                slug = f"{base}-{count}"
            found.add(slug)
        elif target := re.fullmatch(r"\(([\w-]+)\)=\s*", line):
            found.add(target.group(1))
    return found


def links(page: Path) -> Iterator[tuple[int, str]]:
    """(line, target) of each link and image, outside of code."""
    # As a whole, since links and code may be wrapped.
    text = CODE_SPAN.sub(lambda span: re.sub(r"[^`\n]", "x", span.group(0)), "\n".join(prose(page)))
    for match in LINK.finditer(text):
        yield text.count("\n", 0, match.start(1)) + 1, match.group(1)


def _slug(heading: str) -> str:
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    kept = "".join(c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN")
    return kept.strip().replace(" ", "-")
