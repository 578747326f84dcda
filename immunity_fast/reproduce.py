"""`python -m immunity_fast.reproduce table1|table2|table3|figure2|all`: trains, evaluates, writes the paper's tables.

Runs lie in OUT/runs and are not done twice: not by another table, not after a kill. Start the command a second time,
beside the first, and both share the work. Each table is written as Markdown, CSV, HTML, PNG and JSON.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from immunity_fast.checkpoint import load_model
from immunity_fast.config import add_options, resolve_architecture
from immunity_fast.data.datasets import load
from immunity_fast.report import Table, write_report
from immunity_fast.reproduction import figure2 as figure2_files
from immunity_fast.reproduction import tables as paper
from immunity_fast.reproduction.charts import Panel, dot_chart, sweep_figure
from immunity_fast.reproduction.experiments import SCALES, Entry, Experiments, jobs_of
from immunity_fast.reproduction.gallery import Gallery, collect
from immunity_fast.reproduction.jobs import Done, Job, Queue
from immunity_fast.runtime import cli
from immunity_fast.runtime.files import write_atomically

Points = Sequence[tuple[float, Entry]]


@dataclass(frozen=True)
class Product:
    """What a command makes: its runs, and what is written of them.

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
    """Networks trained independently against Immunity."""
    entries = experiments.table1()

    def draw(queue: Queue, path: Path) -> list[tuple[Path, str]]:
        found = queue.done
        panels = [
            _panel("Clean accuracy", "%", entries, found, {"": paper.TABLE1["clean, exact mean, %"][0]}),
            _panel("IScore", "", entries, found, {"": paper.HEATMAPS["IScore"][0]}),
            _panel("CScore", "pixels⁴", entries, found, {"": paper.HEATMAPS["CScore, pixels⁴"][0]}, log=True),
        ]
        return _charted(panels, path, "Each architecture, trained independently and as Immunity.")

    lead = "Networks of one architecture, trained independently, against the same number trained as Immunity."
    return Product("Table 1", lead, entries, lambda queue: [paper.table1(entries, queue.done)], draw)


def table2(experiments: Experiments) -> Product:
    """The baselines and Immunity."""
    entries = experiments.table2()

    def draw(queue: Queue, path: Path) -> list[tuple[Path, str]]:
        found = queue.done
        shown = ("clean", "FGSM", "PGD-20", "AutoAttack", "PGD-20, closed-form EOT")
        columns = {name: value for name, (value, _) in paper.table2_columns("single", "switching").items()}
        panels = []
        for place in dict.fromkeys(entry.labels[:2] for entry in entries):
            own = [Entry(entry.labels[2:], entry.jobs) for entry in entries if entry.labels[:2] == place]
            series = {name: columns[name] for name in shown}
            panels.append(_panel(", ".join(place), "accuracy, %", own, found, series))
        return _charted(panels, path, "Accuracy, Immunity's with its gate switching, by attack.")

    lead = "Searched architectures as single networks, and Immunity; standard and adversarial training."
    return Product("Table 2", lead, entries, lambda queue: [paper.table2(entries, queue.done)], draw)


def table3(experiments: Experiments) -> Product:
    """The ablation, switch modes, and sweeps of both coefficients."""
    rows = experiments.table3()
    sweeps = {"β": experiments.sweep("beta"), "γ": experiments.sweep("gamma")}
    full = next(entry for entry in rows if entry.labels == ("full",))

    def tables(queue: Queue) -> list[Table]:
        found = queue.done
        return [
            paper.table3(rows, found),
            paper.switch_modes(full, found),
            *(paper.sweep_table(points, name, found) for name, points in sweeps.items()),
        ]

    def draw(queue: Queue, path: Path) -> list[tuple[Path, str]]:
        found = queue.done
        measures = {
            "clean accuracy, exact mean (%)": paper.TABLE3["clean, exact mean"][0],
            "under PGD-20 on the exact mean (%)": paper.TABLE3["PGD-20 on the exact mean, answered by it"][0],
            "mutual information (nats)": paper.HEATMAPS["mutual information, nats"][0],
            "CScore (pixels⁴)": paper.HEATMAPS["CScore, pixels⁴"][0],
        }
        curves = {name: _curves(points, found, measures) for name, points in sweeps.items()}
        if not any(points for measured in curves.values() for points in measured.values()):
            return []
        config = full.jobs[0].config
        sweep_figure(curves, path, marked={"β": config.beta, "γ": config.gamma}, log=["CScore (pixels⁴)"])
        return [(path, "Each coefficient, the other at its default, which the line marks.")]

    entries = [*rows, *(entry for points in sweeps.values() for _, entry in points)]
    lead = "What each of the two losses does, what is lost by detached weights, and what answers under attack."
    return Product("Table 3", lead, entries, tables, draw)


