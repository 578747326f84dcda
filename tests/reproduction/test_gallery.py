"""Figure 2 for paper and browser: the heatmaps against plain autograd in float64, the files against what they say."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.data.datasets import Split
from immunity_fast.data.sampling import sample_order
from immunity_fast.experts.staged import StagedNetwork
from immunity_fast.models.moe import SingleNetwork
from immunity_fast.reproduction.figure2 import write
from immunity_fast.reproduction.gallery import Gallery, choose, collect
from immunity_fast.reproduction.gallery_figure import CROSS, WIDTH, draw, to_bytes
from immunity_fast.reproduction.gallery_page import LEVELS, WINDOW, page
from tests.pictures import pixels
from tests.places import REPOSITORY
from tests.small_runs import CLASSES, split

NAMES = ("cat", "dog", "ship")
HOSTILE = "<script>alert('x')</script> & \"$quoted$\""
EXPERTS = 3


def made_up(
    experts: int = 2, count: int = 3, height: int = 12, width: int = 16, title: str = "Immunity", seed: int = 0
) -> Gallery:
    """The images are the same for every seed. The first expert is always right, the second always wrong."""
    fixed, random = torch.Generator().manual_seed(9), torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(NAMES)
    probabilities = torch.full((experts, count, len(NAMES)), 0.1)
    for i in range(experts):
        probabilities[i, torch.arange(count), (labels + i % 2) % len(NAMES)] = 0.8
    return Gallery(
        title=title,
        images=torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=fixed),
        labels=labels,
        classes=NAMES,
        heatmaps=torch.rand(experts, count, height, width, generator=random) ** 4 * 1e-3,
        probabilities=probabilities,
        mixture=probabilities.mean(0),
    )


def trained(model: ImmunityMoE) -> ImmunityMoE:
    """In evaluation mode, its running statistics fit to images, in float64."""
    with torch.no_grad():
        for _ in range(5):
            model(split(30, seed=7).images / 255)
    return model.double().eval()


@pytest.fixture(scope="module")
def model() -> ImmunityMoE:
    torch.manual_seed(0)
    return trained(ImmunityMoE("resnet8", EXPERTS, CLASSES, image_size=12, stage="layer2"))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


class Page(HTMLParser):
    """The tags of a page with their attributes, its scripts, and its other text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.source = source
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts.append(data)
        else:
            self.text += data

    def heatmaps(self) -> list[dict[str, str]]:
        """The attributes of all heatmaps, in reading order: rows, galleries, experts."""
        return [attributes for tag, attributes in self.tags if tag == "img" and "data-who" in attributes]


def shares(attributes: dict[str, str], height: int, width: int) -> np.ndarray:
    """Each pixel's share of the mass, as the page's script computes it."""
    values = np.frombuffer(base64.b64decode(attributes["data-values"]), dtype="<u2")
    return values.reshape(height, width) / LEVELS / float(attributes["data-total"])


