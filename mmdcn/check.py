"""The report of ``python -m mmdcn.check``: what is installed and loaded, and if it computes.

Its output belongs in a bug report. The exit status is 1 where something does not work.
"""

import platform
import sys

import torch

import mmdcn
from mmdcn.machine import installed
from mmdcn.ops import _library, deform_conv2d, reference

# Package names of the toolbox and of its maintained fork, and of the peers.
PACKAGES = (
    *("mmengine", "mmcv", "mmdet", "onedl-mmengine", "onedl-mmcv", "onedl-mmdetection"),
    *("torchvision", "numpy"),
)


def _versions() -> dict[str, str]:
    own = {
        "mmdcn": f"{mmdcn.__version__} in {_library.FOLDER}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}",
    }
    return own | installed(PACKAGES)


def _libraries() -> dict[str, str]:
    if _library.cuda_is_loaded():
        cuda = f"loaded, {torch.ops.mmdcn.cuda_kernels()} kernels"
    elif _library.CUDA_LIBRARY.is_file():
        cuda = "built; not loaded, as torch sees no GPU"
    else:
        cuda = "not built (no nvcc when mmdcn was compiled, or MMDCN_WITH_CUDA=0)"
    return {
        "CPU library": f"loaded, {torch.ops.mmdcn.cpu_capability()} kernels, "
        f"{torch.get_num_threads()} threads",
        "CUDA library": cuda,
    }


def _largest_error(device: torch.device, dtype: torch.dtype) -> float:
    """The error of the output and all gradients of one call, against the reference in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "input": (2, 8, 12, 11),
        "offset": (2, 18, 12, 11),
        "weight": (4, 8, 3, 3),
        "bias": (4,),
        "mask": (2, 9, 12, 11),
    }
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    # The offsets are multiples of 1/8, so that no dtype moves a sample across a pixel's border.
    values["offset"] = (values["offset"] * 8).round() / 8
    grad_output = torch.randn(2, 4, 12, 11, generator=generator).to(dtype)

    def results(function, target_device: torch.device | str, target: torch.dtype) -> list:
        leaves = {
            name: value.to(dtype).to(target_device, target).detach().requires_grad_()
            for name, value in values.items()
        }
        output = function(**leaves, padding=1)
        output.backward(grad_output.to(target_device, target))
        return [output.detach(), *(leaf.grad for leaf in leaves.values())]

    ours = results(deform_conv2d, device, dtype)
    exact = results(reference.deform_conv2d, "cpu", torch.float64)
    return max(
        float((a.double().cpu() - b).abs().max() / b.abs().max()) for a, b in zip(ours, exact)
    )


def main() -> int:
    for name, value in {**_versions(), **_libraries()}.items():
        print(f"{name:18} {value}")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    failed = False
    for device in devices:
        label = str(device)
        if device.type == "cuda":
            label += f" ({torch.cuda.get_device_name(device)})"
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            try:
                error = _largest_error(device, dtype)
            except RuntimeError as problem:
                failed = True
                print(f"{label:18} {name}: FAILED: {problem}")
                continue
            right = error < 32 * torch.finfo(dtype).eps
            failed |= not right
            print(
                f"{label:18} {name}: forward and backward {'ok' if right else 'WRONG'}, "
                f"largest relative error {error:.1e}"
            )
    plugin = getattr(mmdcn, "plugin", None)
    print(plugin.report() if plugin else "The toolbox (mmengine and mmcv) is not installed.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
