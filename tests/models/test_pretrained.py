"""`save_pretrained`, `from_pretrained`, `push_to_hub`: back to the same bits, and nothing is believed of a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import ImmunityMoE, RandomSwitchGate
from immunity_fast.models.moe import SingleNetwork
from tests.places import REPOSITORY

safetensors = pytest.importorskip("safetensors.torch", reason="the format of the weights")

NAMES = ("cat", "dog | fox", "ÿ")


def network(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, classes)
    )


def mixture(**options: Any) -> ImmunityMoE:
    """Tensors that none is like a new one's."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {"num_experts": 3, "num_classes": 3, "classes": NAMES, "mean": [0.1, 0.2, 0.3]}
    model = ImmunityMoE("resnet8", **settings | options)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model


def assert_same(one: ImmunityMoE, other: ImmunityMoE) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    for name in ("arch", "num_experts", "num_classes", "stage", "layout", "image_size", "channels", "classes"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.gate.switch == other.gate.switch
    one.eval()
    images = torch.rand(2, one.channels, *one.image_size).to(next(one.parameters()).dtype)
    with one.gate.switched("off"), other.gate.switched("off"):
        assert torch.equal(one(images), other(images))


def back(model: ImmunityMoE, folder: Path, **options: Any) -> ImmunityMoE:
    model.save_pretrained(folder)
    found = ImmunityMoE.from_pretrained(folder, **options)
    assert not found.training
    assert_same(model, found)
    return found


@pytest.mark.parametrize("switch", ["call", "sample", "off", "mean"])
def test_a_mixture_comes_back_with_its_gate(switch: str, tmp_path: Path) -> None:
    assert back(mixture(switch=switch), tmp_path / "new" / "folder").gate.switch == switch


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_its_own_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    back(mixture(classes=None).to(dtype), tmp_path)


def test_of_channels_last_weights_the_values_come_back(tmp_path: Path) -> None:
    model = mixture().to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    found = ImmunityMoE.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


def test_a_single_network_comes_back_as_one(tmp_path: Path) -> None:
    found = back(SingleNetwork("resnet8", 5, image_size=(24, 40), stage="layer1"), tmp_path)
    assert isinstance(found, SingleNetwork)


def test_architectures_of_several_kinds_come_back(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="a network that is not ours")
    model = ImmunityMoE(
        "resnet8,torchvision:shufflenet_v2_x0_5", 3, 4, image_size=64, stage=["layer2", "stage2", "layer1"]
    )
    assert back(model, tmp_path).stage == ("layer2", "stage2", "layer1")


def test_experts_of_the_users_own_are_brought_along(tmp_path: Path) -> None:
    model = ImmunityMoE.from_experts([network(), network()], stage="2", image_size=16, classes=NAMES)
    with pytest.raises(
        ValueError, match=r"experts: expected networks for .*, which was made by from_experts, got none"
    ):
        back(model, tmp_path / "a")
    back(model, tmp_path / "a", experts=[network(), network()])
    own = RandomSwitchGate(2, nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)), switch="off")
    model = ImmunityMoE.from_experts(
        [network(), network()], gate=own, stage="2", image_size=16, mean=[0.5] * 3, std=[0.2] * 3
    )
    other = RandomSwitchGate(2, nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)))
    back(model, tmp_path / "b", experts=[network(), network()], gate=other)
    with pytest.raises(ValueError, match=r"model.safetensors: gate.network"):
        ImmunityMoE.from_pretrained(tmp_path / "b", experts=[network(), network()])
    with pytest.raises(ValueError, match=r"model.safetensors: experts.5.bias: expected shape \(2, 4\), got \(2, 3\)"):
        ImmunityMoE.from_pretrained(tmp_path / "b", experts=[network(4), network(4)], gate=other)


def test_the_files_are_the_hubs(tmp_path: Path) -> None:
    model = mixture()
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["classes"] == list(NAMES)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(model.state_dict())


