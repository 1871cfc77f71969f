"""Plain convolutions of any model, turned into deformable ones that start with the same output."""

import difflib
import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.utils import _pair

from mmdcn.layers import DeformConv2dPack, ModulatedDeformConv2dPack
from mmdcn.layers._checks import check_names
from mmdcn.models._choice import Select, chosen
from mmdcn.models._plain_places import InitWeights, Place, Train

# Without the toolbox, models of others are converted all the same.
try:
    import mmcv  # noqa: F401  Without it the plugin does not register any names.
    from mmengine.model import is_model_wrapper
    from mmengine.registry import MODELS, Registry
except ImportError:
    MODELS = None

_OF_THE_CONVOLUTION = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "bias",
)

# The names without the toolbox, in whose registry they are else.
_NAMES = {
    "DCN": DeformConv2dPack,
    "DCNv2": ModulatedDeformConv2dPack,
    "DeformConv2dPack": DeformConv2dPack,
    "ModulatedDeformConv2dPack": ModulatedDeformConv2dPack,
}


def convert_to_deformable(
    model: nn.Module,
    dcn: Mapping[str, Any],
    select: Select,
    *,
    train_offsets: bool = True,
) -> nn.Module:
    """Turn chosen convolutions of a model into deformable ones, in place.

    The deformable layer takes over the convolution's name in the model and its very parameters:
    state-dict keys stay, ``….conv_offset.weight`` and ``….conv_offset.bias`` join them, and an
    optimizer or a checkpoint that knows the old ones still fits. The offset branch starts at zero
    and the modulation of v2 at one (``modulation_scale=2``), so that the model computes what it
    did before, and goes on to do so through ``init_weights()`` and when a checkpoint of the plain
    model is loaded, now or later. Convert before an optimizer is built, or before
    ``DistributedDataParallel`` wraps the model: both must see the new parameters.

    A frozen convolution stays frozen, and its offset branch learns: freeze a model, convert it, and
    train what is new. ``frozen_stages`` of mmdet's backbones freezes what it froze before.

    Args:
        model: any module; its convolutions may be anywhere inside. The deformable layer of a model
            that is an ``nn.Conv2d`` itself is returned, and ``'*'`` selects it.
        dcn: the layer, as in a backbone's ``dcn=``: ``dict(type='DCN')`` or
            ``dict(type='DCNv2', deform_groups=4)``. ``type`` is a registered name (without the
            toolbox, one of these two or a class's) or a class, and derives from
            :class:`mmdcn.layers.DeformConv2dPack` or
            :class:`mmdcn.layers.ModulatedDeformConv2dPack`. With ``fallback_on_stride=True``,
            convolutions whose stride is not 1 stay plain.
        select: which convolutions, by their names in ``model.named_modules()``: a pattern like
            ``'backbone.layer[234].*.conv2'``, in which ``*`` stands for any characters, dots
            included; several patterns; or a function that is given each name and module, and
            says whether it is chosen, such as ``lambda name, module: type(module) is nn.Conv2d
            and module.kernel_size == (3, 3)``.
        train_offsets: whether all offset branches train. False freezes the branches of frozen
            convolutions.

    Returns:
        `model`, or its deformable layer where it is a convolution.

    Raises:
        TypeError: `model` is no module, or `dcn`, `select`, `train_offsets` or ``dcn['type']`` of a
            wrong type, or
            `dcn` has an argument that the layer does not take.
        ValueError: `model` is wrapped for parallel training; `select` chooses nothing (or one of
            several patterns does), or something that is not a plain 2-D convolution padded with
            zeros on both sides alike, or one that carries hooks, a ``forward`` of its own, a
            parametrized or a complex weight; `dcn`
            names no layer that can be used, or sets what the convolution says. The model is then
            as it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        >>> type(convert_to_deformable(model, dict(type='DCNv2'), '1')[1]).__name__
        'ModulatedDeformConv2dPack'
    """
    return _convert(model, dcn, select, train_offsets, MODELS)


