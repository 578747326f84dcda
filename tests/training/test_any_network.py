"""Networks of libraries and of the user's own, and mixtures of different ones, through the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from immunity_fast import ensemble, evaluate, train
from immunity_fast.experts import create
from immunity_fast.models.expert_list import ExpertList
from immunity_fast.training.checkpoint import load_checkpoint, load_model, save_checkpoint
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.preparation import check_trainable, default_name, prepare
from immunity_fast.training.run_evaluation import evaluate_trained
from immunity_fast.training.run_folder import Run
from immunity_fast.training.session import stage_line, stem_lines
from immunity_fast.training.state import TrainingState
from tests.small_runs import CPU, arrays, change_config, error_line, interrupted, options, saved, trained, write_data

PLAIN = "tests.own_networks:Plain"
WIDE = "tests.own_networks:wide"
ATTACKS = ["--attacks", "fgsm", "--limit", "4", "--masking-images", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data.npz")


def _options(data: Path, **changes: Any) -> list[str]:
    """As of `small_runs`, but as many experts as architectures unless they are given."""
    given = options(data, **changes)
    if "experts" not in changes:
        place = given.index("--experts")
        del given[place : place + 2]
    return given


@pytest.mark.parametrize(
    ("arch", "stage"),
    [
        (f"resnet8,{PLAIN}", ("layer1", "norm")),
        (PLAIN, "norm"),
        pytest.param("timm:test_resnet,resnet8", "layer1", marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_of_any_networks_is_evaluated(arch: str, stage: object, data: Path, tmp_path: Path) -> None:
    if "timm:" in arch:
        pytest.importorskip("timm", reason="whose networks these are")
    arguments = _options(data, arch=arch, epochs=1, limit_train=16, **({} if "," in arch else {"experts": 2}))
    if stage == "layer1":
        arguments += ["--stage", "layer1"]
    trainer, run = trained([*arguments, "--out", str(tmp_path / "run")])
    if stage == "norm":  # what a run ends with; once, for it draws figures
        evaluate_trained(trainer, run)
        assert run.report.is_file()
    trust = ["--trust-code"] if "tests." in arch else []
    if stage != "norm":
        evaluate.main([str(run.folder), *trust, *ATTACKS, "--attackers", "mean", "--out", str(tmp_path / "again")])
        assert (tmp_path / "again" / "report.html").is_file()
    assert all(
        command.endswith(" --trust-code") == bool(trust) for command in (run.resume_command, run.evaluate_command)
    )
    model, info = load_model(run.folder, trust_code=bool(trust))
    assert model.num_experts == 2
    assert info["model"]["arch"] == arch
    assert model.stage == stage
    assert isinstance(model.experts, ExpertList) == ("," in arch)


@pytest.mark.parametrize(
    ("arch", "size", "stage"), [("torchvision:mobilenet_v3_small", 24, "features.0"), ("timm:test_vit", 48, "blocks.2")]
)
def test_networks_of_libraries_take_a_step(arch: str, size: int, stage: str, tmp_path: Path) -> None:
    """A network whose activations, and one whose attention, PyTorch differentiates once alone."""
    pytest.importorskip("timm" if arch.startswith("timm") else "torchvision.models", reason="whose networks these are")
    data = write_data(tmp_path / "larger.npz", **arrays(size=size, train=8))
    arguments = _options(data, arch=arch, stage=stage, experts=2, epochs=1)
    trainer, _ = trained([*arguments, "--out", str(tmp_path / "run")])
    assert trainer.step == 1
    assert stage in stage_line(trainer)


@pytest.mark.parametrize("weights", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_a_killed_mixture_goes_on_to_the_same_bits(weights: bool, data: Path, tmp_path: Path) -> None:
    arguments = _options(data, arch=f"resnet8,{PLAIN}", experts=3, checkpoint_every=1, stage="layer2,second", ema=0.5)
    if weights:
        for name, arch in (("one", "resnet8"), ("other", PLAIN)):
            torch.save(create(arch, 9).state_dict(), tmp_path / f"{name}.pt")
        arguments += ["--weights", f"{tmp_path / 'one.pt'},{tmp_path / 'other.pt'}"]
    trained([*arguments, "--out", str(tmp_path / "whole")])
    interrupted((TrainingState, "advance"), 8, [*arguments, "--out", str(tmp_path / "killed")])
    if weights:
        (tmp_path / "one.pt").unlink()
        (tmp_path / "other.pt").unlink()
    trained(["--resume", str(tmp_path / "killed"), "--trust-code"])
    assert saved(tmp_path / "killed") == saved(tmp_path / "whole")
    info = saved(tmp_path / "whole")["info"]
    assert ("weights" in info) == weights
    if weights:
        assert [len(digest) for digest in info["weights"]["sha256"]] == [64, 64]
        assert info["weights"]["perturbed"] == [2]


@pytest.mark.parametrize("place", ["config", "checkpoint"])
def test_a_stranger_s_run_imports_nothing(
    place: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trap_of_a_run.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "run"
    trained([*_options(data, arch=PLAIN, experts=1, epochs=1), "--out", str(folder)])
    trap = "trap_of_a_run:net"
    if place == "config":
        change_config(folder, arch=trap)
    else:
        tensors, info = load_checkpoint(Run(folder).checkpoint)
        info["model"]["arch"] = trap
        save_checkpoint(Run(folder).checkpoint, tensors, info)
    for main, arguments in (
        (train.main, ["--resume", str(folder)]),
        (evaluate.main, [str(folder), *ATTACKS]),
        (ensemble.main, [str(folder), str(folder), "--out", str(tmp_path / "joined")]),
    ):
        line = error_line(capsys, main, arguments)
        assert "--trust-code" in line
    assert not (tmp_path / "sprung").exists()


def test_different_networks_are_joined(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for index, (arch, stage) in enumerate((("resnet8", "layer1"), (PLAIN, "second"), ("resnet8", "layer2"))):
        arguments = _options(data, arch=arch, stage=stage, experts=1, epochs=1, seed=index)
        folders.append(trained([*arguments, "--out", str(tmp_path / str(index))])[1].folder)
    line = error_line(capsys, ensemble.main, [*map(str, folders), "--out", str(tmp_path / "joined")])
    assert "--trust-code" in line
    ensemble.main([*map(str, folders), "--out", str(tmp_path / "joined"), "--trust-code"])
    model, info = load_model(tmp_path / "joined", trust_code=True)
    assert info["model"]["arch"] == f"resnet8,{PLAIN},resnet8"
    assert model.stage == ("layer1", "second", "layer2")
    images = torch.rand(3, 3, 12, 12)
    with torch.no_grad():
        logits = model.expert_logits(images)
        for index, folder in enumerate(folders):
            alone, _ = load_model(folder, trust_code=True)
            torch.testing.assert_close(logits[index], alone.expert_logits(images)[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model.gate_weights(images), torch.full((3, 3), 1 / 3))
    evaluate.main([str(tmp_path / "joined"), "--trust-code", *ATTACKS, "--attackers", "mean"])


def _begun(data: Path, tmp_path: Path, **changes: Any) -> tuple[TrainingState, str]:
    folder, resume, config = train.parse([*_options(data, **changes), "--out", str(tmp_path / "run")])
    trainer, _ = prepare(folder, resume, config)
    return trainer, "\n".join(trainer.beginning.lines)


@pytest.mark.parametrize("arch", ["resnet8", "torchvision:squeezenet1_1"])
def test_experts_begin_from_one_network_and_apart(arch: str, data: Path, tmp_path: Path) -> None:
    if ":" in arch:
        pytest.importorskip("torchvision.models", reason="whose network this is")
        data = write_data(tmp_path / "larger.npz", **arrays(size=24))
    source = create(arch, 9)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pth")
    trainer, lines = _begun(data, tmp_path, arch=arch, experts=3, weights=tmp_path / "w.pth", limit_train=8)
    assert "classifier head of 9 classes is replaced by a fresh one of 3" in lines
    assert "experts 2 and 3 would begin as another does" in lines
    experts = [expert.state_dict() for expert in trainer.model.unstack()]
    record = trainer.beginning.record
    assert record is not None
    prefix = "expert." if any(name.startswith("expert.") for name in experts[0]) else ""
    for name, value in source.state_dict().items():
        if name in record["replaced"] or not value.is_floating_point():
            continue
        own = [expert[f"{prefix}{name}"] for expert in experts]
        assert torch.equal(own[0], value)
        size = 0.01 * value.square().mean().sqrt()
        assert all((each - value).abs().max() <= 7 * size for each in own)
        if value.dim() > 1:
            assert all((each - value).abs().max() > 0 for each in own[1:])
    heads = [expert[f"{prefix}{record['replaced'][0]}"] for expert in experts]
    assert (heads[0] - heads[1]).abs().mean() > 0.1 * heads[0].abs().mean()
    assert record["perturbed"] == [1, 2]
    assert record["perturbation"] == 0.01


def test_equal_experts_that_stay_equal_are_a_line(data: Path, tmp_path: Path) -> None:
    _, lines = _begun(data, tmp_path, arch="tests.own_networks:seeded", experts=2, perturbation=0)
    assert lines == "experts 1 and 2 begin with equal weights, and will never part: --perturbation above 0 parts them"


def test_equal_experts_of_the_user_s_code_are_parted(data: Path, tmp_path: Path) -> None:
    trainer, lines = _begun(data, tmp_path, arch="tests.own_networks:seeded", experts=2)
    assert "expert 2 would begin as another does, and never part from it: noise of 0.01" in lines
    assert trainer.beginning.record == {
        "files": [],
        "sha256": [],
        "replaced": [],
        "perturbed": [1],
        "perturbation": 0.01,
    }


@pytest.fixture(scope="module")
def source(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A mixture of two, from whose weights others begin; it is only read."""
    out = tmp_path_factory.mktemp("source") / "run"
    return trained([*_options(data, arch="resnet8", experts=2, epochs=1), "--out", str(out)])[1]


