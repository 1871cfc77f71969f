"""What CUDA alone has of torch's operators, by what the CPU has."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F


@contextlib.contextmanager
def stand_ins(wrong: str = "", refused: str = "") -> Iterator[list[tuple]]:
    """The CPU's kernels for cuDNN's convolutions and for products in float32 of half types.

    Args:
        wrong: the call that computes something else.
        refused: the call that fails.

    Yields:
        A list that grows by each call: its name, then its flags.
    """
    made = []

    def cudnn_convolution(
        self, weight, padding, stride, dilation, groups, benchmark, deterministic, tf32, *, out
    ):
        assert (padding, stride, dilation) == ([0, 0], [1, 1], [1, 1])
        assert not benchmark
        for tensor in (self, weight, out):  # or torch would copy it first
            assert tensor.is_contiguous(memory_format=torch.channels_last)
        made.append(("cudnn", tf32, deterministic))
        if refused == "cudnn":
            raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")
        return out.copy_(F.conv2d(self, weight, groups=groups) * (2 if wrong == "cudnn" else 1))

    def bmm_to_float(self, mat2, dtype, *, out):
        assert dtype == out.dtype == torch.float32
        assert self.dtype == mat2.dtype in (torch.float16, torch.bfloat16)
        made.append(("matmul_to_float",))
        if refused == "matmul_to_float":
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        scale = 2 if wrong == "matmul_to_float" else 1
        return out.copy_(self.float() @ mat2.float() * scale)

    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("cudnn_convolution.out", cudnn_convolution, "CPU")
        library.impl("bmm.dtype_out", bmm_to_float, "CPU")
        yield made
    finally:
        library._destroy()
