"""WebDataset's archives: patterns, parts, samples, labels, and what is no archive of samples."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from immunity_fast.data import sources
from immunity_fast.data.datasets import ImageDataset, load
from immunity_fast.data.images import read_image
from immunity_fast.data.shards import expanded, list_shards, part_of
from tests.photos import CLASSES, photo, write_folder, write_shards, write_tar

SIZE = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    return load("folder", write_folder(tmp_path_factory.mktemp("photos")), image_size=SIZE)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("t-{000..002}.tar", ["t-000.tar", "t-001.tar", "t-002.tar"]),
        ("t-{8..10}.tar", ["t-8.tar", "t-9.tar", "t-10.tar"]),
        ("{train,val}-{0..1}.tar", ["train-0.tar", "train-1.tar", "val-0.tar", "val-1.tar"]),
        ("t-{3..2}.tar", []),
    ],
)
def test_braces_are_names(pattern: str, names: list[str]) -> None:
    assert expanded(pattern) == names


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("train-000.tar", "train"),
        ("shards/imagenet_validation_12.tar", "validation"),
        ("val/000.tar", "validation"),
        ("VALID-1.tar", "validation"),
        ("my-test.tar", "test"),
        ("training.tar", "train"),
        ("retrain-1.tar", ""),
        ("testament.tar", ""),
        ("test_of_mine/000.tar", ""),
    ],
)
def test_a_file_s_part_is_a_word_of_its_name(file: str, part: str) -> None:
    assert part_of(file) == part


@pytest.mark.parametrize("label", ["cls", "txt", "json"])
def test_archives_hold_what_a_folder_holds(label: str, folder: ImageDataset, tmp_path: Path) -> None:
    dataset = load("webdataset", write_shards(tmp_path, label=label), image_size=SIZE)
    assert dataset.classes == (CLASSES if label == "txt" else ("0", "1", "2"))
    for one, other in ((dataset.train, folder.train), (dataset.validation, folder.validation)):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.read(slice(None)), other.read(slice(None)))
    assert torch.equal(dataset.test.read(slice(None)), folder.test.read(slice(None)))


@pytest.mark.parametrize("workers", [0, 2])
def test_archives_are_streamed_by_their_index(
    workers: int, folder: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "OPEN_FILES", 2)  # of six archives
    write_shards(tmp_path, shards=5)
    dataset = load("webdataset", str(tmp_path / "{train,val,test}-{000..004}.tar"), image_size=SIZE, stream="on")
    dataset.reader.workers = workers  # type: ignore[union-attr]
    for one, other in ((dataset.train, folder.train), (dataset.test, folder.test)):
        assert torch.equal(one.read(slice(None)), other.read(slice(None)))
    dataset.reader.close()  # type: ignore[union-attr]


def test_training_archives_alone_give_up_a_test_split(tmp_path: Path) -> None:
    write_shards(tmp_path)
    for given in (str(tmp_path / "train-{000..001}.tar"), str(tmp_path / "train-*.tar")):
        dataset = load("webdataset", given, image_size=SIZE)
        assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (22, 2, 6)
        assert dataset.test.labels.bincount().tolist() == [2, 2, 2]
        assert dataset.notes[0].startswith(
            f"{given}: no test split, so 20 % of each class of the training images are it"
        )
    for part in ("train", "val", "test"):
        (tmp_path / part).mkdir()
        for file in tmp_path.glob(f"{part}-*.tar"):
            file.rename(tmp_path / part / file.name.removeprefix(f"{part}-"))
    dataset = load("webdataset", tmp_path, image_size=SIZE)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (30, 9, 12)


def test_names_of_classes_lie_beside_the_archives(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    assert load("webdataset", tmp_path, image_size=SIZE).classes == CLASSES
    (tmp_path / "classes.txt").write_text("ant\nbee\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train-001\.tar: cat/00: expected a label of the 2 classes, got 2$"):
        list_shards(str(tmp_path))


def test_samples_are_grouped_by_the_name_before_the_first_dot(tmp_path: Path) -> None:
    """Members of other kinds, folders and what has no extension are passed over."""
    members = []
    for number in range(8):
        key = f"a.b/{number}" if number else "0"
        members += [
            (f"{key}.seg.png", b"another field"),
            (f"{key}.JPG", photo(number, kind="JPEG")),
            (f"{key}.json", json.dumps({"width": 3, "label": str(number % 2)}).encode()),
            ("README", b"no sample"),
        ]
    file = write_tar(tmp_path / "all.tar", members)
    with tarfile.open(file, "a") as tar:
        folder = tarfile.TarInfo("a.b")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    listed = list_shards(str(file))
    assert listed.train.labels.tolist() == [0, 1] * 4
    assert listed.train.source.key(0) == b"0"
    assert listed.train.source.key(3) == b"a.b/3"
    assert listed.train.source.encoded(3) == photo(3, kind="JPEG")
    assert listed.train.source.sizes().tolist() == [len(photo(n, kind="JPEG")) for n in range(8)]
    assert listed.train.source.name(3) == f"{file}: a.b/3"


def test_archives_are_read_as_the_webdataset_library_does(tmp_path: Path) -> None:
    library = pytest.importorskip("webdataset", reason="other people's reader and writer of archives")
    with library.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        for number in range(9):
            writer.write({"__key__": f"{number:04d}", "png": photo(number), "cls": number % 3, "json": {"id": number}})
    read = list(library.WebDataset(str(tmp_path / "train-0.tar"), shardshuffle=False).decode("rgb8"))
    found = list_shards(str(tmp_path)).train
    assert [each["cls"] for each in read] == found.labels.tolist() == [0, 1, 2] * 3
    assert [each["__key__"].encode() for each in read] == [found.source.key(number) for number in range(9)]
    for number, each in enumerate(read):
        assert (each["png"] == read_image(found.source.encoded(number))).all()


def test_a_member_with_a_long_name_is_found(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = tmp_path / f"{form}.tar"
        with tarfile.open(file, "w", format=form) as tar:
            for number in range(4):
                for extension, content in (("png", photo(number)), ("cls", str(number % 2).encode())):
                    (tmp_path / "member").write_bytes(content)
                    tar.add(tmp_path / "member", f"{'ü' * 130}/{number}.{extension}")
        assert [list_shards(str(file)).train.source.encoded(n) for n in range(4)] == [photo(n) for n in range(4)]


def _one(label: tuple[str, bytes] | None, image: bool = True) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        members = [("1.png", photo(1)), ("1.cls", b"0"), ("2.png", photo(2)), ("2.cls", b"1")]
        members += [("x/7.png", photo(3))] if image else []
        members += [(f"x/7.{label[0]}", label[1])] if label else []
        return write_tar(folder / "t.tar", members)

    return write


def _bytes(content: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        file = _one(("cls", b"1"))(folder)
        file.write_bytes(content(file.read_bytes()))
        return file

    return write


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_one(None), r"t\.tar: x/7: expected a label \(cls, txt, json\), got png$"),
        (_one(("cls", b"1"), image=False), r"t\.tar: x/7: expected an image, got cls$"),
        (_one(("cls", b"-1")), r"expected labels from 0, no more classes than samples \(3\), got -1 to 1$"),
        (_one(("cls", b"900")), r"expected labels from 0, no more classes than samples \(3\), got 0 to 900$"),
        (_one(("cls", b"")), r"t\.tar: x/7\.cls: expected a number or a name, got ''$"),
        (_one(("cls", b"\xff\xfe")), r"t\.tar: x/7\.cls: expected text in UTF-8, got other bytes$"),
        (_one(("txt", b"cat")), r"expected labels that are all numbers or all names, got both, 'cat' for one$"),
        (_one(("json", b"{")), r"t\.tar: x/7\.json: expected JSON in UTF-8, got other bytes$"),
        (_one(("json", b'{"size": 3}')), r"expected a number or a name under one of label, cls.*got '{\"size\": 3}'$"),
        (_one(("json", b'{"label": 1.5}')), r"expected a number or a name under one of label"),
        (
            _bytes(gzip.compress),
            r"t\.tar: expected a plain \.tar, .*, got a compressed one$",
        ),
        (_bytes(lambda whole: whole[:700]), r"t\.tar: .*(end of the archive|cannot be read)"),
        (_bytes(lambda whole: b"no archive" * 100), r"t\.tar: expected a whole tar archive, got one that cannot be"),
        (_bytes(lambda whole: b""), r"t\.tar: expected .*(at least one sample|a whole tar archive)"),
    ],
)
def test_what_is_no_archive_of_samples_is_one_line(write: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        list_shards(str(write(tmp_path)))
    assert "\n" not in str(raised.value)


def test_archives_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    for given in ("none.tar", "none-*.tar", "none-{0..1}.tar"):
        with pytest.raises(FileNotFoundError, match=r"none.*: there is no such archive$"):
            list_shards(str(tmp_path / given))
    with pytest.raises(FileNotFoundError, match=r"there is no archive \(\*\.tar\) in this folder$"):
        list_shards(str(tmp_path))
    for given in ("pipe:curl x", "https://x/train-{0..1}.tar"):
        with pytest.raises(ValueError, match="expected archives on this machine, got an address"):
            list_shards(given)
    write_shards(tmp_path)
    (tmp_path / "train-000.tar").rename(tmp_path / "other.tar")
    with pytest.raises(ValueError, match=r"other\.tar: expected train, val or test in its name, as the archives of"):
        list_shards(str(tmp_path))
    with pytest.raises(ValueError, match=r"expected archives of training samples, got those of validation$"):
        list_shards(str(tmp_path / "val-*.tar"))


def test_an_archive_that_has_changed_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, shards=1)
    dataset = load("webdataset", tmp_path, image_size=SIZE, stream="on", workers=0)
    os.truncate(tmp_path / "test-000.tar", 600)
    with pytest.raises(ValueError, match=r"test-000\.tar: .*: expected \d+ bytes, got \d+: the archive has changed"):
        dataset.test.read(slice(None))


@pytest.mark.parametrize("at", [0, 1000])  # in a header's name; in the header itself, where the archive ends
def test_a_damaged_header_does_not_end_an_archive(at: int, tmp_path: Path) -> None:
    """To `tarfile` it does, and the samples behind it are not there."""
    file = _one(("cls", b"1"))(tmp_path)
    with tarfile.open(file) as tar:
        header = tar.getmember("2.png").offset
    whole = file.read_bytes()
    file.write_bytes(whole[: header + 100] if at else whole[:header] + b"!" + whole[header + 1 :])
    with pytest.raises(ValueError, match=rf"expected a whole tar archive, .*no header at byte {header:,}\)$"):
        list_shards(str(file))


def test_what_is_no_sample_is_passed_over_and_said(tmp_path: Path) -> None:
    file = _one(("cls", b"1"))(tmp_path)
    with tarfile.open(file, "a") as tar:
        for name in ("meta.json", "x/embedding.npy"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    listed = list_shards(str(file))
    assert len(listed.train.labels) == 3
    assert listed.notes == (f"{file}: passed over 2 samples without an image, meta.json for one",)
    empty = write_tar(tmp_path / "empty.tar", [("README.md", b"nothing")])
    with pytest.raises(ValueError, match=r"empty\.tar: expected at least one sample with an image, got none$"):
        list_shards(str(empty))
