"""Counts which kernels run: ours, by what reaches the dispatcher, and mmcv's, by its library."""

from collections import Counter
from contextlib import AbstractContextManager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket] += 1
        return function(*args, **(kwargs or {}))


class KernelCalls(AbstractContextManager):
    """``with KernelCalls() as calls: ...``, then read `forward`, `backward` and `mmcv`.

    The first two are of convolution; `roi_pool_forward` and `roi_pool_backward` of RoI pooling.
    """

    MMCV_FUNCTIONS = (
        "deform_conv_forward",
        "deform_conv_backward_input",
        "deform_conv_backward_parameters",
        "modulated_deform_conv_forward",
        "modulated_deform_conv_backward",
        "deform_roi_pool_forward",
        "deform_roi_pool_backward",
    )

    def __enter__(self) -> "KernelCalls":
        from mmcv import _ext

        self._operators = _CountOperators()
        self._ext = _ext
        self._originals = {name: getattr(_ext, name) for name in self.MMCV_FUNCTIONS}
        self.mmcv = 0
        for name, original in self._originals.items():
            setattr(_ext, name, self._counted(original))
        self._operators.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._operators.__exit__(*exception)
        for name, original in self._originals.items():
            setattr(self._ext, name, original)

    def _counted(self, original):
        def call(*args, **kwargs):
            self.mmcv += 1
            return original(*args, **kwargs)

        return call

    @property
    def forward(self) -> int:
        return self._operators.calls[torch.ops.mmdcn.deform_conv2d]

    @property
    def backward(self) -> int:
        return self._operators.calls[torch.ops.mmdcn.deform_conv2d_backward]

    @property
    def roi_pool_forward(self) -> int:
        return self._operators.calls[torch.ops.mmdcn.deform_roi_pool]

    @property
    def roi_pool_backward(self) -> int:
        return self._operators.calls[torch.ops.mmdcn.deform_roi_pool_backward]
