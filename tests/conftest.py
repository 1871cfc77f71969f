"""What all tests share: the oracle's problems, and hypothesis settings that repeat."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Two threads make the threaded paths run, on any machine.
torch.set_num_threads(2)

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("MMDCN_EXAMPLES", 60)),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
