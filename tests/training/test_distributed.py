"""Two processes on a CPU, by gloo: loss and gradients are those of one process on the joined batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from immunity_fast import FusedImmunityLoss
from immunity_fast.training.checkpoint import load_checkpoint
from immunity_fast.training.run_folder import Run
from immunity_fast.training.step import MEASURED
from tests import grids
from tests.processes import failing_after, launch
from tests.small_runs import options, saved, trained, write_data
from tests.wrapped import small_mixture

# Double backprop, compiling, the kernels' backend; weighted: labels of which more are missing in one process.
CASES = grids.sampled(
    [
        "reverse-off-torch",
        "forward-off-torch",
        "reverse-off-triton",
        "forward-off-triton",
        "reverse-on-torch",
        "reverse-off-torch-weighted",
        "forward-off-triton-weighted",
        "soft-off-torch-weighted",
        "recomputed-off-torch",
    ],
    ordinary=lambda case: case not in ("reverse-off-triton", "forward-off-triton", "reverse-off-torch-weighted"),
)
SIDE, SIZE = 10, (6, 7)  # of images, of heatmaps
LABELS = [0, 1, 2, 0, 1, 2]
MISSING = [0, -100, 2, -100, -100, 1]
# Each process takes its half of the batch, and the first writes what came out. BatchNorm is in evaluation mode: in
# training mode it would normalise with the statistics of half a batch. Compiled as a GPU has it, with `vmap`.
WORKER = """
import sys
import torch
from torch.optim import SGD
from immunity_fast import FusedImmunityLoss; from immunity_fast.runtime import distributed
from immunity_fast.training.step import TrainStep
from tests.wrapped import small_mixture as mixture

SIDE, SIZE = 10, (6, 7)
real_compile = torch.compile
torch.compile = lambda function, **_: real_compile(function, fullgraph=True, dynamic=False, backend="eager")
def take(double_backprop, compile, backend, targets=""):
    torch.manual_seed(0)
    model = mixture("vmap" if compile == "on" else "auto")
    model = (model if backend == "triton" else model.double()).eval()
    model.gate.switch = "off"
    group = distributed.group()
    options = {"class_weights": [1.0, 3.0, 0.5], "label_smoothing": 0.1} if targets else {}
    loss_fn = FusedImmunityLoss(0.5, 0.7, 1e-2, size=SIZE, backend=backend, group_name=group.group_name, **options)
    way = double_backprop if double_backprop == "forward" else "reverse"
    options = {"double_backprop": way, "compile": compile, "checkpoint_activations": double_backprop == "recomputed"}
    step = TrainStep(model, loss_fn, SGD(model.parameters(), 0.0), group=group, **options)
    images = torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor(MISSING if targets else LABELS)
    if double_backprop == "soft":
        labels = torch.where(labels[:, None] < 0, -100.0, torch.arange(18.0).view(6, 3).sin().softmax(-1))
    mine = slice(3 * distributed.rank(), 3 * distributed.rank() + 3)
    images = images.to(next(model.parameters()).dtype)
    measured = distributed.mean(step(images[mine], labels[mine]))
    assert step.compiled == (compile == "on")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if (double_backprop, compile, backend) == ("reverse", "off", "torch"):
        accumulated(step, images[mine], labels[mine])
    return measured, gradients

def accumulated(step, images, labels):
    def taken(*batches):
        for index, (some, theirs) in enumerate(batches):
            step(some, theirs, index=index, count=len(batches))
        return [parameter.grad.clone() for parameter in step.model.parameters() if parameter.grad is not None]

    batches = (images, labels), (images[:2].flip(0), labels[:2]), (images.flip(-1), labels)
    each = [taken(batch) for batch in batches]
    found["accumulated"] = taken(*batches), [sum(gradients) / 3 for gradients in zip(*each)]

found = {}
def main():
    with distributed.processes(torch.device("cpu")):
        found.update({case: take(*case.split("-")) for case in sys.argv[2:]})
        if distributed.rank() == 0:
            torch.save(found, sys.argv[1])

main()  # what holds the process group ends here: at the interpreter's end its threads could not give tensors back
"""


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each case that is asked for what was measured, and the gradients."""
    out = tmp_path_factory.mktemp("distributed") / "out.pt"
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    cases = {item.callspec.params["case"] for item in items if "case" in getattr(item, "fixturenames", ())}
    cases.add("reverse-off-torch")  # which accumulates, too
    launch("-c", f"{LABELS=}; {MISSING=}\n{WORKER}", str(out), *sorted(cases))
    return dict(torch.load(out))


