"""Triton's interpreter, with less to do: most of its time went to what it had found out before."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from triton.language import core
from triton.runtime import interpreter


@cache
def quicken() -> None:
    """Where the kernels run in it: keep what follows from a type alone, and patch the language once a launch."""
    if torch.cuda.is_available():
        return
    # It looks at every integer sum for an overflow and then, outside of debugging, says nothing of it.
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
    _keep_types()
    _patch_once()


def _keep_types() -> None:
    """NumPy's type of one, and the shape of a block and of a tensor."""
    numpy_type, block, tensor = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__
    numpy_types: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def known_numpy_type(of: Any) -> Any:
        name = of.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(of)
        return numpy_types[name]

    def known_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key], element_ty=element_ty)

    def known_tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            tensor(self, handle, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle, type=type, dtype=type.scalar)

    interpreter._get_np_dtype = known_numpy_type
    core.block_type.__init__ = known_block
    core.tensor.__init__ = known_tensor


def _patch_once() -> None:
    """Each call of a jitted function, nested ones included, would patch Triton's language in its module."""
    run, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    scopes: dict[str, Any] = {}

    class Later:
        def restore(self) -> None:
            """Leave the patch until the launch ends."""

    def patch_once(function: Any) -> Any:
        if function.__module__ not in scopes:
            scopes[function.__module__] = patch(function)
        return Later()

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return run(self, *args, **kwargs)
        finally:
            while scopes:
                scopes.popitem()[1].restore()

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch, patch_once
