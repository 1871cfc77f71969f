"""What all tests share: the oracle's problems, and hypothesis settings that repeat."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent

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


# The files that take longest, which come first: the workers of a test run then end together.
LONGEST = [
    "cuda/test_deform_conv.py",
    "tools/test_train_and_test.py",
    "tools/test_export_onnx.py",
    "test_demo.py",
    "pytorch/test_compile.py",
    "engine/test_export.py",
    "tools/test_distributed.py",
    "ops/test_onnx.py",
    "test_plugin.py",
    "layers/test_contract.py",
    "ops/test_contract.py",
    "test_packaging.py",
]


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        name = item.path.relative_to(TESTS).as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