def test_each_class_has_as_many_images_as_can_be_class_by_class() -> None:
    labels = torch.tensor([0] * 40 + [1] * 3 + [2] * 20 + [4] * 1)
    images = torch.arange(64, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    data = Split(images, labels)
    assert choose(data, 4).labels.tolist() == [0, 1, 2, 4]
    assert choose(data, 5).labels.tolist() in ([0, 0, 1, 2, 4], [0, 1, 1, 2, 4], [0, 1, 2, 2, 4])
    assert choose(data, 9).labels.bincount().tolist() in ([3, 3, 2, 0, 1], [2, 3, 3, 0, 1], [3, 2, 3, 0, 1])
    assert choose(data, 12).labels.bincount().tolist() == [4, 3, 4, 0, 1]
    assert len(set(choose(data, 2).labels.tolist())) == 2
    everything = choose(data, 1000)
    assert sorted(everything.images[:, 0, 0, 0].tolist()) == list(range(64))
    assert everything.labels.tolist() == sorted(labels.tolist())


def test_images_are_the_first_of_their_class_in_the_random_order() -> None:
    data = split(30, seed=1)
    chosen = choose(data, CLASSES)
    for label in range(CLASSES):
        first = next(i for i in sample_order(data, len(data)).tolist() if data.labels[i] == label)
        assert torch.equal(chosen.images[label], data.images[first])


def independent(network: torch.nn.Module, images: Tensor, labels: Tensor, scale: str, score: str) -> Tensor:
    """Eq. (3) of one expert for some images, (n, H, W), by plain autograd, an image at a time."""
    assert isinstance(network, StagedNetwork)
    trunk, head = network.double().eval().split("layer2")
    rows = []
    for image, label in zip((images / 255).double(), labels.tolist(), strict=True):
        maps = trunk(image[None]).detach().requires_grad_()
        logits = head(maps)[0]
        (slope,) = torch.autograd.grad((logits.softmax(0) if score == "probability" else logits)[label], maps)
        channels, h, w = slope.shape[1:]
        raw = torch.zeros(h, w, dtype=torch.float64)
        for k in range(channels):
            raw += slope[0, k].sum() / (channels if scale == "channels" else h * w) * maps[0, k].detach()
        size = tuple(images.shape[-2:])
        rows.append(F.interpolate(raw.relu()[None, None], size=size, mode="bilinear", align_corners=False)[0, 0])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("size", "scale", "score"),
    [(None, "channels", "logit"), ((12, 12), "spatial", "logit"), ((5, 7), "channels", "probability")],
)
def test_collected_heatmaps_and_probabilities_are_the_experts(
    model: ImmunityMoE, size: Any, scale: Any, score: Any
) -> None:
    loss = FusedImmunityLoss(size=size, weight_scale=scale, score=score)
    gallery = collect(model, split(30, seed=1), NAMES, 4, loss, title="Immunity")
    assert gallery.heatmaps.shape == (EXPERTS, 4, 12, 12)
    assert gallery.images.shape == (4, 3, 12, 12)
    assert sorted(gallery.labels.tolist()) == gallery.labels.tolist()
    for i, network in enumerate(model.unstack()):
        expected = independent(network, gallery.images, gallery.labels, scale, score)
        assert float(expected.max()) > 0
        torch.testing.assert_close(gallery.heatmaps[i], expected, rtol=1e-7, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(
                gallery.probabilities[i], network.eval()((gallery.images / 255).double()).softmax(-1)
            )
    torch.testing.assert_close(gallery.mixture, gallery.probabilities.mean(0))
    assert loss.size == size


def test_collect_leaves_the_model_and_random_numbers_alone(model: ImmunityMoE) -> None:
    loss = FusedImmunityLoss(size=(12, 12))
    expected = collect(model, split(30, seed=1), NAMES, 3, loss)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model.gate.eval()
    modes = [module.training for module in model.modules()]
    try:
        state = torch.get_rng_state()
        again = collect(model, split(30, seed=1), NAMES, 3, loss)
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()
    assert torch.equal(again.heatmaps, expected.heatmaps)
    assert torch.equal(again.probabilities, expected.probabilities)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_independent_networks_are_the_experts_of_one_gallery() -> None:
    torch.manual_seed(1)
    networks = [trained(SingleNetwork("resnet8", CLASSES, image_size=12, stage="layer2")) for _ in range(2)]
    loss = FusedImmunityLoss(size=(12, 12))
    together = collect(networks, split(30, seed=1), NAMES, 3, loss)
    alone = [collect(network, split(30, seed=1), NAMES, 3, loss) for network in networks]
    assert [gallery.experts for gallery in alone] == [1, 1]
    assert torch.equal(together.heatmaps, torch.cat([gallery.heatmaps for gallery in alone]))
    torch.testing.assert_close(together.mixture, (alone[0].mixture + alone[1].mixture) / 2)
    draw([together, *alone])


@pytest.mark.parametrize(
    ("experts", "count", "height", "width"),
    [
        ((1,), 1, 8, 8),
        ((2, 3), 4, 17, 30),
        ((5,), 2, 31, 13),
        ((2,), 1, 300, 400),
        pytest.param((5, 5), 4, 4, 4, marks=pytest.mark.exhaustive),
        ((1, 12), 1, 9, 9),
        pytest.param((1, 12), 2, 9, 9, marks=pytest.mark.exhaustive),
    ],
)
def test_pictures_lie_in_rows_and_columns_within_the_page(
    experts: tuple[int, ...], count: int, height: int, width: int
) -> None:
    galleries = [made_up(n, count, height, width, title=f"gallery {i}", seed=i) for i, n in enumerate(experts)]
    figure = draw(galleries)
    assert 0 < figure.get_figwidth() <= WIDTH
    assert 0 < figure.get_figheight() < 9
    figure.canvas.draw()
    boxes = [axes.get_window_extent().extents for axes in figure.axes if axes.images]
    assert len(boxes) == count * (1 + sum(experts))
    for left, bottom, right, top in boxes:
        assert left >= 0 and bottom >= 0 and right <= figure.bbox.width and top <= figure.bbox.height  # noqa: PT018
        assert (right - left) / (top - bottom) == pytest.approx(width / height, rel=0.03)
    columns = sorted({round(box[0]) for box in boxes})
    rows = sorted({round(box[1]) for box in boxes})
    assert (len(columns), len(rows)) == (1 + sum(experts), count)
    assert min(np.diff(columns), default=1e9) > boxes[0][2] - boxes[0][0]
    assert min(np.diff(rows), default=1e9) > boxes[0][3] - boxes[0][1]
    for text in figure.texts:
        left, bottom, right, top = text.get_window_extent().extents
        assert left >= 0 and bottom >= 0 and right <= figure.bbox.width and top <= figure.bbox.height  # noqa: PT018


def test_the_figure_names_classes_galleries_experts_and_errors() -> None:
    right = made_up(1, title="one network")
    found = texts(draw([right, made_up(2)]))
    assert [text for text in found if text in NAMES] == list(NAMES)
    assert {"input", "Immunity", "expert 1", "expert 2"} < set(found)
    assert [text for text in found if text.startswith(CROSS) and len(text) > 1] == [
        f"{CROSS} {name}" for name in ("dog", "ship", "cat")
    ]
    assert not any(CROSS in text for text in texts(draw([right])))


def test_pictures_show_the_input_and_heatmaps_scaled_one_by_one(tmp_path: Path) -> None:
    gallery = made_up(2, 1, 8, 8)
    shown = [np.asarray(axes.images[0].get_array()) for axes in draw([gallery]).axes if axes.images]
    expected = gallery.images[0].permute(1, 2, 0).numpy().repeat(32, 0).repeat(32, 1)
    np.testing.assert_array_equal(shown[0], expected)
    row, column = divmod(int(gallery.heatmaps[0, 0].argmax()), 8)
    brightest = shown[1][32 * row, 32 * column].astype(int)
    assert brightest[0] > 200
    assert brightest[0] > brightest[2] + 50  # the colour map's yellow
    factors = torch.tensor([1e-30, 1e4])[:, None, None, None]
    (tmp_path / "1.png").write_bytes(to_bytes(draw([gallery]), "png"))
    scaled = replace(gallery, heatmaps=gallery.heatmaps.double() * factors)
    (tmp_path / "2.png").write_bytes(to_bytes(draw([scaled]), "png"))
    np.testing.assert_allclose(pixels(tmp_path / "1.png"), pixels(tmp_path / "2.png"), atol=1)


@pytest.mark.parametrize(
    ("value", "mark"),
    [
        (0.0, "dead"),
        (torch.nan, "not finite"),
        pytest.param(torch.inf, "not finite", marks=pytest.mark.exhaustive),
    ],
)
def test_heatmaps_that_cannot_be_shown_are_marked(value: float, mark: str) -> None:
    gallery = made_up(2, 3)
    gallery.heatmaps[1, 2] = value
    figure = draw([gallery])
    assert texts(figure).count(mark) == 1
    assert any(text.startswith(f"{mark}: ") for text in texts(figure))
    picture = np.asarray(figure.axes[-2].images[0].get_array())  # the last before the colour bar
    assert (np.ptp(picture.astype(int), axis=-1) == 0).all()
    html = Page(page([gallery]))
    hidden = [attributes for attributes in html.heatmaps() if "data-values" not in attributes]
    assert len(hidden) == 1
    assert mark in hidden[0]["alt"]
    assert html.heatmaps()[-1] is hidden[0]


@pytest.mark.parametrize(("height", "width"), [(12, 16), (3, 2), (5, 131)])
def test_the_pages_numbers_give_the_true_shares(height: int, width: int) -> None:
    first, second = made_up(2, 2, height, width), made_up(1, 2, height, width, seed=1)
    first.heatmaps[0, 0] = 0
    first.heatmaps[0, 0, 1, 1] = 1e-20  # all in one pixel
    first.heatmaps[1, 0] = 3e-6 * LEVELS
    first.heatmaps[1, 0, 0, 0] = 1e3  # the rest lies below one step, and adds up
    html = Page(page([first, second]))
    heatmaps = [
        gallery.heatmaps[i, row] for row in range(2) for gallery in (first, second) for i in range(gallery.experts)
    ]
    assert len(html.heatmaps()) == len(heatmaps)
    for attributes, heatmap in zip(html.heatmaps(), heatmaps, strict=True):
        truth = heatmap.double().numpy() / float(heatmap.double().sum())
        found = shares(attributes, height, width)
        assert found.sum() == pytest.approx(1, abs=height * width / 2 / LEVELS)
        for row in range(height):
            for column in range(width):
                window = np.s_[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
                assert abs(found[window].sum() - truth[window].sum()) <= WINDOW**2 / 2 / LEVELS
    (table,) = [attributes for tag, attributes in html.tags if tag == "table"]
    assert (table["data-height"], table["data-width"]) == (str(height), str(width))
    assert (table["data-levels"], table["data-window"]) == (str(LEVELS), str(WINDOW))


def test_without_its_script_the_page_says_what_experts_predict() -> None:
    gallery = made_up(2, 3)
    html = Page(page([gallery]))
    one, other = html.heatmaps()[:2]
    assert one["alt"] == "Immunity, expert 1: heatmap for cat; predicts cat, 80.0\u00a0%, right"
    assert other["data-says"] == "predicts dog, 80.0\u00a0%, wrong"
    assert other["data-truth"] == "true class: cat, which it gives 10.0\u00a0%"
    assert other["data-mean"].startswith("mean of the experts: cat, 45.0\u00a0%")
    for said in ("cat 80\u00a0%", f"{CROSS}\u00a0dog 80\u00a0%", "expert 2", "Immunity"):
        assert said in html.text
    pictures = [attributes for tag, attributes in html.tags if tag == "img"]
    assert all(attributes["alt"] for attributes in pictures)
    heatmap = gallery.heatmaps[0, 0].numpy()
    with Image.open(io.BytesIO(base64.b64decode(one["src"].removeprefix("data:image/png;base64,")))) as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.round(255 * (heatmap / heatmap.max())))


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.999, "> 99 %"), (0.001, "< 1 %"), (0.5, "50 %"), (float("nan"), "not a number")],
)
def test_probabilities_do_not_become_certain_by_rounding(share: float, said: str) -> None:
    gallery = made_up(1, 1)
    gallery.probabilities[0, 0] = torch.tensor([share, 0.0, 0.0])
    assert f"cat {said.replace(' %', chr(160) + '%')}" in Page(page([gallery])).text


