"""What an evaluation found: accuracies with intervals, worst cases, signs of masking; as JSON and as tables."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from immunity_fast.attacks import EPS, radius_of
from immunity_fast.evaluation.gate_attackers import DESCRIPTIONS, GATE_WORDS
from immunity_fast.evaluation.metrics import HeatmapSums, combined, wilson_interval
from immunity_fast.evaluation.runner import Evaluation, Row, bits, mean_loss
from immunity_fast.evaluation.targets import MixtureTarget
from immunity_fast.reporting.html import Table
from immunity_fast.runtime.failures import readable

NAMES = {
    "clean": "clean",
    "subset": "clean, the attacked images",
    "noise": "random noise of the same size",
    "fgsm": "FGSM",
    "bim": "BIM-10",
    "mim": "MIM-10",
    "pgd": "PGD-20",
    "cw": "PGD-20 on the CW margin",
    "dlr": "PGD-20 on DLR",
    "square": "Square (no gradients)",
    "autoattack": "AutoAttack",
}
JUDGES = {name: GATE_WORDS[name] for name in ("sample", "mean", "off", "worst")} | {"output": "accuracy"}
SLACK = 0.01  # by so much a weaker attack may do better before it counts as a sign of masking


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
    * curves: "eps" and "steps", by the exact attacker, judged on what it attacks;
    * masking: {check, passed, finding};
    * heatmaps: "clean" and "attacked" (by PGD-20 on the gate's mean), see `metrics.combined`; for mixtures;
    * plan: what was asked for.
    """
    found: dict[str, Any] = {"accuracy": [], "worst_case": [], "plan": asdict(evaluation.plan)}
    found["left_out"] = evaluation.left_out
    found["unmoved"] = list(_unmoved(evaluation))
    survivors: dict[str, list[bool]] = {}
    for row in [Row("clean"), *evaluation.rows]:
        pieces = evaluation.results(row)
        if not pieces:
            continue
        seconds = sum(piece["seconds"] for piece in pieces)
        for judge in evaluation.target.judges:
            right = bits(pieces, judge)
            name = {"attack": row.attack or row.kind, "attacker": row.attacker or None, "judge": judge}
            found["accuracy"].append(name | _share(right) | {"seconds": round(seconds, 3)})
            if row.kind != "clean":
                survivors[judge] = [a and b for a, b in zip(survivors.get(judge, right), right, strict=False)]
    if any(row.kind == "attack" and evaluation.results(row) for row in evaluation.rows):
        found["worst_case"] = [{"judge": judge} | _share(right) for judge, right in survivors.items()]
    if isinstance(evaluation.target, MixtureTarget):
        found["transfer_from_experts"] = _from_experts(evaluation)
    found["curves"] = _curves(evaluation)
    found["masking"] = _masking(evaluation, found)
    heatmaps = _heatmaps(evaluation)
    return Results(found | ({"heatmaps": heatmaps} if heatmaps else {}))


def worst_case(evaluation: Evaluation, judge: str) -> dict[str, Any]:
    """The accuracy of the worst case over all attacks, on the images that all of them have finished.

    Args:
        evaluation: finished or not.
        judge: of the target's `judges`.

    Returns:
        {correct, images, accuracy, interval}.
    """
    columns = [bits(evaluation.results(row), judge) for row in evaluation.rows]
    whole = min(len(column) for column in columns)
    return _share([all(column[i] for column in columns) for i in range(whole)])


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The tables that a person reads, of `results`: accuracies, each expert's, heatmaps, signs of masking."""
    judges = [name for name in JUDGES if any(entry["judge"] == name for entry in found["accuracy"])]
    by_row: dict[tuple[str, str | None], dict[str, Any]] = {}
    for entry in [*found["accuracy"], *found.get("transfer_from_experts", [])]:
        by_row.setdefault((entry["attack"], entry["attacker"]), {})[entry["judge"]] = entry
    rows = []
    for (attack, attacker), cells in by_row.items():
        if attacker is not None and attacker.startswith("expert "):
            continue  # together they are one row, "any expert"
        knows = "—" if attacker is None else "an expert alone, transferred; the worst of them"
        knows = knows if attacker in (None, "any expert") else DESCRIPTIONS[str(attacker)]
        images = f"{next(iter(cells.values()))['images']:,}"
        rows.append([NAMES[attack], knows, images, *(percent(cells.get(judge)) for judge in judges)])
    order = list(NAMES.values())
    rows.sort(key=lambda row: order.index(row[0]))
    last = {entry["judge"]: entry for entry in found["worst_case"]}
    if last:
        images = f"{next(iter(last.values()))['images']:,}"
        rows.append(
            ["worst case for each image", "all of the above", images, *(percent(last.get(judge)) for judge in judges)]
        )
    plan = found["plan"]
    eps = radius_of(plan["eps"], plan["norm"])
    radius = "8/255" if eps == EPS["Linf"] else f"{eps:.4g}"
    note = f"{plan['norm']}, ε = {radius}. ± is half the 95 % Wilson interval. Columns say what answers"
    if "sample" in judges:
        note += (
            ": one random permutation an image, drawn anew for each attack (sample), the exact mean of all "
            "permutations (mean), the trained weights as they are (off), or each image's worst permutation (worst)"
        )
    note += "."
    if plan.get("amp", "off") != "off":
        note += " Gradients were taken in bfloat16; everything is judged in float32."
    accuracy = Table(
        "Test accuracy, %",
        ["attack", "what the attacker differentiates", "images", *(JUDGES[judge] for judge in judges)],
        rows,
        note,
    )
    others = (_expert_table, _heatmap_table, _left_out_table, _unmoved_table, _masking_table)
    return [accuracy, *(table for make in others for table in make(found))]


