"""Loading of checkpoints in which offset branches have their former names, in the whole process.

The layers know those names themselves, but only what contains a layer is shown them. Code that has
nothing to do with mmdcn builds what contains a layer, so torch has to tell of every module that
becomes part of another.
"""

from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from mmdcn.layers.deform_conv import accept_old_keys_in_parent

__all__ = ["install", "installed", "uninstall"]

_handle: RemovableHandle | None = None


def install() -> None:
    """Let models that are built from now on load those checkpoints too."""
    global _handle
    if _handle is None:
        _handle = register_module_module_registration_hook(accept_old_keys_in_parent)


def uninstall() -> None:
    """Take the hook away; models that were built meanwhile keep loading those checkpoints."""
    global _handle
    if _handle is not None:
        _handle.remove()
        _handle = None


def installed() -> bool:
    """Whether models that are built now load those checkpoints."""
    return _handle is not None
