"""Deformable RoI pooling, also position-sensitive: one operator, top to bottom.

The mathematics is in :mod:`mmdcn.ops.reference`; the kernels are in ``csrc/``.
"""

import torch
from torch import Tensor

from . import _library, reference
from ._checks import check_number, check_types, is_whole
from ._determinism import alert_not_deterministic
from .deform_conv import LONGEST_SIDE, _memory_format, _pair

_library.load()

MOST_POINTS = 2**24  # of a bin, along each dimension; float32 counts this far


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    position_sensitive: bool = False,
) -> Tensor:
    """Deformable RoI pooling: RoI Align whose bins are moved by offsets.

    Divides each RoI into kh × kw bins, moves bin (i, j) by ``Δp = gamma · Δp̂ ∘ (w, h)``, where Δp̂
    is its offset and w × h the size of the RoI, and averages the input, sampled with bilinear
    interpolation, over a grid of points in the bin: equation (6) of Deformable Convolutional
    Networks (arXiv 1703.06211, section 2.2), and its PS RoI pooling where `position_sensitive`.
    Arguments and results are those of ``mmcv.ops.deform_roi_pool``.

    A point between -1 and 0, or between the last pixel and one further, reads the border; a point
    that is further outside, or not finite, contributes zero and has zero gradient, and it counts in
    the average all the same. A RoI whose box is inverted is sampled from its end to its start if
    `sampling_ratio` is positive; if it is adaptive, a box that is inverted, empty or NaN gives
    zero. No gradient goes to `rois`.

    float16 and bfloat16 accumulate in float32, and coordinates are float32 beside them. Under
    autocast the input keeps its dtype, and so does the output; `rois` and `offset` may have any.
    On the CPU the result is the same, bit for bit, for any number of threads; on CUDA the gradient
    of the input is not, and raises under ``torch.use_deterministic_algorithms(True)``.

    Args:
        input: features of shape (N, C, H, W); float32, float64, float16 or bfloat16.
        rois: shape (R, 5): number of the image, then x1, y1, x2, y2 in pixels of the image. In the
            input's dtype, or in float32 beside half-precision features. R may be 0.
        offset: Δp̂ in fractions of the RoI's size, of shape (R, 2 · deform_groups, kh, kw): for each
            offset group x, then y. Co / deform_groups consecutive output channels share a group;
            deform_groups follows from the shape. In a dtype that rois may have. None is zero.
        output_size: kh and kw, or one number for both.
        spatial_scale: pixels of the features for each pixel of the image.
        sampling_ratio: points of a bin along each dimension; 0 or less takes the bin's height and
            width in pixels of the features, rounded up.
        gamma: what the offsets are multiplied by.
        position_sensitive: whether each bin pools channels of its own. The input then has
            Co · kh · kw channels: for each output channel, those of its bins in row-major order.

    Returns:
        Tensor of shape (R, Co, kh, kw) in the input's dtype, contiguous; Co is C unless
        `position_sensitive`.

    Raises:
        TypeError: an argument is no tensor or number, or has another dtype than it must.
        ValueError: a shape, a device or a number does not fit the others.
        RuntimeError: a RoI is on an image that the batch does not have, or there is no compiled
            kernel for the device of the input. On CUDA the first is a device-side assertion, as
            for any index out of range, because the host does not wait to see the numbers.
    """
    output_size = _pair("output_size", output_size, at_least=1)
    _check_numbers(spatial_scale, sampling_ratio, gamma)
    _check_tensors(input=input, rois=rois, offset=offset)
    rois, offset = _autocast(input, rois, offset)
    check_types(input, rois=rois, offset=offset)
    _check_shapes(input, rois, offset, output_size, position_sensitive)
    _library.require_kernels_for(input.device)
    if position_sensitive:
        # The operator takes the channels bin by bin: neighbouring channels are pooled together.
        bins = output_size[0] * output_size[1]
        input = input.unflatten(1, (-1, bins)).transpose(1, 2).flatten(1, 2)
    coordinate_dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return torch.ops.mmdcn.deform_roi_pool(
        input,
        rois.to(coordinate_dtype),
        None if offset is None else offset.to(coordinate_dtype),
        output_size,
        spatial_scale,
        sampling_ratio,
        gamma,
        position_sensitive,
    )


# ---------------------------------------------------------------------------------------- checks


def _check_numbers(spatial_scale: float, sampling_ratio: int, gamma: float) -> None:
    check_number("spatial_scale", spatial_scale)
    check_number("gamma", gamma)
    if spatial_scale <= 0:
        raise ValueError(f"spatial_scale: expected a positive number, got {spatial_scale!r}")
    if not is_whole(sampling_ratio):
        raise TypeError(f"sampling_ratio: expected an int, got {sampling_ratio!r}")
    if sampling_ratio > MOST_POINTS:
        raise ValueError(
            f"sampling_ratio: expected at most {MOST_POINTS} points, got {sampling_ratio}"
        )


def _check_tensors(**arguments: Tensor | None) -> None:
    for name, argument in arguments.items():
        optional = name == "offset"
        if argument is None and optional:
            continue
        if not isinstance(argument, Tensor):
            expected = "a tensor or None" if optional else "a tensor"
            raise TypeError(f"{name}: expected {expected}, got {type(argument).__name__}")
        dimensions = 2 if name == "rois" else 4
        if argument.dim() != dimensions:
            raise ValueError(
                f"{name}: expected {dimensions} dimensions, got shape {tuple(argument.shape)}"
            )


