"""The learning rate of each step: a warm-up, and one of several ways down; numbers in, a number out.

A rate depends on nothing but the step's number, so that a run that goes on has no state of it to take up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["cosine", "linear", "step", "exponential", "constant", "onecycle"]

FACTORS: dict[str, float] = {"step": 0.1, "exponential": 0.97}  # by which the rate falls, where nobody says
RISE = 0.3  # share of a one-cycle's steps in which the rate rises, without a warm-up that says
START = 25.0  # a one-cycle begins at lr / START
END = 1e4  # and ends at that / END


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of step 0, 1, … of a run of T steps, E of them an epoch.

    The warm-up has W steps, `warmup_epochs` · E, rounded. In it, step s has lr · (s + 1) / W. Behind it, with
    t = s − W, and D = T − W:

    * cosine (Loshchilov & Hutter, arXiv 1608.03983): lr_min + (lr − lr_min) · ½ (1 + cos(π t / D));
    * linear: lr_min + (lr − lr_min) · (1 − t / D);
    * step: lr · factor^m, m being how many of the milestones, in epochs of the whole run, lie at or before s / E;
    * exponential: lr · factor^⌊t / E⌋;
    * constant: lr.

    None of them falls below lr_min. "onecycle" (Smith & Topin, arXiv 1708.07120) is one curve over all T steps: half a
    cosine up from lr / 25 to lr over the warm-up, or 30 % of the steps without one, and half a cosine down to
    lr / 25 / 10⁴, or to lr_min where that is more.

    Args:
        lr: the highest rate.
        steps: T.
        steps_per_epoch: E.
        schedule: see above.
        warmup_epochs: length of the warm-up, which may end within an epoch.
        lr_min: where "cosine" and "linear" end, and below which no other falls.
        milestones: of "step", in epochs, ascending; none are half and three quarters of the run.
        factor: of "step" and "exponential"; None is 0.1 and 0.97.
    """

    lr: float
    steps: int
    steps_per_epoch: int
    schedule: Schedule = "cosine"
    warmup_epochs: float = 0.0
    lr_min: float = 0.0
    milestones: Sequence[float] = ()
    factor: float | None = None

    @property
    def warmup_steps(self) -> int:
        """W."""
        return min(self.steps, round(self.warmup_epochs * self.steps_per_epoch))

    def __call__(self, step: int) -> float:
        """The rate of step 0..T−1; behind the last one it stays where that step would have ended."""
        step = min(step, self.steps)
        if self.schedule == "onecycle":
            return self._onecycle(min(step, self.steps - 1))
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        return _DOWN[self.schedule](self, step)

    def _progress(self, step: int) -> float:
        """t / D, 0 to 1."""
        left = self.steps - self.warmup_steps
        return (step - self.warmup_steps) / left if left else 1.0

    def _cosine(self, step: int) -> float:
        left = max(1, self.steps - self.warmup_steps)
        return self.lr_min + (self.lr - self.lr_min) * 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / left))

    def _linear(self, step: int) -> float:
        return self.lr_min + (self.lr - self.lr_min) * (1 - self._progress(step))

    def _step(self, step: int) -> float:
        epochs = self.steps / self.steps_per_epoch
        milestones = self.milestones or (epochs / 2, 3 * epochs / 4)
        # A product with a fraction may be a rounding above the step that it is.
        passed = sum(step > milestone * self.steps_per_epoch - 1e-6 for milestone in milestones)
        return max(self.lr_min, self.lr * self._factor() ** passed)

    def _exponential(self, step: int) -> float:
        epochs = (step - self.warmup_steps) // self.steps_per_epoch
        return max(self.lr_min, self.lr * self._factor() ** epochs)

    def _constant(self, _step: int) -> float:
        return self.lr

    def _factor(self) -> float:
        return FACTORS[self.schedule] if self.factor is None else self.factor

    def _onecycle(self, step: int) -> float:
        low, last = self.lr / START, self.steps - 1
        end = max(self.lr_min, low / END)
        top = min(last, max(0.0, (self.warmup_steps or RISE * self.steps) - 1))  # the step of the highest rate
        if step <= top:
            return _half_cosine(low, self.lr, step / top if top > 0 else 1.0)
        return _half_cosine(self.lr, end, (step - top) / (last - top))


_DOWN: dict[str, Callable[[LearningRate, int], float]] = {
    "cosine": LearningRate._cosine,
    "linear": LearningRate._linear,
    "step": LearningRate._step,
    "exponential": LearningRate._exponential,
    "constant": LearningRate._constant,
}


def _half_cosine(start: float, end: float, share: float) -> float:
    """From `start` to `end` by half a cosine, `share` of the way."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