def figure2(experiments: Experiments) -> Product:
    """Where networks trained independently, and Immunity's experts, look."""
    entries = experiments.figure2()
    made: list[Gallery] = []

    def galleries(queue: Queue) -> list[Gallery]:
        if not made:
            device = cli.pick_device(queue.device)
            config = entries[0].jobs[0].config
            dataset = load(config.dataset, queue.data, image_size=config.image_size).to(device)
            for entry in entries:
                job = entry.jobs[0]
                if job in queue.done:
                    model, _ = load_model(queue.folder / job.name, device)
                    loss_fn = job.config.loss_fn(dataset.image_size)
                    shown = (dataset.test, dataset.classes, experiments.scale.images, loss_fn)
                    made.append(collect(model, *shown, title=entry.labels[0]))
        return made

    def tables(queue: Queue) -> list[Table]:
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
    return Product("Figure 2", lead, entries, tables, draw, page=False)


MOST_SEEDS = 1000  # more are a mistyped number

PRODUCTS: dict[str, Callable[[Experiments], Product]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "figure2": figure2,
}


def write(name: str, product: Product, queue: Queue, folder: Path, command: str) -> None:
    """All files of a table or figure, from what its runs have found."""
    own = {job: queue.done[job] for job in jobs_of(product.entries) if job in queue.done}
    tables = product.tables(queue)
    failed = [
        f"{job.name}: {queue.failures[job]}" for job in dict.fromkeys(jobs_of(product.entries)) if job in queue.failures
    ]
    facts = facts_of(own)
    text = [table.to_markdown() for table in tables]
    text += ["Made by `" + command + "`; " + ", ".join(f"{key}: {value}" for key, value in facts.items()) + "."]
    text += ["Failed runs:\n\n" + "\n".join(f"* {line}" for line in failed)] if failed else []
    text += ["The runs, one after another:\n\n```sh\n" + "\n".join(commands_of(own)) + "\n```"]
    write_atomically(folder / f"{name}.md", ("\n\n".join(text) + "\n").encode())
    write_atomically(folder / f"{name}.csv", to_csv(tables).encode())
    content = record(tables, own, failed, command)
    write_atomically(folder / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
    figures = product.draw(queue, folder / f"{name}.png")
    if product.page:
        write_report(
            folder / f"{name}.html",
            title=product.title,
            lead="\n".join([product.lead, *(f"Failed: {line}" for line in failed)]),
            facts=facts,
            tables=tables,
            figures=figures,
            commands={"Make all of it": command, "Its runs, one after another": "\n".join(commands_of(own))},
            settings={},
        )
        for table in tables:
            cli.console.print()
            cli.console.print(table.to_markdown())
    cli.console.print(f"\n{', '.join(str(file) for file in sorted(folder.glob(f'{name}.*')))}")


def facts_of(found: Mapping[Job, Done]) -> dict[str, str]:
    """Machine and time of some runs."""
    if not found:
        return {}
    devices = sorted({done.device for done in found.values()})
    versions = sorted({done.versions["torch"] for done in found.values()})
    return {
        "device": "; ".join(devices),
        "torch": "; ".join(versions),
        "runs": str(len(found)),
        "training": duration(sum(done.training_seconds for done in found.values())),
        "attacks": duration(sum(done.attack_seconds for done in found.values())),
    }


def duration(seconds: float) -> str:
    """For people."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def commands_of(found: Mapping[Job, Done]) -> list[str]:
    """The commands of some runs, each once, in an order in which they can be given."""
    return list(dict.fromkeys(command for done in found.values() for command in done.commands))


def record(tables: Sequence[Table], found: Mapping[Job, Done], failed: Sequence[str], command: str) -> dict[str, Any]:
    """What is kept of a table: its cells as they are shown, and of each run settings, commands, machine, time."""
    return {
        "command": command,
        "tables": [
            {"caption": t.caption, "columns": list(t.columns), "rows": [list(row) for row in t.rows], "note": t.note}
            for t in tables
        ],
        "runs": {
            job.name: {key: value for key, value in dataclasses.asdict(done).items() if key != "results"}
            for job, done in found.items()
        },
        "failed": list(failed),
    }


def to_csv(tables: Sequence[Table]) -> str:
    """Tables one after another, each under its caption."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for table in tables:
        writer.writerow([table.caption])
        writer.writerow(table.columns)
        writer.writerows(table.rows)
        writer.writerow([])
    return text.getvalue()


def _panel(
    heading: str,
    axis: str,
    entries: Sequence[Entry],
    found: paper.Found,
    series: Mapping[str, paper.Value],
    *,
    log: bool = False,
) -> Panel:
    """Of rows with two labels the second is the series; of rows with one, the series are the values."""
    values: dict[str, dict[str, tuple[float, float]]] = {}
    for entry in entries:
        for name, value in series.items():
            got = paper.number(entry, found, value)
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
    points: Points, found: paper.Found, measures: Mapping[str, paper.Value]
) -> dict[str, list[tuple[float, float, float]]]:
    curves: dict[str, list[tuple[float, float, float]]] = {name: [] for name in measures}
    for x, entry in points:
        for name, value in measures.items():
            got = paper.number(entry, found, value)
            if got is not None:
                curves[name].append((x, *got))
    return curves


