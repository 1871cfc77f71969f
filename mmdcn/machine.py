"""The machine that this runs on, and the versions of what is installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import mmdcn
from mmdcn.ops import _library

if TYPE_CHECKING:
    import onnxruntime

# The packages that may provide each import name.
PACKAGES = {
    "mmengine": ("mmengine", "onedl-mmengine"),
    "mmcv": ("mmcv", "onedl-mmcv"),
    "mmdet": ("mmdet", "onedl-mmdetection"),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "torchvision": ("torchvision",),
}

#: The first onnxruntime that computes ONNX's DeformConv.
ONNXRUNTIME_WITH_DEFORM_CONV = "1.25.0"


def machine(device: torch.device) -> dict:
    """Processor, cores, memory and operating system; the GPU too where `device` is one."""
    cpu = _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    facts = {
        "cpu": cpu,
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": _operating_system(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
    return facts


def versions(*names: str) -> dict[str, str]:
    """The versions of everything that is installed and could matter, or of what is named."""
    found = {
        "mmdcn": mmdcn.__version__,
        "mmdcn CPU kernels": torch.ops.mmdcn.cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch CPU kernels": torch.backends.cpu.get_cpu_capability(),
    }
    if _library.cuda_is_loaded():
        found["mmdcn CUDA library"] = "loaded"
    if torch.version.cuda:
        found |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
    for name, packages in PACKAGES.items():
        for version in installed(packages).values():
            found[name] = version
    return {name: found[name] for name in names if name in found} if names else found


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def onnxruntime_problem() -> str | None:
    """Why the onnxruntime that is installed does not compute ``DeformConv``, or None if it does.

    Raises:
        ImportError: none is installed.
    """
    import onnxruntime

    least, version = ONNXRUNTIME_WITH_DEFORM_CONV, onnxruntime.__version__
    if _release(version) >= _release(least):
        return None
    return (
        f"DeformConv needs onnxruntime {least} or newer, got {version}: "
        f"`pip install 'onnxruntime>={least}'`, under Python 3.11 or newer"
    )


def onnxruntime_session(
    model: str | bytes, threads: int | None = None, **options: object
) -> onnxruntime.InferenceSession:
    """A model in onnxruntime, on the CPU.

    Args:
        model: a file, or what is in one.
        threads: torch's number of them by default.
        options: attributes of ``onnxruntime.SessionOptions``.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads or torch.get_num_threads()
    # Otherwise its idle threads spin, and everybody else's times double.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in options.items():
        setattr(settings, name, value)
    return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def driver() -> str | None:
    """The version of NVIDIA's driver, where nvidia-smi tells."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return answer[0] if answer else None


def cores() -> int:
    """The number of cores that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _field(path: str, name: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _operating_system() -> str:
    try:
        distribution = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform()
    return f"{distribution}, {platform.system()} on {platform.machine()}"
