"""Experts whose weights are in shards, one in each of two processes: the results are those of one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import immunity_fast
from immunity_fast import ImmunityMoE, train
from immunity_fast.training import sharding
from immunity_fast.training.checkpoint import load_checkpoint, load_model
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.run_folder import Run
from immunity_fast.training.shards import load_shards, newest, outline, save_shards
from tests.nodes import smooth_options
from tests.processes import launch
from tests.sharded import KINDS, SETTINGS, trained_weights
from tests.small_runs import STEPS, error_line, trained


class Sharded(NamedTuple):
    """What two processes found, where their runs are, and what they printed."""

    found: list[dict[str, Any]]
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Sharded:
    out = tmp_path_factory.mktemp("sharded")
    printed = launch("-m", "tests.sharded", str(out), str(data))
    return Sharded([torch.load(out / f"{rank}.pt") for rank in range(2)], out, printed)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder of a run in shards that are whole, in one process, without interruption."""
    folder = tmp_path_factory.mktemp("one") / "run"
    trained([*smooth_options(data, **SETTINGS), "--shard", "--out", str(folder)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_steps_in_shards_are_those_of_one_process(kind: str, sharded: Sharded) -> None:
    """To float64's rounding: through Grad-CAM, AdamW, clipping and averaging, experts equal, different, and alone."""
    expected = trained_weights(kind if kind != "by hand" else "stack")
    for rank, found in enumerate(each["by hand"][kind] for each in sharded.found):
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["norm"], expected["norm"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found["average"], expected["average"], rtol=1e-9, atol=1e-10)
        assert found["gathered"] == (list(expected["weights"]) if rank == 0 else [])


@pytest.mark.parametrize("kind", KINDS)
def test_each_process_keeps_its_part_and_frees_the_rest(kind: str, sharded: Sharded) -> None:
    parts = [each["by hand"][kind] for each in sharded.found]
    assert sum(part["part"] for part in parts) == pytest.approx(1)
    assert all(part["part"] < 0.6 and part["freed"] for part in parts)


def test_a_run_goes_on_in_any_number_of_processes(sharded: Sharded, one_process: Path) -> None:
    """Stopped by a signal in two, killed in one, ended in two: as one process from start to end."""
    first = sharded.found[0]["two one two"]
    assert [each["two one two"]["status"] for each in sharded.found] == [143, 143]
    for place, step, files in (("of two", 4, 2), ("of one", 8, 1)):
        assert sum("/weights/" in path for path in first[place]) == files
        assert {path.split("/")[1] for path in first[place] if "/" in path} == {f"step-{step:09d}"}
    found, expected = (Run(folder) for folder in (sharded.folder / "resharded", one_process))
    (tensors, info), (wanted, _) = (load_checkpoint(run.checkpoint) for run in (found, expected))
    assert info["step"] == STEPS
    torch.testing.assert_close(tensors, wanted, rtol=1e-3, atol=1e-4)
    for record, other in zip(found.metrics(), expected.metrics(), strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_what_is_joined_is_an_ordinary_run(one_process: Path, data: Path, tmp_path: Path) -> None:
    """As a run that was never in shards, with averaged weights, and as the shards themselves are read."""
    plain = trained([*smooth_options(data, **SETTINGS), "--out", str(tmp_path / "plain")])[1]
    expected = load_model(plain.folder, trust_code=True)[0].state_dict()
    joined = immunity_fast.load(one_process, trust_code=True)
    torch.testing.assert_close(joined.state_dict(), expected, rtol=1e-4, atol=1e-5)
    assert joined.classes == immunity_fast.load(plain.folder, trust_code=True).classes
    shards = newest(one_process)
    assert shards is not None
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            load_model(shards, trust_code=True)[0].state_dict().values(), joined.state_dict().values(), strict=True
        )
    )
    Run(one_process).checkpoint.unlink()
    again = immunity_fast.load(one_process, checkpoint="last", trust_code=True)
    assert sharding.join(one_process).startswith("the weights are joined in")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), joined.parameters(), strict=True))
    assert Run(one_process).epochs_trained() == 2