def test_the_card_says_what_it_is_and_stays(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="the head of the card")
    model = mixture()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["library_name"] == "immunity_fast"
    assert head["license"] == "unknown"
    assert "3 × resnet8" in text
    assert r"3: cat, dog \| fox, ÿ" in text
    assert "Nothing was measured" in text
    assert ImmunityMoE.from_pretrained(tmp_path).card == text
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"
    model.card = "# of my own"
    model.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "README.md").read_text(encoding="utf-8") == "# of my own"


class Hub:
    """What of huggingface_hub is used, without a network: repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, list[tuple[str, dict[str, Any]]]()

    def HfApi(self, token: str | None = None) -> Hub:
        self.calls.append(("HfApi", {"token": token}))
        return self

    def create_repo(self, **given: Any) -> SimpleNamespace:
        self.calls.append(("create_repo", given))
        return SimpleNamespace(repo_id=f"me/{given['repo_id'].rpartition('/')[2]}")

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        target = self.root / repo_id
        target.mkdir(parents=True)
        for file in Path(folder_path).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return f"https://hub/{repo_id}/commit/{commit_message}"

    def snapshot_download(self, repository: str, **given: Any) -> str:
        self.calls.append(("snapshot_download", given))
        if not (self.root / repository).is_dir():
            raise RuntimeError("404\nnot found")
        return str(self.root / repository)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    return made


def test_it_goes_to_the_hub_and_comes_back(hub: Hub) -> None:
    model = mixture()
    address = model.push_to_hub("mixture", private=True, token="t", commit_message="first")
    assert address == "https://hub/me/mixture/commit/first"
    assert hub.calls == [
        ("HfApi", {"token": "t"}),
        ("create_repo", {"repo_id": "mixture", "private": True, "exist_ok": True}),
    ]
    assert 'from_pretrained("me/mixture")' in (hub.root / "me/mixture/README.md").read_text(encoding="utf-8")
    assert_same(model, ImmunityMoE.from_pretrained("me/mixture", revision="v1"))
    name, given = hub.calls[-1]
    assert (name, given["revision"]) == ("snapshot_download", "v1")
    assert set(given["allow_patterns"]) == {"config.json", "model.safetensors", "README.md"}, "no code, no pickles"


def test_what_the_hub_does_not_have_is_one_line(hub: Hub) -> None:
    with pytest.raises(
        OSError, match=r"^nobody/nothing: there is no such folder here, .* RuntimeError: 404 not found$"
    ):
        ImmunityMoE.from_pretrained("nobody/nothing")


def test_a_hub_out_of_reach_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_given: Any) -> None:
        raise RuntimeError("no route\nto the host")

    monkeypatch.setattr(hub, "create_repo", fails)
    with pytest.raises(OSError, match=r"^me/mixture: the hub does not take it: RuntimeError: no route to the host$"):
        mixture().push_to_hub("me/mixture")


def test_the_real_hub_takes_what_is_asked_of_it() -> None:
    import inspect

    real = pytest.importorskip("huggingface_hub", reason="the extra hub")
    for function, names in (
        (real.HfApi, {"token"}),
        (real.HfApi.create_repo, {"repo_id", "private", "exist_ok"}),
        (real.HfApi.upload_folder, {"repo_id", "folder_path", "commit_message"}),
        (real.snapshot_download, {"repo_id", "revision", "token", "allow_patterns"}),
    ):
        assert names <= set(inspect.signature(function).parameters), function


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
        model.push_to_hub("me/mixture")
    with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
        ImmunityMoE.from_pretrained("me/mixture")
    back(model, tmp_path)  # for which the hub is not needed
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: model.save_pretrained(tmp_path), lambda: ImmunityMoE.from_pretrained(tmp_path)):
        with pytest.raises(ModuleNotFoundError, match="needs safetensors: pip install safetensors"):
            call()


def test_importing_the_package_imports_neither() -> None:
    program = "import sys, immunity_fast; print(sorted({'huggingface_hub', 'safetensors', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not {"huggingface_hub", "safetensors"} & set(json.loads(done.stdout.replace("'", '"')))


def changed(folder: Path, **entries: Any) -> None:
    """A config.json with other entries; one that is ... goes."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | entries
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}), encoding="utf-8")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    mixture().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"library": "timm"}, "config.json: expected what save_pretrained of immunity_fast writes"),
        ({"format": 2}, "config.json: format: expected what save_pretrained writes, got 2"),
        ({"classes": ...}, "config.json: classes: expected an entry, got none"),
        ({"classes": ["a"]}, "classes: expected 3 names, got 1"),
        ({"num_experts": True}, "config.json: num_experts: expected what save_pretrained writes, got True"),
        ({"num_experts": 10**12}, "expected the tensors of 1000000000000 experts, got others"),
        ({"num_experts": 2}, r"experts.classifier.1.bias: expected shape \(2, 3\), got \(3, 3\)"),
        ({"num_classes": 10**9}, r"experts.classifier.1.bias: expected shape \(3, 1000000000\), got \(3, 3\)"),
        ({"arch": "resnet18"}, r"model.safetensors: experts.classifier.1.weight: expected shape \(3, 3, 512\)"),
        ({"arch": "resnet9"}, "expected one of resnet18"),
        ({"arch": "resnet8,resnet18"}, "model.safetensors: experts."),
        ({"stage": "layer9"}, "stage: expected one of"),
        ({"switch": "never"}, "config.json: switch: expected what"),
        ({"image_size": [32]}, "config.json: image_size: expected what"),
    ],
)
def test_what_a_config_cannot_say_is_refused(saved: Path, entries: dict[str, Any], message: str) -> None:
    changed(saved, **entries)
    with pytest.raises(ValueError, match=message) as caught:
        ImmunityMoE.from_pretrained(saved)
    assert "\n" not in str(caught.value)


