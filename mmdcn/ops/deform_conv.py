"""Deformable convolution, v1 and v2: one operator, top to bottom.

The mathematics is in :mod:`mmdcn.ops.reference`; the kernels are in ``csrc/``.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import _library, reference
from ._determinism import alert_not_deterministic

_library.load()

_OPERATOR = torch.ops.mmdcn.deform_conv2d.default
FEATURE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LONGEST_SIDE = 2**30  # the kernels count rows and columns in 32 bits
_PLAIN = (Tensor, nn.Parameter)  # subclasses may stand for something else


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution v1, or v2 where a mask is given.

    Samples the input at ``p = p0 + pn + Δpn`` with bilinear interpolation, for each tap ``pn`` of
    the kernel, multiplies by the modulation and convolves: equations (2)-(4) of Deformable
    Convolutional Networks (arXiv 1703.06211), and equation (1) of Deformable ConvNets v2 (arXiv
    1811.11168). Arguments are those of ``torchvision.ops.deform_conv2d``.

    A sample with a coordinate that is not finite, or outside (-1, H) × (-1, W), contributes zero
    and has zero gradient. float16 and bfloat16 accumulate in float32. On the CPU the result is the
    same, bit for bit, for any number of threads; on CUDA the gradient of the input is the same in
    every run under ``torch.use_deterministic_algorithms(True)`` only: it is then summed in fixed
    point, in 62 bits, which takes longer, and is coarser than float64 for float64.

    Differentiable any number of times, from the second on through the reference, which is slow.
    Within the transformations of ``torch.func`` (``vmap``, ``grad``, ``jvp`` and so on) and in
    forward-mode differentiation, the reference computes everything.

    Args:
        input: features of shape (N, C, H, W); float32, float64, float16 or bfloat16. N may be 0.
            A channels-last input gives a channels-last output.
        offset: Δpn in pixels, of shape (N, 2 · deform_groups · kh · kw, Ho, Wo): for each offset
            group and each tap in row-major order, y then x. In the input's dtype, or in float32
            beside half-precision features. C / deform_groups consecutive channels share a group;
            deform_groups follows from the shape and may be any divisor of C.
        weight: kernel of shape (Co, C / groups, kh, kw), in the input's dtype. groups follows from
            the shape.
        bias: shape (Co,), in the input's dtype.
        stride, padding, dilation: one number, or one for each of height and width, in pixels.
        mask: modulation of shape (N, deform_groups · kh · kw, Ho, Wo), in the offset's dtype or one
            that the offset may have.

    Returns:
        Tensor of shape (N, Co, Ho, Wo) in the input's dtype, where
        ``Ho = (H + 2 · padding - dilation · (kh - 1) - 1) // stride + 1``, and Wo likewise.

    Raises:
        TypeError: an argument is no tensor or number, or has another dtype than it must.
        ValueError: a shape, a device or a number does not fit the others.
        RuntimeError: there is no compiled kernel for the device of the input.
    """
    return _deform_conv(
        _OPERATOR,
        ("height", "width"),
        input,
        offset,
        weight,
        bias,
        stride,
        padding,
        dilation,
        mask,
    )


