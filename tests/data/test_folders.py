"""Which files of a folder are of which split and class, whatever it is called, and what is said of the rest."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from immunity_fast.data.datasets import load
from immunity_fast.data.folders import Folder, list_folder, said, split_of

pytest.importorskip("numpy", reason="splits are drawn with it")


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def classes(folder: Path, count: int = 5, names: str = "ab") -> None:
    touch(*(folder / name / f"{index}.png" for name in names for index in range(count)))


def counts(found: Folder) -> tuple[int | None, ...]:
    parts = (found.train, found.validation, found.test)
    return tuple(None if part is None else sum(map(len, part.values())) for part in parts)


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Valid", "TEST"),
        ("training", "VALIDATION", "testing"),
        ("TRAIN", None, "Test"),
    ],
)
def test_splits_are_found_in_any_capitalisation(tmp_path: Path, train: str, validation: str | None, test: str) -> None:
    classes(tmp_path / train)
    classes(tmp_path / test, count=2)
    if validation:
        classes(tmp_path / validation, count=3)
    found = list_folder(tmp_path)
    assert counts(found) == (10, 6 if validation else None, 4)
    assert found.train["a"] == [str(tmp_path / train / "a" / f"{index}.png") for index in range(5)]
    assert found.notes == ()


def test_names_of_splits() -> None:
    names = ("train", "Training", "val", "VALID", "validation", "test", "Testing", "other", "")
    expected = ["train"] * 2 + ["validation"] * 3 + ["test"] * 2 + [None] * 2
    assert [split_of(name) for name in names] == expected


def test_two_folders_of_one_split_are_ambiguous(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "val")
    classes(tmp_path / "Validation")
    with pytest.raises(ValueError, match="expected one validation split, got Validation and val"):
        list_folder(tmp_path)


def test_validation_stays_one_where_there_is_no_test(tmp_path: Path) -> None:
    """As ImageNet is kept: nothing is chosen on what a run ends with, and nothing of `val` is trained on."""
    classes(tmp_path / "train", count=10)
    classes(tmp_path / "val", count=3)
    found = list_folder(tmp_path)
    assert counts(found) == (16, 6, 4)
    assert all(os.sep + "val" + os.sep in file for files in (found.validation or {}).values() for file in files)
    assert not {*found.train["a"]} & {*found.test["a"]}
    assert {*found.train["a"]} | {*found.test["a"]} == {str(tmp_path / "train/a" / f"{i}.png") for i in range(10)}
    assert found.notes == (
        f"{tmp_path}: no folder test, so 20 % of each class of train, 4 images, are the test, the same ones for every "
        "run",
    )
    assert list_folder(tmp_path) == found


def test_splits_without_one_to_train_on_are_refused(tmp_path: Path) -> None:
    classes(tmp_path / "val")
    classes(tmp_path / "test")
    with pytest.raises(ValueError, match="expected a folder train, with a folder for each class, got test and val"):
        list_folder(tmp_path)


def test_classes_may_be_called_as_splits_are(tmp_path: Path) -> None:
    touch(*(tmp_path / name / f"{index}.png" for name in ("train", "test", "bus") for index in range(5)))
    assert list(list_folder(tmp_path).train) == ["bus", "test", "train"]


def test_images_may_lie_deeper_and_links_are_followed(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    touch(root / "a/x/1.png", root / "a/x/y/2.JPG", root / "a/0.jpeg", elsewhere / "3.png", elsewhere / "4.PNG")
    (root / "b").symlink_to(elsewhere)  # a class
    (root / "a" / "5.png").symlink_to(elsewhere / "3.png")
    (root / "a" / "x" / "round").symlink_to(root / "a")  # in a circle
    (root / "a" / "6.png").symlink_to(tmp_path / "nowhere.png")
    found = list_folder(root)
    files = {name: sorted(found.train[name] + found.test[name], key=os.fsencode) for name in found.train}
    assert files["a"] == [str(root / "a" / name) for name in ("0.jpeg", "5.png", "x/1.png", "x/y/2.JPG")]
    assert files["b"] == [str(root / "b" / name) for name in ("3.png", "4.PNG")]
    assert found.notes == (f"{root}: passed over 1 broken link",)


def test_labels_are_places_among_the_names_by_their_bytes(tmp_path: Path) -> None:
    touch(*(tmp_path / name / f"{index}.png" for name in ("10", "2", "b", "B", "é") for index in range(2)))
    assert list(list_folder(tmp_path).train) == ["10", "2", "B", "b", "é"]


def test_what_is_passed_over_is_said_in_a_line(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "test")
    touch(*(tmp_path / "train/a" / name for name in ("1.txt", "2.TXT", "x.heic", ".DS_Store", "notes")))
    touch(tmp_path / "test/b/deep/3.txt", tmp_path / "labels.csv", tmp_path / "train" / "stray.png")
    touch(tmp_path / "__MACOSX/a/._1.png", tmp_path / "train/__MACOSX/._2.png", tmp_path / "notes/read.me")
    found = list_folder(tmp_path)
    assert counts(found) == (10, None, 10)
    assert found.notes == (
        f"{tmp_path}: passed over 3 .txt, 3 hidden, 1 .csv, 1 .heic, 1 .png in no class's folder, 1 other folder, "
        "1 without an extension; .heic are images that are not read here: save them as .png or .jpg",
    )
    many = Counter({f".{index}": 1 for index in range(12)})
    assert said(many).endswith("and 4 others")


def test_a_class_without_images_says_what_it_has(tmp_path: Path) -> None:
    classes(tmp_path)
    touch(*(tmp_path / "c" / name for name in ("1.heic", "2.heic", "3.txt")))
    with pytest.raises(
        ValueError, match=r"c: expected at least one image .*, got none \(passed over: 2 .heic, 1 .txt; "
    ):
        list_folder(tmp_path)


def test_images_without_class_folders_are_named(tmp_path: Path) -> None:
    touch(*(tmp_path / f"{index}.png" for index in range(4)))
    with pytest.raises(ValueError, match=r"2 class folders, got 0 \(passed over: 4 .png in no class's folder\)"):
        list_folder(tmp_path)


def test_a_split_without_class_folders_is_named(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    touch(*(tmp_path / "val" / f"ILSVRC_{index}.JPEG" for index in range(3)))
    with pytest.raises(
        ValueError, match=r"val: expected the 2 classes .* \(passed over: 3 .jpeg in no class's folder\)"
    ):
        list_folder(tmp_path)


def test_a_data_set_has_the_notes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="the reader of images")
    classes(tmp_path)
    for number, file in enumerate(sorted(tmp_path.rglob("*.png"))):
        image.new("RGB", (4, 6), (number, 0, 0)).save(file)
    touch(tmp_path / "a" / "1.txt")
    dataset = load("folder", tmp_path)
    kept = "10 images of 4×6 take 720 bytes decoded: kept in memory"
    assert dataset.notes == (f"{tmp_path}: passed over 1 .txt", kept)
    assert dataset.to("cpu").notes == dataset.notes
