"""Files that several processes may write or read at once, and what one that is killed leaves of them.

A file is written beside its name, flushed to the disk and renamed, so that its name only ever holds all of it. A line
is appended under a lock. A lock ends with its process; where the system has none, each goes on as if it were alone.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


fcntl, msvcrt = _module("fcntl"), _module("msvcrt")  # the second is Windows'
UNFINISHED = ".unfinished"
TAKEN = (errno.EAGAIN, errno.EACCES)  # what the system says of a lock that another process has
FAR = 1 << 30  # Windows' locks keep others from reading what they lock: a byte that no file of ours has


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that `path` only ever holds all of it; OSError, and `path` as it was, where that fails.

    What processes that died on the way have left beside it is removed.
    """
    with named(path):
        unfinished, descriptor = _begin(path)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                if fcntl is not None:  # while the lock is held, since without it `_remove_stale` may come
                    os.replace(unfinished, path)
            if fcntl is None:  # Windows renames no open file
                os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    _remove_stale(path)


def _begin(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, open and locked for as long as it is."""
    while True:
        unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{UNFINISHED}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(unfinished, flags, 0o666)
        _lock(descriptor, wait=True)
        if fcntl is None or os.fstat(descriptor).st_nlink:
            return unfinished, descriptor
        os.close(descriptor)  # another process took it for stale before it was locked


def _remove_stale(path: Path) -> None:
    """Remove what is left of writing `path` by processes that are no more: nobody holds its lock."""
    if fcntl is None:
        return  # there is no telling
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(f".{path.name}.") and entry.name.endswith(UNFINISHED):
                with suppress(OSError), open(entry.path, "rb") as file:
                    if _lock(file.fileno(), wait=False):
                        os.unlink(entry.path)


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file, on the disk when this returns; OSError, and the file as it was, where that fails.

    A last line that was cut off by a kill is removed first.
    """
    with named(path), path.open("a+b", buffering=0) as file:
        _lock(file.fileno(), wait=True)
        append_to(file.fileno(), line)


def append_to(descriptor: int, line: bytes) -> None:
    """`append_line` on an open descriptor, which no other process writes to meanwhile."""
    size = end_of_lines(descriptor)
    os.ftruncate(descriptor, size)
    try:
        rest = memoryview(line + b"\n")
        os.lseek(descriptor, 0, os.SEEK_END)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def end_of_lines(descriptor: int) -> int:
    """The length of a file without a last line that was cut off."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    while end:
        start = max(0, end - (1 << 16))
        os.lseek(descriptor, start, os.SEEK_SET)
        if (found := os.read(descriptor, end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the system name the file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not name its file


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a file, which is made where it is missing, for the length of a `with` block.

    Gives whether it is held, which, without waiting, it is not where another process holds it.
    """
    with _opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as descriptor:
        yield _lock(descriptor, wait=wait)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A file's descriptor, for the length of a `with` block.

    Processes that are forked meanwhile, such as those that read images, let go of it: a lock ends with the last one who
    has its descriptor.
    """
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
    _opened_here.add(descriptor)
    try:
        yield descriptor
    finally:
        if descriptor in _opened_here:
            _opened_here.discard(descriptor)
            os.close(descriptor)


def _let_go() -> None:
    for descriptor in _opened_here:
        os.close(descriptor)
    _opened_here.clear()


_opened_here: set[int] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder for the length of a `with` block; gives whether it is held, or another process has it.

    Where the system locks no folders (Windows, NFS), a file in it is locked, which stays.
    """
    if fcntl is not None:
        with _opened(folder, os.O_RDONLY) as descriptor:
            held = _flock(descriptor)
            if held is not None:
                yield held
                return
    with locked(folder / "run.lock", wait=False) as held:
        yield held


def _flock(descriptor: int) -> bool | None:
    """Lock without waiting; None where the file system has no lock for what this is."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in TAKEN else None
    return True


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock a whole file until its descriptor is closed; whether no other process has it."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        elif msvcrt is not None:
            _lock_on_windows(descriptor, FAR, wait=wait)
    except OSError as error:
        return error.errno not in TAKEN  # a file system without locks: as if alone
    return True


def lock_byte(descriptor: int, place: int, *, wait: bool) -> bool:
    """Lock one byte of a file, which need not be there; whether no other process has it.

    It is the process that holds it: until `unlock_byte`, or until it closes any descriptor of that file.
    """
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        elif msvcrt is not None:
            _lock_on_windows(descriptor, FAR + place % FAR, wait=wait)
    except OSError as error:
        return error.errno not in TAKEN
    return True


def unlock_byte(descriptor: int, place: int) -> None:
    """Give back the lock of one byte that `lock_byte` has taken."""
    with suppress(OSError):
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, place)
        elif msvcrt is not None:
            os.lseek(descriptor, FAR + place % FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)


def _lock_on_windows(descriptor: int, place: int, *, wait: bool) -> None:
    while True:
        os.lseek(descriptor, place, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            return
        except OSError as error:
            if not wait or error.errno not in TAKEN:
                raise
        time.sleep(0.1)


def parse_json(content: bytes | str) -> Any:
    """What a file of JSON says.

    Raises:
        ValueError: it is no JSON, or is nested without end.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a number that a float can hold, or NaN."""
    return type(value) in (int, float) and not abs(value) > sys.float_info.max


def abbreviated(value: Any) -> str:
    """A value as an error's line shows it: of a long one its beginning."""
    text = " ".join(str(value).split()) if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else f"{text[:199]}…"