def build_deformable(
    model_type: str | type | None = None,
    convert: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    **model: Any,
) -> nn.Module:
    """Build a model and convert it: what ``type='mmdcn.Deformable'`` stands for in configs.

    ::

        model = dict(
            type='mmdcn.Deformable',
            model_type='FasterRCNN',
            convert=dict(dcn=dict(type='DCNv2'), select='backbone.layer[234].*.conv2'))

    added to any config of a Faster R-CNN makes its backbone deformable. It works for a part of a
    model alike, such as a backbone. As the model is built deformable, the optimizer, checkpoints
    and distributed training need no more.

    Args:
        model_type: what `type` was before; it is looked up where `type` would be.
        convert: arguments of :func:`convert_to_deformable`, `dcn`, `select` and `train_offsets`;
            or several of these, to be applied in turn. Both have to be given.
        model: all other arguments of the model.

    Returns:
        The model, of the class that `model_type` names.

    Raises:
        TypeError, ValueError: see :func:`convert_to_deformable`.
        ImportError: the toolbox, whose registry knows models by name, is not installed.

    Example:
        >>> convert = dict(dcn=dict(type='DCN'), select='layer4.*.conv2')
        >>> backbone = build_deformable('mmdet.ResNet', convert, depth=50, base_channels=8)
        >>> type(backbone.layer4[0].conv2).__name__
        'DeformConv2dPack'
    """
    if MODELS is None:
        raise ImportError(
            "mmengine and mmcv, which build models by name, are not installed; "
            "convert_to_deformable converts a model without them"
        )
    for name, value in (("model_type", model_type), ("convert", convert)):
        if value is None:
            close = difflib.get_close_matches(name, model, n=1)
            hint = f" (is {close[0]!r} meant to be it?)" if close else ""
            raise TypeError(f"mmdcn.Deformable: expected {name}, got none{hint}")
    conversions = _conversions(convert)
    registry = _building_registry()
    built = registry.build(dict(type=model_type, **model))
    for arguments in conversions:
        built = _convert(built, **{"train_offsets": True, **arguments}, registry=registry)
    return built


def _conversions(convert: Any) -> list[Mapping[str, Any]]:
    conversions = [convert] if isinstance(convert, Mapping) else convert
    if not isinstance(conversions, list | tuple) or not all(
        isinstance(arguments, Mapping) for arguments in conversions
    ):
        raise TypeError(
            "convert: expected dict(dcn=..., select=...), or several of these in a list, got "
            f"{convert!r}"
        )
    if not conversions:
        raise ValueError("convert: expected at least one dict(dcn=..., select=...), got none")
    for arguments in conversions:
        check_names("convert", arguments, ["dcn", "select", "train_offsets"], ["dcn", "select"])
    return list(conversions)


def _building_registry() -> "Registry":
    """The registry whose builder has called our caller, or the root.

    mmengine tells what it builds nothing of the registry, so its own variable is looked at.
    """
    frame = inspect.currentframe().f_back.f_back
    registry = None
    if frame is not None and frame.f_globals.get("__name__") == "mmengine.registry.build_functions":
        registry = frame.f_locals.get("registry")
    return registry if isinstance(registry, Registry) else MODELS


def _convert(
    model: nn.Module,
    dcn: Mapping[str, Any],
    select: Select,
    train_offsets: bool,
    registry: "Registry | None",
) -> nn.Module:
    _check_model(model)
    if not isinstance(train_offsets, bool):
        raise TypeError(f"train_offsets: expected True or False, got {train_offsets!r}")
    if not isinstance(dcn, Mapping):
        raise TypeError(f"dcn: expected a layer such as dict(type='DCNv2'), got {dcn!r}")
    dcn = dict(dcn)
    layer_class = _layer_class(dcn.pop("type", None), dcn.pop("_scope_", None), registry)
    fallback_on_stride = dcn.pop("fallback_on_stride", False)
    if not isinstance(fallback_on_stride, bool):
        raise TypeError(
            f"dcn: expected fallback_on_stride to be True or False, got {fallback_on_stride!r}"
        )
    repeated = [name for name in _OF_THE_CONVOLUTION if name in dcn]
    if repeated:
        raise ValueError(f"dcn: expected no {repeated[0]}, which is the convolution's, got {dcn}")

    convolutions = {
        name: module
        for name, module in chosen(model, select).items()
        if not fallback_on_stride or _pair(module.stride) == (1, 1)
    }
    if not convolutions:
        raise ValueError(
            "select: expected a convolution of stride 1 among those chosen, as dcn has "
            "fallback_on_stride=True, got none"
        )
    layers = {
        conv: _deformable(layer_class, dcn, name, conv, train_offsets)
        for name, conv in convolutions.items()
    }
    return layers[model] if model in layers else _replace(model, layers)


