"""What deformable operators sample while a model runs, by the names of the modules that call.

The calls are seen at the operator: of DCN to DCNv4, in one to three dimensions, and of modules that
compute offsets of their own, such as the heads of VFNet, TOOD or RepPoints.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mmdcn.ops._observers import SampledCall, observing

__all__ = ["named_calls"]

#: Is given the name of a call, the module that makes it, and a function that computes the call.
Told = Callable[[str, nn.Module, Callable[[], SampledCall]], None]


@contextmanager
def named_calls(model: nn.Module, told: Told) -> Iterator[None]:
    """Call `told` for each call of a deformable operator within a forward pass of a model.

    A call is named after the module whose forward pass makes it: ``backbone.layer4.2.conv2`` for a
    layer, ``bbox_head`` for a head that calls the function. From the second such call in the
    same forward pass on, as of layers that serve several levels, the name ends in ``#2``, ``#3``
    and so on.
    """
    # Replicas of the model run in threads of their own.
    local = threading.local()

    def enter(name: str, module: nn.Module, _: Any) -> None:
        stack = local.__dict__.setdefault("stack", [])
        if not stack:
            local.calls = Counter()
        stack.append((name, module))

    def leave(*_: Any) -> None:
        local.stack.pop()

    def observe(describe: Callable[[], SampledCall]) -> None:
        # Within a backward pass, checkpointing repeats what has been seen.
        if not getattr(local, "stack", None) or torch._C._current_graph_task_id() != -1:
            return
        name, module = local.stack[-1]
        local.calls[name] += 1
        number = local.calls[name]
        told(name if number == 1 else f"{name}#{number}", module, describe)

    with ExitStack() as opened:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handle = module.register_forward_pre_hook(functools.partial(enter, name))
            opened.callback(handle.remove)
            handle = module.register_forward_hook(leave, always_call=True)
            opened.callback(handle.remove)
        opened.enter_context(observing(observe))
        yield
