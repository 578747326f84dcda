"""Images a second and memory of streamed batches beside torchvision's own loop over the same files, in turns.

    python -m benchmarks.streaming --out benchmarks/results/streaming_cpu.json

The images are made for it: a folder of JPEGs of 224×224 pixels, about 10 KB each, of noise whose octaves fall off as
those of photographs do. Each turn is an epoch in a process of its own, whose memory, with its workers', is looked at
from outside. Nothing is trained: what is measured is how fast batches of uint8 (B, 3, 224, 224) come, shuffled, and how
much of the processors that took, which on a machine with other work to do says more than the clock.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from benchmarks.outcomes import write
from benchmarks.record import header

SIDE, CLASSES = 224, 100
TEXTURE, TEXTURES = 640, 50
OTHERS = 100  # validation and test images
LOOK = 0.5  # seconds between two looks at a process' memory
Way: TypeAlias = tuple[Iterator[torch.Tensor], Callable[[], None]]  # batches, and what ends their workers


def main() -> None:
    """Make the images, measure, and write the record; or be one turn of it."""
    parser = argparse.ArgumentParser(description="Streamed images beside torchvision's loop.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="of the images, made where it is missing; default: a temporary one")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn", choices=list(WAYS), help="one epoch, in this process; what the rounds are made of")
    given = parser.parse_args()
    if given.turn is not None:
        given.out.write_text(json.dumps(turn(given.turn, given.folder, given.batch, given.workers)), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary) / "images"
        if not folder.is_dir():
            make_images(folder, given.images)
        write(given.out, measured(given, folder, Path(temporary)))


def make_images(folder: Path, count: int) -> None:
    """A folder of JPEGs as `immunity_fast` and torchvision read it: parts of some large textures, no two the same."""
    from PIL import Image

    random = np.random.default_rng(0)
    textures = [texture(random) for _ in range(TEXTURES)]
    for part, number in (("train", count), ("val", OTHERS), ("test", OTHERS)):
        for name in range(CLASSES):
            (folder / part / f"{name:03d}").mkdir(parents=True, exist_ok=True)
        for index in range(number):
            top, left = random.integers(0, TEXTURE - SIDE, 2)
            pixels = textures[random.integers(TEXTURES)][top : top + SIDE, left : left + SIDE, random.permutation(3)]
            file = folder / part / f"{index % CLASSES:03d}" / f"{index:06d}.jpg"
            Image.fromarray(np.ascontiguousarray(pixels)).save(file, quality=85)


def texture(random: np.random.Generator) -> Any:
    """Noise of several octaves, each coarser one stronger, as in photographs; uint8 (TEXTURE, TEXTURE, 3)."""
    from PIL import Image

    total = np.zeros((TEXTURE, TEXTURE, 3), np.float32)
    for side in (8, 16, 32, 64, 128, 256, 512):
        octave = Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(octave.resize((TEXTURE, TEXTURE), Image.Resampling.BICUBIC), np.float32) / side**0.5
    low, high = total.min(), total.max()
    return (255 * (total - low) / (high - low)).astype(np.uint8)


def measured(given: argparse.Namespace, folder: Path, temporary: Path) -> dict[str, Any]:
    """The record: rounds of one epoch of each way, in rotating order."""
    files = sorted((folder / "train").rglob("*.jpg"))
    sizes = [file.stat().st_size for file in files]
    options = f"--images {len(files)} --workers {given.workers} --batch {given.batch} --rounds {given.rounds}"
    found = header(f"python -m benchmarks.streaming {options}")
    found["versions"] |= {name: metadata.version(name) for name in ("torchvision", "pillow")}
    found |= {
        "images": len(files),
        "bytes_of_an_image": {"median": statistics.median(sizes), "least": min(sizes), "most": max(sizes)},
        "bytes_decoded": len(files) * 3 * SIDE * SIDE,
        "same_bits": same_bits(files[:: max(1, len(files) // 20)]),
        "load_before": os.getloadavg(),
    }
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    names = list(WAYS)
    for index in range(given.rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            rounds[name].append(in_process(name, folder, given, temporary / "turn.json"))
            print(f"round {index + 1}: {name}: {rounds[name][-1]}", flush=True)
        found |= {"ways": {name: described(each, rounds["torchvision"]) for name, each in rounds.items() if each}}
        found["load_after"] = os.getloadavg()
        write(given.out, found)
    return found


def described(turns: list[dict[str, Any]], beside: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, their spread, and how many times as fast as torchvision's loop in the same round."""
    found: dict[str, Any] = {"rounds": turns}
    for name in turns[0]:
        values = sorted(turn[name] for turn in turns)
        found[name] = {"median": statistics.median(values), "least": values[0], "most": values[-1]}
    ratios = [
        turn["images_per_second"] / other["images_per_second"] for turn, other in zip(turns, beside, strict=False)
    ]
    found["times_as_fast"] = {"median": round(statistics.median(ratios), 3), "rounds": [round(r, 3) for r in ratios]}
    return found


