"""What the command makes: the paper's three tables and Figure 2, and a comparison: their runs, how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from immunity_fast.data.datasets import load
from immunity_fast.evaluation.words import radius_words
from immunity_fast.reporting.html import Table
from immunity_fast.reproduction import figure2 as figure2_files
from immunity_fast.reproduction import peer_tables, tables
from immunity_fast.reproduction.charts import Panel, dot_chart, sweep_figure
from immunity_fast.reproduction.experiments import Entry, Experiments
from immunity_fast.reproduction.gallery import Gallery, collect
from immunity_fast.reproduction.jobs import Queue
from immunity_fast.reproduction.peers import Comparison
from immunity_fast.runtime import cli
from immunity_fast.training.checkpoint import load_model

Points = Sequence[tuple[float, Entry]]


@dataclass(frozen=True)
class Product:
    """What a command makes: its runs, and what is written of them.

    Args:
        title, lead: of its page.
        entries: its rows, with the runs that each needs.
        tables: from what the queue has done.
        draw: writes figures beside the given PNG file, and returns (PNG file, caption) of each.
        page: whether the HTML page is a report; or else `draw` writes one.
    """

    title: str
    lead: str
    entries: list[Entry]
    tables: Callable[[Queue], list[Table]]
    draw: Callable[[Queue, Path], list[tuple[Path, str]]]
    page: bool = True


def table1(experiments: Experiments) -> Product:
    """Table 1: networks trained independently against Immunity, by architecture."""
    entries = experiments.table1()

    def draw(queue: Queue, path: Path) -> list[tuple[Path, str]]:
        found = queue.done
        panels = [
            _panel("Clean accuracy", "%", entries, found, {"": tables.TABLE1["clean, gate mean, %"][0]}),
            _panel("IScore", "", entries, found, {"": tables.HEATMAPS["IScore"][0]}),
            _panel("CScore", "pixels⁴", entries, found, {"": tables.HEATMAPS["CScore, pixels⁴"][0]}, log=True),
        ]
        return _charted(panels, path, "Each architecture, trained independently and as Immunity.")

    lead = "Networks of one architecture, trained independently, against the same number trained as Immunity."
    return Product("Table 1", lead, entries, lambda queue: [tables.table1(entries, queue.done)], draw)


def table2(experiments: Experiments) -> Product:
    """Table 2: searched architectures as single networks against Immunity, by data and training."""
    entries = experiments.table2()

    def draw(queue: Queue, path: Path) -> list[tuple[Path, str]]:
        found = queue.done
        attacks = ("clean", "FGSM", "PGD-20", "AutoAttack", "PGD-20 on gate mean")
        columns = {name: value for name, (value, _) in tables.table2_columns("sample", "sample").items()}
        panels = []
        for place in dict.fromkeys(entry.labels[:2] for entry in entries):
            own = [Entry(entry.labels[2:], entry.jobs) for entry in entries if entry.labels[:2] == place]
            series = {name: columns[name] for name in attacks}
            panels.append(_panel(", ".join(place), "accuracy, %", own, found, series))
        return _charted(panels, path, "Accuracy, Immunity's with gate sample, by attack.")

    lead = "Searched architectures as single networks, and Immunity; standard and adversarial training."
    return Product("Table 2", lead, entries, lambda queue: [tables.table2(entries, queue.done)], draw)


def table3(experiments: Experiments) -> Product:
    """Table 3: the ablation, what answers against which attacker, and sweeps of both coefficients."""
    rows = experiments.table3()
    sweeps = {"β": experiments.sweep("beta"), "γ": experiments.sweep("gamma")}
    full = next(entry for entry in rows if entry.labels == ("full",))

    def its_tables(queue: Queue) -> list[Table]:
        found = queue.done
        return [
            tables.table3(rows, found),
            tables.switch_modes(full, found),
            *(tables.sweep_table(points, name, found) for name, points in sweeps.items()),
        ]

    def draw(queue: Queue, path: Path) -> list[tuple[Path, str]]:
        found = queue.done
        measures = {
            "clean accuracy, gate mean (%)": tables.TABLE3["clean, gate mean"][0],
            "under PGD-20 on gate mean (%)": tables.TABLE3["PGD-20 on gate mean, answered by it"][0],
            "mutual information (nats)": tables.HEATMAPS["mutual information, nats"][0],
            "CScore (pixels⁴)": tables.HEATMAPS["CScore, pixels⁴"][0],
        }
        curves = {name: _curves(points, found, measures) for name, points in sweeps.items()}
        if not any(points for measured in curves.values() for points in measured.values()):
            return []
        config = full.jobs[0].config
        sweep_figure(curves, path, marked={"β": config.beta, "γ": config.gamma}, log=["CScore (pixels⁴)"])
        return [(path, "Each coefficient, the other at its default, which the line marks.")]

    entries = [*rows, *(entry for points in sweeps.values() for _, entry in points)]
    lead = "What each of the two losses does, what is lost by detached weights, and what answers under attack."
    return Product("Table 3", lead, entries, its_tables, draw)


def figure2(experiments: Experiments) -> Product:
    """Where networks trained independently, and Immunity's experts, look."""
    entries = experiments.figure2()
    made: list[Gallery] = []

    def galleries(queue: Queue) -> list[Gallery]:
        if not made:
            device = cli.pick_device(queue.device)
            config = entries[0].jobs[0].config
            dataset = load(config.dataset, queue.data, image_size=config.image_size, channels=config.channels).to(
                device
            )
            for entry in entries:
                job = entry.jobs[0]
                if job in queue.done:
                    model, _ = load_model(queue.folder / job.name, device)
                    loss_fn = job.config.loss_fn(dataset.image_size)
                    images = (dataset.test, dataset.classes, experiments.scale.images, loss_fn)
                    made.append(collect(model, *images, title=entry.labels[0]))
        return made

    def its_tables(queue: Queue) -> list[Table]:
        rows = [
            [
                gallery.title,
                f"{image + 1}",
                f"{expert + 1}",
                gallery.classes[label],
                gallery.classes[int(p.argmax())],
                f"{100 * float(p.max()):.1f}",
            ]
            for gallery in galleries(queue)
            for image, label in enumerate(gallery.labels.tolist())
            for expert, p in enumerate(gallery.probabilities[:, image])
        ]
        return [
            Table("Figure 2", ["networks", "image", "expert", "class", "the expert's answer", "its share, %"], rows)
        ]

    def draw(queue: Queue, path: Path) -> list[tuple[Path, str]]:
        if galleries(queue):
            figure2_files.write(galleries(queue), path.parent, path.stem)
        return []

    lead = "Where networks that were trained independently, and Immunity's experts, look."
    return Product("Figure 2", lead, entries, its_tables, draw, page=False)


