"""`python -m immunity_fast.info`: versions, devices, backends, and what each choice of `auto` would be on this machine.

For bug reports. It needs torch alone, and goes on where something cannot be found out: that is what one wants to read.
"""

from __future__ import annotations

from immunity_fast.runtime import recorded

if __name__ == "__main__":
    recorded.answer("info")  # before what takes seconds to import

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

import immunity_fast
from immunity_fast.experts import NAMES
from immunity_fast.experts.libraries import LIBRARIES, names
from immunity_fast.functional import HAS_TRITON
from immunity_fast.runtime.commands import program
from immunity_fast.runtime.compilation import keep_caches, resolve
from immunity_fast.runtime.parser import Parser
from immunity_fast.runtime.precision import chosen_amp
from immunity_fast.runtime.strategies import fastest

# Of setup.py, with the extra that each belongs to; "" is the core.
PACKAGES = {
    "torch": "",
    "triton": "",
    "jinja2": "train",
    "matplotlib": "train",
    "numpy": "train",
    "pillow": "train",
    "pyyaml": "train",
    "rich": "train",
    "safetensors": "train",
    "scikit-learn": "train",
    "shtab": "train",
    "tensorboard": "train",
    "torchvision": "train",
}


def collect() -> dict[str, Any]:
    """A JSON object of what is here, by section; what could not be found out says why."""
    device = torch.device("cuda" if _attempt(torch.cuda.is_available) is True else "cpu")
    versions = {"immunity_fast": immunity_fast.__version__, "python": platform.python_version()}
    return {
        "versions": versions | {name: _version(name) for name in PACKAGES},
        "system": {
            "platform": _attempt(platform.platform),
            "processor": _attempt(_processor),
            "cores": os.cpu_count(),
            "torch's threads": torch.get_num_threads(),
        },
        "devices": _attempt(_devices),
        "backends": {
            "triton": _attempt(_triton),
            "CUDA of torch": torch.version.cuda or "none",
            "cuDNN": _attempt(lambda: str(torch.backends.cudnn.version() or "none")),  # type: ignore[no-untyped-call]
        },
        "auto": {
            "device": device.type,
            "backend of the losses": "triton" if HAS_TRITON and device.type == "cuda" else "torch",
            "compile": resolve("auto", device),
            "amp": chosen_amp("auto", device),
            "batching, double backprop, memory format": _attempt(lambda: _strategies(device)),
        },
        "architectures": {
            "of ours": ", ".join(NAMES),
            **{library: _attempt(partial(_number, library)) for library in LIBRARIES},
        },
        "caches": _attempt(_caches),
    }


def architectures(text: str = "") -> list[str]:
    """The names that `experts.create` takes, of ours and of the libraries that are installed, with a text in them."""
    found = list(NAMES)
    for library in LIBRARIES:
        with suppress(ModuleNotFoundError):
            found += [f"{library}:{name}" for name in names(library)]
    return [name for name in found if text in name]


def to_text(found: dict[str, Any], indentation: str = "") -> str:
    """The same for people: a line each."""
    lines: list[str] = []
    width = max((len(name) for name, value in found.items() if not isinstance(value, dict)), default=0)
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indentation}{name}:", to_text(value, indentation + "  ")]
        else:
            lines.append(f"{indentation}{name:<{width}}  {value}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what is here, as text or as JSON.

    Args:
        arguments: of the command line; None is this process's.
    """
    parser = Parser(prog=program("info"), description="Versions, devices, backends, and what `auto` means here.")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument(
        "--archs",
        nargs="?",
        const="",
        metavar="TEXT",
        help="instead: the names that --arch of immunity_fast.train takes, all or those with this text, a line each",
    )
    options = parser.parse_args(arguments)
    if options.archs is not None:
        listed = architectures(options.archs)
        print(json.dumps(listed) if options.json else "\n".join(listed))
        return
    found = collect()
    print(json.dumps(found, indent=2) if options.json else to_text(found))


def _attempt(find: Callable[[], Any]) -> Any:
    """What a function finds out, or why it does not: a broken driver is what a report is about."""
    try:
        return find()
    except Exception as error:
        return f"not known: {type(error).__name__}: {' '.join(str(error).split())}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        extra = PACKAGES[package]
        return f"not installed (extra {extra})" if extra else "not installed"


def _number(library: str) -> str:
    try:
        return f"{len(names(library)):,} networks, as {library}:NAME; --archs lists them"
    except ModuleNotFoundError:
        return f"not installed; pip install {library} for --arch {library}:NAME"


def _strategies(device: torch.device) -> dict[str, str]:
    """By architecture, of a training step that is not compiled; where it is, the length of a run counts, too."""
    return {arch: ", ".join(fastest(device.type, arch)) for arch in NAMES}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _devices() -> dict[str, str]:
    found = {"cpu": torch.backends.cpu.get_cpu_capability()}
    for number in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{of.name}, capability {of.major}.{of.minor}, {of.total_memory / 2**30:.0f} GiB"
    return found


def _triton() -> str:
    if not HAS_TRITON:
        return "not here: the losses run on plain PyTorch"
    from immunity_fast.kernels import launch  # not at the top: Triton is not made for every platform

    if launch.INTERPRETED:
        return "in its interpreter (TRITON_INTERPRET)"
    return "compiled" if torch.cuda.is_available() else "here, without a GPU to compile for"


def _caches() -> dict[str, str]:
    """Where the commands would keep compiled code; the home is ~, which reports need not tell."""
    keep_caches()
    home = os.path.expanduser("~")
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    return {name: os.environ[name].replace(home, "~", 1) if home != "/" else os.environ[name] for name in names}


if __name__ == "__main__":
    main()
