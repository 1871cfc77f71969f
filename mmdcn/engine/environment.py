"""What the tools need of the environment: a launcher's variables, a display, a device."""

from __future__ import annotations

import argparse
import os
import sys

from mmdcn.errors import InputError, first_line

__all__ = ["DEVICES", "check_device", "check_display", "check_launcher", "device_name"]

_SET_BY = {
    "pytorch": ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODELIST"),
    "mpi": (
        *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
        "MASTER_ADDR",
    ),
}
_STARTED_BY = {
    "pytorch": "tools/dist_train.sh, tools/dist_test.sh and torchrun",
    "slurm": "tools/slurm_train.sh and srun",
    "mpi": "mpirun (MASTER_ADDR is to be set by you)",
}


def check_launcher(name: str) -> None:
    """Check that a launcher has started this process.

    Raises:
        InputError: a variable is missing that it sets.
    """
    missing = [variable for variable in _SET_BY.get(name, ()) if variable not in os.environ]
    if missing:
        raise InputError(
            f"--launcher {name}: expected the environment variables {', '.join(missing)}, which "
            f"{_STARTED_BY[name]} set: start the tool by these, or leave out --launcher"
        )


def check_display(instead: str) -> None:
    """Check that a window can be shown.

    Args:
        instead: what to ask for where there is none.

    Raises:
        InputError: there is no display, and matplotlib is not told what to use for one.
    """
    variables = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    if sys.platform.startswith("linux") and not any(os.environ.get(name) for name in variables):
        raise InputError(f"--show: there is no display (DISPLAY is not set): {instead}")


#: The kinds of devices that torch and the toolbox know.
DEVICES = ("cpu", "cuda", "mps", "xpu", "npu", "mlu", "musa", "hpu", "mtia")


def device_name(text: str) -> str:
    """The value of ``--device``, as far as it can be read without torch."""
    kind, colon, index = text.partition(":")
    if kind not in DEVICES or (colon and not index.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(DEVICES)}, or such as cuda:1, got {text!r}"
        )
    return text


def check_device(name: str) -> None:
    """Check that torch has a device of this name.

    Raises:
        InputError: it has not.
    """
    import torch

    try:
        torch.empty(0, device=name)
    # ImportError: of a device whose part of torch is a package of its own.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {name}: {first_line(error)}") from error
