"""What all tests share: hypothesis settings that repeat, the order of files, and a compiler."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-Werror"]

# Two threads make the threaded paths run, on any machine.
torch.set_num_threads(int(os.environ.get("MMDCN_TEST_THREADS", 2)))

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
    "tools/test_export_onnx.py",
    "tools/test_train_and_test.py",
    "deploy/test_detector.py",
    "test_demo.py",
    "pytorch/test_compile.py",
    "engine/test_export.py",
    "tools/test_distributed.py",
    "tools/test_killed_training.py",
    "tools/test_same_seed.py",
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


@pytest.fixture(scope="session")
def compile_host(tmp_path_factory) -> Callable:
    """``compile_host(source, name, *flags)``: the path of what is compiled from the source.

    It is compiled once for all processes of a test run.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def build(source: Path, name: str, *flags: str) -> Path:
        target = folder / name
        with FileLock(f"{target}.lock"):
            if not target.is_file():
                _compile(source, target, *flags)
        return target

    return build


def _compile(source: Path, target: Path, *flags: str) -> None:
    unfinished = target.with_suffix(".unfinished")
    cxx = os.environ.get("CXX", "g++").split()
    command = [*cxx, "-std=c++17", *WARNINGS, str(source), "-o", str(unfinished), *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    unfinished.rename(target)


@pytest.fixture
def plugin_in_mmdet():
    """The plugin is installed, before and after, and names are looked up in mmdet's scope."""
    from mmengine.registry import DefaultScope

    from mmdcn import plugin

    plugin.install()
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield
    plugin.install()