def to_csv(found: Mapping[str, Any]) -> str:
    """`results` as CSV, an accuracy a line: attack, attacker, judge, correct, images, accuracy, low, high."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["attack", "attacker", "judge", "correct", "images", "accuracy", "low", "high"])
    worst = [{"attack": "worst case", "attacker": "all", **entry} for entry in found["worst_case"]]
    for entry in [*found["accuracy"], *found.get("transfer_from_experts", []), *worst]:
        numbers = [entry["correct"], entry["images"], entry["accuracy"], *entry["interval"]]
        writer.writerow([entry["attack"], entry["attacker"] or "", entry["judge"], *numbers])
    return text.getvalue()


def percent(entry: Mapping[str, Any] | None) -> str:
    """An accuracy in %, ± half its interval; a dash for None."""
    if entry is None:
        return "—"
    return f"{100 * entry['accuracy']:.1f} ± {50 * (entry['interval'][1] - entry['interval'][0]):.1f}"


def find(found: Mapping[str, Any], attack: str, attacker: str | None, judge: str) -> dict[str, Any] | None:
    """The entry of `results`' accuracies for an attack, an attacker (None: nobody) and a judge; None without one."""
    for entry in found["accuracy"]:
        if (entry["attack"], entry["attacker"], entry["judge"]) == (attack, attacker, judge):
            return dict(entry)
    return None


def _share(right: Sequence[bool]) -> dict[str, Any]:
    correct, images = sum(right), len(right)
    return {
        "correct": correct,
        "images": images,
        "accuracy": correct / images if images else math.nan,
        "interval": list(wilson_interval(correct, images)),
    }