def test_attacks_half_precision_and_several_batches_a_step(sharded: Sharded) -> None:
    """And BatchNorm, whose statistics are the processes' mean; the best epoch is an ordinary checkpoint."""
    run = Run(sharded.folder / "everything")
    best, info = load_checkpoint(run.best_checkpoint)
    assert info["monitored"] == {"val_pgd10_accuracy_mean": run.metrics()[0]["val_pgd10_accuracy_mean"]}
    model = immunity_fast.load(run.folder, trust_code=True)
    assert isinstance(model, ImmunityMoE)
    assert torch.equal(best["model/experts.norm.running_mean"], model.state_dict()["experts.norm.running_mean"])
    last = load_model(run.checkpoint, trust_code=True)[0].state_dict()
    assert all(torch.equal(value, best[f"model/{name}"]) for name, value in last.items())
    assert "UnsynchronisedWarning" not in sharded.printed


def test_lines_say_how_the_weights_lie(sharded: Sharded) -> None:
    assert sharded.printed.count("weights lie in shards over 2 processes: ") == 3
    assert "the weights are joined in resharded/checkpoints/last.safetensors (27.9 KiB)" in sharded.printed


@pytest.mark.parametrize("change", ["cut", "lost", "rest cut", "rest lost"])
def test_a_spoilt_checkpoint_in_shards_is_one_line(
    change: str, one_process: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(one_process, tmp_path / "run")
    folder = newest(tmp_path / "run")
    assert folder is not None
    (file,) = (folder / "weights").iterdir()
    if change.startswith("rest"):
        file = folder / "rest.safetensors"
    if change.endswith("cut"):
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
        Run(tmp_path / "run").checkpoint.unlink(missing_ok=True)
    line = error_line(capsys, train.main, ["--resume", str(tmp_path / "run"), "--trust-code"])
    assert "checkpoints" in line


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path) -> None:
    save_shards(tmp_path, 3, {"a": torch.arange(6.0).view(2, 3)}, lambda file: file.write_bytes(b"rest"))
    folder = newest(tmp_path)
    assert folder is not None
    assert outline(folder)["a"].shape == (2, 3)
    with pytest.raises(ValueError, match="step-000000003: not a whole checkpoint") as error:
        load_shards(folder, {"a": torch.zeros(2, 4)})
    assert "\n" not in str(error.value)


def test_older_checkpoints_go_when_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (3, 12):
        save_shards(tmp_path, step, {"a": torch.tensor([float(step)])}, lambda file: file.write_bytes(b"rest"))
    folder = tmp_path / "checkpoints" / "sharded"
    assert [path.name for path in folder.iterdir()] == ["step-000000012"]

    def full(file: Path) -> None:
        raise OSError(28, "No space left on device", str(file))

    with pytest.raises(OSError, match="No space left"):
        save_shards(tmp_path, 20, {"a": torch.tensor([20.0])}, full)
    last = newest(tmp_path)
    assert last is not None
    value = {"a": torch.zeros(1)}
    load_shards(last, value)
    assert value["a"].item() == 12
    save_shards(tmp_path, 20, {"a": torch.tensor([20.0])}, lambda file: file.write_bytes(b"rest"))
    assert [path.name for path in folder.iterdir()] == ["step-000000020"]


@pytest.mark.parametrize(
    ("name", "value"), [("adversarial", "trades"), ("amp", "fp16"), ("compile", "on"), ("batching", "vmap")]
)
def test_what_shards_cannot_do_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"--{name}: expected .* with --shard, got {value}"):
        TrainConfig(shard=True, **{name: value})


def test_only_several_processes_shard_a_mixture() -> None:
    with pytest.raises(ValueError, match="model: expected a process group"):
        sharding.shard(ImmunityMoE("resnet8", 2, 3))
    with pytest.raises(TypeError, match="model: expected an ImmunityMoE, got Linear"):
        sharding.shard(torch.nn.Linear(1, 1))  # type: ignore[type-var]


def test_listed_experts_compute_what_the_stack_does() -> None:
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8", 2, 3, image_size=12).double()
    model.experts.eval()
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    logits, maps, gate = model.expert_outputs(images)
    names = list(model.state_dict())
    model.list_experts_()
    model.list_experts_()
    again, listed, same = model.expert_outputs(images)
    torch.testing.assert_close((again, torch.stack(list(listed)), same), (logits, maps, gate))
    assert not any(module.training for module in model.experts.modules())
    assert model.training
    assert sorted(sharding.as_ordinary(model.state_dict(), "resnet8", None, 2)) == sorted(names)
