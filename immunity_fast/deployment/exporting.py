"""A mixture as a file that runs without this package: ONNX, torch.export or TorchScript."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from immunity_fast.deployment.loading import load_trained
from immunity_fast.models.inference import Gate
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.models.pretrained import LIBRARY
from immunity_fast.runtime.checks import check_choice
from immunity_fast.runtime.failures import one_line
from immunity_fast.runtime.modes import evaluating

Format = Literal["onnx", "torch.export", "torchscript"]
Run = Callable[[Tensor], Tensor]

INPUT, OUTPUT = "images", "log_probabilities"
METADATA = "immunity_fast.json"  # the name under which the formats of PyTorch keep it
EXAMPLE = 2  # images with which a graph is made; it takes any number
# By how much a file's log-probabilities may be off, in units of their magnitude where that is above 1.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
HALF = 0.05  # likewise, of narrower numbers


def export_trained(
    model: str | Path | ImmunityMoE,
    path: str | Path,
    *,
    format: Format = "onnx",
    gate: Gate = "mean",
    dtype: torch.dtype | None = None,
    trust_code: bool = False,
) -> Path:
    """What `immunity_fast.export` does; see there.

    Raises:
        ValueError, TypeError, FileNotFoundError, ModuleNotFoundError: see `immunity_fast.export`.
    """
    check_choice("format", format, Format)
    if gate not in get_args(Gate):
        raise ValueError(
            f"gate: expected 'mean' or 'off', got {gate!r}; a file does the same at each call and draws no permutation"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating-point type, got {dtype!r}")
    if not isinstance(model, (str, os.PathLike, ImmunityMoE)):
        raise TypeError(f"model: expected a run's folder or an ImmunityMoE, got {type(model).__name__}")
    target = Path(path).expanduser()
    if target.is_dir():
        raise ValueError(f"path: expected the name of a file, got the folder {target}")
    _check_installed(format)
    if not isinstance(model, ImmunityMoE):
        model = load_trained(model, trust_code=trust_code)
    plain = model.for_inference(gate).cpu()
    if dtype is not None:
        plain.to(dtype)
    own = next((p.dtype for p in plain.parameters() if p.is_floating_point()), torch.float32)
    about = description(model, gate, own)
    target.parent.mkdir(parents=True, exist_ok=True)
    write = {"onnx": _to_onnx, "torch.export": _to_program, "torchscript": _to_script}[format]
    # Beside its name first: what fails, or does not answer as the model does, takes nobody's place.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        file = Path(folder) / target.name
        try:
            with _quiet(), torch.no_grad():
                run = write(plain, _images(model, EXAMPLE).to(own), about, file)
        except Exception as error:  # of the three exporters, whatever they make of a network
            raise ValueError(f"{target}: expected a network that {format} can hold, got {one_line(error)}") from error
        if run is not None:
            _compare(model, gate, own, run, f"{target}: {format}")
        for made in Path(folder).iterdir():  # ONNX keeps weights of gigabytes in a second file
            os.replace(made, target.parent / made.name)
    return target


def description(model: ImmunityMoE, gate: Gate, dtype: torch.dtype) -> dict[str, str]:
    """What a file says of itself, by names: texts, and of what is no text or sentence its JSON.

    Args:
        model: whose file it is.
        gate: what weighs its experts there.
        dtype: of the images that it takes.
    """
    mean, std = (getattr(model.normalize, name, None) for name in ("mean", "std"))
    kind = str(dtype).removeprefix("torch.")
    values = {
        "classes": model.classes,
        "image_size": model.image_size,
        "mean": None if mean is None else mean.flatten().tolist(),
        "std": None if std is None else std.flatten().tolist(),
        "num_experts": model.num_experts,
        "num_classes": model.num_classes,
        "stage": model.stage,
    }
    return {
        "library": LIBRARY,
        "input": f"{INPUT}: {kind} (B, {model.channels}, H, W) in [0, 1], of any B; normalised inside, by mean and std",
        "output": f"{OUTPUT}: (B, {model.num_classes})",
        "arch": model.arch,
        "gate": gate,
        **{name: json.dumps(value, ensure_ascii=False) for name, value in values.items()},
    }


def _check_installed(format: Format) -> None:
    """Check that what a format needs is installed.

    Raises:
        ModuleNotFoundError: it is not.
    """
    if format != "onnx":
        return
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f"format 'onnx' needs onnx and onnxscript: pip install onnx onnxscript ({error})"
        ) from error


def _program(plain: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(plain, (images,), dynamic_shapes={INPUT: {0: batch}})


def _to_program(plain: nn.Module, images: Tensor, about: dict[str, str], file: Path) -> Run:
    extra = {METADATA: json.dumps(about, ensure_ascii=False)}
    content = io.BytesIO()  # of a path it wants the ending .pt2
    torch.export.save(_program(plain, images), content, extra_files=extra)
    file.write_bytes(content.getvalue())
    found: Run = torch.export.load(content).module()
    return found


def _to_script(plain: nn.Module, images: Tensor, about: dict[str, str], file: Path) -> Run:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        script = torch.jit.trace(plain, images, check_trace=False)  # type: ignore[no-untyped-call]
    if any("Python boolean" in str(each.message) for each in said):  # of values, or of shapes, which matter to nobody
        _check_branches(plain, images)
    torch.jit.save(script, file, _extra_files={METADATA: json.dumps(about)})
    found: Run = torch.jit.load(file)  # type: ignore[no-untyped-call]
    return found


def _check_branches(plain: nn.Module, images: Tensor) -> None:
    """Check that no condition of a network is on values: a trace has one side of it, for all images.

    Raises:
        ValueError: one is, which torch.export, unlike a trace, finds.
    """
    try:
        _program(plain, images)
    except Exception as error:  # of what else it cannot hold a trace may know more
        if re.search(r"data.dependent|control flow", str(error), re.IGNORECASE):
            raise ValueError(
                f"forward: expected no condition on values, of which a trace keeps one side, got one ({error})"
            ) from error


def _to_onnx(plain: nn.Module, images: Tensor, about: dict[str, str], file: Path) -> Run | None:
    """None where there is no ONNX Runtime to run it."""
    program = torch.onnx.export(
        _program(plain, images), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
    )
    assert program is not None
    program.model.metadata_props.update(about)
    program.save(file)
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (outputs,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(outputs)

    return run if images.dtype != torch.bfloat16 else None  # which NumPy does not have


def _images(model: ImmunityMoE, count: int) -> Tensor:
    """Noise of the model's size, the same each time, on the CPU."""
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, model.channels, *model.image_size, generator=generator)


def _compare(model: ImmunityMoE, gate: Gate, dtype: torch.dtype, run: Run, what: str) -> None:
    """Check that a file answers as the model does, for several numbers of images: one, N, and others.

    Raises:
        ValueError: it does not, or does not run.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    tolerance = max(TOLERANCES.get(kind, HALF) for kind in (dtype, like.dtype))
    for count in sorted({1, model.num_experts, EXAMPLE + 1, 7}):
        images = _images(model, count)
        with torch.no_grad(), evaluating(model), model.gate.switched(gate):
            expected = model(images.to(like)).cpu().double()
        try:
            found = run(images.to(dtype)).double()
        except Exception as error:
            raise ValueError(f"{what}: expected a file that runs on {count} images, got {one_line(error)}") from error
        off = float(((found - expected).abs() / expected.abs().clamp(min=1)).max())
        if found.shape != expected.shape or not off <= tolerance:
            raise ValueError(
                f"{what}: expected the model's answers to {count} images to {tolerance:g}, got some {off:.2g} off"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of their own ways: that they are old, or what they make constant."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # older onnxscripts print what they rewrite
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
