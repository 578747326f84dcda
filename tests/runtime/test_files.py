"""Files that several processes write and read: always whole, locked by those that live alone, cleaned up after those
that do not."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from immunity_fast.runtime import files
from immunity_fast.runtime.files import append_line, locked, locked_folder, parse_json, write_atomically

# Of files.py alone: a process that has imported PyTorch takes seconds to begin.
START = f"""
import importlib.util, os, signal, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", {str(files.__file__)!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
path = Path(sys.argv[1])
"""
needs_locks = pytest.mark.skipif(files.fcntl is None, reason="the system has no such locks")


def started(program: str, path: Path) -> subprocess.Popen[str]:
    """A process that has run the program up to its first line of output."""
    command = [sys.executable, "-c", START + program, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str]) -> None:
    """Tell it to go on to its end."""
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


STOPPED_IN_WRITING = """
fsync = os.fsync
def stopped(descriptor):
    print("ready", flush=True)
    sys.stdin.readline()
    fsync(descriptor)
os.fsync = stopped
files.write_atomically(path, b"theirs")
"""


def test_two_processes_write_one_file_at_once(tmp_path: Path) -> None:
    other = started(STOPPED_IN_WRITING, tmp_path / "file")
    write_atomically(tmp_path / "file", b"ours")
    assert (tmp_path / "file").read_bytes() == b"ours"
    assert len(names(tmp_path)) == 2, "what a living process is at stays"
    ended(other)
    assert (tmp_path / "file").read_bytes() == b"theirs"
    assert names(tmp_path) == ["file"]


@needs_locks
def test_what_a_killed_process_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    dead = started(STOPPED_IN_WRITING, tmp_path / "file")
    alive = started(STOPPED_IN_WRITING, tmp_path / "file")
    other = started(STOPPED_IN_WRITING, tmp_path / "other")
    (tmp_path / ".file.unfinished").touch()  # of an earlier version
    dead.send_signal(signal.SIGKILL)
    dead.communicate()
    write_atomically(tmp_path / "file", b"ours")
    kept = [name for name in names(tmp_path) if name != "file"]
    assert [name.split(".")[1] for name in kept] == ["file", "other"]
    assert f".{alive.pid}-" in kept[0]
    ended(alive)
    ended(other)
    assert names(tmp_path) == ["file", "other"]


def test_readers_find_a_whole_file_while_two_processes_write_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    program = """
print("ready", flush=True)
sys.stdin.readline()
os.fsync = lambda descriptor: None
letter = bytes([97 + os.getpid() % 26])
for number in range(400):
    files.write_atomically(path, letter * (1 + 997 * number % 60000))
"""
    write_atomically(path, b"a")
    both = [started(program, path) for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    reads = 0
    while any(process.poll() is None for process in both):
        content = path.read_bytes()
        assert content
        assert content == content[:1] * len(content)
        reads += 1
    assert reads > 100
    assert [process.wait() for process in both] == [0, 0]
    assert names(tmp_path) == ["file"]


def test_lines_of_two_processes_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    program = """
print("ready", flush=True)
sys.stdin.readline()
os.fsync = lambda descriptor: None
for number in range(300):
    files.append_line(path, f"{os.getpid()} {number} {'x' * (number % 7 * 1000)}".encode())
"""
    both = [started(program, path) for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(60) for process in both] == [0, 0]
    lines = [line.split() for line in path.read_text().splitlines()]
    for process in both:
        assert [int(line[1]) for line in lines if int(line[0]) == process.pid] == list(range(300))
    assert len(lines) == 600


@pytest.mark.parametrize("torn", [b"", b"x", b"y" * 200_000])
def test_a_line_that_was_cut_off_does_not_spoil_the_next(torn: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"first\n" + torn)
    append_line(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first\nsecond\n"
    (tmp_path / "file").write_bytes(torn)
    append_line(tmp_path / "file", b"first")
    assert (tmp_path / "file").read_bytes() == b"first\n"


@pytest.mark.parametrize("function", ["fsync", "write"])
def test_a_line_without_room_leaves_the_file_as_it_was(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_line(tmp_path / "file", b"first")
    write, calls = os.write, []

    def full(descriptor: int, content: Any = b"") -> int:
        calls.append(descriptor)
        if function == "write" and len(calls) == 1:
            return write(descriptor, bytes(content)[:3])  # a part of it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="No space") as failed:
        append_line(tmp_path / "file", b"second")
    assert failed.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"first\n"


def test_whatever_ends_the_writing_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert names(tmp_path) == []


def test_a_file_can_be_read_by_those_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


HOLDING = """
with files.{lock} as held:
    assert held
    print("ready", flush=True)
    sys.stdin.readline()
