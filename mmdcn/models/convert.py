"""Plain convolutions of any model, turned into deformable ones that start with the same output."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.utils import _pair

from mmdcn.layers import DeformConv2dPack, ModulatedDeformConv2dPack

# Without the toolbox there are no names of layers, and models of others are converted all the same.
try:
    from mmcv.cnn.bricks.wrappers import Conv2d as MMCVConv2d
    from mmengine.model import is_model_wrapper
    from mmengine.registry import MODELS
except ImportError:
    MODELS = None

#: Names of modules, as glob patterns, or a function that says yes or no to a name and its module.
Select = str | Sequence[str] | Callable[[str, nn.Module], bool]

# These compute nothing but a convolution; other subclasses of nn.Conv2d compute something else.
_PLAIN = (nn.Conv2d,) if MODELS is None else (nn.Conv2d, MMCVConv2d)

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


def convert_to_deformable(model: nn.Module, dcn: Mapping[str, Any], select: Select) -> nn.Module:
    """Turn chosen convolutions of a model into deformable ones, in place.

    The deformable layer takes over the convolution's name in the model and its very parameters:
    state-dict keys stay, ``….conv_offset.weight`` and ``….conv_offset.bias`` join them, and an
    optimizer or a checkpoint that knows the old ones still fits. The offset branch starts at zero
    and the modulation of v2 at one (``modulation_scale=2``), so that the model computes what it
    did before, and goes on to do so through ``init_weights()`` and when a checkpoint of the plain
    model is loaded, now or later. Convert before an optimizer is built, or before
    ``DistributedDataParallel`` wraps the model: both must see the new parameters. The branch of a
    frozen convolution is frozen too.

    Args:
        model: any module; its convolutions may be anywhere inside.
        dcn: the layer, as in a backbone's ``dcn=``: ``dict(type='DCN')`` or
            ``dict(type='DCNv2', deform_groups=4)``. ``type`` is a registered name (without the
            toolbox there are none) or a class, and derives from
            :class:`mmdcn.layers.DeformConv2dPack` or
            :class:`mmdcn.layers.ModulatedDeformConv2dPack`. With ``fallback_on_stride=True``,
            convolutions whose stride is not 1 stay plain.
        select: which convolutions, by their names in ``model.named_modules()``: a pattern like
            ``'backbone.layer[234].*.conv2'``, in which ``*`` stands for any characters, dots
            included; several patterns; or a function of name and module.

    Returns:
        `model`.

    Raises:
        TypeError: `select` or ``dcn['type']`` is of a wrong type.
        ValueError: `model` is wrapped for parallel training; `select` chooses nothing (or one of
            several patterns does), or something that is not a plain 2-D convolution padded with
            zeros on both sides alike, or one that carries hooks; `dcn` names no layer that can be
            used, or sets what the convolution says. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        >>> type(convert_to_deformable(model, dict(type='DCNv2'), '1')[1]).__name__
        'ModulatedDeformConv2dPack'
    """
    if _is_wrapper(model):
        raise ValueError(
            f"model: expected the model itself, got a {type(model).__name__} around it, which "
            "would not learn of the new parameters"
        )
    dcn = dict(dcn)
    layer_class = _layer_class(dcn.pop("type", None), dcn.pop("_scope_", None))
    fallback_on_stride = dcn.pop("fallback_on_stride", False)
    repeated = [name for name in _OF_THE_CONVOLUTION if name in dcn]
    if repeated:
        raise ValueError(f"dcn: expected no {repeated[0]}, which is the convolution's, got {dcn}")

    chosen = {
        name: module
        for name, module in _chosen(model, select).items()
        if not fallback_on_stride or _pair(module.stride) == (1, 1)
    }
    if not chosen:
        raise ValueError(
            "select: expected a convolution of stride 1 among those chosen, as dcn has "
            "fallback_on_stride=True, got none"
        )
    layers = {conv: _deformable(layer_class, dcn, name, conv) for name, conv in chosen.items()}

    # A convolution can be in several places: mmdet's heads share some between levels.
    replacements = [
        (parent, name, child, layers[child])
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child in layers
    ]
    for parent, name, _, layer in replacements:
        setattr(parent, name, layer)
    if hasattr(model, "init_weights"):
        model.init_weights = _InitWeights(model.init_weights, replacements)
    return model


def build_deformable(
    model_type: str | type,
    convert: Mapping[str, Any] | Sequence[Mapping[str, Any]],
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
        model_type: what `type` was before.
        convert: arguments of :func:`convert_to_deformable`, `dcn` and `select`; or several of
            these, to be applied in turn.
        model: all other arguments of the model.

    Returns:
        The model, of the class that `model_type` names.

    Raises:
        TypeError, ValueError: see :func:`convert_to_deformable`.

    Example:
        >>> convert = dict(dcn=dict(type='DCN'), select='layer4.*.conv2')
        >>> backbone = build_deformable('mmdet.ResNet', convert, depth=50, base_channels=8)
        >>> type(backbone.layer4[0].conv2).__name__
        'DeformConv2dPack'
    """
    built = MODELS.build(dict(type=model_type, **model))
    for arguments in [convert] if isinstance(convert, Mapping) else convert:
        convert_to_deformable(built, **arguments)
    return built


def _is_wrapper(model: nn.Module) -> bool:
    if MODELS is None:
        return isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return is_model_wrapper(model)


