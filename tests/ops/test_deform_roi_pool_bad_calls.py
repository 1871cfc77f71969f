"""Bad calls of the deformable RoI pooling: errors that name the argument."""

import re

import pytest
import torch

from mmdcn.ops import deform_roi_pool
from tests.ops.roi_problems import RoIProblem

# What is changed in a good call, and what the error must name.
BAD_CALLS = {
    "input of 3 dimensions": ({"input": torch.zeros(4, 9, 11)}, ValueError, r"input.*\(4, 9, 11\)"),
    "input of integers": (
        {"input": torch.zeros(2, 4, 9, 11, dtype=torch.int64)},
        TypeError,
        "input.*float32.*int64",
    ),
    "input without channels": ({"input": torch.zeros(2, 0, 9, 11)}, ValueError, "input.*channel"),
    "input too high": (
        {"input": torch.zeros(2, 4, 1, 11).expand(-1, -1, 2**30, -1)},
        ValueError,
        r"input.*2\*\*30.*\(1073741824, 11\)",
    ),
    "rois missing": ({"rois": None}, TypeError, "rois.*NoneType"),
    "rois of 4 columns": ({"rois": torch.zeros(5, 4)}, ValueError, r"rois.*5 columns.*\(5, 4\)"),
    "rois of another dtype": (
        {"rois": torch.zeros(5, 5).half()},
        TypeError,
        "rois.*float32.*float16",
    ),
    "rois without images": (
        {"input": torch.zeros(0, 4, 9, 11)},
        ValueError,
        "^rois: expected none, as input has no images, got 5",
    ),
    "rois elsewhere": (
        {"rois": torch.zeros(5, 5, device="meta")},
        ValueError,
        "rois.*cpu.*meta",
    ),
    "offset is no tensor": ({"offset": 0.0}, TypeError, "offset.*tensor or None.*float"),
    "offset of 3 channels": (
        {"offset": torch.zeros(5, 3, 2, 4)},
        ValueError,
        "offset.*2 · deform_groups.*got 3",
    ),
    "offset groups that do not divide": (
        {"offset": torch.zeros(5, 6, 2, 4)},
        ValueError,
        "offset.*4 channels.*got 6",
    ),
    "offset of other rois": (
        {"offset": torch.zeros(4, 2, 2, 4)},
        ValueError,
        r"offset.*\(5, 2, 2, 4\).*\(4, 2, 2, 4\)",
    ),
    "offset of other bins": ({"offset": torch.zeros(5, 2, 4, 2)}, ValueError, "offset.*shape"),
    "offset of another dtype": (
        {"offset": torch.zeros(5, 2, 2, 4).double()},
        TypeError,
        "offset.*float32.*float64",
    ),
    "no bins": ({"output_size": (0, 4)}, ValueError, r"output_size.*at least 1.*\(0, 4\)"),
    "too many bins": ({"output_size": 2**30}, ValueError, r"output_size.*2\*\*30"),
    "bins of a fraction": ({"output_size": 3.5}, TypeError, "output_size.*int.*3.5"),
    "scale of zero": ({"spatial_scale": 0.0}, ValueError, "spatial_scale.*positive.*0.0"),
    "scale by name": ({"spatial_scale": "1/4"}, TypeError, "spatial_scale.*number.*'1/4'"),
    "gamma of infinity": ({"gamma": float("inf")}, ValueError, "gamma.*finite.*inf"),
    "ratio of a fraction": ({"sampling_ratio": 1.5}, TypeError, "sampling_ratio.*int.*1.5"),
    "ratio too large": ({"sampling_ratio": 2**30}, ValueError, "sampling_ratio.*at most"),
    "channels that bins do not divide": (
        {"position_sensitive": True},
        ValueError,
        "input.*multiple of 8 channels.*got 4",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_names_argument_expectation_and_value(case):
    problem = RoIProblem()
    tensors = {n: t.detach() for n, t in problem.tensors(torch.float32).items()}
    arguments = {**tensors, **problem.arguments()}
    changed, error, pattern = BAD_CALLS[case]
    deform_roi_pool(**arguments)
    with pytest.raises(error, match=re.compile(pattern, re.DOTALL)):
        deform_roi_pool(**{**arguments, **changed})
