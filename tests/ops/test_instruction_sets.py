"""Every operator by every instruction set there is."""

import os
import subprocess

import pytest

from tests.instruction_sets import CAPABILITIES
from tests.programs import REPOSITORY, Program

CHECK = """
import dataclasses
from tests.ops.aggregate_problems import AggregateProblem
from tests.ops.problems import DTYPES, LINE, VOLUME, Problem, compare
from tests.ops.roi_problems import RoIProblem
grouped = dataclasses.replace(VOLUME, channels=42, out_channels=35, groups=7, deform_groups=3)
for dtype in DTYPES:
    compare(Problem(1, 130, (9, 11), 70, (3, 3), deform_groups=2), dtype)
    compare(Problem(2, 12, (7, 8), 6, groups=2, deform_groups=12), dtype)
    compare(Problem(1, 70, (20, 21), 5, deform_groups=35), dtype)
    compare(Problem(1, 68, (9, 11), 68, groups=17), dtype)
    compare(Problem(2, 64, (9, 25), 96, groups=2, weight_channels_last=True), dtype)
    for layout in (False, True):
        compare(Problem(1, 37, (70, 9), 5, channels_last=layout, spread=15.0), dtype)
        compare(Problem(1, 37, (40, 9), 37, groups=37, channels_last=layout, spread=15.0), dtype)
    compare(
        Problem(1, 15, (9, 8), 6, deform_groups=3, points_channels_last=True,
                weight_channels_last=True), dtype)
    compare(LINE, dtype)
    compare(grouped, dtype)
    compare(AggregateProblem(channels=150, group=2), dtype)
    compare(AggregateProblem(channels=21, group=3, kernel=(5, 5), spread=9.0), dtype)
    compare(RoIProblem(channels=150, deform_groups=2), dtype)
    compare(RoIProblem(channels=7, position_sensitive=True, sampling_ratio=0), dtype)
"""


def check(capability: str) -> subprocess.CompletedProcess:
    environment = {"MMDCN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "2"}
    return Program(["-c", CHECK], REPOSITORY, os.environ | environment).finish()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability):
    done = check(capability)
    if "this machine has no" in done.stdout:
        pytest.skip(f"no {capability} on this machine")
    assert done.returncode == 0, done.stdout


def test_unknown_instruction_set_is_refused():
    done = check("avx1024")
    assert done.returncode != 0
    *others, last = CAPABILITIES
    message = f"MMDCN_CPU_CAPABILITY: expected {', '.join(others)} or {last}, got avx1024"
    assert f"RuntimeError: {message}" in done.stdout.splitlines()