@dataclass(frozen=True)
class Request:
    """What a command line asks for."""

    products: dict[str, Product]
    folder: Path
    device: str
    data: str | None
    done_only: bool


def parse(arguments: list[str] | None) -> Request:
    """The request of a command line; ValueError for settings out of range."""
    parser = cli.Parser(
        prog="python -m immunity_fast.reproduce",
        description=(__doc__ or "").split("\n")[0],
        epilog="All other options change that setting in every run, unless it is what a table compares.",
    )
    parser.add_argument("what", choices=(*PRODUCTS, "all"))
    parser.add_argument("--scale", choices=tuple(SCALES), default="smoke", help="how much is trained [smoke]")
    parser.add_argument("--out", type=cli.path, metavar="DIR", help="folder; default: reproduction-SCALE")
    parser.add_argument("--seeds", type=int, metavar="INT", help="how many, from --seed on; default: the scale's")
    parser.add_argument("--done-only", action="store_true", help="train nothing; write the tables of what is done")
    add_options(parser)
    given = vars(parser.parse_args(arguments))
    what, scale, out, seeds, done_only = (given.pop(name) for name in ("what", "scale", "out", "seeds", "done_only"))
    device, data, dataset = given.pop("device", "auto"), given.pop("data", None), given.pop("dataset", None)
    if "preset" in given:
        raise ValueError("--preset: --scale takes its place")
    if given.get("experts", 2) < 2:
        raise ValueError(f"--experts: expected at least 2, got {given['experts']}")
    if seeds is not None and not 1 <= seeds <= MOST_SEEDS:
        limit = "at least 1" if seeds < 1 else f"at most {MOST_SEEDS}"
        raise ValueError(f"--seeds: expected {limit}, got {seeds}")
    if dataset in ("npz", "folder") and data is None:
        raise ValueError(f"--data: missing; --dataset {dataset} needs the path of what it reads")
    resolve_architecture(given)
    wanted = list(PRODUCTS) if what == "all" else [what]
    if "table2" in wanted and importlib.util.find_spec("torchattacks") is None:
        raise ValueError("table2 needs torchattacks: pip install torchattacks")
    experiments = Experiments(SCALES[scale], given, seeds, dataset)
    cli.pick_device(device)
    products = {name: PRODUCTS[name](experiments) for name in wanted}
    for product in products.values():
        for job in jobs_of(product.entries):
            job.alone()  # whose seeds can be too large where the job's own is not
    return Request(products, out or Path(f"reproduction-{scale}"), device, data, done_only)


@cli.resumable("reproduce")
@cli.enough_memory("a smaller --batch-size, fewer --experts, or a smaller --arch")
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    try:
        request = parse(arguments)
    except ValueError as error:
        raise cli.InputError(str(error)) from error
    command = f"python -m immunity_fast.reproduce {shlex.join(sys.argv[1:] if arguments is None else arguments)}"
    try:
        queues = {
            name: Queue(request.folder / "runs", jobs_of(product.entries), device=request.device, data=request.data)
            for name, product in request.products.items()
        }
    except (ValueError, ModuleNotFoundError) as error:
        raise cli.InputError(str(error)) from error
    failures: dict[str, str] = {}

    def finish(name: str) -> None:
        request.folder.mkdir(parents=True, exist_ok=True)
        write(name, request.products[name], queues[name], request.folder, command)
        failures.update({job.name: line for job, line in queues[name].failures.items()})

    left = []
    for name, queue in queues.items():
        if request.done_only:
            queue.look()
            cli.console.print(f"{name}: {len(queue.done)} of {len(queue.jobs)} runs are done")
            finish(name)
        elif queue.run(wait=False):
            finish(name)
        else:
            left.append(name)
    for name in left:  # another process is at some of their runs
        queues[name].run()
        finish(name)
    if failures:
        raise cli.InputError(f"{len(failures)} failed, the same command tries them again: {', '.join(failures)}")


if __name__ == "__main__":
    cli.run_command(main)