def test_the_page_escapes_texts_and_runs_its_own_script_alone() -> None:
    gallery = replace(made_up(2, 3, title=HOSTILE), classes=(HOSTILE, f"\u2028{HOSTILE}", "</style>"))
    html = Page(page([gallery]))
    assert html.source.count("<script") == 1
    assert html.source.count("</style>") == 1
    assert html.source.count("</script>") == 1
    assert HOSTILE in html.text
    assert html.heatmaps()[0]["data-who"] == f"{HOSTILE}, expert 1"
    (policy,) = [a["content"] for tag, a in html.tags if tag == "meta" and a.get("http-equiv")]
    script = "".join(html.scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in script
    links = re.findall(r"""(?:src|href|srcset|action)=["']?([^"'>\s]{0,22})|url\(([^)]{0,22})""", html.source)
    assert {"".join(pair) for pair in links} == {"data:image/png;base64,"}
    assert "http:" not in html.source
    assert "https:" not in html.source


def test_files_depend_on_the_galleries_alone(tmp_path: Path) -> None:
    galleries = [made_up(2, 2, title="a"), made_up(1, 2, title="b", seed=1)]
    files = write(galleries, tmp_path / "made" / "here")
    assert [file.name for file in files] == ["figure2.pdf", "figure2.png", "figure2.html"]
    assert {file.name for file in files[0].parent.iterdir()} == {file.name for file in files}
    contents = [file.read_bytes() for file in files]
    assert contents[2] == page(galleries).encode()
    assert [file.read_bytes() for file in write(galleries, tmp_path / "made" / "here")] == contents


@pytest.mark.exhaustive  # seconds of imports; in one process, the test above
def test_files_depend_on_no_order_of_sets(tmp_path: Path) -> None:
    """Which is another one in a process whose hashes have another seed."""
    galleries = [made_up(2, 2, title="a"), made_up(1, 2, title="b", seed=1)]
    files = write(galleries, tmp_path / "here")
    torch.save([vars(gallery) for gallery in galleries], tmp_path / "galleries.pt")
    code = (
        "import sys, torch; from pathlib import Path; from immunity_fast.reproduction.figure2 import Gallery, write; "
        "write([Gallery(**fields) for fields in torch.load(sys.argv[1])], Path(sys.argv[2]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "galleries.pt"), str(tmp_path / "other")]
    subprocess.run(command, check=True, cwd=REPOSITORY, env=environment)
    assert [(tmp_path / "other" / file.name).read_bytes() for file in files] == [file.read_bytes() for file in files]


def test_the_pdf_has_its_text_as_text_and_the_png_its_resolution(tmp_path: Path) -> None:
    pdf, png, _ = write([made_up()], tmp_path, "figure two")
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert b"/FontFile2" in content
    assert b"/Type3" not in content
    assert b"CreationDate" not in content
    with Image.open(png) as image:
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert image.width <= WIDTH * 300
        assert "Software" not in image.info


def test_long_names_dollar_signs_and_many_experts_are_drawn() -> None:
    title = f"a title that is much longer than its one column {HOSTILE}" * 3
    gallery = replace(made_up(9, 2, title=title), classes=("$x", "y" * 200, "$z"))
    figure = draw([gallery, replace(gallery, title="")])
    assert to_bytes(figure, "pdf").startswith(b"%PDF")
    assert {"$x", f"{CROSS} $z"} < set(texts(figure))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(3, 3, 12, 16)}, r"images: expected uint8 .* got float32 of shape \(3, 3, 12, 16\)"),
        ({"images": torch.zeros(0, 3, 12, 16, dtype=torch.uint8)}, r"images: .*none of them 0"),
        ({"images": torch.zeros(3, 0, 12, 16, dtype=torch.uint8)}, r"images: .*\(3, 0, 12, 16\)"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels: expected integers of shape \(3,\)"),
        ({"labels": torch.zeros(3)}, r"labels: .*got float32"),
        ({"labels": torch.tensor([0, 1, 3])}, r"labels: expected each in \[0, 3\).*got 0 to 3"),
        ({"labels": torch.tensor([0, -1, 1])}, r"labels: .*got -1 to 1"),
        ({"heatmaps": torch.zeros(2, 3, 6, 8)}, r"heatmaps: expected floats of shape \(2, 3, 12, 16\)"),
        ({"heatmaps": torch.zeros(0, 3, 12, 16)}, r"heatmaps: .*N ≥ 1"),
        ({"heatmaps": torch.zeros(2, 3, 12, 16, dtype=torch.int64)}, "heatmaps: expected floats"),
        ({"heatmaps": torch.full((2, 3, 12, 16), -1.0)}, "heatmaps: expected no value below 0, got -1"),
        ({"probabilities": torch.zeros(2, 3, 4)}, r"probabilities: .*\(2, 3, 3\), got float32 of shape \(2, 3, 4\)"),
        ({"mixture": torch.zeros(3, 4)}, r"mixture: .*\(3, 3\)"),
        ({"classes": ("cat", "dog")}, r"labels: .*for 2 class names"),
    ],
)
def test_a_gallery_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        replace(made_up(), **changes)
    assert "\n" not in str(caught.value)


