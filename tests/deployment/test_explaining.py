"""`python -m immunity_fast.explain`: figures and numbers for images of a user's, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from immunity_fast import ImmunityMoE, explain
from immunity_fast.deployment.explaining import class_names, explained
from immunity_fast.models.moe import SingleNetwork
from tests.oracle import assert_matches
from tests.pictures import pixels
from tests.small_runs import error_line

np = pytest.importorskip("numpy", reason="the command needs the extra train")
Image = pytest.importorskip("PIL.Image", reason="the command needs the extra train")

NAMES = ("cat", "dog", "a fox | in the snow")


def model(kind: str = "mixture") -> ImmunityMoE:
    torch.manual_seed(0)
    if kind == "single":
        return SingleNetwork("resnet8", 3, image_size=(16, 20), classes=NAMES)
    return ImmunityMoE("resnet8", 2, 3, image_size=(16, 20), classes=None if kind == "unnamed" else NAMES)


@pytest.fixture(params=["mixture", "single", "unnamed"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model(request.param).save_pretrained(tmp_path / request.param)
    return tmp_path / str(request.param)


def image(folder: Path, name: str = "a photo.png", size: tuple[int, int] = (30, 40)) -> Path:
    folder.mkdir(exist_ok=True)
    values = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(folder / name)
    return folder / name


def command(run: Path, *words: object) -> list[str]:
    return [str(word) for word in (run, *words, "--device", "cpu", "--out", run.parent / "out")]


def test_it_draws_and_counts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [image(run.parent / "one"), image(run.parent / "two"), image(run.parent / "three", "b.png", (16, 20))]
    explain.main(command(run, *files[:2], run.parent / "three"))
    out = run.parent / "out"
    names = ["a photo.png", "a photo-2.png", "b.png"]  # two of one name
    assert sorted(file.name for file in out.iterdir()) == sorted(
        f"{Path(name).stem}{ending}" for name in names for ending in (".png", ".json")
    )
    said = capsys.readouterr().out.splitlines()
    assert [line.startswith(f"{file}: ") for file, line in zip(files, said, strict=True)] == [True] * 3
    assert "40×30 pixels, scaled and cropped to 20×16" in said[0]
    assert "scaled" not in said[2]
    experts = 1 if run.name == "single" else 2
    for name in names:
        found = json.loads((out / name).with_suffix(".json").read_text(encoding="utf-8"))
        assert len(found["experts"]) == experts
        assert found["class"] == found["mixture"]["predicted"]
        assert list(found["probabilities"]) == (["0", "1", "2"] if run.name == "unnamed" else list(NAMES))
        assert sum(found["probabilities"].values()) == pytest.approx(1)
        columns = 1 + experts + (experts > 1)
        picture = pixels(out / name)
        assert columns * 20 * 12 < picture.shape[1] < columns * 20 * 13 + 700
    assert pixels(out / names[0]).tobytes() == pixels(out / names[1]).tobytes()


def test_its_numbers_are_the_models() -> None:
    mixture = model().eval().double()
    picture = torch.rand(3, 16, 20, dtype=torch.float64)
    for asked in (None, 2):
        found, heatmaps = explained(mixture, picture, asked)
        with torch.no_grad():
            answers = torch.stack([expert(picture[None])[0].softmax(-1) for expert in mixture.unstack()])
        mean = answers.mean(0)
        target = int(mean.argmax()) if asked is None else asked
        assert found["class"] == NAMES[target]
        assert_matches(torch.tensor(list(found["probabilities"].values()), dtype=torch.float64), mean)
        for answer, expected in zip([*found["experts"], found["mixture"]], [*answers, mean], strict=True):
            assert answer["predicted"] == NAMES[int(expected.argmax())]
            assert answer["probability"] == pytest.approx(float(expected.max()))
            assert answer["probability_of_class"] == pytest.approx(float(expected[target]))
        own = mixture.heatmaps(picture[None], target, normalize=True)[:, 0]
        assert_matches(heatmaps, torch.cat([own, own.mean(0, keepdim=True)]))
        assert [answer["has_heatmap"] for answer in found["experts"]] == [bool(h.any()) for h in own]


@pytest.mark.parametrize("asked", ["a fox | in the snow", "2"])
def test_a_class_is_asked_for_by_name_or_number(asked: str, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "run")
    explain.main(command(tmp_path / "run", image(tmp_path), "--class", asked))
    found = json.loads((tmp_path / "out" / "a photo.json").read_text(encoding="utf-8"))
    assert found["class"] == NAMES[2]


def test_names_come_before_numbers() -> None:
    digits = ImmunityMoE("resnet8", 2, 3, image_size=16, stage="layer1", classes=["7", "2", "1"])
    assert class_names(digits) == ("7", "2", "1")
    found, _ = explained(digits.eval(), torch.rand(3, 16, 16), 1)
    assert found["class"] == "2"


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = tmp_path / "run", image(tmp_path)
    model().save_pretrained(run)
    (tmp_path / "none").mkdir()
    (tmp_path / "text.png").write_text("x", encoding="utf-8")
    for words, message in (
        ([tmp_path / "nowhere.png"], "nowhere.png: there is no such image"),
        ([tmp_path / "none"], "none: expected images directly in this folder, got none"),
        ([tmp_path / "text.png"], "text.png: expected an image, got that it could not be read"),
        ([file, "--class", "bird"], "--class: expected one of ['cat', 'dog', "),
        ([file, "--class", "3"], "or a number below 3, got '3'"),
        ([file, "--checkpoint", "best"], "checkpoint: expected None"),
        ([file, "--device", "no"], "--device no: cannot be used here"),
    ):
        words = [run, *words] if "--device" in words else command(run, *words)
        assert message in error_line(capsys, explain.main, [str(word) for word in words])
    assert "there is no such run" in error_line(capsys, explain.main, command(tmp_path / "no-run", file))
    assert "IMAGE" in error_line(capsys, explain.main, [str(run)], code=2)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_broken_image_does_not_cost_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, photos = tmp_path / "run", tmp_path / "photos"
    model().save_pretrained(run)
    file = image(photos)
    (photos / "0.png").write_text("x", encoding="utf-8")
    line = error_line(capsys, explain.main, command(run, photos))
    assert "0.png: expected an image, got that it could not be read" in line
    assert "images: expected all to be readable, got 1 of 2 that are not; the others are in " in line
    assert (tmp_path / "out" / file.name).is_file()


def test_no_figure_takes_an_image_s_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = tmp_path / "run", image(tmp_path / "photos")
    model().save_pretrained(run)
    before = file.read_bytes()
    words = [str(run), str(file), "--device", "cpu", "--out", str(tmp_path / "run" / ".." / "photos")]
    assert "--out: expected another folder than that of" in error_line(capsys, explain.main, words)
    assert (file.read_bytes(), list(file.parent.iterdir())) == (before, [file])


def test_code_of_a_stranger_needs_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    model().save_pretrained(run)
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps(config | {"arch": "their_module:net"}), encoding="utf-8")
    assert "--trust-code" in error_line(capsys, explain.main, command(run, image(tmp_path)))
    line = error_line(capsys, explain.main, command(run, image(tmp_path), "--trust-code"))
    assert "their_module" in line
    assert "--trust-code" not in line
