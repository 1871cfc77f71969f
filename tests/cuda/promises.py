"""What the compiler is promised of the operators' results, and what it gets."""

import torch
from torch import Tensor


def assert_promises_kept(calls: list[tuple[str, list]]) -> None:
    """Results of operators, by name, have the shapes, strides and dtypes of the fake kernels'."""
    for name, values in calls:
        meta = [v.to("meta") if isinstance(v, Tensor) else v for v in values]
        promised = getattr(torch.ops.mmdcn, name)(*meta)
        actual = getattr(torch.ops.mmdcn_host, name)(*values)
        if isinstance(actual, Tensor):
            promised, actual = [promised], [actual]
        for a, p in zip(actual, promised):
            assert (a.shape, a.stride(), a.dtype) == (p.shape, p.stride(), p.dtype), name
