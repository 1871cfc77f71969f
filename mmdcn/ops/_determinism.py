"""What operators say that add in no fixed order."""

import warnings

import torch


def alert_not_deterministic(name: str) -> None:
    """What torch does for its own operators of this kind, for the gradient of an input on CUDA.

    Raises RuntimeError under ``torch.use_deterministic_algorithms(True)``, or warns where that
    asked for a warning only.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        f"the gradient of {name} with respect to its input is not deterministic on CUDA, and "
        "torch.use_deterministic_algorithms(True) is set: set warn_only=True to accept that"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)
