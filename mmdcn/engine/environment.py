"""What the tools need of the environment: a launcher's variables, and a display."""

from __future__ import annotations

import os
import sys

from mmdcn.errors import InputError

__all__ = ["check_display", "check_launcher"]

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