def peers(experiments: Experiments) -> Product:
    """Ways to train an ensemble beside each other, trained and attacked alike, and what each costs."""
    comparison = Comparison(experiments)
    radii = sorted(experiments.scale.comparison.evaluation.radii())

    def draw(queue: Queue, path: Path) -> list[tuple[Path, str]]:
        panels = [
            Panel(f"ε = {radius_words(eps, 'Linf')}", "accuracy, %", peer_tables.samples(comparison, queue.done, eps))
            for eps in radii
        ]
        return _charted(panels, path, "What is left under the worst of all attacks for each image.")

    lead = "Ways to train an ensemble, on the same images and with the same epochs, attacked alike; and their costs."
    return Product(
        "Ways to train an ensemble",
        lead,
        comparison.queue(),
        lambda queue: peer_tables.tables(comparison, queue.done),
        draw,
    )


PAPER: dict[str, Callable[[Experiments], Product]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "figure2": figure2,
}
PRODUCTS: dict[str, Callable[[Experiments], Product]] = {**PAPER, "peers": peers}


def _panel(
    heading: str,
    axis: str,
    entries: Sequence[Entry],
    found: tables.Found,
    series: Mapping[str, tables.Value],
    *,
    log: bool = False,
) -> Panel:
    """Of rows with two labels the second is the series; of rows with one, the series are the values."""
    values: dict[str, dict[str, tuple[float, float]]] = {}
    for entry in entries:
        for name, value in series.items():
            got = tables.number(entry, found, value)
            if got is not None:
                values.setdefault(name or entry.labels[1], {})[entry.labels[0]] = got
    return Panel(heading, axis, values, log)


def _charted(panels: Sequence[Panel], path: Path, caption: str) -> list[tuple[Path, str]]:
    drawn = [panel for panel in panels if panel.values]
    if not drawn:
        return []
    dot_chart(drawn, path)
    return [(path, f"{caption} Whiskers are the spread that the table names.")]


def _curves(
    points: Points, found: tables.Found, measures: Mapping[str, tables.Value]
) -> dict[str, list[tuple[float, float, float]]]:
    curves: dict[str, list[tuple[float, float, float]]] = {name: [] for name in measures}
    for x, entry in points:
        for name, value in measures.items():
            got = tables.number(entry, found, value)
            if got is not None:
                curves[name].append((x, *got))
    return curves
