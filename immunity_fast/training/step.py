"""One training step: augmentation, forward, loss through Grad-CAM, backward, clipping, optimiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from immunity_fast.data.augmentation import apply_affine
from immunity_fast.data.mixing import apply_mixing
from immunity_fast.losses import Classification, FusedImmunityLoss
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.models.objective import loss_and_terms
from immunity_fast.models.recomputing import check_recomputable
from immunity_fast.models.stacking import channels_last_
from immunity_fast.peers.base import EnsembleLoss
from immunity_fast.runtime import strategies
from immunity_fast.runtime.compilation import Compile, Compiled, Log
from immunity_fast.runtime.precision import Amp, autocast, begin_momentum, grad_scaler
from immunity_fast.runtime.sharding import is_sharded
from immunity_fast.runtime.strategies import DoubleBackprop
from immunity_fast.training.adversarial import InnerAttack, trades_losses
from immunity_fast.training.optimizer import FusedSGD
from immunity_fast.training.optimizers import lay_out_state

MEASURED = ("loss", "cross_entropy", "mutual_information_loss", "position_stability")


class TrainStep:
    """Updates a model on a batch. All up to the gradient is one function, which can be compiled to one graph.

    Nothing in a step waits for the device: the learning rate is read from the optimiser's `param_groups`, a gradient is
    clipped where it is, and what is measured stays there.

    Args:
        model: on its device, which is fixed from here on. On a GPU its weights are laid out channels-last, unless its
            `memory_format` is "contiguous".
        loss_fn: what is minimised.
        optimizer: over the model's parameters; a fused one, or else float16's scaler waits for the device. A `FusedSGD`
            clips and updates in a launch each.
        clip_grad_norm: the gradient's norm is brought down to it where it is larger; None does not clip.
        amp: "bf16" and "fp16" run convolutions and products in half precision; see `precision`.
        double_backprop: see `FusedImmunityLoss.from_head`; "auto" is what was measured to be faster, see `strategies`.
        compile: "on" and "max" compile; "auto" does on a GPU. Where that fails, the step is eager, and says so.
        log, traceback_file: what takes such a line, and the whole traceback; see `Compiled`.
        method: another loss in the place of `loss_fn`, which then looks at heatmaps alone; see `peers.EnsembleLoss`.
        shards: whether each expert learns from a part of a batch of its own, the i-th N-th of it; images are then mixed
            with others of their part.
        attack: what makes adversarial images of a batch, on which the whole of the loss is then minimised; None trains
            on the images as they are. With TRADES' attack, cross-entropy is that of `adversarial.trades_losses`.
        trades_weight: λ of TRADES.
        checkpoint_activations: compute activations again in the backward pass, see `ImmunityMoE`, whose attribute it
            sets; False leaves that as it is.
        group: processes that train together, each on as many samples of its own; None is this one alone. Then
            `loss_fn.group_name` is to be this group's.

    Raises:
        ValueError: activations of such experts cannot be computed again.
    """

    def __init__(
        self,
        model: ImmunityMoE,
        loss_fn: FusedImmunityLoss,
        optimizer: Optimizer,
        *,
        clip_grad_norm: float | None = None,
        amp: Amp = "off",
        double_backprop: DoubleBackprop = "auto",
        compile: Compile = "off",
        log: Log | None = None,
        traceback_file: Path | None = None,
        attack: InnerAttack | None = None,
        trades_weight: float = 6.0,
        group: torch.distributed.ProcessGroup | None = None,
        checkpoint_activations: bool = False,
        method: EnsembleLoss | None = None,
        shards: bool = False,
    ) -> None:
        if checkpoint_activations:
            check_recomputable(model)
            model.checkpoint_activations = True
        self.model, self.optimizer, self.clip_grad_norm = model, optimizer, clip_grad_norm
        device = next(model.parameters()).device
        self.scaler = grad_scaler(amp, device)
        last = strategies.laid_out(model.memory_format, device, model.arch) == "channels_last"
        if last and device.type == "cuda":  # a CPU's kernels lay out weights themselves, whatever their layout
            channels_last_(model)
            lay_out_state(optimizer)
        if double_backprop == "auto":
            double_backprop = strategies.fastest(device.type, model.arch).double_backprop
        self.attack, self.method, self.shards = attack, method, shards
        if method is not None:
            method.adversarial = attack is not None
        trades = trades_weight if attack is not None and attack.settings.method == "trades" else None
        compiled = partial(Compiled, choice=compile, device=device, log=log, traceback_file=traceback_file)
        parts = model.num_experts if shards else 1
        self.objective = _Objective(model, loss_fn, amp, double_backprop, device, compiled, trades, method, parts)
        self._forward: nn.Module = self.objective
        if group is not None and not is_sharded(model):  # whose backward pass averages gradients by itself
            self._forward = _distributed(self.objective, group)
        self._has_run_compiled = False
        optimised = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._optimises_all = optimised == {id(parameter) for parameter in model.parameters()}
        self._share: tuple[Tensor, int] | None = None  # of a batch in its step's gradient, and of how many it is one

    @property
    def measured(self) -> tuple[str, ...]:
        """What a step measures, in order."""
        return MEASURED if self.method is None else self.method.measured

    @property
    def compiled(self) -> bool:
        """Whether the step runs compiled code, or will from its first call on."""
        return self.objective.function.active

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        affine: Tensor | None = None,
        mixing: Tensor | None = None,
        *,
        index: int = 0,
        count: int = 1,
    ) -> Tensor:
        """Update the model, in training mode; of several batches that make one update, behind the last.

        Args:
            images: (B, C, H, W) floating-point in [0, 1]; or uint8, where `affine` is given.
            labels: (B,) integers, or (B, K) probabilities.
            affine: (5, B), of `augmentation.draw_affine`; None leaves the images as they are.
            mixing: (6,), of `mixing.draw_mixing`, by which images are mixed then; None does not mix.
            index, count: this is batch 0..count−1 of so many, the mean of whose gradients makes one update.

        Returns:
            float64 on the model's device: what `measured` names, of this batch, before the update.
        """
        batch: tuple[Tensor | None, ...] = (images, labels, affine, mixing)
        if self.attack is not None or self.method is not None:
            images, labels = self.objective.augmented(images, labels, affine, mixing)
            if self.shards:
                images, labels = (_in_parts(each, self.model.num_experts) for each in (images, labels))
            beside = images if self.objective.trades_weight is not None else None
            if self.method is not None:
                with autocast(self.objective.amp, self.objective.device):
                    beside = self.method.prepare(self.model, images, labels)
            if self.attack is not None:
                images = self.attack(images, labels)
            batch = (images, labels, None, None, beside)
        backward = self._first_compiled_step if self.compiled and not self._has_run_compiled else self._backward
        measured = backward(batch, index, count)
        if index + 1 == count:
            self.update()
        # A CUDA graph's result lies in memory that its next replay writes: this one is the caller's to keep.
        return measured.clone() if self.compiled and measured.is_cuda else measured

    def update(self) -> None:
        """Clip the gradients that a backward pass has left, and take the optimiser's step."""
        self._update()
        if self.method is not None:
            self.method.after_update(self.model)

    def _update(self) -> None:
        if self.scaler.is_enabled():  # in each step: a weight's first gradient may come late, and that step be skipped
            begin_momentum(self.optimizer)
        if self.clip_grad_norm is None:
            self.scaler.step(self.optimizer)
        elif isinstance(self.optimizer, FusedSGD) and self._optimises_all and self.optimizer.clips:
            self.scaler.step(self.optimizer, max_norm=self.clip_grad_norm)
        else:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def _backward(self, batch: Sequence[Tensor | None], index: int, count: int) -> Tensor:
        """Add a batch's share of the gradient to that of the batches before it; between them processes do not meet."""
        if index == 0:
            self.optimizer.zero_grad(set_to_none=True)
        forward: Any = self._forward
        alone: AbstractContextManager[None] = nullcontext()
        if index + 1 < count and isinstance(forward, DistributedDataParallel):
            alone = forward.no_sync()
        with alone:
            loss, measured = forward(*batch)
            scaled = self.scaler.scale(loss)
            if self._share is None or self._share[1] != count or self._share[0].dtype != scaled.dtype:
                self._share = torch.full_like(scaled, 1 / count), count
            scaled.backward(self._share[0])  # without it a kernel would make a one anew
        if index == 0 and count > 1 and self.compiled and measured.is_cuda:
            # They lie in a CUDA graph's memory, which the next batch's replay writes.
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()
        taken: Tensor = measured
        return taken

    def _first_compiled_step(self, batch: Sequence[Tensor | None], index: int, count: int) -> Tensor:
        """The first compiled pass: a backward pass that fails to compile must not count a batch twice in BatchNorm."""
        before = [buffer.clone() for buffer in self.model.buffers()]
        try:
            measured = self._backward(batch, index, count)
        except Exception as error:
            for buffer, value in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(value)
            measured = self.objective.function.fall_back(error, lambda: self._backward(batch, index, count))
        self._has_run_compiled = True
        return measured