def _deform_conv(
    operator, sides: tuple[str, ...], input, offset, weight, bias, stride, padding, dilation, mask
) -> Tensor:
    """The compiled operator on checked arguments; `sides` names the dimensions of an image."""
    rank = len(sides)
    stride = _numbers("stride", stride, rank, 1)
    padding = _numbers("padding", padding, rank, 0)
    dilation = _numbers("dilation", dilation, rank, 1)
    if _goes_straight(input, offset, weight, bias, mask):
        # The operator refuses whatever does not fit together, and for small layers it counts that
        # finding out what is at fault, and saying so, is left for when something is.
        arguments = (input, offset, weight, bias, stride, padding, dilation, mask)
        try:
            if torch.is_grad_enabled():
                return operator(*arguments)
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*arguments)
        except (RuntimeError, TypeError, ValueError, IndexError):
            pass
    _check_tensors(rank, input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    input, weight, bias = _autocast(input, weight, bias)
    _check_types(input, offset, weight, bias, mask)
    _check_shapes(sides, input, offset, weight, bias, stride, padding, dilation, mask)
    _library.require_kernels_for(input.device)
    coordinate_dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    offset = offset.to(coordinate_dtype)
    mask = None if mask is None else mask.to(coordinate_dtype)
    arguments = (input, offset, weight, bias, stride, padding, dilation, mask)
    if _is_transformed():
        return _by_reference(*arguments)
    # Said only where it matters, for graphs that others translate, and to kernels that have TF32.
    tf32 = {"allow_tf32": True} if rank < 3 and _multiplies_in_tf32(input) else {}
    return operator(*arguments, **tf32)


def _multiplies_in_tf32(input: Tensor) -> bool:
    return input.is_cuda and _cuda_multiplies_in_tf32(input.dtype)


@torch.compiler.assume_constant_result
def _cuda_multiplies_in_tf32(dtype: torch.dtype) -> bool:
    """Whether CUDA may: torch's own setting for convolutions, where the kernels have TF32."""
    return (
        dtype == torch.float32
        and torch.ops.mmdcn.cuda_kernels() == "tensor_core"
        and torch.backends.cudnn.conv.fp32_precision == "tf32"
    )


def _is_transformed() -> bool:
    """Whether derivatives or batches of a kind that the compiled operator cannot know are due.

    It has a formula for reverse mode alone: in forward mode, tangents would be lost silently.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _by_reference(input, offset, weight, bias, stride, padding, dilation, mask) -> Tensor:
    """The reference by the compiled operator's arguments, in the precision of the kernels."""
    wide = (t if t is None else t.to(offset.dtype) for t in (weight, bias))
    output = reference.deform_conv_nd(
        input.to(offset.dtype), offset, *wide, stride, padding, dilation, mask
    )
    return output.to(input.dtype)


def _goes_straight(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> bool:
    """Whether the compiled operator's kernel is what a call reaches, with tensors as they are.

    Small layers wait for it, mostly for code that other work has driven from the caches: so it
    calls what is quick to call.
    """
    if not (
        type(input) in _PLAIN
        and type(offset) in _PLAIN
        and type(weight) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
        and (mask is None or type(mask) in _PLAIN)
    ):
        return False
    if input.is_cpu:
        on_one_device = (
            offset.is_cpu
            and weight.is_cpu
            and (bias is None or bias.is_cpu)
            and (mask is None or mask.is_cpu)
        )
    else:
        on_one_device = (
            input.is_cuda
            and offset.is_cuda
            and weight.is_cuda
            and (bias is None or bias.is_cuda)
            and (mask is None or mask.is_cuda)
            and not _multiplies_in_tf32(input)
        )
    # Tensors that are traced otherwise than by Dynamo are of a type of their own.
    return on_one_device and not (
        torch.compiler.is_dynamo_compiling()
        or _is_transformed()
        or torch._C._is_any_autocast_enabled()
    )


# ---------------------------------------------------------------------------------------- checks


def _numbers(name: str, value: int | tuple[int, ...], rank: int, at_least: int) -> tuple[int, ...]:
    """The value as one number for each dimension."""
    if type(value) is int and value >= at_least:
        return (value,) * rank
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank
    whole = all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in numbers)
    if not whole:
        several = {1: "a tuple of one int", 2: "a pair of ints", 3: "three ints"}[rank]
        raise TypeError(f"{name}: expected an int or {several}, got {value!r}")
    if len(numbers) != rank or any(n < at_least for n in numbers):
        count = {1: "one number", 2: "one or two numbers", 3: "one or three numbers"}[rank]
        raise ValueError(f"{name}: expected {count} of at least {at_least}, got {value!r}")
    return numbers


def _pair(name: str, value: int | tuple[int, int], at_least: int) -> tuple[int, int]:
    return _numbers(name, value, 2, at_least)


def _check_tensors(rank: int, **arguments: Tensor | None) -> None:
    for name, argument in arguments.items():
        optional = name in ("bias", "mask")
        if argument is None and optional:
            continue
        if not isinstance(argument, Tensor):
            expected = "a tensor or None" if optional else "a tensor"
            raise TypeError(f"{name}: expected {expected}, got {type(argument).__name__}")
        dimensions = 1 if name == "bias" else 2 + rank
        if argument.dim() != dimensions:
            plural = "" if dimensions == 1 else "s"
            raise ValueError(
                f"{name}: expected {dimensions} dimension{plural}, got shape "
                f"{tuple(argument.shape)}"
            )


def autocast_is_enabled(device_type: str) -> bool:
    """Whether autocast is in force for a type of device, such as ``"cpu"``."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast does to the features of a convolution: its dtype instead of float32.

    Offsets and modulation are left as they come: coordinates stay in float32.
    """
    device_type = tensors[0].device.type
    if not autocast_is_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    eligible = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if t is not None and t.dtype in eligible else t for t in tensors]


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_types(input, offset, weight, bias, mask) -> None:
    half = input.dtype in (torch.float16, torch.bfloat16)
    expected = {
        "input": (input, FEATURE_DTYPES),
        "offset": (offset, (input.dtype, torch.float32) if half else (input.dtype,)),
        "weight": (weight, (input.dtype,)),
        "bias": (bias, (input.dtype,)),
        "mask": (mask, (input.dtype, torch.float32) if half else (input.dtype,)),
    }
    for name, (tensor, dtypes) in expected.items():
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            beside = "" if name == "input" else f" beside input of {_names((input.dtype,))}"
            raise TypeError(
                f"{name}: expected dtype {_names(dtypes)}{beside}, got {_names((tensor.dtype,))}"
            )
        if tensor.device != input.device:
            raise ValueError(
                f"{name}: expected device {input.device} as input has, got {tensor.device}"
            )