def _from_experts(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Accuracies by attack and judge, an image being right if it was against every expert's adversarial image."""
    right: dict[tuple[str, str], list[bool]] = {}
    for row in evaluation.rows:
        pieces = evaluation.results(row) if row.attacker.startswith("expert ") else []
        for judge in evaluation.target.judges if pieces else ():
            own = bits(pieces, judge)
            right[row.attack, judge] = [a and b for a, b in zip(right.get((row.attack, judge), own), own, strict=False)]
    return [
        {"attack": attack, "attacker": "any expert", "judge": judge} | _share(values)
        for (attack, judge), values in right.items()
    ]


def _unmoved(evaluation: Evaluation) -> Iterable[dict[str, Any]]:
    for row in evaluation.rows:
        pieces = [piece for piece in evaluation.results(row) if "unmoved" in piece]
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
    judge = evaluation.target.exact
    curves: dict[str, list[dict[str, Any]]] = {"eps": [], "steps": []}
    for row in evaluation.curves:
        chunks = [piece["points"] for piece in evaluation.results(row)]
        for points in zip(*chunks, strict=True):  # the same point in all chunks
            place = {row.kind: points[0][row.kind]}
            curves[row.kind].append(place | _share(bits(points, judge)) | {"loss": mean_loss(points)})
    return curves


def _masking(evaluation: Evaluation, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Signs of gradient masking (Athalye et al., arXiv 1802.00420, section 3.1; Carlini et al., arXiv 1902.06705)."""
    checks = [_check_gradients(found), *_check_strengths(evaluation, found), *_check_curves(found)]
    return [check for check in checks if check is not None]


def _check(text: str, passed: bool, finding: str) -> dict[str, Any]:
    return {"check": text, "passed": passed, "finding": finding}


def _check_gradients(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whether there are images that no attack can move; None where there are none."""
    if not found["unmoved"]:
        return None
    most = max(found["unmoved"], key=lambda entry: entry["unmoved"] / entry["images"])
    return _check(
        "every image has a gradient that an attack can follow",
        False,
        f"{_stuck(most)} under {NAMES[most['attack']]} ({DESCRIPTIONS.get(most['attacker'], most['attacker'])})",
    )


def _check_strengths(evaluation: Evaluation, found: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Whether what should be the stronger attack is, as far as both were made."""
    exact = evaluation.target.exact

    def accuracy(attack: str, attacker: str | None) -> float | None:
        entry = find(found, attack, attacker, exact)
        return None if entry is None else float(entry["accuracy"])

    noise, one_step, iterated = accuracy("noise", None), accuracy("fgsm", exact), accuracy("pgd", exact)
    if iterated is None:
        return
    if noise is not None:
        yield _check(
            "random noise of the same size is weaker than gradients",
            noise >= iterated,
            f"{100 * noise:.1f} % under noise, {100 * iterated:.1f} % under PGD-20",
        )
    if one_step is not None:
        yield _check(
            "many steps are at least as strong as one",
            iterated <= one_step + SLACK,
            f"{100 * one_step:.1f} % under FGSM, {100 * iterated:.1f} % under PGD-20",
        )
    transfers = [a for a in evaluation.target.attackers if a == "transfer" or a.startswith("expert ")]
    others = {a: value for a in transfers if (value := accuracy("pgd", a)) is not None}
    if (black_box := accuracy("square", exact)) is not None:
        others["Square"] = black_box
    if others:
        name = min(others, key=lambda key: others[key])
        yield _check(
            "the model's own gradients are stronger than transfer and black boxes",
            iterated <= others[name] + SLACK,
            f"{100 * iterated:.1f} % under PGD-20, {100 * others[name]:.1f} % from {name}",
        )


def _check_curves(found: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Whether more steps and larger balls make an attack stronger."""
    steps, radii = found["curves"]["steps"], found["curves"]["eps"]
    if steps:
        losses = [point["loss"] for point in steps]
        rising = all(later >= 0.98 * earlier for earlier, later in itertools.pairwise(losses))
        yield _check(
            "loss rises with the number of steps",
            rising and losses[-1] > losses[0],
            ", ".join(f"{point['loss']:.2f} after {point['steps']}" for point in steps),
        )
    if radii:
        values = [point["accuracy"] for point in radii]
        falling = all(later <= earlier + SLACK for earlier, later in itertools.pairwise(values))
        yield _check(
            "success rises with ε, to 100 %",
            falling and values[-1] == 0,
            f"accuracy {', '.join(f'{100 * value:.0f}' for value in values)} %",
        )


def _heatmaps(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    found = {}
    for row in evaluation.rows:
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
                knows = "—" if attacker is None else DESCRIPTIONS[attacker]
                rows.append([NAMES[attack], knows, *(percent(cell) for cell in cells)])
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
        knows = DESCRIPTIONS.get(entry["attacker"], entry["attacker"])
        rows.append([NAMES[entry["attack"]], knows, _stuck(entry), f"{entry['right']:,}"])
    if rows:
        yield Table(
            "Images that could not be attacked: their gradient is exactly zero",
            ["attack", "what the attacker differentiates", "not moved", "of them counted as withstanding"],
            rows,
            "They stay where the attack began, and say nothing of how robust the model is; attacks on other losses, or "
            "without gradients, may fool it on them.",
        )


def _stuck(entry: Mapping[str, Any]) -> str:
    share = 100 * entry["unmoved"] / entry["images"]
    return f"{entry['unmoved']:,} of {entry['images']:,} images ({share:.1f} %)"


def _masking_table(found: Mapping[str, Any]) -> Iterable[Table]:
    rows = [[c["check"], "passed" if c["passed"] else "NOT PASSED", c["finding"]] for c in found["masking"]]
    if rows:
        yield Table(
            "Signs of gradient masking",
            ["what an honest defence shows", "here", "found"],
            rows,
            "Accuracies of what the exact attacker attacks. A check that is not passed means that attacks which follow "
            "gradients may understate how weak the model is.",
        )
