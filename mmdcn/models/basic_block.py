"""``dcn=`` of mmdet's ResNets: for ResNet-18 and ResNet-34, and where no stage takes it.

The block of these two has no place for it in mmdet.

mmdet's ``Bottleneck`` makes its 3×3 convolution, ``conv2``, deformable. Of the two in a
``BasicBlock`` it is ``conv2`` as well, the one whose stride is 1: the layer downsamples by the
plain ``conv1``, and the offsets are learned from features that have the output's size.

Every ResNet takes ``dcn=`` and stays plain where ``stage_with_dcn=`` is left out: one warning says
so when it is built.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from mmcv.cnn import build_conv_layer
from torch import nn

_RESNET = "mmdet.models.backbones.resnet"
# The backbones whose constructors do all that ResNet's does; others call one of these.
_BACKBONES = {_RESNET: "ResNet", "mmdet.models.backbones.regnet": "RegNet"}

_logger = logging.getLogger("mmdcn")


def install() -> None:
    """Let mmdet's ``BasicBlock`` take ``dcn``: now where mmdet is imported, or else once it is."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for name in _BACKBONES:
        if name in sys.modules:
            _extend(sys.modules[name])


def uninstall() -> None:
    """Give ``BasicBlock`` back as mmdet has it."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    backbones = [getattr(sys.modules.get(m), name, None) for m, name in _BACKBONES.items()]
    for extended in (_basic_block(), *backbones):
        if extended is not None and _is_extended(extended):
            extended.__init__ = extended.__init__.__wrapped__


def installed() -> bool:
    """Whether ``BasicBlock`` takes ``dcn``, or will once mmdet is imported."""
    block = _basic_block()
    return _FINDER in sys.meta_path if block is None else _is_extended(block)


def _basic_block() -> type | None:
    return getattr(sys.modules.get(_RESNET), "BasicBlock", None)


def _is_extended(kind: type) -> bool:
    return getattr(kind.__init__, "__module__", None) == __name__


def _extend(module: ModuleType) -> None:
    # Replaced are constructors, as mmdet asks `block is BasicBlock`, and others derive from these.
    backbone = getattr(module, _BACKBONES[module.__name__])
    if not _is_extended(backbone):
        backbone.__init__ = _warning_of_no_stage(backbone.__init__)
    if module.__name__ == _RESNET and not _is_extended(module.BasicBlock):
        module.BasicBlock.__init__ = _taking_dcn(module.BasicBlock.__init__)


def _warning_of_no_stage(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.dcn is not None and not any(self.stage_with_dcn):
            _logger.warning(
                f"{type(self).__name__}: dcn={dict(self.dcn)} is in no stage, and the model is "
                "plain: set stage_with_dcn=(False, True, True, True) beside dcn, which makes the "
                "last three stages deformable."
            )

    __init__.__module__ = __name__
    return __init__


def _taking_dcn(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(*args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        dcn = arguments.pop("dcn", None)
        conv_cfg = arguments.get("conv_cfg")
        if dcn is not None and conv_cfg is not None:
            raise ValueError(
                "conv_cfg: expected None beside dcn, as both say what conv2 is, got "
                f"{conv_cfg} beside dcn={dcn}"
            )
        init(**arguments)
        if dcn is None:
            return
        # conv2 has stride 1: there is none to fall back on.
        layer = {key: value for key, value in dcn.items() if key != "fallback_on_stride"}
        planes = arguments["planes"]
        block = arguments["self"]
        block.conv2 = build_conv_layer(layer, planes, planes, 3, padding=1, bias=False)

    __init__.__module__ = __name__
    return __init__


class _WhenImported(MetaPathFinder):
    """Finds mmdet's ResNets as Python does, and extends it as soon as its code has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _BACKBONES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_extend(module: ModuleType) -> None:
            execute(module)
            _extend(module)

        spec.loader.exec_module = execute_and_extend
        return spec


_FINDER = _WhenImported()
