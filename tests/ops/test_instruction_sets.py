"""RoI pooling, aggregation, and convolution over any rank, by every instruction set there is."""

import os
import subprocess
import sys

import pytest

CHECK = """
import dataclasses
from tests.ops.aggregate_problems import AggregateProblem
from tests.ops.problems import DTYPES, LINE, VOLUME, compare
from tests.ops.roi_problems import RoIProblem
grouped = dataclasses.replace(VOLUME, channels=42, out_channels=35, groups=7, deform_groups=3)
for dtype in DTYPES:
    compare(RoIProblem(channels=150, deform_groups=2), dtype)
    compare(RoIProblem(channels=7, position_sensitive=True, sampling_ratio=0), dtype)
    compare(AggregateProblem(channels=150, group=2), dtype)
    compare(AggregateProblem(channels=21, group=3, kernel=(5, 5), spread=9.0), dtype)
    compare(LINE, dtype)
    compare(grouped, dtype)
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
