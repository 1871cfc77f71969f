"""Small calls of the operators, and the settings that they are made in."""

import contextlib
import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mmdcn.self_test import TOLERANCE, Call

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
OPERATORS = (
    "deform_conv1d",
    "deform_conv2d",
    "deform_conv3d",
    "dcnv3",
    "dcnv4",
    "deform_roi_pool",
)
_CONVOLUTIONS = OPERATORS[:3]

# Sums in fixed point have fewer bits than in float64.
FIXED_POINT_TOLERANCE = 1e-10


# -------------------------------------------------------------------------------------- the calls


def small(operator: str, channels: int, groups: int = 2) -> Call:
    """A call with so many channels in each of its groups of weights and of offsets."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if operator in _CONVOLUTIONS:
        # A bias is added to vectors of pixels where these divide an image, as they do the second.
        size = ((11,), (8, 6), (3, 5, 4))[_CONVOLUTIONS.index(operator)]
        return _convolution(operator, normal, 2, size, channels, groups, groups, channels, 3)
    if operator in ("dcnv3", "dcnv4"):
        return _aggregation(operator, normal, (7, 6), channels, groups)
    return _roi_pooling(normal, channels, groups)


def drawn(operator: str, seed: int) -> Call:
    """A random call, always the same for a seed."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    groups, channels = draw.choice([1, 1, 2, 4]), draw.choice([1, 3, 8, 16, 40, 64, 70])
    if operator in _CONVOLUTIONS:
        rank = 1 + _CONVOLUTIONS.index(operator)
        size = tuple(draw.randint(3, 7 if rank == 3 else 15) for _ in range(rank))
        kernel = draw.randint(1, 3)
        deform_groups = draw.choice([1, groups, groups * channels])
        out_channels = draw.choice([1, 8, 33, 70])
        return _convolution(
            operator, normal, draw.randint(1, 3), size, channels, groups, deform_groups,
            out_channels, kernel, draw.choice([0.3, 2.0, 20.0]), draw.randint(1, 2),
        )  # fmt: skip
    if operator in ("dcnv3", "dcnv4"):
        size = draw.randint(3, 20), draw.randint(3, 20)
        return _aggregation(operator, normal, size, channels, groups)
    return _roi_pooling(normal, channels, groups)


def _eighths(values: Tensor) -> Tensor:
    """Multiples of 1/8: no dtype moves a sample across a pixel's border."""
    return ((values * 8).round() / 8).clamp(-30, 30)


def _convolution(
    operator: str,
    normal: Callable[..., Tensor],
    batch: int,
    size: tuple[int, ...],
    channels: int,
    groups: int,
    deform_groups: int,
    out_channels: int,
    kernel: int,
    spread: float = 2.0,
    stride: int = 1,
) -> Call:
    """`channels` and `out_channels` are of each group."""
    rank = len(size)
    padding, samples = kernel // 2, deform_groups * kernel**rank
    out = [(n + 2 * padding - kernel) // stride + 1 for n in size]
    tensors = {
        "input": normal(batch, groups * channels, *size),
        "offset": _eighths(spread * normal(batch, rank * samples, *out)),
        "weight": normal(groups * out_channels, channels, *[kernel] * rank)
        / (channels * kernel**rank) ** 0.5,
        "bias": normal(groups * out_channels),
        "mask": normal(batch, samples, *out).sigmoid(),
    }
    return Call(tensors, {"padding": padding, "stride": stride})


def _aggregation(
    operator: str, normal: Callable[..., Tensor], size: tuple[int, int], channels: int, groups: int
) -> Call:
    taps = 9
    input = normal(2, *size, groups * channels)
    offset = _eighths(2 * normal(2, *size, groups, 2 * taps))
    mask = normal(2, *size, groups, taps)
    arguments = {"kernel_size": 3, "padding": 1, "group": groups}
    if operator == "dcnv3":
        tensors = {"input": input, "offset": offset.flatten(3), "mask": mask.flatten(3)}
    else:
        tensors = {"input": input, "offset_mask": torch.cat([offset, mask], dim=-1).flatten(3)}
    return Call(tensors, arguments)


def _roi_pooling(normal: Callable[..., Tensor], channels: int, groups: int) -> Call:
    rois = torch.tensor(
        [[0, 1.25, 2.25, 12.5, 9.75], [1, 3.0, 0.5, 8.25, 13.25], [1, -2.0, 4.0, 6.0, 40.0]],
        dtype=torch.float64,
    )
    tensors = {
        "input": normal(2, groups * channels, 9, 11),
        "rois": rois,
        "offset": _eighths(normal(3, 2 * groups, 2, 4)),
    }
    arguments = {"output_size": (2, 4), "spatial_scale": 0.5, "sampling_ratio": 2, "gamma": 0.125}
    return Call(tensors, arguments, constant=("rois",))


# ------------------------------------------------------------------------------------- settings


@contextlib.contextmanager
def float32_in(arithmetic: str) -> Iterator[None]:
    """Have everybody multiply float32 alike: in ``'tf32'``, or as it is.

    It is a setting of convolutions and one of products of matrices: cuDNN and we follow the one,
    torchvision's operator the other. In ``'float32_beside_tf32'`` they differ.
    """
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [each.fp32_precision for each in settings]
    try:
        for each, in_tf32 in zip(settings, (("tf32",), ("tf32", "float32_beside_tf32"))):
            each.fp32_precision = "tf32" if arithmetic in in_tf32 else "ieee"
        yield
    finally:
        for each, value in zip(settings, before):
            each.fp32_precision = value


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
