"""mmcv's kernels for our operators: what computes on a device that our kernels do not serve.

mmcv may have been compiled for a GPU for which ours were not. :mod:`mmdcn.ops` imports nothing of
mmcv's, so :mod:`mmdcn.plugin` hands over mmcv's own functions, which it takes away otherwise.

Everything is computed in the dtype of the offsets, float32 beside half-precision features: mmcv's
kernels compute coordinates in the dtype of the features, which is too coarse for them. What mmcv
has wrong stays wrong there: gradients are differentiable once, and offsets that are not finite give
gradients that are not.
"""

from collections.abc import Callable

from torch import Tensor

from mmdcn.ops import _devices

_LARGEST_STEP = 32  # images at a time, mmcv's own default


def offer(
    deform_conv2d: Callable[..., Tensor],
    modulated_deform_conv2d: Callable[..., Tensor],
    deform_roi_pool: Callable[..., Tensor],
) -> None:
    """Hand mmcv's functions of these names over to our operators."""

    def convolve(input, offset, weight, bias, stride, padding, dilation, mask) -> Tensor | None:
        if not input.numel() or not offset.numel():
            return None
        if mask is None and _is_smaller(input, weight):
            return None
        groups = input.shape[1] // weight.shape[1]
        deform_groups = offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])
        features, points, kernel = (t.contiguous() for t in (input, offset, weight))
        geometry = (stride, padding, dilation, groups, deform_groups)
        if mask is not None:
            output = modulated_deform_conv2d(
                features, points, mask.contiguous(), kernel, bias, *geometry
            )
            return output.to(input.dtype)
        step = _largest_divisor(input.shape[0])
        output = deform_conv2d(features, points, kernel, *geometry, False, step)
        if bias is not None:
            output = output + bias.view(-1, 1, 1)
        return output.to(input.dtype)

    def pool(
        input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, position_sensitive
    ) -> Tensor | None:
        if position_sensitive or not input.numel() or not rois.numel():
            return None
        if offset is not None and offset.shape[1] != 2:
            return None
        output = deform_roi_pool(
            input.to(rois.dtype).contiguous(),
            rois.contiguous(),
            None if offset is None else offset.contiguous(),
            output_size,
            spatial_scale,
            sampling_ratio,
            gamma,
        )
        return output.to(input.dtype)

    _devices.offer("deform_conv2d", convolve)
    _devices.offer("deform_roi_pool", pool)


def _is_smaller(input: Tensor, weight: Tensor) -> bool:
    """Whether the kernel does not fit into the image, which mmcv's v1 refuses, padded or not."""
    return input.shape[2] < weight.shape[2] or input.shape[3] < weight.shape[3]


def _largest_divisor(batch: int) -> int:
    """The most images at a time that mmcv's v1 takes: it wants a divisor of the batch."""
    return max(step for step in range(1, _LARGEST_STEP + 1) if batch % step == 0)
