"""Deformable convolution by the CUDA source, run on the host, as ``mmdcn.ops`` would call it."""

import torch
from torch import Tensor

from mmdcn.ops import _products
from tests.ops.problems import wide

# What torch's settings are in tests that say nothing else.
EXACT = _products.Settings(tf32=False, matmul_tf32=False, cudnn=True, deterministic=False)

# Bytes of columns, and of copies, at a time: single pixels, pieces of images, images, all.
MEMORY = [(1, 1), (1000, 1), (3000, 3000), (20_000, 6000), (10**8, 10**8)]


class HostDeformConv(torch.autograd.Function):
    """What ``mmdcn.ops`` does around the operators, around the host's build of them."""

    @staticmethod
    def forward(ctx, input, offset, weight, bias, mask, geometry, options, deterministic):
        name = "deform_conv2d" if input.dim() == 4 else "deform_conv_nd"
        ctx.operator = getattr(torch.ops.mmdcn_host, f"{name}_backward")
        offset, mask = (None if t is None else t.to(wide(input.dtype)) for t in (offset, mask))
        ctx.geometry, ctx.options, ctx.deterministic = geometry, options, deterministic
        ctx.save_for_backward(input, offset, weight, mask)
        operator = getattr(torch.ops.mmdcn_host, name)
        return operator(input, offset, weight, bias, *geometry, mask, **options)

    @staticmethod
    def backward(ctx, grad_output):
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
        *tensors, mask = ctx.saved_tensors
        options = {**ctx.options, "deterministic": ctx.deterministic}
        gradients = ctx.operator(grad_output, *tensors, *ctx.geometry, mask, wanted, **options)
        gradients = [g if want else None for g, want in zip(gradients, wanted)]
        grad_bias = (
            grad_output.transpose(0, 1).flatten(1).sum(1) if ctx.needs_input_grad[3] else None
        )
        return *gradients[:3], grad_bias, gradients[3], None, None, None


def host_deform_conv(
    input,
    offset,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    mask=None,
    deterministic=False,
    **options,
) -> Tensor:
    rank = input.dim() - 2
    geometry = [
        [number] * rank if isinstance(number, int) else list(number)
        for number in (stride, padding, dilation)
    ]
    arguments = (input, offset, weight, bias, mask, geometry, options, deterministic)
    return HostDeformConv.apply(*arguments)