"""


@needs_locks
@pytest.mark.parametrize("folder", [True, False])
def test_a_lock_is_one_process_and_ends_with_it(folder: bool, tmp_path: Path) -> None:
    place = tmp_path if folder else tmp_path / "lock"

    def held() -> bool:
        with locked_folder(place) if folder else locked(place, wait=False) as mine:
            return mine

    program = HOLDING.format(lock="locked_folder(path)" if folder else "locked(path, wait=False)")
    other = started(program, place)
    assert not held()
    ended(other)
    assert held()
    killed = started(program, place)
    assert not held()
    killed.kill()
    killed.wait()
    assert held()
    assert names(tmp_path) == ([] if folder else ["lock"])


@needs_locks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("folder", [True, False])
def test_a_forked_process_does_not_hold_a_lock(folder: bool, tmp_path: Path) -> None:
    """One that reads images, say, which may end a moment after the one that was killed."""
    place = tmp_path if folder else tmp_path / "lock"
    (hearing, telling), (waiting, ending) = os.pipe(), os.pipe()
    with locked_folder(place) if folder else locked(place, wait=False) as mine:
        assert mine
        child = os.fork()
        if not child:
            os.close(ending)
            os.write(telling, b".")
            os.read(waiting, 1)
            os._exit(0)
        os.read(hearing, 1)
    with locked_folder(place) if folder else locked(place, wait=False) as again:
        assert again
    os.close(ending)
    os.waitpid(child, 0)
    for descriptor in (hearing, telling, waiting):
        os.close(descriptor)


@needs_locks
def test_where_folders_have_no_locks_a_file_in_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, folders = files.fcntl.flock, []

    def of_files(descriptor: int, how: int) -> None:
        if os.fstat(descriptor).st_nlink and os.path.isdir(f"/proc/self/fd/{descriptor}"):
            folders.append(descriptor)
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # as NFS does
        flock(descriptor, how)

    monkeypatch.setattr(files, "fcntl", SimpleNamespace(**vars(files.fcntl) | {"flock": of_files}))
    with locked_folder(tmp_path) as first, locked_folder(tmp_path) as second:
        assert (first, second) == (True, False)
    assert len(folders) == 2


def test_where_there_are_no_locks_each_process_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", None)
    with locked_folder(tmp_path) as first, locked_folder(tmp_path) as second:
        assert first
        assert second
    write_atomically(tmp_path / "file", b"1")
    append_line(tmp_path / "file", b"2")
    assert (tmp_path / "file").read_bytes() == b"2\n"


def test_windows_locks_a_byte_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[tuple[int, int], int] = {}

    def locking(descriptor: int, how: str, _bytes: int) -> None:
        place = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        if how == "unlock":
            del taken[place]
        elif taken.setdefault(place, descriptor) != descriptor:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK="lock", LK_UNLCK="unlock"))
    with locked_folder(tmp_path) as first, locked_folder(tmp_path) as second:
        assert (first, second) == (True, False)
    with (tmp_path / "file").open("w+b") as one, (tmp_path / "file").open("r+b") as two:
        assert files.lock_byte(one.fileno(), 5, wait=False)
        assert not files.lock_byte(two.fileno(), 5, wait=False)
        assert files.lock_byte(two.fileno(), 6, wait=False)
        files.unlock_byte(one.fileno(), 5)
        assert files.lock_byte(two.fileno(), 5, wait=True)
    assert all(place > 1 << 20 for _, place in taken)


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe\0", b"\x80", b"", b"{", b"1" * 10_000]
)
def test_what_is_no_json_is_one_kind_of_error(content: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  any words will do
        parse_json(content)