def test_galleries_of_other_images_are_refused(tmp_path: Path) -> None:
    gallery = made_up()
    others: dict[str, Any] = {
        "images": gallery.images.flip(0),
        "labels": gallery.labels.flip(0),
        "classes": ("cat", "dog", "cow"),
    }
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"galleries: expected the same {name} in all, those of number 2 differ"):
            write([gallery, replace(gallery, **{name: value})], tmp_path)
    for make in (draw, lambda galleries: write(galleries, tmp_path)):
        with pytest.raises(ValueError, match="galleries: expected at least 1, got none"):
            make([])
    with pytest.raises(ValueError, match="width: expected a positive number"):
        draw([gallery], 0)
    for stem in ("", "a/b", "a/"):
        with pytest.raises(ValueError, match="stem: expected a file name"):
            write([gallery], tmp_path, stem)
    assert list(tmp_path.iterdir()) == []


def test_collect_refuses_what_does_not_fit(model: ImmunityMoE) -> None:
    data, loss = split(9, seed=1), FusedImmunityLoss()
    with pytest.raises(ValueError, match="model: expected at least 1"):
        collect([], data, NAMES, 3, loss)
    with pytest.raises(ValueError, match="split: expected at least 1 image"):
        collect(model, Split(data.images[:0], data.labels[:0]), NAMES, 3, loss)
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        collect(model, data, NAMES, 0, loss)
    with pytest.raises(ValueError, match=r"classes: expected as many names as the models have classes \(3\), got 2"):
        collect(model, data, NAMES[:2], 3, loss)