def _replace(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> nn.Module:
    # A convolution can be in several places: mmdet's heads share some between levels.
    places = [
        Place(parent, name, child, layers[child])
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child in layers
    ]
    for place in places:
        setattr(place.parent, place.name, place.layer)
    if hasattr(model, "init_weights"):
        model.init_weights = InitWeights(model.init_weights, places)
    for module in list(model.modules()):
        if getattr(module.train, "__func__", None) is nn.Module.train:
            continue
        inside = set(module.modules())
        branches = [layer.conv_offset for layer in layers.values() if layer in inside]
        if branches:
            module.train = Train(module.train, branches)
    return model


def _check_model(model: nn.Module) -> None:
    if isinstance(model, type):
        raise TypeError(
            f"model: expected a model, got the class {model.__name__}: make an instance of it first"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got a {type(model).__name__}")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrappers) or (MODELS is not None and is_model_wrapper(model)):
        raise ValueError(
            f"model: expected the model itself, got a {type(model).__name__} around it, which "
            "would not learn of the new parameters"
        )
    if _is_sharded(model):
        raise ValueError(
            "model: expected one whose parameters are whole, got one that is sharded, by "
            "fully_shard or for tensor parallelism: convert it first, then shard it"
        )


def _is_sharded(model: nn.Module) -> bool:
    """Whether parameters are parts of what they are called, by FSDP or tensor parallelism."""
    # Where these are not imported, which takes a second, there are none.
    tensors = sys.modules.get("torch.distributed.tensor")
    wrappers = sys.modules.get("torch.distributed.fsdp")
    return (
        tensors is not None and any(isinstance(p, tensors.DTensor) for p in model.parameters())
    ) or (
        wrappers is not None
        and any(isinstance(m, wrappers.FullyShardedDataParallel) for m in model.modules())
    )


def _layer_class(
    kind: str | type | None, scope: str | None, registry: "Registry | None"
) -> type[nn.Module]:
    if kind is not None and not isinstance(kind, str | type):
        raise TypeError(f"dcn: expected type to be a name or a class, got {kind!r}")
    layer_class = kind
    if isinstance(kind, str):
        if registry is None:
            layer_class = _NAMES.get(kind.removeprefix("mmdcn."))
        else:
            with registry.switch_scope_and_registry(scope) as found:
                layer_class = found.get(kind)
    usable = DeformConv2dPack | ModulatedDeformConv2dPack
    if not isinstance(layer_class, type) or not issubclass(layer_class, usable):
        found = "" if layer_class is None or layer_class is kind else f", which is {layer_class}"
        raise ValueError(
            "dcn: expected type='DCN' or 'DCNv2' (where the plugin is not installed, 'mmdcn.DCN' "
            f"or 'mmdcn.DCNv2'), or a layer derived from these, got {kind!r}{found}"
        )
    return layer_class


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    """The padding on either side; torch also knows it by the names 'same' and 'valid'."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding != "same":
        return conv.padding
    total = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation)]
    if any(t % 2 for t in total):
        raise ValueError(
            "padding: expected as much on both sides, got 'same', which adds "
            f"{total[0]} rows and {total[1]} columns in all: pad by an nn.ZeroPad2d before it, "
            "and give the convolution padding=0"
        )
    return total[0] // 2, total[1] // 2


def _deformable(
    layer_class: type[nn.Module],
    dcn: Mapping[str, Any],
    name: str,
    conv: nn.Conv2d,
    train_offsets: bool,
) -> nn.Module:
    arguments = dict(dcn)
    if issubclass(layer_class, ModulatedDeformConv2dPack):
        arguments.setdefault("modulation_scale", 2.0)
    try:
        # The meta device takes no memory or random numbers: the parameters are the convolution's.
        with torch.device("meta"):
            layer = layer_class(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                _padding(conv),
                conv.dilation,
                conv.groups,
                bias=conv.bias is not None,
                **arguments,
            )
    except (TypeError, ValueError) as error:
        which = repr(name) if name else "the model"
        raise type(error)(f"dcn: {which} cannot become {dict(dcn)}: {error}") from error
    layer.weight, layer.bias = conv.weight, conv.bias
    branch = layer.conv_offset.to(conv.weight.dtype).to_empty(device=conv.weight.device)
    last = torch.channels_last
    if conv.weight.is_contiguous(memory_format=last) and not conv.weight.is_contiguous():
        branch.to(memory_format=last)
    layer.init_offset()
    branch.requires_grad_(train_offsets or conv.weight.requires_grad)
    return layer.train(conv.training)
