"""Everything the OpenMMLab toolbox sees of mmdcn.

:func:`install`, which ``import mmdcn`` calls where mmcv is importable, takes over:

- the names of :data:`LAYERS` in mmengine's root registry ``MODELS``, so that configs with
  ``dict(type='DCN')`` build our layers. In the scope ``mmdcn`` (``'mmdcn.DCN'``) the same names are
  always ours, also after :func:`uninstall`;
- ``mmcv.ops.deform_conv2d``, ``mmcv.ops.modulated_deform_conv2d``,
  ``mmcv.ops.deform_roi_pool`` and ``mmcv.cnn.fuse_conv_bn``, in every module that has imported
  them already and in every module that will (:mod:`mmdcn.functions`);
- the RoI pooling layers' names in ``mmcv.ops`` itself (:data:`ROI_LAYERS`), where mmdet's RoI
  extractors look up ``roi_layer=dict(type='DeformRoIPoolPack')``;
- the constructor of mmdet's ``BasicBlock``, so that ResNet-18 and ResNet-34 take ``dcn=``
  (:mod:`mmdcn.models.basic_block`);
- mmengine's loading of checkpoints, so that it reads plain data only
  (:mod:`mmdcn.engine.checkpoint`), and its saving of them, so that each is whole or not there
  (:mod:`mmdcn.engine.saving`);
- torch's registration of modules in other modules, so that checkpoints load in which offset
  branches have their former names (:mod:`mmdcn.engine.old_keys`);
- ``init_weights`` of mmengine's modules, so that the offset branches inside start at zero
  (:mod:`mmdcn.engine.zero_start`);
- mmengine's and torch's loading of state dicts, so that a log line says how many offset branches a
  plain model's checkpoint leaves at zero (:mod:`mmdcn.engine.plain_checkpoints`);
- mmengine's reading of configs, so that ours are found by name, as ``mmdcn::dcnv2/…``
  (:mod:`mmdcn.engine.packaged_configs`);
- mmengine's constructor of optimizers, so that ``dcn_offset_lr_mult`` reaches all our layers
  (:mod:`mmdcn.engine.offset_learning_rate`).

It also tells mmengine how to count our operator's operations (:mod:`mmdcn.engine.complexity`).

mmcv's own layers (``mmcv.ops.DeformConv2d`` and so on) stay the classes they are, because code
derives from them, pickles them and asks ``isinstance``. They compute through the functions above,
hence by our operators: existing instances and subclasses too. That holds for mmcv's RoI pooling
layers as well, in ``mmcv.ops.deform_roi_pool``; those that ``mmcv.ops`` shows instead derive from
them. What configs build is an instance of our layer and, at the same time, of mmcv's layer of the
same name, so that whoever asks (mmengine does, for ``paramwise_cfg``) keeps recognising it as
deformable.

mmcv's own kernels stay in reach: on a device that ours do not serve, our operators run on them,
wherever the call comes from (:mod:`mmdcn.mmcv_kernels`).

Out of reach is a function of mmcv's that was kept elsewhere than in a module before the
installation: in a closure, say.
"""

import importlib
import logging
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from mmdcn import _WITHOUT_TOOLBOX, layers, mmcv_kernels, models

try:
    from mmcv.cnn import fuse_conv_bn as _mmcv_fuse_conv_bn
    from mmengine.logging import print_log
    from mmengine.registry import HOOKS, MODELS
except ModuleNotFoundError as error:
    raise ImportError(f"{_WITHOUT_TOOLBOX} ({error})") from error

from mmdcn import registry
from mmdcn.engine import (
    checkpoint,
    complexity,
    offset_learning_rate,
    old_keys,
    packaged_configs,
    plain_checkpoints,
    zero_start,
)
from mmdcn.engine.offset_hook import OffsetStatisticsHook
from mmdcn.engine.sampling_hook import SamplingVisualizationHook
from mmdcn.functions import (
    deform_conv2d,
    deform_roi_pool,
    fuse_conv_bn,
    modulated_deform_conv2d,
)
from mmdcn.models import basic_block
from mmdcn.startup import is_first_process

try:
    import mmcv.ops as _mmcv_ops
    from mmcv.ops import deform_conv as _mmcv_v1
    from mmcv.ops import modulated_deform_conv as _mmcv_v2

    # mmcv.ops itself would give the function, which has the module's name.
    _mmcv_roi_pool = importlib.import_module("mmcv.ops.deform_roi_pool")
    _MMCV_PROBLEM = None
