"""Signs of gradient masking: where an attack that should be the weaker one is not.

After Athalye et al., arXiv 1802.00420, section 3.1, and Carlini et al., arXiv 1902.06705.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from immunity_fast.evaluation.gate_attackers import GATE_WORDS
from immunity_fast.evaluation.plan import GRADIENT_ATTACKS, Row
from immunity_fast.evaluation.runner import Evaluation, bits
from immunity_fast.evaluation.words import NAMES, find, gate_in, knows, radius_words
from immunity_fast.reporting.html import Table

SLACK = 0.01  # by so much a weaker attack may do better before it counts as a sign of masking
ONE_STEP = ("fgsm",)


def masking(evaluation: Evaluation, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{check, passed, finding} of every check that could be made of `results`' other findings."""
    checks = [_check_gradients(found), *_check_strengths(evaluation, found)]
    for radius in found["radii"]:
        at = ""
        if radius["eps"] != evaluation.plan.radius:
            at = f", at ε = {radius_words(radius['eps'], evaluation.plan.norm)}"
        checks += [_check_black_boxes(evaluation, radius["eps"], at), *_check_autoattack(radius, at)]
        checks.append(_check_arc(radius, at, gate_in(found)))
    checks += _check_curves(found)
    return [check for check in checks if check is not None]


def masking_table(found: Mapping[str, Any]) -> Iterable[Table]:
    """The table of the checks; none where none could be made."""
    rows = [[c["check"], "passed" if c["passed"] else "NOT PASSED", c["finding"]] for c in found["masking"]]
    if rows:
        yield Table(
            "Signs of gradient masking",
            ["what an honest defence shows", "here", "found"],
            rows,
            "Accuracies of what the exact attacker attacks. A check that is not passed means that attacks which follow "
            "gradients may understate how weak the model is.",
        )


def stuck(entry: Mapping[str, Any]) -> str:
    """How many images an attack could not move, of an entry of `results`' `unmoved`."""
    percentage = 100 * entry["unmoved"] / entry["images"]
    return f"{entry['unmoved']:,} of {entry['images']:,} images ({percentage:.1f} %)"


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
        f"{stuck(most)} under {NAMES[most['attack']]} ({knows(most['attack'], most['attacker'], gate_in(found))})",
    )


def _check_strengths(evaluation: Evaluation, found: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Whether what should be the stronger attack is, as far as both were made."""
    exact = evaluation.target.exact

    by_draws = {(e["attack"], e["attacker"]): float(e["accuracy"]) for e in found["drawn"] if exact == "output"}

    def accuracy(attack: str, attacker: str | None) -> float | None:
        entry = find(found, attack, attacker, exact)
        # Of a network that draws its expectation: one draw is luck.
        return None if entry is None else by_draws.get((attack, attacker), float(entry["accuracy"]))

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


def _check_black_boxes(evaluation: Evaluation, eps: float, at: str) -> dict[str, Any] | None:
    """Whether Square or another model's images break what no gradient of this one does; None where one side lacks."""
    judge, plan = evaluation.target.exact, evaluation.plan
    rows = [
        row for row in evaluation.rows if row.kind == "attack" and (plan.radius if row.eps is None else row.eps) == eps
    ]
    black = [row for row in rows if row.attack == "square" or row.attacker == "transfer"]
    white = [row for row in rows if row not in black]
    black_right, white_right = (_withstood(evaluation, some, judge) for some in (black, white))
    images = min(len(black_right), len(white_right))
    if not images:
        return None
    alone = sum(not a and b for a, b in zip(black_right, white_right, strict=False))
    names = list(dict.fromkeys("Square" if row.attack == "square" else "transfer" for row in black))
    return _check(
        f"gradients break what black boxes break{at}",
        alone <= SLACK * images,
        f"{alone:,} of {images:,} images are broken by {' or '.join(names)} alone",
    )


def _withstood(evaluation: Evaluation, rows: Sequence[Row], judge: str) -> list[bool]:
    columns = [column for row in rows if (column := bits(evaluation.results(row), judge))]
    return [all(right) for right in zip(*columns, strict=False)]


def _check_autoattack(radius: Mapping[str, Any], at: str) -> Iterable[dict[str, Any]]:
    """Whether plain PGD finds more than AutoAttack, of what both attacked, judged by that."""
    attackers = dict.fromkeys(e["attacker"] for e in radius["accuracy"] if e["attack"] == "autoattack")
    for attacker in attackers:
        accuracies = _own_accuracies(radius, attacker)
        iterated = {a: accuracies[a] for a in GRADIENT_ATTACKS if a in accuracies and a not in ONE_STEP}
        if "autoattack" not in accuracies or not iterated:
            continue
        name = min(iterated, key=lambda key: iterated[key])
        yield _check(
            f"AutoAttack is at least as strong as PGD on {GATE_WORDS.get(attacker, 'the output')}{at}",
            accuracies["autoattack"] <= iterated[name] + SLACK,
            f"{100 * accuracies['autoattack']:.1f} % under AutoAttack, "
            f"{100 * iterated[name]:.1f} % under {NAMES[name]}",
        )


def _own_accuracies(radius: Mapping[str, Any], attacker: str) -> dict[str, float]:
    """Accuracies under an attacker's attacks of what it attacks: of a random answer the expectation."""
    drawn = {e["attack"]: float(e["accuracy"]) for e in radius["drawn"] if e["attacker"] == attacker}
    if attacker in ("sample", "output") and drawn:
        return drawn
    return {
        e["attack"]: float(e["accuracy"])
        for e in radius["accuracy"]
        if e["attacker"] == attacker and e["judge"] == attacker
    }


def _check_arc(radius: Mapping[str, Any], at: str, gate: str) -> dict[str, Any] | None:
    """Whether PGD, of whatever knowledge, lowers a random gate's expected accuracy more than ARC."""
    expected = {(e["attack"], e["attacker"]): float(e["accuracy"]) for e in radius["drawn"]}
    arc = expected.get(("arc", "sample"))
    others = {key: value for key, value in expected.items() if key[0] in (*GRADIENT_ATTACKS, "pgd-sum")}
    if arc is None or not others:
        return None
    attack, attacker = min(others, key=lambda key: others[key])
    return _check(
        f"ARC is at least as strong as PGD on the gate that {'draws' if gate == 'selection' else 'switches'}{at}",
        arc <= others[attack, attacker] + SLACK,
        f"{100 * arc:.1f} % expected under ARC, {100 * others[attack, attacker]:.1f} % under {NAMES[attack]} "
        f"({knows(attack, attacker, gate)})",
    )


def _check_curves(found: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Whether more steps, larger balls and more draws make an attack stronger, as far as they should."""
    curves = found["curves"]
    steps, radii, draws = curves["steps"], curves["eps"], curves["draws"]
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
    if len(draws) > 1:
        yield _check(
            "averaging over more draws finds no more",
            draws[-1]["accuracy"] >= draws[-2]["accuracy"] - SLACK,
            ", ".join(f"{100 * point['accuracy']:.1f} % by {point['draws']}" for point in draws),
        )
