"""A mixture as a file that runs without this package, in three formats, and what it answers there.

    pip install '.[train,export]' onnxruntime
    python examples/export.py [RUN]

Without a run it takes a model with random weights. What is not installed is left out, and said. The files lie in
`exported/`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import immunity_fast
from immunity_fast import ImmunityMoE

OUT = Path("exported")


def onnx(file: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """What an ONNX file computes, by ONNX Runtime, and what it says of itself."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    run = lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])  # noqa: E731
    return run, session.get_modelmeta().custom_metadata_map


def program(file: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """The same of torch.export's."""
    about = {"immunity_fast.json": ""}
    return torch.export.load(file, extra_files=about).module(), json.loads(about["immunity_fast.json"])


def script(file: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """The same of TorchScript's."""
    about = {"immunity_fast.json": ""}
    return torch.jit.load(file, _extra_files=about), json.loads(about["immunity_fast.json"])


def main() -> None:
    torch.manual_seed(0)
    if len(sys.argv) > 1:
        model = immunity_fast.load(sys.argv[1])
    else:
        model = ImmunityMoE(
            "resnet8", num_experts=2, num_classes=4, image_size=16, classes=["cat", "dog", "fox", "owl"]
        )
        model.eval()
        model.gate.switch = "mean"
    for name, file, opened in (
        ("torch.export", OUT / "model.pt2", program),
        ("torchscript", OUT / "model.pt", script),
        ("onnx", OUT / "model.onnx", onnx),
    ):
        try:
            immunity_fast.export(model, file, format=name)
            run, about = opened(file)
        except ModuleNotFoundError as missing:
            print(f"{name:12}  left out: {missing}")
            continue
        furthest = 0.0
        for count in (1, 2, 7):  # any number of images at once, that of the experts, too
            images = torch.rand(count, model.channels, *model.image_size)
            with torch.no_grad():
                furthest = max(furthest, float((run(images) - model(images)).abs().max()))
        size = file.stat().st_size / 2**20
        said = f"classes {about['classes']}, gate {about['gate']}"
        print(f"{name:12}  {size:.1f} MiB, off by at most {furthest:.1e}; {said}")


if __name__ == "__main__":
    main()