def _autocast(input: Tensor, rois: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Boxes and offsets in float32 beside float32 or half features, where autocast is on.

    What a layer inside autocast predicts from the features is in half precision, whatever they are.
    """
    device_type = input.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return rois, offset
    halves = (torch.float16, torch.bfloat16)
    wide = input.dtype if input.dtype == torch.float64 else torch.float32
    return tuple(t.to(wide) if t is not None and t.dtype in halves else t for t in (rois, offset))


def _check_shapes(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: tuple[int, int],
    position_sensitive: bool,
) -> None:
    channels, height, width = input.shape[1:]
    if channels < 1:
        raise ValueError(f"input: expected at least one channel, got shape {tuple(input.shape)}")
    if height >= LONGEST_SIDE or width >= LONGEST_SIDE:
        raise ValueError(f"input: expected a height and a width below 2**30, got {(height, width)}")
    if max(output_size) >= LONGEST_SIDE:
        raise ValueError(f"output_size: expected numbers below 2**30, got {output_size}")
    if rois.shape[1] != 5:
        raise ValueError(
            "rois: expected 5 columns, the number of the image, x1, y1, x2 and y2, "
            f"got shape {tuple(rois.shape)}"
        )
    bins = output_size[0] * output_size[1]
    if position_sensitive:
        if channels % bins != 0:
            raise ValueError(
                f"input: expected a multiple of {bins} channels, as many as output_size "
                f"{output_size} has bins, where position_sensitive, got {channels}"
            )
        channels //= bins
    if offset is None:
        return
    groups = offset.shape[1] // 2
    if offset.shape[1] % 2 != 0 or groups < 1 or channels % groups != 0:
        raise ValueError(
            "offset: offset.shape[1] is not valid: expected 2 · deform_groups, where deform_groups "
            f"divides the {channels} channels of the output (2 for one group), "
            f"got {offset.shape[1]}"
        )
    expected = (rois.shape[0], offset.shape[1], *output_size)
    if offset.shape != expected:
        raise ValueError(
            f"offset: expected shape {expected}, the number of rois and output_size, "
            f"got {tuple(offset.shape)}"
        )


# ------------------------------------------------------------------- what the compiler must know


@torch.library.register_fake("mmdcn::deform_roi_pool")
def _(input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, position_sensitive):
    channels = input.shape[1]
    if position_sensitive:
        channels = channels // (output_size[0] * output_size[1])
    return input.new_empty((rois.shape[0], channels, *output_size))


@torch.library.register_fake("mmdcn::deform_roi_pool_backward")
def _(
    grad_output,
    input,
    rois,
    offset,
    output_size,
    spatial_scale,
    sampling_ratio,
    gamma,
    position_sensitive,
    output_mask,
):
    grad_input, grad_offset = input.new_empty(0), rois.new_empty(0)
    if output_mask[0]:
        grad_input = torch.empty(
            input.shape,
            dtype=input.dtype,
            device=input.device,
            memory_format=_memory_format(input),
        )
    if output_mask[1] and offset is not None:
        grad_offset = offset.new_empty(offset.shape)
    return grad_input, grad_offset


# -------------------------------------------------------------------------------------- autograd


def _setup_context(ctx, inputs, output) -> None:
    input, rois, offset, *ctx.arguments = inputs
    ctx.save_for_backward(input, rois, offset)


def _backward(ctx, grad_output):
    input, rois, offset = ctx.saved_tensors
    output_mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    gradients = [None, None]
    if output_mask[0] and input.is_cuda:
        alert_not_deterministic("deform_roi_pool")
    if any(output_mask):
        computed = torch.ops.mmdcn.deform_roi_pool_backward(
            grad_output, input, rois, offset, *ctx.arguments, output_mask
        )
        gradients = [g if wanted else None for g, wanted in zip(computed, output_mask)]
    return gradients[0], None, gradients[1], *[None] * len(ctx.arguments)


torch.library.register_autograd("mmdcn::deform_roi_pool", _backward, setup_context=_setup_context)


def _setup_double_context(ctx, inputs, output) -> None:
    *tensors, ctx.output_mask = inputs[:4] + inputs[-1:]
    ctx.arguments = inputs[4:-1]
    ctx.save_for_backward(*tensors)


def _double_backward(ctx, *grad_gradients):
    """Second derivatives, by differentiating the reference twice: right, not fast."""
    grad_output, input, rois, offset = ctx.saved_tensors
    grad_output, input, offset = (
        t if t is None else t.detach().requires_grad_() for t in (grad_output, input, offset)
    )
    *arguments, position_sensitive = ctx.arguments
    with torch.enable_grad():
        features = input.to(rois.dtype)
        if position_sensitive:
            # The reference takes the channels as the public function does.
            bins = arguments[0][0] * arguments[0][1]
            features = features.unflatten(1, (bins, -1)).transpose(1, 2).flatten(1, 2)
        # As the kernels do, compute in the coordinates' precision.
        output = reference.deform_roi_pool(features, rois, offset, *arguments, position_sensitive)
        wanted = [
            (tensor, grad)
            for tensor, want, grad in zip((input, offset), ctx.output_mask, grad_gradients)
            if want and tensor is not None and grad is not None
        ]
        first = torch.autograd.grad(
            output, [t for t, _ in wanted], grad_output.to(output.dtype), create_graph=True
        )
        variables = [t for t in (grad_output, input, offset) if t is not None]
        second = torch.autograd.grad(
            first, variables, [grad for _, grad in wanted], allow_unused=True
        )
    if offset is None:
        second = (*second, None)
    return second[0], second[1], None, second[2], *[None] * len(ctx.arguments), None


torch.library.register_autograd(
    "mmdcn::deform_roi_pool_backward", _double_backward, setup_context=_setup_double_context
)
