"""What an evaluation is of: a mixture with its gate, or any network that classifies images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast.attacks import LabelledModel, Model
from immunity_fast.attacks.arc import every_permutation
from immunity_fast.attacks.checks import check_finite, not_finite
from immunity_fast.attacks.members import EnsembleMembers, MixtureMembers, Weighing
from immunity_fast.attacks.mixtures import (
    Answers,
    ExactJudge,
    Judge,
    Rows,
    asked_modules,
    exact_means,
    trained_gate,
)
from immunity_fast.attacks.parts import seeded
from immunity_fast.attacks.saving import hash_of_weights
from immunity_fast.attacks.settling import Settling
from immunity_fast.evaluation import gate_attackers
from immunity_fast.experts.imported import called, imported
from immunity_fast.experts.libraries import LIBRARIES
from immunity_fast.functional import log_mixture
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.models.noise import MeanOfPasses
from immunity_fast.permutations import nobody_right, permuted, share_is_exact, shares_right
from immunity_fast.runtime.outputs import kind_of, logits_of
from immunity_fast.runtime.precision import at_least_float32

SLACK = 1e-4  # of a probability: a pass of another batch rounds otherwise, and nobody is to be right for that
TRIES = 10  # draws by which what is random is judged: whoever may try again needs one to fool it
REPEATS = 8  # how often a network is asked, to see whether it draws: one of two ways is then missed once in 128 times


class Verdict(NamedTuple):
    """What is said of some adversarial images."""

    right: dict[str, Tensor]  # which are answered rightly, (B,) bool by each judge
    loss: Tensor  # (B,) cross-entropy of the exact attacker's output
    shares: Tensor | None = None  # (B,) of all that a gate may draw, permutations or experts, that is right
    tries: Tensor | None = None  # (TRIES, B) bool, which are answered rightly by a draw, of what is random


class TargetModel(Protocol):
    """A model as an evaluation sees it: who may attack it, with what knowledge, and what of it may answer.

    Attributes:
        num_classes: K.
        attackers: what may be known of it, in the order of a table.
        exact: the attacker with whom masking is looked for: it knows all, and its objective is not random.
        random: the attackers whose objective is random.
        judges: what may answer; the first is what answers in use.
        has_members: whether it is known which networks it is made of.
        permuted: whether a random permutation of the members' weights answers; else one member, or all together.
        has_shares: whether `Verdict.shares` are known.
        loss_of_expected: by which loss `expected_loss` is the expected loss: a name, or a function, see `Attack`.
    """

    num_classes: int
    attackers: tuple[str, ...]
    exact: str
    random: tuple[str, ...]
    judges: tuple[str, ...]
    has_members: bool
    permuted: bool
    has_shares: bool
    loss_of_expected: Any

    @property
    def shares_are_exact(self) -> bool:
        """Whether the shares are exact, where they are known."""

    def attacker(self, name: str, generator: torch.Generator) -> LabelledModel:
        """What an attacker of that name differentiates.

        Args:
            name: of `attackers`.
            generator: of what is random in it.

        Returns:
            (images (B, C, H, W), labels (B,)) to outputs (B, K), or (draws, B, K).
        """

    def judge(self, images: Tensor, labels: Tensor, generator: torch.Generator, *, tries: bool = True) -> Verdict:
        """Judge the answers for some images.

        Args:
            images: (B, C, H, W) in [0, 1].
            labels: (B,) integers in 0..K−1.
            generator: of the judges that are random.
            tries: whether `Verdict.tries` are asked for, of what is random.

        Raises:
            ValueError: outputs of another shape; as `NotFiniteError`, NaN or infinite ones.
        """

    def attack_judge(self, name: str) -> Judge | Literal["outputs"] | None:
        """By what an attack on that attacker's objective judges which image is worst; see `attacks.BoundAttack`."""

    def settling(self, name: str) -> Settling:
        """Which images an attack on that attacker's objective can leave, as none of `judges` is right about them.

        Whatever is drawn: but where `repeats` says that more is random than a gate, of which this knows nothing.
        """

    def repeats(self, images: Tensor) -> bool:
        """Whether nothing is random in what answers but a mixture's gate, as far as several looks at images show."""

    def averaged(self, draws: int, generator: torch.Generator) -> LabelledModel:
        """Outputs (draws, B, K) that the attacker "eot" averages, of any number of draws."""

    def members(self, weighing: Weighing) -> EnsembleMembers:
        """The networks that it is made of, where `has_members`; `weighing`: by which weights they are mixed."""

    def expected_loss(self) -> LabelledModel:
        """Outputs whose losses' mean is the expected loss over all that may be drawn, where `has_members`."""

    def several_draws(self, name: str, draws: int, generator: torch.Generator) -> LabelledModel:
        """`draws` of a random attacker's outputs at once, (draws, B, K), where that costs less; else its outputs."""

    def weights_hash(self) -> str:
        """A hash of the weights, where there are any that can be seen."""

    def answers_hash(self, images: Tensor) -> str:
        """A hash of what is answered for some images (B, C, H, W), nothing random in it.

        It tells apart what the weights do not: functions, plain attributes, hooks. Outputs are rounded to 8 bits, so
        that another number of threads or another device seldom makes another model of one; a difference that shows
        on none of these images in so many bits is not seen, nor is one that shows on other images alone. A model that
        draws from a generator of its own never has the same hash twice; the global ones are seeded, and gates answer
        by their mean.

        Raises:
            ValueError: the model does not take such images.
        """