def _listed(names: tuple[str, ...]) -> str:
    """'height and width', for example."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _check_shapes(sides, input, offset, weight, bias, stride, padding, dilation, mask) -> None:
    rank = len(sides)
    batch, channels, *size = input.shape
    out_channels, group_channels, *kernel = weight.shape
    taps = math.prod(kernel)
    if channels < 1:
        raise ValueError(f"input: expected at least one channel, got shape {tuple(input.shape)}")
    if any(length >= LONGEST_SIDE for length in size):
        raise ValueError(
            f"input: expected a {' and a '.join(sides)} below 2**30, got {tuple(size)}"
        )
    if taps < 1 or group_channels < 1 or out_channels < 1:
        raise ValueError(
            f"weight: expected no dimension of size 0, got shape {tuple(weight.shape)}"
        )
    if channels % group_channels != 0:
        raise ValueError(
            f"weight: weight.shape[1] must divide the {channels} channels of input "
            f"(it is channels / groups), got {group_channels}"
        )
    groups = channels // group_channels
    if out_channels % groups != 0:
        raise ValueError(
            f"weight: weight.shape[0], the number of output channels, must be a multiple of the "
            f"{groups} groups (channels of input / weight.shape[1]), got {out_channels}"
        )
    if bias is not None and bias.shape[0] != out_channels:
        raise ValueError(
            f"bias: expected shape ({out_channels},), one for each output channel, "
            f"got {tuple(bias.shape)}"
        )

    out_size = tuple(
        (length + 2 * pad - dil * (taps_along - 1) - 1) // step + 1
        for length, pad, dil, taps_along, step in zip(size, padding, dilation, kernel, stride)
    )
    if any(length >= LONGEST_SIDE for length in out_size):
        raise ValueError(
            f"padding: expected an output with a {' and a '.join(sides)} below 2**30, got "
            f"{out_size} with padding {padding}"
        )
    if any(length < 1 for length in out_size):
        raise ValueError(
            f"input: expected {_listed(sides)} of at least the dilated kernel's, "
            f"{tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel))}, with "
            f"padding {padding} on each side, got {tuple(size)}"
        )
    per_tap = offset.shape[1] // (rank * taps)
    if offset.shape[1] % (rank * taps) != 0 or per_tap < 1 or channels % per_tap != 0:
        raise ValueError(
            f"offset: offset.shape[1] is not valid: expected {rank} · {_product(kernel)} · "
            f"deform_groups, where deform_groups divides the {channels} channels of input "
            f"({rank * taps} for one group), got {offset.shape[1]}"
        )
    expected = {
        "offset": (offset, (batch, offset.shape[1], *out_size)),
        "mask": (mask, (batch, per_tap * taps, *out_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if name == "mask" and tensor.shape[1] != shape[1]:
            raise ValueError(
                f"mask: mask.shape[1] is not valid: expected {shape[1]}, {_product(kernel)} "
                f"for each of the {per_tap} offset groups of offset, got {tensor.shape[1]}"
            )
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: expected shape {shape}, the batch of input and the {_listed(sides)} of "
                f"the output, got {tuple(tensor.shape)}"
            )


def _product(kernel: list[int]) -> str:
    return " · ".join(map(str, kernel))


# ------------------------------------------------------------------- what the compiler must know


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """The layout of what an operator makes after this tensor's, as tensors.h has it."""
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _register_fakes(
    name: str,
    layout_of: Callable[[Tensor], torch.memory_format] = lambda _: torch.contiguous_format,
) -> None:
    """For an operator of this name.

    `layout_of` the input is that of the output, and `layout_of` a tensor that of its gradient.
    """

    def forward(input, offset, weight, bias, stride, padding, dilation, mask, **_):
        return torch.empty(
            (input.shape[0], weight.shape[0], *offset.shape[2:]),
            dtype=input.dtype,
            device=input.device,
            memory_format=layout_of(input),
        )

    def backward(
        grad_output, input, offset, weight, stride, padding, dilation, mask, output_mask, **_
    ):
        def like(tensor: Tensor | None, wanted: bool) -> Tensor:
            if tensor is None or not wanted:
                return (offset if tensor is None else tensor).new_empty(0)
            return torch.empty(
                tensor.shape,
                dtype=tensor.dtype,
                device=tensor.device,
                memory_format=layout_of(tensor),
            )

        return tuple(map(like, (input, offset, weight, mask), output_mask))

    torch.library.register_fake(f"mmdcn::{name}", forward)
    torch.library.register_fake(f"mmdcn::{name}_backward", backward)


