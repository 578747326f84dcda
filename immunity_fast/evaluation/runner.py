"""An evaluation, piece by piece: every attack with every knowledge, image by image, and what may give masking away.

The attacked images are cut into chunks; a piece is one attack by one attacker on one chunk. It depends on nothing but
what its key describes, and its randomness is seeded by that key, so an evaluation that was killed goes on where it was,
one with more attacks or more images takes over what is there, and neither changes a number.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from immunity_fast.attacks import (
    Attack,
    BoundAttack,
    LabelledModel,
    NotFiniteError,
    UnmovedWarning,
    autoattack,
    square,
)
from immunity_fast.attacks.arc import Arc
from immunity_fast.attacks.autoattack import DRAWS
from immunity_fast.attacks.batch import First
from immunity_fast.attacks.members import Weighing
from immunity_fast.attacks.mora import MoraSettings
from immunity_fast.attacks.mora import attack_members as mora_on
from immunity_fast.data.augmentation import as_float
from immunity_fast.data.datasets import AnySplit
from immunity_fast.data.sampling import EVALUATION_BATCH, sample_order
from immunity_fast.evaluation.ledger import Ledger, key_of
from immunity_fast.evaluation.metrics import heatmap_sums
from immunity_fast.evaluation.plan import ATTACKS as ATTACKS
from immunity_fast.evaluation.plan import (
    MEMBER_ATTACKS,
    Plan,
    Row,
    attack_rows,
    curve_rows,
    gradient_attack,
    left_out,
)
from immunity_fast.evaluation.plan import SETS as SETS
from immunity_fast.evaluation.targets import TRIES, MixtureTarget, TargetModel
from immunity_fast.losses import FusedImmunityLoss
from immunity_fast.models.gate import draws_expected
from immunity_fast.runtime.files import is_number

VERSION = 5  # of what a piece is: a change makes earlier ones unknown
PROBES = 16  # test images that a model is told apart by
COMPARED = 128  # test images of which a model answers some otherwise, or it does not depend on them
# Words that seeds are made of: the attackers off and sample, and the kind subset, under names that they had. With other
# words every number that is random would be another.
SEED_WORDS = {"off": "fixed", "sample": "single", "subset": "sample"}
LARGEST = 1e300  # in the place of an infinite loss, for which JSON has no number
CURVE_STEPS = 20  # of PGD at each ε
CURVES = ("eps", "steps", "draws")  # kinds of rows whose pieces are points
SHARES = 6  # decimals of a share of what may be drawn
SHARED_BYTES = 1 << 28  # that first gradients of a chunk may take


class Evaluation:
    """Runs the pieces of a plan.

    Args:
        target: what is attacked.
        test: the test split, on the device.
        plan: what is to be found out.
        ledger: what is finished, and where more is written down.
        data: fingerprint of the test split.
        loss_fn: how heatmaps are looked at, for mixtures of at least 2 experts; None leaves them out.

    Raises:
        ValueError: attacks are asked for, and none of them is for any of the attackers; the model does not take images.
    """

    def __init__(
        self,
        target: TargetModel,
        test: AnySplit,
        plan: Plan,
        ledger: Ledger,
        *,
        data: str,
        loss_fn: FusedImmunityLoss | None = None,
    ) -> None:
        self.target, self.test, self.plan, self.ledger, self.loss_fn = target, test, plan, ledger, loss_fn
        self.order = sample_order(test, plan.images)
        self.rows = attack_rows(target, plan)
        self.left_out = left_out(target, plan)
        if plan.attacks and all(row.kind != "attack" for row in self.rows):
            reasons = "; ".join(f"{pair['attack']} by {pair['attacker']}: {pair['why']}" for pair in self.left_out)
            raise ValueError(
                f"attacks: expected at least one for an attacker, got none ({reasons or 'there is no such attacker'})"
            )
        self._compared = self._images(sample_order(test, COMPARED))
        self.curves = curve_rows(target, plan)
        self._repeats: bool | None = None
        self._firsts: dict[str, First] = {}  # by attacker, of the chunk that is under way
        self._chunk = (0, 0)
        self._identity = {
            "version": VERSION,
            "target": target.weights_hash(),
            "answers": target.answers_hash(self._compared[:PROBES]),
            "data": data,
            "seed": plan.seed,
            "heatmaps": repr(loss_fn) if loss_fn is None else repr((loss_fn, loss_fn.smoothing, loss_fn.score)),
        }
        for row, start, stop in self.pieces():
            key = self.key(row, start, stop)
            if key in ledger and not self._is_whole(ledger[key], row, stop - start):
                ledger.forget(key)

    def pieces(self) -> Iterator[tuple[Row, int, int]]:
        """All pieces in the order in which they are computed, a chunk's rows together: (row, first image, last + 1)."""
        for start, stop in _chunks(len(self.order), self.plan.chunk):
            yield from ((row, start, stop) for row in self.rows)
        yield from ((Row("clean"), start, stop) for start, stop in _chunks(len(self.test), EVALUATION_BATCH))
        for start, stop in _chunks(min(len(self.order), self.plan.masking_images), self.plan.chunk):
            yield from ((row, start, stop) for row in self.curves)

    def key(self, row: Row, start: int, stop: int) -> str:
        """The key of a piece in the ledger: a hash of all that its result depends on.

        Args:
            row: the piece's.
            start, stop: its images, by their places in the fixed order.
        """
        return key_of(self._identity | self._description(row) | {"start": start, "stop": stop})

    def run(self, advance: Callable[[Row, int, bool], None]) -> None:
        """Compute what the ledger does not have.

        Other processes may do the same: what one of them is at comes last here.

        Args:
            advance: is told a piece's row, how many images it has, and whether it was new.

        Raises:
            ValueError: the model cannot be attacked, or an output or gradient is NaN or infinite, with the image's
                number in the test split.
        """
        for row, start, stop in self.ledger.shared(self.pieces(), lambda piece: self.key(*piece)):
            key = self.key(row, start, stop)
            new = key not in self.ledger
            if new:
                chosen = torch.arange(start, stop) if row.kind == "clean" else self.order[start:stop]
                try:
                    self.ledger.add(key, self._piece(row, chosen, self._seed(row, start), (start, stop)))
                except NotFiniteError as error:
                    raise ValueError(
                        f"model: expected finite outputs and gradients, got NaN or infinite ones for test image "
                        f"{int(chosen[error.sample])}"
                    ) from None
            advance(row, stop - start, new)

    def results(self, row: Row) -> list[dict[str, Any]]:
        """The finished pieces of a row, in order, up to the first that is not: rows are compared image by image."""
        size, chunk = len(self.order), self.plan.chunk
        if row.kind == "clean":
            size, chunk = len(self.test), EVALUATION_BATCH
        elif row.kind in CURVES:
            size = min(size, self.plan.masking_images)
        keys = [self.key(row, start, stop) for start, stop in _chunks(size, chunk)]
        return [self.ledger[key] for key in itertools.takewhile(self.ledger.__contains__, keys)]

    def attacked(
        self,
        row: Row,
        images: Tensor,
        labels: Tensor,
        seed: int,
        unmoved: list[Tensor] | None = None,
        first: First | None = None,
    ) -> Tensor:
        """What a row makes of some images.

        Args:
            row: of any kind but the curves.
            images: (B, C, H, W) in [0, 1].
            labels: (B,) integers in 0..K−1.
            seed: of all chance.
            unmoved: where `BoundAttack.unmoved` (B,) of an attack by gradients is appended to.
            first: what attacks of this attacker share that begin at these images, see `BoundAttack`.

        Returns:
            (B, C, H, W).
        """
        plan, eps = self.plan, self.plan.radius if row.eps is None else row.eps
        generator = torch.Generator().manual_seed(seed)
        gate = torch.Generator().manual_seed(seed + 1)
        if row.kind in ("clean", "subset"):
            return images
        if row.kind == "noise":
            noise = Attack(eps, norm=plan.norm, steps=0, random_start=True)
            return noise(lambda x: x, images, labels, generator=generator)
        if row.attack in MEMBER_ATTACKS and row.settings is None:
            return self._by_members(row, eps, images, labels, generator)
        if row.settings is not None:
            own = row.attack in MEMBER_ATTACKS
            outputs = self.target.expected_loss() if own else self.target.attacker(row.attacker, gate)
            settings = replace(row.settings, loss=self.target.loss_of_expected) if own else row.settings
            bound = self._bound(settings, row.attacker, outputs, settled=not self.to_the_end(row))
            found = _quietly(bound, images, labels, generator=generator, first=first)
            if unmoved is not None:
                unmoved.append(bound.unmoved)
            return found
        if row.attack == "square":
            outputs = self.target.attacker(row.attacker, gate)
        else:
            outputs = self.target.several_draws(row.attacker, DRAWS, gate)

        def model(x: Tensor) -> Tensor:
            return outputs(x, labels)  # of these two, the labels are for "worst" alone

        if row.attack == "square":
            return square(model, images, labels, eps=eps, norm=plan.norm, queries=plan.queries, seed=seed)
        return autoattack(
            model,
            images,
            labels,
            num_classes=self.target.num_classes,
            eps=eps,
            norm=plan.norm,
            version="rand" if row.attacker in self.target.random else "standard",
            seed=seed,
            steps=plan.autoattack_steps,
            queries=plan.queries,
        )

    def _by_members(self, row: Row, eps: float, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """ARC, on what the gate may draw; or MORA, on the experts as the attacker weighs them."""
        plan = self.plan
        if row.attack == "arc":
            walk = Arc(eps=eps, steps=plan.arc_steps, norm=plan.norm)
            members, permuted = self.target.members("off"), self.target.permuted
            return _quietly(walk.attack_members, members, images, labels, generator, permuted=permuted)
        weighing: Weighing = "off" if row.attacker == "off" else "mean"
        settings = MoraSettings(eps=eps, steps=plan.mora_steps, norm=plan.norm)
        return _quietly(mora_on, self.target.members(weighing), settings, images, labels, generator)

    def _bound(self, attack: Attack, attacker: str, outputs: LabelledModel, *, settled: bool) -> BoundAttack:
        """An attack; `settled`: it may leave images that no judge is right about, where it does not drop others."""
        judge = self.target.attack_judge(attacker)
        if judge is None and attacker in self.target.random:  # which image is worst would be a matter of luck
            attack = replace(attack, keep_best=False, drop_fooled=False)
        settling = None
        if settled and not (attack.keep_best or attack.drop_fooled) and self._nothing_is_drawn():
            settling = self.target.settling(attacker)
        return BoundAttack(attack, outputs, judge=judge, elsewhere=self._compared, settling=settling)

    def _nothing_is_drawn(self) -> bool:
        """Whether all that is random in what answers is a gate: else that nobody is right is luck, and none is shared.

        The global generators are left as they were.
        """
        if self._repeats is None:
            with torch.random.fork_rng():
                self._repeats = self.target.repeats(self._compared[:PROBES])
        return self._repeats

    def _first(self, row: Row, chunk: tuple[int, int], images: Tensor) -> First | None:
        """What the attacks of an attacker share on a chunk: the first gradient of those that begin at the images."""
        if chunk != self._chunk:
            self._firsts, self._chunk = {}, chunk
        large = images.nbytes * len(self.target.attackers) > SHARED_BYTES
        if row.settings is None or row.settings.random_start or row.attacker in self.target.random or large:
            return None
        return self._firsts.setdefault(row.attacker, First()) if self._nothing_is_drawn() else None

    def _images(self, chosen: Tensor) -> Tensor:
        return as_float(self.test.read(chosen))

    def _piece(self, row: Row, chosen: Tensor, seed: int, chunk: tuple[int, int]) -> dict[str, Any]:
        images, labels = self._images(chosen), self.test.labels[chosen.to(self.test.labels.device)]
        with torch.random.fork_rng(), draws_expected():  # for what is random in a user's model
            torch.manual_seed(seed)
            if row.kind in CURVES:
                return {"points": list(self._points(row, images, labels, seed))}
            begin = time.perf_counter()
            unmoved: list[Tensor] = []
            attacked = self.attacked(row, images, labels, seed, unmoved, self._first(row, chunk, images))
            seconds = time.perf_counter() - begin
            # All test images are not tried again: nobody asks for that, and of what is slow it would take longest.
            piece = self._judged(attacked, labels, seed, tries=row.kind != "clean")
        if unmoved:
            piece["unmoved"] = _written(unmoved[0])
        if self.has_heatmaps(row) and self.loss_fn is not None and isinstance(self.target, MixtureTarget):
            piece["heatmaps"] = heatmap_sums(self.target.model, self.loss_fn, attacked, labels).to_json()
        return piece | {"seconds": seconds}

    def _points(self, row: Row, images: Tensor, labels: Tensor, seed: int) -> Iterator[dict[str, Any]]:
        """A curve's points, judged: {"eps", "steps" or "draws": where, …} each."""
        pgd, plan = gradient_attack("pgd", self.plan), self.plan
        if row.kind == "draws":
            for draws in plan.curve_draws:
                averaged = self.target.averaged(draws, torch.Generator().manual_seed(seed + 1))
                bound = self._bound(pgd, row.attacker, averaged, settled=False)
                attacked = _quietly(bound, images, labels, generator=torch.Generator().manual_seed(seed))
                yield {"draws": draws} | self._judged(attacked, labels, seed)
            return
        outputs = self.target.attacker(row.attacker, torch.Generator().manual_seed(seed + 1))
        if row.kind == "steps":  # one descent, looked at on its way
            attacked, taken = self.attacked(Row("noise"), images, labels, seed), 0
            for steps in plan.curve_steps:
                more = replace(pgd, steps=steps - taken, keep_best=False, drop_fooled=False)
                attacked = _quietly(
                    self._bound(more, row.attacker, outputs, settled=False), images, labels, start=attacked
                )
                taken = steps
                yield {"steps": steps} | self._judged(attacked, labels, seed)
        else:
            for factor in plan.curve_eps:
                eps = _curve_radius(plan, factor)
                # 2.5 times as far as the ball's radius. Who is fooled stays so: accuracy is all that is asked for.
                attack = replace(
                    pgd, eps=eps, alpha=2.5 * eps / CURVE_STEPS, steps=CURVE_STEPS, keep_best=True, drop_fooled=True
                )
                generator = torch.Generator().manual_seed(seed)
                attacked = _quietly(
                    self._bound(attack, row.attacker, outputs, settled=False), images, labels, generator=generator
                )
                yield {"eps": eps} | self._judged(attacked, labels, seed)

    def _judged(self, images: Tensor, labels: Tensor, seed: int, *, tries: bool = True) -> dict[str, Any]:
        verdict = self.target.judge(images, labels, torch.Generator().manual_seed(seed + 2), tries=tries)
        found: dict[str, Any] = {
            "right": {name: _written(each) for name, each in verdict.right.items()},
            "loss": min(float(verdict.loss.double().sum()), LARGEST),
        }
        if verdict.shares is not None:
            found["shares"] = [round(share, SHARES) for share in verdict.shares.tolist()]
        if verdict.tries is not None:
            found["tries"] = [_written(each) for each in verdict.tries]
        return found

    def _is_whole(self, piece: dict[str, Any], row: Row, images: int) -> bool:
        """Whether what a file says of a piece has the form of one; one that has not is computed again."""
        if row.kind == "steps":
            return self._are_points(piece, "steps", self.plan.curve_steps, images)
        if row.kind == "draws":
            return self._are_points(piece, "draws", self.plan.curve_draws, images)
        if row.kind == "eps":
            return self._are_points(piece, "eps", [_curve_radius(self.plan, x) for x in self.plan.curve_eps], images)
        heatmaps = piece.get("heatmaps")
        if self.has_heatmaps(row) and isinstance(self.target, MixtureTarget):
            if not _are_heatmap_sums(heatmaps, self.target.model.num_experts, images):
                return False
        elif "heatmaps" in piece and row.eps is None:  # it may have been the plan's own radius once
            return False
        untried = row.kind == "clean" and "tries" not in piece  # earlier versions tried
        return self._is_judged(piece, images, tries=not untried) and is_number(piece.get("seconds"))

    def _are_points(self, piece: dict[str, Any], name: str, places: Sequence[float], images: int) -> bool:
        points = piece.get("points")
        return (
            isinstance(points, list)
            and all(self._is_judged(point, images) for point in points)
            and [point.get(name) for point in points] == list(places)
        )

    def _is_judged(self, found: Any, images: int, *, tries: bool = True) -> bool:
        right = found.get("right") if isinstance(found, dict) else None
        return (
            isinstance(right, dict)
            and right.keys() == set(self.target.judges)
            and all(_are_bits(value, images) for value in right.values())
            and _are_bits(found.get("unmoved", "0" * images), images)
            and self._are_draws(found, images, tried=tries)
            and is_number(found.get("loss"))
        )

    def _are_draws(self, found: dict[str, Any], images: int, *, tried: bool) -> bool:
        """Whether what is said of draws is there where something is drawn."""
        shares, tries = found.get("shares"), found.get("tries")
        if self.target.has_shares != (shares is not None) or (tried and bool(self.target.random)) != (
            tries is not None
        ):
            return False
        drawn = tries is None or (
            isinstance(tries, list) and len(tries) == TRIES and all(_are_bits(each, images) for each in tries)
        )
        return drawn and (shares is None or _are_shares(shares, images))

    def to_the_end(self, row: Row) -> bool:
        """Whether a row's images are attacked to the end, although no judge may be right about some any more.

        The exact attacker's FGSM and PGD: signs of masking compare them with noise and with transfer, and an attack
        that keeps what was wrong from the start would pass for one whose gradients have found it. Heatmaps are
        measured there, too.
        """
        return row.attacker == self.target.exact and row.attack in ("fgsm", "pgd")

    def has_heatmaps(self, row: Row) -> bool:
        """Whether heatmaps are measured on a row's images: the clean ones, and PGD's on the exact mean."""
        if self.loss_fn is None or row.eps is not None or not isinstance(self.target, MixtureTarget):
            return False
        return row.kind == "subset" or (row.kind == "attack" and (row.attack, row.attacker) == ("pgd", "mean"))

    def _description(self, row: Row) -> dict[str, Any]:
        description: dict[str, Any] = {"kind": row.kind, "attacker": row.attacker}
        if row.kind in ("clean", "subset"):
            return description
        plan = self.plan
        ball: dict[str, Any] = {"eps": plan.radius if row.eps is None else row.eps, "norm": plan.norm}
        if row.kind in CURVES:
            points = {"eps": plan.curve_eps, "steps": plan.curve_steps, "draws": plan.curve_draws}[row.kind]
            return description | ball | {"points": points, "amp": plan.amp}
        if row.settings is not None:
            settings = {name: value for name, value in asdict(row.settings).items() if name != "bounds"}  # [0, 1]
            own = {"attack": row.attack} if row.attack in MEMBER_ATTACKS else {}
            return description | {"settings": settings} | own
        others: dict[str, dict[str, Any]] = {
            "arc": {"steps": plan.arc_steps},
            "mora": {"steps": plan.mora_steps},
            "square": {"queries": plan.queries},
            "autoattack": {"queries": plan.queries, "steps": plan.autoattack_steps},
        }
        return description | ball | ({"attack": row.attack} | others[row.attack] if row.kind == "attack" else {})

    def _seed(self, row: Row, start: int) -> int:
        kind, attacker = (SEED_WORDS.get(word, word) for word in (row.kind, row.attacker))
        parts = [self.plan.seed, kind, row.attack, attacker, start]
        return int(key_of({"seed of": parts})[:12], 16)


def _quietly(attack: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    """Attack without a warning of images that could not be moved: a report counts them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnmovedWarning)
        return attack(*arguments, **options)


def _written(each: Tensor) -> str:
    """A bool of each image (B,) as a string of B 0s and 1s."""
    return "".join("1" if one else "0" for one in each.tolist())


def _chunks(size: int, chunk: int) -> list[tuple[int, int]]:
    return [(start, min(start + chunk, size)) for start in range(0, size, chunk)]


def _are_bits(value: Any, images: int) -> bool:
    return isinstance(value, str) and len(value) == images and set(value) <= {"0", "1"}


def _are_shares(value: Any, images: int) -> bool:
    return (
        isinstance(value, list) and len(value) == images and all(is_number(each) and 0 <= each <= 1 for each in value)
    )


def _curve_radius(plan: Plan, factor: float) -> float:
    return min(factor * plan.radius, 1) if plan.norm == "Linf" else factor * plan.radius


def _are_heatmap_sums(value: Any, experts: int, images: int) -> bool:
    if not isinstance(value, dict) or value.keys() != {"information", "dead", "iscore", "centres"}:
        return False
    centres = value["centres"] if isinstance(value["centres"], list) else []
    rows = [row for row in centres if isinstance(row, list)]
    pairs = [pair for row in rows if len(row) == images for pair in row]
    return (
        all(is_number(value[name]) for name in ("information", "dead", "iscore"))
        and len(centres) == experts
        and len(pairs) == experts * images
        and all(isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in pairs)
    )


def shares(pieces: Sequence[dict[str, Any]]) -> list[float] | None:
    """Which share of all that may be drawn is right on each image of some pieces; None where nobody has said."""
    found: list[list[float] | None] = [piece.get("shares") for piece in pieces]
    return (
        [share for each in found for share in each or []] if found and all(each is not None for each in found) else None
    )


def tries(pieces: Sequence[dict[str, Any]]) -> list[list[bool]]:
    """Whether each of `targets.TRIES` draws is right on each image of some pieces: [draw][image]; [] without draws."""
    found = [piece["tries"] for piece in pieces if "tries" in piece]
    return [[bit == "1" for text in draw for bit in text] for draw in zip(*found, strict=True)]


def bits(pieces: Sequence[dict[str, Any]], judge: str) -> list[bool]:
    """Whether a judge was right on each image of some pieces.

    Args:
        pieces: as `Evaluation.results` gives them.
        judge: of the target's `judges`.
    """
    return [bit == "1" for piece in pieces for bit in piece["right"][judge]]


def mean_loss(pieces: Sequence[dict[str, Any]]) -> float:
    """The mean cross-entropy of the images of some pieces; NaN where there are none."""
    images = sum(len(next(iter(piece["right"].values()))) for piece in pieces)
    return sum(piece["loss"] for piece in pieces) / images if images else math.nan