except (ImportError, AssertionError) as error:  # mmcv asserts that its library has all functions.
    _mmcv_ops = None
    _MMCV_PROBLEM = (
        f"mmcv.ops does not load ({error}), and mmdet needs it: install the full mmcv (not "
        "mmcv-lite) with its compiled operators, by `pip install 'setuptools<81'` and then "
        "`pip install --no-build-isolation mmcv` in the version that your mmdet asks for, or let "
        "`make` in mmdcn's source folder set up an environment."
    )

# ------------------------------------------------------------------------- layers, as mmcv has them


def _for_toolbox(layer: type[nn.Module], *bases: type[nn.Module]) -> type[nn.Module]:
    """`layer`, whose instances are at the same time instances of mmcv's layer of the same name.

    They are instances of the `bases` as well, which take the place of mmcv's in ``mmcv.ops``.
    """
    mmcv_layer = getattr(_mmcv_ops, layer.__name__, None)
    if mmcv_layer is None:
        return layer
    body = {
        "__module__": __name__,
        "__doc__": layer.__doc__,
        # What our layers leave to torch must not come from mmcv's layer.
        "__repr__": nn.Module.__repr__,
        "_load_from_state_dict": nn.Module._load_from_state_dict,
    }
    return type(layer.__name__, (layer, *bases, mmcv_layer), body)


DeformConv2d = _for_toolbox(layers.DeformConv2d)
DeformConv2dPack = _for_toolbox(layers.DeformConv2dPack)
ModulatedDeformConv2d = _for_toolbox(layers.ModulatedDeformConv2d)
ModulatedDeformConv2dPack = _for_toolbox(layers.ModulatedDeformConv2dPack)
DeformRoIPool = _for_toolbox(layers.DeformRoIPool)
DeformRoIPoolPack = _for_toolbox(layers.DeformRoIPoolPack, DeformRoIPool)
ModulatedDeformRoIPoolPack = _for_toolbox(layers.ModulatedDeformRoIPoolPack, DeformRoIPool)

#: The layers that stand in ``mmcv.ops`` under these names.
ROI_LAYERS = {
    "DeformRoIPool": DeformRoIPool,
    "DeformRoIPoolPack": DeformRoIPoolPack,
    "ModulatedDeformRoIPoolPack": ModulatedDeformRoIPoolPack,
}

#: The layer that each ``type`` of a config builds.
LAYERS = {
    "DCN": DeformConv2dPack,
    "DCNv2": ModulatedDeformConv2dPack,
    "DCN1d": layers.DeformConv1dPack,
    "DCN3d": layers.DeformConv3dPack,
    "DCNv2_1d": layers.ModulatedDeformConv1dPack,
    "DCNv2_3d": layers.ModulatedDeformConv3dPack,
    "DCNv3": layers.DCNv3,
    "DCNv4": layers.DCNv4,
    "DeformConv1d": layers.DeformConv1d,
    "DeformConv1dPack": layers.DeformConv1dPack,
    "DeformConv2d": DeformConv2d,
    "DeformConv2dPack": DeformConv2dPack,
    "DeformConv3d": layers.DeformConv3d,
    "DeformConv3dPack": layers.DeformConv3dPack,
    "ModulatedDeformConv1d": layers.ModulatedDeformConv1d,
    "ModulatedDeformConv1dPack": layers.ModulatedDeformConv1dPack,
    "ModulatedDeformConv2d": ModulatedDeformConv2d,
    "ModulatedDeformConv2dPack": ModulatedDeformConv2dPack,
    "ModulatedDeformConv3d": layers.ModulatedDeformConv3d,
    "ModulatedDeformConv3dPack": layers.ModulatedDeformConv3dPack,
    **ROI_LAYERS,
}

for _name, _layer in LAYERS.items():
    registry.MODELS.register_module(name=_name, module=_layer)
registry.MODELS.register_module(name="Deformable", module=models.build_deformable)

for _registry in (HOOKS, registry.HOOKS):
    _registry.register_module(module=OffsetStatisticsHook)
    _registry.register_module(module=SamplingVisualizationHook)

# ------------------------------------------------------------------------------------- taking over

