"""How many instructions the kernels execute, read off machine code that nvcc 13.0 made for sm_90.

A count is the number of instructions on the way through one round of a loop, as
`tests/cuda/machine_code.py` finds it; `tests/cuda/test_machine_code.py` compares ours with the code
that is built. It is the way of a sample whose corners all exist, in a convolution of one group,
whose tensors have fewer than 2^32 elements.
"""

from dataclasses import dataclass

#: The compiler whose code was counted.
COMPILER = "13.0"


@dataclass(frozen=True)
class Gather:
    """Of a thread of the kernel that gathers columns."""

    block: int  # once in a block's work on its samples
    locate: int  # for each sample that the thread locates
    sample: int  # for each sample whose channels it works on, beside
    vector: int  # for each vector of 16 bytes of them


@dataclass(frozen=True)
class Scatter:
    """Of a thread of the kernel that scatters gradients, likewise."""

    block: int
    locate: int
    sample: int
    vector: int  # of four channels
    shuffle: int  # for each exchange of the four dots between lanes
    finish: int  # for the gradients of offset and mask of one sample


GATHER = {
    "float32": Gather(block=127, locate=518, sample=20, vector=74),
    "float16": Gather(block=121, locate=522, sample=19, vector=131),
    "bfloat16": Gather(block=121, locate=522, sample=19, vector=147),
}
SCATTER = {
    "float32": Scatter(block=177, locate=559, sample=42, vector=144, shuffle=16, finish=172),
    "float16": Scatter(block=177, locate=556, sample=39, vector=160, shuffle=16, finish=173),
    "bfloat16": Scatter(block=177, locate=556, sample=39, vector=170, shuffle=16, finish=173),
}
#: For each 16 bytes to which a bias is added, and for each element of a sum over chunks.
ADD_BIAS = {"float32": 73, "float16": 88, "bfloat16": 90}
ACCUMULATE = 17


@dataclass(frozen=True)
class Torchvision:
    """Of a thread of torchvision's kernels, each on one channel.

    Counted in the same way, from `torchvision/csrc/ops/cuda/deform_conv2d_kernel.cu` of
    pytorch/vision (commit 0d7913d), compiled alone by the same compiler.
    """

    im2col_pixel: int  # deformable_im2col_kernel, once for a pixel and channel
    im2col_row: int  # for each row of the kernel
    im2col_tap: int  # and for each tap
    coordinates_once: int  # deformable_col2im_coord_kernel, once for a coordinate of an offset
    coordinates_y: int  # for each channel, where the coordinate is y, with the mask's gradient
    coordinates_x: int  # and where it is x
    col2im: int  # deformable_col2im_kernel, for a pixel, channel and tap


TORCHVISION = {
    "float32": Torchvision(
        im2col_pixel=243,
        im2col_row=33,
        im2col_tap=65,
        coordinates_once=269,
        coordinates_y=259,
        coordinates_x=218,
        col2im=476,
    ),
    "float16": Torchvision(
        im2col_pixel=242,
        im2col_row=33,
        im2col_tap=112,
        coordinates_once=263,
        coordinates_y=343,
        coordinates_x=255,
        col2im=645,
    ),
}