def _alone(dtype: torch.dtype, case: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = small_mixture().to(dtype).eval()
    model.gate.switch = "off"
    images = torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    weighted = "weighted" in case
    labels = torch.tensor(MISSING if weighted else LABELS)
    options: dict[str, Any] = {"class_weights": [1.0, 3.0, 0.5], "label_smoothing": 0.1} if weighted else {}
    if "soft" in case:
        labels = torch.where(labels[:, None] < 0, -100.0, torch.arange(18.0).view(6, 3).sin().softmax(-1))
    logits, activations, gate = model.expert_outputs(images)
    loss_fn = FusedImmunityLoss(0.5, 0.7, 1e-2, size=SIZE, **options)
    loss, terms = loss_fn(logits, activations, labels, gate, return_terms=True)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return [loss.item(), *(term.item() for term in terms)], gradients


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_the_joined_batch(found: dict[str, Any], case: str) -> None:
    measured, gradients = found[case]
    dtype, tolerance = (torch.float32, 1e-4) if "triton" in case else (torch.float64, 1e-9)
    expected, wanted = _alone(dtype, case)
    assert dict(zip(MEASURED, measured.tolist(), strict=True)) == pytest.approx(
        dict(zip(MEASURED, expected, strict=True)), rel=tolerance
    )
    assert gradients.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=tolerance, atol=tolerance * largest, msg=name)


@pytest.mark.slow
def test_accumulated_batches_are_averaged_over_processes_too(found: dict[str, Any]) -> None:
    together, mean = found["accumulated"]
    for mine, expected in zip(together, mean, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def test_a_run_of_two_processes_goes_on_in_one_and_in_two_again(tmp_path: Path) -> None:
    """Records once an epoch, by the first process; the same images as in one process; ready for any number."""
    data = write_data(tmp_path / "data.npz")
    settings: dict[str, Any] = {"epochs": 3, "check_images": 4}
    folder = tmp_path / "several"
    stop = "import sys; from tests.processes import stopped; stopped(sys.argv[1:])"
    launch("-c", stop, *options(data, **settings), "--out", str(folder))
    assert load_checkpoint(Run(folder).checkpoint)[1]["step"] == 5
    with failing_after(2):
        trained(["--resume", str(folder)])
    run = Run(folder)
    assert load_checkpoint(run.checkpoint)[1]["step"] == 10
    end = "import sys; from tests.processes import shortly_ended; shortly_ended(sys.argv[1:])"
    printed = launch("-c", end, "--resume", str(folder))
    assert "UnsynchronisedWarning" not in printed
    assert "cpu × 2" in printed
    assert printed.count("Test accuracy") == 1
    assert [record["epoch"] for record in run.metrics()] == [1, 2, 3]
    assert all(record["step"] == 5 * record["epoch"] for record in run.metrics())
    assert json.loads(run.results_file.read_text())["accuracy"]
    alone = trained([*options(data, **settings), "--out", str(tmp_path / "alone")])[1]
    # The batches are the same, BatchNorm's statistics are not: the losses are close in the first epoch, no more.
    assert run.metrics()[0]["cross_entropy"] == pytest.approx(alone.metrics()[0]["cross_entropy"], rel=0.3)
    assert saved(folder)["tensors"]["loader/generator"] == saved(alone.folder)["tensors"]["loader/generator"]


OWN_LOADERS = """
import warnings, torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from immunity_fast.runtime import distributed
from immunity_fast.training import Trainer
generator = torch.Generator().manual_seed(0)
items = TensorDataset(torch.rand(12, 3, 16, 16, generator=generator), torch.arange(12) % 3)
with distributed.processes(torch.device("cpu")):
    for sampler in (None, DistributedSampler(items, seed=1)):
        loader = DataLoader(items, batch_size=2, shuffle=sampler is None, sampler=sampler)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Trainer(train=loader, experts=2, device="cpu", compile="off").prepare()
        for line in (str(warning.message) for warning in caught if "SameBatches" in warning.category.__name__):
            print(sampler is None, distributed.rank(), line)
"""


def test_loaders_of_the_same_batches_are_said_once() -> None:
    printed = launch("-c", OWN_LOADERS).splitlines()
    assert printed == [
        "True 0 train: expected other batches in each of 2 processes, got the same first one in several; give the "
        "loader sampler=torch.utils.data.DistributedSampler(data set)"
    ]