def in_process(name: str, folder: Path, given: argparse.Namespace, out: Path) -> dict[str, Any]:
    """A turn in a process of its own, with the most memory that it and its workers have had at once."""
    words = ["--turn", name, "--folder", folder, "--batch", given.batch, "--workers", given.workers, "--out", out]
    most = {"resident": 0, "proportional": 0}
    with subprocess.Popen([sys.executable, "-m", "benchmarks.streaming", *map(str, words)]) as process:
        while process.poll() is None:
            for kind, size in memory(process.pid).items():
                most[kind] = max(most[kind], size)
            time.sleep(LOOK)
    if process.returncode:
        raise SystemExit(f"{name} has failed")
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found | {f"{kind}_mib": round(size / 2**20) for kind, size in most.items()}


def memory(pid: int) -> dict[str, int]:
    """Bytes that a process and its children have: resident (RSS), what they share in each; and proportional (PSS)."""
    found = {"resident": 0, "proportional": 0}
    for each in [pid, *children(pid)]:
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        except OSError:  # it has ended
            continue
        for line in lines:
            name, _, rest = line.partition(":")
            kind = {"Rss": "resident", "Pss": "proportional"}.get(name)
            if kind is not None:
                found[kind] += 1024 * int(rest.split()[0])
    return found


def children(pid: int) -> Iterator[int]:
    """The processes that a process has started, and those that these have."""
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            started = file.read_text(encoding="utf-8").split()
        except OSError:
            continue
        for each in map(int, started):
            yield each
            yield from children(each)


def turn(name: str, folder: Path, batch: int, workers: int) -> dict[str, Any]:
    """Images a second of an epoch, of all of it and from the first batch on."""
    torch.set_num_threads(1)
    batches, close = WAYS[name](folder, batch, workers)
    begin, used = time.perf_counter(), processor_seconds()
    first, count = begin, 0
    for images in batches:
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, SIDE, SIDE)
        count += len(images)
        if count == len(images):
            first = time.perf_counter()
    end = time.perf_counter()
    close()
    return {
        "images_per_second": round(count / (end - begin), 1),
        "images_per_second_after_the_first_batch": round((count - batch) / max(end - first, 1e-9), 1),
        "seconds_to_the_first_batch": round(first - begin, 3),
        "processor_ms_per_image": round(1000 * (processor_seconds() - used) / count, 4),
    }


def processor_seconds() -> float:
    """What this process has used of the processors, and the workers that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)


def ours(folder: Path, batch: int, workers: int) -> Way:
    """`TrainLoader` on a streamed split."""
    from immunity_fast.data.datasets import load
    from immunity_fast.data.loader import TrainLoader

    dataset = load("folder", folder, image_size=SIDE, stream="on", workers=workers)
    loader = TrainLoader(dataset.train, batch, 0, padding=0, degrees=0, flip=False)
    assert dataset.reader is not None
    return (each.images for each in loader), dataset.reader.close


def torchvision(folder: Path, batch: int, workers: int) -> Way:
    """The loop of torchvision's examples, with images left as bytes, as ours are."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.Resize(SIDE), transforms.CenterCrop(SIDE), transforms.PILToTensor()])
    source = datasets.ImageFolder(folder / "train", transform)
    loader = DataLoader(source, batch, shuffle=True, num_workers=workers, drop_last=True)
    return (images for images, _ in loader), lambda: None  # its workers end with the epoch


WAYS: dict[str, Callable[[Path, int, int], Way]] = {"ours": ours, "torchvision": torchvision}


def same_bits(files: list[Path]) -> bool:
    """Whether both make the same of some files."""
    from PIL import Image
    from torchvision import transforms

    from immunity_fast.data.images import read_image

    transform = transforms.Compose([transforms.Resize(SIDE), transforms.CenterCrop(SIDE), transforms.PILToTensor()])
    return all(
        bool((transform(Image.open(file).convert("RGB")).numpy() == read_image(file, SIDE).transpose(2, 0, 1)).all())
        for file in files
    )


if __name__ == "__main__":
    main()
