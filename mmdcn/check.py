"""The report of ``python -m mmdcn.check``: what is installed, what computes where, and if it does.

Its output belongs in a bug report. The exit status is 1 where something does not work.
"""

import argparse
import platform
from collections.abc import Iterator

from mmdcn.engine import launch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mmdcn.check",
        description="Report what is installed and what computes on each device, and test every "
        "operator there in every dtype. Takes half a minute on a CPU. The exit status is 1 where "
        "something does not work; the output belongs in a bug report.",
    )
    return parser.parse_args()


if __name__ == "__main__":
    launch.begin(parse_args)  # before what follows, which takes seconds

import torch

import mmdcn
from mmdcn import ops, self_test
from mmdcn.errors import InputError, first_line
from mmdcn.machine import driver, installed
from mmdcn.ops import _devices, _library, _products

# Package names of the toolbox and of its maintained fork, and of the peers.
PACKAGES = (
    *("mmengine", "mmcv", "mmdet", "onedl-mmengine", "onedl-mmcv", "onedl-mmdetection"),
    *("torchvision", "numpy"),
)

WHAT_TO_DO = (
    "What to do: where a test is WRONG or FAILED, trust no result of that operator with that dtype "
    "on that device, and use one with which it is ok. Compile mmdcn on this machine, for this "
    f"torch ({_library.REBUILD}), and run this check again; if the test still fails, report it "
    "with all of this output. Further tests on a device that is LOST mean nothing: run them again "
    "with CUDA_LAUNCH_BLOCKING=1, which shows where it happened."
)


def _versions() -> dict[str, str]:
    own = {
        "mmdcn": f"{mmdcn.__version__} in {_library.FOLDER}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}",
    }
    return own | installed(PACKAGES)


def _libraries() -> dict[str, str]:
    try:
        capability = torch.ops.mmdcn.cpu_capability()
    except RuntimeError as error:  # of the environment variable that names one
        raise InputError(first_line(error)) from error
    if _library.cuda_is_loaded():
        cuda = "loaded"
    elif _library.CUDA_PROBLEM is not None:
        cuda = f"built; does not load: {_library.CUDA_PROBLEM}"
    elif _library.CUDA_LIBRARY.is_file():
        cuda = "built; not loaded, as this torch is not built for CUDA"
    else:
        cuda = "not built (no nvcc when mmdcn was compiled, or MMDCN_WITH_CUDA=0)"
    return {
        "CPU library": f"loaded, {capability} kernels, {torch.get_num_threads()} threads",
        "CUDA library": cuda,
    }


def devices() -> list[torch.device]:
    """The CPU, and every device of the accelerator that torch has."""
    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        count = torch.accelerator.device_count()
        found += [torch.device(accelerator.type, index) for index in range(count)]
    return found


def description(device: torch.device) -> str:
    """What the device is; of a GPU, its compute capability and its driver."""
    if device.type != "cuda":
        return platform.processor() or platform.machine() if device.type == "cpu" else device.type
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, "
        f"driver {driver() or 'unknown'} (up to CUDA {_devices.driver_cuda()})"
    )


def check(device: torch.device) -> bool:
    """Print what the device is, what computes on it and why, and test it; whether all is right."""
    right = True
    print(f"\n{device}: {description(device)}")
    try:
        service = _devices.service(device)
        print(f"{_devices.describe(device, service)}.")
        if device.type == "cuda" and service.kernels:
            print(f"Products of convolutions there: {_products.describe(device)}.")
    except RuntimeError as problem:
        right = False
        print(f"FAILED to find out what computes there: {_devices.first_line(problem)}")
    for name in ops.__all__:
        results = []
        for passed, result in _results(name, device):
            right &= passed
            results.append(result)
        print(f"{device} {name}: {', '.join(results)}")
        if _is_lost(device):
            print(f"{device} is LOST to this process.")
            return False
    return right


def _results(name: str, device: torch.device) -> Iterator[tuple[bool, str]]:
    """Whether the operator passes the self-test in each dtype, and what to print of it."""
    for dtype, tolerance in self_test.TOLERANCE.items():
        if device.type == "mps" and dtype == torch.float64:
            continue  # which it does not have
        label = str(dtype).removeprefix("torch.")
        try:
            error = self_test.largest_error(name, device, dtype)
        except Exception as problem:  # Whatever it is, the other tests are to be seen too.
            yield False, f"{label} FAILED ({type(problem).__name__}: {problem})"
            continue
        passed = error <= tolerance  # not of NaN
        yield passed, f"{label} {'ok' if passed else 'WRONG'} ({error:.0e})"


def _is_lost(device: torch.device) -> bool:
    """Whether nothing runs on the device any more, as after an illegal access of its memory."""
    try:
        return torch.zeros(1, device=device).add(1).item() != 1
    except RuntimeError:
        return True


def main() -> int:
    for name, value in {**_versions(), **_libraries()}.items():
        print(f"{name:18} {value}")
    print(
        "\nEvery operator, forward and backward, against the reference in float64: the largest "
        "error of output and gradients, relative to the largest element"
    )
    failed = False
    for device in devices():
        failed |= not check(device)
    print(f"\n{WHAT_TO_DO}\n" if failed else "")
    plugin = getattr(mmdcn, "plugin", None)
    print(plugin.report() if plugin else "The toolbox (mmengine and mmcv) is not installed.")
    return int(failed)


if __name__ == "__main__":
    launch.run(lambda args: main(), parse_args)