_register_fakes("deform_conv2d", _memory_format)

# -------------------------------------------------------------------------------------- autograd


def _register_autograd(name: str, unordered: str | None = None) -> None:
    """For an operator of this name, over any number of dimensions.

    `unordered` names the functions that call one that takes no ``deterministic``.
    """

    def setup_context(ctx, inputs, output, keyword_only_inputs=None) -> None:
        input, offset, weight, _, ctx.stride, ctx.padding, ctx.dilation, mask = inputs
        # Given for an operator that takes options, which are the backward operator's too.
        options = keyword_only_inputs or {}
        ctx.options = {option: value for option, value in options.items() if value}
        ctx.save_for_backward(input, offset, weight, mask)

    def backward(ctx, grad_output):
        input, offset, weight, mask = ctx.saved_tensors
        wants_input, wants_offset, wants_weight, wants_bias, *_, wants_mask = ctx.needs_input_grad
        output_mask = [wants_input, wants_offset, wants_weight, wants_mask]
        options = dict(ctx.options)
        if unordered is None:
            if input.is_cuda and torch.are_deterministic_algorithms_enabled():
                options["deterministic"] = True
        elif input.is_cuda and wants_input:
            alert_not_deterministic(unordered)
        gradients = [None] * 4
        if any(output_mask):
            computed = getattr(torch.ops.mmdcn, f"{name}_backward")(
                grad_output,
                input,
                offset,
                weight,
                ctx.stride,
                ctx.padding,
                ctx.dilation,
                mask,
                output_mask,
                **options,
            )
            gradients = [g if wanted else None for g, wanted in zip(computed, output_mask)]
        grad_input, grad_offset, grad_weight, grad_mask = gradients
        grad_bias = grad_output.sum((0, *range(2, grad_output.dim()))) if wants_bias else None
        return grad_input, grad_offset, grad_weight, grad_bias, None, None, None, grad_mask

    torch.library.register_autograd(f"mmdcn::{name}", backward, setup_context=setup_context)
    torch.library.register_autograd(
        f"mmdcn::{name}_backward", _double_backward, setup_context=_setup_double_context
    )


def _setup_double_context(ctx, inputs, output, **_) -> None:
    *tensors, ctx.stride, ctx.padding, ctx.dilation, mask, ctx.output_mask = inputs
    ctx.save_for_backward(*tensors, mask)


def _double_backward(ctx, *grad_gradients):
    """Second derivatives, by differentiating the reference twice: right, not fast.

    What comes back is differentiable again, for derivatives of any order.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view stops what is differentiated here, and not what may be differentiated later.
        grad_output, input, offset, weight, mask = (
            t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in ctx.saved_tensors
        )
        output = _by_reference(
            input, offset, weight, None, ctx.stride, ctx.padding, ctx.dilation, mask
        )
        wanted = [
            (tensor, grad)
            for tensor, want, grad in zip(
                (input, offset, weight, mask), ctx.output_mask, grad_gradients
            )
            if want and tensor is not None and grad is not None
        ]
        first = torch.autograd.grad(output, [t for t, _ in wanted], grad_output, create_graph=True)
        variables = [t for t in (grad_output, input, offset, weight, mask) if t is not None]
        second = torch.autograd.grad(
            first,
            variables,
            [grad for _, grad in wanted],
            allow_unused=True,
            create_graph=create_graph,
        )
    if mask is None:
        second = (*second, None)
    return *second[:4], None, None, None, second[4], None


_register_autograd("deform_conv2d")

# ------------------------------------------------------------------------- counting of operations


def multiply_adds(weight: torch.Size, output: torch.Size) -> int:
    """Multiplications, each with its addition, of one call with tensors of these shapes.

    Those of equation (2), as for a dense convolution of the same shape. The interpolation, which
    takes four for each sample and channel, is left out, as in the figures that are published.
    """
    batch, out_channels, *size = output
    return batch * out_channels * torch.Size(size).numel() * torch.Size(weight[1:]).numel()


@register_flop_formula([torch.ops.mmdcn.deform_conv2d, torch.ops.mmdcn.deform_conv_nd])
def _flops(input, offset, weight, *_, out_shape, **__) -> int:
    return 2 * multiply_adds(weight, out_shape)


@register_flop_formula(
    [torch.ops.mmdcn.deform_conv2d_backward, torch.ops.mmdcn.deform_conv_nd_backward]
)
def _backward_flops(
    grad_output, input, offset, weight, stride, padding, dilation, mask, output_mask, **__
) -> int:
    # Gradients with respect to the samples, from which those of input, offset and mask follow; and
    # with respect to the weight.
    products = any((output_mask[0], output_mask[1], output_mask[3])) + output_mask[2]
    return 2 * products * multiply_adds(weight, grad_output)
