"""The steps of torchvision's operator on paper.

They are those of `torchvision/csrc/ops/cuda/deform_conv2d_kernel.cu` (pytorch/vision, commit
0d7913d) for batches of at most 32 images: one thread for each channel and pixel writes the columns
of the whole batch to memory, `addmm` multiplies them, and the backward pass adds single elements.
What its threads read again is assumed to come from the first-level cache, always. It has no kernels
for bfloat16: it is counted as if those were as fast as its float16 ones.
"""

from . import counts
from .device import Device, Step
from .problem import WARP, Problem, distinct_sectors, moving, product_time

_ROWS = 3  # of the kernel
_BYTES = 32  # of a sector


def _count(problem: Problem) -> counts.Torchvision:
    return counts.TORCHVISION["float32" if problem.dtype == "float32" else "float16"]


def forward(device: Device, problem: Problem) -> list[Step]:
    """The forward pass, with a bias."""
    element, columns = problem.element, problem.element * problem.columns
    output = element * problem.output
    pixels = problem.batch * problem.pixels
    product = product_time(device, problem.arithmetic, pixels, problem.out_channels, problem.row)
    return [
        moving(device, "zeros", columns, columns),
        moving(device, "zeros", output, 2 * output, launches=2),
        _im2col(device, problem),
        moving(device, "product", columns, columns + 2 * output, busy=product),
        moving(device, "copies", output, 2 * output),
        moving(device, "bias", output, 2 * output),
    ]


def backward(device: Device, problem: Problem) -> list[Step]:
    """The backward pass, all gradients but that of the bias."""
    element, columns = problem.element, problem.element * problem.columns
    output, pixels = element * problem.output, problem.batch * problem.pixels
    to_columns = product_time(device, problem.arithmetic, problem.row, pixels, problem.out_channels)
    to_weight = product_time(device, problem.arithmetic, problem.out_channels, problem.row, pixels)
    gradients = element * (problem.input + 3 * problem.samples)
    return [
        moving(device, "zeros", gradients, gradients, launches=3),
        moving(device, "zeros", columns, columns),
        # addmm adds to the zeros.
        moving(device, "products", columns, 2 * columns + output, busy=to_columns),
        _coordinates(device, problem),
        _col2im(device, problem),
        moving(device, "copies", output, 2 * output),
        _im2col(device, problem),
        moving(device, "products", columns, columns + output, busy=to_weight),
    ]


def _im2col(device: Device, problem: Problem) -> Step:
    count = _count(problem)
    per_thread = count.im2col_pixel + _ROWS * count.im2col_row + problem.taps * count.im2col_tap
    threads = problem.batch * problem.pixels * problem.channels
    columns = problem.element * problem.columns
    # Four corners that lie where they lie; offset, mask and column side by side.
    corners = 4 * distinct_sectors(problem.element) * _BYTES * problem.columns / WARP
    return moving(
        device,
        "im2col",
        columns,
        columns + problem.element * problem.input,
        instructions=threads * per_thread / WARP,
        l1=corners + 4 * columns,
    )


def _coordinates(device: Device, problem: Problem) -> Step:
    """Of the offsets and the mask: a thread for y, and one for x, goes through all channels."""
    count = _count(problem)
    threads = 2 * problem.samples
    per_channel = count.coordinates_y + count.coordinates_x
    columns = problem.element * problem.columns
    # The mask's gradient samples anew.
    corners = (4 + 8) * distinct_sectors(problem.element) * _BYTES * problem.columns / WARP
    return moving(
        device,
        "offsets",
        columns,
        2 * columns,
        instructions=(problem.columns * per_channel + threads * count.coordinates_once) / WARP,
        l1=corners + 8 * columns,
    )


def _col2im(device: Device, problem: Problem) -> Step:
    count = _count(problem)
    columns = problem.element * problem.columns
    sectors = 4 * distinct_sectors(problem.element) * problem.columns / WARP
    if problem.dtype != "float32":
        # An addition of a half is a loop that loads a word and exchanges it.
        sectors *= 2
    return moving(
        device,
        "col2im",
        columns,
        columns,
        instructions=problem.columns * count.col2im / WARP,
        l1=sectors * _BYTES + 4 * columns,
        sectors=sectors,
    )