def test_code_of_a_stranger_is_not_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved / "strange_module.py").write_text("raise SystemError('ran')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(saved))
    changed(saved, arch="strange_module:network")
    with pytest.raises(ValueError, match="strange_module:network is code that would be imported and run"):
        ImmunityMoE.from_pretrained(saved)
    with pytest.raises(ValueError, match="SystemError: ran"):
        ImmunityMoE.from_pretrained(saved, trust_code=True)


def own_network(num_classes: int) -> nn.Module:
    return network(num_classes)


def test_code_that_is_trusted_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_networks.py").write_text(
        "from torch import nn\n\n\ndef small(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),"
        " nn.Linear(36, num_classes))\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = ImmunityMoE("my_own_networks:small", 2, 3, stage="1", image_size=16)
    assert "trust_code=True" in back(model, tmp_path / "saved", trust_code=True).card  # type: ignore[operator]


def _rewritten(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors: dict[str, Tensor] = safetensors.load_file(file)
    change(tensors)
    safetensors.save_file(tensors, file)


def test_broken_weights_are_refused_by_name(saved: Path) -> None:
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors: expected whole weights, got"):
        ImmunityMoE.from_pretrained(saved)
    file.write_bytes(whole)
    _rewritten(saved, lambda tensors: tensors.pop("gate.network.0.bias"))
    with pytest.raises(ValueError, match=r"gate.network.0.bias: expected shape \(16,\), got none"):
        ImmunityMoE.from_pretrained(saved)
    file.write_bytes(whole)
    _rewritten(saved, lambda tensors: tensors.update({"gate.network.0.bias": torch.zeros(16, dtype=torch.float64)}))
    with pytest.raises(ValueError, match=r"expected one floating-point dtype, got torch.float32 and torch.float64"):
        ImmunityMoE.from_pretrained(saved)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"got a folder without model.safetensors"):
        ImmunityMoE.from_pretrained(saved)


@pytest.mark.parametrize("place", ["nowhere", "./no/where", Path("me/mixture"), "a/b/c"])
def test_what_is_no_folder_and_no_repository_is_not_asked_for(place: str | Path, hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        ImmunityMoE.from_pretrained(place)
    assert hub.calls == []


def test_a_file_in_the_place_of_the_folder_stays(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    with pytest.raises(FileExistsError, match="expected a folder, got a file"):
        mixture().save_pretrained(file)
    assert file.read_text(encoding="utf-8") == "x"