# mmcv's function, what stands in for it, and the class whose `apply` mmcv's function is.
_FUNCTIONS: tuple[tuple[Callable[..., Tensor], Callable[..., Tensor], type], ...] = ()
if _mmcv_ops is not None:
    _FUNCTIONS = (
        (_mmcv_v1.deform_conv2d, deform_conv2d, _mmcv_v1.DeformConv2dFunction),
        (
            _mmcv_v2.modulated_deform_conv2d,
            modulated_deform_conv2d,
            _mmcv_v2.ModulatedDeformConv2dFunction,
        ),
        (
            _mmcv_roi_pool.deform_roi_pool,
            deform_roi_pool,
            _mmcv_roi_pool.DeformRoIPoolFunction,
        ),
    )

    mmcv_kernels.offer(
        _mmcv_v1.deform_conv2d,
        _mmcv_v2.modulated_deform_conv2d,
        _mmcv_roi_pool.deform_roi_pool,
    )

_replaced_layers: dict[str, Any] | None = None  # the layers that we replaced; None: not installed


def install() -> None:
    """Take over what the module's docstring lists; do nothing where that is done already.

    Logs one line. Where mmcv.ops does not load, registers the layers all the same, and the line
    says how to mend mmcv.

    Example:
        >>> uninstall()
        >>> install()
        >>> report().installed
        True
    """
    global _replaced_layers
    if _replaced_layers is not None:
        return
    _replaced_layers = {name: MODELS.module_dict.get(name) for name in LAYERS}
    for name, layer in LAYERS.items():
        MODELS.register_module(name=name, module=layer, force=True)
    for theirs, ours, autograd_function in _FUNCTIONS:
        _rebind(theirs, ours)
        autograd_function.apply = staticmethod(ours)
    _rebind(_mmcv_fuse_conv_bn, fuse_conv_bn)
    if _mmcv_ops is not None:
        vars(_mmcv_ops).update(ROI_LAYERS)
    basic_block.install()
    checkpoint.install()
    complexity.install()
    offset_learning_rate.install()
    old_keys.install()
    packaged_configs.install()
    plain_checkpoints.install()
    zero_start.install()
    logging.getLogger("mmdcn").addHandler(_TO_MMENGINE)

    if _MMCV_PROBLEM is not None:
        _log(_MMCV_PROBLEM, logging.WARNING)
    else:
        _log(
            "Deformable convolution and RoI pooling now run on mmdcn's operators, in configs (DCN, "
            "DCNv2, DeformRoIPoolPack) and in mmcv.ops; mmdcn.plugin.report() lists what was taken "
            "over and mmdcn.plugin.uninstall() gives it back."
        )


def uninstall() -> None:
    """Give back everything that :func:`install` took over; do nothing where that is done already.

    Layers that were built meanwhile from ``'DCN'`` keep running on our operator.

    Example:
        >>> uninstall()
        >>> report().installed
        False
        >>> install()
    """
    global _replaced_layers
    if _replaced_layers is None:
        return
    for name, replaced in _replaced_layers.items():
        if MODELS.module_dict.get(name) is not LAYERS[name]:
            continue  # because somebody else has registered it anew
        if replaced is None:
            del MODELS.module_dict[name]
        else:
            MODELS.register_module(name=name, module=replaced, force=True)
    for theirs, ours, autograd_function in _FUNCTIONS:
        _rebind(ours, theirs)
        del autograd_function.apply  # so that the inherited one shows again
    _rebind(fuse_conv_bn, _mmcv_fuse_conv_bn)
    for name, layer in ROI_LAYERS.items() if _mmcv_ops is not None else ():
        if vars(_mmcv_ops)[name] is layer:  # or else somebody replaced it
            vars(_mmcv_ops)[name] = getattr(_mmcv_roi_pool, name)
    basic_block.uninstall()
    checkpoint.uninstall()
    offset_learning_rate.uninstall()
    old_keys.uninstall()
    packaged_configs.uninstall()
    plain_checkpoints.uninstall()
    zero_start.uninstall()
    logging.getLogger("mmdcn").removeHandler(_TO_MMENGINE)
    _replaced_layers = None


def _places(function: Callable[..., Tensor]) -> Iterator[tuple[str, str]]:
    """The modules that hold `function`, outside mmdcn, and the names under which they do."""
    for module_name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or module_name.partition(".")[0] == "mmdcn":
            continue
        for name, value in list(vars(module).items()):
            # Each access to `apply` makes another bound method: these are equal, not identical.
            if type(value) is type(function) and value == function:
                yield module_name, name


