"""What ``torch.use_deterministic_algorithms(True)`` asks of the operators on CUDA."""

import os
import warnings

import torch

from ._after_import import constant_to_the_compiler

# The settings under which cuBLAS adds in the same order in every run.
_WORKSPACES = (":4096:8", ":16:8")


def products_are_refused() -> bool:
    """Whether torch refuses products of matrices on CUDA, or warns of them, in this setting."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in _WORKSPACES
    )


@constant_to_the_compiler
def alert_products(public: str) -> None:
    """Report that the products of a convolution on CUDA may differ from run to run.

    torch does so itself when it multiplies, but its sentence would be lost on the way through the
    compiled operator.

    Args:
        public: the public function, as the message names it.

    Raises:
        RuntimeError: torch is to be deterministic, and cuBLAS is not set up for it; a warning where
            ``warn_only=True`` was given.
    """
    if products_are_refused():
        _alert(
            f"{public} is not deterministic on CUDA, because it uses cuBLAS, and "
            "torch.use_deterministic_algorithms(True) is set: to enable deterministic behavior in "
            "this case, you must set an environment variable before running your PyTorch "
            "application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or CUBLAS_WORKSPACE_CONFIG=:16:8. For "
            "more information, go to "
            "https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility"
        )


def alert_gradient(public: str) -> None:
    """Report that the gradient of the input has no fixed order of additions.

    Args:
        public: the public function, as the message names it.

    Raises:
        RuntimeError: torch is to be deterministic; a warning where ``warn_only=True`` was given.
    """
    if torch.are_deterministic_algorithms_enabled():
        _alert(
            f"the gradient of {public} with respect to its input is not deterministic on CUDA, and "
            "torch.use_deterministic_algorithms(True) is set: set warn_only=True to accept that"
        )


def _alert(message: str) -> None:
    """Raise, or warn where warn_only was given, as torch's own operators do."""
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=3)
