"""What an evaluation found: accuracies with intervals, worst cases, what is drawn; as JSON and as tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from immunity_fast.attacks import radius_of
from immunity_fast.evaluation.drawing import drawn, drawn_table
from immunity_fast.evaluation.least import least_table
from immunity_fast.evaluation.masking import masking, masking_table, stuck
from immunity_fast.evaluation.metrics import HeatmapSums, combined
from immunity_fast.evaluation.plan import Row
from immunity_fast.evaluation.poisoned import CLEAN, poison_table
from immunity_fast.evaluation.runner import Evaluation, bits, mean_loss
from immunity_fast.evaluation.targets import MixtureTarget
from immunity_fast.evaluation.words import COLUMNS, JUDGES, NAMES, find, gate_in, knows, percent, radius_words, share
from immunity_fast.models.gate import kind_of_gate
from immunity_fast.models.noise import SHARED, MeanOfPasses
from immunity_fast.reporting.html import Table
from immunity_fast.runtime.failures import readable

# What makes an attack what it is called: (attack, the plan's setting, of what, as published).
PUBLISHED = (
    ("autoattack", "autoattack_steps", "steps", 100),
    ("autoattack", "queries", "queries", 5000),
    ("arc", "arc_steps", "steps", 20),
    ("mora", "mora_steps", "steps", 100),
)
IN_FLOAT32 = ("arc", "mora", "autoattack")  # whose gradients are, whatever `Plan.amp` says


class Results(dict[str, Any]):
    """What an evaluation found, as `results` says; where it is shown, its tables.

    Attributes:
        report: the file for a browser, where one was written.
    """

    report: Path | None = None

    def tables(self) -> list[Table]:
        """See `tables`."""
        return tables(self)

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        place = f"<p>{escape(self._place())}</p>" if self.report else ""
        return "".join(table.to_html() for table in tables(self)) + place

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """IPython's text of it: what is kept beside the HTML in a notebook's file."""
        printer.text("\n\n".join([*(table.to_markdown() for table in tables(self)), self._place()]).strip())

    def _place(self) -> str:
        return "" if self.report is None else f"report: {readable(str(self.report))}"


def results(evaluation: Evaluation) -> Results:
    """What an evaluation found so far, as a JSON object:

    * accuracy: {attack, attacker (None: nobody), judge, correct, images, accuracy, interval (Wilson, 95 %), seconds};
    * worst_case: the same by judge, an image being right if it was under every attack of every attacker; none where
      nothing was attacked;
    * left_out: {attack, attacker, why}, what was asked for and is not among them;
    * unmoved: {attack, attacker, unmoved, right, images}: images whose gradient was exactly zero at every step, so that
      the attack could not move them, and how many of them the exact attacker's objective gets right: they count as
      withstanding;
    * radii: {eps, accuracy, worst_case, drawn, white_box} of each radius, from the least on, with clean images and
      noise; white_box: {worst_case, drawn} of the attacks that know the model, transferred images and noise left out;
    * drawn: of what is random, see `drawing.drawn`; the last, "worst case", is that of each image over all attacks;
    * curves: "eps" and "steps", by the exact attacker, judged on what it attacks; "draws", by EOT, the expectation;
    * masking: {check, passed, finding};
    * heatmaps: "clean" and "attacked" (by PGD-20 on the gate's mean), see `metrics.combined`; for mixtures;
    * poison: see `poisoned.measured`; added by `report.write`, of what was trained on poisoned images;
    * plan: what was asked for;
    * gate: of a mixture whose gate is not permuted, its kind, "selection" or "uniform";
    * passes: of a network with noise, {answer: how many are averaged to an answer, all: of how many for ten answers}.
    """
    found: dict[str, Any] = {"accuracy": [], "worst_case": [], "plan": asdict(evaluation.plan)}
    found["left_out"] = evaluation.left_out
    found["unmoved"] = list(_unmoved(evaluation))
    found["radii"] = [_at_radius(evaluation, radius) for radius in evaluation.plan.radii]
    own = next(each for each in found["radii"] if each["eps"] == evaluation.plan.radius)
    rows = [Row("clean"), *_rows_at(evaluation, evaluation.plan.radius)]
    found["accuracy"] = [entry | {"seconds": seconds} for entry, seconds in _accuracies(evaluation, rows)]
    found["worst_case"], found["drawn"] = own["worst_case"], own["drawn"]
    if isinstance(evaluation.target, MixtureTarget):
        found["transfer_from_experts"] = _from_experts(evaluation)
        if (kind := kind_of_gate(evaluation.target.model.gate)) != "switch":
            found["gate"] = kind
    answer = getattr(evaluation.target, "answer", None)
    if isinstance(answer, MeanOfPasses):
        found["passes"] = {"answer": answer.passes, "all": SHARED * answer.passes}
    found["curves"] = _curves(evaluation)
    found["masking"] = masking(evaluation, found)
    heatmaps = _heatmaps(evaluation)
    return Results(found | ({"heatmaps": heatmaps} if heatmaps else {}))


def _rows_at(evaluation: Evaluation, radius: float) -> list[Row]:
    """The rows of a radius, and the clean images, which have none."""
    return [
        row
        for row in evaluation.rows
        if row.kind == "subset" or (evaluation.plan.radius if row.eps is None else row.eps) == radius
    ]


def _accuracies(evaluation: Evaluation, rows: Sequence[Row]) -> Iterable[tuple[dict[str, Any], float]]:
    """An entry for each row and judge, and the seconds that its attack took."""
    for row in rows:
        pieces = evaluation.results(row)
        seconds = sum(piece["seconds"] for piece in pieces)
        for judge in evaluation.target.judges if pieces else ():
            name = {"attack": row.attack or row.kind, "attacker": row.attacker or None, "judge": judge}
            yield name | share(bits(pieces, judge)), round(seconds, 3)


def _at_radius(evaluation: Evaluation, radius: float) -> dict[str, Any]:
    """What was found with one radius, as `results` says it of `radii`."""
    rows = _rows_at(evaluation, radius)
    accuracies = [entry for entry, _ in _accuracies(evaluation, rows)]
    found: dict[str, Any] = {"eps": radius, "accuracy": accuracies, "worst_case": []}
    finished = [(row, pieces) for row in rows if (pieces := evaluation.results(row))]
    if any(row.kind == "attack" for row, _ in finished):
        found["worst_case"] = _worst_of(evaluation, [pieces for _, pieces in finished])
    exact = evaluation.target.shares_are_exact
    entries = [drawn(row.attack or row.kind, row.attacker or None, [pieces], exact) for row, pieces in finished]
    if found["worst_case"]:
        entries.append(drawn("worst case", "all", [pieces for _, pieces in finished], exact))
    found["drawn"] = [entry for entry in entries if entry is not None]
    # The clean images too: an attack that moves an image away from what was wrong has not made it right.
    knowing = [pieces for row, pieces in finished if row.kind in ("attack", "subset") and row.attacker != "transfer"]
    if any(row.kind == "attack" and row.attacker != "transfer" for row, _ in finished):
        found["white_box"] = {
            "worst_case": _worst_of(evaluation, knowing),
            "drawn": drawn("worst case", "all", knowing, exact),
        }
    return found


def _worst_of(evaluation: Evaluation, columns: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """By each judge, which images were right in all of some rows' pieces."""
    found = []
    for judge in evaluation.target.judges:
        right = [all(bits_) for bits_ in zip(*(bits(pieces, judge) for pieces in columns), strict=False)]
        found.append({"judge": judge} | share(right))
    return found


def worst_case(evaluation: Evaluation, judge: str) -> dict[str, Any]:
    """The accuracy of the worst case over all attacks, on the images that all of them have finished.

    Args:
        evaluation: finished or not.
        judge: of the target's `judges`.

    Returns:
        {correct, images, accuracy, interval}.
    """
    rows = _rows_at(evaluation, evaluation.plan.radius)
    columns = [bits(evaluation.results(row), judge) for row in rows]
    whole = min(len(column) for column in columns)
    return share([all(column[i] for column in columns) for i in range(whole)])


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The tables that a person reads, of `results`: accuracies, each expert's, heatmaps, signs of masking."""
    judges = [name for name in JUDGES if any(entry["judge"] == name for entry in found["accuracy"])]
    by_row: dict[tuple[str, str | None], dict[str, Any]] = {}
    for entry in [*found["accuracy"], *found.get("transfer_from_experts", [])]:
        by_row.setdefault((entry["attack"], entry["attacker"]), {})[entry["judge"]] = entry
    rows, gate = [], gate_in(found)
    for (attack, attacker), cells in by_row.items():
        if attacker is not None and attacker.startswith("expert "):
            continue  # together they are one row, "any expert"
        images = f"{next(iter(cells.values()))['images']:,}"
        rows.append(
            [NAMES[attack], knows(attack, attacker, gate), images, *(percent(cells.get(judge)) for judge in judges)]
        )
    order = list(NAMES.values())
    rows.sort(key=lambda row: order.index(row[0]))
    last = {entry["judge"]: entry for entry in found["worst_case"]}
    if last:
        images = f"{next(iter(last.values()))['images']:,}"
        rows.append(
            ["worst case for each image", "all of the above", images, *(percent(last.get(judge)) for judge in judges)]
        )
    plan = found["plan"]
    radius = radius_words(radius_of(plan["eps"], plan["norm"]), plan["norm"])
    note = f"{plan['norm']}, ε = {radius}. ± is half the 95 % Wilson interval. Columns say what answers"
    if "mean" in judges:
        note += f": {COLUMNS[gate]}"
    if passes := found.get("passes"):
        note += f": the mean of {passes['answer']} passes with noise, of which attackers differentiate one, or several"
    note += "."
    if plan.get("amp", "off") != "off":
        exempt = [NAMES[name] for name in IN_FLOAT32 if name in plan["attacks"]]
        note += f" Gradients were taken in bfloat16{', without those of ' if exempt else ''}{', '.join(exempt)}; "
        note += "everything is judged in float32."
    note += "".join(
        f" {NAMES[name]} had {plan[setting]:,} {unit} instead of {published:,}."
        for name, setting, unit, published in PUBLISHED
        if name in plan["attacks"] and plan.get(setting, published) < published
    )
    accuracy = Table(
        "Test accuracy, %",
        ["attack", "what the attacker differentiates", "images", *(JUDGES[judge] for judge in judges)],
        rows,
        note,
    )
    others = (
        poison_table,
        drawn_table,
        _expert_table,
        _heatmap_table,
        _left_out_table,
        _unmoved_table,
        _draws_table,
        masking_table,
        least_table,
    )
    return [accuracy, *(table for make in others for table in make(found))]


def to_csv(found: Mapping[str, Any]) -> str:
    """`results` as CSV, an accuracy a line: attack, attacker, judge, correct, images, accuracy, low, high."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["attack", "attacker", "judge", "correct", "images", "accuracy", "low", "high"])
    worst = [{"attack": "worst case", "attacker": "all", **entry} for entry in found["worst_case"]]
    poison = [
        {"attack": f"trigger: {entry['measure']}", "attacker": None, **entry}
        for entry in found.get("poison", {}).get("accuracy", [])
        if entry["measure"] != CLEAN  # which is there without it
    ]
    for entry in [*found["accuracy"], *found.get("transfer_from_experts", []), *worst, *poison]:
        numbers = [entry["correct"], entry["images"], entry["accuracy"], *entry["interval"]]
        writer.writerow([entry["attack"], entry["attacker"] or "", entry["judge"], *numbers])
    return text.getvalue()


def _from_experts(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Accuracies by attack and judge, an image being right if it was against every expert's adversarial image."""
    right: dict[tuple[str, str], list[bool]] = {}
    for row in evaluation.rows:
        transferred = row.eps is None and row.attacker.startswith("expert ")
        pieces = evaluation.results(row) if transferred else []
        for judge in evaluation.target.judges if pieces else ():
            own = bits(pieces, judge)
            right[row.attack, judge] = [a and b for a, b in zip(right.get((row.attack, judge), own), own, strict=False)]
    return [
        {"attack": attack, "attacker": "any expert", "judge": judge} | share(values)
        for (attack, judge), values in right.items()
    ]


def _unmoved(evaluation: Evaluation) -> Iterable[dict[str, Any]]:
    for row in evaluation.rows:
        pieces = [piece for piece in evaluation.results(row) if "unmoved" in piece and row.eps is None]
        stuck = [bit == "1" for piece in pieces for bit in piece["unmoved"]]
        if any(stuck):
            right = bits(pieces, evaluation.target.exact)
            yield {
                "attack": row.attack,
                "attacker": row.attacker,
                "unmoved": sum(stuck),
                "right": sum(a and b for a, b in zip(stuck, right, strict=True)),
                "images": len(stuck),
            }


def _curves(evaluation: Evaluation) -> dict[str, list[dict[str, Any]]]:
    curves: dict[str, list[dict[str, Any]]] = {"eps": [], "steps": [], "draws": []}
    for row in evaluation.curves:
        chunks = [piece["points"] for piece in evaluation.results(row)]
        for points in zip(*chunks, strict=True):  # the same point in all chunks
            place = {row.kind: points[0][row.kind]}
            if row.kind == "draws":  # judged by what answers at random: by its expectation, not by a draw
                entry = drawn("", None, [points], exact=True)
                assert entry is not None
                accuracy = {name: entry[name] for name in ("images", "accuracy", "interval")}
            else:
                accuracy = share(bits(points, evaluation.target.exact))
            curves[row.kind].append(place | accuracy | {"loss": mean_loss(points)})
    return curves


def _heatmaps(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    found = {}
    for row in filter(evaluation.has_heatmaps, evaluation.rows):  # a piece of another radius may have some, too
        pieces = [piece for piece in evaluation.results(row) if "heatmaps" in piece]
        if pieces:
            name = "clean" if row.kind == "subset" else "attacked"
            found[name] = combined([HeatmapSums.from_json(piece["heatmaps"]) for piece in pieces])
    return found


def _expert_table(found: Mapping[str, Any]) -> Iterable[Table]:
    experts = list(dict.fromkeys(entry["judge"] for entry in found["accuracy"] if entry["judge"].startswith("expert ")))
    if not experts:
        return
    rows = []
    for attack in NAMES:
        for attacker in (None, "mean"):
            cells = [find(found, attack, attacker, judge) for judge in experts]
            if any(cells):
                rows.append(
                    [NAMES[attack], knows(attack, attacker, gate_in(found)), *(percent(cell) for cell in cells)]
                )
        own = [find(found, attack, judge, judge) for judge in experts]
        if any(own):
            rows.append([NAMES[attack], "this expert alone", *(percent(cell) for cell in own)])
    yield Table("Accuracy of each expert alone, %", ["attack", "what the attacker differentiates", *experts], rows)


def _heatmap_table(found: Mapping[str, Any]) -> Iterable[Table]:
    measured = found.get("heatmaps", {})
    if not measured:
        return
    titles = {"clean": "clean images", "attacked": "under PGD-20 on gate mean"}
    shown = [name for name in titles if name in measured]
    lines = {
        "mutual_information": ("mutual information, nats", "{:.3f}", "0: all experts look at the same place"),
        "iscore": ("IScore", "{:.1f}", "mean squared difference of two experts' heatmaps"),
        "cscore": ("CScore, pixels⁴", "{:,.0f}", "how much the distance between two focuses varies"),
        "dead_heatmaps": ("dead heatmaps", "{:.1%}", "heatmaps that are zero everywhere"),
    }
    rows = [
        [title, *(form.format(measured[name][key]) for name in shown), says]
        for key, (title, form, says) in lines.items()
    ]
    yield Table("The experts' heatmaps", ["measure", *(titles[name] for name in shown), "what it says"], rows)


def _draws_table(found: Mapping[str, Any]) -> Iterable[Table]:
    rows = [[f"{point['draws']:,}", percent(point)] for point in found["curves"].get("draws", [])]
    if rows:
        yield Table(
            "PGD-20 on the average over draws (EOT): expected accuracy, %",
            ["draws in a gradient", "accuracy"],
            rows,
            "Where more draws find no more, the average is saturated.",
        )


def _left_out_table(found: Mapping[str, Any]) -> Iterable[Table]:
    by_reason: dict[tuple[str, str], list[str]] = {}
    for pair in found.get("left_out", []):
        by_reason.setdefault((pair["attack"], pair["why"]), []).append(pair["attacker"])
    rows = [[NAMES[attack], ", ".join(names), why] for (attack, why), names in by_reason.items()]
    if rows:
        yield Table("Left out: not attacked, and in no worst case", ["attack", "attackers", "why"], rows)


def _unmoved_table(found: Mapping[str, Any]) -> Iterable[Table]:
    rows = []
    for entry in found.get("unmoved", []):
        rows.append(
            [
                NAMES[entry["attack"]],
                knows(entry["attack"], entry["attacker"], gate_in(found)),
                stuck(entry),
                f"{entry['right']:,}",
            ]
        )
    if rows:
        yield Table(
            "Images that could not be attacked: their gradient is exactly zero",
            ["attack", "what the attacker differentiates", "not moved", "of them counted as withstanding"],
            rows,
            "They stay where the attack began, and say nothing of how robust the model is; attacks on other losses, or "
            "without gradients, may fool it on them.",
        )
