"""mmdcn: deformable convolution for the OpenMMLab detection toolbox.

Importing it installs the plugin (:mod:`mmdcn.plugin`) where the toolbox is installed. Without the
toolbox, the operators and the layers work all the same.
"""

from importlib.util import find_spec

from . import startup
from .version import __version__

__all__ = ["__version__", "layers", "ops"]

if not startup.postponed():
    from . import layers, ops

    if find_spec("mmengine") is not None and find_spec("mmcv") is not None:
        from . import models, plugin

        plugin.install()
        __all__ += ["models", "plugin"]