class _Objective(nn.Module):
    """From a batch to (loss (), measured (M,)): what `DistributedDataParallel` wraps, and what is compiled."""

    def __init__(
        self,
        model: ImmunityMoE,
        loss_fn: FusedImmunityLoss,
        amp: Amp,
        double_backprop: DoubleBackprop,
        device: torch.device,
        compiled: Callable[[Callable[..., Any]], Compiled],
        trades_weight: float | None,
        method: EnsembleLoss | None,
        parts: int,
    ) -> None:
        super().__init__()
        self.model, self.loss_fn, self.trades_weight = model, loss_fn, trades_weight
        self.method, self.parts = method, parts
        self.amp, self.double_backprop, self.device = amp, double_backprop, device
        self.function = compiled(self._loss)

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        affine: Tensor | None = None,
        mixing: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.function(images, labels, affine, mixing, beside)
        return result

    def augmented(
        self, images: Tensor, labels: Tensor, affine: Tensor | None, mixing: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Images and targets of a batch as they are learned from; those of one expert alone are mixed with its own."""
        if affine is not None:
            images = apply_affine(images, affine)
        if mixing is None:
            return images, labels
        mixed = [
            apply_mixing(*part, mixing, self.model.num_classes, self.loss_fn.ignore_index)
            for part in zip(images.chunk(self.parts), labels.chunk(self.parts), strict=True)
        ]
        if self.parts == 1:
            return mixed[0]
        return torch.cat([each[0] for each in mixed]), torch.cat([each[1] for each in mixed])

    def _loss(
        self, images: Tensor, labels: Tensor, affine: Tensor | None, mixing: Tensor | None, beside: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`beside`: TRADES' clean images, or what the method has prepared."""
        images, labels = self.augmented(images, labels, affine, mixing)
        terms: tuple[Tensor, ...]
        with autocast(self.amp, self.device):
            if self.method is not None:
                loss, terms = self.method.loss_and_terms(self.model, images, labels, beside)
                return loss, torch.stack([loss.detach(), *(term.detach() for term in terms)]).double()
            loss, terms = loss_and_terms(
                self.model,
                self.loss_fn,
                images,
                labels,
                double_backprop=self.double_backprop,
                classification=None if beside is None else self._trades(beside, labels),
            )
        return loss, torch.stack([loss.detach(), *(term.detach() for term in terms)]).double()

    def _trades(self, clean: Tensor, labels: Tensor) -> Classification:
        """TRADES' losses of adversarial outputs, beside those of the clean images."""
        assert self.trades_weight is not None
        weight = self.trades_weight
        outputs = (self.model.expert_logits_with_copied_buffers(clean), self.model.gate_weights(clean))
        # One network alone has no experts besides.
        alpha = self.loss_fn.alpha if self.model.num_experts > 1 else 0.0

        def losses(logits: Tensor, gate: Tensor | None) -> Tensor:
            return trades_losses(outputs, (logits, gate), labels, alpha, weight, self.loss_fn.class_losses)

        return losses


def _in_parts(batch: Tensor, parts: int) -> Tensor:
    """(B, …) as (N, B/N, …): the i-th part is expert i's."""
    return batch.view(parts, -1, *batch.shape[1:])


def _distributed(objective: _Objective, group: torch.distributed.ProcessGroup) -> DistributedDataParallel:
    # It would cut the graph where its buckets of gradients end.
    torch._dynamo.config.optimize_ddp = False
    # Of what a process measures of its samples in BatchNorm, the mean is taken when it is needed. The older name is
    # deprecated where the newer one is known.
    known = inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    return DistributedDataParallel(objective, process_group=group, gradient_as_bucket_view=True, **options)
