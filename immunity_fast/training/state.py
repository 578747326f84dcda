"""A training run in memory: what it consists of, and how all of it is saved and taken up again."""

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunity_fast.data.augmentation import as_float
from immunity_fast.data.datasets import STATISTICS_IMAGES, AnySplit, ImageDataset, Split
from immunity_fast.data.loader import Batch, TrainLoader
from immunity_fast.data.mixing import Mixer
from immunity_fast.data.own import Batches, Items, statistics
from immunity_fast.data.own_loader import BatchLoader, ItemLoader, warn_of_same_batches
from immunity_fast.data.sampling import EVALUATION_BATCH, sample, sample_order
from immunity_fast.data.streaming import StreamedSplit
from immunity_fast.experts.registry import has_stems, split_names
from immunity_fast.experts.stems import chosen_stem
from immunity_fast.models.gate import kind_of_gate
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.models.stacking import own_tensors
from immunity_fast.peers.sequence import buffers_alike, vote_
from immunity_fast.runtime import distributed
from immunity_fast.runtime.compilation import Compile, Compiled, Log, at_size, resolve
from immunity_fast.runtime.files import abbreviated
from immunity_fast.runtime.precision import chosen_amp
from immunity_fast.runtime.strategies import Strategy, fastest
from immunity_fast.targets import hard_labels
from immunity_fast.training.adversarial import InnerAttack
from immunity_fast.training.beginning import Beginning, begin
from immunity_fast.training.checkpoint import (
    check_classes,
    check_tensors,
    checked_info,
    described_model,
    load_checkpoint,
    load_module,
    load_optimizer_tensors,
    module_tensors,
    optimizer_tensors,
    under,
)
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.ema import WeightAverage
from immunity_fast.training.optimizers import possible_state
from immunity_fast.training.poison import check_poison, with_poison
from immunity_fast.training.sharding import shard
from immunity_fast.training.shards import REST, load_shards, outline
from immunity_fast.training.step import TrainStep

CUDA_STATE = 16  # bytes of a GPU's generator
IN_SHARDS = ("model", "ema", "optimizer")  # what names of tensors begin with


