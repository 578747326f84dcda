"""`python -m tests.fuzzing FOLDER FIRST LAST`: spoils files of runs and lets the commands read them, case by case.

Case k is drawn by a generator seeded with k. Each runs in a process forked from this one, whose memory and time are
limited. A line of JSON a case: what was spoilt, how the process ended, what it said, and what it left.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from immunity_fast import evaluate, train
from immunity_fast.evaluation import report
from immunity_fast.evaluation.settings import EvaluationSettings
from immunity_fast.reproduction import tables
from immunity_fast.reproduction.jobs import Job, Queue
from immunity_fast.runtime import cli
from immunity_fast.training import display, session
from immunity_fast.training.checkpoint import load_checkpoint
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from tests.small_runs import options, saved, trained, write_data

SECONDS = 30
MEMORY = 4 << 30  # bytes beyond what the process has at its start
FEW = ["--attacks", "pgd", "--attackers", "mean", "--limit", "4", "--masking-images", "2", "--device", "cpu"]
JOB = Job(
    TrainConfig(dataset="npz", experts=2, batch_size=8, epochs=1, check_images=0, attack_images=3),
    EvaluationSettings(attacks=("pgd",), attackers=("mean",), limit=4, masking_images=2),
)
DEEP = "[" * 100_000 + "]" * 100_000
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    9999,
    10**6,
    10**400,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "ü\ud800",
]
JUNK += [[], {}, [1], [[[]]], {"a": {"b": []}}, "\0", "x" * 100_000]
SMALL = [value for value in JUNK if type(value) is not int or value < 1000]  # a million epochs are an order, no damage
DTYPES = (
    torch.int32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.bool,
    torch.int64,
    torch.float32,
)


# Spoiling


def spoil_bytes(content: bytes, chance: random.Random, most: int) -> bytes:
    """Bytes that change, go or come, within the first `most`."""
    spoilt = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 20])):
        place = chance.randrange(max(1, min(most, len(spoilt))))
        length = chance.choice([1, 2, 8, 100])
        kind = chance.randrange(6)
        if kind == 0 and spoilt:
            spoilt[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            spoilt[place : place + length] = chance.randbytes(length)
        elif kind == 2:
            spoilt[place:place] = chance.randbytes(length)
        elif kind == 3:
            del spoilt[place : place + length]
        elif kind == 4:
            spoilt[place:place] = spoilt[place : place + length]
        else:
            del spoilt[place:]
    return bytes(spoilt)


def spoil_value(value: Any, chance: random.Random, junk: Sequence[Any] = JUNK) -> Any:
    """JSON with one value, at any depth, exchanged, gone, or renamed."""
    places = list(_places(value))
    if not places:
        return copy.deepcopy(chance.choice(junk))
    where = chance.choice(places)
    holder, name = value, where[-1]
    for step in where[:-1]:
        holder = holder[step]
    kind = chance.randrange(8)
    if kind == 0:
        del holder[name]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{name} "] = holder.pop(name)
    elif kind == 2:
        holder[name] = [holder[name]]
    elif kind == 3 and isinstance(holder[name], int | float):
        holder[name] = holder[name] + chance.choice([1, -1, 77])
    else:
        holder[name] = copy.deepcopy(chance.choice(junk))
    return value


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in items:
        yield (name,)
        yield from ((name, *rest) for rest in _places(part))


def spoil_json(content: bytes, chance: random.Random, junk: Sequence[Any] = JUNK) -> tuple[str, bytes]:
    """A file of JSON, or of lines of it, and how it was spoilt."""
    kind = chance.choice(["bytes", "value", "value", "value", "value", "line", "deep", "encoding"])
    lines = content.decode().splitlines() if content.count(b"\n{") else [content.decode()]
    place = chance.randrange(len(lines))
    if kind == "bytes":
        return kind, spoil_bytes(content, chance, len(content))
    if kind == "value":
        lines[place] = json.dumps(spoil_value(json.loads(lines[place]), chance, junk))
    elif kind == "line":
        what = chance.randrange(5)
        if what == 0:
            del lines[place]
        elif what == 1:
            lines.insert(place, chance.choice(lines))
        elif what == 2:
            chance.shuffle(lines)
        elif what == 3:
            lines.insert(place, chance.choice(["", "null", "{}", "[]", "3", '"key"', "{", "\0\0"]))
        else:
            lines[place] = json.dumps(chance.choice(junk))
    elif kind == "deep":
        lines[place] = chance.choice([DEEP, lines[place][:-1] + ', "deep": ' + DEEP + "}", '{"a":' * 100_000])
    else:
        coded = chance.choice(["utf-16", "utf-32", "latin-1"])
        return kind, ("\n".join(lines) + "\nü").encode(coded)
    return kind, ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def spoil_checkpoint(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """A checkpoint and how it was spoilt."""
    kind = chance.choice(["bytes", "header", "metadata", "metadata", "names", "dtypes", "shapes", "shapes", "values"])
    if kind in ("bytes", "header"):
        header = 8 + int.from_bytes(content[:8], "little")
        return kind, spoil_bytes(content, chance, header if kind == "header" else len(content))
    scratch = Path(f"spoilt-{os.getpid()}")
    scratch.write_bytes(content)
    tensors, info = load_checkpoint(scratch)
    scratch.unlink()
    described = json.dumps({"format": 2} | info)
    # The optimiser's come first as often as all of the model's together.
    groups = ["model/", "optimizer/", "loader/", "random/", "sums"]
    start = chance.choice(groups)
    name = chance.choice([name for name in tensors if name.startswith(start)] or list(tensors))
    tensor = tensors[name]
    if kind == "metadata":
        described = chance.choice(
            [
                json.dumps(spoil_value({"format": 2} | info, chance)),
                json.dumps({"format": 2} | info | {chance.choice(list(info)): chance.choice(JUNK)}),
                json.dumps({"format": 2} | info | {"model": spoil_value(dict(info["model"]), chance)}),
                json.dumps(chance.choice(JUNK)),
                DEEP,
            ]
        )
    elif kind == "names":
        what = chance.randrange(3)
        if what != 1:
            del tensors[name]
        if what:
            tensors[
                chance.choice([f"{name}x", "optimizer/9999/momentum_buffer", "optimizer/x/y", "optimizer/0", "a"])
            ] = tensor
    elif kind == "dtypes":
        tensors[name] = tensor.to(chance.choice(DTYPES))
    elif kind == "shapes":
        tensors[name] = _reshaped(tensor, chance)
    else:
        tensors[name] = _other_values(tensor, chance)
    return kind, save({n: t.contiguous().clone() for n, t in tensors.items()}, {"immunity_fast": described})


def _reshaped(tensor: Tensor, chance: random.Random) -> Tensor:
    flat = tensor.flatten()
    return chance.choice(
        [
            flat,
            flat[:0],
            flat[: len(flat) // 2],
            torch.cat([flat, flat]),
            tensor[None],
            tensor.transpose(0, -1) if tensor.dim() > 1 else tensor[None],
            torch.zeros((), dtype=tensor.dtype),
            torch.zeros(3, 0, 5, dtype=tensor.dtype),
        ]
    )


def _other_values(tensor: Tensor, chance: random.Random) -> Tensor:
    value = chance.choice([-5, 9999, 0, 1, 255, 2**31 - 1])
    if tensor.is_floating_point():
        return torch.full_like(tensor, chance.choice([float("nan"), float("inf"), 1e30, 0.0]))
    changed = tensor.clone().flatten()
    changed[chance.randrange(len(changed))] = value % 256 if tensor.dtype == torch.uint8 else value
    return changed.view(tensor.shape)


# What reads it


def resume(folder: Path) -> Any:
    """Go on with the half run."""
    with cli.input_errors():
        start = train.parse(["--resume", str(folder / "half")])
    session.fit(start)
    return {name: tensor[2].hex()[:64] for name, tensor in saved(folder / "half")["tensors"].items()}


def judge(folder: Path) -> Any:
    """Evaluate the finished run."""
    evaluate.main([str(folder / "finished"), *FEW])
    found = json.loads((folder / "finished" / "results.json").read_text())
    return [[{k: v for k, v in entry.items() if k != "seconds"} for entry in found["accuracy"]], found["curves"]]


def reproduce(folder: Path) -> Any:
    """Take over a job that is done."""
    queue = Queue(folder / "runs", [JOB], device="cpu", data=str(folder / "data.npz"))
    queue.run()
    if queue.failures:
        raise cli.InputError(queue.failures[JOB])
    results = queue.done[JOB].results
    values = {**tables.TABLE1, **tables.TABLE3, **tables.table2_columns("mean", "mean")}
    return {name: tables.summarised([value(results)]) for name, (value, _) in values.items()}


TARGETS: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("checkpoint", "half/checkpoints/last.safetensors", resume),
    ("checkpoint", "half/checkpoints/last.safetensors", resume),
    ("checkpoint", "finished/checkpoints/last.safetensors", judge),
    ("checkpoint", "finished/checkpoints/best.safetensors", judge),
    ("metrics", "half/metrics.jsonl", resume),
    ("metrics", "finished/metrics.jsonl", judge),
    ("ledger", "finished/evaluation.jsonl", judge),
    ("ledger", "finished/evaluation.jsonl", judge),
    ("config", "half/config.json", resume),
    ("config", "finished/config.json", judge),
    ("done", "runs/DONE", reproduce),
]


def prepare(folder: Path) -> dict[str, Any]:
    """What is spoilt, in `folder`, and what comes of it whole."""
    data = write_data(folder / "data.npz")
    trained([*options(data, epochs=3), "--out", str(folder / "finished")])
    finished = Run(folder / "finished")
    shutil.copy(finished.checkpoint, finished.best_checkpoint)
    advance = TrainingState.advance

    def killed(trainer: TrainingState, batch: Any) -> None:
        if trainer.step == 8:
            raise KeyboardInterrupt
        advance(trainer, batch)

    TrainingState.advance = killed  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):
        trained([*options(data, checkpoint_every=1), "--out", str(folder / "half")])
    TrainingState.advance = advance  # type: ignore[method-assign]
    right = {"judge": judge(folder), "reproduce": reproduce(folder)}
    keep = folder / "half-kept"
    shutil.copytree(folder / "half", keep)
    right["resume"] = resume(folder)
    shutil.rmtree(folder / "half")
    keep.rename(folder / "half")
    return right


def limited(folder: Path, command: Callable[[Path], Any], said: Path) -> int:
    """Run a command in a forked process; its status, negative for a signal."""
    process = os.fork()
    if process:
        end = time.monotonic() + SECONDS
        while (ended := os.waitpid(process, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(process, signal.SIGKILL)
            time.sleep(0.003)
        return os.waitstatus_to_exitcode(ended[1])
    code = 70
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 2)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))

        def run() -> None:
            found = command(folder)
            said.with_suffix(".json").write_text(json.dumps(found))

        try:
            cli.run_command(run)
        except SystemExit as end_:
            code = int(end_.code or 0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
    finally:
        os._exit(code)


def case(number: int, whole: Path) -> dict[str, Any]:
    """Spoil a copy of what `prepare` has made, and read it."""
    chance = random.Random(number)
    target, name, command = chance.choice(TARGETS)
    used = name.split("/")[0]
    folder = whole / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copytree(whole / used, folder / used)
    shutil.copy(whole / "data.npz", folder)
    file = folder / name
    if target == "done":
        (file,) = (folder / "runs" / JOB.name).glob("done-*.json")
    if target == "checkpoint":
        kind, content = spoil_checkpoint(file.read_bytes(), chance)
    else:
        kind, content = spoil_json(file.read_bytes(), chance, SMALL if target == "config" else JUNK)
    same = content == file.read_bytes()
    file.write_bytes(content)
    said = folder / "said"
    status = limited(folder, command, said)
    found = said.with_suffix(".json")
    return {
        "number": number,
        "target": target,
        "kind": kind,
        "run": str(folder / used),
        "same": same,
        "command": command.__name__,
        "status": status,
        "said": said.read_text(errors="replace")[-2000:],
        "found": json.loads(found.read_text()) if status == 0 and found.is_file() else None,
    }


def main(folder: Path, first: int, last: int) -> None:
    """See the top."""
    answers, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115  for good
    cli.console.file = sys.stdout
    display.tensorboard = lambda *_: None
    report._figures = lambda *_: []  # type: ignore[assignment]
    report.write_report = lambda *_, **__: None
    os.fsync = lambda _descriptor: None
    folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(prepare(folder)), file=answers, flush=True)
    for number in range(first, last):
        print(json.dumps(case(number, folder)), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]), int(sys.argv[3]))
