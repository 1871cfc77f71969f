"""RoI pooling, aggregation, and convolution over any rank, by every instruction set there is."""

import os
import subprocess
import sys

import pytest

CHECK = """
import torch
from tests.ops.aggregate_problems import AggregateProblem, compare_aggregate
from tests.ops.roi_problems import RoIProblem, compare_roi_pool
from tests.ops.nd_problems import LINE, NdProblem, compare_nd
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    compare_roi_pool(RoIProblem(channels=150, deform_groups=2), dtype)
    compare_roi_pool(RoIProblem(channels=7, position_sensitive=True, sampling_ratio=0), dtype)
    compare_aggregate(AggregateProblem(channels=150, group=2), dtype)
    compare_aggregate(AggregateProblem(channels=21, group=3, kernel=(5, 5), spread=9.0), dtype)
    compare_nd(LINE, dtype)
    compare_nd(NdProblem(channels=42, out_channels=35, groups=7, deform_groups=3), dtype)
"""


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(capability):
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "MMDCN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if "this machine has no" in done.stderr:
        pytest.skip(f"no {capability} on this machine")
    assert done.returncode == 0, done.stderr
