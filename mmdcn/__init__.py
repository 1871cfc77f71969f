"""mmdcn: deformable convolution for the OpenMMLab detection toolbox."""

from . import ops
from .version import __version__

__all__ = ["__version__", "ops"]
