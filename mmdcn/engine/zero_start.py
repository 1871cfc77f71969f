"""The zero start of offset branches, kept through every ``init_weights`` of mmengine.

mmengine initialises by the class of a layer (``init_cfg=dict(type='Xavier', layer='Conv2d')``), in
whatever a module contains, and mmdet's modules that have an ``init_weights`` of their own do the
same. Both reach into the offset branches, and most often nobody asks the deformable layer after
them: an FPN keeps its layers in a ``nn.ModuleList``, which has no ``init_weights`` that passes the
call on. So the outermost call ends by setting back what it has changed in offset branches, other
than by loading a state dict.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

__all__ = ["install", "installed", "uninstall"]

_current = threading.local()  # `watch` is what the thread's outermost init_weights watches, or None


def install() -> None:
    """Let every ``init_weights`` of mmengine's modules, and of later ones, keep the zero start."""
    if installed():
        return
    for module_class in _classes(BaseModule):
        _wrap(module_class)
    BaseModule.__init_subclass__ = classmethod(_wrap_subclass)


def uninstall() -> None:
    """Give every ``init_weights`` back as its class defines it."""
    if not installed():
        return
    del BaseModule.__init_subclass__
    for module_class in _classes(BaseModule):
        own = vars(module_class).get("init_weights")
        if getattr(own, "_keeps_zero_start", False):
            module_class.init_weights = own.__wrapped__


def installed() -> bool:
    """Whether ``init_weights`` keeps the zero start."""
    return "__init_subclass__" in vars(BaseModule)


def _classes(base: type) -> Iterator[type]:
    yield base
    for module_class in base.__subclasses__():
        yield from _classes(module_class)


def _wrap_subclass(module_class: type, **kwargs: Any) -> None:
    super(BaseModule, module_class).__init_subclass__(**kwargs)
    _wrap(module_class)


def _wrap(module_class: type) -> None:
    # Each class that defines it, as an override may go on after the call of what it overrides.
    own = vars(module_class).get("init_weights")
    if inspect.isfunction(own) and not hasattr(own, "_keeps_zero_start"):
        module_class.init_weights = _keeping_zero_start(own)


def _keeping_zero_start(init_weights: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(init_weights)
    def keeping(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outer = getattr(_current, "watch", None)
        if outer is not None:
            outer.add(self)  # which need not be inside the outermost module
            return init_weights(self, *args, **kwargs)
        _current.watch = watch = _Watch()
        try:
            watch.add(self)
            result = init_weights(self, *args, **kwargs)
        finally:
            _current.watch = None
            watch.end()
        watch.set_back()
        return result

    keeping._keeps_zero_start = True
    return keeping


class _Watch:
    """The offset branches of modules, and what they held before they were initialised."""

    def __init__(self) -> None:
        self.held: dict[nn.Module, list[Tensor]] = {}
        self.handles: list[Any] = []

    def add(self, module: nn.Module) -> None:
        for layer in module.modules():
            if hasattr(layer, "offset_branches") and layer not in self.held:
                self.held[layer] = _values(layer)
                for name in layer.offset_branches:
                    self._note_loading(layer, layer.get_submodule(name))

    def _note_loading(self, layer: nn.Module, branch: nn.Module) -> None:
        """Take what a state dict fills the branch with for what it is to hold."""
        filled = False

        def before(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
            nonlocal filled
            filled = any(key.startswith(prefix) for key in state_dict)

        def after(*_: Any) -> None:
            if filled:
                self.held[layer] = _values(layer)

        self.handles.append(branch.register_load_state_dict_pre_hook(before))
        self.handles.append(branch.register_load_state_dict_post_hook(after))

    def end(self) -> None:
        for handle in self.handles:
            handle.remove()

    def set_back(self) -> None:
        """Start those branches anew that have changed, other than by a state dict."""
        for layer, held in self.held.items():
            if not all(map(_equal, held, _parameters(layer))):
                layer.init_offset()


def _parameters(layer: nn.Module) -> list[Tensor]:
    branches = map(layer.get_submodule, layer.offset_branches)
    return [parameter for branch in branches for parameter in branch.parameters()]


def _values(layer: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in _parameters(layer)]


def _equal(held: Tensor, now: Tensor) -> bool:
    # A branch on the meta device has no values; materialised meanwhile, it is to start anew.
    if held.device != now.device or held.is_meta:
        return False
    return torch.allclose(held, now, rtol=0, atol=0, equal_nan=True)
