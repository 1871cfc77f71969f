"""How many instructions the kernels execute, read off machine code that nvcc 13.0 made for sm_90.

A count is the number of instructions on the way through one round of a loop, as
:mod:`tests.cuda.machine_code` finds it. It is the way of a sample whose corners all exist, in a
convolution of one group, whose tensors have fewer than 2^31 elements.
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
    "float32": Gather(block=123, locate=441, sample=22, vector=76),
    "float16": Gather(block=124, locate=441, sample=21, vector=133),
    "bfloat16": Gather(block=124, locate=441, sample=21, vector=149),
}
SCATTER = {
    "float32": Scatter(block=144, locate=461, sample=45, vector=144, shuffle=16, finish=65),
    "float16": Scatter(block=144, locate=453, sample=42, vector=160, shuffle=16, finish=65),
    "bfloat16": Scatter(block=144, locate=453, sample=42, vector=170, shuffle=16, finish=65),
}
#: For each 16 bytes to which a bias is added, and for each element of a sum over chunks.
ADD_BIAS = {"float32": 73, "float16": 88, "bfloat16": 90}
ACCUMULATE = 17
