"""Imports point one way, down: what stands on what, by folder; and no files import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from tests.places import REPOSITORY

PACKAGE = REPOSITORY / "immunity_fast"
COMMANDS = ("train", "evaluate", "explain", "export_model", "ensemble", "reproduce", "poison", "info")

# From the ground up: a room imports what is on the floors below its own, and itself.
FLOORS = (
    ("kernels", "runtime"),
    ("permutations", "channelwise", "arguments"),
    ("targets", "second_derivatives"),
    ("functional", "forward_mode", "data", "reporting"),
    ("experts", "losses", "selection"),
    ("attacks", "models"),
    ("peers",),
    ("evaluation",),
    ("training",),
    ("reproduction", "deployment"),
    ("poisoning",),
    ("__init__",),
    COMMANDS,
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# What a room must not know of, whatever the floors would allow.
APART = {
    "attacks": {"data", "experts", "losses", "models"},
    "data": {"attacks", "experts", "losses", "models"},
    "evaluation": {"training"},
    "experts": {"data", "reporting"},
    "losses": {"attacks", "data", "models", "reporting"},
    "models": {"data", "reporting"},  # not without the losses: `model(images, labels)` is the loss, for wrappers
    "peers": {"data", "reporting"},
    "reporting": {"data", "functional", "kernels"},
}

FILES = sorted(file for file in PACKAGE.rglob("*.py") if "kernels" not in file.relative_to(PACKAGE).parts)
KERNELS = sorted((REPOSITORY / "kernels").glob("*.py"))


def _room(module: str) -> str:
    """The folder, or the file beside the folders, of a module `immunity_fast.…`."""
    return module.split(".")[1] if "." in module else "__init__"


def _imported(file: Path) -> Iterator[str]:
    """Rooms that a file imports from, at its top, in its functions and for type checkers alone."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (_room(alias.name) for alias in node.names if alias.name.split(".")[0] == "immunity_fast")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            if node.module == "immunity_fast":
                yield from (alias.name if alias.name in FLOOR else "__init__" for alias in node.names)
            elif node.module is not None and node.module.startswith("immunity_fast."):
                yield _room(node.module)


def _module(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _files_imported(file: Path, modules: Collection[str]) -> set[str]:
    """The modules whose files a file imports: a name of a folder is a file there, or one of the folder's own."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in modules else node.module for name in names)
    return found & set(modules)


def test_every_folder_has_its_floor() -> None:
    rooms = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES}
    assert rooms | {"kernels"} == set(FLOOR)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for imported in set(_imported(file)) - {room}:
        assert FLOOR[imported] < FLOOR[room], f"{room} imports from {imported}, which stands on it or beside it"
        assert imported not in APART.get(room, set()), f"{room} is not to know of {imported}"


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {_module(file): file for file in FILES}
    imports = {module: _files_imported(file, modules) - {module} for module, file in modules.items()}
    while ground := {module for module, below in imports.items() if not below}:
        imports = {module: below - ground for module, below in imports.items() if module not in ground}
    assert imports == {}


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: file.name)
def test_kernels_import_nothing_of_the_package(file: Path) -> None:
    assert set(_imported(file)) <= {"kernels"}
