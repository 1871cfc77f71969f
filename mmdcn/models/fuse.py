"""Folding of batch normalisations into the convolutions before them, deformable ones included.

It stands in for ``mmcv.cnn.fuse_conv_bn``, which knows ``nn.Conv2d`` only: it passes over a
deformable layer, and folds the normalisation after it into the convolution before it.
"""

import copy
from collections import Counter

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdcn import layers
from mmdcn.layers._deform_conv_base import DeformConvBase

__all__ = ["fuse_conv_bn"]


def fuse_conv_bn(module: nn.Module) -> nn.Module:
    """Fold each batch normalisation into the convolution before it, for inference, in place.

    A normalisation is folded into the layer that was registered before it in the same module,
    where that is an ``nn.Conv2d`` or a deformable convolution (of any kind, mmcv's own modulated
    layers included), and ``nn.Identity`` takes its place. It is left as it is after anything
    else, where it has no running statistics, and where a layer cannot take it: DCNv4 with
    ``without_pointwise``, mmcv's own layers of v1, which have no bias, and parametrized ones.
    A convolution that is in several places is copied for each normalisation.

    Args:
        module: a model in evaluation mode. Layers keep their class; they get a bias where they
            have none.

    Returns:
        `module`.

    Example:
        >>> from mmdcn.layers import DCNv3
        >>> model = nn.Sequential(DCNv3(8, 8, 3, padding=1), nn.BatchNorm2d(8)).eval()
        >>> x = torch.randn(1, 8, 6, 6)
        >>> expected = model(x)
        >>> bool((fuse_conv_bn(model)(x) - expected).abs().max() < 1e-5), model[1]
        (True, Identity())
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got a {type(module).__name__}")
    places = Counter(child for parent in module.modules() for child in parent._modules.values())
    for parent in list(module.modules()):
        _fuse_children(parent, places)
    return module


def _fuse_children(parent: nn.Module, places: Counter[nn.Module]) -> None:
    in_order = isinstance(parent, nn.Sequential)
    if not _runs_norm_after_conv(parent):
        return
    before: str | None = None  # the name of the layer that a normalisation would fold into
    for name, child in parent._modules.items():
        if child is None:
            continue
        if isinstance(child, _BatchNorm):
            if before is not None and _fits(parent._modules[before], child):
                parent._modules[before] = _fused(parent._modules[before], child, places)
                parent._modules[name] = nn.Identity()
            before = None
        elif _takes_affine(child):
            before = name
        elif isinstance(child, nn.Identity):
            continue
        elif in_order or next(child.parameters(), None) is not None:
            # Elsewhere the order of what has no parameters, such as activations, means nothing.
            before = None


def _runs_norm_after_conv(parent: nn.Module) -> bool:
    """Not so where mmcv's ConvModule, which registers its convolution first, runs it later."""
    order = getattr(parent, "order", None)
    if not isinstance(order, tuple) or "norm" not in order:
        return True
    return "conv norm" in " ".join(order)


def _linear_part(layer: nn.Module) -> nn.Module | None:
    """The module by whose weight and bias the layer's output is linear, or None."""
    if isinstance(layer, layers.DCNv3 | layers.DCNv4):
        return getattr(layer, "output_proj", None)
    if isinstance(layer, (nn.Conv2d, DeformConvBase, *_MMCV_LAYERS)):
        return layer
    return None


def _takes_affine(layer: nn.Module) -> bool:
    part = _linear_part(layer)
    # Parametrized and spectrally normalised weights are no parameters.
    return part is not None and {"weight", "bias"} <= part._parameters.keys()


def _fits(layer: nn.Module, norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and norm.num_features == layer.out_channels


def _fused(layer: nn.Module, norm: _BatchNorm, places: Counter[nn.Module]) -> nn.Module:
    if places[layer] > 1:
        layer = copy.deepcopy(layer)
    part = _linear_part(layer)
    with torch.no_grad():
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        bias = -norm.running_mean if part.bias is None else part.bias - norm.running_mean
        bias = bias * scale
        if norm.bias is not None:
            bias = bias + norm.bias
        weight = part.weight * scale.reshape(-1, *[1] * (part.weight.dim() - 1))
    part.weight = nn.Parameter(weight.to(part.weight.dtype))
    part.bias = nn.Parameter(bias.to(part.weight.dtype))
    return layer


def _mmcv_layers() -> tuple[type[nn.Module], ...]:
    """mmcv's own layers that add a bias, where mmcv has its operators."""
    try:
        from mmcv.ops import ModulatedDeformConv2d
    except (ImportError, AssertionError):
        return ()
    return (ModulatedDeformConv2d,)


_MMCV_LAYERS = _mmcv_layers()
