"""Tensors in shards, in a folder to which every process writes its part, and of which any number of processes reads.

As torch.distributed.checkpoint has them, in safetensors files: nothing is ever unpickled.

::

    checkpoints/sharded/step-000000500/   what was trained until then, complete from the moment it has its name
        weights/*.safetensors             each process' shards
        rest.safetensors                  what all processes have the same of, and what is known of the run

Whoever kills the processes leaves the last complete one.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunity_fast.runtime import distributed

SHARDED = Path("checkpoints") / "sharded"  # in a run folder
WEIGHTS, REST = "weights", "rest.safetensors"
PATIENCE = 10.0  # seconds until one machine sees what another has made


def newest(run_folder: Path) -> Path | None:
    """The last complete checkpoint in shards of a run; None where there is none."""
    folder = run_folder / SHARDED
    if not folder.is_dir():
        return None
    whole = [path for path in folder.iterdir() if _is_complete(path)]
    return max(whole, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def save_shards(
    run_folder: Path, step: int, tensors: Mapping[str, Tensor], write_rest: Callable[[Path], object]
) -> None:
    """Save a checkpoint in shards; all processes call it, and it is complete when it returns. Older ones are removed.

    Args:
        run_folder: on a file system that all of them share.
        step: how many steps were taken: its name. What is there of the same step already is left as it is.
        tensors: by name; of those in shards each process writes its part, of others one does.
        write_rest: called in the first process, with the file that is to hold the rest.

    Raises:
        ValueError, OSError: it cannot be written, or the processes do not see each other's files; in all of them.
    """
    folder = run_folder / SHARDED / f"step-{step:09d}"
    first = distributed.rank() == 0
    if distributed.of_first(_is_complete(folder)):
        return
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    with distributed.together():
        if first:
            _remove(unfinished)
            (unfinished / WEIGHTS).mkdir(parents=True)
    with distributed.together():
        _wait_for(unfinished / WEIGHTS)
    with _one_line(folder, "cannot be written"):
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        writer = HuggingFaceStorageWriter(str(unfinished / WEIGHTS), save_distributed=True)
        save({name: value.detach() for name, value in tensors.items()}, storage_writer=writer, no_dist=_alone())
    with distributed.together():
        for path in (unfinished / WEIGHTS).iterdir():
            _flush(path)
        _flush(unfinished / WEIGHTS)
    with distributed.together():
        if first:
            write_rest(unfinished / REST)
            os.rename(unfinished, folder)
            _flush(folder.parent)
            for other in folder.parent.iterdir():
                if other != folder and not other.name.startswith("."):
                    _remove(other)


def outline(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors in shards, joined, by name: their shapes and dtypes, without numbers.

    Raises:
        ValueError: they cannot be read, or a part of one is missing.
    """
    with _one_line(folder, "not a whole checkpoint"):
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        found: dict[str, Any] = HuggingFaceStorageReader(str(folder / WEIGHTS)).read_metadata().state_dict_metadata
    joined = {}
    for name, entry in found.items():
        if sum(torch.Size(chunk.sizes).numel() for chunk in entry.chunks) != entry.size.numel():
            raise ValueError(f"{folder}: not a whole checkpoint: {name} lacks a part")
        joined[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    return joined


def load_shards(folder: Path, tensors: Mapping[str, Tensor], *, alone: bool = False) -> None:
    """Fill tensors of a checkpoint, by whatever number of processes it was written; all of them call it.

    Args:
        folder: the checkpoint.
        tensors: some of those that `outline` names, of the same shapes; those in shards get this process' part.
        alone: this process reads for itself, even where there are others.

    Raises:
        ValueError: what is there cannot be read; in all processes.
    """
    with _one_line(folder, "not a whole checkpoint"):
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        reader = HuggingFaceStorageReader(str(folder / WEIGHTS))
        load(dict(tensors), storage_reader=reader, no_dist=alone or _alone())


def _alone() -> bool:
    return distributed.group() is None


def _is_complete(folder: Path) -> bool:
    return re.fullmatch(r"step-\d+", folder.name) is not None and (folder / REST).is_file()


@contextmanager
def _one_line(place: Path, what: str) -> Iterator[None]:
    """What PyTorch says of a checkpoint, of all processes and with their stacks, is one line; its own remarks none."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BaseException as error:  # which PyTorch's own is
        failures = getattr(error, "failures", None)  # of each process
        if failures is None and not isinstance(error, Exception):
            raise
        first = next(iter(failures.values()))[0] if failures else error
        raise ValueError(f"{place}: {what} ({' '.join(str(first).split())[:300]})") from error
    finally:
        logger.setLevel(level)


def _wait_for(folder: Path) -> None:
    """Until this machine sees a folder that the first one has made.

    Raises:
        ValueError: it does not.
    """
    until = time.monotonic() + PATIENCE
    while not folder.is_dir():
        if time.monotonic() > until:
            raise ValueError(
                f"{folder.parent.parent}: not seen from {socket.gethostname()}; with --shard each process writes into "
                "the run's folder, which has to be on a file system that all machines share"
            )
        time.sleep(0.1)


def _flush(path: Path) -> None:
    """Until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove a folder, if it is there; by another name first, so that it is never half of a checkpoint."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name.removeprefix('.')}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)
