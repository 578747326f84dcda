"""A batch that does not fit into memory, taken in parts: smaller batches, and as many more an optimiser's step."""

from __future__ import annotations

import dataclasses
import gc
import json

import torch

from immunity_fast.data.loader import TrainLoader
from immunity_fast.runtime.failures import out_of_memory
from immunity_fast.runtime.files import write_atomically
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState

FIRST_STEPS = 3  # in which a batch may turn out too large: all memory that a step takes is taken by the second


class AutoBatch:
    """Begins a run again with smaller batches, where the first ones do not fit and its settings ask for that.

    The run is then, bit for bit, what it would be had it been begun with the smaller batches: nothing is left of the
    steps that were taken.

    Args:
        state: which is to take steps; it is watched from its beginning alone.
        run: whose settings in `config.json` become those that were found; None is a training that is not saved.
    """

    def __init__(self, state: TrainingState, run: Run | None) -> None:
        self.state, self.run = state, run
        begins = state.config.auto_batch and state.step == 0
        self._kept = state.untouched() if begins else None
        self._older = torch.ones((), requires_grad=True) * 1  # than any graph of a step

    def instead(self, error: Exception) -> str | None:
        """What was tried, where an exception in a step means that memory is short, and smaller batches can be tried."""
        tried = out_of_memory(error)
        possible = self._kept is not None and smaller(self.state.config, self._batch) is not None
        return tried if possible else None

    def step_taken(self) -> None:
        """After a step of the optimiser: behind the first ones nothing is kept to begin again with."""
        if self.state.step >= FIRST_STEPS:
            self._kept = None

    def begin_again(self, tried: str) -> str:
        """Stand at the beginning with smaller batches, after `instead`, outside of the exception.

        Args:
            tried: what `instead` has said.

        Returns:
            A line on it.
        """
        state, before = self.state, self._batch
        config = smaller(state.config, before)
        assert config is not None
        assert self._kept is not None
        # A backward pass that has failed leaves what it had still to do in PyTorch's queue, with the graph; a later one
        # drops that once it has come to something older.
        torch.autograd.backward(self._older, retain_graph=True)
        gc.collect()  # graphs have cycles
        if state.device.type == "cuda":
            torch.cuda.empty_cache()
        state.begin_again(config, self._kept)
        if self.run is not None:
            write_atomically(self.run.config_file, json.dumps(config.to_json(), indent=2).encode())
        return (
            f"{tried}: batches of {before} images do not fit ({state.device}); beginning again with --batch-size "
            f"{config.batch_size} --accumulate {config.accumulate}: as many images a step, but BatchNorm and position "
            f"stability see {config.batch_size}"
        )

    @property
    def _batch(self) -> int:
        """Images a batch, of which a small data set may have fewer than was asked for."""
        loader = self.state.loader
        return loader.batch_size if isinstance(loader, TrainLoader) else self.state.config.batch_size


def smaller(config: TrainConfig, batch: int) -> TrainConfig | None:
    """Settings for as many images a step in smaller batches; None where there are none.

    Args:
        config: the settings.
        batch: images a batch; its half is next, or of an odd number the largest part of which there is a whole number.
    """
    part = next((batch // count for count in range(2, batch + 1) if batch % count == 0), None)
    if part is None:
        return None
    return dataclasses.replace(config, batch_size=part, accumulate=config.accumulate * (batch // part))


def is_begun_with(begun: TrainConfig, config: TrainConfig) -> bool:
    """Whether a run of some settings is what others begin, whatever size of batches it has found."""
    if config.auto_batch and begun.batch_size * begun.accumulate <= config.batch_size * config.accumulate:
        config = dataclasses.replace(config, batch_size=begun.batch_size, accumulate=begun.accumulate)
    return begun == config