def _rebind(old: Callable[..., Tensor], new: Callable[..., Tensor]) -> None:
    for module_name, name in list(_places(old)):
        # The dictionary is written to, as lazily loading modules customise attribute access.
        vars(sys.modules[module_name])[name] = new


# ------------------------------------------------------------------------------------- reporting


@dataclass(frozen=True)
class Report:
    """The parts of the toolbox that run on mmdcn at present.

    Attributes:
        installed: whether :func:`install` is in force.
        layers: for each name of :data:`LAYERS`, the class that configs build by it now, or None.
        functions: for each function taken over, the module attributes that hold our stand-in.
        basic_block_takes_dcn: whether mmdet's ResNet-18 and ResNet-34 take ``dcn=``.
        safe_checkpoints: whether mmengine loads checkpoints as plain data.
        old_keys: whether checkpoints load in which offset branches have their former names.
        zero_start: whether offset branches start at zero whatever mmengine initialises.
        packaged_configs: whether mmengine finds our configs by name.
        mmcv_problem: why mmcv.ops does not load and how to mend it, or None.
    """

    installed: bool
    layers: dict[str, str | None]
    functions: dict[str, list[str]]
    basic_block_takes_dcn: bool
    safe_checkpoints: bool
    old_keys: bool
    zero_start: bool
    packaged_configs: bool
    mmcv_problem: str | None

    def __str__(self) -> str:
        lines = [f"mmdcn's plugin is {'' if self.installed else 'not '}installed."]
        lines.append("Configs build:")
        lines += [f"  {name}: {layer or 'nothing'}" for name, layer in self.layers.items()]
        for function, places in self.functions.items():
            lines.append(f"{function}: {'replaced in' if places else 'left alone'}")
            lines += [f"  {place}" for place in places]
        takes = "take" if self.basic_block_takes_dcn else "refuse"
        lines.append(f"mmdet's ResNet-18 and ResNet-34 {takes} dcn.")
        loads = "as plain data only" if self.safe_checkpoints else "as mmengine does by itself"
        lines.append(f"Checkpoints load {loads}.")
        load = "load" if self.old_keys else "do not load"
        lines.append(f"Former names of offset branches in them {load}.")
        start = "start at zero" if self.zero_start else "may be initialised"
        lines.append(f"Offset branches {start} when mmengine initialises a model.")
        found = "are" if self.packaged_configs else "are not"
        lines.append(f"Configs {found} found by name, as mmdcn::dcnv2/….")
        if self.mmcv_problem is not None:
            lines.append(self.mmcv_problem)
        return "\n".join(lines)


def report() -> Report:
    """Say what is taken over; the result prints well.

    Example:
        >>> print(report())  # doctest: +ELLIPSIS
        mmdcn's plugin is installed.
        Configs build:
          DCN: mmdcn.plugin.DeformConv2dPack
          ...
    """
    built = {name: MODELS.module_dict.get(name) for name in LAYERS}
    return Report(
        installed=_replaced_layers is not None,
        layers={
            name: layer and f"{layer.__module__}.{layer.__qualname__}"
            for name, layer in built.items()
        },
        functions={
            f"mmcv.ops.{ours.__name__}": sorted(".".join(place) for place in _places(ours))
            for _, ours, _ in _FUNCTIONS
        }
        | {"mmcv.cnn.fuse_conv_bn": sorted(map(".".join, _places(fuse_conv_bn)))},
        basic_block_takes_dcn=basic_block.installed(),
        safe_checkpoints=checkpoint.installed(),
        old_keys=old_keys.installed(),
        zero_start=zero_start.installed(),
        packaged_configs=packaged_configs.installed(),
        mmcv_problem=_MMCV_PROBLEM,
    )


def _log(message: str, level: int = logging.INFO) -> None:
    """Log by mmengine, once per job: not again in other ranks, nor in data loaders' workers."""
    if is_first_process() and multiprocessing.parent_process() is None:
        print_log(message, logger="current", level=level)


class _ToMMEngine(logging.Handler):
    """Passes on what the layers log, so that it reaches the toolbox's console and log file."""

    def emit(self, record: logging.LogRecord) -> None:
        _log(record.getMessage(), record.levelno)


_TO_MMENGINE = _ToMMEngine()