class TrainingState:
    """A run in memory: model, optimiser, batches and random states, and where it stands.

    `tensors` and `info` are all of it that a checkpoint holds; `load` takes up from them.

    Args:
        config: the settings.
        dataset: what is trained on; it is brought to the device.
        device: where everything is computed.
        log: what takes lines on code that could not be compiled; None is `warnings.warn`.
        traceback_file: where the tracebacks of such are appended to.
        fresh: whether it is a new run, whose experts begin from `config.weights` and apart from each other; or one that
            `load` takes up.
        model: what is trained, in place; None is a new one of what the settings name.

    Attributes:
        beginning: what was done to a new run's weights, for the checkpoint and for a person; see `beginning.begin`.

    Raises:
        ValueError: settings that do not go together.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: ImageDataset,
        device: torch.device,
        log: Log | None = None,
        traceback_file: Path | None = None,
        *,
        fresh: bool = True,
        model: ImmunityMoE | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self._log, self._traceback_file = log, traceback_file
        dataset = dataset.labelled(config.ignore_index)
        clean = dataset
        self.poison, self.poison_record, dataset = with_poison(config, dataset)
        self.dataset = dataset.to(device)
        torch.manual_seed(config.seed)
        self.description = self._describe(dataset, model)
        self.loader = self._new_loader()
        self.mixer = self._new_mixer()
        self.gate_generator = torch.Generator().manual_seed(config.seed + 1)
        if model is not None:  # its gate draws from what the checkpoint has
            self.gate_generator = model.gate.generator = model.gate.generator or self.gate_generator
        strategy = self._strategy()
        with distributed.together():  # a file of weights may be missing on one machine
            self.model = self._new_model(strategy, dataset) if model is None else model
            if config.noise not in (None, self.model.noise):
                raise ValueError(
                    f"--ensemble {config.ensemble}: expected a model with noise={config.noise}, got {self.model.noise}"
                )
            self.beginning = begin(self.model, config) if fresh else Beginning(None, [])
        if config.shard:
            self.model.list_experts_()  # in one process, too: a run has one kind of checkpoint
            if distributed.count() > 1:
                shard(self.model, device=device)
        self.model.to(device)
        if distributed.rank():  # whatever is random in a network: not the same in every process
            torch.manual_seed(config.seed + 3 + distributed.rank())
        group = distributed.group()
        weights = None
        if config.class_weights is not None:  # or a data set would be read for its labels
            weights = config.weights_of_classes(dataset.train.labels, dataset.num_classes)
        self.loss_fn = config.loss_fn(dataset.image_size, "" if group is None else group.group_name, weights).to(device)
        self.method = config.method("" if group is None else group.group_name, weights)
        if self.method is not None:
            self.method.to(device)
            self.method.check_model(self.model)
            train: Any = dataset.train
            if self.method.needs_examples and isinstance(train, Batches):
                raise ValueError(
                    f"ensemble: expected another than {config.ensemble}, which looks at training images of its choice, "
                    "beside a loader, which makes the batches"
                )
        self._make_step(strategy)
        self._expert_logits = Compiled(self.model.expert_logits, self._compile, device, log, traceback_file)
        self.fingerprint = clean.fingerprint()  # as an evaluation reads the data
        distributed.check_same(
            "--data",
            f"{self.fingerprint} {self.poison_record}",
            f"expected the same images and labels of {config.dataset} in all processes, got others",
        )
        self.epoch = 0  # epochs finished
        self.history: list[dict[str, Any]] = []  # the records of these epochs
        self.stopped: str | None = None  # why training has ended before its last epoch, if it has
        self.saved_callbacks: tuple[list[Any], dict[str, Tensor]] = ([], {})  # that the checkpoint has
        self.saved_step = 0  # optimiser steps that the run's checkpoint has
        self.sums = torch.zeros(
            len(self.train_step.measured), dtype=torch.float64, device=device
        )  # over the present epoch's batches
        self._of_step = torch.zeros_like(self.sums)  # over the present step's

    def _describe(self, dataset: ImageDataset, model: ImmunityMoE | None) -> dict[str, Any]:
        """What a checkpoint says of the model, so that it can be made again."""
        config = self.config
        description: dict[str, Any] = {
            "arch": config.arch,
            "num_experts": config.experts,
            "num_classes": dataset.num_classes,
            "stage": config.stage,
            "image_size": list(dataset.image_size),
        }
        stem: str | None = chosen_stem(config.stem, dataset.image_size)
        if model is not None:
            stages = (model.stage,) if isinstance(model.stage, str) else model.stage
            description["stage"] = ",".join(stages[: len(split_names(model.arch))] if model.arch else stages)
            stem = model.stem or "cifar"
        if stem != "cifar" and any(has_stems(name) for name in split_names(config.arch)):
            description["stem"] = stem
        if dataset.channels != 3:
            description["channels"] = dataset.channels
        if (noise := config.noise if model is None else model.noise) is not None:
            description["noise"] = list(noise)
        if model is None and config.experts > 1 and config.gate_kind != "switch":
            description["gate"] = config.gate_kind
        if model is not None and (kind := kind_of_gate(model.gate)) != "switch":
            description["gate"] = kind
        return description

    def _new_loader(self) -> TrainLoader | BatchLoader:
        """The training batches, or this process' part of each."""
        config = self.config
        train: Any = self.dataset.train
        if config.auto_batch and isinstance(train, Batches):
            raise ValueError("auto_batch: expected False beside a loader, which makes the batches, got True")
        if config.auto_batch and distributed.count() > 1:
            raise ValueError(
                f"--auto-batch: expected one process, got {distributed.count()}, of which one may find its memory "
                "short while the others wait for it; name a --batch-size that fits, and --accumulate"
            )
        if config.shards and isinstance(train, Batches):
            raise ValueError("shards: expected False beside a loader, which makes the batches, got True")
        flip = self.dataset.flip if config.flip == "auto" else config.flip == "on"
        augment: dict[str, Any] = {"padding": config.crop_padding, "degrees": config.rotation, "flip": flip}
        allowed: dict[str, Any] = {"classes": self.dataset.num_classes, "ignore_index": config.ignore_index}
        if isinstance(train, Batches):
            warn_of_same_batches(train)
            wanted = augment if getattr(self.dataset, "augment", False) else None
            return BatchLoader(train, config.seed + 2, augment=wanted, rank=distributed.rank(), **allowed)
        options = augment | {"rank": distributed.rank(), "processes": distributed.count()}
        if config.shards:
            options["parts"] = _checked_parts(config, len(train))
        if isinstance(train, Items):
            return ItemLoader(train, config.batch_size, config.seed + 2, **allowed, **options)
        return TrainLoader(train, config.batch_size, config.seed + 2, **options)

    def _new_model(self, strategy: Strategy, dataset: ImageDataset) -> ImmunityMoE:
        """The mixture, or the single network, with random weights; `dataset` is still where it was read."""
        config = self.config
        train: Any = dataset.train
        if isinstance(train, (Items, Batches)):
            mean, std = statistics(train.sample(STATISTICS_IMAGES))
        elif isinstance(train, Split) and train.images.is_floating_point():
            mean, std = statistics([train.images])
        else:
            mean, std = channel_statistics(train)
        options: dict[str, Any] = {
            "batching": strategy.batching if config.batching == "auto" else config.batching,
            "mean": mean,
            "std": std,
        }
        if config.experts > 1:
            options["generator"] = self.gate_generator
        return described_model(self.description, **options)

    @property
    def _compile(self) -> Compile:
        """FSDP2's gathering is nothing to be compiled."""
        return "off" if self.config.shard else self.config.compile

    @property
    def _compile_step(self) -> Compile:
        return self._compile if self.method is None or self.method.compiles else "off"

    def _strategy(self) -> Strategy:
        """How experts run at once, and how Grad-CAM is differentiated, where the settings leave that open."""
        compiled = resolve(self.config.compile, self.device) != "off"
        steps = self.config.epochs * len(self.loader) if compiled else None
        return fastest(self.device.type, self.config.arch, compiled_steps=steps)

    def _make_step(self, strategy: Strategy) -> None:
        """What makes steps of batches: the optimiser, its rates, the average of the weights, and the step."""
        config = self.config
        self.optimizer = config.optimizer_of(self.model)
        self.learning_rate = config.learning_rate(self.steps_per_epoch, self._stages)
        self.average = None if config.ema is None else WeightAverage(self.model, config.ema)
        self.train_step = self._new_step(strategy, self._log, self._traceback_file)

    @property
    def _stages(self) -> int:
        return 1 if self.method is None else self.method.stages(self.config.experts)

    def begin_epoch(self) -> None:
        """Get what trains the experts ready for the epoch, or for the rest of it."""
        if self.method is None:
            return
        config, first = self.config, self.loader.position == 0
        where = (self.model, self.epoch, config.epochs, config.seed)
        if not (self.method.begin_epoch(*where) and first):
            return
        if self.average is not None:  # what was trained before is what was measured of it
            self.average.hand_over()
        self.method.begin_stage(*where)
        self.optimizer.state.clear()
        if self.average is not None:
            self.average.load(self.model.state_dict(), 0)

    def end_epoch(self) -> None:
        """Have what trains the experts say, behind an epoch's steps, how much each of them counts."""
        if self.method is None:
            return
        config = self.config
        self.model.eval()
        with nullcontext() if self.average is None else self.average.applied():
            votes = self.method.end_epoch(
                self.model, self._examples, self.epoch, config.epochs, config.seed, config.eps
            )
        self.model.train()
        votes = distributed.of_first(votes)  # all have looked, but not on the same bits
        if votes is not None:
            vote_(self.model.gate, votes)
            if self.average is not None:
                buffers_alike(self.average.tensors(), self.model.gate, "gate.")

    def _examples(self, count: int) -> tuple[Tensor, Tensor]:
        """At most so many images of the training set, always the same, in [0, 1], and their labels."""
        train: Any = self.dataset.train
        if isinstance(train, Items):
            rows = torch.linspace(0, len(train) - 1, min(count, len(train))).long().tolist()
            images, targets = train.__getitems__(rows)
        else:
            found = sample(train, count)
            images, targets = found.images, found.labels
        images, labels = as_float(images.to(self.device)), hard_labels(targets.to(self.device))
        counted = labels == labels if self.config.ignore_index is None else labels != self.config.ignore_index
        return images[counted], labels[counted]

    @property
    def stage_epochs(self) -> int:
        """How many epochs a stage of the training has."""
        return self.config.epochs // self._stages

    @property
    def in_last_stage(self) -> bool:
        """Whether the epoch that was finished last is one of the last stage's, in which every expert has its vote."""
        return self.epoch > self.config.epochs - self.stage_epochs

    def untouched(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of what steps change and does not follow from the settings; for `begin_again`."""
        kept = {f"model/{name}": value for name, value in own_tensors(self.model).items()}
        kept |= {"random/torch": torch.get_rng_state(), "random/gate": self.gate_generator.get_state()}
        if self.device.type == "cuda":
            kept["random/cuda"] = torch.cuda.get_rng_state(self.device)
        return {name: value.detach().to("cpu", copy=True) for name, value in kept.items()}

    def begin_again(self, config: TrainConfig, kept: Mapping[str, Tensor]) -> None:
        """Stand where a run with such settings begins, whatever steps were taken, or failed halfway.

        Args:
            config: other sizes of batches, and else the same settings.
            kept: `untouched`, from before the first step.
        """
        self.config = config
        with torch.no_grad():
            for name, value in own_tensors(self.model).items():
                value.copy_(kept[f"model/{name}"])
        self.model.zero_grad(set_to_none=True)
        self.loader = self._new_loader()
        self.mixer = self._new_mixer()
        strategy = self._strategy()
        if config.batching == "auto":
            self.model.batching = strategy.batching
        self._make_step(strategy)
        self.sums.zero_()
        self.gate_generator.set_state(kept["random/gate"])
        torch.set_rng_state(kept["random/torch"])
        if "random/cuda" in kept:
            torch.cuda.set_rng_state(kept["random/cuda"], self.device)
        self.begin_epoch()

    def _new_mixer(self) -> Mixer:
        config = self.config
        return Mixer(config.mixup, config.cutmix, self.dataset.image_size, -1 - config.seed)

    def _new_step(self, strategy: Strategy, log: Log | None, traceback_file: Path | None) -> TrainStep:
        """What makes one step of a batch, with the attack in it where training is adversarial."""
        config = self.config
        attack = None
        if config.inner_attack is not None:
            attack = InnerAttack(
                self.model,
                config.inner_attack,
                amp=chosen_amp(config.amp, self.device),
                compile=self._compile_step,
                attacked=None if self.method is None else self.method.attacked(self.model),
                device=self.device,
                log=log,
                traceback_file=traceback_file,
            )
        return TrainStep(
            self.model,
            self.loss_fn,
            self.optimizer,
            clip_grad_norm=config.clip_grad_norm,
            amp=chosen_amp(config.amp, self.device),
            double_backprop=strategy.double_backprop if config.double_backprop == "auto" else config.double_backprop,
            compile=self._compile_step,
            log=log,
            traceback_file=traceback_file,
            attack=attack,
            trades_weight=config.trades_weight,
            group=distributed.group(),
            checkpoint_activations=config.checkpoint_activations,
            method=self.method,
            shards=config.shards,
        )

    @property
    def steps_per_epoch(self) -> int:
        """How many optimiser steps an epoch has; the last one may have fewer batches than the others."""
        return -(-len(self.loader) // self.config.accumulate)

    @property
    def step(self) -> int:
        """How many optimiser steps of the run were taken so far, or begun."""
        return self.epoch * self.steps_per_epoch + -(-self.loader.position // self.config.accumulate)

    @property
    def steps(self) -> int:
        """How many optimiser steps the whole run takes."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def between_steps(self) -> bool:
        """Whether no step has begun of which batches are still to come."""
        return self.loader.position % self.config.accumulate == 0 or self.loader.position == len(self.loader)

    @property
    def lr(self) -> float:
        """The learning rate of the step that was taken last."""
        last: float = self.optimizer.param_groups[0]["lr"]
        return last

    def advance(self, batch: Batch) -> Tensor:
        """Take the step of the batch that the loader gave last, or, of several batches a step, its share of that.

        Returns:
            What `train_step.measured` names, float64, the mean over the step's batches so far.
        """
        number, accumulate = self.loader.position - 1, self.config.accumulate
        index = number % accumulate
        count = min(accumulate, len(self.loader) - (number - index))  # an epoch's last step has what is left
        of_stage = self.steps // self._stages
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate((self.step - 1) % of_stage)
        mixing = self.mixer.draw()
        if mixing is not None:
            mixing = mixing.to(self.device, non_blocking=True)
        if self.method is not None:
            self.method.begin_batch(self.model, self.epoch * len(self.loader) + number, self.config.seed)
        measured = self.train_step(*batch, mixing, index=index, count=count)
        self.sums += measured
        if self.average is not None and index + 1 == count:
            self.average.update()
            if self.method is not None:
                self.method.after_average(self.model, self.average.tensors())
        if count == 1:
            return measured
        self._of_step = measured if index == 0 else self._of_step + measured
        return self._of_step / (index + 1)

    def expert_logits(self, images: Tensor) -> Tensor:
        """`model.expert_logits` of at most `EVALUATION_BATCH` images, by code that is compiled for one size only."""
        return at_size(self._expert_logits, images, min(EVALUATION_BATCH, len(self.dataset.validation)))

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors, or the average of them, where there is one: what is evaluated."""
        return self.model.state_dict() if self.average is None else self.average.tensors()

    def synchronize(self) -> None:
        """Make what each process has measured on its samples the same in all; before anything is made of it."""
        self.sums = distributed.mean(self.sums)
        distributed.average_buffers(self.model)
        if self.method is not None:  # a mean of equal numbers may be another by its rounding
            self.method.after_update(self.model)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the rest of the run depends on, and is a tensor."""
        random = {"random/torch": torch.get_rng_state(), "random/gate": self.gate_generator.get_state()}
        if self.mixer.active:
            random["random/mixing"] = self.mixer.state()
        if self.device.type == "cuda":
            random["random/cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            **module_tensors("model", self.model),
            **optimizer_tensors("optimizer", self.optimizer, self._parameters()),
            **{f"loader/{name}": value for name, value in self.loader.state().items()},
            **{f"scaler/{name}": torch.tensor(value) for name, value in self.train_step.scaler.state_dict().items()},
            **({f"ema/{name}": value for name, value in self.average.tensors().items()} if self.average else {}),
            **random,
            "sums": self.sums,
        }

    def info(self) -> dict[str, Any]:
        """What JSON can hold of the run's place and nature."""
        return {
            "model": self.description,
            "data": self.fingerprint,
            **({} if self.dataset.listing is None else {"listing": self.dataset.listing}),
            **({} if self.poison_record is None else {"poison": self.poison_record}),
            "classes": list(self.dataset.classes),
            "epoch": self.epoch,
            "step": self.step,
            # What the optimiser keeps: of parameters that have had a gradient, which need not be all.
            "momenta": len(optimizer_tensors("optimizer", self.optimizer, self._parameters())),
            **({} if self.beginning.record is None else {"weights": self.beginning.record}),
            **({} if self.stopped is None else {"stopped": self.stopped}),
        }

    def load(self, path: Path) -> None:
        """Take up where a checkpoint was written.

        Raises:
            ValueError: it is not one that this run can have written.
        """
        shards = path.is_dir()
        tensors, info = distributed.read_by_first(lambda: load_checkpoint(path / REST if shards else path))
        checked_info(path, info, "model", "data", "epoch", "step")
        if shards:
            tensors |= self._read_shards(path)
        load_module(path, self.model, under("model", tensors), "model/")
        if info["model"] != self.description:
            raise ValueError(f"{path}: expected a model {self.description}, got {info['model']}")
        listed = self.dataset.listing is not None and info.get("listing") == self.dataset.listing
        if info["data"] != self.fingerprint and not listed:
            raise ValueError(f"{path}: trained on other data than {self.config.dataset} as it is now")
        check_poison(path, info, self.poison_record)
        check_classes(path, info, self.dataset.classes)
        if "sums" not in tensors:
            raise ValueError(f"{path}: a model alone, such as of joined networks: there is no training to go on with")
        self.saved_callbacks = info.get("callbacks", []), under("callbacks", tensors)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("callbacks/")}
        self._check(path, tensors, info)
        if self.average is not None:
            of_stage = self.steps // self._stages
            self.average.load(under("ema", tensors), info["step"] if self._stages == 1 else info["step"] % of_stage)
        load_optimizer_tensors(self.optimizer, under("optimizer", tensors), self._parameters())
        self.loader.load_state(under("loader", tensors))
        if scaler := under("scaler", tensors):
            self.train_step.scaler.load_state_dict({name: value.item() for name, value in scaler.items()})
        random = under("random", tensors)
        self.gate_generator.set_state(random["gate"])
        if self.mixer.active:
            self.mixer.load_state(random["mixing"])
        if distributed.rank():  # the states are those of the process that wrote them
            torch.manual_seed(self.config.seed + 3 + distributed.rank() + info["step"])
        else:
            torch.set_rng_state(random["torch"])
            if self.device.type == "cuda" and "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], self.device)
        self.sums = tensors["sums"].to(self.device)
        self.epoch = info["epoch"]
        self.stopped = info.get("stopped")
        self.beginning = Beginning(info.get("weights"), [])

    def shards(self) -> dict[str, Tensor]:
        """Of `tensors` those that are in shards, where there are such, and what lies beside them in the modules."""
        return {name: value for name, value in self.tensors().items() if name.split("/")[0] in IN_SHARDS}

    def rest(self) -> dict[str, Tensor]:
        """Of `tensors` all others."""
        return {name: value for name, value in self.tensors().items() if name.split("/")[0] not in IN_SHARDS}

    def _read_shards(self, folder: Path) -> dict[str, Tensor]:
        """What a checkpoint has of `shards`, each process its part; what is none of this run's is without numbers."""
        with distributed.together():
            found = outline(folder)
        own = self.shards()
        possible = possible_state(self.optimizer, self._parameters())
        own |= {f"optimizer/{name}": tensor for name, tensor in possible.items()}
        alike = [name for name, value in found.items() if name in own and own[name].shape == value.shape]
        filled = {name: torch.zeros_like(own[name]).detach() for name in alike if own[name].dtype == found[name].dtype}
        load_shards(folder, filled)
        return found | filled

    def _parameters(self) -> list[Tensor]:
        """In the order in which checkpoints number them, whatever the optimiser's groups."""
        return list(self.model.parameters())

    def _check(self, path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Check that a checkpoint is as this run would write it at some step.

        Raises:
            ValueError: it is not; by file and entry.
        """
        possible = possible_state(self.optimizer, self._parameters())
        momenta = {f"optimizer/{name}": tensor for name, tensor in possible.items()}
        expected = {name: tensor for name, tensor in self.tensors().items() if name not in momenta}
        there = [name for name in momenta if name in tensors]
        if len(there) != info.get("momenta", len(there)):
            lost = "".join(f"; it lacks {name}" for name in momenta if name not in tensors)
            what = "momentum buffers" if self.config.optimizer == "sgd" else "tensors of the optimiser"
            raise ValueError(f"{path}: has {len(there)} of {info['momenta']} {what}{abbreviated(lost)}")
        of_parameters = {name.split("/")[1] for name in there}
        for name in momenta:  # of a parameter all or nothing: a fused optimiser would read what is not there
            if name.split("/")[1] in of_parameters and name not in tensors:
                raise ValueError(f"{path}: not a whole checkpoint: {name} is missing")
        expected |= {name: momenta[name] for name in there}
        if isinstance(self.loader, BatchLoader):  # the state of somebody else's loader, which is as it likes
            expected = {name: tensor for name, tensor in expected.items() if not name.startswith("loader/own")}
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("loader/own")}
        # The state of a GPU's generator is taken up on a GPU alone: a run may go on without one.
        of_gpu = expected.pop("random/cuda", torch.empty(CUDA_STATE, dtype=torch.uint8))
        if "random/cuda" in tensors:
            expected["random/cuda"] = of_gpu
        check_tensors(path, tensors, expected)
        generators = (name for name in tensors if name.startswith("loader/generator"))
        for name in ("random/torch", "random/gate", "random/mixing", *generators):
            if name in tensors:
                check_generator_state(path, name, tensors[name])
        epoch, step, position = info["epoch"], info["step"], int(tensors["loader/position"])
        batches, epochs, accumulate = len(self.loader), self.config.epochs, self.config.accumulate
        whole = epoch <= epochs and 0 <= position < (batches if epoch < epochs else 1) and position % accumulate == 0
        if not whole or step != epoch * self.steps_per_epoch + position // accumulate:
            of_each = f" of {accumulate} batches" if accumulate > 1 else ""
            raise ValueError(
                f"{path}: stands at epoch {epoch}, step {step}, loader/position {position}, which is no place in a run "
                f"of {epochs} epochs of {self.steps_per_epoch} steps{of_each}"
            )
        for name in ("scaler/scale", "scaler/growth_factor", "scaler/backoff_factor"):
            if name in tensors and not 0 < float(tensors[name]) < math.inf:
                raise ValueError(f"{path}: {name}: expected a finite number above 0, got {float(tensors[name])}")


def _checked_parts(config: TrainConfig, images: int) -> int:
    """In how many parts the training images of each batch are, where each expert has one of its own.

    Raises:
        ValueError: there are too few images, or several processes.
    """
    if distributed.count() > 1:
        raise ValueError(f"--shards: expected one process, got {distributed.count()}")
    if images < config.experts:
        raise ValueError(f"--shards: expected at least {config.experts} training images, one an expert, got {images}")
    return config.experts


def check_generator_state(path: Path, name: str, state: Tensor) -> None:
    """Check that a CPU generator can have this state (5056,), uint8.

    Raises:
        ValueError: it cannot; by file and entry.
    """
    try:
        torch.Generator().set_state(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: {name} is no state of a generator ({error})") from error
    # PyTorch takes these two each for itself, and would read beyond its 624 words. 1 and 0 are those of a new seed.
    left, following = int(state[8:12].view(torch.int32)), int(state[16:24].view(torch.int64))
    if left + following != 625 and (left, following) != (1, 0):
        raise ValueError(f"{path}: {name} is no state of a generator (word {following} of 624, {left} left)")


def channel_statistics(images: Tensor | AnySplit) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in units of [0, 1].

    Args:
        images: uint8 (n, C, H, W), or a split; of a streamed one a fixed sample of at most `STATISTICS_IMAGES` is
            looked at.
    """
    parts: Iterable[Tensor]
    if isinstance(images, StreamedSplit):
        parts = images.stream(torch.split(sample_order(images, STATISTICS_IMAGES), EVALUATION_BATCH))
    else:
        parts = [images if isinstance(images, Tensor) else images.images]
    counts = torch.stack([_levels(part) for part in parts]).sum(0).double()
    levels = torch.arange(256, dtype=torch.float64, device=counts.device) / 255
    mean = counts @ levels / counts.sum(1)
    variance = counts @ levels.square() / counts.sum(1) - mean.square()
    return mean.tolist(), variance.clamp_min(0).sqrt().clamp_min(1 / 255).tolist()


def _levels(images: Tensor) -> Tensor:
    """How often each channel has each value, int64 (C, 256)."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
