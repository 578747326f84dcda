"""In which number formats a model is trained and evaluated."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

Amp = Literal["off", "bf16", "fp16"]
AmpChoice = Literal["auto", "off", "bf16", "fp16"]
AttackAmp = Literal["off", "bf16"]  # of the gradients that an attack follows
Float32 = Literal["tf32", "ieee"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """What sums over a floating-point tensor are computed in: its own dtype, or float32 where that is narrower."""
    return torch.promote_types(x.dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """A floating-point tensor, widened to float32 where it is narrower."""
    return x.to(accumulation_dtype(x))


def autocast(amp: Amp, device: torch.device) -> torch.autocast:
    """Convolutions and products in half precision; statistics of BatchNorm, the losses and weights in float32."""
    return torch.autocast(device.type, _DTYPES.get(amp), enabled=amp != "off")


@overload
def chosen_amp(choice: Literal["auto", "off", "bf16"], device: torch.device) -> AttackAmp: ...


@overload
def chosen_amp(choice: AmpChoice, device: torch.device) -> Amp: ...


def chosen_amp(choice: AmpChoice, device: torch.device) -> Amp:
    """What "auto" means: bfloat16 where a GPU or a CPU multiplies in it; of a CPU that emulates it, float32."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    return "bf16" if device.type == "cpu" and has_bfloat16() else "off"


def has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16, by AVX-512 or AMX, as far as PyTorch says."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(ask()) for ask in asked if ask is not None)


def emulation_line(amp: AmpChoice, device: torch.device) -> str | None:
    """A line for whoever asks a CPU for bfloat16 that it has to emulate; None where there is nothing to say."""
    if amp == "bf16" and device.type == "cpu" and not has_bfloat16():
        return "--amp bf16: this processor emulates bfloat16, which takes many times as long; see --amp auto"
    return None


def grad_scaler(amp: Amp, device: torch.device) -> torch.amp.GradScaler:
    """What keeps gradients in float16's range; for the other formats it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def set_float32(precision: Float32) -> None:
    """What a GPU makes of float32 convolutions and products, for the whole process.

    "tf32" rounds their factors to 10 bits of mantissa, which is many times as fast; "ieee" does not. PyTorch's own
    default is "tf32" for convolutions and "ieee" for products.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def begin_momentum(optimizer: Optimizer) -> None:
    """Zeros for the momentum that PyTorch's fused SGD would make in its first step.

    It makes it of memory as it finds it, for that step to write to. Where the scaler skips the step nothing is written,
    and the second step moves the weights by whatever was there. From zeros the first step is the same, but that
    `dampening` counts in it, too.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["fused"] and group["momentum"] and parameter.grad is not None:
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
