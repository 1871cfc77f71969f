"""``dcn=`` for ResNet-18 and ResNet-34, whose block has no place for it in mmdet.

mmdet's ``Bottleneck`` makes its 3×3 convolution, ``conv2``, deformable. Of the two in a
``BasicBlock`` it is ``conv2`` as well, the one whose stride is 1: the layer downsamples by the
plain ``conv1``, and the offsets are learned from features that have the output's size.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from mmcv.cnn import build_conv_layer

_RESNET = "mmdet.models.backbones.resnet"


def install() -> None:
    """Let mmdet's ``BasicBlock`` take ``dcn``: now where mmdet is imported, or else once it is."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    if _RESNET in sys.modules:
        _extend(sys.modules[_RESNET])


def uninstall() -> None:
    """Give ``BasicBlock`` back as mmdet has it."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    block = _basic_block()
    if block is not None and _is_extended(block):
        block.__init__ = block.__init__.__wrapped__


def installed() -> bool:
    """Whether ``BasicBlock`` takes ``dcn``, or will once mmdet is imported."""
    block = _basic_block()
    return _FINDER in sys.meta_path if block is None else _is_extended(block)


def _basic_block() -> type | None:
    return getattr(sys.modules.get(_RESNET), "BasicBlock", None)


def _is_extended(block: type) -> bool:
    return getattr(block.__init__, "__module__", None) == __name__


def _extend(resnet: ModuleType) -> None:
    # Replaced is the constructor, as mmdet asks `block is BasicBlock`, and others derive from it.
    block = resnet.BasicBlock
    if not _is_extended(block):
        block.__init__ = _taking_dcn(block.__init__)


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
    """Finds mmdet's ResNet as Python does, and extends it as soon as its code has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _RESNET:
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
