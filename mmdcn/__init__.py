"""mmdcn: deformable convolution for the OpenMMLab detection toolbox.

Importing it installs the plugin (:mod:`mmdcn.plugin`) where the toolbox is installed. Without the
toolbox, the operators, the layers and the conversion of models work all the same.
"""

from importlib.util import find_spec

from . import startup
from .version import __version__

__all__ = ["__version__", "layers", "models", "ops"]

_WITHOUT_TOOLBOX = (
    "mmdcn.plugin is for the OpenMMLab toolbox, and mmengine and mmcv are not both installed; "
    "operators, layers and the conversion of models work without them"
)


def _toolbox_is_installed() -> bool:
    return find_spec("mmengine") is not None and find_spec("mmcv") is not None


def __getattr__(name: str) -> None:
    if name == "plugin" and not _toolbox_is_installed():
        raise AttributeError(_WITHOUT_TOOLBOX)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not startup.postponed():
    from . import layers, models, ops

    if _toolbox_is_installed():
        from . import plugin

        plugin.install()
        __all__ += ["plugin"]