class MixtureTarget(TargetModel):
    """A mixture of experts, attacked with every knowledge of its gate.

    Args:
        model: in evaluation mode. Its switch does not matter.
        num_classes: K.
        draws: how many the attacker "eot" averages.
        transfer: an independently trained network whose adversarial images are tried on this one.
        expert_logits: what computes the model's, if compiled code is to.
    """

    knowledge: tuple[str, ...] = gate_attackers.KNOWLEDGE  # what may be known of the gate
    answers: tuple[str, ...] = ("sample", "mean", "off", "worst")  # what may answer, besides each expert
    exact = "mean"
    random: tuple[str, ...] = ("sample", "eot")
    has_members = True
    permuted = True
    has_shares = True
    loss_of_expected: Any = "ce"

    def __init__(
        self,
        model: ImmunityMoE,
        num_classes: int,
        *,
        draws: int = 20,
        transfer: Model | None = None,
        expert_logits: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.num_classes, self.draws, self.transfer = model, num_classes, draws, transfer
        self.expert_logits = expert_logits or model.expert_logits
        self.attackers = self.attacker_names(model.num_experts, transfer=transfer is not None)
        self.judges = (*self.answers, *expert_names(model.num_experts))
        self._experts: list[nn.Module] = []

    @property
    def shares_are_exact(self) -> bool:
        return share_is_exact(self.model.num_experts)

    @classmethod
    def attacker_names(cls, num_experts: int, *, transfer: bool) -> tuple[str, ...]:
        """`attackers` of a mixture of so many experts; `transfer`: whether there is another network, to transfer."""
        return (*cls.knowledge, *expert_names(num_experts), *(("transfer",) if transfer else ()))

    def attacker(self, name: str, generator: torch.Generator) -> LabelledModel:
        if name == "transfer" and self.transfer is not None:
            other = self.transfer
            return lambda images, labels: other(images)
        if name.startswith("expert "):
            return gate_attackers.alone(self.model, self._expert(int(name.removeprefix("expert ")) - 1))
        knowledge: Any = name
        return gate_attackers.attacker(
            self.model, knowledge, draws=self.draws, generator=generator, expert_logits=self.expert_logits
        )

    def judge(self, images: Tensor, labels: Tensor, generator: torch.Generator, *, tries: bool = True) -> Verdict:
        with torch.no_grad():
            logits = self.expert_logits(images)
            gate = trained_gate(self.model, images)
            check_outputs(logits, self.num_classes)
            loss = F.nll_loss(log_mixture(logits), labels, reduction="none")
            right = gate_attackers.answered_rightly(logits, gate, labels, generator)
            drawn = [log_mixture(logits, permuted(gate, generator)).argmax(-1) == labels for _ in range(TRIES * tries)]
            return Verdict(right, loss, shares_right(logits, gate, labels), torch.stack(drawn) if tries else None)

    def _expert(self, index: int) -> nn.Module:
        """An expert as a module of its own; all are made once, as that takes as long as a step of an attack on one."""
        self._experts = self._experts or [expert.eval() for expert in self.model.unstack()]
        return self._experts[index]

    def attack_judge(self, name: str) -> Judge | Literal["outputs"] | None:
        # The exact mean, too: whoever fools that alone may still be answered rightly while the gate switches.
        return ExactJudge(self.model, self.expert_logits) if name in ("sample", "eot", "mean") else "outputs"

    def settling(self, name: str) -> Settling:
        def asked(images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                return seen(Answers(self.expert_logits(images), trained_gate(self.model, images)), labels)

        def seen(answers: Answers, labels: Tensor) -> Tensor:
            return nobody_right(*answers, labels, SLACK)

        return Settling(asked, seen if name in gate_attackers.KNOWLEDGE else None)

    def repeats(self, images: Tensor) -> bool:
        return _repeats(lambda x: self.expert_logits(x), images) and _repeats(
            lambda x: trained_gate(self.model, x), images
        )

    def averaged(self, draws: int, generator: torch.Generator) -> LabelledModel:
        return gate_attackers.attacker(
            self.model, "eot", draws=draws, generator=generator, expert_logits=self.expert_logits
        )

    def members(self, weighing: Weighing) -> EnsembleMembers:
        return MixtureMembers(self.model, weighing, self.expert_logits)

    def expected_loss(self) -> LabelledModel:
        members = self.members("off")
        return lambda images, labels: every_permutation(members.logits(images), members.weights(images))

    def several_draws(self, name: str, draws: int, generator: torch.Generator) -> LabelledModel:
        return self.averaged(draws, generator) if name == "sample" else self.attacker(name, generator)

    def weights_hash(self) -> str:
        other = hash_of_weights(self.transfer) if isinstance(self.transfer, nn.Module) else ""
        return f"{hash_of_weights(self.model)}-{self.draws}-{other}"

    def answers_hash(self, images: Tensor) -> str:
        own = (self.model.expert_logits, partial(trained_gate, self.model))
        return _hash_of_answers([("model", own[0]), ("model", own[1]), ("transfer", self.transfer)], images)


class NetworkTarget(TargetModel):
    """Any network; the baseline of an ensemble, or a user's own.

    Args:
        model: images (B, C, H, W) in [0, 1] to logits or log-probabilities (B, K); of an output object or a dictionary
            its `logits` are taken, of a tuple its first.
        num_classes: K.
        name: part of the fingerprint, for what has no weights that could be compared.
        draws: how many outputs an attacker averages, whose model is random; None: it is not.
        transfer: see `MixtureTarget`.
        answer: what answers, and is judged, where it is not the model: of a random one such as the mean of some passes.
    """

    exact = "output"
    judges = ("output",)
    has_members = False
    permuted = False
    has_shares = False
    shares_are_exact = True
    loss_of_expected: Any = "ce"

    def __init__(
        self,
        model: Model,
        num_classes: int,
        *,
        name: str = "",
        draws: int | None = None,
        transfer: Model | None = None,
        answer: Model | None = None,
    ) -> None:
        self.model, self.outputs, self.answer = model, _logits(model), answer
        self.answers = self.outputs if answer is None else _logits(answer)
        self.num_classes, self.name, self.draws, self.transfer = num_classes, name, draws, transfer
        self.random: tuple[str, ...] = () if draws is None else ("output", "eot")
        self.attackers = self.attacker_names(random=draws is not None, transfer=transfer is not None)

    @staticmethod
    def attacker_names(*, random: bool, transfer: bool) -> tuple[str, ...]:
        """`attackers` of a network; `transfer`: whether there is another network, to transfer."""
        return ("output", *(("eot",) if random else ()), *(("transfer",) if transfer else ()))

    def attacker(self, name: str, generator: torch.Generator) -> LabelledModel:
        if name == "eot" and self.draws is not None:
            return gate_attackers.averaged(self.outputs, self.draws)
        if name == "transfer" and self.transfer is not None:
            other = self.transfer
            return lambda images, labels: other(images)
        return _Output(self.outputs)

    def judge(self, images: Tensor, labels: Tensor, generator: torch.Generator, *, tries: bool = True) -> Verdict:
        with torch.no_grad():
            number = TRIES if tries and self.random else 0
            if isinstance(self.answer, MeanOfPasses):  # answers of passes of their own would take several times as long
                outputs, *more = self.answer.several(images, number or 1, generator)
                more = [outputs, *more]
            else:
                outputs, more = self.answers(images), [self.answers(images) for _ in range(number)]
            check_outputs(outputs[None] if isinstance(outputs, Tensor) else outputs, self.num_classes)
            loss = F.cross_entropy(outputs, labels, reduction="none")
            right = [each.argmax(-1) == labels for each in (outputs, *more)]
            return Verdict({"output": right[0]}, loss, None, torch.stack(right[1:]) if number else None)

    def attack_judge(self, name: str) -> Judge | Literal["outputs"] | None:
        return None

    def settling(self, name: str) -> Settling:
        def asked(images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                return seen(self.outputs(images), labels)

        def seen(outputs: Tensor, labels: Tensor) -> Tensor:
            shares = at_least_float32(outputs).softmax(-1)
            return (shares - shares.gather(-1, labels[:, None])).amax(-1) > SLACK

        return Settling(asked, seen if name == "output" else None)

    def repeats(self, images: Tensor) -> bool:
        if self.draws is not None:
            return False
        with asked_modules() as asked:
            alike = _repeats(self.outputs, images)
        return alike and not asked.random_gates

    def averaged(self, draws: int, generator: torch.Generator) -> LabelledModel:
        return gate_attackers.averaged(self.outputs, draws)

    def members(self, weighing: Weighing) -> EnsembleMembers:
        raise NotImplementedError("of a network it is not known what it is made of")

    def expected_loss(self) -> LabelledModel:
        raise NotImplementedError("of a network it is not known what it is made of")

    def several_draws(self, name: str, draws: int, generator: torch.Generator) -> LabelledModel:
        return self.attacker(name, generator)

    def answers_hash(self, images: Tensor) -> str:
        return _hash_of_answers([("model", self.outputs), ("transfer", self.transfer)], images)

    def weights_hash(self) -> str:
        weights = hash_of_weights(self.model) if isinstance(self.model, nn.Module) else ""
        other = hash_of_weights(self.transfer) if isinstance(self.transfer, nn.Module) else ""
        return f"{self.name}-{weights}-{self.draws}-{other}"


class _Output:
    """What a network says, as an attack differentiates it, and as it can be looked at on the way."""

    def __init__(self, outputs: Model) -> None:
        self.outputs = outputs

    def __call__(self, images: Tensor, _labels: Tensor) -> Tensor:
        return self.outputs(images)

    def observed(self, images: Tensor, _labels: Tensor, _rows: Rows | None = None) -> tuple[Tensor, Tensor]:
        outputs = self.outputs(images)
        return outputs, outputs.detach()


def _repeats(model: Model, images: Tensor) -> bool:
    """Whether outputs for the same images are the same, up to what a device may round otherwise."""
    with torch.no_grad():
        first = model(images)
        return all(torch.allclose(model(images), first, 1e-4, 1e-5, equal_nan=True) for _ in range(REPEATS - 1))


def expert_names(num_experts: int) -> tuple[str, ...]:
    """What the experts are called, as attackers and as judges."""
    return tuple(f"expert {i + 1}" for i in range(num_experts))


def _logits(model: Model) -> Model:
    def outputs(images: Tensor) -> Tensor:
        found: Tensor = logits_of(model(images))
        return found

    return outputs


def load_callable(place: str, num_classes: int, channels: int = 3) -> Model:
    """What `module.path:callable` names.

    Args:
        place: a network, or a class or function that makes one, which is called as `--arch` calls it.
        num_classes: K, for what takes it.
        channels: of the images, likewise.

    Returns:
        The network, in evaluation mode if it is a module.

    Raises:
        ValueError: it cannot be found, or is no such thing.
    """
    if place.partition(":")[0] in LIBRARIES:
        raise ValueError(
            f"{place}: expected a run, or module.path:callable of yours, got a library's network, which has random "
            "weights: name a function that makes it and loads its own"
        )
    found = imported(place)
    if not callable(found):
        raise ValueError(f"{place}: expected a network or a function that makes one, got {type(found).__name__}")
    model = found if isinstance(found, nn.Module) else called(place, found, num_classes, channels)
    if not callable(model):
        raise ValueError(f"{place}: expected it to make a network, got {type(model).__name__}")
    return model.eval() if isinstance(model, nn.Module) else model


def check_outputs(outputs: Any, num_classes: int) -> None:
    """Check that outputs (…, B, K) are K numbers for each image.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() != 3 or outputs.shape[-1] != num_classes:
        found = tuple(outputs.shape[1:]) if isinstance(outputs, Tensor) else kind_of(outputs)
        raise ValueError(f"model: expected outputs (B, {num_classes}), as many as there are classes, got {found}")
    check_finite(not_finite(outputs))


def _hash_of_answers(models: Sequence[tuple[str, Model | None]], images: Tensor) -> str:
    digest = hashlib.sha256()
    for name, model in models:
        if model is None:
            continue
        try:
            with torch.no_grad(), seeded(0), exact_means():
                outputs = model(images)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise  # which is no matter of what the images are
            reason = " ".join(str(error).split())
            shape = f"(B, {', '.join(map(str, images.shape[1:]))})"
            raise ValueError(
                f"{name}: expected a network that takes images {shape} of {images.dtype} in [0, 1], got "
                f"{type(error).__name__}: {reason}; wrap it in a function that makes of them what it takes"
            ) from error
        if isinstance(outputs, Tensor):  # `judge` says what is wrong with anything else
            digest.update(repr(outputs.shape).encode())
            digest.update(outputs.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
