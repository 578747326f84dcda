"""The training of a mixture from Python: what the command `train` does, on any data, with callbacks of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from immunity_fast.data.datasets import ImageDataset
from immunity_fast.evaluation.results import Results
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.runtime import cli, distributed
from immunity_fast.training.callbacks import Callback, Callbacks
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.loop import train
from immunity_fast.training.preparation import prepare
from immunity_fast.training.records import Records
from immunity_fast.training.run_evaluation import evaluate_trained
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState


class Trainer:
    """Trains a mixture, or a single network, on a device or, under `torchrun`, on several.

    Args:
        config: the settings; None are the defaults of `TrainConfig`.
        train: what is trained on; None is what `config.dataset` and `config.data` name.
        model: what is trained, in place; None is a new one of what `config` names.
        callbacks: are called in turn, see `Callback`.
        out: the folder of the run, with its settings, records and checkpoints; None writes nothing.
        device: instead of `config.device`.
        progress: show a bar and a line an epoch; otherwise such lines go to the logger "immunity_fast".

    Attributes:
        state: the training in memory, once it has been prepared.
        run: the run's folder, if there is one.
    """

    def __init__(
        self,
        config: TrainConfig | None = None,
        train: ImageDataset | None = None,
        *,
        model: ImmunityMoE | None = None,
        callbacks: Sequence[Callback] = (),
        out: str | Path | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> None:
        config = TrainConfig() if config is None else config
        self.config = config if device is None else dataclasses.replace(config, device=str(device))
        self.state: TrainingState | None = None
        self.run: Run | None = None
        self.progress = progress
        self._data, self._model = train, model
        self._out = None if out is None else Path(out)
        self._callbacks = Callbacks(callbacks, self)

    def fit(self, *, resume: bool = False) -> Records:
        """Train to the end.

        Args:
            resume: go on with the run in the folder `out`.

        Returns:
            The epochs' records, as metrics.jsonl has them.
        """
        device = cli.pick_device(self.config.device)
        with ExitStack() as held:
            held.enter_context(distributed.processes(device))
            self.prepare(held, resume=resume)
            self.train()
        return self.history

    def prepare(self, held: ExitStack, *, resume: bool = False) -> tuple[TrainingState, Run | None]:
        """Everything before the first step; the run stays locked until `held` ends."""
        folder = self._out
        if self.state is not None:
            return self.state, self.run
        main_process = distributed.rank() == 0
        with distributed.together():
            if resume and folder is not None and main_process:
                held.enter_context(Run(folder).locked())
        self.state, self.run = prepare(
            folder,
            resume,
            self.config,
            dataset=self._data,
            model=self._model,
            log=cli.console.print if self.progress else None,
        )
        with distributed.together():
            if not resume and self.run is not None and main_process:
                held.enter_context(self.run.locked())
        return self.state, self.run

    def train(self) -> None:
        """Train what has been prepared to the end."""
        assert self.state is not None
        train(self.state, self.run, self._callbacks, progress=self.progress)

    def evaluate(self) -> Results:
        """What the command ends with: attacks on test images; tables, figures and the report in the run's folder.

        Returns:
            What was found, which a notebook shows as tables; `report` is the file for a browser.

        Raises:
            ValueError: nothing was trained yet, or nothing was written of it.
        """
        if self.state is None or self.run is None:
            raise ValueError("out: expected a Trainer with a folder of its run, which has been trained, got neither")
        return evaluate_trained(self.state, self.run, printed=False)

    def stop(self, reason: str = "a callback has asked for it") -> None:
        """End the training after the present epoch, as if it were the last one.

        Args:
            reason: is shown and kept.
        """
        assert self.state is not None
        self.state.stopped = self.state.stopped or reason

    @property
    def model(self) -> ImmunityMoE:
        """What is trained."""
        assert self.state is not None
        return self.state.model

    @property
    def history(self) -> Records:
        """The records of the epochs so far, which a notebook shows as a table."""
        return Records() if self.state is None else Records(self.state.history)