class _InitWeights:
    """A model's ``init_weights`` that sees the plain convolutions in their old places.

    Whatever initialises the model, by the class of a layer or by its name, from a distribution or
    from a file, thus treats them as it does in the plain model, and leaves the offset branches
    at zero. The convolutions share their parameters with the layers.
    """

    def __init__(
        self,
        init_weights: Callable[[], None],
        replacements: list[tuple[nn.Module, str, nn.Module, nn.Module]],
    ) -> None:
        self.init_weights = init_weights
        self.replacements = replacements

    def __call__(self) -> None:
        # setattr would make the parents register once more what they do for a new child.
        for parent, name, conv, layer in self.replacements:
            conv.weight, conv.bias = layer.weight, layer.bias
            parent._modules[name] = conv
        try:
            self.init_weights()
        finally:
            for parent, name, _, layer in self.replacements:
                parent._modules[name] = layer


def _layer_class(kind: str | type | None, scope: str | None) -> type[nn.Module]:
    if kind is not None and not isinstance(kind, str | type):
        raise TypeError(f"dcn: expected type to be a name or a class, got {kind!r}")
    layer_class = kind
    if isinstance(kind, str):
        if MODELS is None:
            raise ValueError(
                "dcn: expected type to be a class, such as mmdcn.layers.ModulatedDeformConv2dPack, "
                f"as names are mmengine's, which is not installed, got {kind!r}"
            )
        with MODELS.switch_scope_and_registry(scope) as registry:
            layer_class = registry.get(kind)
    usable = DeformConv2dPack | ModulatedDeformConv2dPack
    if not isinstance(layer_class, type) or not issubclass(layer_class, usable):
        found = "" if layer_class is None or layer_class is kind else f", which is {layer_class}"
        raise ValueError(
            "dcn: expected type='DCN' or 'DCNv2' (where the plugin is not installed, 'mmdcn.DCN' "
            f"or 'mmdcn.DCNv2'), or a layer derived from these, got {kind!r}{found}"
        )
    return layer_class


def _chosen(model: nn.Module, select: Select) -> dict[str, nn.Module]:
    """What `select` chooses, checked to be plain convolutions, each once."""
    named = dict(model.named_modules(remove_duplicate=False))
    del named[""]
    if callable(select):
        names = [name for name, module in named.items() if select(name, module)]
        if not names:
            raise ValueError(f"select: expected a choice among {_convolutions(named)}, got none")
    else:
        patterns = [select] if isinstance(select, str) else select
        if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
            raise TypeError(
                f"select: expected a pattern, a sequence of patterns or a function, got {select!r}"
            )
        names = list(_matching(named, patterns))
    for name in names:
        _check_convertible(name, named[name], named)
    first_names = {named[name]: name for name in reversed(names)}
    return {name: module for module, name in first_names.items()}


def _matching(named: dict[str, nn.Module], patterns: Sequence[str]) -> Iterator[str]:
    if not patterns:
        raise ValueError("select: expected at least one pattern, got none")
    for pattern in patterns:
        matches = [name for name in named if fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(
                f"select: expected the name of a convolution, such as "
                f"{_convolutions(named, pattern)}, got {pattern!r}, which matches nothing"
            )
        yield from matches


def _convolutions(named: dict[str, nn.Module], pattern: str = "") -> str:
    """Some names of plain convolutions, those like `pattern` first, for messages."""
    names = [name for name, module in named.items() if type(module) in _PLAIN]
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    return ", ".join((close or names)[:3]) or "(the model has none)"


def _check_convertible(name: str, module: nn.Module, named: dict[str, nn.Module]) -> None:
    def refuse(expected: str, got: str) -> None:
        raise ValueError(f"select: expected {expected}, got {name!r}, {got}")

    kind = type(module).__name__
    if isinstance(module, DeformConv2dPack | ModulatedDeformConv2dPack):
        refuse("plain convolutions", f"which is deformable already ({kind})")
    if getattr(module, "transposed", False):
        refuse("no transposed convolution", f"a {kind}, which has no deformable form")
    if type(module) not in _PLAIN:
        inside = {n: m for n, m in named.items() if n.startswith(f"{name}.")}
        hint = f"; inside it are {_convolutions(inside)}" if inside else ""
        refuse("plain 2-D convolutions", f"a {kind}{hint}")
    if module.padding_mode != "zeros":
        refuse("padding_mode='zeros'", f"with padding_mode={module.padding_mode!r}")
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    if any(getattr(module, kind_of_hook) for kind_of_hook in hooks):
        refuse("convolutions without hooks", "which has some: a new layer would lose them")


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
            f"{total[0]} rows and {total[1]} columns in all"
        )
    return total[0] // 2, total[1] // 2


def _deformable(
    layer_class: type[nn.Module], dcn: Mapping[str, Any], name: str, conv: nn.Conv2d
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
    except ValueError as error:
        raise ValueError(f"{name!r} cannot become {dict(dcn)}: {error}") from error
    layer.weight, layer.bias = conv.weight, conv.bias
    layer.conv_offset.to(conv.weight.dtype).to_empty(device=conv.weight.device)
    layer.init_offset()
    layer.conv_offset.requires_grad_(conv.weight.requires_grad)
    return layer.train(conv.training)