def test_a_mixture_begins_from_a_mixture(source: Run, data: Path, tmp_path: Path) -> None:
    tensors, _ = load_checkpoint(source.checkpoint)
    trainer, lines = _begun(data, tmp_path, arch="resnet8", experts=2, weights=source.checkpoint)
    assert lines.startswith("the 2 experts and the gate begin from ")
    state = trainer.model.state_dict()
    for name, value in state.items():
        assert torch.equal(value, tensors[f"model/{name}"]), name
    record = trainer.beginning.record
    assert record is not None
    assert not record["perturbed"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 3}, "expected a mixture of 3 experts, got 2"),
        ({"arch": "resnet18"}, "expected the weights of resnet18, got a file"),
        (
            {"arch": "resnet8,resnet18", "weights": "{w},{w},{w}"},
            "expected one file or 2, one for each of",
        ),
        ({"weights": "nothing.pt"}, "nothing.pt: No such file"),
    ],
)
def test_weights_that_do_not_fit_are_a_line(
    changes: dict[str, Any],
    message: str,
    source: Run,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {"experts": 2, "arch": "resnet8", "weights": "{w}"} | changes
    changes["weights"] = changes["weights"].format(w=source.checkpoint)
    line = error_line(capsys, train.main, [*_options(data, **changes), "--out", str(tmp_path / "run")])
    assert line.startswith("error: --weights: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_other_stems_and_stages_are_said(data: Path, tmp_path: Path) -> None:
    trainer, _ = _begun(data, tmp_path, arch=f"resnet18,{WIDE}", stem="imagenet", stage="stem,second")
    assert stage_line(trainer) == (
        f"Grad-CAM looks at stem (3×3, 64 channels) in resnet18, second (6×6, 24 channels) in {WIDE}"
    )
    assert stem_lines(trainer) == [
        f"--stem imagenet: {WIDE} keep the stem of their own; resnet18, googlenet, densenet121 have both"
    ]
    assert trainer.description["stem"] == "imagenet"
    save_checkpoint(tmp_path / "c.safetensors", trainer.tensors(), trainer.info())
    model, info = load_model(tmp_path / "c.safetensors", trust_code=True)
    assert info["model"]["stem"] == "imagenet"
    assert model.stage == ("stem", "second")


def test_an_older_checkpoint_has_the_stem_of_cifar(data: Path, tmp_path: Path) -> None:
    trainer, run = trained([*_options(data, arch="resnet8", experts=2), "--out", str(tmp_path / "run")])
    assert "stem" not in trainer.description
    change_config(run.folder, stem=..., weights=..., perturbation=...)
    assert run.config().stem == "cifar"
    assert json.loads(run.config_file.read_text(encoding="utf-8")).keys().isdisjoint({"stem", "weights"})
    trained(["--resume", str(run.folder)])


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("tests.own_networks:Pooled", "expected logits (B, 3), as many as there are classes, got dict of features"),
        ("torchvision:inception_v3", "cannot be trained on images of 12×12, 4 at a time"),
    ],
)
def test_what_cannot_be_trained_is_a_line(arch: str, message: str) -> None:
    if arch.startswith("torchvision"):
        pytest.importorskip("torchvision.models", reason="whose network this is")
    config = TrainConfig(arch=arch, batch_size=4)
    with pytest.raises(ValueError, match=rf"^--arch {arch}: ") as raised:
        check_trainable(config, (12, 12), 3, 40, CPU)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_s_name_has_no_colons() -> None:
    assert default_name(TrainConfig(arch=f"resnet8,{PLAIN}")) == "digits-resnet8+tests.own_networks-Plain-"
