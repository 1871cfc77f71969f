"""Mixed precision, also on the CPU, where mmengine's ``AmpOptimWrapper`` refuses to start."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn
from torch.autograd import Function

__all__ = ["CPUAmpOptimWrapper", "enable"]


def enable(cfg: Config, on_cpu: bool) -> None:
    """Switch a config to mixed precision: bfloat16 on the CPU, the toolbox's default elsewhere."""
    if on_cpu:
        for scaling in ("loss_scale", "dtype"):
            cfg.optim_wrapper.pop(scaling, None)
        cfg.optim_wrapper.type = "CPUAmpOptimWrapper"
    else:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.loss_scale = "dynamic"


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """``OptimWrapper`` that runs the forward pass under CPU autocast in bfloat16.

    bfloat16 has the exponent range of float32, so the loss needs no scaling. The compiled functions
    of ``mmcv.ops`` (NMS, RoIAlign and others) have no bfloat16 kernels on the CPU, and
    compute in float32.

    Args:
        **kwargs: as for ``mmengine.optim.OptimWrapper``.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for function in _mmcv_functions():
            _compute_in_float32(function)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Within, forward passes of `model` run in mixed precision."""
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield


def _mmcv_functions() -> set[type[Function]]:
    import mmcv.ops  # noqa: F401  # fills sys.modules

    modules = [module for name, module in sys.modules.items() if name.startswith("mmcv.ops.")]
    return {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Function)
        and value.__module__ == module.__name__
    }


def _compute_in_float32(function: type[Function]) -> None:
    """Give an autograd function bfloat16 on the CPU: it computes in float32, and rounds its result.

    Without bfloat16 inputs the function does what it did before.
    """
    forward, backward = function.forward, function.backward
    if hasattr(forward, "__wrapped__"):
        return

    @functools.wraps(forward)
    def cast_and_forward(ctx, *args):
        result = forward(ctx, *map(_to_float32, args))
        if not any(map(_is_bfloat16, args)):
            return result
        # Callers scatter results into buffers of their features' dtype.
        if isinstance(result, tuple):
            return tuple(map(_to_bfloat16, result))
        return _to_bfloat16(result)

    @functools.wraps(backward)
    def cast_and_backward(ctx, *grads):
        return backward(ctx, *map(_to_float32, grads))

    function.forward = staticmethod(cast_and_forward)
    function.backward = staticmethod(cast_and_backward)


def _is_bfloat16(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dtype == torch.bfloat16
        and value.device.type == "cpu"
    )


def _to_float32(value: Any) -> Any:
    return value.float() if _is_bfloat16(value) else value


def _to_bfloat16(value: Any) -> Any:
    is_float32 = isinstance(value, torch.Tensor) and value.dtype == torch.float32
    return value.bfloat16() if is_float32 else value
